"""Features of a row from one forward pass of a small model: what a student knows of it.

`lm`: of a causal language model, the mean hidden state over the row and over its target tokens, the mean readout
residual e = W^T (p - onehot) over them (the gradient of the loss by the last hidden state h), the loss, the lengths,
and the mean of e h^T: the gradient of the readout's weights as W sees it, which the same forward pass gives. A wide
model's e and h are mapped to 48 numbers first.
`encoder`: of a sentence encoder, the mean of its last hidden states. No gradient is taken. Not here: what is made of
the features (student.py).
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from influent import loading
from influent.collect import pack
from influent.errors import SpecError
from influent.layers import device_of
from influent.lexical import Bm25, TfIdf
from influent.maps import draw
from influent.records import display_text
from influent.rng import Stream
from influent.task import CausalLM, Part, describe

Content = Mapping[str, Any]
MAX_LENGTH = 512
PIECE = 1 << 20  # logits worked on at once for the readout residual
SIDE = 48  # of e h^T, at most


@runtime_checkable
class Features(Protocol):
    """Rows to numbers. `facts` and `tensors` are what a student stores of it."""

    facts: dict[str, Any]

    @property
    def tensors(self) -> dict[str, Tensor]: ...
    def __call__(self, rows: Sequence[Content]) -> tuple[np.ndarray, np.ndarray]:
        """Features [n, D] float32 and target tokens [n] of some rows."""
        ...


class Words:
    """Features of words: `tfidf` or `bm25`; their tokens are words."""

    def __init__(self, kind: str, made: TfIdf | Bm25) -> None:
        self.facts: dict[str, Any] = {"kind": kind}
        self.made = made

    @property
    def tensors(self) -> dict[str, Tensor]:
        if isinstance(self.made, TfIdf):
            return {"idf": torch.from_numpy(self.made.idf)}
        return {
            "codes": torch.from_numpy(self.made.codes),
            "weights": torch.from_numpy(self.made.weights),
            "length": torch.tensor([self.made.mean_length], dtype=torch.float64),
        }

    @staticmethod
    def restore(kind: str, tensors: Mapping[str, Tensor]) -> "Words":
        if kind == "tfidf":
            return Words(kind, TfIdf(tensors["idf"].numpy()))
        return Words(kind, Bm25(tensors["codes"].numpy(), tensors["weights"].numpy(), float(tensors["length"])))

    def __call__(self, rows: Sequence[Content]) -> tuple[np.ndarray, np.ndarray]:
        texts = [display_text(dict(row)) for row in rows]
        return self.made(texts), np.array([float(len(text.split())) for text in texts])


class LanguageModel:
    """Features of a causal language model, frozen.

    Args:
        side: of the mean of e h^T, at most; 0, as in students before it was there, for none of it.
    """

    def __init__(
        self, model: nn.Module, task: CausalLM, *, token_budget: int = 4096, kind: str = "lm", side: int = SIDE
    ) -> None:
        self.model, self.task, self.token_budget, self.side = model, task, token_budget, side
        width = cast(Any, model).get_output_embeddings().weight.shape[1]
        streams = [Stream(0, "student", "rademacher", name) for name in (("out/0", "in/0") if side else ())]
        self._sides = [draw("rademacher", width, side, stream=stream).to(device_of(model)) for stream in streams]
        self.facts: dict[str, Any] = {
            "kind": kind,
            "model": loading.fingerprint(model),
            "config": loading.config_facts(model),
            "parameters": sum(p.numel() for p in model.parameters()),
            "max_length": task.max_length,
            "task": describe(task),
            **({"side": side} if side else {}),
        }

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {}

    @torch.no_grad()
    def __call__(self, rows: Sequence[Content]) -> tuple[np.ndarray, np.ndarray]:
        """A row of several parts has the means over all of them; one without a target token has zeros."""
        x, tokens = self.differentiable(rows)
        return x.float().numpy(), tokens.numpy()

    def differentiable(self, rows: Sequence[Content]) -> tuple[Float[Tensor, "n D"], Float[Tensor, " n"]]:
        """The same as float64 tensors on the CPU, through which the model can be trained."""
        queue = [(i, part) for i, parts in enumerate(self.task.each_parts(rows)) for part in parts]
        sums: Tensor | None = None
        counts = torch.zeros(len(rows), 2, dtype=torch.float64)  # tokens, target tokens
        for batch in pack(queue, self.token_budget):
            where = torch.tensor([i for i, _ in batch])
            found = self._batch([part for _, part in batch]).double().cpu()
            if sums is None:
                sums = torch.zeros(len(rows), found.shape[1], dtype=torch.float64)
            sums.index_add_(0, where, found)
            counts.index_add_(0, where, torch.tensor([[part.length, part.targets] for _, part in batch]).double())
        if sums is None:
            raise SpecError("none of these rows has a token to predict")
        width = cast(Any, self.model).get_output_embeddings().weight.shape[1]
        over_row, over_targets, loss, products = sums.split([width, 2 * width, 1, sums.shape[1] - 3 * width - 1], dim=1)
        tokens, targets = counts[:, :1].clamp(min=1), counts[:, 1:].clamp(min=1)
        means = [over_row / tokens, over_targets / targets, loss / targets]
        lengths = [loss.clamp(min=0).log1p(), counts[:, :1].log1p(), counts[:, 1:].log1p()]
        return torch.cat([*means, *lengths, products / targets], dim=1), counts[:, 1]

    def _batch(self, parts: Sequence[Part]) -> Float[Tensor, "B F"]:
        """Sums over each part's positions: hidden states, those at targets, residuals, the loss, and products."""
        device = device_of(self.model)
        inputs = self.task.collate(parts)
        ids, labels = inputs["input_ids"].to(device), inputs["labels"].to(device)
        out = self.model(input_ids=ids, use_cache=False, output_hidden_states=True)
        hidden, logits = out.hidden_states[-1].float(), out.logits  # [B, T, H], [B, T, V]
        inside = torch.arange(ids.shape[1], device=device) < torch.tensor(
            [[part.length] for part in parts], device=device
        )
        at = labels[:, 1:] != -100  # the positions before a target, whose output predicts it
        before = nn.functional.pad(at, (0, 1))
        over_row = (hidden * inside.unsqueeze(-1)).sum(1)
        over_targets = (hidden * before.unsqueeze(-1)).sum(1)
        residual, loss = self._readout(logits, before, labels)  # [n, H], [n]: of the targets, row by row
        row = before.nonzero(as_tuple=True)[0]
        sums = [each.new_zeros(len(ids), each.shape[1]).index_add(0, row, each) for each in (residual, loss)]
        found = [over_row, over_targets, *sums]
        if self._sides:
            out, inside = (side(x) for side, x in zip(self._sides, (residual, hidden[before]), strict=True))
            places = before.nonzero(as_tuple=True)
            spread = [hidden.new_zeros(*before.shape, x.shape[1]).index_put(places, x) for x in (out, inside)]
            found.append(torch.einsum("bto,bti->boi", *spread).flatten(1))
        return torch.cat(found, dim=1)

    def _readout(self, logits: Tensor, before: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """W^T (p - onehot) [n, H] and the loss [n, 1] of each target, row by row."""
        head = cast(Any, self.model).get_output_embeddings().weight.float()  # [V, H]
        rows, places = before.nonzero(as_tuple=True)
        wanted = labels[rows, places + 1]
        step = max(1, PIECE // logits.shape[-1])
        residuals, losses = [], []
        for lo in range(0, len(rows), step):
            part = slice(lo, lo + step)
            logp = logits[rows[part], places[part]].float().log_softmax(-1)  # [m, V]
            losses.append(-logp.gather(1, wanted[part].unsqueeze(1)))
            residuals.append(logp.exp() @ head - head[wanted[part]])
        return torch.cat(residuals), torch.cat(losses)


class Encoder:
    """Features of a sentence encoder: the mean of its last hidden states over the text's tokens."""

    def __init__(self, model: nn.Module, tokenizer: Any, max_length: int, *, token_budget: int = 4096) -> None:
        self.model, self.tokenizer, self.max_length, self.token_budget = model, tokenizer, max_length, token_budget
        self.facts: dict[str, Any] = {
            "kind": "encoder", "model": loading.fingerprint(model), "max_length": max_length,
            "tokenizer": len(tokenizer),
        }  # fmt: skip

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {}

    @torch.no_grad()
    def __call__(self, rows: Sequence[Content]) -> tuple[np.ndarray, np.ndarray]:
        ids = [
            self.tokenizer(display_text(dict(row)), truncation=True, max_length=self.max_length)["input_ids"]
            for row in rows
        ]
        queue = [(i, Part(tokens, len(tokens), len(tokens))) for i, tokens in enumerate(ids) if tokens]
        device, out = device_of(self.model), None
        for batch in pack(queue, self.token_budget):
            longest = batch[0][1].length
            padded, seen = torch.zeros(2, len(batch), longest, dtype=torch.int64)
            for row, (_, part) in enumerate(batch):
                padded[row, : part.length], seen[row, : part.length] = torch.tensor(part.inputs), 1
            states = self.model(input_ids=padded.to(device), attention_mask=seen.to(device)).last_hidden_state.float()
            weight = seen.to(device).unsqueeze(-1)
            means = (states * weight).sum(1) / weight.sum(1)
            out = torch.zeros(len(rows), means.shape[1]) if out is None else out
            out[[i for i, _ in batch]] = means.cpu()
        if out is None:
            raise SpecError("none of these rows has a token")
        return out.numpy(), np.array([float(len(tokens)) for tokens in ids])


def load_lm(
    path: str, *, max_length: int = MAX_LENGTH, token_budget: int, device: str | None, kind: str = "lm",
    side: int = SIDE,
) -> LanguageModel:  # fmt: skip
    """The small model at a path; rows longer than it reads are cut into parts."""
    model, tokenizer = loading.load(path, dtype="float32", device=device)
    longest = min(max_length, loading.context_length(model) or max_length)
    return LanguageModel(
        model, CausalLM(tokenizer, max_length=longest), token_budget=token_budget, kind=kind, side=side
    )


def load_encoder(path: str, *, max_length: int = MAX_LENGTH, token_budget: int, device: str | None) -> Encoder:
    """A sentence encoder in a Hugging Face folder; SpecError when it cannot be loaded."""
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModel.from_pretrained(path).to(loading.choose_device(device)).eval()
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise SpecError(f"{path}: cannot be loaded as a sentence encoder: {str(error).splitlines()[0]}") from error
    longest = min(max_length, loading.context_length(model) or max_length)
    return Encoder(model, tokenizer, longest, token_budget=token_budget)

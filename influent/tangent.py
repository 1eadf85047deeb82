"""The rung `tangent`: a small language model that is taught how the owner's predictions move along a target.

Its labels are slopes (slopes.py): at every place of a labelled row, by how much each of many tokens' log-probability
would rise. The student says that the slope of token v after hidden state h is <A h + a, W_v> + <c, h> + b_v, with W its
readout; all of it is trained, by squared error over the tokens that the owner's model draws there (half) and the one
that is there (half). A row is then worth minus the sum over its tokens, for which neither logits nor softmax are made:
one row of G = W A + c a token. A small ridge regression turns that sum, also over the root and the number of tokens,
into values of the index's unit. It is fitted to a fifth of the labels, left out of the training, which also says when
to stop. Not here: how it is trained (training.py), the other rungs (ladder.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from influent import loading
from influent.collect import pack
from influent.digests import digest
from influent.errors import SpecError
from influent.features import Content, LanguageModel
from influent.layers import device_of
from influent.progress import Progress
from influent.records import content_hash
from influent.ridge import Ridge, fit
from influent.slopes import Slopes
from influent.storage import Store
from influent.task import CausalLM, Part, describe
from influent.training import Epochs, Recipe, pieces
from influent.tuning import left_out

KIND = "tangent"
EPOCHS, BATCH = 12, 32
RATE = 0.1  # over the small model's width (Yang et al., 2022: the rate of Adam goes with 1 / width)
THERE = 0.5  # of the error is that of the tokens that are there, the rest of those drawn


class Readout(nn.Module):
    """Slopes from hidden states: of token v after h, <A h + a, W_v> + <c, h> + b_v. All are 0 at first."""

    def __init__(self, words: nn.Parameter) -> None:
        super().__init__()
        size, width = words.shape

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape, device=words.device))

        self.words = words  # W, which the small model owns
        self.matrix, self.shift = zeros(width, width), zeros(width)  # A, a
        self.tilt, self.bias = zeros(width), zeros(size)  # c, b

    @property
    def own(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.named_parameters() if name != "words"}

    def forward(self, states: Float[Tensor, "n H"], tokens: Tensor) -> Float[Tensor, "n k"]:
        """The slopes of tokens [n, k] after these states."""
        leaning = (states @ self.tilt)[:, None] + nn.functional.embedding(tokens, self.bias[:, None])[..., 0]
        asked = states @ self.matrix.T + self.shift
        return (nn.functional.embedding(tokens, self.words) @ asked[:, :, None])[..., 0] + leaning

    @torch.no_grad()
    def folded(self) -> tuple[Tensor, Tensor]:
        """G [V, H] and g [V]: the slope of token v is <h, G_v> + g_v."""
        return self.words @ self.matrix + self.tilt, self.bias + self.words @ self.shift


class Tangent:
    """Features of a row: what its tokens' slopes add up to, and how many they are."""

    def __init__(self, model: nn.Module, task: CausalLM, readout: Readout, *, token_budget: int = 4096) -> None:
        self.model, self.task, self.readout, self.token_budget = model, task, readout, token_budget
        self.body = cast(Any, model).base_model
        self.directions, self.bias = readout.folded()
        self.facts: dict[str, Any] = {
            "kind": KIND, "model": loading.fingerprint(model), "config": loading.config_facts(model),
            "parameters": sum(p.numel() for p in model.parameters()), "max_length": task.max_length,
            "task": describe(task),
        }  # fmt: skip

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {name: p.detach().cpu() for name, p in self.readout.own.items()}

    @torch.inference_mode()
    def __call__(self, rows: Sequence[Content]) -> tuple[np.ndarray, np.ndarray]:
        """Features [n, 4] and target tokens [n]; a row without one has zeros."""
        queue = [(i, part) for i, parts in enumerate(self.task.each_parts(rows)) for part in parts]
        sums = torch.zeros(len(rows), dtype=torch.float64)
        for batch in pack(queue, self.token_budget):
            states, wanted, part = self.states([part for _, part in batch])
            # A row of G a token, and neither logits nor their softmax.
            each = torch.linalg.vecdot(states, self.directions[wanted]) + self.bias[wanted]
            by_part = each.new_zeros(len(batch)).index_add_(0, part, each)
            sums.index_add_(0, torch.tensor([i for i, _ in batch]), -by_part.double().cpu())
        places, targets = zip(*((i, part.targets) for i, part in queue), strict=True) if queue else ((), ())
        counts = torch.zeros(len(rows), dtype=torch.float64)
        counts.index_add_(0, torch.tensor(places, dtype=torch.int64), torch.tensor(targets, dtype=torch.float64))
        return summed(sums, counts).numpy(), counts.numpy()

    def states(self, parts: Sequence[Part]) -> tuple[Float[Tensor, "n H"], Tensor, Tensor]:
        """The hidden state before each target of some parts, the targets [n], and their parts [n]."""
        device = device_of(self.model)
        inputs = self.task.collate(parts)
        ids, labels = inputs["input_ids"].to(device), inputs["labels"].to(device)
        hidden = self.body(input_ids=ids, use_cache=False).last_hidden_state.float()
        wanted = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        part, place = (wanted != -100).nonzero(as_tuple=True)
        return hidden[part, place], wanted[part, place], part


def summed(sums: Tensor, counts: Tensor) -> Float[Tensor, "n 4"]:
    """A row's features: its slopes' sum, over the root and the number of its tokens, and the logarithm of that."""
    n = counts.clamp(min=1)
    return torch.stack([sums, sums / n.sqrt(), sums / n, n.log()], dim=1)


class Taught(NamedTuple):
    """What was learnt, its head, and what it says of the labels that were left out of the training."""

    features: Tangent
    ridge: Ridge
    left_out: np.ndarray  # [n] bool
    predicted: np.ndarray  # of these, each by a head that did not see it
    epochs: int  # after which the model is kept


def teach(
    small: LanguageModel, rows: Sequence[Content], y: np.ndarray, known: Slopes, recipe: Recipe, *, store: Store,
    progress: Progress | None = None,
) -> Taught:  # fmt: skip
    """Train a small model (in place) on rows [n] with labels y [n] and the slopes `known` of their tokens.

    Args:
        store: where the state after each epoch is kept; it goes on from one of the same model, rows and recipe.

    Raises:
        SpecError: the small model reads other target tokens, or its hidden states are not as wide as its readout.
        NumericsError: the error is no longer finite.
    """
    out = left_out(len(rows), recipe.seed, KIND)
    run = _Teaching.begin(small, rows, known, out)
    made_of = {
        "model": small.facts["model"], "rows": [content_hash(dict(row)) for row in rows],
        "slopes": digest([known.tokens.astype(np.int32).tobytes().hex(), known.values.tobytes().hex()]),
        **recipe.facts,
    }  # fmt: skip
    epochs = Epochs(
        run.parameters, recipe, np.flatnonzero(~out), "learn slopes", KIND, run.backward, run.error, store,
        digest(made_of)[-16:],
    )  # fmt: skip
    small.model.requires_grad_(True)
    kept = epochs.run(progress)
    small.model.requires_grad_(False)
    readout = run.student.readout
    with torch.no_grad():
        for p in readout.own.values():
            p.mul_(run.unit).requires_grad_(False)  # slopes were learnt in units of their spread
    made = Tangent(small.model, small.task, readout, token_budget=small.token_budget)
    x, _ = made([rows[i] for i in np.flatnonzero(out).tolist()])
    ridge, predicted = fit(x, y[out])
    return Taught(made, ridge, out, predicted, kept)


def recipe_for(small: LanguageModel, *, epochs: int | None, rate: float | None, seed: int) -> Recipe:
    """The recipe asked for; where nothing is said, what measured best."""
    epochs = EPOCHS if epochs is None else epochs
    rate = RATE / words_of(small.model).shape[1] if rate is None else rate
    return Recipe(epochs=epochs, rate=rate, batch=BATCH, patience=max(1, epochs), seed=seed)


def words_of(model: nn.Module) -> nn.Parameter:
    """The weights W [V, H] of a small model's readout."""
    return cast(Any, model).get_output_embeddings().weight


@dataclass(frozen=True, eq=False)
class _Teaching:
    """The student in training. `starts` are where each row's targets begin among the slopes."""

    student: Tangent
    parts: Sequence[Sequence[Part]]
    lengths: Sequence[int]
    starts: np.ndarray
    tokens: Tensor
    values: Tensor  # in units of their spread
    unit: float
    left_out: np.ndarray

    @classmethod
    def begin(cls, small: LanguageModel, rows: Sequence[Content], known: Slopes, out: np.ndarray) -> "_Teaching":
        readout = Readout(words_of(small.model))
        student = Tangent(small.model, small.task, readout, token_budget=small.token_budget)
        parts = [small.task.parts(row) for row in rows]
        starts = np.concatenate([[0], np.cumsum(known.counts)])
        _check_targets(parts, known, starts)
        seen = np.repeat(~out, known.counts)
        unit = float(np.sqrt(np.mean(known.values[seen].astype(np.float64) ** 2))) or 1.0
        return cls(
            student, parts, [sum(part.length for part in each) for each in parts], starts,
            torch.from_numpy(known.tokens).long(), torch.from_numpy(known.values) / unit, unit, out,
        )  # fmt: skip

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        own = {f"model.{name}": p for name, p in self.student.model.named_parameters()}
        return own | {f"readout.{name}": p for name, p in self.student.readout.own.items()}

    def backward(self, batch: list[int]) -> None:
        total = sum(int(self.starts[i + 1] - self.starts[i]) for i in batch)
        for piece in pieces(self.lengths, batch, self.student.token_budget):
            parts, at = self._gathered(piece)
            if not parts:
                continue
            states, _, _ = self.student.states(parts)
            device = states.device
            square = (
                self.student.readout(states, self.tokens[at].to(device)) - self.values[at].to(device)
            ).square()  # [n, 1 + drawn]
            error = THERE * square[:, 0] + (1 - THERE) * square[:, 1:].mean(dim=1)
            (error.sum() / total).backward()

    @torch.inference_mode()
    def error(self) -> float:
        """The mean over the rows left out of the squared error of their sums, over their numbers of tokens."""
        found, rows = [], np.flatnonzero(self.left_out).tolist()
        for piece in pieces(self.lengths, rows, self.student.token_budget):
            parts, at = self._gathered(piece)
            if not parts:
                continue
            states, wanted, _ = self.student.states(parts)
            less = self.student.readout(states, wanted[:, None])[:, 0].cpu() - self.values[at, 0]
            sizes = [int(self.starts[i + 1] - self.starts[i]) for i in piece]
            found += [float(each.sum()) ** 2 / len(each) for each in less.split(sizes) if len(each)]
        return float(np.mean(found)) if found else 0.0

    def _gathered(self, rows: list[int]) -> tuple[list[Part], Tensor]:
        """The parts of some rows, and where the slopes of their targets are."""
        at = [torch.arange(int(self.starts[i]), int(self.starts[i + 1])) for i in rows]
        return [part for i in rows for part in self.parts[i]], torch.cat(at)


def _check_targets(parts: Sequence[Sequence[Part]], known: Slopes, starts: np.ndarray) -> None:
    for i, each in enumerate(parts):
        own = [token for part in each for token, wanted in zip(part.inputs[0], part.inputs[1], strict=True) if wanted]
        if own != known.tokens[starts[i] : starts[i + 1], 0].tolist():
            raise SpecError(
                "the small model reads other target tokens than the owner's model: the rung tangent needs one "
                "tokenizer and chat template; leave it out, or give another --student"
            )


def restore(small: LanguageModel, tensors: Mapping[str, Tensor]) -> Tangent:
    """The features of a student on disk, whose small model was loaded."""
    readout = Readout(words_of(small.model))
    with torch.no_grad():
        for name, p in readout.own.items():
            p.copy_(tensors[name]).requires_grad_(False)
    return Tangent(small.model, small.task, readout, token_budget=small.token_budget)

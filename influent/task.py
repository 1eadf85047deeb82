"""Tasks: what a training example's loss is, and what a query asks about.

`Task` is the only thing that the user of a model of their own must write: two functions from a batch to one scalar an
example. `Encodes` is the optional capability of tasks whose examples are records (texts) and must become tensors;
without it an example is whatever the data set yields, collated by PyTorch. `Samples` is that of tasks whose model
predicts a distribution, which K-FAC draws labels from; `Margins` that of tasks with a right answer (TRAK). Losses are
summed over an example's target tokens, so that a row does not depend on its batch. Not here: reading records
(catalog.py), batching (collect.py).
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from influent.errors import DataError, SpecError
from influent.labels import draw_labels
from influent.rng import Stream
from influent.tokenloss import margin_losses, token_losses, token_margins

IGNORED = -100  # a label that is none, as PyTorch's losses have it


@runtime_checkable
class Task(Protocol):
    """One scalar per example. Larger scores mean that an example pushed `measure` down."""

    def loss(self, model: nn.Module, batch: Any) -> Float[Tensor, " B"]:
        """The training loss of each example."""
        ...

    def measure(self, model: nn.Module, batch: Any) -> Float[Tensor, " B"]:
        """What a query asks about: usually the loss of the query."""
        ...


@dataclass(frozen=True, slots=True)
class Part:
    """One model input. A document longer than the context is several parts, whose gradients add up to one row."""

    inputs: Any
    length: int
    targets: int


@runtime_checkable
class Encodes(Protocol):
    """The capability of a task to turn records into parts and parts into a batch."""

    def parts(self, example: Mapping[str, Any]) -> list[Part]: ...
    def collate(self, parts: Sequence[Part]) -> Any: ...
    def describe(self) -> dict[str, Any]: ...


@runtime_checkable
class Targets(Protocol):
    """The capability of a task without records to tell which examples have nothing to learn from: they get no row."""

    def targets(self, example: Any) -> int:
        """How many targets an example has; DataError for one that has none because it is wrong."""
        ...


@runtime_checkable
class Samples(Protocol):
    """The capability to draw labels from the model's own predictions, whose gradients make the true Fisher matrix."""

    def sampled_loss(self, model: nn.Module, batch: Any, streams: Sequence[Stream]) -> Float[Tensor, " B"]:
        """The loss of each example at labels drawn for it with the words of its stream and no others."""
        ...


@runtime_checkable
class Margins(Protocol):
    """The capability to tell by how much the model prefers what is right: TRAK's model output function."""

    def margin(self, model: nn.Module, batch: Any) -> Float[Tensor, " B"]:
        """log(p / (1 - p)) with p the probability of what is right, summed over an example's targets."""
        ...

    def residual(self, model: nn.Module, batch: Any) -> Float[Tensor, " B"]:
        """1 - p, the derivative of the loss by minus the margin; the mean over an example's targets."""
        ...


@runtime_checkable
class Masks(Protocol):
    """The capability to say which positions of a batch count: padding, and what no target depends on, do not."""

    def mask(self, batch: Any) -> Bool[Tensor, "B T"]: ...


@runtime_checkable
class Logits(Protocol):
    """The capability of tasks whose loss is a weighted sum of cross-entropies, which the Gauss-Newton matrix needs."""

    def logits(self, model: nn.Module, batch: Any) -> tuple[Float[Tensor, "n V"], Float[Tensor, " n"]]:
        """The logits of everything that the batch's loss predicts, and the weight of each."""
        ...


@dataclass(frozen=True)
class Classification:
    """Cross-entropy of a module that maps inputs to logits [B, C]; a batch is (inputs, labels [B]).

    It is computed from the margin m, as log(1 + exp(-m)): the usual way loses the gradient of a confident prediction,
    p - 1 of the label, to the rounding of p. An example (input, label) whose label is -100, which PyTorch's
    cross-entropy ignores, has no target and no row.

    `asks` is what a query asks about: the `loss` of its label, or the `margin`, log(p / (1 - p)). For one model they
    rank rows alike. In an ensemble a loss counts the members by how wrong they are, and a margin all of them: it
    foretells better what retraining does (docs/scores.md).
    """

    asks: str = "loss"

    def __post_init__(self) -> None:
        if self.asks not in ("loss", "margin"):
            raise SpecError(f"Classification asks about {self.asks!r}, expected loss or margin")

    def targets(self, example: Any) -> int:
        label = int(example[1])
        if label < 0 and label != IGNORED:
            raise DataError(f"its label is {label}, expected a class from 0 on, or {IGNORED} for none")
        return int(label != IGNORED)

    def loss(self, model: nn.Module, batch: Any) -> Float[Tensor, " B"]:
        return margin_losses(self.margin(model, batch))

    def measure(self, model: nn.Module, batch: Any) -> Float[Tensor, " B"]:
        return self.loss(model, batch) if self.asks == "loss" else -self.margin(model, batch)

    def margin(self, model: nn.Module, batch: Any) -> Float[Tensor, " B"]:
        return token_margins(model(batch[0]), batch[1])

    def residual(self, model: nn.Module, batch: Any) -> Float[Tensor, " B"]:
        return torch.sigmoid(-self.margin(model, batch))

    def sampled_loss(self, model: nn.Module, batch: Any, streams: Sequence[Stream]) -> Float[Tensor, " B"]:
        logits = model(batch[0])
        drawn = draw_labels(logits, torch.tensor([stream.uniforms(1)[0] for stream in streams]))
        return margin_losses(token_margins(logits, drawn))

    def logits(self, model: nn.Module, batch: Any) -> tuple[Float[Tensor, "n V"], Float[Tensor, " n"]]:
        found = model(batch[0])
        return found, found.new_ones(len(found))


@dataclass(frozen=True)
class CausalLM:
    """Next-token cross-entropy of a Hugging Face causal language model.

    A record is `{"text"}` (every token but the first is a target), `{"prompt", "completion"}` (the completion's tokens
    are) or `{"messages"}` (the assistant's tokens are, under the tokenizer's chat template).

    Args:
        tokenizer: a Hugging Face tokenizer.
        max_length: the context in tokens. Longer documents are split; neighbouring parts share one token, so that every
            token but the document's first is a target exactly once.
        reduction: `sum` over an example's target tokens, or their `mean`.
    """

    tokenizer: Any = field(repr=False)
    max_length: int = 512
    reduction: str = "sum"

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise SpecError(f"max_length is {self.max_length}, expected at least 2 tokens: one to read, one to predict")
        if self.reduction not in ("sum", "mean"):
            raise SpecError(f"reduction is {self.reduction!r}, expected 'sum' or 'mean'")

    def describe(self) -> dict[str, Any]:
        """What identifies the task in an index's digest: the tokenizer by its behaviour, not by its path."""
        probe = "Attribution 0123 — naïve\n\tdef f(x): return x"
        return {
            "kind": "causal-lm",
            "max_length": self.max_length,
            "reduction": self.reduction,
            "tokenizer": {
                "size": len(self.tokenizer),
                "vocabulary": _digest_of(self.tokenizer.get_vocab()),
                "probe": list(self.tokenizer(probe)["input_ids"]),
            },
            "chat_template": getattr(self.tokenizer, "chat_template", None),
        }

    def parts(self, example: Mapping[str, Any]) -> list[Part]:
        """Parts of a record that have at least one target token; none for a text of one token."""
        return self._cut(*self._tokens(example))

    def each_parts(self, examples: Sequence[Mapping[str, Any]]) -> list[list[Part]]:
        """The parts of each record. Texts are tokenized together, which takes half the time of one by one."""
        texts = [example["text"] for example in examples if "text" in example]
        together = iter(self.tokenizer(texts, return_attention_mask=False)["input_ids"] if texts else ())
        out = []
        for example in examples:
            if "text" in example:
                ids = list(next(together))
                out.append(self._cut(ids, [True] * len(ids)))
            else:
                out.append(self.parts(example))
        return out

    def _cut(self, ids: list[int], targets: list[bool]) -> list[Part]:
        total = sum(targets[1:])
        out = []
        for start in range(0, max(len(ids) - 1, 1), self.max_length - 1):
            piece, wanted = ids[start : start + self.max_length], targets[start : start + self.max_length]
            count = sum(wanted[1:])  # a part's first token has nothing before it, or was a target of the part before
            if count:
                weight = 1.0 if self.reduction == "sum" else 1.0 / total
                out.append(Part((piece, [False, *wanted[1:]], weight), len(piece), count))
        return out

    def _tokens(self, example: Mapping[str, Any]) -> tuple[list[int], list[bool]]:
        if "text" in example:
            ids = list(self.tokenizer(example["text"])["input_ids"])
            return ids, [True] * len(ids)
        if "messages" in example:
            spans = self._chat(example["messages"])
            first: list[int] = []
        else:
            spans = [(example["completion"], True)]
            first = self._opening(example["prompt"])
        ids, targets = list(first), [False] * len(first)
        for text, wanted in spans:
            more = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            ids.extend(more)
            targets.extend([wanted] * len(more))
        return ids, targets

    def _opening(self, prompt: str) -> list[int]:
        """A prompt's tokens with the tokenizer's own opening tokens, without a closing one."""
        ids = list(self.tokenizer(prompt)["input_ids"])
        if not ids and self.tokenizer.bos_token_id is not None:
            return [self.tokenizer.bos_token_id]  # an answer to nothing still needs a token to be predicted from
        end = self.tokenizer.eos_token_id
        return (
            ids[:-1]
            if len(ids) > 1 and ids[-1] == end and not prompt.endswith(self.tokenizer.eos_token or "\0")
            else ids
        )

    def _chat(self, messages: Sequence[Mapping[str, str]]) -> list[tuple[str, bool]]:
        """The templated conversation in spans of text, with True where the assistant speaks."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise DataError("records have `messages` but the tokenizer has no chat template; use prompt and completion")
        spans, done = [], ""
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._template(messages[:i], opening=True)
            after = self._template(messages[: i + 1], opening=False)
            if not (before.startswith(done) and after.startswith(before)):
                raise DataError(
                    "the chat template rewrites earlier messages: targets cannot be told; use prompt and completion"
                )
            spans += [(before[len(done) :], False), (after[len(before) :], True)]
            done = after
        return [(text, wanted) for text, wanted in spans if text]

    def _template(self, messages: Sequence[Mapping[str, str]], *, opening: bool) -> str:
        if not messages:
            return ""
        from jinja2.exceptions import TemplateError  # transformers' templates are Jinja's

        try:
            return self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=opening)
        except TemplateError as error:
            raise DataError(f"the chat template refuses the messages: {error}; use prompt and completion") from error

    def collate(self, parts: Sequence[Part]) -> dict[str, Tensor]:
        """Right-padded ids [B, T], labels [B, T] (-100 where not a target) and weights [B].

        No attention mask is made: under causal attention nothing that is scored can see the padding to its right.
        """
        longest = max(part.length for part in parts)
        # Nothing that is scored sees the padding, so any id will do; the tokenizer's own may lie beyond the embedding.
        ids = np.zeros((len(parts), longest), dtype=np.int64)
        targets = np.zeros((len(parts), longest), dtype=bool)
        for row, part in enumerate(parts):
            piece, wanted, _ = part.inputs
            ids[row, : len(piece)], targets[row, : len(piece)] = piece, wanted
        return {
            "input_ids": torch.from_numpy(ids),
            "labels": torch.from_numpy(np.where(targets, ids, IGNORED)),
            "weight": torch.tensor([part.inputs[2] for part in parts]),
        }

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Float[Tensor, " B"]:
        """Cross-entropy summed over each row's target tokens (times its weight)."""
        logits, at, labels = self._targets(model, batch)
        return _summed(logits, at, labels, batch)

    def sampled_loss(
        self, model: nn.Module, batch: dict[str, Tensor], streams: Sequence[Stream]
    ) -> Float[Tensor, " B"]:
        """The same at tokens drawn from the model's prediction of each target; position t takes a row's word t."""
        logits, at, _ = self._targets(model, batch)
        words = np.stack([stream.uniforms(logits.shape[1]) for stream in streams])
        drawn = draw_labels(logits.flatten(0, 1)[at], torch.from_numpy(words).flatten()[at.cpu()])
        return _summed(logits, at, drawn, batch)

    def margin(self, model: nn.Module, batch: dict[str, Tensor]) -> Float[Tensor, " B"]:
        """The log-odds of each target token, summed over each row's targets (times its weight)."""
        logits, at, labels = self._targets(model, batch)
        return _by_row(token_margins(logits.flatten(0, 1)[at], labels), at, logits, batch["weight"])

    def residual(self, model: nn.Module, batch: dict[str, Tensor]) -> Float[Tensor, " B"]:
        """1 - p of the target token, its mean over each row's targets."""
        logits, at, labels = self._targets(model, batch)
        each = torch.sigmoid(-token_margins(logits.flatten(0, 1)[at], labels))
        ones = _by_row(torch.ones_like(each), at, logits, torch.ones(len(logits)))
        return _by_row(each, at, logits, 1 / ones.clamp(min=1))

    def logits(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Float[Tensor, "n V"], Float[Tensor, " n"]]:
        logits, at, _ = self._targets(model, batch)
        found = logits.flatten(0, 1)[at]
        return found, batch["weight"].to(found.device, torch.float32)[at // logits.shape[1]]

    def _targets(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [B, T, V], the places in B * T from which a target is predicted, and the targets."""
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits
        labels = functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED).flatten()
        at = (labels != IGNORED).nonzero().flatten()
        return logits, at, labels[at]

    def mask(self, batch: dict[str, Tensor]) -> Bool[Tensor, "B T"]:
        """Positions before a row's last target."""
        targets = functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED) != IGNORED
        return targets.flip(1).cummax(dim=1).values.flip(1)

    def measure(self, model: nn.Module, batch: dict[str, Tensor]) -> Float[Tensor, " B"]:
        """The query's own loss: a positive score means that training on the example lowered it."""
        return self.loss(model, batch)


def _summed(logits: Tensor, at: Tensor, labels: Tensor, batch: dict[str, Tensor]) -> Float[Tensor, " B"]:
    """Cross-entropy at the places `at`, summed by row, times the rows' weights."""
    return _by_row(token_losses(logits.flatten(0, 1), at, labels), at, logits, batch["weight"])


def _by_row(each: Tensor, at: Tensor, logits: Tensor, weight: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """Numbers at the places `at` in B * T, summed by row, times the rows' weights."""
    rows = at // logits.shape[1]
    return each.new_zeros(len(logits)).index_add(0, rows, each) * weight.to(each.device, each.dtype)


def _digest_of(vocabulary: Mapping[str, int]) -> str:
    """BLAKE2b-128 over the tokens by number: a probe text sees only those that it uses."""
    digest = hashlib.blake2b(digest_size=16)
    for token, number in sorted(vocabulary.items(), key=lambda item: (item[1], item[0])):
        digest.update(f"{number}\0{token}\0".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def parts_of(task: Task, example: Any) -> list[Part]:
    """An example's model inputs; none if it has no target. Raises DataError for what the task cannot read."""
    if isinstance(task, Encodes):
        return task.parts(example)
    if isinstance(task, Targets):
        return [Part(example, 1, 1)] if task.targets(example) else []
    return [Part(example, 1, 1)]


def describe(task: Task) -> dict[str, Any]:
    """The task's part of an index's digest: its own description, or the name of its class."""
    if isinstance(task, Encodes):
        return task.describe()
    return {"kind": f"{type(task).__module__}.{type(task).__qualname__}"}

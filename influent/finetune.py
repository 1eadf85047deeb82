"""The built-in trainer: a causal language model fine-tuned on some of the rows, from the same start each time.

AdamW without weight decay, the rate falling linearly to zero, batches in an order that the seed alone decides, the mean
loss a target token. Outcomes are the queries' mean losses a target token, and whether the model's greedy choice is
right at every target token of the query (1 or 0). Not here: which rows (rerun.py).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from influent import loading
from influent.collect import inputs_of, pack
from influent.errors import DataError, SpecError
from influent.layers import device_of
from influent.rng import Stream
from influent.task import CausalLM, Part


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How to fine-tune: what changes the outcome."""

    epochs: int = 3
    rate: float = 5e-5
    batch: int = 8
    max_length: int = 512

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch", 1), ("max_length", 2)):
            if getattr(self, name) < least:
                raise SpecError(f"{name} is {getattr(self, name)}, expected {least} or more")
        if not self.rate > 0:
            raise SpecError(f"rate is {self.rate}, expected a number above 0")


@dataclass(eq=False)
class FineTune:
    """A trainer (rerun.py) over records: `train(rows, seed)` -> (losses [Q], answers [Q]).

    The module is changed in place and restored at the start of each call.
    """

    model: nn.Module
    tokenizer: Any
    rows: Sequence[Any]
    queries: Sequence[Any]
    recipe: Recipe
    token_budget: int = 4096  # positions in a piece of a batch: memory only, up to rounding
    _start: dict[str, Tensor] = field(init=False)
    _parts: list[list[Part]] = field(init=False)
    _asked: list[list[Part]] = field(init=False)

    def __post_init__(self) -> None:
        longest = loading.context_length(self.model)
        if longest is not None and self.recipe.max_length > longest:
            raise SpecError(
                f"max_length is {self.recipe.max_length}, but the base model reads at most {longest} tokens"
            )
        self._task = CausalLM(self.tokenizer, max_length=self.recipe.max_length)
        self._parts = [self._task.parts(row) for row in self.rows]
        self._asked = [self._task.parts(query) for query in self.queries]
        short = next((i for i, parts in enumerate(self._asked) if not parts), None)
        if short is not None:
            raise DataError(f"query {short} has no target token: a completion, or a text of two tokens, is needed")
        self._start = {name: value.clone() for name, value in self.model.state_dict().items()}

    @classmethod
    def load(
        cls, base: str, rows: Sequence[Any], queries: Sequence[Any], recipe: Recipe, *, token_budget: int = 4096,
        device: str | None = None,
    ) -> "FineTune":  # fmt: skip
        """From a model folder, GGUF file or hub name; SpecError when it cannot be loaded."""
        model, tokenizer = loading.load(base, dtype="float32", device=device)
        return cls(model, tokenizer, rows, queries, recipe, token_budget)

    def describe(self) -> dict[str, Any]:
        """What identifies the trainer in a ground truth."""
        self.model.load_state_dict(self._start)
        return {
            "kind": "fine-tune",
            "base": loading.fingerprint(self.model),
            "epochs": self.recipe.epochs,
            "rate": self.recipe.rate,
            "batch": self.recipe.batch,
            "max_length": self.recipe.max_length,
        }

    def __call__(self, rows: np.ndarray, seed: int, /) -> tuple[np.ndarray, np.ndarray]:
        self.model.load_state_dict(self._start)
        # Dropout draws from torch's generators, which are the caller's again afterwards.
        with torch.random.fork_rng():
            torch.manual_seed(int(Stream(seed, "", "finetune", "dropout").words(1)[0] >> np.uint64(1)))
            self._train(rows, seed)
        return self.measure()

    def _train(self, rows: np.ndarray, seed: int) -> None:
        recipe, device = self.recipe, device_of(self.model)
        steps = recipe.epochs * -(-len(rows) // recipe.batch)
        adam = torch.optim.AdamW(self.model.parameters(), lr=recipe.rate, weight_decay=0)
        self.model.train()
        for step, batch in enumerate(self._batches(rows, seed)):
            for group in adam.param_groups:
                group["lr"] = recipe.rate * (1 - step / steps)
            parts = [(row, part) for row in batch for part in self._parts[row]]
            targets = sum(part.targets for _, part in parts)
            adam.zero_grad()
            for piece in pack(parts, self.token_budget):
                inputs, _ = inputs_of(self._task, [part for _, part in piece], device)
                (self._task.loss(self.model, inputs).sum() / targets).backward()
            if targets:
                adam.step()
        self.model.eval()

    def _batches(self, rows: np.ndarray, seed: int) -> Iterator[list[int]]:
        for epoch in range(self.recipe.epochs):
            order = rows[Stream(seed, "", "finetune", f"order/{epoch}").permutation(len(rows))].tolist()
            for at in range(0, len(order), self.recipe.batch):
                yield order[at : at + self.recipe.batch]

    @torch.no_grad()
    def measure(self, chosen: Sequence[int] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Mean loss a target token of the queries, or of those chosen, and whether all of it is the greedy choice."""
        chosen = range(len(self._asked)) if chosen is None else chosen
        device = device_of(self.model)
        parts = [(place, part) for place, query in enumerate(chosen) for part in self._asked[query]]
        loss, right = np.zeros(len(chosen)), np.ones(len(chosen), np.int64)
        targets = np.zeros(len(chosen))
        for piece in pack(parts, self.token_budget):
            inputs, _ = inputs_of(self._task, [part for _, part in piece], device)
            found = self._task.loss(self.model, inputs).double().cpu().numpy()
            said = self.model(input_ids=inputs["input_ids"], use_cache=False).logits[:, :-1].argmax(-1)
            wanted = inputs["labels"][:, 1:]
            agrees = ((said == wanted) | (wanted == -100)).all(1).cpu().numpy()
            for (place, part), value, agreed in zip(piece, found, agrees, strict=True):
                loss[place] += value
                targets[place] += part.targets
                right[place] &= int(agreed)
        return loss / targets, right

    def step(self, rows: Sequence[int]) -> None:
        """One step of a fresh AdamW at the recipe's rate on these rows together, from the model as it is."""
        adam = torch.optim.AdamW(self.model.parameters(), lr=self.recipe.rate, weight_decay=0)
        parts = [(row, part) for row in rows for part in self._parts[row]]
        targets, device = sum(part.targets for _, part in parts), device_of(self.model)
        for piece in pack(parts, self.token_budget):
            inputs, _ = inputs_of(self._task, [part for _, part in piece], device)
            (self._task.loss(self.model, inputs).sum() / targets).backward()
        if targets:
            adam.step()
        self.model.zero_grad()

    def restore(self) -> None:
        """The model as it was at first."""
        self.model.load_state_dict(self._start)

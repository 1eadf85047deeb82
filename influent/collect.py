"""From examples to rows: parts are batched by length under a token budget, and summed back to one row an example.

The same function fills a shard and makes the gradients of queries. Memory is that of the rows asked for plus one
batch. Not here: where rows are stored (rowstore.py), what a gradient is (extract.py).
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import default_collate

from influent import extract, sides
from influent.bind import Bound
from influent.errors import DataError, NumericsError
from influent.layers import Plan, device_of
from influent.task import Encodes, Part, Task


@dataclass(frozen=True, eq=False)
class Collector:
    """Everything that turns examples into rows: model (frozen), tracked layers, maps and task.

    Args:
        token_budget: a batch holds at most this many positions, padding included (at least one part).
        skip_nonfinite: give an example whose loss or gradient is not finite a zero row, instead of raising.
    """

    model: nn.Module
    plan: Plan
    bound: dict[str, Bound]
    task: Task
    token_budget: int = 4096
    skip_nonfinite: bool = False

    @property
    def widths(self) -> dict[str, int]:
        """Row width by block name, in the model's order."""
        return {name: bound.width for name, bound in self.bound.items()}

    def collect(
        self,
        examples: Sequence[Any],
        *,
        name: Callable[[int], str],
        query: bool = False,
        progress: Callable[[float], None] | None = None,
    ) -> "Collected":
        """Rows of `examples`, in their order.

        Args:
            name: how to call example i in an error.
            query: differentiate the task's `measure` instead of its `loss`.
            progress: told the share of parts that is done, after each batch.

        Raises:
            NumericsError: a loss or gradient is not finite; names the example (and block).
        """
        device = device_of(self.model)
        out = Collected.empty(len(examples), self.widths, device)
        queue = [(i, part) for i, example in enumerate(examples) for part in self._parts(example, lambda i=i: name(i))]
        if without := set(range(len(examples))) - {i for i, _ in queue}:
            out.skipped["no target tokens"] = without
        out.num_split = sum(count > 1 for count in Counter(i for i, _ in queue).values())
        done = 0
        for batch in pack(queue, self.token_budget):
            self._add(out, batch, name, query)
            done += len(batch)
            if progress is not None:
                progress(done / len(queue))
        self._check(out, name, query)
        return out

    def _parts(self, example: Any, name: Callable[[], str]) -> list[Part]:
        if not isinstance(self.task, Encodes):
            return [Part(example, 1, 1)]
        try:
            return self.task.parts(example)
        except DataError as error:
            raise DataError(f"{name()}: {error}") from error

    def _add(self, out: "Collected", batch: list[tuple[int, Part]], name: Callable[[int], str], query: bool) -> None:
        parts = [part for _, part in batch]
        inputs = (
            self.task.collate(parts) if isinstance(self.task, Encodes) else default_collate([p.inputs for p in parts])
        )
        inputs = _to(inputs, device_of(self.model))
        objective = self.task.measure if query else self.task.loss
        shape = sides.Batch(len(parts), max(part.length for part in parts))
        try:
            rows, losses = extract.gradients(
                self.model, self.plan, bound=self.bound, batch=shape, loss=lambda: objective(self.model, inputs)
            )
        except extract.NonFinite as error:
            bad = {batch[place][0] for place in error.places}
            if not self.skip_nonfinite:
                raise NumericsError(f"the loss of {name(min(bad))} is not finite; {_mend(query)}") from None
            out.skipped.setdefault("not finite", set()).update(bad)
            rest = [(i, part) for i, part in batch if i not in bad]
            if rest:
                self._add(out, rest, name, query)
            return
        where = torch.tensor([i for i, _ in batch], device=losses.device)
        for key, row in rows.items():
            out.rows[key].index_add_(0, where, row.to(out.rows[key].dtype))
        out.loss.index_add_(0, where, losses.float())
        out.tokens.index_add_(0, where, torch.tensor([float(part.targets) for part in parts], device=losses.device))

    def _check(self, out: "Collected", name: Callable[[int], str], query: bool) -> None:
        """The second gate: every row is finite, or its example is named (or skipped)."""
        squares = torch.zeros(len(out.loss), dtype=torch.float64, device=out.loss.device)
        skipped = set().union(*out.skipped.values())
        for key, rows in out.rows.items():
            # In float64, in which no finite row's length overflows, or vanishes.
            square = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).square()
            bad = set((~torch.isfinite(square)).nonzero().flatten().tolist()) - skipped
            if bad and not self.skip_nonfinite:
                raise NumericsError(f"the gradient of {name(min(bad))} in block {key} is not finite; {_mend(query)}")
            if bad:
                out.skipped.setdefault("not finite", set()).update(bad)
                skipped |= bad
            squares += square
        if gone := sorted(skipped):
            for values in (*out.rows.values(), out.loss, out.tokens, squares):
                values[gone] = 0
        out.norm.copy_(squares.sqrt())


def _mend(query: bool) -> str:
    if query:
        return "ask about another text, or check the model's weights"
    return "mend or remove it, use --dtype float32, or pass --skip-nonfinite to give it a zero row and count it"


@dataclass(eq=False)
class Collected:
    """Rows [n, K] by block name, with loss, row norm and target tokens [n]; rows in `skipped`, by reason, are 0."""

    rows: dict[str, Float[Tensor, "n K"]]
    loss: Float[Tensor, " n"]
    norm: Float[Tensor, " n"]
    tokens: Float[Tensor, " n"]
    skipped: dict[str, set[int]]
    num_split: int = 0

    @staticmethod
    def empty(n: int, widths: dict[str, int], device: torch.device) -> "Collected":
        rows = {key: torch.zeros(n, width, device=device) for key, width in widths.items()}
        loss, norm, tokens = (torch.zeros(n, device=device) for _ in range(3))
        return Collected(rows, loss, norm, tokens, {})


def pack(queue: Sequence[tuple[int, Part]], token_budget: int) -> list[list[tuple[int, Part]]]:
    """Batches of similar length, longest first: number of parts x longest part stays within the budget."""
    batches: list[list[tuple[int, Part]]] = []
    for item in sorted(queue, key=lambda item: -item[1].length):
        if batches and (len(batches[-1]) + 1) * batches[-1][0][1].length <= token_budget:
            batches[-1].append(item)
        else:
            batches.append([item])
    return batches


def _to(inputs: Any, device: torch.device) -> Any:
    if isinstance(inputs, Tensor):
        return inputs.to(device)
    if isinstance(inputs, dict):
        return {key: _to(value, device) for key, value in inputs.items()}
    if isinstance(inputs, (list, tuple)):
        return type(inputs)(_to(value, device) for value in inputs)
    raise DataError(f"a batch holds a {type(inputs).__name__}, expected tensors in tuples, lists or dicts")

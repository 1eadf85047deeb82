"""Passes of the model over an index's training rows, batch by batch: what K-FAC's fits and live scores are made in.

A document longer than the context is several items of one row. Batches are of items of similar length under a token
budget, some hundred rows at a time, so that nothing is held of the others. Not here: what is done with a batch (a
`Visitor`, extract.py), where the rows come from (a `Sample`, bases.py).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from influent.bases import Sample
from influent.collect import inputs_of, pack
from influent.errors import DataError, NumericsError, SpecError
from influent.extract import NonFinite, Visitor, visit
from influent.layers import Block, Plan, device_of
from influent.progress import Progress
from influent.rng import Stream
from influent.task import Masks, Part, Samples, Task, parts_of

CHUNK = 512  # rows whose parts are held, to be packed by length


@dataclass(frozen=True, slots=True)
class Item:
    """One model input: part `number` of row `row`."""

    row: int
    number: int
    part: Part


Loss = Callable[[Any, Sequence[Item]], Tensor]  # inputs of a batch, its items -> losses [B]


@dataclass(frozen=True, kw_only=True, eq=False)
class Passes:
    """A model made ready (frozen, its layers planned) and the rows to go over.

    Args:
        rows: row numbers, without those that have no gradient.
        seed: of the labels that are drawn.
    """

    model: nn.Module
    plan: Plan
    task: Task
    sample: Sample
    rows: Sequence[int]
    seed: int = 0
    token_budget: int = 4096

    def batches(self) -> Iterator[list[Item]]:
        """The items of all rows, packed."""
        for lo in range(0, len(self.rows), CHUNK):
            items = [item for row in self.rows[lo : lo + CHUNK] for item in self.items(row)]
            for batch in pack([(place, item.part) for place, item in enumerate(items)], self.token_budget):
                yield [items[place] for place, _ in batch]

    def by_rows(self) -> Iterator[tuple[list[Item], bool]]:
        """The items packed so that a batch is of whole rows (False), or of one row that has several parts (True); the
        batches of such a row follow each other."""
        for lo in range(0, len(self.rows), CHUNK):
            found = [items for row in self.rows[lo : lo + CHUNK] if (items := self.items(row))]
            whole = [items[0] for items in found if len(items) == 1]
            for batch in pack([(place, item.part) for place, item in enumerate(whole)], self.token_budget):
                yield [whole[place] for place, _ in batch], False
            for items in found:
                if len(items) > 1:
                    for batch in pack([(item.number, item.part) for item in items], self.token_budget):
                        yield [items[number] for number, _ in batch], True

    def items(self, row: int) -> list[Item]:
        example = self.sample.example(self.task, row)
        try:
            return [Item(row, number, part) for number, part in enumerate(parts_of(self.task, example))]
        except DataError as error:
            raise DataError(f"{self.sample.name(row)}: {error}") from error

    def walk(
        self,
        visitor: Visitor,
        loss: Loss,
        *,
        blocks: Sequence[Block] | None = None,
        before: Callable[[Tensor | None], None] | None = None,
        stage: str = "",
        progress: Progress | None = None,
    ) -> Iterator[list[Item]]:
        """One pass; yields each batch's items once its blocks (all, or the given ones) are with the visitor. `before`
        each batch is told which of its positions count [B, T], if the task knows.

        Raises:
            NumericsError: a loss is not finite; names the row.
        """
        plan, done = self._only(blocks), 0
        for items in self.batches():
            self.visit(visitor, loss, items, plan, before)
            yield items
            done += sum(item.number == 0 for item in items)
            if progress is not None:
                progress(stage, done, len(self.rows))

    def visit(
        self,
        visitor: Visitor,
        loss: Loss,
        items: Sequence[Item],
        plan: Plan,
        before: Callable[[Tensor | None], None] | None = None,
    ) -> Tensor:
        """The losses of one batch, whose blocks go to the visitor; raises as `walk`."""
        inputs, shape = inputs_of(self.task, [item.part for item in items], device_of(self.model))
        if before is not None:
            before(self.task.mask(inputs) if isinstance(self.task, Masks) else None)
        try:
            return visit(self.model, plan, visitor, batch=shape, loss=lambda: loss(inputs, items))
        except NonFinite as error:
            worst = self.sample.name(min(items[place].row for place in error.places))
            raise NumericsError(
                f"the loss of {worst} is not finite; mend or remove it, or load the model in --dtype float32"
            ) from None

    def loss(self, inputs: Any, items: Sequence[Item]) -> Tensor:
        """The training loss."""
        return self.task.loss(self.model, inputs)

    def sampled(self, purpose: str) -> Loss:
        """The loss at labels drawn from the model; another purpose draws others, another batch the same.

        Raises:
            SpecError: the task cannot draw labels.
        """
        task = self.task
        if not isinstance(task, Samples):
            raise SpecError(
                f"{type(task).__name__} cannot draw labels from the model's predictions: give it sampled_loss, or "
                "--labels empirical"
            )

        def loss(inputs: Any, items: Sequence[Item]) -> Tensor:
            streams = [Stream(self.seed, "", f"labels/{purpose}", f"{item.row}/{item.number}") for item in items]
            return task.sampled_loss(self.model, inputs, streams)

        return loss

    def _only(self, blocks: Sequence[Block] | None) -> Plan:
        if blocks is None:
            return self.plan
        names = {block.name for block in blocks}
        return Plan(tuple(blocks), tuple(s for s in self.plan.sites if s.block.name in names), 0, 1)

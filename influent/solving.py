"""From examples to what is scored: gradients of queries, solved by a curvature, as one member's rows are asked.

The one place where a query meets a curvature: whatever prepares a query at full size and compresses it afterwards
belongs here. Not here: which curvature (choosing.py), the model (attach.py), the scores (score.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from influent import mixing, score
from influent.attach import Attached
from influent.collect import Collector
from influent.compress import Compress
from influent.errors import DataError, SpecError
from influent.fitting import AnyCurvature, FullCurvature
from influent.gram import MEMORY
from influent.kernels import prepare
from influent.progress import Progress
from influent.rowstore import Index

WHOLE = Compress.parse("id")
COPIES = 3  # of a whole gradient: as collected, in the eigenbasis, solved


@dataclass(frozen=True, slots=True)
class Asked:
    """The examples of the queries; with `controls`, the one query is mean(examples) - mean(controls)."""

    examples: Sequence[Any]
    controls: Sequence[Any] | None = None

    def __len__(self) -> int:
        return len(self.examples) if self.controls is None else 1


def solve(
    attached: Attached,
    index: Index,
    fitted: AnyCurvature,
    asked: Asked,
    *,
    published: bool = False,
    mix: float | None = None,
    memory: int = MEMORY,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Preconditioned queries of one member, block -> [Q, K] float32.

    Args:
        attached: the member's model, with the maps that its rows were made with.
        fitted: one of the rows solves the compressed query; one at full size solves the whole gradient, which is
            compressed afterwards, as the rows were.
        mix: the share of the queries' own rows in the curvature (mixing.py).
        published: cut the queries to the rows' rank first, as LoRIF publishes them.
        memory: MiB for whole gradients of queries, of which so many are held as fit; one at least.

    Raises:
        DataError: a query has no target tokens; names it.
        NumericsError: a loss or gradient is not finite; names the query and block.
    """
    if isinstance(fitted, FullCurvature):
        if mix is not None:
            raise SpecError(f"mix is for a curvature of stored rows, such as fim, got {fitted.name!r}")
        return _contrasted(asked, lambda examples, what: _sketch(attached, fitted, examples, what, memory, progress))
    rows = gradients(attached, asked, progress)
    if published:
        rows = _cut(rows, index)
    if mix is not None:
        return mixing.precondition(rows, fitted, mix, progress=progress)
    return score.precondition(rows, fitted, progress=progress)


def gradients(attached: Attached, asked: Asked, progress: Progress | None = None) -> dict[str, Tensor]:
    """Gradients of the queries' measure as the index's rows are compressed, before any curvature, block -> [Q, K]."""
    collector = attached.collector
    return _contrasted(asked, lambda examples, what: _collect(collector, examples, what, progress))


def _contrasted(asked: Asked, made: Callable[[Sequence[Any], str], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What is made of the examples, or mean(examples) - mean(controls): all that is made is linear in gradients."""
    rows = made(asked.examples, "query")
    return rows if asked.controls is None else score.contrast(rows, made(asked.controls, "control"))


def _sketch(
    attached: Attached,
    fitted: FullCurvature,
    examples: Sequence[Any],
    what: str,
    memory: int,
    progress: Progress | None,
) -> dict[str, Tensor]:
    """Curvature before sketch: <P H^-1 q, P g> estimates <H^-1 q, g> for the unbiased maps P of the rows; where P is a
    weighted basis the query takes its dual, or the weights would be a second curvature."""
    collector = attached.collector
    whole = replace(
        collector, bound={b.name: WHOLE.bind(b, 0) for b in collector.plan.blocks}, codec=None
    )  # fmt: skip
    numbers = sum(block.width for block in collector.plan.blocks)
    size = max(1, (memory << 20) // (4 * COPIES * numbers))
    maps = {key: bound.dual() for key, bound in collector.bound.items()}
    out: dict[str, list[Tensor]] = {key: [] for key in maps}
    for lo in range(0, len(examples), size):
        some = _collect(whole, examples[lo : lo + size], what, progress, first=lo, total=len(examples))
        solved = fitted.precondition(some)
        for key in out:
            out[key].append(maps[key].apply(solved.pop(key)).cpu())
    return {key: torch.cat(parts) for key, parts in out.items()}


def _collect(
    collector: Collector,
    examples: Sequence[Any],
    what: str,
    progress: Progress | None,
    *,
    first: int = 0,
    total: int | None = None,
) -> dict[str, Tensor]:
    """Rows of examples; they are numbers `first` and on of `total` in messages."""

    def tell(share: float) -> None:
        if progress is not None:
            progress(what, first + int(share * len(examples)), total or len(examples))

    made = collector.collect(examples, name=lambda i: f"{what} {first + i}", query=True, progress=tell)
    if made.skipped:
        reason, rows = next(iter(made.skipped.items()))
        raise DataError(
            f"{what} {first + min(rows)} has {reason}: a completion (or a text of two tokens or more) is needed"
        )
    return made.rows


def _cut(queries: dict[str, Tensor], index: Index) -> dict[str, Tensor]:
    """Queries as LoRIF publishes them: of the rows' rank, in the layers whose rows are cut."""
    ranks = {key: index.codec.stored_rank(factors) for key, factors in index.factors.items()}
    return {key: prepare(q, index.factors[key], ranks[key]).whole for key, q in queries.items()}

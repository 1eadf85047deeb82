"""From examples to what is scored: gradients of queries, solved by a curvature, as one member's rows are asked.

The one place where a query meets a curvature: whatever prepares a query at full size and compresses it afterwards
belongs here. Not here: which curvature (choosing.py), the model (attach.py), the scores (score.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from influent import mixing, score
from influent.attach import Attached
from influent.curvature import Curvature
from influent.errors import DataError
from influent.kernels import prepare
from influent.progress import Progress
from influent.rowstore import Index


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
    fitted: Curvature,
    asked: Asked,
    *,
    published: bool = False,
    mix: float | None = None,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Preconditioned queries of one member, block -> [Q, K] float32.

    Args:
        attached: the member's model, with the maps that its rows were made with.
        mix: the share of the queries' own rows in the curvature (mixing.py).
        published: cut the queries to the rows' rank first, as LoRIF publishes them.

    Raises:
        DataError: a query has no target tokens; names it.
        NumericsError: a loss or gradient is not finite; names the query and block.
    """
    rows = gradients(attached, asked, progress)
    if published:
        rows = _cut(rows, index)
    if mix is not None:
        return mixing.precondition(rows, fitted, mix, progress=progress)
    return score.precondition(rows, fitted, progress=progress)


def gradients(attached: Attached, asked: Asked, progress: Progress | None = None) -> dict[str, Tensor]:
    """Gradients of the queries' measure as the index's rows are compressed, before any curvature, block -> [Q, K]."""
    rows = _collect(attached, asked.examples, "query", progress)
    if asked.controls is None:
        return rows
    return score.contrast(rows, _collect(attached, asked.controls, "control", progress))


def _collect(attached: Attached, examples: Sequence[Any], what: str, progress: Progress | None) -> dict[str, Tensor]:
    def tell(share: float) -> None:
        if progress is not None:
            progress(what, int(share * len(examples)), len(examples))

    made = attached.collector.collect(examples, name=lambda i: f"{what} {i}", query=True, progress=tell)
    if made.skipped:
        reason, rows = next(iter(made.skipped.items()))
        raise DataError(f"{what} {min(rows)} has {reason}: a completion (or a text of two tokens or more) is needed")
    return made.rows


def _cut(queries: dict[str, Tensor], index: Index) -> dict[str, Tensor]:
    """Queries as LoRIF publishes them: of the rows' rank, in the layers whose rows are cut."""
    ranks = {key: index.codec.stored_rank(factors) for key, factors in index.factors.items()}
    return {key: prepare(q, index.factors[key], ranks[key]).whole for key, q in queries.items()}

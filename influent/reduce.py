"""What to keep of a stream of scores: commutative monoids over blocks of [queries, rows].

A reducer is a value; its accumulator is passed by hand and `push` and `merge` return a new one, so that shards may be
scored in any order, by any number of workers. Nothing here knows where scores come from. Ranks are exact: equal
scores are ordered by the smaller row id, whatever the split and the order.
"""

from dataclasses import dataclass
from math import isfinite
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .errors import NumericsError, SpecError

A = TypeVar("A")


@runtime_checkable
class Reducer(Protocol[A]):
    """A commutative monoid over blocks of scores; `result` turns the accumulator into what a caller reads."""

    def empty(self, num_queries: int) -> A: ...
    def push(self, acc: A, ids: Int[Tensor, " n"], scores: Float[Tensor, "Q n"]) -> A: ...
    def merge(self, a: A, b: A) -> A: ...
    def result(self, acc: A) -> Any: ...


class Ranked(NamedTuple):
    """The best rows of each query, best first; k is the number asked for, or of rows where there are fewer."""

    rows: Int[Tensor, "Q k"]
    scores: Float[Tensor, "Q k"]


@dataclass(frozen=True, slots=True)
class TopK:
    """The k largest scores of each query, or the k smallest (`largest=False`), equal to a full sort cut at k."""

    k: int
    largest: bool = True

    def __post_init__(self):
        if self.k < 1:
            raise SpecError(f"k: expected a positive number of rows to keep, got {self.k}")

    def empty(self, num_queries: int) -> Ranked:
        return Ranked(torch.empty(num_queries, 0, dtype=torch.int64), torch.empty(num_queries, 0))

    def push(self, acc: Ranked, ids: Int[Tensor, " n"], scores: Float[Tensor, "Q n"]) -> Ranked:
        _check_finite(ids, scores)
        best, in_order = self._shortlist(ids, scores)
        return best if in_order and acc.rows.shape[1] == 0 else self.merge(acc, best)

    def merge(self, a: Ranked, b: Ranked) -> Ranked:
        rows, scores = torch.cat([a.rows, b.rows], dim=1), torch.cat([a.scores, b.scores], dim=1)
        by_row = rows.argsort(dim=1, stable=True)
        rows, scores = rows.gather(1, by_row), scores.gather(1, by_row)
        best = scores.argsort(dim=1, descending=self.largest, stable=True)[:, : self.k]
        return Ranked(rows.gather(1, best), scores.gather(1, best))

    def result(self, acc: Ranked) -> Ranked:
        return acc

    def _shortlist(self, ids: Tensor, scores: Tensor) -> tuple[Ranked, bool]:
        """The rows that may still rank, and whether they are the best in order, no two as good: selection is linear in
        n where sorting is not."""
        n = ids.numel()
        if n > self.k:
            values, kept = scores.topk(self.k + 1, dim=1, largest=self.largest)
            apart = values[:, 1:] != values[:, :-1]
            in_order = bool(apart.all())
            # topk picks freely among rows that tie for the last place, so a tie there keeps every row for the sort.
            if in_order or bool(apart[:, -1].all()):
                return Ranked(ids[kept[:, :-1]], values[:, :-1]), in_order
        return Ranked(ids.expand(scores.shape[0], n), scores), False


@dataclass(frozen=True, slots=True)
class Full:
    """Every score: the result is [Q, N] float32 with its columns in the order of the row ids. Memory is Q times N."""

    def empty(self, num_queries: int) -> tuple[Ranked, ...]:
        return (Ranked(torch.empty(1, 0, dtype=torch.int64), torch.empty(num_queries, 0)),)

    def push(self, acc: tuple[Ranked, ...], ids: Int[Tensor, " n"], scores: Float[Tensor, "Q n"]) -> tuple[Ranked, ...]:
        _check_finite(ids, scores)
        return (*acc, Ranked(ids[None], scores.float()))

    def merge(self, a: tuple[Ranked, ...], b: tuple[Ranked, ...]) -> tuple[Ranked, ...]:
        return a + b

    def result(self, acc: tuple[Ranked, ...]) -> Float[Tensor, "Q N"]:
        ordered = sorted(acc, key=lambda piece: int(piece.rows[0, 0]) if piece.rows.numel() else -1)
        rows = torch.cat([piece.rows[0] for piece in ordered])
        scores = torch.cat([piece.scores for piece in ordered], dim=1)
        in_order = bool((rows.diff() > 0).all())  # shards are ranges of rows: a second copy is seldom needed
        return scores if in_order else scores[:, rows.argsort()]


class Pick:
    """The scores of the given rows: the result is [Q, m] float32, columns in the order of `rows` [m]."""

    def __init__(self, rows: Int[Tensor, " m"]):
        self.rows = rows.long()

    def empty(self, num_queries: int) -> tuple[Ranked, ...]:
        return Full().empty(num_queries)

    def push(self, acc: tuple[Ranked, ...], ids: Int[Tensor, " n"], scores: Float[Tensor, "Q n"]) -> tuple[Ranked, ...]:
        wanted = torch.isin(ids, self.rows)
        return Full().push(acc, ids[wanted], scores[:, wanted]) if bool(wanted.any()) else acc

    def merge(self, a: tuple[Ranked, ...], b: tuple[Ranked, ...]) -> tuple[Ranked, ...]:
        return a + b

    def result(self, acc: tuple[Ranked, ...]) -> Float[Tensor, "Q m"]:
        """Raises SpecError, naming the first, when a wanted row was never scored."""
        if self.rows.numel() == 0:
            return acc[0].scores
        scored = torch.cat([piece.rows[0] for piece in acc]).sort().values
        if bool((missing := ~torch.isin(self.rows, scored)).any()):
            raise SpecError(f"row {int(self.rows[missing][0])}: wanted, but not among the rows scored")
        return Full().result(acc)[:, torch.searchsorted(scored, self.rows)]


class Summary(NamedTuple):
    """Mean, standard deviation (of the population) and extremes of each query's scores over `num_rows` rows."""

    num_rows: int
    mean: Float[Tensor, " Q"]
    std: Float[Tensor, " Q"]
    low: Float[Tensor, " Q"]
    high: Float[Tensor, " Q"]


class _Central(NamedTuple):
    num_rows: int
    mean: Tensor  # [Q]
    squares: Tensor  # [Q], sum of squared deviations from the mean
    low: Tensor  # [Q]
    high: Tensor  # [Q]


@dataclass(frozen=True, slots=True)
class Moments:
    """Mean, standard deviation and extremes of the scores, merged in float64 by the pairwise update of Chan et al.
    (1979), which does not cancel when the mean is large beside the spread."""

    def empty(self, num_queries: int) -> _Central:
        zeros = torch.zeros(num_queries, dtype=torch.float64)
        return _Central(0, zeros, zeros, zeros + torch.inf, zeros - torch.inf)

    def push(self, acc: _Central, ids: Int[Tensor, " n"], scores: Float[Tensor, "Q n"]) -> _Central:
        _check_finite(ids, scores)
        if ids.numel() == 0:
            return acc
        x = scores.double()
        mean = x.mean(dim=1)
        squares = (x - mean[:, None]).square().sum(dim=1)
        return self.merge(acc, _Central(ids.numel(), mean, squares, x.amin(dim=1), x.amax(dim=1)))

    def merge(self, a: _Central, b: _Central) -> _Central:
        if a.num_rows == 0 or b.num_rows == 0:
            return b if a.num_rows == 0 else a
        count = a.num_rows + b.num_rows
        gap = b.mean - a.mean
        return _Central(
            count,
            a.mean + gap * (b.num_rows / count),
            a.squares + b.squares + gap.square() * (a.num_rows * b.num_rows / count),
            torch.minimum(a.low, b.low),
            torch.maximum(a.high, b.high),
        )

    def result(self, acc: _Central) -> Summary:
        """Raises NumericsError when no row was pushed: there is no mean of nothing."""
        if acc.num_rows == 0:
            raise NumericsError("moments of no rows: expected at least one scored row, got none")
        return Summary(acc.num_rows, acc.mean, (acc.squares / acc.num_rows).sqrt(), acc.low, acc.high)


class SumBy:
    """Scores added up by group, in float64: `labels[row]` is the group of a row, 0 to G-1; the result is [Q, G]."""

    def __init__(self, labels: Int[Tensor, " N"]):
        if labels.numel() and int(labels.min()) < 0:
            raise SpecError(f"labels: expected groups from 0, got {int(labels.min())} at row {int(labels.argmin())}")
        self.labels = labels.long()
        self.num_groups = int(labels.max()) + 1 if labels.numel() else 0

    def empty(self, num_queries: int) -> Float[Tensor, "Q G"]:
        return torch.zeros(num_queries, self.num_groups, dtype=torch.float64)

    def push(
        self, acc: Float[Tensor, "Q G"], ids: Int[Tensor, " n"], scores: Float[Tensor, "Q n"]
    ) -> Float[Tensor, "Q G"]:
        _check_finite(ids, scores)
        if ids.numel() and int(ids.max()) >= self.labels.numel():
            raise SpecError(f"labels: expected one for each row, got {self.labels.numel()} and row {int(ids.max())}")
        return acc.index_add(1, self.labels[ids], scores.double())

    def merge(self, a: Float[Tensor, "Q G"], b: Float[Tensor, "Q G"]) -> Float[Tensor, "Q G"]:
        return a + b

    def result(self, acc: Float[Tensor, "Q G"]) -> Float[Tensor, "Q G"]:
        return acc


def _check_finite(ids: Tensor, scores: Tensor) -> None:
    if isfinite(float(scores.sum())):
        return
    finite = scores.isfinite()
    if not bool(finite.all()):
        query, column = (int(i) for i in (~finite).nonzero()[0])
        raise NumericsError(
            f"score of query {query}, row {int(ids[column])}: expected a finite number, got "
            f"{float(scores[query, column])}: raise the damping, or look for a query whose loss is not finite"
        )

"""Queries against rows: one pass over the shards for any number of queries and reducers, of one index or of several.

Windows of rows outside, members and blocks inside: each row is read once, whatever is asked. A member is one index
(one checkpoint) with its own queries; members score the same rows in lockstep, and the reducers see one weighted sum.
Also what prepares a query (`precondition`, `contrast`) and what normalises a score (`self_influence`). What is kept of
the scores is a reducer's business; the products are `kernels.py`'s, fitting is `curvature.py`'s.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from math import isfinite
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from .artifact import Artifact
from .asking import Asked, ask, blame_rows, captured
from .curvature import Curvature, write_blocks
from .errors import DataError, MismatchError, NumericsError, SpecError
from .gradients import Flat
from .gram import RowSource, Shard, check_bytes
from .progress import Progress
from .reduce import Reducer

Queries = Mapping[str, Tensor]  # block -> [Q, K] float32


@runtime_checkable
class Live(Protocol):
    """Scores of rows lo to hi of `num_queries` queries, made when they are asked for."""

    @property
    def num_queries(self) -> int: ...
    def __call__(self, lo: int, hi: int) -> Float[Tensor, "Q n"]: ...


WINDOW_SCORES = 1 << 22  # scores held at once, in float64
JOINED = 1 << 20  # numbers of queries that are copied to be looked at together: a call for each of hundreds is slower


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """Rows, what is asked of them, and the weight of the answer.

    `queries` are block -> [Q, K], preconditioned if a curvature is wanted; `self_influence` [N] is that of these rows
    under the same curvature, for relatif alone. `scores` [Q, N], or what makes those of rows lo to hi, normalised
    already, stand in for rows that are not stored.
    """

    index: RowSource
    queries: Queries
    weight: float = 1.0
    self_influence: Float[Tensor, " N"] | None = None
    scores: Float[Tensor, "Q N"] | Live | None = None


def score(
    index: RowSource,
    queries: Queries,
    reducers: Mapping[str, Reducer[Any]],
    *,
    normalize: str = "none",
    self_influence: Float[Tensor, " N"] | None = None,
    query_rank: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """`score_members` of the one member with this index, these queries and the weight 1."""
    member = Member(index, queries, self_influence=self_influence)
    return score_members([member], reducers, normalize=normalize, query_rank=query_rank, progress=progress)


@torch.no_grad()
def score_members(
    members: Sequence[Member],
    reducers: Mapping[str, Reducer[Any]],
    *,
    normalize: str = "none",
    scale: Float[Tensor, " N"] | None = None,
    query_rank: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Scores s = sum over members of weight * s_m, pushed to every reducer; one value per reducer's name.

    A member's s_m = sum over blocks of <q, g_i>. Larger = training on row i pushed the measured quantity further the
    query's way. `normalize` is `none`, `cosine`, s_m / (|q| |g_i|), or `relatif`, s_m / sqrt(h_i) with h the member's
    self-influence (Barshan et al., 2020): each member is normalised before they are added. A row of zeros scores 0 in
    each of them. `scale` [N] multiplies the sum of each row at last. `query_rank` cuts each query's matrix to its best
    pairs, before rows of pairs alone: less work, and other scores; `query_energy` says what the cut keeps.

    Members have the same rows, and may have them in other shards: a window of rows lies in one shard of each.
    Raises MismatchError for queries that do not fit their index, or members that do not fit each other, NumericsError
    for values that are not finite, and CorruptError, naming the shard, when its bytes are not the committed ones.
    """
    num_queries = _check_members(members, normalize, scale)
    scorers = [_Given.of(m) or _Scorer.of(m, normalize, query_rank) for m in members]
    accumulators = {name: reducer.empty(num_queries) for name, reducer in reducers.items()}
    size, n = max(1, WINDOW_SCORES // num_queries), members[0].index.n
    with _full_float32():
        for lo, hi, shards in _windows([member.index for member in members], size):
            ids = shards[0].ids[lo - shards[0].lo : hi - shards[0].lo]
            total = scorers[0](shards[0], lo, hi)
            for scorer, shard in zip(scorers[1:], shards[1:], strict=True):
                total += scorer(shard, lo, hi)
            if scale is not None:
                total *= scale[lo:hi].double()
            # One rounding before the reducers, so that ranks and the full matrix agree on what is a tie.
            final = total.float()
            for name, reducer in reducers.items():
                accumulators[name] = reducer.push(accumulators[name], ids, final)
            if progress is not None and hi == shards[0].hi:
                progress("score", hi, n)
    return {name: reducer.result(accumulators[name]) for name, reducer in reducers.items()}


@torch.no_grad()
def query_energy(index: RowSource, queries: Queries, query_rank: int) -> Float[Tensor, " Q"]:
    """The share of each query's squared length, over all blocks, that `score` keeps with this `query_rank`, [Q]."""
    squares, kept = _squares(index, queries), captured(index, queries, query_rank)
    return torch.where(squares.sum(0) > 0, (squares * kept).sum(0) / squares.sum(0), 1.0)


@torch.no_grad()
def precondition(queries: Queries, curvature: Curvature, *, progress: Progress | None = None) -> dict[str, Tensor]:
    """(F + lambda I)^-1 q for every block and query, one block's solver in memory at a time."""
    solved = {}
    for done, (key, q) in enumerate(queries.items(), start=1):
        solved[key] = curvature.solver(key)(q)
        if progress is not None:
            progress("precondition", done, len(queries))
    return solved


def contrast(queries: Queries, controls: Queries) -> dict[str, Tensor]:
    """mean(queries) - mean(controls) as one query [1, K]: what sets a group of queries apart from its controls."""
    if queries.keys() != controls.keys():
        odd = ", ".join(sorted(queries.keys() ^ controls.keys()))
        raise MismatchError(f"contrast: queries and controls must have the same blocks; only one has {odd}")
    for name, group in (("queries", queries), ("controls", controls)):
        if any(len(q) == 0 for q in group.values()):
            raise DataError(f"contrast: expected at least one of the {name}, got none")
    return {
        key: (q.double().mean(dim=0) - controls[key].double().mean(dim=0)).float()[None] for key, q in queries.items()
    }


@torch.no_grad()
def self_influence(index: RowSource, curvature: Curvature, *, progress: Progress | None = None) -> Float[Tensor, " N"]:
    """h_i = sum over blocks of g_i (F + lambda I)^-1 g_i of every row, [N] float32; large for outliers.

    Kept per block as an artifact under `curvature/`: asked again, it is only read; killed, it resumes block by block.
    """
    if index.n == 0:
        raise DataError("this index has no rows: there is no self-influence")
    spec = {"statistic": "self-influence", "index": index.digest, "curvature": curvature.digest}

    def compute(key: str):
        h = curvature.solver(key).self_influence()
        if not bool(h.isfinite().all()):
            row = int((~h.isfinite()).nonzero()[0])
            raise NumericsError(f"block {key!r}, row {row}: self-influence is not finite: raise the damping")
        return {"self_influence": h}, {}

    return _total(write_blocks(index, "self-influence", spec, compute, progress=progress), index.n)


def _total(blocks: Artifact, num_rows: int) -> Float[Tensor, " N"]:
    total = torch.zeros(num_rows, dtype=torch.float64)
    for record in blocks.records:
        blocks.check(record.name)
        total += blocks.tensors(record.name)["self_influence"]
    return total.float()


def _squares(index: RowSource, queries: Queries) -> Float[Tensor, "blocks Q"]:
    return torch.stack([Flat(queries[key].detach().cpu()).squares() for key in index.widths])


@dataclass(frozen=True, slots=True, eq=False)
class _Scorer:
    """One member made ready: weighted and normalised scores of a window of its rows."""

    asked: Asked
    weight: float
    lengths: Float[Tensor, " Q"] | None  # for cosine
    spread: Float[Tensor, " N"] | None  # for relatif

    @staticmethod
    def of(member: Member, normalize: str, query_rank: int | None) -> "_Scorer":
        index, h = member.index, member.self_influence
        asked = ask(index, member.queries, query_rank)
        lengths = _squares(index, member.queries).sum(0).sqrt() if normalize == "cosine" else None
        return _Scorer(asked, member.weight, lengths, None if h is None else h.double().sqrt())

    def __call__(self, shard: Shard, lo: int, hi: int) -> Float[Tensor, "Q n"]:
        """Rows lo to hi of the index, which lie in `shard`; float64."""
        scores = torch.zeros(self.asked.num_queries, hi - lo, dtype=torch.float64)
        squares = None if self.lengths is None else torch.zeros(hi - lo, dtype=torch.float64)
        self.asked.add(scores, squares, shard, lo)
        if not isfinite(float(scores.sum())):
            blame_rows(shard, self.asked.forms)
        if self.lengths is not None and squares is not None:
            scores = _divide(scores, self.lengths[:, None] * squares.sqrt())
        elif self.spread is not None:
            scores = _divide(scores, self.spread[lo:hi])
        return scores if self.weight == 1 else scores * self.weight


@dataclass(frozen=True, slots=True, eq=False)
class _Given:
    """A member whose scores are there already, or are made without its rows."""

    scores: Float[Tensor, "Q N"] | Live
    weight: float

    @staticmethod
    def of(member: Member) -> "_Given | None":
        return None if member.scores is None else _Given(member.scores, member.weight)

    def __call__(self, shard: Shard, lo: int, hi: int) -> Float[Tensor, "Q n"]:
        found = self.scores[:, lo:hi] if isinstance(self.scores, Tensor) else self.scores(lo, hi)
        return found.double() * self.weight


def _windows(indexes: Sequence[RowSource], size: int) -> Iterator[tuple[int, int, list[Shard]]]:
    """(lo, hi, the shard of each index that holds these rows): all rows in order, at most `size` at a time."""
    with ThreadPoolExecutor(1) if any(len(index.shards) > 1 for index in indexes) else nullcontext() as pool:
        ahead = [_checked(index.shards, pool) for index in indexes]
        held: list[Shard] = []
        lo, end = 0, indexes[0].n
        while lo < end:
            held = [
                shard if lo < shard.hi else next(a) for shard, a in zip(held or map(next, ahead), ahead, strict=True)
            ]
            hi = min(lo + size, *(shard.hi for shard in held))
            yield lo, hi, held
            lo = hi


def _checked(shards: Sequence[Shard], pool: ThreadPoolExecutor | None) -> Iterator[Shard]:
    """The shards, each once its bytes are known to be sound; the next one's hash is taken while this one is scored,
    whose rows then come from the page cache."""
    for shard in shards[:1]:
        check_bytes(shard)
    for i, shard in enumerate(shards):
        ahead = [pool.submit(check_bytes, following) for following in shards[i + 1 : i + 2]] if pool else []
        yield shard
        for checked in ahead:
            checked.result()


def _divide(scores: Tensor, by: Tensor) -> Tensor:
    return torch.where(by > 0, scores / by, 0.0)


def _check_members(members: Sequence[Member], normalize: str, scale: Tensor | None) -> int:
    """The number of queries; an error for members that do not fit together."""
    if not members:
        raise DataError("score: expected at least one member, got none")
    counts = [
        _check(m.index, m.queries, normalize, m.self_influence) if m.scores is None else _check_given(m.index, m.scores)
        for m in members
    ]
    for number, (member, count) in enumerate(zip(members, counts, strict=True)):
        if (got := (member.index.n, count)) != (wanted := (members[0].index.n, counts[0])):
            raise MismatchError(
                f"member {number}: expected {wanted[0]} rows and {wanted[1]} queries as member 0 has, got {got[0]} and "
                f"{got[1]}"
            )
        if not isfinite(member.weight):
            raise NumericsError(f"member {number}: expected a finite weight, got {member.weight}")
    if scale is not None and (len(scale) != members[0].index.n or not bool(scale.isfinite().all())):
        raise MismatchError(f"scale: expected a finite number for each of {members[0].index.n} rows, got {len(scale)}")
    return counts[0]


def _check(index: RowSource, queries: Queries, normalize: str, self_influence: Tensor | None) -> int:
    """The number of queries; an error that names the block for any that do not fit."""
    if normalize not in ("none", "cosine", "relatif"):
        raise SpecError(f"normalize: expected none, cosine or relatif, got {normalize!r}")
    if (self_influence is None) == (normalize == "relatif"):
        raise SpecError(f"normalize {normalize}: relatif needs the rows' self-influence, the others take none")
    if self_influence is not None:
        _check_self_influence(index, self_influence)
    if queries.keys() != index.widths.keys():
        odd = sorted(queries.keys() ^ index.widths.keys())
        raise MismatchError(f"queries: blocks do not match the index; only one of the two has {', '.join(odd)}")
    shapes = [q.shape for q in queries.values()]  # looked at once: there are hundreds
    counts = {shape[0] for shape in shapes}
    if len(counts) != 1 or 0 in counts:
        raise DataError(f"queries: expected the same number, at least one, in every block, got {sorted(counts)}")
    count = counts.pop()
    if shapes != [(count, index.widths[key]) for key in queries]:
        for key, shape in zip(queries, shapes, strict=True):
            if shape[1:] != (index.widths[key],):
                raise MismatchError(
                    f"queries: block {key!r}: expected width {index.widths[key]}, got {list(shape[1:])}"
                )
    _demand_finite(queries, count * sum(index.widths.values()))
    return count


def _demand_finite(queries: Queries, numbers: int) -> None:
    few = numbers <= JOINED and len({q.device for q in queries.values()}) == 1
    if few and isfinite(float(torch.cat(list(queries.values()), dim=1).sum())):
        return
    for key, q in queries.items():
        if not isfinite(float(q.sum())) and not bool(q.isfinite().all()):
            query = int((~q.isfinite()).any(dim=1).nonzero()[0])
            raise NumericsError(f"query {query}, block {key!r}: its gradient is not finite: look at the query's loss")


def _check_given(index: RowSource, scores: Tensor | Live) -> int:
    if not isinstance(scores, Tensor):
        return scores.num_queries
    if scores.ndim != 2 or scores.shape[1] != index.n or not bool(scores.isfinite().all()):
        raise MismatchError(f"scores: expected finite ones, queries x {index.n} rows, got {list(scores.shape)}")
    return len(scores)


def _check_self_influence(index: RowSource, h: Tensor) -> None:
    if len(h) != index.n:
        raise MismatchError(f"self-influence: expected one value for each of {index.n} rows, got {len(h)}")
    if bool((wrong := ~(h.isfinite() & (h >= 0))).any()):
        row = int(wrong.nonzero()[0])
        raise NumericsError(f"self-influence of row {row}: expected a finite number of 0 or more, got {float(h[row])}")


@contextmanager
def _full_float32() -> Iterator[None]:
    """Float32 products in float32: a faster precision chosen for the model's passes must not reach the scores."""
    chosen = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(chosen)

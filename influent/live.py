"""Scores without stored rows: training gradients recomputed in a pass of the model, used and forgotten block by block.

<q, g_i> = sum over positions of a_t^T Q d_t, with Q the query's matrix: the gradient is formed only where that is less
work, some examples at a time. What is quadratic in a gradient (self-influence, length) needs all parts of a document,
which are then taken as more positions of one example. Not here: preparing queries (solving.py), reducers (score.py).

Legend: Q queries (and their matrices [I, O]), B rows of a batch, T positions, k the rank of cut queries.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from influent.errors import NumericsError
from influent.gradients import LowRank, Outer, Side
from influent.kernels import prepare
from influent.layers import Block, device_of
from influent.loading import matmul_precision
from influent.pairs import Pairs
from influent.passes import Item, Passes
from influent.progress import Progress

Asked = Tensor | LowRank  # the queries of a block: [Q, I * O], or u [Q, k, O] and v [Q, k, I]
ENTRIES = 2**22  # of gradients, or of products with queries, held at once


class Products:
    """The receiver (pairs.py) of <q, g_b>, [Q, B] float64, summed over the blocks of a batch."""

    def __init__(self, queries: Mapping[str, Asked], device: torch.device) -> None:
        self.queries = {key: _moved(q, device) for key, q in queries.items()}
        self.num_queries = len(next(iter(queries.values())))
        self.device = device
        self._scores: Tensor | None = None

    def add(self, block: Block, a: Float[Tensor, "B T I"], d: Side) -> None:
        scores = self._held(len(a))
        q = self.queries[block.name]
        if isinstance(q, LowRank):
            _add_cut(scores, a, d, q)
        elif (self.num_queries - 1) * (a.shape[1] - 1) > 1 and d.is_floating_point():
            step = max(1, ENTRIES // block.width)
            for lo in range(0, len(a), step):
                g = Outer(a[lo : lo + step], d[lo : lo + step], block.in_width, block.out_width).flat()
                scores[:, lo : lo + step] += q.to(g.dtype) @ g.T
        else:
            for number, matrix in enumerate(q.unflatten(1, (block.in_width, block.out_width))):
                scores[number] += _between(a, matrix.to(a.dtype), d)

    def add_vector(self, block: Block, g: Float[Tensor, "B K"]) -> None:
        q = self.queries[block.name]
        assert isinstance(q, Tensor), "a vector has no rank to cut"
        self._held(len(g)).add_(q.to(g.dtype) @ g.T)

    def take(self, size: int) -> Float[Tensor, "Q B"]:
        """What the batch of `size` examples has come to; the next one begins at zero."""
        scores, self._scores = self._held(size), None
        return scores

    def _held(self, size: int) -> Tensor:
        if self._scores is None:
            self._scores = torch.zeros(self.num_queries, size, dtype=torch.float64, device=self.device)
        return self._scores


class Quadratics:
    """The receiver of sums over blocks of `measure(key, g)` [B], for the gradients g [B, K] of whole rows.

    Between `begin` and `take` come the batches of one row in parts (`joined`), or one batch of whole rows.
    """

    def __init__(self, measure: Callable[[str, Tensor], Tensor], device: torch.device) -> None:
        self.measure, self.device = measure, device
        self.joined = False
        self._parts: dict[str, Tensor] = {}  # of a row in parts: its gradient so far
        self._total: Tensor | None = None

    def add(self, block: Block, a: Float[Tensor, "B T I"], d: Side) -> None:
        if self.joined:
            self._gather(block.name, Outer(a.flatten(0, 1)[None], d.flatten(0, 1)[None], *_shape(block)).flat())
            return
        step = max(1, ENTRIES // block.width)
        for lo in range(0, len(a), step):
            g = Outer(a[lo : lo + step], d[lo : lo + step], *_shape(block)).flat()
            self._held(len(a))[lo : lo + step] += self.measure(block.name, g)

    def add_vector(self, block: Block, g: Float[Tensor, "B K"]) -> None:
        if self.joined:
            self._gather(block.name, g.sum(0, keepdim=True))
        else:
            self._held(len(g)).add_(self.measure(block.name, g))

    def take(self, size: int) -> Float[Tensor, " B"]:
        for key in list(self._parts):
            self._held(1).add_(self.measure(key, self._parts.pop(key)))
        total, self._total = self._held(size), None
        return total

    def _gather(self, key: str, g: Tensor) -> None:
        self._parts[key] = self._parts[key] + g if key in self._parts else g

    def _held(self, size: int) -> Tensor:
        if self._total is None:
            self._total = torch.zeros(size, dtype=torch.float64, device=self.device)
        return self._total


@dataclass(frozen=True, eq=False)
class _Both:
    """Two receivers of one pass."""

    first: Products
    second: Quadratics

    def add(self, block: Block, a: Float[Tensor, "B T I"], d: Side) -> None:
        self.first.add(block, a, d)
        self.second.add(block, a, d)

    def add_vector(self, block: Block, g: Float[Tensor, "B K"]) -> None:
        self.first.add_vector(block, g)
        self.second.add_vector(block, g)


@dataclass(frozen=True, eq=False)
class LiveScorer:
    """Scores of a range of an index's rows, recomputed: those of a member without stored rows (score.py).

    Args:
        passes: the model, and the rows that have a gradient; the others score 0.
        lengths: of the queries, to normalise by both lengths. spread: [N], to divide each row's score by.
        precision: of the passes' products, the index's own; by default the one that is in force now.
    """

    passes: Passes
    queries: Mapping[str, Asked]
    lengths: Float[Tensor, " Q"] | None = None
    spread: Float[Tensor, " N"] | None = None
    progress: Progress | None = None
    precision: str = field(default_factory=torch.get_float32_matmul_precision)

    @property
    def num_queries(self) -> int:
        return len(next(iter(self.queries.values())))

    def __call__(self, lo: int, hi: int) -> Float[Tensor, "Q n"]:
        """Rows lo to hi, float64.

        Raises:
            NumericsError: a gradient is not finite; names the row.
        """
        with matmul_precision(self.precision):
            return self._scores(lo, hi)

    def _scores(self, lo: int, hi: int) -> Float[Tensor, "Q n"]:
        products = Products(self.queries, device_of(self.passes.model))
        lengths = None if self.lengths is None else Quadratics(_squares, products.device)
        receiver = products if lengths is None else _Both(products, lengths)
        scores = torch.zeros(products.num_queries, hi - lo, dtype=torch.float64)
        squares, done = torch.zeros(hi - lo, dtype=torch.float64), 0
        for items, last in _batches(self.passes, receiver, lo, hi, lengths):
            rows = torch.tensor([item.row - lo for item in items])
            scores.index_add_(1, rows, products.take(len(items)).cpu())
            if lengths is not None and last:
                squares[rows.unique_consecutive()] = lengths.take(len(rows.unique_consecutive())).cpu()
            done += sum(item.number == 0 for item in items)
            if self.progress is not None:
                self.progress("score", lo + done, self.passes.sample.n)
        if not bool(scores.isfinite().all()):
            row = lo + int((~scores.isfinite()).any(dim=0).nonzero()[0])
            raise NumericsError(f"the gradient of {self.passes.sample.name(row)} is not finite; use --dtype float32")
        if self.lengths is not None:
            return _divide(scores, self.lengths[:, None] * squares.sqrt())
        return scores if self.spread is None else _divide(scores, self.spread[lo:hi])


def quadratics(
    passes: Passes, measure: Callable[[str, Tensor], Tensor], lo: int, hi: int, progress: Progress | None = None
) -> Float[Tensor, " n"]:
    """Sums over blocks of `measure(key, g)` for the whole gradient of each of the rows lo to hi, [n] float64; 0 for a
    row without one. Holds the gradient of one document in parts, or of some examples of one block."""
    receiver, done = Quadratics(measure, device_of(passes.model)), 0
    out = torch.zeros(hi - lo, dtype=torch.float64)
    for items, last in _batches(passes, receiver, lo, hi, receiver):
        done += sum(item.number == 0 for item in items)
        if last:
            rows = torch.tensor([item.row - lo for item in items]).unique_consecutive()
            out[rows] = receiver.take(len(rows)).cpu()
        if progress is not None:
            progress("self-influence", lo + done, passes.sample.n)
    return out


def _squares(key: str, g: Float[Tensor, "n K"]) -> Float[Tensor, " n"]:
    return g.double().square().sum(1)


def _batches(
    passes: Passes, receiver: Products | Quadratics | _Both, lo: int, hi: int, quadratic: Quadratics | None
) -> Iterator[tuple[Sequence[Item], bool]]:
    """One pass over the rows lo to hi; with each batch, whether its rows are complete."""
    pairs = Pairs(receiver)
    passes = replace(passes, rows=[row for row in passes.rows if lo <= row < hi])
    if quadratic is None:
        for items in passes.batches():
            passes.visit(pairs, passes.loss, items, passes.plan)
            pairs.finish()
            yield items, True
        return
    for before, following in pairwise(chain(passes.by_rows(), [None])):
        assert before is not None, "only the last one has none after it"
        items, joined = before
        quadratic.joined = joined
        passes.visit(pairs, passes.loss, items, passes.plan)
        pairs.finish()
        yield items, not (joined and following is not None and following[0][0].row == items[0].row)


def prepared(queries: Mapping[str, Tensor], blocks: Sequence[Block], rank: int | None) -> dict[str, Asked]:
    """Preconditioned queries [Q, I * O] by block, their matrices cut to `rank` where that is less to multiply with."""
    out: dict[str, Asked] = {}
    for block in blocks:
        found = prepare(queries[block.name], None if block.is_vector else _shape(block), rank)
        out[block.name] = found.whole if found.cut is None else found.cut
    return out


def _shape(block: Block) -> tuple[int, int]:
    return block.in_width, block.out_width


def _between(a: Float[Tensor, "B T I"], matrix: Float[Tensor, "I O"], d: Side) -> Float[Tensor, " B"]:
    """sum_t a_t^T Q d_t."""
    if d.is_floating_point():
        return ((a @ matrix) * d).sum((1, 2))
    return (a * matrix.T[d.long()]).sum((1, 2))  # one-hot positions pick a column


def _add_cut(scores: Float[Tensor, "Q B"], a: Float[Tensor, "B T I"], d: Side, cut: LowRank) -> None:
    """scores += sum over t and pairs r of (a_t . v_r)(d_t . u_r), for all queries at once."""
    num_queries, k = cut.u.shape[:2]
    left, right = cut.v.flatten(0, 1).to(a.dtype), cut.u.flatten(0, 1).to(a.dtype)
    step = max(1, ENTRIES // (a.shape[1] * num_queries * k))
    for lo in range(0, len(a), step):
        side = d[lo : lo + step]
        other = side @ right.T if side.is_floating_point() else right.T[side.long()]
        products = (a[lo : lo + step] @ left.T).mul_(other).sum(1)  # [b, Q * k]
        scores[:, lo : lo + step] += products.unflatten(1, (num_queries, k)).sum(2).T


def _moved(q: Asked, device: torch.device) -> Asked:
    return LowRank(q.u.to(device), q.v.to(device)) if isinstance(q, LowRank) else q.to(device)


def _divide(scores: Tensor, by: Tensor) -> Tensor:
    return torch.where(by > 0, scores / by, 0.0)

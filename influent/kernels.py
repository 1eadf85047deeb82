"""Inner products of stored rows of one block with all queries: whole rows, or their pairs without forming the rows.

Every kernel adds float32 sums of at most LONGEST_SUM numbers up in float64. Which kernel is the fastest is chosen here,
also where it is one of the loops with matrix tiles (programs.py). Not here: which rows (score.py).

Rows sum_r v_r (x) u_r of factors a x b and rank c, with Q queries: a query's matrix between the pairs takes c a b
products a row and query (few queries); forming the rows takes c a b once and then a b each (many); queries cut to
rank k take c k (a + b) each.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from . import compiled, digits, pairproducts, pairprograms
from .codec import Factors, Form
from .digits import Digits
from .gradients import LowRank, Packed, PackedPairs, Row
from .products import Products, fits
from .truncate import truncate

CHUNK_NUMBERS = 1 << 19  # numbers of a block held at once: 2 MiB of float32, which the matrix product finds in cache
HELD_NUMBERS = 1 << 18  # what may wait to be summed of blocks of one shape: 1 MiB of float32
LONGEST_SUM = 1 << 16  # float32 sums drift beyond this length: longer ones are cut and added up in float64
# Costs, up to a common factor, of a product in each kernel and of a number of a row that is formed; from
# benchmarks/results/kernels.json. The choice among kernels changes the scores by no more than rounding. Rows of one
# pair of sides of 36 are formed from 25 queries on, of two from 7, of four from 3.
BETWEEN, WHOLE, CUT, FORM = 1.0, 0.75, 0.9, 14.0
LOOP = 0.45  # a product between pairs in codes by a compiled loop, which takes two calls
CALL, CUT_CALL = 400, 200  # what a pair and query take besides, in products: sums of short rows
TILES = 30.0  # what a pair takes of matrix tiles, where there are any, for each of `pairprograms.work`

TILED = ("bfloat16", "int8", "int4", "sign")  # what the programs with tiles read
# The most queries of dense bfloat16 rows, which then are hardly faster than float32 ones; rows in codes are
# slower unpacked for any number.
TILED_QUERIES = 256

# The most queries for which compiled loops are faster than digits, where those are fast, and than unpacking.
FEW = {"int8": 3, "int4": 32, "sign": 128}
SOME = {"int8": 32, "int4": 64, "sign": 1 << 30}

Scores = Float[Tensor, "Q n"]


class Sums:
    """Scores [Q, n] in float64, and the float32 products of small blocks on their way there.

    Summing each row of a block of 18 x 18 takes as long as making its products. So blocks of one shape are added up
    number by number, at most LONGEST_SUM of them, and summed together.
    """

    def __init__(self, scores: Scores):
        self.scores = scores
        self._held: dict[tuple[int, int], tuple[Tensor, int]] = {}

    def add(self, query: int, x: Float[Tensor, "n w"], y: Float[Tensor, "n w"], length: int) -> None:
        """scores[query] += the rows' sums of x * y, in each of which are `length` products. Takes `x` for its own."""
        key = query, x.shape[1]
        held, so_far = self._held.get(key, (x, LONGEST_SUM))
        if so_far + length <= LONGEST_SUM:
            self._held[key] = held.addcmul_(x, y), so_far + length
            return
        if held is not x:
            self.scores[query] += held.sum(1)
        x.mul_(y)
        if len(self.scores) * x.numel() <= HELD_NUMBERS:
            self._held[key] = x, length
        else:
            self.scores[query] += x.sum(1)

    def close(self) -> None:
        """Nothing is left on its way."""
        for (query, _), (held, _) in self._held.items():
            self.scores[query] += held.sum(1)
        self._held.clear()


@dataclass(frozen=True, slots=True, eq=False)
class BlockQueries:
    """The queries of one block [Q, K] float32; `cut` are their pairs, which make `whole`, when they were cut."""

    whole: Float[Tensor, "Q K"]
    cut: LowRank | None = None  # u [Q, k, b], v [Q, k, a]
    captured: Float[Tensor, " Q"] | None = None
    coded: Products | Digits | None = None  # for packed rows, where products with codes are fast

    def __len__(self) -> int:
        return self.whole.shape[0]

    def add(self, sums: "Sums", row: Row) -> None:
        """sums.scores += <query, row>, [Q, n]; some of it not before `sums.close`."""
        if isinstance(row, Packed) and self.coded is not None and self.coded.bits == row.bits:
            self.coded.add(sums.scores, row)
            return
        if isinstance(row, PackedPairs):
            kernel, held = _cheapest(len(self), self._rank, row.u.shape[1], *row.factors, loops=_loops(row.factors))
        elif isinstance(row, LowRank):
            kernel, held = _cheapest(len(self), self._rank, row.u.shape[1], row.v.shape[2], row.u.shape[2])
        else:
            kernel, held = "whole", min(self.whole.shape[1], LONGEST_SUM)
        step = max(1, CHUNK_NUMBERS // max(1, held))
        if step >= len(row):
            self._add(kernel, sums, row)
            return
        for lo in range(0, len(row), step):
            part = Sums(sums.scores[:, lo : lo + step])
            self._add(kernel, part, row[lo : lo + step])
            part.close()

    def _add(self, kernel: str, sums: "Sums", row: Row) -> None:
        if kernel == "loop" and isinstance(row, PackedPairs):
            sums.scores.add_(pairproducts.between(row, self.whole.unflatten(1, row.factors)))
            return
        if isinstance(row, LowRank | PackedPairs):
            row = row.to(torch.float32)
        if kernel == "cut" and isinstance(row, LowRank) and self.cut is not None:
            _add_cut(sums.scores, row, self.cut)
        elif kernel == "between" and isinstance(row, LowRank):
            _add_between(sums, row, self.whole)
        else:
            _add_whole(sums.scores, row, self.whole)

    @property
    def _rank(self) -> int | None:
        return None if self.cut is None else self.cut.u.shape[1]


def prepare(
    q: Float[Tensor, "Q K"], factors: Factors | None, rank: int | None, *, bits: str | None = None
) -> BlockQueries:
    """The queries of one block; cut to their best `rank` pairs when it is given and the pairs are the smaller. `bits`
    are those of dense rows in codes."""
    if q.dtype != torch.float32 or q.requires_grad or not q.is_cpu:
        q = q.detach().cpu().float()
    if bits is not None:
        return BlockQueries(q, coded=_coded(q, bits))
    if rank is None or factors is None or _cut_rank(factors, rank) is None:
        return BlockQueries(q)
    cut = truncate(q.unflatten(1, factors), rank)
    pairs = LowRank(cut.pairs.u * cut.sigma[..., None], cut.pairs.v)
    return BlockQueries(pairs.flat(), pairs, cut.captured)


def by_tiles(form: Form, num_queries: int, query_rank: int | None) -> bool:
    """Whether rows of this form are best left to a program (programs.py), for queries that are cut to `query_rank`."""
    if form.bits not in TILED or form.width == 0 or not compiled.tiles_usable():
        return False
    if form.factors is None:
        return form.packed or num_queries <= TILED_QUERIES
    cut = _cut_rank(form.factors, query_rank)
    return _cheapest(num_queries, cut, form.rank, *form.factors, loops=form.packed, tiles=True)[0] == "tiles"


def _cut_rank(factors: Factors, rank: int | None) -> int | None:
    """How many pairs are left of a query's matrix: None when it is not cut, since they would be no fewer numbers."""
    return rank if rank is not None and rank * sum(factors) < factors[0] * factors[1] else None


def _cheapest(
    num_queries: int, cut: int | None, c: int, a: int, b: int, *, loops: bool = False, tiles: bool = False
) -> tuple[str, int]:
    """The kernel for rows of c pairs of such sides, and how many numbers it holds for each. `cut` is the number of
    pairs of a query that is cut; `loops` says whether pairs in codes can stay as they are, `tiles` whether a program
    is to be had."""
    ways = [
        (num_queries * BETWEEN * c * (a * b + CALL), "between", c * (a + b)),
        ((num_queries * WHOLE + FORM) * a * b, "whole", min(a * b, LONGEST_SUM)),
    ]
    if loops:
        ways.append((num_queries * LOOP * c * (a * b + 2 * CALL), "loop", max(c * num_queries, c * (a + b) // 4)))
    if tiles:
        ways.append((num_queries * TILES * c * pairprograms.work(a, b), "tiles", 0))
    if cut is not None:
        held = c * (a + b + 2 * num_queries * cut)
        ways.append((num_queries * c * (CUT * cut * (a + b) + CUT_CALL), "cut", held))
    _, kernel, held = min(ways)
    return kernel, held


def _loops(factors: Factors) -> bool:
    return compiled.usable() and pairproducts.fits(factors)


def _coded(q: Float[Tensor, "Q K"], bits: str) -> Products | Digits | None:
    """How rows in codes are multiplied without unpacking them to memory; None where that is the fastest."""
    by_digits = digits.usable() and q.shape[1] >= digits.NARROWEST
    most = (FEW if by_digits else SOME)[bits]
    if compiled.usable() and fits(q.shape[1], bits) and len(q) <= most:
        return Products.of(q, bits)
    return Digits.of(q, bits) if by_digits else None


def _add_whole(scores: Scores, row: Row, q: Float[Tensor, "Q K"]) -> None:
    """Dense rows, or the rows that the pairs make, against flat queries."""
    for left in range(0, q.shape[1], LONGEST_SUM):
        right = min(left + LONGEST_SUM, q.shape[1])
        # No copy for float32 rows: the product reads the mapped file itself.
        scores += q[:, left:right] @ row.columns(left, right).float().T


def _add_between(sums: Sums, row: LowRank, q: Float[Tensor, "Q K"]) -> None:
    """sum_r v_r^T Q u_r, the longer side first; one query at a time, so that its product stays in cache."""
    (n, c, b), a = row.u.shape, row.v.shape[2]
    short, long, matrices = row.u, row.v, q.unflatten(1, (a, b))
    if a < b:
        short, long, matrices = row.v, row.u, matrices.transpose(1, 2)
    short, length = short.reshape(n, -1), long.shape[2]
    for left in range(0, length, LONGEST_SUM):
        side, part = long, matrices
        if length > LONGEST_SUM:
            side, part = long[:, :, left : left + LONGEST_SUM], matrices[:, left : left + LONGEST_SUM]
        side = side.reshape(n * c, -1)
        for query, matrix in enumerate(part):
            sums.add(query, (side @ matrix).view(n, -1), short, c * a * b)


def _add_cut(scores: Scores, row: LowRank, cut: LowRank) -> None:
    """sum over pairs r of the row and s of the query of (v_r . x_s)(u_r . y_s)."""
    num_queries, k = cut.u.shape[:2]
    products = _project(row.v, cut.v).mul_(_project(row.u, cut.u))  # [n, c, Q * k]
    scores += products.unflatten(2, (num_queries, k)).sum((1, 3)).T


def _project(side: Float[Tensor, "n c w"], onto: Float[Tensor, "Q k w"]) -> Float[Tensor, "n c Qk"]:
    flat = onto.flatten(0, 1).T
    if len(flat) <= LONGEST_SUM:
        return side @ flat
    pieces = zip(side.split(LONGEST_SUM, dim=2), flat.split(LONGEST_SUM), strict=True)
    return torch.stack([(x @ y).double() for x, y in pieces]).sum(0).float()

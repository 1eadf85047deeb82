"""Inner products of stored rows of one block with all queries: whole rows, or their pairs without forming the rows.

Every kernel adds float32 sums of at most LONGEST_SUM numbers up in float64. Not here: which rows (score.py).

Rows sum_r v_r (x) u_r of factors a x b and rank c, with Q queries: a query's matrix between the pairs takes c a b
products a row and query (few queries); forming the rows takes c a b once and then a b each (many); queries cut to
rank k take c k (a + b) each.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .codec import Factors
from .gradients import LowRank, Row
from .truncate import truncate

CHUNK_NUMBERS = 1 << 19  # numbers of a block held at once: 2 MiB of float32, which the matrix product finds in cache
LONGEST_SUM = 1 << 16  # float32 sums drift beyond this length: longer ones are cut and added up in float64
# Costs, up to a common factor, of a product in each kernel and of a number of a row that is formed; from
# benchmarks/results/kernels.json. The choice among kernels changes the scores by no more than rounding. Rows of one
# pair are formed from 57 queries on, of two from 12, of four from 5, of eight from 2.
BETWEEN, WHOLE, CUT, FORM = 1.0, 0.75, 0.9, 14.0

Scores = Float[Tensor, "Q n"]


@dataclass(frozen=True, slots=True, eq=False)
class BlockQueries:
    """The queries of one block [Q, K] float32; `cut` are their pairs, which make `whole`, when they were cut."""

    whole: Float[Tensor, "Q K"]
    cut: LowRank | None = None  # u [Q, k, b], v [Q, k, a]
    captured: Float[Tensor, " Q"] | None = None

    def __len__(self) -> int:
        return self.whole.shape[0]

    def add(self, scores: Scores, row: Row) -> None:
        """scores += <query, row>, [Q, n] float64."""
        if not isinstance(row, LowRank):
            kernel, held = "whole", min(self.whole.shape[1], LONGEST_SUM)
        else:
            kernel, held = self._cheapest(row)
        step = max(1, CHUNK_NUMBERS // max(1, held))
        for lo in range(0, len(row), step):
            # Slices of small rows would cost as much as their products.
            whole = step >= len(row)
            part, into = (row, scores) if whole else (row[lo : lo + step], scores[:, lo : lo + step])
            if isinstance(part, LowRank):
                part = part.to(torch.float32)
            if kernel == "cut" and isinstance(part, LowRank) and self.cut is not None:
                _add_cut(into, part, self.cut)
            elif kernel == "between" and isinstance(part, LowRank):
                _add_between(into, part, self.whole)
            else:
                _add_whole(into, part, self.whole)

    def _cheapest(self, row: LowRank) -> tuple[str, int]:
        """The kernel for these rows, and how many numbers it holds for each."""
        (c, b), a = row.u.shape[1:], row.v.shape[2]
        ways = [
            (len(self) * BETWEEN * c * a * b, "between", c * (a + b)),
            ((len(self) * WHOLE + FORM) * a * b, "whole", min(a * b, LONGEST_SUM)),
        ]
        if self.cut is not None:
            k = self.cut.u.shape[1]
            ways.append((len(self) * CUT * k * c * (a + b), "cut", c * (a + b + 2 * len(self) * k)))
        _, kernel, held = min(ways)
        return kernel, held


def prepare(q: Float[Tensor, "Q K"], factors: Factors | None, rank: int | None) -> BlockQueries:
    """The queries of one block; cut to their best `rank` pairs when it is given and the pairs are the smaller."""
    q = q.detach().cpu().float()
    if rank is None or factors is None or rank * sum(factors) >= q.shape[1]:
        return BlockQueries(q)
    cut = truncate(q.unflatten(1, factors), rank)
    pairs = LowRank(cut.pairs.u * cut.sigma[..., None], cut.pairs.v)
    return BlockQueries(pairs.flat(), pairs, cut.captured)


def _add_whole(scores: Scores, row: Row, q: Float[Tensor, "Q K"]) -> None:
    """Dense rows, or the rows that the pairs make, against flat queries."""
    for left in range(0, q.shape[1], LONGEST_SUM):
        right = min(left + LONGEST_SUM, q.shape[1])
        # No copy for float32 rows: the product reads the mapped file itself.
        scores += q[:, left:right] @ row.columns(left, right).float().T


def _add_between(scores: Scores, row: LowRank, q: Float[Tensor, "Q K"]) -> None:
    """sum_r v_r^T Q u_r, the longer side first; one query at a time, so that its product stays in cache."""
    u, v = row.u, row.v
    matrices = q.unflatten(1, (v.shape[2], u.shape[2]))
    if v.shape[2] < u.shape[2]:
        u, v, matrices = v, u, matrices.transpose(1, 2)
    if v.shape[2] <= LONGEST_SUM:
        for matrix, into in zip(matrices, scores, strict=True):
            into += (v @ matrix).mul_(u).sum((1, 2))
        return
    for left in range(0, v.shape[2], LONGEST_SUM):
        side = v[:, :, left : left + LONGEST_SUM]
        for i, matrix in enumerate(matrices):
            scores[i] += (side @ matrix[left : left + LONGEST_SUM]).mul_(u).sum((1, 2))


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

"""Curvature mixed of rows and queries: F = (1 - m) F_train + m F_queries, as in TrackStar (Chang et al., 2024).

What a query shares with every query is then discounted, as what a row shares with every row is. Nothing is written, and
lambda is that of the fitted matrix. The exact Fisher matrix is mixed in its stored Gram matrix, in float64; with fewer
rows than columns the equal dual form is solved, over N + Q rows. One of low rank, or of K-FAC of compressed sides,
which any damping can be taken of, is solved with lambda / (1 - m), and the queries are added by Woodbury's identity.
Not here: Gram matrices (gram.py).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from . import kronname
from .curvature import FIM
from .damping import Damping
from .errors import NumericsError, SpecError
from .fitting import Curvature, block_rows
from .gram import BlockRows, Matrix, Vanishing, cholesky, unpack
from .kron import KronRows
from .progress import Progress
from .truncated import Truncated

MIXED = "fim, lowrank, sketch, kfac:compressed or ekfac:compressed"  # the curvatures that can be


def check_mix(share: float, curvature: str, normalize: str) -> None:
    """SpecError unless the share is between 0 and 1, the curvature is a Fisher matrix of rows that can be mixed, and no
    row's self-influence is asked for."""
    if not 0 < share < 1:
        raise SpecError(f"mix is {share}, expected a share above 0 and below 1, such as 0.5")
    kron = kronname.parse(curvature)
    if curvature.partition(":")[0] not in ("fim", "lowrank", "sketch") and not (kron and kron.compressed):
        raise SpecError(f"mix is for {MIXED}, not for {curvature}: leave it out")
    if normalize == "relatif":
        raise SpecError("mix has no self-influence that relatif could divide by: use --normalize none or cosine")


@torch.no_grad()
def precondition(
    queries: Mapping[str, Tensor], fitted: Curvature, share: float, *, progress: Progress | None = None
) -> dict[str, Tensor]:
    """((1 - m) F_train + m F_queries + lambda I)^-1 q for every block and query, [Q, K]; one block at a time.

    Raises NumericsError, naming the block, for a matrix that is singular to working precision.
    """
    eased = None if isinstance(fitted, FIM) else _eased(fitted, share)
    solved, health = {}, fitted.health()
    for done, (key, q) in enumerate(queries.items(), start=1):
        exact = q.detach().cpu().double()
        if isinstance(fitted, FIM):
            found = _inverse(fitted, health[key], key, exact, share)(exact)
        else:
            assert eased is not None
            found = _added(eased.solver(key)(exact).double() / (1 - share), exact, share, key)
        solved[key] = found.to(q.dtype)
        if not bool(solved[key].isfinite().all()):
            raise NumericsError(f"block {key!r}: the preconditioned query is not finite: raise the damping")
        if progress is not None:
            progress("precondition", done, len(queries))
    return solved


def _eased(fitted: Curvature, share: float) -> Curvature:
    """F + lambda / (1 - m) I, of which (1 - m) F + lambda I is 1 - m times."""
    if not isinstance(fitted, Truncated | KronRows) or not isinstance(fitted.damping, Damping):
        raise SpecError(f"mix: {fitted.name} cannot be mixed so: give --curvature {MIXED}, and no --parity")
    more = Damping(fitted.damping.unit, fitted.damping.value / (1 - share))
    if isinstance(fitted, Truncated):
        return Truncated(fitted.index, fitted.basis, more, memory=fitted.memory)
    return KronRows(fitted.index, fitted.fitted, more, memory=fitted.memory)


def _added(solved: Float[Tensor, "M K"], asked: Float[Tensor, "M K"], share: float, key: str) -> Float[Tensor, "M K"]:
    """(A + m/M Q^T Q)^-1 Q^T from `solved` = A^-1 Q^T, both by rows: c (c I + Q A^-1 Q^T)^-1 A^-1 Q^T with c = M/m."""
    c = len(asked) / share
    inner = asked @ solved.T
    return c * torch.cholesky_solve(solved, cholesky((inner + inner.T) / 2, c, block=key))


def _inverse(
    fitted: FIM, facts: Mapping[str, Any], key: str, asked: Float[Tensor, "Q K"], share: float
) -> Callable[[Tensor], Tensor]:
    rows, amount = block_rows(fitted.index, key, fitted.memory), facts["lambda"]
    if facts["form"] == "zero":
        return Vanishing()
    fitted.grams.check(key)
    matrix = unpack(fitted.grams.tensors(key)["gram"])
    train, own = (1 - share) / rows.num_rows, share / len(asked)
    if facts["form"] == "primal":
        matrix = matrix.mul_(train).addmm_(asked.T, asked, alpha=own)
        return MixedPrimal(cholesky(matrix, amount, block=key))
    if amount == 0:
        raise NumericsError(f"block {key!r}: fewer rows than columns: expected a damping above 0")
    return _dual(rows, matrix.mul_(train), asked, (train, own), amount)


@dataclass(frozen=True, slots=True, eq=False)
class MixedPrimal:
    """q -> (L L^T)^-1 q, with L the factor of the mixed and damped matrix."""

    factor: Matrix

    def __call__(self, q: Float[Tensor, "Q K"]) -> Float[Tensor, "Q K"]:
        return torch.cholesky_solve(q.T, self.factor).T


@dataclass(frozen=True, slots=True, eq=False)
class MixedDual:
    """q -> (q - Z^T (Z Z^T + lambda I)^-1 Z q) / lambda, Z the weighted rows and queries: Z^T Z is the mixed F."""

    factor: Matrix
    rows: BlockRows
    asked: Float[Tensor, "M K"]
    roots: tuple[float, float]  # the weights' square roots, of rows and of queries
    damping: float

    def __call__(self, q: Float[Tensor, "Q K"]) -> Float[Tensor, "Q K"]:
        (train, own), n = self.roots, self.rows.num_rows
        seen = torch.empty(n + len(self.asked), len(q), dtype=torch.float64)
        for lo, hi, g in self.rows.chunks():
            seen[lo:hi] = train * (g @ q.T)
        seen[n:] = own * (self.asked @ q.T)
        weights = torch.cholesky_solve(seen, self.factor)
        answer = q - own * weights[n:].T @ self.asked
        for lo, hi, g in self.rows.chunks():
            answer.addmm_(weights[lo:hi].T, g, alpha=-train)
        return answer.div_(self.damping)


def _dual(
    rows: BlockRows, gram: Matrix, asked: Float[Tensor, "M K"], weights: tuple[float, float], amount: float
) -> MixedDual:
    n, roots = rows.num_rows, (weights[0] ** 0.5, weights[1] ** 0.5)
    whole = torch.zeros(n + len(asked), n + len(asked), dtype=torch.float64)
    whole[:n, :n] = gram
    for lo, hi, g in rows.chunks():
        whole[n:, lo:hi] = roots[0] * roots[1] * (asked @ g.T)
    whole[n:, n:] = weights[1] * (asked @ asked.T)
    return MixedDual(cholesky(whole, amount, block=rows.key), rows, asked, roots, amount)

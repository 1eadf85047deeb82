"""The best low-rank part of each matrix of a batch: block power iteration as published, finished exactly.

Both ways find an orthonormal basis P of the smaller side and keep M P P^T, so that what is kept is a projection of the
matrix whatever the precision of its singular values. Not here: how the pairs are stored (coding.py).
Source: the rank cut of LoRIF (arXiv 2601.21929), 8 rounds for rank 1 and 16 above, on the smaller Gram matrix, one
round of which is the published pair U <- orth(M V), V <- orth(M^T U).
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from .gradients import LowRank
from .rng import Stream

# Below this ratio of the smaller side to the rank an eigendecomposition takes no longer than the rounds (measured from
# 4 to 128 on one thread: 0.67 ms against 0.28 ms for 64 and rank 8, 0.6 against 0.6 for 64 and rank 16).
EXACT_RATIO = 6
# What the last round may still add to the captured energy, as a share of the matrix's. Slow convergence means singular
# values that are close, so that little is lost: the shortfall is at most the gain times the rounds or so.
GAIN = 3e-5
TINY = torch.finfo(torch.float32).tiny
NOISE = 1e-12  # of squares of float32 columns: what is below it, beside the largest, is rounding


@dataclass(frozen=True, slots=True)
class Cut:
    """M ~ sum_r sigma_r v_r (x) u_r with unit pairs, largest sigma first; a pair of zeros where sigma is 0."""

    pairs: LowRank  # u [n, c, b], v [n, c, a]
    sigma: Float[Tensor, "n c"]
    captured: Float[Tensor, " n"]  # |sum|^2 / |M|^2, 1 for a matrix of zeros


def truncate(matrices: Float[Tensor, "n a b"], rank: int) -> Cut:
    """The best `rank` pairs of each matrix; the same, up to rounding, in whatever batch it comes.

    A matrix of lower rank has pairs of zeros for the rest. Values must be finite.
    """
    n, a, b = matrices.shape
    largest = torch.linalg.vector_norm(matrices, ord=torch.inf, dim=(1, 2))
    size = torch.where(largest > 0, largest, 1.0)  # squares neither overflow nor vanish
    m = (matrices / size[:, None, None]).float()
    m = m if b <= a else m.transpose(1, 2)  # [n, long, short]
    kept = min(rank, m.shape[2])
    basis = _basis(m.transpose(1, 2) @ m, kept)  # [n, short, c]
    long, short, sigma = _rotate(m @ basis, basis)
    total = torch.linalg.vector_norm(m, dim=(1, 2)).square()
    captured = torch.where(total > 0, (sigma.square().sum(1) / total).clamp(max=1), 1.0)
    if kept < rank:
        long, short, sigma = (_pad(x, rank) for x in (long, short, sigma))
    pairs = LowRank(short, long) if b <= a else LowRank(long, short)
    return Cut(pairs, sigma * size[:, None], captured)


def _basis(gram: Float[Tensor, "n m m"], rank: int) -> Float[Tensor, "n m c"]:
    """Orthonormal columns that span the `rank` leading eigenvectors."""
    m = gram.shape[1]
    if EXACT_RATIO * rank > m:
        return _exact(gram, rank)
    p = _start(m, rank).to(gram.device).expand(len(gram), -1, -1)
    rounds, doublings = (8, 4) if rank == 1 else (10, 1)
    power = gram
    for _ in range(doublings):
        power = power / power.diagonal(dim1=1, dim2=2).sum(1).clamp(min=TINY)[:, None, None]
        power = power @ power
    for _ in range(rounds):
        p = _orthonormal(power @ p)
    y = gram @ p  # squares lose the small ones of c singular values: the last rounds are the published ones
    p = _orthonormal(y)
    y = gram @ p
    before = (p * y).sum((1, 2))
    p = _orthonormal(y)
    gain = (p * (gram @ p)).sum((1, 2)) - before
    rest = gain > GAIN * gram.diagonal(dim1=1, dim2=2).sum(1)
    if bool(rest.any()):
        p[rest] = _exact(gram[rest], rank)
    return p


def _exact(gram: Float[Tensor, "n m m"], rank: int) -> Float[Tensor, "n m c"]:
    return torch.linalg.eigh(gram).eigenvectors[:, :, -rank:]


def _orthonormal(y: Float[Tensor, "n m c"]) -> Float[Tensor, "n m c"]:
    if y.shape[2] > 1:
        return torch.linalg.qr(y).Q if y.device.type == "cpu" else _whitened(y)
    return y / torch.linalg.vector_norm(y, dim=1, keepdim=True).clamp(min=TINY)


def _whitened(y: Float[Tensor, "n m c"]) -> Float[Tensor, "n m c"]:
    """Orthonormal columns of the same span from the eigenvectors of y^T y (Stathopoulos and Wu, 2002), zero where
    there are fewer: an accelerator's QR takes one matrix of the batch after another."""
    exact = y.double()
    exact = exact / torch.linalg.vector_norm(exact, dim=1, keepdim=True).clamp(min=TINY)
    values, turns = torch.linalg.eigh(exact.transpose(1, 2) @ exact)  # [n, c]
    weights = torch.where(values > NOISE * values[:, -1:], values.clamp(min=NOISE).rsqrt(), 0.0)
    return (exact @ (turns * weights[:, None])).float()


@lru_cache(maxsize=64)
def _start(m: int, rank: int) -> Float[Tensor, "m c"]:
    """Where the rounds begin: the same for every matrix of one shape."""
    draws = Stream(0, "truncate", "normal", f"{m}x{rank}").normals(m * rank)
    return _orthonormal(torch.from_numpy(draws).view(1, m, rank))[0]


def _rotate(long: Float[Tensor, "n l c"], basis: Float[Tensor, "n s c"]) -> tuple[Tensor, Tensor, Tensor]:
    """long basis^T as singular pairs: long side [n, c, l], short side [n, c, s], sigma [n, c], largest first."""
    if long.shape[2] > 1:
        turn = torch.linalg.eigh((long.transpose(1, 2) @ long).double()).eigenvectors.flip(2).float()
        long, basis = long @ turn, basis @ turn
    sigma = torch.linalg.vector_norm(long, dim=1)  # [n, c]
    # What rounding leaves of a missing singular value is not a direction.
    real = sigma > 1e-6 * sigma[:, :1]
    sigma = torch.where(real, sigma, 0.0)
    scale = torch.where(real, 1 / sigma, 0.0)
    return (
        (long * scale[:, None]).transpose(1, 2).contiguous(),
        (basis * real[:, None]).transpose(1, 2).contiguous(),
        sigma,
    )


def _pad(x: Tensor, rank: int) -> Tensor:
    return torch.cat([x, x.new_zeros(len(x), rank - x.shape[1], *x.shape[2:])], dim=1)

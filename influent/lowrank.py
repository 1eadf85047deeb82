"""The low-rank curvature of LoRIF (Li et al., 2026), on tensors: leading eigenvectors from streamed rows, and Woodbury.

Two ways to the eigenvectors: subspace iteration (several passes), and a single-pass sketch that is a plain sum over
rows, so that later rows are added to it without the earlier ones. Both end in the same Nystroem step. Nothing here
reads or writes an artifact (see `curvature.py`).

Legend: N rows, K row width, Q queries, m = min(N, K), r the rank kept, l >= r the columns worked with. F = G^T G / N
with eigenvalues s_1 >= s_2 >= ..., of which the first r stay. The others are taken to be equal: the tail
tau = (tr F - sum_j s_j) / (m - r), so that F ~ V diag(s) V^T + tau (I - V V^T).
"""

from dataclasses import dataclass
from math import isfinite

import torch
from jaxtyping import BFloat16, Float
from torch import Tensor

from .errors import NumericsError
from .gram import BlockRows, gram, pack, per_row, unpack
from .rng import Stream

OVERSAMPLING = 10
EXACT_RATIO = 3
ITERATIONS = 3  # power iterations after the first pass, as published

# The largest s / (lambda + tau) at which a rounded column still serves. A column off by a relative e leaves about
# e^2 s / (lambda + tau) of what it should remove; measured on real gradients, the published bound of 100 costs 7e-4 of
# the rank correlation. Float32 has 2^15 times the precision.
BFLOAT16_REACH = 100.0
FLOAT32_REACH = BFLOAT16_REACH * 2.0**15


@dataclass(frozen=True, slots=True, eq=False)
class Sketch:
    """Sums over rows, which is all that the eigenvectors are made from: G^T G Omega and tr G^T G."""

    product: Float[Tensor, "K l"]
    squares: float
    num_rows: int

    def __add__(self, other: "Sketch") -> "Sketch":
        """The sketch of both sets of rows; their start Omega must be the same."""
        return Sketch(
            self.product + other.product, self.squares + other.squares, self.num_rows + other.num_rows
        )  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Spectrum:
    """Leading eigenvectors of F as columns, their eigenvalues in falling order, and the trace of F."""

    vectors: Float[Tensor, "K l"]
    values: Float[Tensor, " l"]
    trace: float
    num_rows: int

    def tail(self, rank: int) -> float:
        """tau: the mean of the m - rank eigenvalues that are left out; 0 if none is."""
        left = min(self.num_rows, len(self.vectors)) - rank
        return max(self.trace - float(self.values[:rank].sum()), 0.0) / left if left > 0 else 0.0


def start(block: str, width: int, columns: int) -> Float[Tensor, "K l"]:
    """Orthonormal columns Omega in random directions, the same for every index that has such a block."""
    if columns >= width:
        return torch.eye(width, dtype=torch.float64)
    draws = Stream(0, block, "lowrank", "start").normals(width * columns)
    return _orthonormal(torch.from_numpy(draws).double().view(width, columns))


def sketch(rows: BlockRows, basis: Float[Tensor, "K l"]) -> Sketch:
    """One pass: sum over rows of g (g^T basis), and of |g|^2. All float64; see `spectrum_by_iteration` for why.

    Raises NumericsError, naming the block, for rows that are not finite.
    """
    product, squares = torch.zeros_like(basis), 0.0
    for _, _, g in rows.chunks():
        product.addmm_(g.T, g @ basis)
        squares += float(torch.linalg.vector_norm(g)) ** 2
    if not (isfinite(squares) and bool(product.isfinite().all())):
        raise NumericsError(f"block {rows.key!r}: its rows are not finite: run `influent verify` on the index")
    return Sketch(product, squares, rows.num_rows - rows.first)


def leading_spectrum(rows: BlockRows, rank: int) -> Spectrum:
    """The leading `rank` + 10 eigenpairs: exact where the rank is no small part of m, else by subspace iteration.

    Measured with N = 2,000 and rank 512, CPU seconds: K = 324 0.04 against 0.26, 864 0.28 and 0.94, 1,296 0.98 and
    1.24, 3,456 4.1 and 3.6. Then m is at most 3 r, so that m x m numbers are no more than iteration holds.
    """
    m = min(rows.num_rows, rows.width)
    return spectrum_exactly(rows, rank) if EXACT_RATIO * rank > m else spectrum_by_iteration(rows, rank)


def spectrum_exactly(rows: BlockRows, rank: int) -> Spectrum:
    """The leading `rank` + 10 eigenpairs from the smaller Gram matrix: one pass over the rows, two if N < K.

    Raises NumericsError, naming the block, for rows that are not finite.
    """
    total = gram(rows)
    trace = float(total.diagonal().sum())
    if not isfinite(trace):
        raise NumericsError(f"block {rows.key!r}: its rows are not finite: run `influent verify` on the index")
    columns = min(rank + OVERSAMPLING, len(total))
    sizes, vectors = torch.linalg.eigh(total)  # which reads the lower triangle
    noise = torch.finfo(sizes.dtype).eps * len(sizes) * max(float(sizes[-1]), 0.0)
    kept = min(columns, int((sizes > noise).sum()))
    values, vectors = sizes.flip(0)[:kept], vectors.flip(1)[:, :kept]
    if rows.num_rows < rows.width:
        vectors, values = _carried_over(rows, vectors)
    return Spectrum(vectors, values.clamp(min=0) / rows.num_rows, trace / rows.num_rows, rows.num_rows)


def _carried_over(rows: BlockRows, left: Float[Tensor, "N l"]) -> tuple[Float[Tensor, "K l"], Float[Tensor, " l"]]:
    """Eigenpairs of G^T G from eigenvectors of G G^T: those of G^T left left^T G, orthonormal however small."""
    y = torch.zeros(rows.width, left.shape[1], dtype=torch.float64)
    for lo, hi, g in rows.chunks():
        y.addmm_(g.T, left[lo:hi])
    q, upper = torch.linalg.qr(y)
    values, turns = torch.linalg.eigh(upper @ upper.T)
    return q @ turns.flip(1), values.flip(0)


def spectrum_by_iteration(rows: BlockRows, rank: int) -> Spectrum:
    """Randomised subspace iteration (Halko et al., 2011): 4 passes for the leading `rank` + 10 eigenpairs."""
    basis = start(rows.key, rows.width, rank + OVERSAMPLING)
    for _ in range(ITERATIONS):
        basis = _orthonormal(sketch(rows, basis).product)
    return spectrum_of(sketch(rows, basis), basis)


def spectrum_of(sums: Sketch, basis: Float[Tensor, "K l"]) -> Spectrum:
    """Eigenpairs of the Nystroem approximation F ~ Y (basis^T Y)^+ Y^T, Y = F basis: exact if F's rank is at most l.

    From the same Y it captures more than the Rayleigh quotients of `basis` do, as much as half an iteration more.
    Directions that rounding drowns are left out (Tropp et al., 2017, shift them instead).
    """
    y = sums.product / sums.num_rows
    trace = sums.squares / sums.num_rows
    noise = torch.finfo(y.dtype).eps * len(y) ** 0.5 * float(y.norm())
    core = basis.T @ y
    sizes, turns = torch.linalg.eigh((core + core.T) / 2)
    kept = sizes > noise
    q, upper = torch.linalg.qr(y)
    half = (upper @ turns[:, kept]) / sizes[kept].sqrt()  # F ~ (q half) (q half)^T
    values, vectors = torch.linalg.eigh(half @ half.T)
    real = min(int(kept.sum()), sums.num_rows)
    return Spectrum(q @ vectors.flip(1)[:, :real], values.flip(0)[:real].clamp(min=0), trace, sums.num_rows)


def _orthonormal(x: Float[Tensor, "K l"]) -> Float[Tensor, "K l"]:
    """The columns' QR basis, with the signs that make it a function of `x` and not of the library."""
    q, upper = torch.linalg.qr(x)
    return q * torch.where(upper.diagonal() < 0, -1.0, 1.0)


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """Eigenvectors at the precision that their eigenvalues ask for: float32 first, bfloat16 after.

    `overlaps` is (V^T V - I) of the columns as rounded, packed: with it a product with them can be made one with
    orthonormal columns, to second order in the rounding (one Newton-Schulz step), which takes 4/5 of the error away.
    """

    fine: Float[Tensor, "K f"]
    coarse: BFloat16[Tensor, "K c"]
    overlaps: BFloat16[Tensor, " packed"]

    @classmethod
    def of(cls, vectors: Float[Tensor, "K r"], values: Float[Tensor, " r"], base: float) -> "Stored":
        """Rounded for every lambda + tau of `base` or more."""
        cut = int((values > BFLOAT16_REACH * base).sum())
        fine, coarse = vectors[:, :cut].float().contiguous(), vectors[:, cut:].bfloat16().contiguous()
        rounded = torch.cat([fine.double(), coarse.double()], dim=1)
        overlaps = rounded.T @ rounded - torch.eye(rounded.shape[1], dtype=torch.float64)
        return cls(fine, coarse, pack(overlaps.bfloat16()))

    def least_base(self, values: Float[Tensor, " r"]) -> float:
        """The smallest lambda + tau for which this precision suffices."""
        cut = self.fine.shape[1]
        worst = [values[:1] / FLOAT32_REACH if cut else values[:0], values[cut : cut + 1] / BFLOAT16_REACH]
        return max(torch.cat(worst).tolist(), default=0.0)

    def vectors(self) -> Float[Tensor, "K r"]:
        return torch.cat([self.fine.double(), self.coarse.double()], dim=1)

    def correction(self) -> Float[Tensor, "r r"]:
        """I - (V^T V - I) / 2: V times this is orthonormal to second order."""
        lower = unpack(self.overlaps.double())
        return torch.eye(len(lower), dtype=torch.float64) - (lower + lower.tril(-1).T) / 2


@dataclass(frozen=True, slots=True, eq=False)
class Woodbury:
    """q -> (V diag(s) V^T + tau (I - V V^T) + lambda I)^-1 q, folded: q / b - V diag(1/b - 1/(lambda + s)) V^T q with
    b = lambda + tau. One product with V each way; no row is read."""

    vectors: Float[Tensor, "K r"]
    correction: Float[Tensor, "r r"]
    values: Float[Tensor, " r"]
    damping: float
    tail: float

    def __call__(self, q: Float[Tensor, "Q K"]) -> Float[Tensor, "Q K"]:
        base = self.damping + self.tail
        weights = 1 / base - 1 / (self.damping + self.values)
        inside = self._inside(q) * weights
        return (q / base).addmm_(inside @ self.correction, self.vectors.T, alpha=-1)

    def self_influence(self, rows: BlockRows) -> Float[Tensor, " N"]:
        """|g outside V|^2 / b + sum_j (v_j g)^2 / (lambda + s_j) of each row, in one pass; never negative."""

        def measure(g: Float[Tensor, "n K"]) -> Float[Tensor, " n"]:
            inside = self._inside(g).square()
            outside = (g.square().sum(dim=1) - inside.sum(dim=1)).clamp(min=0)
            return outside / (self.damping + self.tail) + inside @ (1 / (self.damping + self.values))

        return per_row(rows, measure)

    def _inside(self, x: Float[Tensor, "n K"]) -> Float[Tensor, "n r"]:
        """Coordinates along the orthonormal columns that the stored ones stand for."""
        return (x @ self.vectors) @ self.correction

"""The linear algebra of the Fisher matrix, on tensors: Gram matrices, Cholesky factors and the two exact solvers.

Rows are the stored ones, streamed in bounded pieces to the device that is asked for; everything is float64, there too.
Nothing here reads or writes an artifact or knows what damping was asked for (see `curvature.py`).

Legend: N rows, K row width, Q queries, m = min(N, K). With G [N, K] the rows of one block, F = G^T G / N and damping
lambda, the factor L is that of (Gram + N lambda I), where Gram is G^T G [K, K] (primal, N >= K) or G G^T [N, N] (dual,
N < K). Then (F + lambda I)^-1 q = N (L L^T)^-1 q, or (q - G^T (L L^T)^-1 G q) / lambda: the same vector, exactly.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from .codec import Form
from .errors import NumericsError
from .gradients import LowRank, PackedPairs, Row
from .payload import Places
from .storage import Store

Matrix = Float[Tensor, "m m"]

MEMORY = 256  # MiB
# What of the memory holds float64 rows; the rest is for decoding them and for products of that size. The cut does not
# depend on the shards, so the same rows in other shards give the same bits.
SHARE = 4
PIECES = 8  # a sub-batch is decoded in at least so many pieces, which stand beside it
PANEL = 512
CPU = torch.device("cpu")


@runtime_checkable
class Shard(Protocol):
    """A range of rows: what this level needs of `index.Shard`."""

    lo: int
    hi: int
    name: str

    @property
    def ids(self) -> Tensor: ...
    def grads(self, key: str, lo: int = 0, hi: int | None = None) -> Row: ...


@runtime_checkable
class Checkable(Protocol):
    """A shard that knows the hash of its bytes; rows that were never stored have none."""

    def check(self) -> None: ...


def check_bytes(shard: object) -> None:
    """Raises CorruptError, naming the shard, when its stored bytes are not those that were committed."""
    if isinstance(shard, Checkable):
        shard.check()


@runtime_checkable
class Mapped(Protocol):
    """A shard that knows where its rows lie in memory, while `is_mapped`: from row `lo` on, of each block."""

    @property
    def is_mapped(self) -> bool: ...
    def places(self, keys: tuple[str, ...], lo: int) -> Places: ...


@runtime_checkable
class Described(Protocol):
    """A source that knows how the rows of each block are stored without reading any."""

    forms: dict[str, Form]


@runtime_checkable
class RowSource(Protocol):
    """Stored rows of every block, in shards: what `index.Index` is to the levels above the row store."""

    n: int
    widths: dict[str, int]
    digest: str
    store: Store

    @property
    def shards(self) -> Sequence[Shard]: ...
    @property
    def history(self) -> list[dict[str, Any]]: ...


@dataclass(frozen=True, slots=True, eq=False)
class BlockRows:
    """The rows of one block from row `first` on, read again on each pass; what is yielded is valid until the next piece
    is asked for. `memory` MiB bound what is held of them, on `device`; neither changes more than rounding."""

    source: RowSource
    key: str
    memory: int = MEMORY
    first: int = 0
    device: torch.device = CPU

    @property
    def num_rows(self) -> int:
        return self.source.n

    @property
    def width(self) -> int:
        return self.source.widths[self.key]

    @property
    def numbers(self) -> int:
        """How many float64 numbers a sub-batch may have."""
        return (self.memory << 20) // (8 * SHARE)

    def chunks(self) -> Iterator[tuple[int, int, Tensor]]:
        """(lo, hi, rows lo to hi [hi - lo, K] float64), small shards packed together: BLAS wants long sums."""
        size = max(1, min(self.num_rows - self.first, self.numbers // max(1, self.width)))
        buffer = torch.empty(size, self.width, dtype=torch.float64, device=self.device)
        lo, held = self.first, 0
        for shard in self.source.shards:
            taken = max(0, self.first - shard.lo)
            while taken < shard.hi - shard.lo:
                count = min(size - held, shard.hi - shard.lo - taken, self._piece(size))
                rows = shard.grads(self.key, taken, taken + count)
                buffer[held : held + count] = _exact(rows).flat()
                held, taken = held + count, taken + count
                if held == size:
                    yield lo, lo + held, buffer
                    lo, held = lo + held, 0
        if held:
            yield lo, lo + held, buffer[:held]

    def columns(self) -> Iterator[Tensor]:
        """All rows, some columns at a time: [N, k] float64."""
        size = max(1, min(self.width, self.numbers // max(1, self.num_rows)))
        buffer = torch.empty(self.num_rows, size, dtype=torch.float64, device=self.device)
        piece = self._piece(max(1, self.numbers // max(1, self.width)))
        for left in range(0, self.width, size):
            right = min(left + size, self.width)
            for shard in self.source.shards:
                for lo in range(0, shard.hi - shard.lo, piece):
                    hi = min(lo + piece, shard.hi - shard.lo)
                    rows = _exact(shard.grads(self.key, lo, hi))
                    buffer[shard.lo + lo : shard.lo + hi, : right - left] = rows.columns(left, right)
            yield buffer[:, : right - left]

    @staticmethod
    def _piece(size: int) -> int:
        return -(-size // PIECES)


def _exact(rows: Row) -> Row:
    """Factors are multiplied in float64; a flat row is converted by the copy that follows."""
    return rows.to(torch.float64) if isinstance(rows, LowRank | PackedPairs) else rows


def gram(rows: BlockRows) -> Matrix:
    """The smaller of G^T G [K, K] and G G^T [N, N], in one pass; only the lower triangle is meaningful.

    Products are float64 throughout. Float32 products added up in float64 are 1.9 times faster here, but measured on
    rows with a power-law spectrum (K 1024, N 8192) the solution was off by 2e-3 at relative damping 1e-3 and by 17%
    at 1e-5, and the factorisation failed at 1e-7: all dampings that evaluations sweep.
    """
    m = min(rows.num_rows, rows.width)
    total = torch.zeros(m, m, dtype=torch.float64, device=rows.device)
    if rows.num_rows >= rows.width:
        for _, _, chunk in rows.chunks():
            _add_outer(total, chunk)
    else:
        for columns in rows.columns():
            _add_outer(total, columns.T)
    return total


def _add_outer(total: Matrix, x: Float[Tensor, "n m"]) -> None:
    """total += x^T x, lower triangle only, by panels: the symmetric product that torch does not offer, at 1.6x."""
    for top in range(0, len(total), PANEL):
        end = min(top + PANEL, len(total))
        total[top:end, :end].addmm_(x[:, top:end].T, x[:, :end])


def pack(lower: Matrix) -> Float[Tensor, " packed"]:
    """The lower triangle, row by row, [m (m + 1) / 2]: half the bytes on disk."""
    lower = lower.contiguous()
    return torch.cat([lower.new_empty(0), *(lower[i, : i + 1] for i in range(len(lower)))])


def unpack(packed: Float[Tensor, " packed"]) -> Matrix:
    """The inverse of `pack`, with zeros above the diagonal."""
    m = int(((8 * packed.numel() + 1) ** 0.5 - 1) / 2 + 0.5)
    lower = torch.zeros(m, m, dtype=packed.dtype)
    lower.numpy()[np.tri(m, dtype=bool)] = packed.numpy()  # a line at a time takes ten times as long for m = 256
    return lower


def cholesky(gram: Matrix, shift: float, *, block: str) -> Matrix:
    """The lower factor of gram + shift I, whose lower triangle is read. Changes `gram`.

    Raises NumericsError, naming the block, for values that are not finite or a matrix singular to working precision.
    """
    gram.diagonal().add_(shift)
    factor, info = torch.linalg.cholesky_ex(gram)
    pivots = factor.diagonal()
    if not bool(pivots.isfinite().all()):
        raise NumericsError(f"block {block!r}: its Gram matrix is not finite: run `influent verify` on the index")
    # A singular matrix can pass with pivots of rounding noise; the solution would then be noise too.
    noise = len(factor) * torch.finfo(torch.float64).eps
    if int(info) != 0 or float(pivots.min()) ** 2 <= noise * float(pivots.max()) ** 2:
        raise NumericsError(
            f"block {block!r}: its Fisher matrix plus damping is singular to working precision: raise the damping"
        )
    return factor


def trace_of_inverse(factor: Matrix) -> float:
    """tr (L L^T)^-1 = |L^-1|^2, by panels of columns of L^-1, whose rows above the panel are zero."""
    total = 0.0
    for left in range(0, len(factor), PANEL):
        corner = factor[left:, left:]
        unit = torch.eye(len(corner), min(PANEL, len(corner)), dtype=torch.float64, device=factor.device)
        total += float(torch.linalg.solve_triangular(corner, unit, upper=False).square().sum())
    return total


@runtime_checkable
class Inverse(Protocol):
    """(F + lambda I)^-1 of one block on float64 queries, and the diagonal of G (F + lambda I)^-1 G^T over its rows."""

    def __call__(self, q: Float[Tensor, "Q K"]) -> Float[Tensor, "Q K"]: ...
    def self_influence(self, rows: BlockRows) -> Float[Tensor, " N"]: ...


@dataclass(frozen=True, slots=True)
class Unchanged:
    """The identity: influence is the plain inner product of gradients."""

    def __call__(self, q: Float[Tensor, "Q K"]) -> Float[Tensor, "Q K"]:
        return q

    def self_influence(self, rows: BlockRows) -> Float[Tensor, " N"]:
        return per_row(rows, lambda g: g.square().sum(dim=1))


@dataclass(frozen=True, slots=True)
class Vanishing:
    """A block whose rows are all zero, without damping: the zero map, which is the pseudo-inverse of zero."""

    def __call__(self, q: Float[Tensor, "Q K"]) -> Float[Tensor, "Q K"]:
        return torch.zeros_like(q)

    def self_influence(self, rows: BlockRows) -> Float[Tensor, " N"]:
        return torch.zeros(rows.num_rows, dtype=torch.float64)


@dataclass(frozen=True, slots=True, eq=False)
class Primal:
    """q -> N (L L^T)^-1 q, for N >= K."""

    factor: Matrix
    num_rows: int

    def __call__(self, q: Float[Tensor, "Q K"]) -> Float[Tensor, "Q K"]:
        return torch.cholesky_solve(self.num_rows * q.T, self.factor).T

    def self_influence(self, rows: BlockRows) -> Float[Tensor, " N"]:
        """g_i (F + lambda I)^-1 g_i = N |L^-1 g_i|^2: half the work of a solve, and never negative."""
        return self.num_rows * per_row(
            rows, lambda g: torch.linalg.solve_triangular(self.factor, g.T, upper=False).square().sum(dim=0)
        )


@dataclass(frozen=True, slots=True, eq=False)
class Dual:
    """q -> (q - G^T (L L^T)^-1 G q) / lambda, for N < K: two passes over the block's rows for all queries."""

    factor: Matrix
    damping: float
    rows: BlockRows
    packed_gram: Float[Tensor, " packed"]

    def __call__(self, q: Float[Tensor, "Q K"]) -> Float[Tensor, "Q K"]:
        seen = torch.empty(self.rows.num_rows, len(q), dtype=torch.float64, device=q.device)
        for lo, hi, g in self.rows.chunks():
            seen[lo:hi] = g @ q.T
        weights = torch.cholesky_solve(seen, self.factor)  # [N, Q]
        answer = q.clone()
        for lo, hi, g in self.rows.chunks():
            answer.addmm_(weights[lo:hi].T, g, alpha=-1)
        return answer.div_(self.damping)

    def self_influence(self, rows: BlockRows) -> Float[Tensor, " N"]:
        """The diagonal of G (F + lambda I)^-1 G^T = N (L L^T)^-1 G G^T, by the push-through identity; no row is read.
        Equal to (K - K M^-1 K) / lambda without its cancellation."""
        lower = unpack(self.packed_gram).to(self.factor.device)
        full = lower + lower.tril(-1).T
        return self.rows.num_rows * torch.cholesky_solve(full, self.factor).diagonal().clamp(min=0)


def per_row(rows: BlockRows, measure: Callable[[Tensor], Tensor]) -> Float[Tensor, " N"]:
    """What `measure` makes of each row, in one pass over all of them."""
    result = torch.empty(rows.num_rows, dtype=torch.float64, device=rows.device)
    for lo, hi, g in rows.chunks():
        result[lo:hi] = measure(g)
    return result

"""The linear maps on the last axis: Identity, Mask, Gauss, Rademacher, SJLT, FJLT, Rotate, Basis.

Each map equals its dense matrix `M` [p, k] applied to the right: `map(x) = x @ M`. All but Basis are pure functions of
(kind, p, k, seed, block, side) and unbiased for inner products; Rotate keeps them. `raw` leaves out the constant
`scale`, so that a chain of maps multiplies once, at its end. Inputs below float32 are computed in float32. Draws come
from rng.py, on the CPU. Not here: which map goes where (bind.py), the grammar (compress.py), how a Basis is learned
(bases.py).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from influent.errors import SpecError
from influent.hashing import Hash, draw_hash
from influent.rng import Stream

# A dense matrix larger than this is drawn again block by block at each use, instead of being kept.
DENSE_LIMIT = 2**26


@runtime_checkable
class Map(Protocol):
    """A linear map R^p -> R^k on the last axis; `map(x) == map.scale * map.raw(x)`."""

    @property
    def p(self) -> int: ...
    @property
    def k(self) -> int: ...
    @property
    def scale(self) -> float: ...
    def raw(self, x: Float[Tensor, "*n p"]) -> Float[Tensor, "*n k"]:
        """The map without its constant factor."""
        ...

    def __call__(self, x: Float[Tensor, "*n p"]) -> Float[Tensor, "*n k"]: ...
    def onehot(self, ids: Int[Tensor, "*n"]) -> Float[Tensor, "*n k"]:
        """`raw` of the one-hot vectors of `ids`, without forming them."""
        ...

    def affine(self, x: Float[Tensor, "*n q"]) -> Float[Tensor, "*n k"]:
        """`raw` of [x, 1], where x has p - 1 entries: the ones column is a layer's bias."""
        ...

    def to(self, device: torch.device) -> "Map": ...


def draw(kind: str, p: int, k: int, *, stream: Stream, nonzeros: int = 1, law: str = "balanced") -> Map:
    """The map of `kind` from p to k entries, or the identity where k >= p; `rotate` has k = p and is a rotation.

    Args:
        stream: keyed by (seed, block, kind, side).
        nonzeros: SJLT only: entries per coordinate, at most k.
        law: SJLT only: `balanced` (a permutation cut into equal bins, Li and Li, KDD 2023) or `iid` buckets.
    """
    if kind == "rotate":
        return _rotate(p, stream)
    if k >= p:
        return Identity(p)
    match kind:
        case "mask":
            return Mask(p, torch.from_numpy(stream.subset(p, k)))
        case "gauss" | "rademacher":
            return Dense(p, k, kind, stream, _matrix(kind, p, k, stream) if p * k <= DENSE_LIMIT else None)
        case "sjlt":
            # Each hash has a range of its own (Kane and Nelson, 2014, block construction): were they to share all k
            # buckets, their collisions would make the variance larger than that of a single hash.
            return SJLT(p, k, tuple(draw_hash(p, (k + r) // nonzeros, stream, law, r) for r in range(nonzeros)))
        case "fjlt":
            width = 1 << (p - 1).bit_length()
            rows = torch.from_numpy(stream.subset(width, k))
            sign_stream = Stream(stream.seed, stream.block, "fjlt-signs", stream.side)
            return FJLT(p, rows, torch.from_numpy(sign_stream.signs(p)).float())
    raise SpecError(f"map kind {kind!r} is not known")


def wide(x: Tensor) -> Tensor:
    """Never narrower than float32."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def with_one(x: Tensor) -> Tensor:
    """[x, 1]: the ones column of a bias."""
    return torch.cat([x, x.new_ones(*x.shape[:-1], 1)], dim=-1)


class _Linear:
    """What every map shares: the constant factor, and the ones column appended by default."""

    @property
    def scale(self) -> float:
        return 1.0

    def raw(self, x: Tensor) -> Tensor:
        raise AssertionError("every map defines raw")

    def __call__(self, x: Tensor) -> Tensor:
        return self.raw(wide(x)) * self.scale

    def affine(self, x: Tensor) -> Tensor:
        return self.raw(with_one(x))


@dataclass(frozen=True, eq=False)
class Identity(_Linear):
    """The map that changes nothing (k = p)."""

    p: int

    @property
    def k(self) -> int:
        return self.p

    def raw(self, x: Tensor) -> Tensor:
        return x

    def onehot(self, ids: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(ids.long(), self.p).float()

    def to(self, device: torch.device) -> "Identity":
        return self


@dataclass(frozen=True, eq=False)
class Mask(_Linear):
    """Keep k coordinates; if they were chosen uniformly, scaled by sqrt(p / k). Learned ones have no such constant."""

    p: int
    kept: Int[Tensor, " k"]  # ascending
    uniform: bool = True

    @property
    def k(self) -> int:
        return len(self.kept)

    @property
    def scale(self) -> float:
        return math.sqrt(self.p / self.k) if self.uniform else 1.0

    def raw(self, x: Tensor) -> Tensor:
        # On a matrix, index_select copies entry by entry; on more axes PyTorch's CPU kernel is five times slower.
        return x.reshape(-1, x.shape[-1]).index_select(1, self.kept).view(*x.shape[:-1], self.k)

    def onehot(self, ids: Tensor) -> Tensor:
        return (ids.unsqueeze(-1) == self.kept).float()

    def affine(self, x: Tensor) -> Tensor:
        if int(self.kept[-1]) < self.p - 1:
            return self.raw(x)
        return with_one(Mask(self.p - 1, self.kept[:-1]).raw(x))

    def to(self, device: torch.device) -> "Mask":
        return Mask(self.p, self.kept.to(device), self.uniform)


@dataclass(frozen=True, eq=False)
class Dense(_Linear):
    """Independent standard normal (`gauss`) or sign (`rademacher`) entries, scaled by 1 / sqrt(k)."""

    p: int
    k: int
    kind: str
    stream: Stream
    matrix: Float[Tensor, "p k"] | None  # None: too large to keep, drawn again by blocks of rows

    @property
    def scale(self) -> float:
        return 1.0 / math.sqrt(self.k)

    def raw(self, x: Tensor) -> Tensor:
        if self.matrix is not None:
            return x @ self.matrix.to(x.dtype)
        out = x.new_zeros(*x.shape[:-1], self.k)
        step = max(1, DENSE_LIMIT // self.k)
        for at in range(0, self.p, step):
            rows = _matrix(self.kind, min(step, self.p - at), self.k, self.stream, row=at)
            out += x[..., at : at + step] @ rows.to(x.device, x.dtype)
        return out

    def onehot(self, ids: Tensor) -> Tensor:
        if self.matrix is not None:
            return self.matrix[ids.long()]
        unique, where = ids.reshape(-1).unique(return_inverse=True)
        rows = torch.cat([_matrix(self.kind, 1, self.k, self.stream, row=int(i)) for i in unique])
        return rows.to(ids.device)[where].view(*ids.shape, self.k)

    def affine(self, x: Tensor) -> Tensor:
        if self.matrix is None:
            return self.raw(with_one(x))
        matrix = self.matrix.to(x.dtype)
        return x @ matrix[:-1] + matrix[-1]

    def to(self, device: torch.device) -> "Dense":
        matrix = None if self.matrix is None else self.matrix.to(device)
        return Dense(self.p, self.k, self.kind, self.stream, matrix)


def _matrix(kind: str, rows: int, k: int, stream: Stream, *, row: int = 0) -> Tensor:
    """Rows `row` .. `row + rows` of the unscaled matrix, float32 [rows, k]."""
    drawn = (stream.normals if kind == "gauss" else stream.signs)(rows * k, at=row * k)
    return torch.from_numpy(drawn).float().view(rows, k)


@dataclass(frozen=True, eq=False)
class SJLT(_Linear):
    """Sparse Johnson-Lindenstrauss: y[h(j)] += sigma(j) x[j] for each of s hashes, scaled 1 / sqrt(s).

    The hashes are independent and cut the k outputs into s ranges, one each.
    """

    p: int
    k: int
    hashes: tuple[Hash, ...]

    @property
    def scale(self) -> float:
        return 1.0 / math.sqrt(len(self.hashes))

    def raw(self, x: Tensor) -> Tensor:
        if x.is_sparse:
            return self._raw_coo(x)
        rows = x.reshape(-1, self.p)
        parts = [h.sum(rows) for h in self.hashes]
        out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return out.view(*x.shape[:-1], self.k)

    def sparse(self, index: Int[Tensor, "n m"], value: Float[Tensor, "n m"]) -> Float[Tensor, "n k"]:
        """`raw` of vectors given by entries: value[i, j] stands at coordinate index[i, j]. Costs m, not p, a row."""
        out = value.new_zeros(len(value) * self.k)
        offset = torch.arange(len(value), device=value.device).unsqueeze(1) * self.k
        for start, h in self._ranges():
            at = h.bucket[index] + (offset + start)
            # index_put_ sorts on accelerators and runs in order on the CPU: deterministic on both, unlike scatter_add_.
            out.index_put_((at.view(-1),), (value * h.sign[index].to(value.dtype)).view(-1), accumulate=True)
        return out.view(-1, self.k)

    def _raw_coo(self, x: Tensor) -> Tensor:
        x = x.coalesce()
        row, column = x.indices()
        out = x.values().new_zeros(x.shape[0] * self.k)
        for start, h in self._ranges():
            at = row * self.k + h.bucket[column] + start
            out.index_put_((at,), x.values() * h.sign[column].to(x.dtype), accumulate=True)
        return out.view(x.shape[0], self.k)

    def onehot(self, ids: Tensor) -> Tensor:
        out = torch.zeros(*ids.shape, self.k, device=ids.device)
        for start, h in self._ranges():
            out.scatter_(-1, h.bucket[ids.long()].unsqueeze(-1) + start, h.sign[ids.long()].unsqueeze(-1))
        return out

    def _ranges(self) -> Iterator[tuple[int, Hash]]:
        start = 0
        for h in self.hashes:
            yield start, h
            start += h.k

    def to(self, device: torch.device) -> "SJLT":
        return SJLT(self.p, self.k, tuple(h.to(device) for h in self.hashes))


@dataclass(frozen=True, eq=False)
class FJLT(_Linear):
    """Sign flips, a Walsh-Hadamard transform of width 2^ceil(log2 p), and k of its outputs, scaled by 1 / sqrt(k)."""

    p: int
    rows: Int[Tensor, " k"]
    signs: Float[Tensor, " p"]

    @property
    def k(self) -> int:
        return len(self.rows)

    @property
    def scale(self) -> float:
        return 1.0 / math.sqrt(self.k)

    def raw(self, x: Tensor) -> Tensor:
        width = 1 << (self.p - 1).bit_length()
        rows = torch.nn.functional.pad(x.reshape(-1, self.p) * self.signs.to(x.dtype), (0, width - self.p))
        return hadamard(rows).index_select(1, self.rows).view(*x.shape[:-1], self.k)

    def onehot(self, ids: Tensor) -> Tensor:
        shared = ids.long().unsqueeze(-1) & self.rows
        for shift in (32, 16, 8, 4, 2, 1):
            shared = shared ^ (shared >> shift)
        return self.signs[ids.long()].unsqueeze(-1) * (1 - 2 * (shared & 1)).float()

    def to(self, device: torch.device) -> "FJLT":
        return FJLT(self.p, self.rows.to(device), self.signs.to(device))


@dataclass(frozen=True, eq=False)
class Rotate(_Linear):
    """A random orthonormal rotation: signs and a Walsh-Hadamard transform over sqrt(width).

    A width that is not a power of two has two transforms that overlap, of its first and of its last 2^floor(log2 p)
    coordinates. Two rounds of them with a permutation between spread every coordinate over all of them: after one, two
    halves that hardly overlap would still have their own energies. Each transform has signs of its own, because where
    two nearly coincide the second would undo the first. Gao and Long (SIGMOD 2024) need such a rotation before they
    keep the signs alone.
    """

    p: int
    signs: tuple[Float[Tensor, " p"], ...]  # one of each transform
    order: Int[Tensor, " p"]  # between the rounds

    @property
    def k(self) -> int:
        return self.p

    def raw(self, x: Tensor) -> Tensor:
        width = 1 << (self.p.bit_length() - 1)
        rows = x.reshape(-1, self.p)
        for number, signs in enumerate(self.signs):
            rows = (rows.index_select(1, self.order) if number == 2 else rows) * signs.to(x.dtype)
            window = slice(0, width) if number % 2 == 0 else slice(self.p - width, self.p)
            rows[:, window] = hadamard(rows[:, window]) * width**-0.5
        return rows.view(x.shape)

    def onehot(self, ids: Tensor) -> Tensor:
        return self.raw(torch.nn.functional.one_hot(ids.long(), self.p).float())

    def to(self, device: torch.device) -> "Rotate":
        return Rotate(self.p, tuple(signs.to(device) for signs in self.signs), self.order.to(device))


def _rotate(p: int, stream: Stream) -> Rotate:
    count = 1 if p & (p - 1) == 0 else 4
    drawn = Stream(stream.seed, stream.block, "rotate-signs", stream.side).signs(count * p)
    return Rotate(p, torch.from_numpy(drawn).float().split(p), torch.from_numpy(stream.permutation(p)))


@dataclass(frozen=True, eq=False)
class Basis(_Linear):
    """A matrix that was learned from the data: its columns are directions, weighted or not."""

    p: int
    k: int
    matrix: Float[Tensor, "p k"]

    def raw(self, x: Tensor) -> Tensor:
        return x @ self.matrix.to(x.dtype)

    def onehot(self, ids: Tensor) -> Tensor:
        return self.matrix[ids.long()].float()

    def affine(self, x: Tensor) -> Tensor:
        matrix = self.matrix.to(x.dtype)
        return x @ matrix[:-1] + matrix[-1]

    def dual(self) -> "Basis":
        """M (M^T M)^-1: inner products of what it makes with what M makes are those of the vectors themselves, as far
        as they lie in the span of M's columns. Orthonormal columns are their own dual; weighted ones are not."""
        return Basis(self.p, self.k, torch.linalg.pinv(self.matrix.double()).T.to(self.matrix.dtype))

    def to(self, device: torch.device) -> "Basis":
        return Basis(self.p, self.k, self.matrix.to(device))


def hadamard(x: Float[Tensor, "n width"]) -> Float[Tensor, "n width"]:
    """The unnormalised Walsh-Hadamard transform of each row; `width` is a power of two.

    Up to seven of its log2(width) factors are taken at once as one small matrix product, which runs at BLAS speed.
    """
    n, width = x.shape
    left = width.bit_length() - 1
    inner = 1
    while left:
        bits = min(left, 7)
        size = 1 << bits
        matrix = _sylvester(bits, x.device, x.dtype)
        x = (matrix @ x.reshape(-1, size, inner)).reshape(n, width)
        inner *= size
        left -= bits
    return x


@lru_cache(maxsize=64)
def _sylvester(bits: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    matrix = torch.ones(1, 1)
    for _ in range(bits):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix.to(device, dtype)

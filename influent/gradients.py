"""What hooks emit and rows hold: the per-example gradient of one block, factored (`Outer`, `LowRank`) or flat (`Flat`).

A gradient's flat order is input-major: entry (i, o) of sum_t a_t (x) d_t stands at i * O + o, so that a factorised
map A (x) B acts on the flat vector as their Kronecker product.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Int8, UInt8
from torch import Tensor

from .maps import wide
from .packing import unpack

Side = Float[Tensor, "B T _"] | Int[Tensor, "B T"]  # the features' axis is free: it changes under a map


@dataclass(frozen=True, slots=True)
class Outer:
    """sum_t a[b, t] (x) d[b, t]; an integer side holds the hot positions of one-hot vectors (an embedding's)."""

    a: Side
    d: Side
    in_width: int
    out_width: int

    def flat(self) -> Float[Tensor, "B K"]:
        """The materialised gradient, K = in_width * out_width, input-major."""
        a, d = _dense(self.a, self.in_width), _dense(self.d, self.out_width)
        a = wide(a)  # sums are float32 or wider, whatever the sides are
        return torch.bmm(a.transpose(1, 2), d.to(a.dtype)).flatten(1)

    def dot(self, q: Float[Tensor, "Q K"]) -> Float[Tensor, "Q B"]:
        """Inner products with flat query vectors."""
        return q @ self.flat().T

    def at(self, rows: Int[Tensor, " k"], columns: Int[Tensor, " k"]) -> Float[Tensor, "B k"]:
        """The k entries (rows[j], columns[j]) of the gradient, without forming it: T * k products an example."""
        entries = _GATHER_ENTRIES if self.a.device.type == "cpu" else _DEVICE_ENTRIES
        step = max(1, entries // (len(self.a) * len(rows)))
        out = torch.zeros(len(self.a), len(rows), device=self.a.device)
        for t in range(0, self.a.shape[1], step):
            left = wide(_pick(self.a[:, t : t + step], rows))
            out = out.to(left.dtype) + left.mul_(_pick(self.d[:, t : t + step], columns)).sum(1)
        return out


_GATHER_ENTRIES, _DEVICE_ENTRIES = 2**22, 2**26  # held at once: what a cache holds, what fills an accelerator


@dataclass(frozen=True, slots=True)
class Flat:
    """A gradient that is a vector already: a norm layer's, or a dense stored row."""

    g: Float[Tensor, "B K"]

    def __len__(self) -> int:
        return self.g.shape[0]

    def __getitem__(self, rows: slice) -> "Flat":
        return Flat(self.g[rows])

    def to(self, dtype: torch.dtype) -> "Flat":
        """The same rows as `dtype`; without a copy if they are already."""
        return Flat(self.g.to(dtype))

    def flat(self) -> Float[Tensor, "B K"]:
        return self.g

    def columns(self, lo: int, hi: int) -> Float[Tensor, "B k"]:
        """The columns lo..hi-1 of `flat()`."""
        return self.g[:, lo:hi]

    def dot(self, q: Float[Tensor, "Q K"]) -> Float[Tensor, "Q B"]:
        """Inner products with flat query vectors, in the queries' dtype."""
        return q @ self.g.to(q.dtype).T

    def squares(self) -> Float[Tensor, " B"]:
        """Squared norms, float64, good to 3e-7: the float32 kernel is ten times as fast as the float64 one, and rows
        whose squares could leave its range are done in float64."""
        total = torch.zeros(len(self.g), dtype=torch.float64, device=self.g.device)
        for piece in self.g.split(_SHORT_SUM, dim=1):
            piece = piece if piece.dtype == torch.float64 else piece.float()
            norms = torch.linalg.vector_norm(piece, dim=1).double()
            unsafe = ~((norms > 1e-15) & (norms < 1e15))
            if bool(unsafe.any()):
                norms[unsafe] = torch.linalg.vector_norm(piece[unsafe].double(), dim=1)
            total += norms.square()
        return total


_SHORT_SUM = 1 << 12  # float32 sums of squares drift beyond this length


@dataclass(frozen=True, slots=True)
class LowRank:
    """sum_r v[b, r] (x) u[b, r]: a matrix of rank R at most, never formed unless asked for."""

    u: Float[Tensor, "B R O"]
    v: Float[Tensor, "B R I"]

    def __len__(self) -> int:
        return self.u.shape[0]  # a tenth of the time of len, which queries ask hundreds of times

    def __getitem__(self, rows: slice) -> "LowRank":
        return LowRank(self.u[rows], self.v[rows])

    def to(self, dtype: torch.dtype) -> "LowRank":
        """The same factors as `dtype`; without a copy if they are already."""
        return LowRank(self.u.to(dtype), self.v.to(dtype))

    def flat(self) -> Float[Tensor, "B K"]:
        """The matrices as vectors, K = I * O, input-major."""
        return torch.bmm(self.v.transpose(1, 2), self.u).flatten(1)

    def columns(self, lo: int, hi: int) -> Float[Tensor, "B k"]:
        """The columns lo..hi-1 of `flat()`, from the inputs that they belong to alone."""
        width = self.u.shape[2]
        first = lo // width
        part = LowRank(self.u, self.v[:, :, first : -(-hi // width)])
        return part.flat()[:, lo - first * width : hi - first * width]

    def dot(self, q: Float[Tensor, "Q K"]) -> Float[Tensor, "Q B"]:
        """Inner products with flat query vectors, in the queries' dtype, one query at a time: B * R * K products each
        and B * R * O numbers held; the matrices are not formed."""
        u, v = (side.to(q.dtype) for side in (self.u, self.v))
        out = q.new_empty(len(q), len(u))
        for i, matrix in enumerate(q.unflatten(1, (v.shape[2], u.shape[2]))):
            out[i] = (v @ matrix).mul_(u).sum((1, 2))
        return out

    def squares(self) -> Float[Tensor, " B"]:
        """Squared norms, float64: sum over r, s of (u_r . u_s)(v_r . v_s), in R^2 (I + O) products a row."""
        u, v = self.u.double(), self.v.double()
        grams = (u @ u.transpose(1, 2)).mul_(v @ v.transpose(1, 2))  # [B, R, R]
        return grams.sum((1, 2)).clamp_(min=0)  # rounding alone can leave a negative zero


@dataclass(frozen=True, slots=True)
class Packed:
    """A dense stored row in integer codes, scale * code, which are unpacked by whoever wants numbers."""

    codes: Int8[Tensor, "B P"] | UInt8[Tensor, "B P"]
    scale: Float[Tensor, " B"]
    bits: str
    width: int

    def __len__(self) -> int:
        return self.codes.shape[0]

    def __getitem__(self, rows: slice) -> "Packed":
        return Packed(self.codes[rows], self.scale[rows], self.bits, self.width)

    def to(self, dtype: torch.dtype) -> Flat:
        """The same rows as numbers of `dtype`."""
        return Flat(self.flat().to(dtype))

    def flat(self) -> Float[Tensor, "B K"]:
        return unpack(self.codes, self.bits, self.width).mul_(self.scale.float()[:, None])

    def columns(self, lo: int, hi: int) -> Float[Tensor, "B k"]:
        """The columns lo..hi-1 of `flat()`."""
        return self.flat()[:, lo:hi]

    def dot(self, q: Float[Tensor, "Q K"]) -> Float[Tensor, "Q B"]:
        """Inner products with flat query vectors, in the queries' dtype."""
        return q @ self.flat().to(q.dtype).T

    def squares(self) -> Float[Tensor, " B"]:
        """Squared norms, as a flat row's."""
        step = max(1, _UNPACKED // max(1, self.width))
        pieces = [self[lo : lo + step] for lo in range(0, max(1, len(self)), step)]
        return torch.cat([Flat(piece.flat()).squares() for piece in pieces])


_UNPACKED = 1 << 19  # numbers of packed rows that are unpacked at a time where the rows are not asked for


@dataclass(frozen=True, slots=True)
class PackedPairs:
    """Pairs in integer codes, sum_r scale_r (code of v_r) (x) (code of u_r), unpacked by whoever wants numbers."""

    u: Int8[Tensor, "B R P"] | UInt8[Tensor, "B R P"]
    v: Int8[Tensor, "B R S"] | UInt8[Tensor, "B R S"]
    scale: Float[Tensor, "B R"]
    bits: str
    factors: tuple[int, int]  # numbers of v_r and of u_r

    def __len__(self) -> int:
        return self.u.shape[0]

    def __getitem__(self, rows: slice) -> "PackedPairs":
        return PackedPairs(self.u[rows], self.v[rows], self.scale[rows], self.bits, self.factors)

    def pairs(self) -> LowRank:
        """The pairs as float32, the scale in u."""
        a, b = self.factors
        u = unpack(self.u, self.bits, b).mul_(self.scale.float()[:, :, None])
        return LowRank(u, unpack(self.v, self.bits, a))

    def to(self, dtype: torch.dtype) -> LowRank:
        """The same pairs as numbers of `dtype`."""
        return self.pairs().to(dtype)

    def flat(self) -> Float[Tensor, "B K"]:
        return self.pairs().flat()

    def columns(self, lo: int, hi: int) -> Float[Tensor, "B k"]:
        """The columns lo..hi-1 of `flat()`."""
        return self.pairs().columns(lo, hi)

    def dot(self, q: Float[Tensor, "Q K"]) -> Float[Tensor, "Q B"]:
        """Inner products with flat query vectors, as `LowRank.dot`."""
        return self.pairs().dot(q)

    def squares(self) -> Float[Tensor, " B"]:
        """Squared norms, as those of the pairs."""
        return self.pairs().squares()


Row = Flat | LowRank | Packed | PackedPairs  # a stored row of one block
Grad = Outer | Flat


def _pick(side: Side, index: Int[Tensor, " k"]) -> Float[Tensor, "B T k"]:
    if not side.is_floating_point():
        return (side.unsqueeze(-1) == index).float()
    picked = side.reshape(-1, side.shape[-1]).index_select(1, index)
    return picked.view(*side.shape[:2], len(index))


def _dense(side: Side, width: int) -> Float[Tensor, "B T W"]:
    if side.is_floating_point():
        return side
    return torch.nn.functional.one_hot(side.long(), width).float()

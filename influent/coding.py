"""Rows to the bytes that a shard holds, and back: the rank cut, the choice of scales, the packing of codes.

A packed number is scale * code. With L numbers along the last axis of a tensor:

- int8: number j is byte j, two's complement.
- int4: with h = ceil(L / 2), number j < h is the low four bits of byte j and number h + j its high four bits, two's
  complement. An odd L leaves the high bits of the last byte 0.
- sign: number 8j + k is bit k of byte j, lowest bit first; a set bit is -1, a clear one +1. Bits past L are 0.

A dense row has one scale; it can be negative, so that the largest number gets the code -128 or -8, which has no
positive counterpart. A rank row is sum_r v_r (x) u_r: as floats each side carries the root of the singular value; as
codes it is sum_r scale_r (code of v_r) (x) (code of u_r). A row or pair of zeros has scale 0.

The scale makes <decoded, x> = <x, x>, the estimator of RaBitQ (Gao and Long, SIGMOD 2024) at every width: inner
products with a decoded row are then unbiased over random rotations of it, and over rotations of both sides for a rank
row, which has it pair by pair. What bfloat16 leaves of it is a relative error of at most 2^-8 (choosing the codes again
for the rounded scale was worse below 8 bits: 1e-2 for int4 sides of 64). A sign says nothing of zeros: rows that are
mostly zero want a rotation or more bits. Not here: the grammar and shapes (codec.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .codec import Codec, Factors
from .errors import NumericsError
from .gradients import Flat, LowRank, Packed, PackedPairs, Row
from .packing import pack, pack_bits
from .truncate import truncate

# What the largest code may stand for, as shares of the largest number: the best is taken, row by row and side by side.
CLIPS = {"int8": (1.0, 0.7, 0.45), "int4": (1.0, 0.8, 0.65, 0.5, 0.36, 0.25)}
CODES = {"int8": 128, "int4": 8}  # codes run from minus this to this less one
RANGE = 1e36  # scales beyond it overflow float32 once multiplied by a code
CACHED, HELD = 1 << 16, 1 << 26  # numbers coded at a time


@dataclass(frozen=True, slots=True)
class Coded:
    """One block of a batch as stored: the tensors that `Codec.tensors` names, and the share of |row|^2 kept by the
    rank cut, 1 for dense blocks and rows of zeros."""

    tensors: dict[str, Tensor]
    captured: Float[Tensor, " n"]


@torch.no_grad()
def encode(codec: Codec, rows: Float[Tensor, "n K"], factors: Factors | None, *, key: str) -> Coded:
    """The rows of block `key` as stored. A row's bytes do not depend on the batch, up to the rounding of its cut.

    Raises NumericsError for rows that are not finite or whose scale is out of range; float rows beyond the range of
    their type are left to the writer, which knows the row's id.
    """
    rank = codec.stored_rank(factors)
    if rank is None or factors is None:
        captured = rows.new_ones(len(rows), dtype=torch.float32)
        if not codec.packed:
            return Coded({key: rows.to(getattr(torch, codec.bits))}, captured)
        (codes,), scale = _quantise([rows.float()], None, codec.bits, key)
        return Coded({key: codes, f"{key}.scale": scale}, captured)
    _demand_finite(rows, key)
    cut = truncate(rows.unflatten(1, factors), rank)
    if codec.packed:
        (u, v), scale = _quantise([cut.pairs.u, cut.pairs.v], cut.sigma, codec.bits, key)
        return Coded({f"{key}.u": u, f"{key}.v": v, f"{key}.scale": scale}, cut.captured)
    root = cut.sigma.sqrt().unsqueeze(-1)
    sides = {f"{key}.u": cut.pairs.u * root, f"{key}.v": cut.pairs.v * root}
    return Coded({name: side.to(getattr(torch, codec.bits)) for name, side in sides.items()}, cut.captured)


def encode_blocks(codec: Codec, rows: Mapping[str, Float[Tensor, "n K"]], factors: Factors | None) -> list[Coded]:
    """`encode` of each of some blocks of one shape, in one batch; its errors name the block."""
    if len(rows) == 1:
        return [encode(codec, each, factors, key=key) for key, each in rows.items()]
    try:
        coded = encode(codec, torch.cat(list(rows.values())), factors, key=_ANY)
    except NumericsError:  # the batch's row is not the block's: the block by itself says which it is
        return [encode(codec, each, factors, key=key) for key, each in rows.items()]
    n = len(next(iter(rows.values())))
    return [
        Coded(
            {key + name.removeprefix(_ANY): values[lo : lo + n] for name, values in coded.tensors.items()},
            coded.captured[lo : lo + n],
        )
        for lo, key in zip(range(0, n * len(rows), max(1, n)), rows, strict=True)
    ]  # fmt: skip


_ANY = "blocks of one shape"


def decode(codec: Codec, tensors: Mapping[str, Tensor], key: str, width: int, factors: Factors | None) -> Row:
    """Rows of block `key` from its stored tensors, or from slices of them along the rows: the tensors themselves."""
    if codec.stored_rank(factors) is None or factors is None:
        if not codec.packed:
            return Flat(tensors[key])
        return Packed(tensors[key], tensors[f"{key}.scale"], codec.bits, width)
    u, v = tensors[f"{key}.u"], tensors[f"{key}.v"]
    if not codec.packed:
        return LowRank(u, v)
    return PackedPairs(u, v, tensors[f"{key}.scale"], codec.bits, factors)


def _quantise(sides: list[Tensor], sigma: Tensor | None, bits: str, key: str) -> tuple[list[Tensor], Tensor]:
    """Packed codes of each side [..., L] and their common scale [...] bfloat16, of sigma * side (x) side."""
    exact = sides[0].new_ones(sides[0].shape[:-1], dtype=torch.float64) if sigma is None else sigma.double()
    packed = []
    for side in sides:
        # As few rows at a time as the cache holds: five times as fast. An accelerator wants many.
        held = CACHED if side.device.type == "cpu" else HELD
        rows = max(1, held // max(1, side[0].numel())) if len(side) else 1
        codes, ratios = zip(*(_nearest(part, bits) for part in side.split(rows)), strict=True)
        packed.append(torch.cat(codes))
        exact = exact * torch.cat(ratios)
    scale = exact.bfloat16()
    lost = (exact != 0) & ((scale == 0) | ~(scale.abs() <= RANGE))
    if bool(lost.any()):
        row = int(lost.nonzero()[0, 0])
        raise NumericsError(
            f"block {key!r}, row {row} of its batch: a scale of {float(exact[row].abs().max()):.3g} is out of the "
            f"range of a {bits} row: look at that example, or store float32 rows"
        )
    return packed, scale


def _nearest(side: Float[Tensor, "n *c L"], bits: str) -> tuple[Tensor, Float[Tensor, "n *c"]]:
    """Packed codes whose direction is near that of the side, and |side|^2 / <codes, side> in float64, 0 for zeros."""
    low, high = torch.aminmax(side, dim=-1)
    end = torch.where(high > -low, -high, -low)  # what makes the largest number -1 when divided by it
    unit = side / torch.where(end == 0, 1.0, end)[..., None]  # whose squares do not overflow
    if bits == "sign":
        negative = side < 0
        packed, along, end = pack_bits(negative), torch.linalg.vector_norm(unit, ord=1, dim=-1), end.abs()
    else:
        codes = _rounded(unit, bits)
        packed, along = pack(codes.to(torch.int8), bits), torch.linalg.vecdot(codes, unit)
    squares = torch.linalg.vector_norm(unit, dim=-1).double().square()
    return packed, torch.where(end == 0, 0.0, end.double() * squares / along.double())


def _rounded(unit: Float[Tensor, "*n L"], bits: str) -> Float[Tensor, "*n L"]:
    """The codes, of those for each of CLIPS, that make the smallest angle with the numbers."""
    most = CODES[bits]
    best, chosen = unit.new_full(unit.shape[:-1], -1.0), unit.new_ones(unit.shape[:-1])
    codes = torch.empty_like(unit)
    for clip in CLIPS[bits]:
        torch.mul(unit, most / clip, out=codes).round_().clamp_(-most, most - 1)
        length = torch.linalg.vector_norm(codes, dim=-1)
        cosine = torch.linalg.vecdot(codes, unit) / length.clamp_(min=1)
        chosen = torch.where(cosine > best, most / clip, chosen)
        best = torch.maximum(best, cosine)
    return torch.mul(unit, chosen[..., None], out=codes).round_().clamp_(-most, most - 1)


def _demand_finite(rows: Float[Tensor, "n K"], key: str) -> None:
    largest = torch.linalg.vector_norm(rows, ord=torch.inf, dim=1)
    if not bool(largest.isfinite().all()):
        row = int((~largest.isfinite()).nonzero()[0])
        raise NumericsError(f"block {key!r}, row {row} of its batch: the gradient is not finite: look at that example")

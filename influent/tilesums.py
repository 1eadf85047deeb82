"""Sums that matrix tiles hold become weighed sums of rows, as LLVM code.

Tiles are stored when a block of rows is through, and what was just stored cannot be loaded at once: so a block's sums
are weighed while the next one's are made. This module needs llvmlite, so nothing but tiles.py imports it.
"""

from dataclasses import dataclass, fields, replace  # noqa: I001

from llvmlite import ir  # pyright: ignore[reportMissingImports]

from .compiled import LANES
from .llvm import (
    F32, F64, I16, I32, I64, TILE_BYTES, TILE_ROWS, Value, integer, least, loop, masked_load, pointer, spread, up,
)  # fmt: skip

ZEROS = ir.Constant(ir.VectorType(F64, LANES), [0.0] * LANES)


@dataclass(frozen=True, slots=True)
class Sums:
    """The sums of a block of rows, as tiles were stored, and what becomes of them: into += scale * (weights * sums +
    constant), the constant where a row begins, and `into` only written where it has nothing yet."""

    held: Value  # [halves, tiles, 16, columns] int32, or float32 of bfloat16, each tile in as much space as the widest
    into: Value  # [rows, columns] float64
    scales: Value  # [rows] bfloat16
    weights: Value  # [tiles, columns] float64
    constant: Value  # [columns] float64
    rows: Value
    begins: Value
    empty: Value
    done: Value  # vectors of sixteen sums

    def values(self) -> list[Value]:
        return [getattr(self, field.name) for field in fields(self)]


def weigh(b: Value, fn: Value, sums: Sums, most: Value, *, bits: str, tiles: int, columns: int) -> Sums:
    """At most so many vectors of sums more."""
    together = LANES // columns  # rows whose sums fill a vector
    left = b.sub(up(b, sums.rows, together), sums.done)
    count = least(b, left, most)
    with loop(b, fn, count) as turn:
        _one(b, sums, b.add(sums.done, turn), bits=bits, tiles=tiles, columns=columns)
    return replace(sums, done=b.add(sums.done, count))


def _one(b: Value, sums: Sums, number: Value, *, bits: str, tiles: int, columns: int) -> None:
    together, tile_bytes = LANES // columns, TILE_ROWS * TILE_BYTES
    row = b.mul(number, integer(together))
    half = b.mul(b.lshr(row, integer(TILE_ROWS.bit_length() - 1)), integer(tiles * tile_bytes))
    start = b.add(half, b.mul(b.and_(row, integer(TILE_ROWS - 1)), integer(4 * columns)))
    total = b.fmul(_each(b, sums.constant, columns), spread(b, b.uitofp(sums.begins, F64)))
    for tile in range(tiles):
        at = b.gep(sums.held, [b.add(start, integer(tile * tile_bytes))])
        x = b.load(b.bitcast(at, pointer(ir.VectorType(F32 if bits == "bfloat16" else I32, LANES))), align=64)
        x = b.fpext(x, ZEROS.type) if bits == "bfloat16" else b.sitofp(x, ZEROS.type)
        weights = _each(b, b.gep(sums.weights, [integer(tile * columns)]), columns)
        total = b.fadd(total, b.fmul(x, weights, flags=["contract"]), flags=["contract"])
    place = b.bitcast(b.gep(sums.into, [b.mul(row, integer(columns))]), pointer(ZEROS.type))
    found = b.select(sums.empty, ZEROS, b.load(place, align=8))
    if bits == "bfloat16":
        found = b.fadd(found, total)
    else:
        scale = _scales(b, b.gep(sums.scales, [row]), b.sub(sums.rows, row), together)
        found = b.fadd(found, b.fmul(total, scale, flags=["contract"]), flags=["contract"])
    b.store(found, place, align=8)


def _each(b: Value, at: Value, count: int) -> Value:
    """`count` float64, again and again, as a vector."""
    x = b.load(b.bitcast(at, pointer(ir.VectorType(F64, count))), align=8)
    order = ir.Constant(ir.VectorType(I32, LANES), [lane % count for lane in range(LANES)])
    return b.shuffle_vector(x, x, order)


def _scales(b: Value, at: Value, left: Value, together: int) -> Value:
    """The scales of rows, of which so many are left, each as often as a row has columns."""
    kind, lanes = ir.VectorType(I16, together), ir.VectorType(I64, together)
    if together == 1:
        bits = b.load(b.bitcast(at, pointer(kind)), align=2)
    else:
        mask = b.icmp_signed("<", ir.Constant(lanes, list(range(together))), spread(b, left, together))
        bits = masked_load(b, at, mask, kind, align=2)
    bits = b.shl(b.zext(bits, ir.VectorType(I32, together)), ir.Constant(ir.VectorType(I32, together), [16] * together))
    x = b.fpext(b.bitcast(bits, ir.VectorType(F32, together)), ir.VectorType(F64, together))
    order = [lane * together // LANES for lane in range(LANES)]
    return b.shuffle_vector(x, x, ir.Constant(ir.VectorType(I32, LANES), order))

"""The loop over rows of signs for one query, as LLVM code: eight bytes of a row against 64 of each of three digits.

For one query a tile's columns would lie idle, and what is staged for it be read once. So bits become bytes in a
register and are multiplied there. The table and the arguments are those of tiles.py, and integer sums are as exact.
This module needs llvmlite, so nothing but compiled.py imports it.
"""

from llvmlite import ir  # pyright: ignore[reportMissingImports]

from .compiled import LANES, TILE_LINE, TILE_PIECES, TILE_STEP
from .llvm import (
    F64,
    I8,
    I16,
    I32,
    I64,
    TILE_BYTES,
    Value,
    declared,
    finished,
    function,
    integer,
    loop,
    pointer,
    repeat,
    spread,
)
from .tiles import AHEAD, SUMS, bits_as_bytes, copy_rows, safe_rows

ROWS = 4  # side by side, which share what is loaded of the digits
BYTES, SUM = ir.VectorType(I8, TILE_BYTES), ir.VectorType(I32, LANES)


def signs() -> str:
    """The module of a function that adds scale * (constant + weighted sums) of `rows` rows from `first` on to `wide`.

    (table, lines, first, rows, rows that there are, first group, groups, wide, space): as `tiles.dense` has them, of
    one group; the digits are [steps, 3, 64], the weights [3], the constant is one, and `wide` is [rows], all float64
    but the digits.
    """
    fn, b = function("signs", [pointer(I64), *[I64] * 6, pointer(F64), pointer(I8)])
    table, lines, first, rows, there, _, _, wide, space = fn.args
    copies = b.gep(space, [integer(SUMS)])
    with loop(b, fn, lines) as number:
        line = b.gep(table, [b.mul(number, integer(TILE_LINE))])
        codes, scales, stride, steps, *asked = (b.load(b.gep(line, [integer(i)])) for i in range(7))
        codes = b.inttoptr(b.add(codes, b.mul(first, stride)), pointer(I8))
        scales = b.inttoptr(b.add(scales, b.mul(first, integer(2))), pointer(I16))
        digits, weights, constant = (b.inttoptr(x, pointer(of)) for x, of in zip(asked, (I8, F64, F64), strict=True))
        size = b.mul(steps, integer(TILE_STEP["sign"]))
        safe, held = safe_rows(b, b.sub(there, first), rows, stride, size, 1), _up(b, size)
        copy_rows(b, fn, b.gep(codes, [b.mul(safe, stride)]), b.sub(rows, safe), stride, copies, held)
        whole = b.sdiv(safe, integer(ROWS))
        turns = (
            (whole, ROWS, codes, stride, integer(0)),
            (b.srem(safe, integer(ROWS)), 1, codes, stride, b.mul(whole, integer(ROWS))),
            (b.sub(rows, safe), 1, b.gep(copies, [b.mul(held, b.neg(safe))]), held, safe),
        )
        for count, together, start, apart, begin in turns:
            with loop(b, fn, count) as turn:
                row = b.add(begin, b.mul(turn, integer(together)))
                at = b.gep(start, [b.mul(row, apart)])
                for i, sums in enumerate(_sums(b, fn, at, apart, digits, steps, together)):
                    place, scale = (b.gep(x, [b.add(row, integer(i))]) for x in (wide, scales))
                    total = b.fadd(b.load(constant), _weighed(b, sums, weights))
                    b.store(b.fadd(b.load(place), b.fmul(total, _scale(b, scale))), place)
    return finished(b)


def _sums(b: Value, fn: Value, row: Value, stride: Value, digits: Value, steps: Value, rows: int) -> list[list[Value]]:
    """For each of some rows, of each digit the sums of sixteen lanes over the bits that are set."""
    product = declared(b, "llvm.x86.avx512.vpdpbusd.512", SUM, [SUM] * 3)
    ask = declared(b, "llvm.prefetch.p0", ir.VoidType(), [pointer(I8), *[I32] * 3])

    def body(state: list[Value]) -> list[Value]:
        at, digit, soon, *sums = state
        b.call(ask, [soon, *(ir.Constant(I32, x) for x in (0, 2, 1))])
        parts = [
            b.load(b.bitcast(b.gep(digit, [integer(piece * TILE_BYTES)]), pointer(SUM)), align=1)
            for piece in range(TILE_PIECES)
        ]
        for i in range(rows):
            eight = b.load(b.bitcast(b.gep(at, [b.mul(stride, integer(i))]), pointer(I64)), align=1)
            x = b.bitcast(bits_as_bytes(b, b.bitcast(spread(b, eight, 8), BYTES)), SUM)
            for piece, part in enumerate(parts):
                k = i * TILE_PIECES + piece
                sums[k] = b.call(product, [sums[k], x, part])
        step = TILE_STEP["sign"]
        return [
            b.gep(at, [integer(step)]), b.gep(digit, [integer(TILE_PIECES * TILE_BYTES)]),
            b.gep(soon, [integer(step * rows)]), *sums,
        ]  # fmt: skip

    zeros = [ir.Constant(SUM, [0] * LANES)] * (rows * TILE_PIECES)
    _, _, _, *sums = repeat(b, fn, steps, [row, digits, b.gep(row, [integer(AHEAD)]), *zeros], body)
    return [sums[i : i + TILE_PIECES] for i in range(0, len(sums), TILE_PIECES)]


def _weighed(b: Value, sums: list[Value], weights: Value) -> Value:
    """The sum over the digits of weight * sum, float64: lane by lane, then halves with halves."""
    wide = ir.VectorType(F64, LANES)
    total = ir.Constant(wide, [0.0] * LANES)
    for piece, x in enumerate(sums):
        total = b.fadd(total, b.fmul(b.sitofp(x, wide), spread(b, b.load(b.gep(weights, [integer(piece)])))))
    lanes = LANES
    while lanes > 1:
        lanes //= 2
        halves = [ir.Constant(ir.VectorType(I32, lanes), list(range(lo, lo + lanes))) for lo in (0, lanes)]
        total = b.fadd(*(b.shuffle_vector(total, ir.Constant(total.type, ir.Undefined), half) for half in halves))
    return b.extract_element(total, ir.Constant(I32, 0))


def _scale(b: Value, at: Value) -> Value:
    """A bfloat16 as float64."""
    bits = b.shl(b.zext(b.load(at), I32), ir.Constant(I32, 16))
    return b.fpext(b.bitcast(bits, ir.FloatType()), F64)


def _up(b: Value, size: Value) -> Value:
    """Bytes, in whole lines."""
    return b.and_(b.add(size, integer(TILE_BYTES - 1)), integer(-TILE_BYTES))

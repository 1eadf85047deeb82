"""The loop that makes queries' matrices right tiles, as LLVM code: three pieces of each number.

A piece is the upper half of what the pieces before it have left, so that three of them are the whole of a float32
number. It needs llvmlite, so nothing but compiled.py imports it. Not here: the loop over pairs (pairtiles.py).
"""

from collections.abc import Sequence  # noqa: I001

from llvmlite import ir  # pyright: ignore[reportMissingImports]

from .compiled import LANES
from .llvm import (
    F32, F64, I8, I32, I64, TILE_BYTES, TILE_ROWS, Value, address, all_lanes, finished, function, integer, line_of,
    loop, pointer, repeat, spread, store,
)  # fmt: skip
from .pairprograms import PIECES, TILE, MatrixLine


def pieces() -> str:
    """The module of a function that cuts queries' matrices to pieces and lays them out as `pairs` reads them.

    (table, lines, queries): a line of the table is a `MatrixLine`. Of each sixteen columns of X, the tiles have the
    numbers of its rows in pairs: in one round all of the first piece, of the second and of the third; in three rounds
    a tile of each.
    """
    fn, b = function("pieces", [pointer(I64), I64, I64])
    table, lines, queries = fn.args
    with loop(b, fn, lines) as number:
        line = line_of(b, table, number, MatrixLine)
        with loop(b, fn, queries) as query:
            x = b.gep(address(b, line.x, F32), [b.mul(query, b.mul(line.a, line.b))])
            factor, weight = _power(b, fn, x, b.mul(line.a, line.b))
            b.store(weight, b.gep(address(b, line.weights, F64), [query]))
            size = b.mul(line.tiles, integer(TILE))
            to = b.gep(address(b, line.to, I8), [b.mul(query, b.mul(line.columns, size))])
            with loop(b, fn, line.columns) as column:
                _column(b, fn, line, x, column, factor, b.gep(to, [b.mul(column, size)]))
    return finished(b)


def _column(b: Value, fn: Value, line: MatrixLine, x: Value, column: Value, factor: Value, to: Value) -> None:
    """The tiles of sixteen columns."""
    half = b.sdiv(line.apart, integer(2))
    together = b.icmp_signed("==", line.rounds, integer(1))
    after = b.select(together, half, integer(TILE_ROWS))
    skipped = b.select(together, integer(0), integer((PIECES - 1) * TILE_ROWS))
    with loop(b, fn, half) as row:
        both = [
            _numbers_of(b, line, x, b.add(b.mul(row, integer(2)), integer(k)), column, factor) for k in (0, 1)
        ]  # fmt: skip
        first = b.add(row, b.mul(b.sdiv(row, integer(TILE_ROWS)), skipped))
        places = [b.add(first, b.mul(after, integer(piece))) for piece in range(PIECES)]
        _cut(b, both, [b.gep(to, [b.mul(place, integer(TILE_BYTES))]) for place in places])
    done = b.mul(half, integer(PIECES))
    with loop(b, fn, b.sub(b.mul(line.tiles, integer(TILE_ROWS)), done)) as row:
        store(b, all_lanes(I32, 0), b.gep(to, [b.mul(b.add(done, row), integer(TILE_BYTES))]))


def _power(b: Value, fn: Value, x: Value, count: Value) -> tuple[Value, Value]:
    """1 / p and p, float64, of the power of two at or below the largest of the numbers' sizes, of those that float32
    has the inverse of."""

    def body(state: list[Value]) -> list[Value]:
        i, most = state
        size = b.and_(b.load(b.gep(b.bitcast(x, pointer(I32)), [i]), align=4), ir.Constant(I32, 0x7FFFFFFF))
        return [b.add(i, integer(1)), b.select(b.icmp_unsigned(">", size, most), size, most)]

    _, most = repeat(b, fn, count, [integer(0), ir.Constant(I32, 0)], body)
    exponent = b.lshr(most, ir.Constant(I32, 23))
    for end, sign in ((7, "<"), (247, ">")):
        exponent = b.select(b.icmp_unsigned(sign, exponent, ir.Constant(I32, end)), ir.Constant(I32, end), exponent)
    factor = b.bitcast(b.shl(b.sub(ir.Constant(I32, 254), exponent), ir.Constant(I32, 23)), F32)
    wide = b.add(b.zext(exponent, I64), integer(1023 - 127))
    return factor, b.bitcast(b.shl(wide, integer(52)), F64)


def _numbers_of(b: Value, line: MatrixLine, x: Value, i: Value, column: Value, factor: Value) -> Value:
    """factor x[i, j] for the sixteen j of a tile, zeros beyond the matrix: of the first `twos` tiles one has the even
    ones of 32 and the next the odd ones; those after them have them one after the other."""
    inside, last = b.icmp_signed("<", i, line.a), b.sub(line.b, integer(1))
    first = b.mul(b.select(inside, i, integer(0)), line.along)
    odd, alone = b.and_(column, integer(1)), b.icmp_signed(">=", column, line.twos)
    start = b.mul(b.select(alone, column, b.sub(column, odd)), integer(LANES))
    vector = ir.Constant(ir.VectorType(F32, LANES), ir.Undefined)
    for lane in range(LANES):
        j = b.add(start, b.select(alone, integer(lane), b.add(odd, integer(2 * lane))))
        held = b.icmp_signed("<=", j, last)
        number = b.load(b.gep(x, [b.add(first, b.mul(b.select(held, j, last), line.across))]), align=4)
        number = b.select(b.and_(inside, held), number, ir.Constant(F32, 0.0))
        vector = b.insert_element(vector, number, ir.Constant(I32, lane))
    return b.fmul(vector, spread(b, factor))


def _cut(b: Value, both: Sequence[Value], places: Sequence[Value]) -> None:
    """The pieces of two rows of numbers, side by side: a row of a tile each."""
    first, second = both
    bits = ir.VectorType(I32, LANES)
    for place in places:
        upper = [b.and_(b.bitcast(x, bits), all_lanes(I32, 0xFFFF0000)) for x in (first, second)]
        first, second = (b.fsub(x, b.bitcast(up, x.type)) for x, up in zip((first, second), upper, strict=True))
        store(b, b.or_(b.lshr(upper[0], all_lanes(I32, 16)), upper[1]), place)

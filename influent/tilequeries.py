"""The loop that makes queries right tiles, as LLVM code: three pieces of each number, where a product wants them.

Against bfloat16 rows a number's pieces are its first, second and third eight bits, after the query's largest number in
the block has been brought to between 1 and 2 by a power of two. Against codes they are the digits of base 254 that
tileproducts.py speaks of. This module needs llvmlite, so nothing but compiled.py imports it. Not here: the loop over
rows (tiles.py).
"""

from llvmlite import ir  # noqa: I001  # pyright: ignore[reportMissingImports]

from .compiled import TILE_BASE, TILE_FEW, TILE_LINE, TILE_PIECES
from .llvm import (
    F32, F64, I8, I16, I32, I64, TILE_ROWS, Value, declared, finished, function, integer, least, loop, masked_load,
    over, pointer, repeat, spread, up,
)  # fmt: skip

WORTH = {"bfloat16": 1.0, "int8": 1.0, "int4": 1 / 16, "sign": -2.0}  # of a product with the bytes in a left tile
MANY = 64  # numbers at a time while the largest is looked for


def lay(bits: str, tiles: int, columns: int) -> str:
    """The module of a function that writes the right tiles, weights and constants of the queries of some blocks.

    (table, lines, queries): lines as in tiles.py, but that the first number is the address of queries [queries, K]
    float32, and the last is K. What is not written must be zeros.
    """
    fn, b = function("lay", [pointer(I64), I64, I64])
    table, lines, queries = fn.args
    with loop(b, fn, lines) as number, loop(b, fn, queries) as query:
        line = b.gep(table, [b.mul(number, integer(TILE_LINE))])
        asked, _, _, steps, right, weights, constant, width = (b.load(b.gep(line, [integer(i)])) for i in range(8))
        q = b.inttoptr(b.add(asked, b.mul(b.mul(query, width), integer(4))), pointer(F32))
        group, column = b.sdiv(query, integer(columns)), b.srem(query, integer(columns))
        largest, total = _largest(b, fn, q, width)
        factor, worth = _scale(b, bits, largest)
        apart = TILE_FEW[columns] if tiles == 1 else columns  # weights from piece to piece
        first = b.add(b.mul(group, integer(tiles * columns)), column)
        for piece in range(TILE_PIECES):
            weight = b.fmul(worth, _number(WORTH[bits] * (1 if bits == "bfloat16" else TILE_BASE**-piece)))
            _store(b, weight, weights, b.add(first, integer(piece * apart)))
        if bits == "sign":
            _store(b, total, constant, b.add(b.mul(group, integer(columns)), column))
        tile = TILE_ROWS * columns * 4
        at = b.add(b.mul(b.mul(group, steps), integer(tiles * tile)), b.mul(column, integer(4)))
        to = b.gep(b.inttoptr(right, pointer(I8)), [at])
        with loop(b, fn, steps) as step:
            x = b.fmul(b.fpext(_step(b, bits, q, step, width), _many(F64, bits)), spread(b, factor, _count(bits)))
            pieces = _eights(b, x) if bits == "bfloat16" else _digits(b, x)
            for number, piece in enumerate(pieces):
                start = b.add(b.mul(step, integer(tiles * tile)), integer(number * (4 * apart if tiles == 1 else tile)))
                for row in range(TILE_ROWS):
                    place = b.gep(to, [b.add(start, integer(row * columns * 4))])
                    b.store(b.extract_element(piece, ir.Constant(I32, row)), b.bitcast(place, pointer(I32)), align=4)
    return finished(b)


def _count(bits: str) -> int:
    """Numbers of a step: 64 bytes of a left tile."""
    return 32 if bits == "bfloat16" else 64


def _step(b: Value, bits: str, q: Value, step: Value, width: Value) -> Value:
    """The numbers that a step meets, of int4 from the low halves of 64 bytes and then from their high halves, of sign
    from bits 0 to 3 of sixteen bytes and then from bits 4 to 7."""
    second = b.icmp_signed("==", b.and_(step, integer(1)), integer(1))
    pair = b.sdiv(step, integer(2))
    if bits == "sign":  # bit 4 plane + k of byte i is byte 16k + i of the left tile
        first = b.mul(pair, integer(128))
        x, y = (_masked(b, q, b.add(first, integer(start)), width, 64) for start in (0, 64))
        orders = [[8 * i + 4 * plane + k for k in range(4) for i in range(16)] for plane in range(2)]
        x, y = (b.shuffle_vector(x, y, ir.Constant(ir.VectorType(I32, len(order)), order)) for order in orders)
        return b.select(second, y, x)
    start, end = b.mul(step, integer(_count(bits))), width
    if bits == "int4":
        half = up(b, width, 2)
        start = b.add(b.mul(pair, integer(64)), b.select(second, half, integer(0)))
        end = b.select(second, width, half)
    return _masked(b, q, start, end, _count(bits))


def _largest(b: Value, fn: Value, q: Value, width: Value) -> tuple[Value, Value]:
    """The largest size of a number as float64, NaN if one is, and the sum of all."""
    sizes, sums = ir.VectorType(I32, MANY), ir.VectorType(F64, MANY)

    def body(state: list[Value]) -> list[Value]:
        at, most, total = state
        x = _masked(b, q, at, width, MANY)
        size = b.and_(b.bitcast(x, sizes), ir.Constant(sizes, [0x7FFFFFFF] * MANY))  # NaN's is above all others
        most = b.select(b.icmp_signed(">", size, most), size, most)
        return [b.add(at, integer(MANY)), most, b.fadd(total, b.fpext(x, sums))]

    state = [integer(0), ir.Constant(sizes, [0] * MANY), ir.Constant(sums, [0.0] * MANY)]
    _, most, total = repeat(b, fn, up(b, width, MANY), state, body)
    most = over(b, most, lambda x, y: b.select(b.icmp_signed(">", x, y), x, y))
    return b.fpext(b.bitcast(most, F32), F64), over(b, total, b.fadd)


def _scale(b: Value, bits: str, largest: Value) -> tuple[Value, Value]:
    """What the numbers are multiplied by, and what the first pieces are then worth."""
    if bits == "bfloat16":  # the exponent's bits, and those of its negative
        power = b.lshr(b.bitcast(largest, I64), integer(52))
        factor, worth = (b.bitcast(b.shl(x, integer(52)), F64) for x in (b.sub(integer(2046), power), power))
        return factor, worth
    end = _number(TILE_BASE // 2)
    factor = b.select(b.fcmp_ordered("==", largest, _number(0)), _number(0), b.fdiv(end, largest))
    return factor, b.fdiv(largest, end)


def _eights(b: Value, x: Value) -> list[Value]:
    """Three bfloat16 numbers that make each, two of them in a lane."""
    count = x.type.count
    whole, rest, found = ir.VectorType(I32, count), b.fptrunc(x, ir.VectorType(F32, count)), []
    for _ in range(TILE_PIECES):
        bits = b.and_(b.bitcast(rest, whole), ir.Constant(whole, [-(1 << 16)] * count))
        rest = b.fsub(rest, b.bitcast(bits, rest.type))
        half = b.trunc(b.lshr(bits, ir.Constant(whole, [16] * count)), ir.VectorType(I16, count))
        found.append(b.bitcast(half, ir.VectorType(I32, TILE_ROWS)))
    return found


def _digits(b: Value, x: Value) -> list[Value]:
    """Three digits of each, four of them in a lane."""
    count, found = x.type.count, []
    rint = declared(b, f"llvm.rint.v{count}f64", x.type, [x.type])
    for _ in range(TILE_PIECES):
        digit = b.call(rint, [x])
        x = b.fmul(b.fsub(x, digit), ir.Constant(x.type, [float(TILE_BASE)] * count))
        codes = b.trunc(b.fptosi(digit, ir.VectorType(I32, count)), ir.VectorType(I8, count))
        found.append(b.bitcast(codes, ir.VectorType(I32, TILE_ROWS)))
    return found


def _masked(b: Value, q: Value, start: Value, end: Value, count: int) -> Value:
    """`count` numbers from `start` on, zeros from `end` on."""
    kind, lanes = ir.VectorType(F32, count), ir.VectorType(I32, count)
    left = b.sub(end, start)
    left = b.trunc(least(b, left, integer(count)), I32)
    mask = b.icmp_signed("<", ir.Constant(lanes, list(range(count))), spread(b, left, count))
    return masked_load(b, b.gep(q, [start]), mask, kind, align=4)


def _many(of: Value, bits: str) -> Value:
    return ir.VectorType(of, _count(bits))


def _store(b: Value, x: Value, to: Value, number: Value) -> None:
    b.store(x, b.gep(b.inttoptr(to, pointer(F64)), [number]))


def _number(x: int | float) -> Value:
    return ir.Constant(F64, float(x))

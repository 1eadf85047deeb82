"""Loops over pairs of vectors with matrix tiles, as LLVM code: v^T X u of 48 pairs at a time.

A tile product makes X^T v of sixteen pairs at once; what it leaves is multiplied by u lane by lane, and sixteen vectors
of lanes become the sums of sixteen pairs. Here is what is compiled; compiled.py has it compiled and pairprograms.py
calls it. Needs llvmlite, so nothing but compiled.py imports it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from llvmlite import ir  # pyright: ignore[reportMissingImports]

from .compiled import LANES, PLANES, STEP
from .llvm import (
    F32,
    F64,
    I1,
    I8,
    I16,
    I32,
    I64,
    TILE_BYTES,
    TILE_ROWS,
    ZERO,
    Value,
    all_lanes,
    finished,
    function,
    integer,
    load,
    loop,
    pointer,
    repeat,
    spread,
    store,
    tile_load,
    tile_product,
    tile_store,
    tile_zero,
    tiles_begin,
    tiles_end,
)  # fmt: skip
from .loops import decode
from .pairprograms import HELD, PAIRS, PIECES, TILE, MatrixLine, PairLine

GROUP = PAIRS // TILE_ROWS  # tiles of pairs that share what is loaded of X
COLUMNS = HELD // (GROUP * TILE)  # tiles of columns of X whose products are held before u meets them


class Sides(NamedTuple):
    """Where 48 pairs are: v and u in bfloat16 with the bytes from pair to pair, and their scales."""

    v: Value
    size_v: Value
    u: Value
    size_u: Value
    scale: Value | None


def pairs(bits: str) -> str:
    """The module of a function that adds scale v^T X u to out[query, pair], float64.

    (table, lines, pairs, out, numbers from query to query in out, space): a line of the table is a `PairLine`. `out`
    has room for whole groups of 48 pairs; what it holds beyond the pairs means nothing. Of space, see `scratch`.
    """
    fn, b = function("pairs", [pointer(I64), I64, I64, pointer(F64), I64, pointer(I8)])
    table, lines, n, out, apart, space = fn.args
    tiles_begin(b)
    with loop(b, fn, lines) as number:
        line = _line(b, table, number, PairLine)
        with loop(b, fn, _up(b, n, PAIRS)) as group:
            first = b.mul(group, integer(PAIRS))
            sides = _sides(b, fn, line, n, first, space, bits)
            with loop(b, fn, line.queries) as query:
                x = b.gep(_address(b, line.x, I8), [b.mul(query, line.tiles)])
                weight = b.load(b.gep(_address(b, line.weights, F64), [query]))
                row = b.add(b.mul(b.add(line.first_query, query), apart), first)
                _query(b, fn, line, sides, x, weight, b.gep(out, [row]), space)
    tiles_end(b)
    return finished(b)


def pieces() -> str:
    """The module of a function that cuts queries' matrices to pieces and lays them out as `pairs` reads them.

    (table, lines, queries): a line of the table is a `MatrixLine`. A piece is the upper half of what the pieces before
    it have left, so that three of them are the whole.
    """
    fn, b = function("pieces", [pointer(I64), I64, I64])
    table, lines, queries = fn.args
    with loop(b, fn, lines) as number:
        line = _line(b, table, number, MatrixLine)
        with loop(b, fn, queries) as query:
            x = b.gep(_address(b, line.x, F32), [b.mul(query, b.mul(line.a, line.b))])
            factor, weight = _power(b, fn, x, b.mul(line.a, line.b))
            b.store(weight, b.gep(_address(b, line.weights, F64), [query]))
            size = b.mul(b.mul(line.steps, line.columns), integer(PIECES * TILE))
            to = b.gep(_address(b, line.to, I8), [b.mul(query, size)])
            with loop(b, fn, b.mul(line.columns, line.steps)) as tile:
                column, step = b.sdiv(tile, line.steps), b.srem(tile, line.steps)
                with loop(b, fn, integer(TILE_ROWS)) as row:
                    i = b.add(b.mul(step, integer(2 * TILE_ROWS)), b.mul(row, integer(2)))
                    both = [_numbers_of(b, line, x, b.add(i, integer(k)), column, factor) for k in (0, 1)]
                    here = b.gep(to, [b.add(b.mul(tile, integer(PIECES * TILE)), b.mul(row, integer(TILE_BYTES)))])
                    _cut(b, both, here)
    return finished(b)


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
    """factor x[i, 16 column + 0..15], zeros beyond the matrix."""
    inside, last = b.icmp_signed("<", i, line.a), b.sub(line.b, integer(1))
    first = b.mul(b.select(inside, i, integer(0)), line.along)
    vector = ir.Constant(ir.VectorType(F32, LANES), ir.Undefined)
    for lane in range(LANES):
        j = b.add(b.mul(column, integer(LANES)), integer(lane))
        held = b.icmp_signed("<=", j, last)
        number = b.load(b.gep(x, [b.add(first, b.mul(b.select(held, j, last), line.across))]), align=4)
        number = b.select(b.and_(inside, held), number, ir.Constant(F32, 0.0))
        vector = b.insert_element(vector, number, ir.Constant(I32, lane))
    return b.fmul(vector, spread(b, factor))


def _cut(b: Value, both: Sequence[Value], to: Value) -> None:
    """The pieces of two rows of numbers, side by side: one row of each piece's tile."""
    first, second = both
    bits = ir.VectorType(I32, LANES)
    for piece in range(PIECES):
        upper = [b.and_(b.bitcast(x, bits), all_lanes(I32, 0xFFFF0000)) for x in (first, second)]
        first, second = (b.fsub(x, b.bitcast(up, x.type)) for x, up in zip((first, second), upper, strict=True))
        store(b, b.or_(b.lshr(upper[0], all_lanes(I32, 16)), upper[1]), b.gep(to, [integer(piece * TILE)]))


def _query(b: Value, fn: Value, line: PairLine, sides: Sides, x: Value, weight: Value, out: Value, space: Value
           ) -> None:  # fmt: skip
    """out[0..47] += weight scale v^T X u."""
    held = b.bitcast(space, pointer(F32))
    chunks = _up(b, line.columns, COLUMNS)
    with loop(b, fn, chunks) as chunk:
        start = b.mul(chunk, integer(COLUMNS))
        left = b.sub(line.columns, start)
        count = b.select(b.icmp_signed("<", left, integer(COLUMNS)), left, integer(COLUMNS))
        with loop(b, fn, count) as j:
            column = b.gep(x, [b.mul(b.add(start, j), b.mul(line.steps, integer(PIECES * TILE)))])
            _products(b, fn, line, sides, column, b.gep(space, [b.mul(j, integer(GROUP * TILE))]))
        for tile in range(GROUP):
            sums = _sums(b, fn, sides, held, tile, start, count)
            _add(b, sums, weight, sides.scale, out, tile * TILE_ROWS)


def _products(b: Value, fn: Value, line: PairLine, sides: Sides, column: Value, to: Value) -> None:
    """The products of 48 v with sixteen columns of X: tiles 0 to 2, stored one after the other."""
    for tile in range(GROUP):
        tile_zero(b, tile)

    def step(state: list[Value]) -> list[Value]:
        v, right = state
        for tile in range(GROUP):
            tile_load(b, GROUP + tile, b.gep(v, [b.mul(sides.size_v, integer(tile * TILE_ROWS))]), sides.size_v)
        for piece in range(PIECES):
            source = 6 + piece % 2
            tile_load(b, source, b.gep(right, [integer(piece * TILE)]), integer(TILE_BYTES))
            for tile in range(GROUP):
                tile_product(b, "bfloat16", tile, GROUP + tile, source)
        return [b.gep(v, [integer(TILE_BYTES)]), b.gep(right, [integer(PIECES * TILE)])]

    repeat(b, fn, line.steps, [sides.v, column], step)
    for tile in range(GROUP):
        tile_store(b, tile, b.gep(to, [integer(tile * TILE)]), integer(TILE_BYTES))


def _sums(b: Value, fn: Value, sides: Sides, held: Value, tile: int, start: Value, count: Value) -> Value:
    """<what is held, u> of sixteen pairs over `count` tiles of columns from `start` on."""
    offset = b.mul(sides.size_u, integer(tile * TILE_ROWS))
    u = b.gep(sides.u, [b.add(offset, b.mul(start, integer(2 * LANES)))])

    def body(state: list[Value]) -> list[Value]:
        at, u, *sums = state
        for pair in range(TILE_ROWS):
            left = load(b, at, F32, integer(pair * LANES), align=64)
            side = b.bitcast(b.gep(u, [b.mul(sides.size_u, integer(pair))]), pointer(I16))
            sums[pair] = b.fadd(sums[pair], b.fmul(left, _wide(b, side), flags=["contract"]), flags=["contract"])
        return [b.gep(at, [integer(GROUP * TILE // 4)]), b.gep(u, [integer(2 * LANES)]), *sums]

    state = [b.gep(held, [integer(tile * TILE // 4)]), u, *[ZERO] * TILE_ROWS]
    return _across(b, repeat(b, fn, count, state, body)[2:])


def _add(b: Value, sums: Value, weight: Value, scale: Value | None, out: Value, at: int) -> None:
    """out[at..at + 15] += weight scale sums, in float64."""
    wide = ir.VectorType(F64, LANES)
    x = b.fpext(sums, wide)
    if scale is not None:
        x = b.fmul(x, b.fpext(_wide(b, b.gep(b.bitcast(scale, pointer(I16)), [integer(at)])), wide))
    x = b.fmul(x, spread(b, weight))
    place = b.bitcast(b.gep(out, [integer(at)]), pointer(wide))
    b.store(b.fadd(b.load(place, align=8), x), place, align=8)


def _across(b: Value, vectors: Sequence[Value]) -> Value:
    """The sum of the lanes of vector i in lane i: neighbours are added, and halves put side by side."""
    even, odd = (ir.Constant(ir.VectorType(I32, LANES), list(range(k, 2 * LANES, 2))) for k in (0, 1))
    vectors = list(vectors)
    while len(vectors) > 1:
        vectors = [
            b.fadd(b.shuffle_vector(x, y, even), b.shuffle_vector(x, y, odd))
            for x, y in zip(vectors[::2], vectors[1::2], strict=True)
        ]
    return vectors[0]


def _sides(b: Value, fn: Value, line: PairLine, n: Value, first: Value, space: Value, bits: str) -> Sides:
    """The 48 pairs from `first` on: v in whole tiles' rows, u where it is stored, or the numbers of both of codes. Of
    the last pairs, whose steps would end beyond their tensor, a copy is read."""
    left = b.sub(n, first)
    count = b.select(b.icmp_signed("<", left, integer(PAIRS)), left, integer(PAIRS))
    stored = [(line.v, line.size_v), (line.u, line.size_u), *([(line.scale, integer(2))] if PLANES.get(bits) else [])]
    rooms = [b.gep(space, [b.add(integer(HELD), b.mul(line.room, integer(i)))]) for i in range(5)]
    found = []
    for room, (address, size) in zip(rooms, stored, strict=False):
        here = b.gep(_address(b, address, I8), [b.mul(first, size)])
        end = b.add(b.mul(b.add(first, integer(PAIRS)), size), integer(TILE_BYTES))
        inside = b.icmp_signed("<=", end, b.mul(n, size))
        with b.if_then(b.not_(inside)):
            _copy(b, room, here, b.mul(count, size))
        found.append(b.select(inside, here, room))
    v, u, *scale = found
    _numbers(b, fn, v, line.size_v, rooms[3], line.wide_v, bits)
    if not scale:
        return Sides(rooms[3], line.wide_v, u, line.size_u, None)
    _numbers(b, fn, u, line.size_u, rooms[4], line.wide_u, bits)
    return Sides(rooms[3], line.wide_v, rooms[4], line.wide_u, scale[0])


def _numbers(b: Value, fn: Value, sides: Value, size: Value, to: Value, wide: Value, bits: str) -> None:
    """The numbers of 48 sides as bfloat16, in whole steps: what a plane writes too far the next plane writes over."""
    with loop(b, fn, integer(PAIRS)) as pair:
        side, there = b.gep(sides, [b.mul(size, pair)]), b.bitcast(b.gep(to, [b.mul(wide, pair)]), pointer(I16))
        for plane in range(PLANES.get(bits, 1)):
            with loop(b, fn, _up(b, size, STEP.get(bits, TILE_BYTES))) as i:
                if bits in PLANES:
                    x = _narrow(b, decode(b, side, b.mul(i, integer(STEP[bits])), bits)[plane])
                    at = b.add(b.mul(i, integer(LANES)), b.mul(size, integer(plane)))
                else:
                    x = load(b, side, I8, b.mul(i, integer(TILE_BYTES)), align=1, lanes=TILE_BYTES)
                    at = b.mul(i, integer(TILE_BYTES // 2))
                store(b, x, b.gep(there, [at]))


def _narrow(b: Value, x: Value) -> Value:
    """Codes as bfloat16, which keeps eight bits."""
    if x.type.element == I1:
        return b.select(x, all_lanes(I16, 0xBF80), all_lanes(I16, 0x3F80))  # -1 and 1
    return b.trunc(b.lshr(b.bitcast(x, ir.VectorType(I32, LANES)), all_lanes(I32, 16)), ir.VectorType(I16, LANES))


def _wide(b: Value, start: Value) -> Value:
    """Sixteen numbers of bfloat16 as float32."""
    x = b.load(b.bitcast(start, pointer(ir.VectorType(I16, LANES))), align=1)
    wide = b.shl(b.zext(x, ir.VectorType(I32, LANES)), all_lanes(I32, 16))
    return b.bitcast(wide, ir.VectorType(F32, LANES))


def _copy(b: Value, to: Value, start: Value, count: Value) -> None:
    fn = b.module.declare_intrinsic("llvm.memcpy", [pointer(I8), pointer(I8), I64])
    b.call(fn, [to, start, count, ir.Constant(I1, 0)])


def _line(b: Value, table: Value, number: Value, kind: Any) -> Any:
    """The numbers of one line of a table."""
    fields = len(kind._fields)
    return kind(*(b.load(b.gep(table, [b.add(b.mul(number, integer(fields)), integer(i))])) for i in range(fields)))


def _address(b: Value, x: Value, of: Value) -> Value:
    return b.inttoptr(x, pointer(of))


def _up(b: Value, x: Value, by: int) -> Value:
    """x / by, rounded up."""
    return b.sdiv(b.add(x, integer(by - 1)), integer(by))

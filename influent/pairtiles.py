"""Loops over pairs of vectors with matrix tiles, as LLVM code: v^T X u of 32 pairs at a time.

A tile product makes X^T v of sixteen pairs at once; what it leaves is multiplied by u lane by lane, and sixteen vectors
of lanes become the sums of sixteen pairs. Here is what is compiled; compiled.py has it compiled and pairprograms.py
calls it. Needs llvmlite, so nothing but compiled.py imports it. Not here: how sides come to where tiles are loaded from
(pairsides.py), and X (pairqueries.py).
"""

from collections.abc import Iterator, Sequence  # noqa: I001
from contextlib import contextmanager

from llvmlite import ir  # pyright: ignore[reportMissingImports]

from .compiled import LANES
from .llvm import (
    F32, F64, I8, I16, I32, I64, TILE_BYTES, TILE_ROWS, ZERO, Value, address, all_lanes, finished, function, integer,
    least, line_of, load, loop, pointer, repeat, spread, tile_load, tile_product, tile_store, tile_zero, tiles_begin,
    tiles_end, up,
)  # fmt: skip
from .pairprograms import HELD, PAIRS, STATE, TILE, PairLine
from .pairsides import TURNS, Groups, Sides

GROUP = PAIRS // TILE_ROWS  # tiles of pairs that share what is loaded of X
WIDTH = {"bfloat16": 2, "int8": 1, "int4": 2, "sign": 2}  # bytes of a number of u where products meet it
UPPER = 0xFFFF0000  # bits of the second of two numbers of bfloat16
COLUMNS = HELD // (GROUP * TILE)  # tiles of columns of X whose products are held before u meets them


def pairs(bits: str) -> str:
    """The module of a function that adds scale v^T X u to out[query, pair], float64.

    (table, lines, pairs, out, numbers from query to query in out, space): a line of the table is a `PairLine`. `out`
    has room for whole groups of 32 pairs; what it holds beyond the pairs means nothing. Of space, see `pairprograms`.

    While the tiles of a query and a group are multiplied, u meets the products of those before, and the sides of the
    next group are brought to where tiles are loaded from at once. All that is done before the tiles are stored: a store
    waits for its tile, and what follows it for the store.
    """
    fn, b = function("pairs", [pointer(I64), I64, I64, pointer(F64), I64, pointer(I8)])
    table, lines, n, out, apart, space = fn.args
    later = _Later(b, space)
    later.clear()
    tiles_begin(b)
    with loop(b, fn, lines) as number:
        line = line_of(b, table, number, PairLine)
        groups, count = Groups(b, fn, line, n, b.gep(space, [integer(STATE + 2 * HELD)]), bits), up(b, n, PAIRS)
        next_ = least(b, b.add(number, integer(1)), b.sub(lines, integer(1)))
        groups.foresee(line_of(b, table, next_, PairLine))
        groups.begin(integer(0))
        with loop(b, fn, integer(TURNS)) as turn:
            groups.bring(integer(0), turn)
        with loop(b, fn, count) as group:
            following = b.add(group, integer(1))
            more = b.icmp_signed("<", following, count)
            with b.if_then(more):
                groups.begin(following)
            sides = groups.of(group)
            with loop(b, fn, line.queries) as query:
                weight = b.load(b.gep(address(b, line.weights, F64), [query]))
                row = b.add(b.mul(b.add(line.first_query, query), apart), b.mul(group, integer(PAIRS)))
                with loop(b, fn, up(b, line.columns, COLUMNS)) as chunk:
                    start, held = b.mul(chunk, integer(COLUMNS)), later.room()
                    several = least(b, b.sub(line.columns, start), integer(COLUMNS))
                    with loop(b, fn, several) as j:
                        column = b.add(start, j)
                        _products(b, fn, line, sides, query, column)
                        brings = b.and_(more, b.icmp_signed("==", query, integer(0)))
                        with b.if_then(brings), _part(b, fn, TURNS, column, line.columns) as turn:
                            groups.bring(following, turn)
                        with _part(b, fn, GROUP, j, several) as tile:
                            later.meet(fn, tile, bits)
                        for tile in range(GROUP):
                            place = _slot(b, held, b.add(b.mul(j, integer(GROUP)), integer(tile)))
                            tile_store(b, tile, place, integer(TILE_BYTES))
                    u = b.gep(sides.u, [b.mul(start, integer(WIDTH[bits] * LANES))])
                    later.put(held, u, sides, several, weight, b.gep(out, [row]))
        with loop(b, fn, integer(GROUP)) as tile:
            later.meet(fn, tile, bits)
        later.clear()
    tiles_end(b)
    return finished(b)


@contextmanager
def _part(b: Value, fn: Value, count: int, part: Value, parts: Value) -> Iterator[Value]:
    """`with _part(...) as i`: part after part, i is each of 0 to count - 1."""
    each = integer(1)
    for least_parts in range(count - 1, 0, -1):  # no division: it would take longer than what there is to do
        several = integer(-(-count // least_parts))
        each = b.select(b.icmp_signed("<=", parts, integer(least_parts)), several, each)
    first = b.mul(part, each)
    left = b.sub(integer(count), first)
    with loop(b, fn, least(b, left, each)) as i:
        yield b.add(first, i)


def _slot(b: Value, held: Value, number: Value) -> Value:
    """Where the products of a tile are held. Those that are written and those that are read meanwhile lie in other
    halves of their pages: a read from where a page away is just written to would wait for that."""
    page, half = b.lshr(number, integer(1)), b.and_(number, integer(1))
    return b.gep(held, [b.add(b.shl(page, integer(12)), b.shl(half, integer(10)))])


def _products(b: Value, fn: Value, line: PairLine, sides: Sides, query: Value, column: Value) -> None:
    """The products of 32 v with sixteen columns of a query's X, in tiles 0 and 1."""
    size = b.mul(b.mul(line.rounds, line.steps), integer(TILE))
    start = b.gep(address(b, line.x, I8), [b.add(b.mul(query, line.tiles), b.mul(column, size))])
    for tile in range(GROUP):
        tile_zero(b, tile)

    def step(state: list[Value]) -> list[Value]:
        v, right = state
        for tile in range(GROUP):
            tile_load(b, GROUP + tile, b.gep(v, [b.mul(sides.size_v, integer(tile * TILE_ROWS))]), sides.size_v)

        def piece(state: list[Value]) -> list[Value]:
            (right,) = state
            tile_load(b, 2 * GROUP, right, integer(TILE_BYTES))
            for tile in range(GROUP):
                tile_product(b, "bfloat16", tile, GROUP + tile, 2 * GROUP)
            return [b.gep(right, [integer(TILE)])]

        return [b.gep(v, [integer(TILE_BYTES)]), *repeat(b, fn, line.rounds, [right], piece)]

    repeat(b, fn, line.steps, [sides.v, start], step)


class _Later:
    """The products that u has not met yet: where they are, and what becomes of them."""

    FIELDS = ("held", "u", "size_u", "scale", "count", "weight", "out")

    def __init__(self, b: Value, space: Value):
        self.b, self.space = b, space
        self.at = b.bitcast(space, pointer(I64))

    def _field(self, name: str) -> Value:
        return self.b.gep(self.at, [integer(self.FIELDS.index(name))])

    def _load(self, name: str, of: Value | None) -> Value:
        x = self.b.load(self._field(name))
        return x if of is None else address(self.b, x, of)

    def clear(self) -> None:
        """Nothing is left: of no columns of products of whatever lies in space."""
        b = self.b
        for name in ("held", "u", "scale", "out"):
            b.store(b.ptrtoint(b.gep(self.space, [integer(STATE)]), I64), self._field(name))
        for name in ("size_u", "count", "weight"):
            b.store(integer(0), self._field(name))

    def room(self) -> Value:
        """Where the next products go: not where those are that wait."""
        b = self.b
        first, second = (b.ptrtoint(b.gep(self.space, [integer(STATE + 2048 * i)]), I64) for i in (0, 1))
        return b.inttoptr(b.sub(b.add(first, second), self._load("held", None)), pointer(I8))

    def put(self, held: Value, u: Value, sides: Sides, count: Value, weight: Value, out: Value) -> None:
        b = self.b
        scale = sides.scale if sides.scale is not None else u
        given = [
            b.ptrtoint(held, I64),
            b.ptrtoint(u, I64),
            sides.size_u,
            b.ptrtoint(scale, I64),
            count,
            b.bitcast(weight, I64),
            b.ptrtoint(out, I64),
        ]
        for name, x in zip(self.FIELDS, given, strict=True):
            b.store(x, self._field(name))

    def meet(self, fn: Value, tile: Value, bits: str) -> None:
        """out += weight scale <products, u> of sixteen pairs."""
        b = self.b
        held, u, scale, out = (self._load(x, of) for x, of in (("held", I8), ("u", I8), ("scale", I8), ("out", F64)))
        size_u, count, weight = (self._load(x, None) for x in ("size_u", "count", "weight"))
        first = b.mul(tile, integer(TILE_ROWS))
        sums = _sums(b, fn, bits, b.gep(u, [b.mul(size_u, first)]), size_u, held, tile, count)
        scale = b.gep(b.bitcast(scale, pointer(I16)), [first]) if bits != "bfloat16" else None
        _add(b, sums, b.bitcast(weight, F64), scale, b.gep(out, [first]))


def _sums(b: Value, fn: Value, bits: str, u: Value, size_u: Value, held: Value, tile: Value, count: Value) -> Value:
    """<what is held, u> of sixteen pairs over `count` tiles of columns: of two of them the first has what meets the
    even numbers of u, so that no numbers need to be moved, but not of int8."""

    def two(state: list[Value]) -> list[Value]:
        number, u, *sums = state
        at = [b.bitcast(_slot(b, held, b.add(number, integer(k))), pointer(F32)) for k in (0, GROUP)]
        for pair in range(TILE_ROWS):
            both = load(b, b.gep(u, [b.mul(size_u, integer(pair))]), I32, integer(0), align=1)
            halves = (b.shl(both, all_lanes(I32, 16)), b.and_(both, all_lanes(I32, UPPER)))
            for place, half in zip(at, halves, strict=True):
                y = b.bitcast(half, ZERO.type)
                sums[pair] = _plus(b, sums[pair], load(b, place, F32, integer(pair * LANES), align=64), y)
        return [b.add(number, integer(2 * GROUP)), b.gep(u, [integer(4 * LANES)]), *sums]

    def one(state: list[Value]) -> list[Value]:
        number, u, *sums = state
        at = b.bitcast(_slot(b, held, number), pointer(F32))
        for pair in range(TILE_ROWS):
            side = b.gep(u, [b.mul(size_u, integer(pair))])
            x = load(b, at, F32, integer(pair * LANES), align=64)
            y = b.sitofp(load(b, side, I8, integer(0), align=1), ZERO.type) if bits == "int8" else _wide(b, side)
            sums[pair] = _plus(b, sums[pair], x, y)
        return [b.add(number, integer(GROUP)), b.gep(u, [integer(WIDTH[bits] * LANES)]), *sums]

    state = [tile, u, *[ZERO] * TILE_ROWS]
    if bits != "int8":
        state = repeat(b, fn, b.lshr(count, integer(1)), state, two)
        count = b.and_(count, integer(1))
    return _across(b, repeat(b, fn, count, state, one)[2:])


def _plus(b: Value, total: Value, x: Value, y: Value) -> Value:
    return b.fadd(total, b.fmul(x, y, flags=["contract"]), flags=["contract"])


def _add(b: Value, sums: Value, weight: Value, scale: Value | None, out: Value) -> None:
    """out[0..15] += weight scale sums, in float64."""
    wide = ir.VectorType(F64, LANES)
    x = b.fpext(sums, wide)
    if scale is not None:
        x = b.fmul(x, b.fpext(_wide(b, scale), wide))
    x = b.fmul(x, spread(b, weight))
    place = b.bitcast(out, pointer(wide))
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


def _wide(b: Value, start: Value) -> Value:
    """Sixteen numbers of bfloat16 as float32."""
    x = b.load(b.bitcast(start, pointer(ir.VectorType(I16, LANES))), align=1)
    wide = b.shl(b.zext(x, ir.VectorType(I32, LANES)), all_lanes(I32, 16))
    return b.bitcast(wide, ir.VectorType(F32, LANES))

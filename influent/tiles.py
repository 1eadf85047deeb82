"""Loops over dense stored rows on the matrix tiles of x86 (AMX), as LLVM code: sixteen rows against sixteen columns.

A table has a line for each block, so that one call scores the rows of all of them. A block's queries lie ready as right
tiles, `tiles` of them a step for each group of queries; the left tile are sixteen rows' stored bytes of bfloat16 and
int8, and their codes unpacked to bytes of int4 and sign. Integer sums are exact. Those of bfloat16 are float32 over a
piece of TILE_PIECE steps and float64 beyond. A row meets the same sums in the same order whatever rows it comes with.

What a left tile holds beyond its row is multiplied by zeros: it is the next row's, so that of bfloat16 a row that is
not finite makes the one before it NaN, too. Nothing is read beyond the last row: rows that end too near it are copied.
This module needs llvmlite, so nothing but compiled.py imports it. Not here: what the tiles hold (tileproducts.py).
"""

from collections.abc import Callable  # noqa: I001
from dataclasses import dataclass

from llvmlite import ir  # pyright: ignore[reportMissingImports]

from .compiled import LANES, TILE_BLOCK, TILE_LINE, TILE_PIECE, TILE_STAGED, TILE_STEP
from .llvm import (
    F32, F64, I8, I16, I32, I64, TILE_BYTES, TILE_ROWS, Value, declared, finished, function, integer, loop, pointer,
    repeat, spread, tile_load, tile_product, tile_store, tile_zero, tiles_begin, tiles_end,
)  # fmt: skip

TILE = TILE_ROWS * TILE_BYTES
SUMS = 8 * TILE  # bytes of the space for accumulators; staged left tiles follow, then the rows that are copied
AHEAD = 1 << 14  # bytes, or a block's if those are more, that memory is asked for before they are read
BYTES = ir.VectorType(I8, TILE_BYTES)


@dataclass(frozen=True, slots=True)
class _Rows:
    """Some rows of one block, where they lie, and what they are multiplied with."""

    codes: Value
    stride: Value
    scales: Value
    count: Value
    steps: Value
    right: Value
    weights: Value
    constant: Value
    wide: Value


@dataclass(frozen=True, slots=True)
class _Loop:
    """The function that is being written: its kind of rows, and the arguments that all of its parts use."""

    b: Value
    fn: Value
    bits: str
    tiles: int
    columns: int
    groups: Value
    apart: Value  # numbers from group to group in `wide`
    space: Value

    @property
    def block(self) -> int:
        """Rows at a time: with several right tiles two left ones, which each meets before it is let go."""
        return TILE_BLOCK[self.tiles]

    @property
    def chains(self) -> int:
        """Sums of each tile that are under way at a time: a product waits for the one before it of its own."""
        return 4 if self.tiles == 1 else 1

    @property
    def lefts(self) -> tuple[int, ...]:
        """The tiles that rows are loaded to; the right one follows each."""
        return (4, 6) if self.tiles == 1 else (6,)

    @property
    def width(self) -> int:
        """Bytes of a row of a right tile."""
        return 4 * self.columns

    @property
    def right(self) -> int:
        return TILE_ROWS * self.width


def dense(bits: str, tiles: int, columns: int) -> str:
    """The module of a function that adds the weighted sums of `rows` rows from `first` on to `wide`.

    (table, lines, first, rows, rows that there are, first group, groups, wide, space): a line of the table has the
    addresses of the rows and of their scales, the bytes of a row, its steps, and the addresses of the right tiles
    [groups, steps, tiles], of the weights [groups, tiles, columns] and of what is added to a row's sums before they are
    scaled, [groups, columns]; both, and `wide` [groups, rows, columns], are float64.
    """
    fn, b = function("dense", [pointer(I64), *[I64] * 6, pointer(F64), pointer(I8)])
    table, lines, first, rows, there, first_group, groups, wide, space = fn.args
    made = _Loop(b, fn, bits, tiles, columns, groups, b.mul(rows, integer(columns)), space)
    widths = [TILE_BYTES if tile in made.lefts else made.width for tile in range(8)]
    copies = b.gep(space, [integer(SUMS + TILE_STAGED[tiles] * TILE)])
    tiles_begin(b, widths)
    with loop(b, fn, lines) as number:
        line = b.gep(table, [b.mul(number, integer(TILE_LINE))])
        codes, scales, stride, steps, *asked = (b.load(b.gep(line, [integer(i)])) for i in range(7))
        codes = b.add(codes, b.mul(first, stride))
        scales = b.inttoptr(b.add(scales, b.mul(first, integer(2))), pointer(I16))
        sizes = [b.mul(steps, integer(tiles * made.right)), integer(tiles * columns * 8), integer(columns * 8)]
        asked = [b.add(start, b.mul(first_group, size)) for start, size in zip(asked, sizes, strict=True)]
        right, weights, constant = (b.inttoptr(x, pointer(kind)) for x, kind in zip(asked, (I8, F64, F64), strict=True))
        size = b.mul(steps, integer(TILE_STEP[bits]))
        safe = safe_rows(b, b.sub(there, first), rows, stride, size, made.block)
        rest, held = b.sub(rows, safe), b.and_(b.add(size, integer(TILE_BYTES - 1)), integer(-TILE_BYTES))
        copy_rows(b, fn, b.inttoptr(b.add(codes, b.mul(safe, stride)), pointer(I8)), rest, stride, copies, held)
        with loop(b, fn, integer(2)) as turn:  # the rows where they lie, then those that were copied
            here = b.icmp_signed("==", turn, integer(0))
            at = b.select(here, integer(0), safe)
            place = b.select(here, b.inttoptr(codes, pointer(I8)), copies)
            _score(
                made,
                _Rows(
                    place, b.select(here, stride, held), b.gep(scales, [at]), b.select(here, safe, rest), steps,
                    right, weights, constant, b.gep(wide, [b.mul(at, integer(columns))]),
                ),
            )  # fmt: skip
    tiles_end(b)
    return finished(b)


def safe_rows(b: Value, there: Value, rows: Value, stride: Value, size: Value, block: int) -> Value:
    """How many of the rows, in whole blocks, can be read `size` bytes wide within the rows there are."""
    count = b.sdiv(b.sub(b.mul(b.add(there, integer(1)), stride), size), stride)
    count = b.select(b.icmp_signed("<", count, rows), count, rows)
    return b.and_(b.select(b.icmp_signed(">", count, integer(0)), count, integer(0)), integer(-block))


def copy_rows(b: Value, fn: Value, codes: Value, count: Value, stride: Value, to: Value, held: Value) -> None:
    """Rows with zeros behind them, `held` bytes each."""
    lanes = ir.Constant(BYTES, list(range(TILE_BYTES)))
    with loop(b, fn, count) as row, loop(b, fn, b.sdiv(held, integer(TILE_BYTES))) as piece:
        at = b.mul(piece, integer(TILE_BYTES))
        left = b.sub(stride, at)
        left = b.trunc(b.select(b.icmp_signed("<", left, integer(TILE_BYTES)), left, integer(TILE_BYTES)), I8)
        mask = b.icmp_signed("<", lanes, spread(b, left, TILE_BYTES))
        start = b.bitcast(b.gep(codes, [b.add(b.mul(row, stride), at)]), pointer(BYTES))
        x = _masked(b, start, mask, BYTES, "llvm.masked.load.v64i8.p0", 1)
        _put(b, x, b.gep(to, [b.add(b.mul(row, held), at)]))


def _score(made: _Loop, rows: _Rows) -> None:
    """wide += the rows' sums: piece after piece of a row, block after block of rows, one group after another."""
    b, fn, piece, block = made.b, made.fn, TILE_PIECE[made.tiles], made.block
    with (
        loop(b, fn, b.sdiv(b.add(rows.steps, integer(piece - 1)), integer(piece))) as number,
        loop(b, fn, b.sdiv(b.add(rows.count, integer(block - 1)), integer(block))) as turn,
    ):
        start, first = b.mul(number, integer(piece)), b.mul(turn, integer(block))
        steps = _least(b, b.sub(rows.steps, start), integer(piece))
        count = _least(b, b.sub(rows.count, first), integer(block))
        at = b.add(b.mul(first, rows.stride), b.mul(start, integer(TILE_STEP[made.bits])))
        left, staged = b.gep(rows.codes, [at]), b.gep(made.space, [integer(SUMS)])
        if made.tiles > 1:
            _stage_all(made, left, rows.stride, steps, staged)
        with loop(b, fn, made.groups) as group:
            skipped = b.add(b.mul(group, rows.steps), start)
            right = b.gep(rows.right, [b.mul(skipped, integer(made.tiles * made.right))])
            if made.tiles > 1:
                _multiply_staged(made, staged, right, steps)
            else:
                _multiply(made, left, rows.stride, right, steps, staged)
            into = b.add(b.mul(group, made.apart), b.mul(first, integer(made.columns)))
            begins = b.uitofp(b.icmp_signed("==", number, integer(0)), F64)
            _weigh(made, rows, group, b.gep(rows.wide, [into]), b.gep(rows.scales, [first]), count, begins)


def _stage(made: _Loop, start: Value, stride: Value, to: Value, *, apart: int) -> None:
    """Sixteen rows' codes as bytes of left tiles: as they are; or of int4 sixteen times a number, the low halves of 64
    bytes and then, `apart` bytes away, their high halves; or of sign 1 where a bit is set, bit k of byte i as byte
    8k + i. A tile is loaded at once from rows of 64 bytes that begin where cache lines do, and slowly from others."""
    b = made.b
    for row in range(TILE_ROWS):
        place = b.gep(start, [b.mul(stride, integer(row))])
        if made.bits == "sign":
            eight = b.load(b.bitcast(place, pointer(I64)), align=1)
            found = [bits_as_bytes(b, b.bitcast(spread(b, eight, 8), BYTES))]
        else:
            found = [b.load(b.bitcast(place, pointer(BYTES)), align=1)]
        if made.bits == "int4":
            high = ir.Constant(BYTES, [-16] * TILE_BYTES)
            found = [b.shl(found[0], ir.Constant(BYTES, [4] * TILE_BYTES)), b.and_(found[0], high)]
        for plane, x in enumerate(found):
            _put(b, x, b.gep(to, [integer(plane * apart + row * TILE_BYTES)]))


def bits_as_bytes(b: Value, x: Value) -> Value:
    """Of the k-th eight bytes their bits k: 0 or 1. Each eight bytes of the other factor are a matrix over two numbers,
    a byte a row, the lowest bit's last (GF2P8AFFINEQB)."""
    rows = [1 << k if byte == 7 else 0 for k in range(8) for byte in range(8)]
    fn = declared(b, "llvm.x86.vgf2p8affineqb.512", BYTES, [BYTES, BYTES, I8])
    return b.call(fn, [x, ir.Constant(BYTES, [row - 256 if row > 127 else row for row in rows]), ir.Constant(I8, 0)])


def _ask(made: _Loop, start: Value, stride: Value, step: Value) -> None:
    """Memory is asked for what will be read soon: what it takes to answer is longer than to multiply sixteen rows."""
    b = made.b
    fn = declared(b, "llvm.prefetch.p0", ir.VoidType(), [pointer(I8), *[I32] * 3])
    size = b.mul(stride, integer(made.block))
    start = b.gep(start, [b.select(b.icmp_signed(">", size, integer(AHEAD)), size, integer(AHEAD))])
    if made.bits == "sign":  # whose steps are an eighth of a line: two lines each of what lies there
        lines = [b.add(b.mul(step, integer(2 * 64)), integer(64 * i)) for i in range(2)]
    else:
        column = b.mul(step, integer(TILE_STEP[made.bits]))
        lines = [b.add(column, b.mul(stride, integer(row))) for row in range(TILE_ROWS)]
    for line in lines:
        b.call(fn, [b.gep(start, [line]), ir.Constant(I32, 0), ir.Constant(I32, 2), ir.Constant(I32, 1)])


def _multiply(made: _Loop, left: Value, stride: Value, right: Value, steps: Value, staged: Value) -> None:
    """The accumulators are the products of sixteen rows with one tile of columns: step i goes to the chain i mod
    `chains`. While so many steps are multiplied, as many are staged."""
    b, fn, chains = made.b, made.fn, made.chains
    planes = 2 if made.bits == "int4" else 1

    def stage(to: Value, first: Value) -> list[Callable[[], None]]:
        """What stages `chains` steps, of which those beyond the last are that again."""

        def one(i: int) -> None:
            at = _least(b, b.add(first, integer(i)), b.sub(steps, integer(planes)))
            start = b.gep(left, [b.mul(at, integer(TILE_STEP[made.bits]))])
            _ask(made, left, stride, at)
            _stage(made, start, stride, b.gep(to, [integer(i * TILE)]), apart=TILE)

        return [lambda i=i: one(i) if i % planes == 0 else None for i in range(chains)]

    def step(chain: int, from_: Value, right: Value) -> None:
        x = made.lefts[chain % len(made.lefts)]
        tile_load(b, x, b.gep(from_, [integer(chain * TILE)]), integer(TILE_BYTES))
        tile_load(b, x + 1, b.gep(right, [integer(chain * made.right)]), integer(made.width))
        tile_product(b, "bfloat16" if made.bits == "bfloat16" else "int8", chain, x, x + 1)

    def body(state: list[Value]) -> list[Value]:
        now, next_, right, done = state
        done = b.add(done, integer(chains))
        for chain, more in enumerate(stage(next_, done)):
            step(chain, now, right)
            more()
        return [next_, now, b.gep(right, [integer(chains * made.right)]), done]

    for chain in range(chains):
        tile_zero(b, chain)
    for more in stage(staged, integer(0)):
        more()
    state = [staged, b.gep(staged, [integer(chains * TILE)]), right, integer(0)]
    now, _, right, _ = repeat(b, fn, b.sdiv(steps, integer(chains)), state, body)
    rest = b.srem(steps, integer(chains))
    for chain in range(chains - 1):
        with loop(b, fn, b.zext(b.icmp_signed(">", rest, integer(chain)), I64)):
            step(chain, now, right)


def _stage_all(made: _Loop, left: Value, stride: Value, steps: Value, to: Value) -> None:
    """All steps of a block of rows, which wait for all groups: of each step sixteen rows after sixteen."""
    b, fn = made.b, made.fn
    planes, halves = 2 if made.bits == "int4" else 1, made.block // TILE_ROWS
    with loop(b, fn, b.sdiv(steps, integer(planes))) as column:
        step = b.mul(column, integer(planes))
        for half in range(halves):
            start = b.gep(left, [b.mul(stride, integer(half * TILE_ROWS))])
            _ask(made, start, stride, step)
            place = b.gep(to, [b.add(b.mul(step, integer(halves * TILE)), integer(half * TILE))])
            start = b.gep(start, [b.mul(step, integer(TILE_STEP[made.bits]))])
            _stage(made, start, stride, place, apart=halves * TILE)


def _multiply_staged(made: _Loop, staged: Value, right: Value, steps: Value) -> None:
    """The accumulators are the products of a block of rows with the tiles of a group: each right tile is loaded once
    for all."""
    b, tiles, halves = made.b, made.tiles, made.block // TILE_ROWS
    for tile in range(tiles * halves):
        tile_zero(b, tile)

    def body(state: list[Value]) -> list[Value]:
        left, right = state
        for tile in range(tiles):
            tile_load(b, 7, b.gep(right, [integer(tile * made.right)]), integer(made.width))
            for half in range(halves):
                tile_load(b, 6, b.gep(left, [integer(half * TILE)]), integer(TILE_BYTES))
                tile_product(b, "bfloat16" if made.bits == "bfloat16" else "int8", half * tiles + tile, 6, 7)
        return [b.gep(left, [integer(halves * TILE)]), b.gep(right, [integer(tiles * made.right)])]

    repeat(b, made.fn, steps, [staged, right], body)


def _weigh(made: _Loop, rows: _Rows, group: Value, into: Value, scales: Value, count: Value, begins: Value) -> None:
    """wide += scale * (weights * sums + constant), the constant where a row begins."""
    b, fn, tiles, columns = made.b, made.fn, made.tiles, made.columns
    for tile in range(made.chains * tiles * (made.block // TILE_ROWS)):
        tile_store(b, tile, b.gep(made.space, [integer(tile * TILE)]), integer(made.width))
    number, together = F32 if made.bits == "bfloat16" else I32, LANES // columns  # rows whose sums fill a vector
    weights = b.gep(rows.weights, [b.mul(group, integer(tiles * columns))])
    weights = [_each(b, b.gep(weights, [integer(tile * columns)]), columns) for tile in range(tiles)]
    constant = _each(b, b.gep(rows.constant, [b.mul(group, integer(columns))]), columns)
    constant = b.fmul(constant, spread(b, begins))
    with loop(b, fn, b.sdiv(b.add(count, integer(together - 1)), integer(together))) as turn:
        row, total = b.mul(turn, integer(together)), constant
        half = b.mul(b.sdiv(row, integer(TILE_ROWS)), integer(tiles * TILE))
        start = b.add(half, b.mul(b.and_(row, integer(TILE_ROWS - 1)), integer(made.width)))
        for tile in range(tiles):
            parts = []
            for chain in range(made.chains):
                at = b.add(start, integer((chain * tiles + tile) * TILE))
                place = b.bitcast(b.gep(made.space, [at]), pointer(ir.VectorType(number, LANES)))
                parts.append(b.load(place, align=64))
            total = _plus(b, total, _sum(b, parts), weights[tile])
        place = b.bitcast(b.gep(into, [b.mul(row, integer(columns))]), pointer(ir.VectorType(F64, LANES)))
        found = b.load(place, align=8)
        if made.bits == "bfloat16":
            found = b.fadd(found, total)
        else:
            scale = _scales(b, b.gep(scales, [row]), b.sub(count, row), together)
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
    mask = b.icmp_signed("<", ir.Constant(lanes, list(range(together))), spread(b, left, together))
    bits = _masked(b, b.bitcast(at, pointer(kind)), mask, kind, f"llvm.masked.load.v{together}i16.p0", 2)
    bits = b.shl(b.zext(bits, ir.VectorType(I32, together)), ir.Constant(ir.VectorType(I32, together), [16] * together))
    x = b.fpext(b.bitcast(bits, ir.VectorType(F32, together)), ir.VectorType(F64, together))
    order = [lane * together // LANES for lane in range(LANES)]
    return b.shuffle_vector(x, x, ir.Constant(ir.VectorType(I32, LANES), order))


def _masked(b: Value, at: Value, mask: Value, kind: Value, name: str, align: int) -> Value:
    """Numbers from memory where the mask is set, zeros elsewhere, where nothing is read."""
    given = [at, ir.Constant(I32, align), mask, ir.Constant(kind, [0] * kind.count)]
    return b.call(declared(b, name, kind, [x.type for x in given]), given)


def _plus(b: Value, total: Value, sums: Value, weights: Value) -> Value:
    numbers = ir.VectorType(F64, sums.type.count)
    x = b.sitofp(sums, numbers) if sums.type.element == I32 else b.fpext(sums, numbers)
    return b.fadd(total, b.fmul(x, weights, flags=["contract"]), flags=["contract"])


def _sum(b: Value, parts: list[Value]) -> Value:
    add = b.add if parts[0].type.element == I32 else b.fadd
    while len(parts) > 1:
        parts = [add(x, y) for x, y in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def _least(b: Value, x: Value, y: Value) -> Value:
    return b.select(b.icmp_signed("<", x, y), x, y)


def _put(b: Value, x: Value, to: Value) -> None:
    b.store(x, b.bitcast(to, pointer(x.type)), align=64)

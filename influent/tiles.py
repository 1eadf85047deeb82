"""Loops over dense stored rows on the matrix tiles of x86 (AMX), as LLVM code: sixteen rows against sixteen columns.

A table has a line for each block, so that one call scores the rows of all of them. A block's queries lie ready as right
tiles, `tiles` of them a step for each group of queries; the left tile are sixteen rows' stored bytes of bfloat16 and
int8, and their codes unpacked to bytes of int4 and sign. Integer sums are exact. Those of bfloat16 are float32 over a
piece of TILE_PIECE steps and float64 beyond. A row meets the same sums in the same order whatever rows it comes with.

What a left tile holds beyond its row is multiplied by zeros: it is the next row's, so that of bfloat16 a row that is
not finite makes the one before it NaN, too. Nothing is read beyond the last row: rows that end too near it are copied.
This module needs llvmlite, so nothing but compiled.py imports it. Not here: what the tiles hold (tileproducts.py).
"""

import itertools  # noqa: I001
from collections.abc import Callable
from dataclasses import dataclass

from llvmlite import ir  # pyright: ignore[reportMissingImports]

from .compiled import LANES, TILE_BLOCK, TILE_LINE, TILE_PIECE, TILE_PLANES, TILE_RING, TILE_SPAN, TILE_STEP
from .llvm import (
    F64, I1, I8, I16, I32, I64, TILE_BYTES, TILE_ROWS, Value, ask, declared, finished, function, integer, least, loop,
    masked_load, pointer, repeat, spread, tile_load, tile_product, tile_store, tile_zero, tiles_begin, tiles_end, up,
)  # fmt: skip
from .tilesums import Sums, weigh

TILE = TILE_ROWS * TILE_BYTES
HALVES = TILE_BLOCK // TILE_ROWS
SUMS = 16 * TILE  # bytes of the space for sums, those of two blocks; staged left tiles follow, and the copied rows
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
    turned: Value  # the bits in which the addresses of the two spaces for sums differ
    new: Value  # whether what `wide` has is of no worth: no block was added yet

    @property
    def planes(self) -> int:
        """Steps that are staged of the same bytes."""
        return TILE_PLANES[self.bits]

    @property
    def slot(self) -> int:
        """Bytes of what is staged at a time."""
        return self.planes * HALVES * TILE

    @property
    def ahead(self) -> int:
        """Slots that are staged before they are multiplied: what was just stored cannot be loaded as tiles yet."""
        return (2 * self.ring_bytes // self.slot + 1) // 3

    @property
    def lefts(self) -> tuple[int, ...]:
        return _lefts(self.tiles)

    @property
    def width(self) -> int:
        """Bytes of a row of a right tile."""
        return 4 * self.columns

    @property
    def right(self) -> int:
        return TILE_ROWS * self.width

    @property
    def ring(self) -> Value:
        """Where left tiles are staged."""
        return self.b.gep(self.space, [integer(SUMS)])

    @property
    def ring_bytes(self) -> int:
        return TILE_RING[self.tiles] * TILE

    def wrapped(self, at: Value) -> Value:
        """A place in the ring."""
        size = integer(self.ring_bytes)
        return self.b.select(self.b.icmp_signed("<", at, size), at, self.b.sub(at, size))

    def weigh(self, sums: Sums, most: Value) -> Sums:
        return weigh(self.b, self.fn, sums, most, bits=self.bits, tiles=self.tiles, columns=self.columns)


@dataclass(frozen=True, slots=True)
class _Source:
    """What is staged in one pass over the rows: some columns of each block, once for each group."""

    stride: Value
    thrice: Value
    size: Value  # bytes from block to block
    columns: Value
    last: Value  # block


@dataclass(frozen=True, slots=True)
class _Into:
    """What the sums of a block are for: a group, the block's first row, how many it has, and whether a row begins."""

    group: Value
    first: Value
    count: Value
    begins: Value


def dense(bits: str, tiles: int, columns: int) -> str:
    """The module of a function that writes the weighted sums of `rows` rows from `first` on, of all lines, to `wide`.

    (table, lines, first, rows, rows that there are, first group, groups, wide, space): a line of the table has the
    addresses of the rows and of their scales, the bytes of a row, its steps, and the addresses of the right tiles
    [groups, steps, tiles], of the weights [groups, tiles, columns] and of what is added to a row's sums before they are
    scaled, [groups, columns]; both, and `wide` [groups, rows, columns], are float64.
    """
    fn, b = function("dense", [pointer(I64), *[I64] * 6, pointer(F64), pointer(I8)])
    table, lines, first, rows, there, first_group, groups, wide, space = fn.args
    apart, copies = b.mul(rows, integer(columns)), b.gep(space, [integer(SUMS + TILE_RING[tiles] * TILE)])
    turned = b.xor(b.ptrtoint(space, I64), b.add(b.ptrtoint(space, I64), integer(SUMS // 2)))
    tiles_begin(b, [TILE_BYTES if tile in _lefts(tiles) else 4 * columns for tile in range(8)])
    with loop(b, fn, lines) as number:
        new = b.icmp_signed("==", number, integer(0))
        made = _Loop(b, fn, bits, tiles, columns, groups, apart, space, turned, new)
        line = b.gep(table, [b.mul(number, integer(TILE_LINE))])
        codes, scales, stride, steps, *asked = (b.load(b.gep(line, [integer(i)])) for i in range(7))
        codes = b.add(codes, b.mul(first, stride))
        scales = b.inttoptr(b.add(scales, b.mul(first, integer(2))), pointer(I16))
        sizes = [b.mul(steps, integer(tiles * made.right)), integer(tiles * columns * 8), integer(columns * 8)]
        asked = [b.add(start, b.mul(first_group, size)) for start, size in zip(asked, sizes, strict=True)]
        right, weights, constant = (b.inttoptr(x, pointer(kind)) for x, kind in zip(asked, (I8, F64, F64), strict=True))
        size = b.mul(steps, integer(TILE_STEP[bits]))
        safe = safe_rows(b, b.sub(there, first), rows, stride, size, TILE_BLOCK)
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


def _lefts(tiles: int) -> tuple[int, ...]:
    """The tiles that the halves of a block are loaded to."""
    return (4, 6) if tiles == 1 else (6, 6)


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
        x = masked_load(b, start, mask, BYTES, align=1)
        _put(b, x, b.gep(to, [b.add(b.mul(row, held), at)]))


def _score(made: _Loop, rows: _Rows) -> None:
    """wide += the rows' sums: as many steps of a row as right tiles stay in cache, block after block of rows."""
    b, fn, span = made.b, made.fn, TILE_SPAN[made.tiles]
    blocks = up(b, rows.count, TILE_BLOCK)
    some = b.zext(b.icmp_signed(">", blocks, integer(0)), I64)
    passes = b.mul(some, up(b, rows.steps, span))
    with loop(b, fn, passes) as number:
        start = b.mul(number, integer(span))
        steps = least(b, b.sub(rows.steps, start), integer(span))
        first = b.gep(rows.codes, [b.mul(start, integer(TILE_STEP[made.bits]))])
        size = b.mul(rows.stride, integer(TILE_BLOCK))
        last = b.gep(first, [b.mul(b.sub(blocks, integer(1)), size)])
        source = _Source(rows.stride, b.mul(rows.stride, integer(3)), size, b.sdiv(steps, integer(made.planes)), last)
        state = [integer(0), first, integer(0), integer(0)]
        for slot in range(made.ahead):
            for row in _staging(made, source, state, b.gep(made.ring, [integer(slot * made.slot)])):
                row()
            state = [state[0], *_next(made, source, state)]
        false, none = ir.Constant(I1, 0), integer(0)
        state += _sums(made, rows, _Into(none, none, none, false), made.space, false).values()
        begins = b.icmp_signed("==", number, integer(0))

        def block(state: list[Value]) -> list[Value]:
            turn, *state = state
            count = least(b, b.sub(rows.count, b.mul(turn, integer(TILE_BLOCK))), integer(TILE_BLOCK))

            def group(state: list[Value]) -> list[Value]:
                group, *state = state
                skipped = b.add(b.mul(group, rows.steps), start)
                right = b.gep(rows.right, [b.mul(skipped, integer(made.tiles * made.right))])
                into = _Into(group, b.mul(turn, integer(TILE_BLOCK)), count, begins)
                return [b.add(group, integer(1)), *_multiply(made, rows, source, into, right, steps, state)]

            _, *state = repeat(b, fn, made.groups, [integer(0), *state], group)
            return [b.add(turn, integer(1)), *state]

        _, *state = repeat(b, fn, blocks, [integer(0), *state], block)
        made.weigh(Sums(*state[4:]), integer(TILE_BLOCK))


def _staging(made: _Loop, source: _Source, state: list[Value], to: Value) -> list[Callable[[], None]]:
    """What stages a column of a block, row by row, as bytes of left tiles: the codes as they are; or of int4 sixteen
    times a number, the low halves of 64 bytes and in the next step's tiles their high halves; or of sign 1 where a bit
    is set, bits 0 to 3 of sixteen bytes and in the next step's tiles bits 4 to 7. A tile is loaded at once from rows of
    64 bytes that begin where cache lines do, and slowly from others. `state` is the ring's place, the block, and its
    column."""
    b, (_, block, column, _) = made.b, state
    start = b.gep(block, [b.mul(column, integer(TILE_STEP[made.bits] * made.planes))])
    fours = [start]
    for _ in range(TILE_BLOCK // 4 - 1):
        fours.append(b.gep(fours[-1], [b.shl(source.stride, integer(2))]))
    offsets = (integer(0), source.stride, b.shl(source.stride, integer(1)), source.thrice)

    def one(row: int) -> None:
        place = b.gep(fours[row // 4], [offsets[row % 4]])
        if made.bits == "sign":
            two = ir.VectorType(I64, 2)
            sixteen = b.load(b.bitcast(place, pointer(two)), align=1)
            sixteen = b.shuffle_vector(sixteen, sixteen, ir.Constant(ir.VectorType(I32, 8), [0, 1] * 4))
            found = [bits_as_bytes(b, b.bitcast(sixteen, BYTES), plane) for plane in range(made.planes)]
        else:
            found = [b.load(b.bitcast(place, pointer(BYTES)), align=1)]
        if made.bits == "int4":
            high = ir.Constant(BYTES, [-16] * TILE_BYTES)
            found = [b.shl(found[0], ir.Constant(BYTES, [4] * TILE_BYTES)), b.and_(found[0], high)]
        for plane, x in enumerate(found):
            _put(b, x, b.gep(to, [integer(plane * HALVES * TILE + row * TILE_BYTES)]))

    return [lambda row=row: one(row) for row in range(TILE_BLOCK)]


def _next(made: _Loop, source: _Source, state: list[Value]) -> list[Value]:
    """The block and column that are staged then, and for which group: the last block again after the last one."""
    b, (_, block, column, turn) = made.b, state
    column = b.add(column, integer(1))
    ends = b.icmp_signed("==", column, source.columns)
    turn = b.add(turn, b.zext(ends, I64))
    done = b.icmp_signed("==", turn, made.groups)
    goes = b.and_(done, b.icmp_unsigned("<", block, source.last))
    block = b.gep(block, [b.select(goes, source.size, integer(0))])
    return [block, b.select(ends, integer(0), column), b.select(done, integer(0), turn)]


def bits_as_bytes(b: Value, x: Value, plane: int) -> Value:
    """Of the k-th sixteen bytes their bits 4 plane + k: 0 or 1. Each eight bytes of the other factor are a matrix over
    two numbers, a byte a row, the lowest bit's last (GF2P8AFFINEQB)."""
    rows = [1 << 4 * plane + k // 2 if byte == 7 else 0 for k in range(8) for byte in range(8)]
    fn = declared(b, "llvm.x86.vgf2p8affineqb.512", BYTES, [BYTES, BYTES, I8])
    return b.call(fn, [x, ir.Constant(BYTES, [row - 256 if row > 127 else row for row in rows]), ir.Constant(I8, 0)])


def _asking(made: _Loop, source: _Source, state: list[Value]) -> list[Callable[[], None]]:
    """What asks memory, line by line, for what will be read soon: its answer takes longer than a block."""
    b, (_, block, column, _) = made.b, state
    size = TILE_BLOCK * TILE_STEP[made.bits] * made.planes
    start = b.gep(block, [b.select(b.icmp_signed(">", source.size, integer(AHEAD)), source.size, integer(AHEAD))])
    start = b.gep(start, [b.mul(column, integer(size))])

    return [lambda line=line: ask(b, b.gep(start, [integer(line)])) for line in range(0, size, TILE_BYTES)]


def _multiply(
    made: _Loop, rows: _Rows, source: _Source, into: _Into, right: Value, steps: Value, state: list[Value]
) -> list[Value]:
    """The products of a block of rows with the tiles of a group, piece after piece. Meanwhile what comes next is
    staged, and the sums that are left of the piece before are weighed."""
    b, fn, piece = made.b, made.fn, TILE_PIECE[made.bits]
    vectors = TILE_BLOCK * made.columns // LANES  # of sums, which are spread over the columns of a block
    some = b.sdiv(b.add(source.columns, integer(vectors - 1)), source.columns)

    def column(state: list[Value]) -> list[Value]:
        right, *cursor = state[:5]
        _column(made, source, right, cursor)
        at = made.wrapped(b.add(cursor[0], integer(made.slot)))
        right = b.gep(right, [integer(made.planes * made.tiles * made.right)])
        return [right, at, *_next(made, source, cursor), *made.weigh(Sums(*state[5:]), some).values()]

    def part(state: list[Value]) -> list[Value]:
        number, *state = state
        for tile in range(made.tiles * HALVES):
            tile_zero(b, tile)
        count = least(b, b.sub(steps, b.mul(number, integer(piece))), integer(piece))
        (*state,) = repeat(b, fn, b.sdiv(count, integer(made.planes)), state, column)
        last = made.weigh(Sums(*state[5:]), integer(vectors))
        held = b.inttoptr(b.xor(b.ptrtoint(last.held, I64), made.turned), pointer(I8))
        for tile in range(made.tiles * HALVES):
            tile_store(b, tile, b.gep(held, [integer(tile * TILE)]), integer(made.width))
        begins = b.and_(into.begins, b.icmp_signed("==", number, integer(0)))
        return [b.add(number, integer(1)), *state[:5], *_sums(made, rows, into, held, begins).values()]

    pieces = up(b, steps, piece)
    _, _, *state = repeat(b, fn, pieces, [integer(0), right, *state], part)
    return state


def _sums(made: _Loop, rows: _Rows, into: _Into, held: Value, begins: Value) -> Sums:
    """The sums of a block with a group, of which none is weighed yet."""
    b, columns, group = made.b, integer(made.columns), into.group
    return Sums(
        held,
        b.gep(rows.wide, [b.add(b.mul(group, made.apart), b.mul(into.first, columns))]),
        b.gep(rows.scales, [into.first]),
        b.gep(rows.weights, [b.mul(group, b.mul(columns, integer(made.tiles)))]),
        b.gep(rows.constant, [b.mul(group, columns)]),
        into.count,
        begins,
        b.and_(made.new, begins),
        integer(0),
    )


def _column(made: _Loop, source: _Source, right: Value, state: list[Value]) -> None:
    """A column of the block times its right tiles, each of which is loaded once, and the halves of the block in an
    order that loads few of them anew; among the products are spread the stores of a column that comes later, and what
    asks memory for one after it."""
    b, at = made.b, state[0]
    now = b.gep(made.ring, [at])
    later = made.wrapped(b.add(at, integer(made.ahead * made.slot)))
    others = [_asking(made, source, state), _staging(made, source, state, b.gep(made.ring, [later]))]
    turns = list(itertools.product(range(made.planes), range(made.tiles), range(HALVES)))
    kind = "bfloat16" if made.bits == "bfloat16" else "int8"
    there = None
    for number, (plane, tile, half) in enumerate(turns):
        half = half ^ tile & 1
        if number % HALVES == 0:
            start = integer((plane * made.tiles + tile) * made.right)
            tile_load(b, 7, b.gep(right, [start]), integer(made.width))
        if there != (plane, half):
            start = integer((plane * HALVES + half) * TILE)
            tile_load(b, made.lefts[half], b.gep(now, [start]), integer(TILE_BYTES))
        there = plane, half
        tile_product(b, kind, half * made.tiles + tile, made.lefts[half], 7)
        for each in others:
            for one in each[len(each) * number // len(turns) : len(each) * (number + 1) // len(turns)]:
                one()


def _put(b: Value, x: Value, to: Value) -> None:
    b.store(x, b.bitcast(to, pointer(x.type)), align=64)

"""How the sides of pairs come to where tiles are loaded from, as LLVM code: 32 pairs at a time, in bfloat16.

A tile is loaded at once from rows that begin where lines of the cache do, and slowly from others (docs/log.md), so that
v is copied. A v of up to 64 numbers is written as often as X has pieces, one copy behind the other, where that fills
fewer tiles than each piece by itself. u is read where it is stored; of int4 and sign it is decoded, too. Needs
llvmlite, so nothing but compiled.py imports it, by way of pairtiles.py, where the products are.
"""

import struct  # noqa: I001
from typing import NamedTuple

from llvmlite import ir  # pyright: ignore[reportMissingImports]

from .compiled import PLANES
from .llvm import (
    F32, I1, I8, I16, I32, I64, TILE_BYTES, Value, address, ask, declared, integer, least, load, loop, pointer, store,
    up,
)  # fmt: skip
from .pairprograms import PAIRS, SLACK, PairLine

AHEAD = 2  # groups that memory is asked for before they are read
WORDS = TILE_BYTES // 2  # numbers of a line of bfloat16
TOGETHER, TURNS = 8, PAIRS // 8  # pairs that are brought at a time, and how often
WORD = ir.VectorType(I16, WORDS)
AT_ONCE = {"bfloat16": 64, "int8": 32, "int4": 32, "sign": 4}  # bytes of 32 numbers, or of both halves of so many
DECODED = ("int4", "sign")  # those whose u is decoded before products meet it


class Sides(NamedTuple):
    """Where 32 pairs are: v in bfloat16, and u, which of int8 is as it is stored, with the bytes from pair to pair, and
    their scales."""

    v: Value
    size_v: Value
    u: Value
    size_u: Value
    scale: Value | None


class Groups:
    """The groups of 32 pairs of one block. Of the last pairs, where more would be read than there is, a copy is read.
    Three groups have room: the one that is multiplied, the one before it, whose u is still wanted, and the next."""

    def __init__(self, b: Value, fn: Value, line: PairLine, n: Value, space: Value, bits: str):
        self.b, self.fn, self.line, self.n, self.space, self.bits = b, fn, line, n, space, bits
        self.stored = [(line.v, line.size_v), (line.u, line.size_u)]
        if bits in PLANES:
            self.stored.append((line.scale, integer(2)))

    def begin(self, group: Value) -> None:
        """Before its turns: what is copied of the last pairs."""
        b = self.b
        for i, (_, size) in enumerate(self.stored):
            room, here, inside = self._place(group, i)
            with b.if_then(b.not_(inside)):
                left = b.sub(self.n, b.mul(group, integer(PAIRS)))
                fn = b.module.declare_intrinsic("llvm.memcpy", [pointer(I8), pointer(I8), I64])
                b.call(fn, [room, here, b.mul(least(b, left, integer(PAIRS)), size), ir.Constant(I1, 0)])

    def bring(self, group: Value, turn: Value) -> None:
        """One of TURNS parts of the group is made ready."""
        line = self.line
        self._ask(line, self.b.add(group, integer(AHEAD)), turn)
        self._bring(group, turn, 0, line.wide_v, line.order)
        if self.bits in DECODED:
            self._bring(group, turn, 1, line.wide_u, None)

    def of(self, group: Value) -> Sides:
        line, scale = self.line, self._read(group, 2) if self.bits in PLANES else None
        u = (self._room(group, 4), line.wide_u) if self.bits in DECODED else (self._read(group, 1), line.size_u)
        return Sides(self._room(group, 3), line.wide_v, *u, scale)

    def _room(self, group: Value, i: int) -> Value:
        b = self.b
        number = b.add(b.mul(b.srem(group, integer(3)), integer(5)), integer(i))
        return b.gep(self.space, [b.mul(self.line.room, number)])

    def _place(self, group: Value, i: int) -> tuple[Value, Value, Value]:
        """The room for a copy of the group's v, u or scales, where they are, and whether they are read there."""
        b, (start, size) = self.b, self.stored[i]
        first = b.mul(group, integer(PAIRS))
        beyond = b.mul(b.sub(b.sub(self.n, first), integer(PAIRS)), size)
        here = b.gep(address(b, start, I8), [b.mul(first, size)])
        return self._room(group, i), here, b.icmp_signed(">=", beyond, integer(SLACK))

    def _read(self, group: Value, i: int) -> Value:
        """Where the group's v, u or scales are read."""
        room, here, inside = self._place(group, i)
        return self.b.select(inside, here, room)

    def foresee(self, following: PairLine) -> None:
        """Memory is asked for the groups that another block begins with."""
        for i in range(AHEAD):
            with loop(self.b, self.fn, integer(TURNS)) as turn:
                self._ask(following, integer(i), turn)

    def _ask(self, line: PairLine, group: Value, turn: Value) -> None:
        """Memory is asked for what will be read soon: groups begin in pages that the processor does not foresee."""
        b = self.b
        first = b.add(b.mul(group, integer(PAIRS)), b.mul(turn, integer(TOGETHER)))
        for start, size in ((line.v, line.size_v), (line.u, line.size_u)):
            here = b.gep(address(b, start, I8), [b.mul(first, size)])
            with loop(b, self.fn, up(b, b.mul(size, integer(TOGETHER)), TILE_BYTES)) as number:
                ask(b, b.gep(here, [b.mul(number, integer(TILE_BYTES))]))

    def _bring(self, group: Value, turn: Value, i: int, wide: Value, order: Value | None) -> None:
        """Eight sides as bfloat16, `wide` bytes apart, in an order if there is one."""
        b, size, first = self.b, self.stored[i][1], self.b.mul(turn, integer(TOGETHER))
        here, there = self._read(group, i), self._room(group, 3 + i)
        sides = [b.gep(here, [b.mul(b.add(first, integer(k)), size)]) for k in range(TOGETHER)]
        rows = [b.gep(there, [b.mul(b.add(first, integer(k)), wide)]) for k in range(TOGETHER)]
        if order is None:
            self._numbers(sides, size, rows)
            return
        with b.if_else(b.icmp_signed("==", order, integer(0))) as (then, otherwise):
            with then:
                self._numbers(sides, size, rows)
            with otherwise:
                one = 0 if self.bits == "int4" else AT_ONCE[self.bits]
                with b.if_else(b.icmp_signed("<=", size, integer(one))) as (narrow, wider):
                    with narrow:
                        self._ordered(sides, rows, address(b, order, I16), halves=1)
                    with wider:
                        self._ordered(sides, rows, address(b, order, I16), halves=2)

    def _ordered(self, sides: list[Value], rows: list[Value], order: Value, *, halves: int) -> None:
        """Whole lines of the numbers that an order names, of 32 or of 64 of them."""
        b, steps = self.b, self.line.steps
        found = [words(b, side, self.bits)[:halves] for side in sides]
        permuted = declared(b, "llvm.x86.avx512.permvar.hi.512", WORD, [WORD] * 2)
        upper = b.gep(order, [b.mul(steps, integer(WORDS))])
        with loop(b, self.fn, steps) as line:
            index = load(b, order, I16, b.mul(line, integer(WORDS)), align=2, lanes=WORDS)
            mask = b.load(b.gep(b.bitcast(upper, pointer(I32)), [line]), align=4)
            for numbers, row in zip(found, rows, strict=True):
                x, *more = (b.call(permuted, [half, index]) for half in numbers)
                for y in more:
                    x = b.select(b.bitcast(mask, ir.VectorType(I1, WORDS)), y, x)
                store(b, x, b.gep(row, [b.mul(line, integer(TILE_BYTES))]))

    def _numbers(self, sides: list[Value], size: Value, rows: list[Value]) -> None:
        """All numbers, 32 at a time: what a plane of int4 writes too far the next plane writes over."""
        b, step = self.b, AT_ONCE[self.bits]
        count = up(b, size, step)
        for plane in range(PLANES.get(self.bits, 1)):
            with loop(b, self.fn, count) as number:
                at = b.add(b.mul(number, integer(WORDS)), b.mul(size, integer(plane)))
                for side, row in zip(sides, rows, strict=True):
                    x = words(b, b.gep(side, [b.mul(number, integer(step))]), self.bits)[plane]
                    store(b, x, b.gep(row, [b.mul(at, integer(2))]))


def words(b: Value, side: Value, bits: str) -> tuple[Value, Value]:
    """64 numbers from there on in bfloat16, as two times 32: of int4 the lower halves of 32 bytes and the upper."""
    if bits == "bfloat16":
        low, high = (load(b, side, I8, integer(k * TILE_BYTES), align=1, lanes=TILE_BYTES) for k in (0, 1))
        return b.bitcast(low, WORD), b.bitcast(high, WORD)
    if bits == "int8":
        low, high = (_bytes(b, side, k * WORDS) for k in (0, 1))
        return low, high
    if bits == "sign":
        held = [b.load(b.bitcast(b.gep(side, [integer(4 * k)]), pointer(I32)), align=1) for k in (0, 1)]
        low, high = (
            b.select(b.bitcast(x, ir.VectorType(I1, WORDS)), _words(0xBF80), _words(0x3F80)) for x in held
        )  # -1 and 1
        return low, high
    x = b.zext(load(b, side, I8, integer(0), align=1, lanes=WORDS), WORD)
    table = ir.Constant(WORD, [NIBBLES[i % 16] for i in range(WORDS)])
    look = declared(b, "llvm.x86.avx512.permvar.hi.512", WORD, [WORD] * 2)
    return b.call(look, [table, x]), b.call(look, [table, b.lshr(x, _words(4))])


def _words(x: int) -> Value:
    return ir.Constant(WORD, [x] * WORDS)


def _bytes(b: Value, side: Value, at: int) -> Value:
    """32 integers of a byte as bfloat16, which holds them exactly: the upper halves of float32."""
    x = b.sitofp(load(b, side, I8, integer(at), align=1, lanes=WORDS), ir.VectorType(F32, WORDS))
    halves = b.bitcast(x, ir.VectorType(I16, 2 * WORDS))
    return b.shuffle_vector(halves, halves, ir.Constant(ir.VectorType(I32, WORDS), list(range(1, 2 * WORDS, 2))))


def _bfloat16(x: int) -> int:
    """The bits of a small integer in bfloat16."""
    return struct.unpack("<I", struct.pack("<f", x))[0] >> 16


NIBBLES = [_bfloat16(x - 16 if x > 7 else x) for x in range(16)]  # of int4, by their bits

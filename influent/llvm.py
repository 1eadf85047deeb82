"""Pieces of LLVM code: loops, vectors of sixteen numbers and their sums, and the matrix tiles of x86 (AMX).

What the loops over stored rows are made of. It needs llvmlite, so only loops.py, tiles.py and their like import it,
which only compiled.py imports. Not here: what is computed.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir  # pyright: ignore[reportMissingImports]

from .compiled import LANES

Value = Any  # llvmlite has no types
I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F32, F64 = ir.FloatType(), ir.DoubleType()
ZERO = ir.Constant(ir.VectorType(F32, LANES), [0.0] * LANES)


def function(name: str, types: Sequence[Value]) -> tuple[Value, Value]:
    fn = ir.Function(ir.Module(), ir.FunctionType(ir.VoidType(), types), name)
    return fn, ir.IRBuilder(fn.append_basic_block())


def finished(b: Value) -> str:
    b.ret_void()
    return str(b.module)


@contextmanager
def loop(b: Value, fn: Value, count: Value) -> Iterator[Value]:
    """`with loop(...) as i`: what follows is done for i = 0 to count - 1."""
    before = b.block
    head, body, end = (fn.append_basic_block() for _ in range(3))
    b.branch(head)
    b.position_at_end(head)
    i = b.phi(I64)
    b.cbranch(b.icmp_signed("<", i, count), body, end)
    b.position_at_end(body)
    yield i
    i.add_incoming(integer(0), before)
    i.add_incoming(b.add(i, integer(1)), b.block)
    b.branch(head)
    b.position_at_end(end)


def repeat(b: Value, fn: Value, count: Value, state: list[Value], body: Callable[[list[Value]], list[Value]]):
    """The state after `count` times `body`, in registers all along."""
    before = b.block
    head, inside, end = (fn.append_basic_block() for _ in range(3))
    b.branch(head)
    b.position_at_end(head)
    left, held = b.phi(I64), [b.phi(x.type) for x in state]
    b.cbranch(b.icmp_signed(">", left, integer(0)), inside, end)
    b.position_at_end(inside)
    for phi, start, next_ in zip([left, *held], [count, *state], [b.sub(left, integer(1)), *body(held)], strict=True):
        phi.add_incoming(start, before)
        phi.add_incoming(next_, b.block)
    b.branch(head)
    b.position_at_end(end)
    return held


def load(b: Value, start: Value, of: Value, offset: Value, *, align: int, lanes: int = LANES) -> Value:
    return b.load(b.bitcast(b.gep(start, [offset]), pointer(ir.VectorType(of, lanes))), align=align)


def store(b: Value, x: Value, to: Value) -> None:
    b.store(x, b.bitcast(to, pointer(x.type)), align=4)


def spread(b: Value, x: Value, count: int = LANES) -> Value:
    """Sixteen times x, or `count` times."""
    one = b.insert_element(ir.Constant(ir.VectorType(x.type, count), ir.Undefined), x, ir.Constant(I32, 0))
    return b.shuffle_vector(one, one, ir.Constant(ir.VectorType(I32, count), [0] * count))


def total(b: Value, parts: Sequence[Value]) -> Value:
    """The sum of all lanes, float64 of a float32 sum: halves are added to halves."""
    parts = list(parts)
    while len(parts) > 1:
        parts = [b.fadd(x, y) for x, y in zip(parts[::2], parts[1::2], strict=False)] + parts[len(parts) & ~1 :]
    return b.fpext(over(b, parts[0], b.fadd), F64)


def over(b: Value, x: Value, both: Callable[[Value, Value], Value]) -> Value:
    """All lanes together: halves with halves."""
    lanes = x.type.count
    while lanes > 1:
        lanes //= 2
        halves = [ir.Constant(ir.VectorType(I32, lanes), list(range(lo, lo + lanes))) for lo in (0, lanes)]
        x = both(*(b.shuffle_vector(x, ir.Constant(x.type, ir.Undefined), half) for half in halves))
    return b.extract_element(x, ir.Constant(I32, 0))


def least(b: Value, x: Value, y: Value) -> Value:
    """The lesser of two integers."""
    return b.select(b.icmp_signed("<", x, y), x, y)


def declared(b: Value, name: str, result: Value, kinds: Sequence[Value]) -> Value:
    """The function of LLVM by this name, declared once a module."""
    found = b.module.globals.get(name)
    return found if found is not None else ir.Function(b.module, ir.FunctionType(result, kinds), name)


def pointer(of: Value) -> Value:
    return of.as_pointer()


def integer(x: int) -> Value:
    return ir.Constant(I64, x)


def address(b: Value, x: Value, of: Value) -> Value:
    """The number as an address."""
    return b.inttoptr(x, pointer(of))


def line_of(b: Value, table: Value, number: Value, kind: Any) -> Any:
    """A line of a table of int64, whose numbers are the fields of the named tuple `kind`."""
    fields = len(kind._fields)
    return kind(*(b.load(b.gep(table, [b.add(b.mul(number, integer(fields)), integer(i))])) for i in range(fields)))


def up(b: Value, x: Value, by: int) -> Value:
    """x / by, rounded up."""
    return b.sdiv(b.add(x, integer(by - 1)), integer(by))


def masked_load(b: Value, at: Value, mask: Value, kind: Value, *, align: int) -> Value:
    """A vector from memory where the mask is set, zeros elsewhere, where nothing is read."""
    number = {F32: "f32", F64: "f64"}.get(kind.element) or str(kind.element)
    given = [b.bitcast(at, pointer(kind)), ir.Constant(I32, align), mask, ir.Constant(kind, [0] * kind.count)]
    name = f"llvm.masked.load.v{kind.count}{number}.p0"
    return b.call(declared(b, name, kind, [x.type for x in given]), given)


def ask(b: Value, place: Value) -> None:
    """Memory is asked for the line there, which may be beyond what there is."""
    fn = declared(b, "llvm.prefetch.p0", ir.VoidType(), [pointer(I8), *[I32] * 3])
    b.call(fn, [place, *(ir.Constant(I32, x) for x in (0, 2, 1))])


def all_lanes(of: Value, x: int | float) -> Value:
    return ir.Constant(ir.VectorType(of, LANES), [x] * LANES)


TILE_ROWS, TILE_BYTES = 16, 64  # of each of the eight tiles: sixteen rows of sixteen accumulators, or of 64 bytes


def tiles_begin(b: Value, widths: Sequence[int] = (TILE_BYTES,) * 8) -> None:
    """Eight tiles of TILE_ROWS rows of so many bytes, for what follows up to `tiles_end`."""
    shape = [1, *[0] * 15, *(x for width in widths for x in (width, 0)), *[0] * 16, *[TILE_ROWS] * 8, *[0] * 8]
    held: Any = ir.GlobalVariable(b.module, ir.ArrayType(I8, 64), "shape")
    held.linkage, held.global_constant = "internal", True
    held.initializer = ir.Constant(held.value_type, shape)
    _tile(b, "ldtilecfg", b.bitcast(held, pointer(I8)))


def tiles_end(b: Value) -> None:
    """The tiles are as they were found: whoever uses them next says their shape anew."""
    _tile(b, "tilerelease")


def tile_zero(b: Value, tile: int) -> None:
    _tile(b, "tilezero", tile)


def tile_load(b: Value, tile: int, start: Value, stride: Value) -> None:
    """The tile's rows from memory, `stride` bytes apart."""
    _tile(b, "tileloadd64", tile, start, stride)


def tile_store(b: Value, tile: int, start: Value, stride: Value) -> None:
    _tile(b, "tilestored64", tile, start, stride)


def tile_product(b: Value, kind: str, into: int, left: int, right: int) -> None:
    """into += left right: with kind `int8` sums of int32 over 64 signed bytes of a row of `left`, with `bfloat16` of
    float32 over 32 numbers, of which subnormal ones count as zero. Row k of `right` has, for each of 16 columns, the
    four bytes, or the two numbers, from the 4 k-th or 2 k-th on."""
    _tile(b, {"int8": "tdpbssd", "bfloat16": "tdpbf16ps"}[kind], into, left, right)


def _tile(b: Value, name: str, *arguments: Any) -> None:
    """One instruction on tiles, whose numbers are part of it."""
    given = [ir.Constant(I8, x) if isinstance(x, int) else x for x in arguments]
    b.call(declared(b, f"llvm.x86.{name}", ir.VoidType(), [x.type for x in given]), given)

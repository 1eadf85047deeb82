"""Loops over stored rows as LLVM code, for vectors of sixteen numbers; LLVM cuts those to what the machine has.

The order of the sums is the code's, whatever the machine and whatever rows come together: sixteen lanes and a few
accumulators a row, added in pairs at last. Here is what is compiled; compiled.py has it compiled and calls it. This
module needs llvmlite, so nothing but compiled.py imports it. Not here: the pieces that loops are made of (llvm.py), the
loops for machines with matrix tiles (tiles.py, pairtiles.py).
"""

from collections.abc import Sequence  # noqa

from llvmlite import ir  # pyright: ignore[reportMissingImports]

from .compiled import LANES, PAIRS, PLANES, STEP
from .llvm import (
    F32, F64, I1, I8, I16, I32, I64, ZERO, Value, all_lanes, finished, function, integer, load, loop, pointer, repeat,
    spread, store, total, up,
)  # fmt: skip


def product(bits: str, tile: int, unroll: int) -> str:
    """The module of a function that adds <codes of a row, query> to out for each row and each of `tile` queries.

    (codes, bytes from row to row, rows, trips, rest, tail, q, out, numbers from query to query in out): of a row
    `trips` times `unroll` steps are read, then `rest` steps, then, unless `tail` is negative, the one that starts
    there. `q` has for each step its planes, each with sixteen float32 for each query. Of signs the sum is over the set
    bits alone.
    """
    fn, b = function("product", [pointer(I8), I64, I64, I64, I64, I64, pointer(F32), pointer(F64), I64])
    codes, stride, n, trips, rest, tail, q, out, apart = fn.args
    planes, each = PLANES[bits], unroll * PLANES[bits]  # accumulators of one query
    with loop(b, fn, n) as number:
        row = b.gep(codes, [b.mul(stride, number)])
        state = [integer(0), q, *[ZERO] * (tile * each)]
        for count, steps, where in ((trips, unroll, None), (rest, 1, None), (_not_negative(b, tail), 1, tail)):

            def body(state: list[Value], steps: int = steps, where: Value = where) -> list[Value]:
                at, asked, *sums = state
                first = at if where is None else where
                for step in range(steps):
                    decoded = decode(b, row, b.add(first, integer(step * STEP[bits])), bits)
                    for plane, x in enumerate(decoded):
                        for query in range(tile):
                            y = load(b, asked, F32, integer(((step * planes + plane) * tile + query) * LANES), align=4)
                            k = query * each + step * planes + plane
                            sums[k] = _accumulate(b, sums[k], x, y)
                after = b.gep(asked, [integer(steps * planes * tile * LANES)])
                return [b.add(at, integer(steps * STEP[bits])), after, *sums]

            state = repeat(b, fn, count, state, body)
        for query in range(tile):
            place = b.gep(out, [b.add(b.mul(apart, integer(query)), number)])
            found = total(b, state[2 + query * each : 2 + (query + 1) * each])
            b.store(b.fadd(b.load(place), found), place)
    return finished(b)


def between(bits: str, width: int) -> str:
    """The module of a function that writes v_p^T X u_p to out[p] for each pair p of codes.

    (v, bytes of a side of it, u, bytes of a side of it, pairs, X, numbers of v, numbers of a row of X, first column,
    space, numbers of a side in it, out): of X the `width` times 16 columns from the first on are taken, and what is
    beyond the numbers of u there must be zero. Whole steps of a side are read: up to 15 bytes beyond the last. The
    space is for the numbers of 2 PAIRS sides, each LANES longer than whole steps, and finite.
    """
    side = [pointer(I8), I64]
    fn, b = function("between", [*side, *side, I64, pointer(F32), I64, I64, I64, pointer(F32), I64, pointer(F64)])
    v, size_v, u, size_u, n, x, a, wide, first_column, space, pad, out = fn.args
    with loop(b, fn, up(b, n, PAIRS)) as group:
        inputs, outputs, places = [], [], []
        for k in range(PAIRS):
            number = b.add(b.mul(group, integer(PAIRS)), integer(k))
            number = b.select(b.icmp_signed("<", number, n), number, b.sub(n, integer(1)))  # the last is done again
            places.append(b.gep(out, [number]))
            for codes, size, sides, at in ((v, size_v, inputs, k), (u, size_u, outputs, PAIRS + k)):
                sides.append(b.gep(space, [b.mul(pad, integer(at))]))
                _unpack_steps(b, fn, b.gep(codes, [b.mul(size, number)]), size, sides[-1], bits)
        columns = b.gep(x, [first_column])

        def body(state: list[Value]) -> list[Value]:
            i, row, *sums = state
            parts = [load(b, row, F32, integer(k * LANES), align=4) for k in range(width)]
            for pair in range(PAIRS):
                factor = spread(b, b.load(b.gep(inputs[pair], [i]), align=4))
                for k in range(width):
                    sums[pair * width + k] = _accumulate(b, sums[pair * width + k], factor, parts[k])
            return [b.add(i, integer(1)), b.gep(row, [wide]), *sums]

        _, _, *sums = repeat(b, fn, a, [integer(0), columns, *[ZERO] * (PAIRS * width)], body)
        for pair in range(PAIRS):
            side = b.gep(outputs[pair], [first_column])
            parts = [load(b, side, F32, integer(k * LANES), align=4) for k in range(width)]
            products = [b.fmul(sums[pair * width + k], parts[k]) for k in range(width)]
            b.store(total(b, products), places[pair])
    return finished(b)


def unpack(bits: str) -> str:
    """The module of a function that writes the codes of rows as float32.

    (codes, bytes of a row, rows, numbers of a row, out)
    """
    fn, b = function("unpack", [pointer(I8), I64, I64, I64, pointer(F32)])
    codes, size, n, length, out = fn.args
    step, planes = STEP[bits], PLANES[bits]
    with loop(b, fn, n) as row:
        here, there = b.gep(codes, [b.mul(row, size)]), b.gep(out, [b.mul(row, length)])
        # Whole steps that end within the row: an odd number of int4 leaves half of the last byte without a number.
        per = LANES * planes // step
        whole = b.sdiv(b.sdiv(length, integer(per)), integer(step))
        with loop(b, fn, whole) as i:
            at = b.mul(i, integer(step))
            for plane, x in enumerate(decode(b, here, at, bits)):
                to = b.add(b.mul(i, integer(LANES)), b.mul(size, integer(plane)))
                store(b, _numbers(b, x), b.gep(there, [to]))
        for plane in range(planes):
            end = length if planes == 1 else size if plane == 0 else b.sub(length, size)
            done = b.mul(whole, integer(LANES))
            with loop(b, fn, b.sub(end, done)) as i:
                number = b.add(done, i)
                x = _one(b, here, number, bits, plane)
                b.store(x, b.gep(there, [b.add(number, b.mul(size, integer(plane)))]), align=4)
    return finished(b)


def _unpack_steps(b: Value, fn: Value, codes: Value, size: Value, to: Value, bits: str) -> None:
    """The numbers of one side as float32, in whole steps: what a plane writes too far the next plane writes over."""
    step = STEP[bits]
    for plane in range(PLANES[bits]):
        with loop(b, fn, up(b, size, step)) as i:
            x = _numbers(b, decode(b, codes, b.mul(i, integer(step)), bits)[plane])
            store(b, x, b.gep(to, [b.add(b.mul(i, integer(LANES)), b.mul(size, integer(plane)))]))


def decode(b: Value, row: Value, at: Value, bits: str) -> list[Value]:
    """The planes of the step that starts at byte `at`: float32, or of signs what bits are set."""
    if bits == "sign":
        return [b.bitcast(b.load(b.bitcast(b.gep(row, [at]), pointer(I16)), align=1), ir.VectorType(I1, LANES))]
    numbers = ir.VectorType(F32, LANES)
    x = b.sext(load(b, row, I8, at, align=1), ir.VectorType(I32, LANES))
    if bits == "int8":
        return [b.sitofp(x, numbers)]
    low = b.ashr(b.shl(x, all_lanes(I32, 28)), all_lanes(I32, 28))
    return [b.sitofp(low, numbers), b.sitofp(b.ashr(x, all_lanes(I32, 4)), numbers)]


def _one(b: Value, row: Value, number: Value, bits: str, plane: int) -> Value:
    """One number of a plane, float32."""
    byte = b.lshr(number, integer(3)) if bits == "sign" else number
    x = b.sext(b.load(b.gep(row, [byte])), I32)
    if bits == "sign":
        bit = b.and_(b.lshr(x, b.trunc(b.and_(number, integer(7)), I32)), ir.Constant(I32, 1))
        return b.sitofp(b.sub(ir.Constant(I32, 1), b.shl(bit, ir.Constant(I32, 1))), F32)
    if bits == "int4":
        x = b.ashr(x if plane else b.shl(x, ir.Constant(I32, 28)), ir.Constant(I32, 4 if plane else 28))
    return b.sitofp(x, F32)


def _numbers(b: Value, x: Value) -> Value:
    """What was decoded as numbers: of bits -1 where they are set, else 1."""
    return b.select(x, all_lanes(F32, -1.0), all_lanes(F32, 1.0)) if x.type.element == I1 else x


def _accumulate(b: Value, total: Value, x: Value, y: Value) -> Value:
    """total + x y, or where x are bits, total + y where they are set: one instruction each where the machine has it."""
    if x.type.element == I1:
        return b.select(x, b.fadd(total, y), total)
    return b.fadd(total, b.fmul(x, y, flags=["contract"]), flags=["contract"])


def _not_negative(b: Value, x: Value) -> Value:
    return b.zext(b.icmp_signed(">=", x, integer(0)), I64)

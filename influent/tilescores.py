"""The loop that makes scores of the sums of rows that the loops with tiles have weighed, as LLVM code.

The sums lie row by row, as tiles have their columns, and scores query by query; with few queries the pieces of each lie
side by side and are added. This module needs llvmlite, so nothing but compiled.py imports it.
"""

from llvmlite import ir  # pyright: ignore[reportMissingImports]  # noqa: I001

from .compiled import TILE_FEW, TILE_PIECES
from .llvm import (
    F64, I1, I32, I64, Value, declared, finished, function, integer, least, loop, masked_load, pointer, spread, up,
)  # fmt: skip

ROWS = 8  # at a time
NUMBERS, PLACES, MASK = (ir.VectorType(of, ROWS) for of in (F64, I64, I1))


def fold(tiles: int, columns: int) -> str:
    """The module of a function that adds the sums [groups, rows, columns] of `rows` rows to the scores of each query,
    which are `apart` numbers from the next one's.

    (sums, rows, queries, scores, apart): both float64.
    """
    fn, b = function("fold", [pointer(F64), I64, I64, pointer(F64), I64])
    sums, rows, queries, scores, apart = fn.args
    few, pieces = (TILE_FEW[columns], TILE_PIECES) if tiles == 1 else (columns, 1)  # queries of a group
    lanes = ir.Constant(PLACES, list(range(ROWS)))
    apart_in_sums = ir.Constant(PLACES, [columns * row for row in range(ROWS)])
    with loop(b, fn, up(b, rows, ROWS)) as turn:
        row = b.mul(turn, integer(ROWS))
        mask = b.icmp_signed("<", lanes, spread(b, least(b, b.sub(rows, row), integer(ROWS)), ROWS))
        with loop(b, fn, queries) as query:
            group, column = b.sdiv(query, integer(few)), b.srem(query, integer(few))
            start = b.add(b.mul(b.add(b.mul(group, rows), row), integer(columns)), column)
            into = b.bitcast(b.gep(scores, [b.add(b.mul(query, apart), row)]), pointer(NUMBERS))
            found = masked_load(b, into, mask, NUMBERS, align=8)
            for piece in range(pieces):
                at = b.add(spread(b, b.add(start, integer(piece * few)), ROWS), apart_in_sums)
                found = b.fadd(found, _gathered(b, sums, at, mask))
            _stored(b, found, into, mask)
    return finished(b)


def _gathered(b: Value, start: Value, at: Value, mask: Value) -> Value:
    """The numbers at some places."""
    first = spread(b, b.ptrtoint(start, I64), ROWS)
    places = b.inttoptr(b.add(first, b.shl(at, ir.Constant(PLACES, [3] * ROWS))), ir.VectorType(pointer(F64), ROWS))
    given = [places, ir.Constant(I32, 8), mask, ir.Constant(NUMBERS, [0.0] * ROWS)]
    fn = declared(b, f"llvm.masked.gather.v{ROWS}f64.v{ROWS}p0", NUMBERS, [places.type, I32, MASK, NUMBERS])
    return b.call(fn, given)


def _stored(b: Value, x: Value, at: Value, mask: Value) -> None:
    given = [x, at, ir.Constant(I32, 8), mask]
    b.call(declared(b, f"llvm.masked.store.v{ROWS}f64.p0", ir.VoidType(), [x.type for x in given]), given)

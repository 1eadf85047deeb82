"""v^T X u of stored pairs of all blocks of an index with matrix tiles (AMX), in one call for a window of rows.

A query's matrix X is three bfloat16 pieces whose sum it is, to the last bit of float32, over a power of two near its
largest number; numbers below 2^-110 of that are lost. Sides of codes become bfloat16, which holds them exactly. X^T v
is a float32 sum of up to 3 a / 32 tile products of 32 each, v^T X u one of b products in sixteen lanes and float64
every 64 columns (or the other way round, with less to do): it is off by at most (3 max(a, b) / 32 + 32) 2^-24 of the
sum of the products' sizes (Higham, Accuracy and Stability of Numerical Algorithms, section 4.2), and by 5e-7 of its
root mean square as measured. The order of the sums depends on the factors alone: a pair scores the same to the bit in
any company, on any number of threads.

Sides of a length that fills no tile are read with what follows them, times zero: of a side that is not finite the pair
before it is NaN, too. Products below 2^-126 count as zero.

Not here: the loop (pairtiles.py), which blocks it is for (kernels.py).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from .codec import PER_BYTE, Factors
from .compiled import LANES, in_parts, loop, readable

TILES = 1 << 28  # bytes of all matrices that are kept ready: of more, some are made at a time, for each window of rows
SUMS = 1 << 22  # sums of pairs and queries held at once, in float64
MATRICES = 1 << 20  # bytes of the matrices of a block that are gone through for 32 pairs, which the cache holds
STEP, PIECES, PAIRS = 32, 3, 32  # numbers of a tile along v, pieces of X, pairs side by side
TILE, LINE = 1024, 64  # bytes
SHORT = 64  # numbers of a side that may be written in an order
SLACK = 128  # bytes that are read from where a pair begins, at least
HELD = 8 << 10  # bytes of products on their way in the loop's space, twice
STATE = 1 << 9  # bytes of what it remembers of them
LEAST = 512  # rows of a thread


class PairLine(NamedTuple):
    """A line of the table of pairtiles.py: one block and some of its queries; addresses, bytes and numbers."""

    v: Any  # addresses of the first pair's sides and scale: one row of each after the other
    u: Any
    scale: Any
    x: Any  # address of the queries' matrices in pieces and tiles
    weights: Any  # address of what multiplies each query's products
    size_v: Any  # bytes of a side
    size_u: Any
    steps: Any  # tiles of v
    rounds: Any  # of X that each meets: one, where they hold all pieces one behind the other, or one of each piece
    columns: Any  # tiles along u
    tiles: Any  # bytes of one query's tiles
    first_query: Any
    queries: Any
    room: Any  # bytes of the space for a group's sides
    wide_v: Any  # bytes of a side in that space
    wide_u: Any
    order: Any  # address of what numbers of v are written there one after the other; 0 if that is all as they are


class MatrixLine(NamedTuple):
    """A line of the table of matrices that are cut to pieces: those of one block, of all queries."""

    x: Any  # address of the first query's numbers, float32; the next query's follow
    to: Any  # address of the first query's tiles
    weights: Any  # address of what each query was divided by, float64
    a: Any  # numbers along v and u
    b: Any
    along: Any  # numbers from one to the next of them
    across: Any
    apart: Any  # numbers along with what fills them up, an even number
    rounds: Any  # 1 if the pieces are one behind the other, else as many as pieces, tile by tile
    tiles: Any  # along v, of all pieces
    columns: Any  # tiles along u
    twos: Any  # of which so many have two by two the even and the odd numbers of 32


@dataclass(frozen=True, slots=True, eq=False)
class PairProgram:
    """What is asked of blocks `keys`, whose rows are `rank` pairs each, written with the same bits."""

    keys: tuple[str, ...]
    rank: int
    bits: str
    queries: Sequence[Float[Tensor, "Q _"]]
    shapes: "_Shapes"
    tables: Sequence["_Table"]  # what is ready of the queries: all of them, or nothing if their tiles take too much

    @staticmethod
    def of(keys: Sequence[str], queries: Sequence[Float[Tensor, "Q _"]], factors: Sequence[Factors], *, rank: int,
           bits: str) -> "PairProgram":  # fmt: skip
        """`queries` and `factors` (a, b) of each key; the pairs' v has a numbers and u has b. Only where
        `compiled.tiles_usable`."""
        numbers, shapes = readable(queries), _shapes(tuple(factors), bits)
        fits = len(numbers[0]) * shapes.size <= TILES
        tables = [_Table.of(numbers, shapes, rank, 0, len(numbers[0]))] if fits else []
        return PairProgram(tuple(keys), rank, bits, numbers, shapes, tables)

    def add(self, scores: Float[Tensor, "Q n"], places: Int64[np.ndarray, "blocks 3"]) -> None:
        """scores += <query, row> for n rows; `places` are the addresses of each block's v, u and scale (0 where there
        is none) at the first of them."""
        for table in self.tables or self._made():
            mine, step = places.ravel()[table.plan.places], max(1, SUMS // (table.count * self.rank))
            asked = scores[table.first : table.first + table.count]
            for lo in range(0, scores.shape[1], step):
                part = asked[:, lo : lo + step]

                def run(
                    a: int, b: int, lo: int = lo, part: Tensor = part, mine: np.ndarray = mine, table: _Table = table
                ):
                    self._run(part[:, a:b], table, mine + (lo + a) * table.plan.strides)

                in_parts(part.shape[1], LEAST, run)

    def _made(self) -> Iterator["_Table"]:
        """Tables of as many queries at a time as TILES lets."""
        step = max(1, TILES // self.shapes.size)
        for lo in range(0, len(self.queries[0]), step):
            yield _Table.of(self.queries, self.shapes, self.rank, lo, min(lo + step, len(self.queries[0])))

    def _run(self, scores: Float[Tensor, "q n"], table: "_Table", addresses: Int64[np.ndarray, "lines 3"]) -> None:
        count = scores.shape[1] * self.rank
        lines = table.lines.copy()
        lines[:, :3] = addresses
        apart = -(-count // PAIRS) * PAIRS
        out = torch.zeros(table.count, apart, dtype=torch.float64)
        space = np.zeros(STATE + 2 * HELD + 15 * self.shapes.room + LINE, np.uint8)
        loop("pairs", self.bits)(
            lines.ctypes.data, len(lines), count, out.data_ptr(), apart, _aligned(space.ctypes.data)
        )  # fmt: skip
        found = out.numpy()[:, :count]
        # NumPy, since PyTorch's modes are a thread's own, and its threads would be started by each of ours.
        scores.numpy()[...] += found if self.rank == 1 else found.reshape(len(found), -1, self.rank).sum(2)


@dataclass(frozen=True, slots=True, eq=False)
class _Table:
    """Queries `first` to first + count - 1 as the loop reads them."""

    first: int
    count: int
    plan: "_Plan"
    lines: Int64[np.ndarray, "lines fields"]  # of `PairLine`, but for the addresses of stored tensors
    held: Sequence[Tensor]  # what the lines point to

    @staticmethod
    def of(queries: Sequence[Tensor], shapes: "_Shapes", rank: int, lo: int, hi: int) -> "_Table":
        count = hi - lo
        plan = _plan(shapes, rank, count, MATRICES)
        tiles = torch.empty(64 + count * shapes.size, dtype=torch.uint8)
        weights = torch.empty(len(queries), count, dtype=torch.float64)
        held = np.array([_aligned(tiles.data_ptr()), weights.data_ptr()])
        matrices, lines = plan.matrices.copy(), plan.lines.copy()
        matrices[:, 0] = lo * plan.matrices[:, 0] + [x.data_ptr() for x in queries]
        matrices[:, 1:3] += held
        lines[:, 3:5] += held
        loop("pieces")(matrices.ctypes.data, len(matrices), count)
        return _Table(lo, count, plan, lines, (tiles, weights))


@dataclass(frozen=True, slots=True, eq=False)
class _Plan:
    """What the tables of any `count` queries have in common: it depends on the blocks' shapes alone."""

    matrices: Int64[np.ndarray, "blocks _"]  # of `MatrixLine`; x is the bytes of a query, to and weights are where
    lines: Int64[np.ndarray, "lines _"]  # of `PairLine`; x and weights are where in what is held
    places: Int64[np.ndarray, "lines 3"]  # where the addresses of stored tensors are among all places' numbers
    strides: Int64[np.ndarray, "lines 3"]  # bytes of a row of them


@lru_cache(maxsize=16)
def _plan(shapes: "_Shapes", rank: int, count: int, together: int) -> _Plan:
    """`together` are the bytes of the matrices of a block that are gone through at a time."""
    shape, numbers = _Shape(*shapes.blocks.T), np.arange(len(shapes.blocks))
    to, weight = count * (shape.tiles.cumsum() - shape.tiles), 8 * count * numbers
    tiles = shape.steps * shape.rounds
    matrices = MatrixLine(4 * shape.a * shape.b, to, weight, *shape[:5], shape.rounds, tiles, shape.columns, shape.twos)

    most = np.maximum(together // shape.tiles, 1)
    parts = -(-count // most)
    block = numbers.repeat(parts)
    first = most[block] * (np.arange(len(block)) - (parts.cumsum() - parts)[block])
    mine, none = _Shape(*shapes.blocks[block].T), np.zeros_like(first)
    lines = PairLine(
        none, none, none, to[block] + first * mine.tiles, weight[block] + 8 * first, mine.size_v, mine.size_u,
        mine.steps, mine.rounds, mine.columns, mine.tiles, first, np.minimum(most[block], count - first),
        none + shapes.room, mine.wide_v, mine.wide_u, mine.order,
    )  # fmt: skip
    places = np.stack([mine.swapped, 1 - mine.swapped, none + 2], 1) + 3 * block[:, None]
    strides = np.stack([mine.size_v, mine.size_u, none + 2], 1) * rank
    return _Plan(np.stack(matrices, 1), np.stack(lines, 1), places, strides)


class _Shape(NamedTuple):
    """How the pairs of a block are gone through: v^T X, or where that takes fewer products, u^T X^T."""

    a: Any  # numbers along and across, of v and u unless they are swapped
    b: Any
    along: Any  # numbers of X from one to the next of them
    across: Any
    apart: Any  # numbers along with what fills them up
    swapped: Any
    steps: Any  # tiles of v
    rounds: Any  # of X that each of them meets
    columns: Any  # tiles across
    twos: Any  # of them that have the even and the odd numbers of 32
    size_v: Any  # bytes of a side
    size_u: Any
    tiles: Any  # bytes of one query's tiles
    wide_v: Any  # bytes from side to side in the loop's space
    wide_u: Any
    order: Any  # address of an order


@lru_cache(maxsize=64)
def _shape(a: int, b: int, bits: str) -> _Shape:
    swapped = _tiles(b, a) < _tiles(a, b)
    matrix = (b, a, 1, b) if swapped else (a, b, b, 1)
    along, across = matrix[:2]
    (steps, rounds, apart), columns = _steps(along), -(-across // LANES)
    (size_v, wide_v), (size_u, wide_u) = _side(along, steps, bits), _side(across, -(-columns // 2), bits)
    tiles, twos = steps * rounds * columns * TILE, 0 if bits == "int8" else columns & ~1
    order = _order(along, apart, steps, bits).ctypes.data if rounds == 1 else 0
    return _Shape(
        *matrix, apart, int(swapped), steps, rounds, columns, twos, size_v, size_u, tiles, wide_v, wide_u, order
    )  # fmt: skip


def _side(side: int, lines: int, bits: str) -> tuple[int, int]:
    """Bytes of a side, and from one to the next where it is read `lines` wide. There 64 numbers are written at a time,
    or 32 of both halves of bytes; and sides are so far apart that a tile's rows do not fall on one another in the
    nearest cache."""
    packed = PER_BYTE.get(bits)
    return -(-side // packed) if packed else 2 * side, LINE * (max(lines, 2 * -(-side // 64) + 1) | 1)


@cache  # never let go: tables hold its address
def _order(side: int, apart: int, lines: int, bits: str) -> np.ndarray:
    """Which of 64 numbers are written one after the other, lines of 32, to have a side as often as X has pieces; then
    of each line the bits that say which are of the second 32. Those of int4 are in the upper halves of bytes."""
    place = np.arange(lines * STEP)
    number = np.where((place % apart < side) & (place < PIECES * apart), place % apart, 0)
    half = -(-side // 2) if bits == "int4" else STEP
    upper = number >= half
    index = np.where(upper, number - half, number).astype(np.int16)
    masks = np.packbits(upper, bitorder="little").view(np.int16)
    return np.concatenate([index, masks])


def _steps(side: int) -> tuple[int, int, int]:
    """Tiles of a side, how many of X each meets, and the numbers with what fills them up: short sides are written
    behind one another as often as there are pieces, where that fills fewer tiles."""
    each, apart = -(-side // STEP), side + side % 2
    together = -(-PIECES * apart // STEP)
    if side <= SHORT and together < PIECES * each:
        return together, 1, apart
    return each, PIECES, STEP * each


@dataclass(frozen=True, slots=True, eq=False)
class _Shapes:
    """Those of all blocks."""

    blocks: Int64[np.ndarray, "blocks fields"]  # each one's `_Shape`
    size: int  # bytes of a query's tiles of all blocks
    room: int  # bytes of a group's sides, in the loop's space


@lru_cache(maxsize=16)
def _shapes(factors: tuple[Factors, ...], bits: str) -> _Shapes:
    """The very object for the same blocks: an index is asked many times."""
    blocks = np.array([_shape(a, b, bits) for a, b in factors], np.int64)
    shape = _Shape(*blocks.T)
    return _Shapes(blocks, int(shape.tiles.sum()), PAIRS * int(max(shape.wide_v.max(), shape.wide_u.max())) + SLACK)


def _aligned(address: int) -> int:
    """The next one that begins a line of the cache."""
    return -(-address // LINE) * LINE


def work(a: int, b: int) -> int:
    """What a pair takes of tiles, in the way that takes less: products, and what is done of each sixteen columns."""
    return min(_tiles(a, b), _tiles(b, a))


def _tiles(a: int, b: int) -> int:
    steps, rounds, _ = _steps(a)
    return (steps * rounds + 2) * -(-b // LANES)

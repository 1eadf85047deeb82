"""Inner products of dense stored rows with queries on the matrix tiles of the processor (AMX), all blocks in one call.

A query is cut into three pieces that its rows' numbers are multiplied with as they are stored. Against bfloat16 rows
they are the three bfloat16 numbers that sum to a float32 one, after the query's largest number in the block has been
brought to between 1 and 2 by a power of two: exact, but for what is below 2^-126 then. Against codes they are digits
of base 254, q = s (d1 + d2 / 254 + d3 / 254^2) up to |q|max 2^-23.9, as in digits.py, and sums are exact.

So the score of a row in codes is off by at most 2^-23.9 |q|max sum_j |code_j| |scale|, of signs by twice that; of a
bfloat16 row, whose float32 sums have chains of 32 products in a step and of up to 32 steps, by
(32 + 32 + 3) 2^-24 sum_j |q_j x_j|. Numbers of bfloat16 rows below 2^-126 count as zero. The order of the sums depends
on nothing but the number of queries: a row scores the same to the bit in any company. Products below 2^-126, of queries
brought to between 1 and 2, count as zero, and those above 2^128 are infinite.

Not here: the loops (tiles.py, tilescores.py), whose rows lie where.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from .codec import PER_BYTE
from .compiled import (
    LANES,
    TILE_BLOCK,
    TILE_FEW,
    TILE_LINE,
    TILE_PIECES,
    TILE_PLANES,
    TILE_RING,
    TILE_STEP,
    in_parts,
    loop,
    readable,
)

WIDE = 1 << 19  # bytes of sums on their way: rows are taken so many at a time
GROUPS = 8  # of sixteen queries that are taken at a time, whose tiles then stay in cache
COLUMNS = 16  # queries of a group, unless one tile is enough for all pieces
LEAST = 512  # rows of a thread
TILE = 1024  # bytes


@dataclass(frozen=True, slots=True, eq=False)
class DenseProgram:
    """The queries of blocks whose dense rows are stored with the same bits, as right tiles. A place of a block has the
    addresses of its codes (or numbers) and of their scales, the latter 0 for bfloat16."""

    keys: tuple[str, ...]
    bits: str
    num_queries: int
    table: np.ndarray  # [blocks, TILE_LINE] int64: tiles.py says what
    held: tuple[Tensor, ...]  # what the table has addresses of
    space: int  # bytes that a thread's loop needs

    @staticmethod
    def of(keys: Sequence[str], queries: Sequence[Float[Tensor, "Q _"]], bits: str) -> "DenseProgram":
        """The queries [Q, K] of each block; at least one block."""
        given = readable(queries)
        tiles, columns, _ = _shape(len(given[0]))
        table, sizes, space = _plan(tuple([q.shape[1] for q in given]), len(given[0]), bits)
        held, table = [torch.zeros(size, dtype=torch.uint8) for size in sizes], table.copy()
        table[:, 0] = [q.data_ptr() for q in given]
        table[:, 4:7] += [x.data_ptr() for x in held]
        loop("lay", bits, tiles, columns)(table.ctypes.data, len(table), len(given[0]))
        return DenseProgram(tuple(keys), bits, len(given[0]), table, tuple(held), space)

    def add(self, scores: Float[Tensor, "Q n"], places: Int64[np.ndarray, "blocks 2"]) -> None:
        """scores += <query, row> of the n rows that lie, block by block, from `places` on."""
        n, table = scores.shape[1], self.table.copy()
        table[:, :2] = places
        into = scores if n == 1 or scores.stride(1) == 1 else torch.zeros(scores.shape, dtype=torch.float64)
        start, apart = into.data_ptr(), into.stride(0)
        in_parts(n, LEAST, lambda lo, hi: self._add((start, apart), table, lo, hi, n))
        if into is not scores:
            scores += into

    def _add(self, scores: tuple[int, int], table: np.ndarray, first: int, end: int, there: int) -> None:
        """The scores of rows first to end, of `there` rows: where they lie, and how far apart those of each query."""
        tiles, columns, num_groups = _shape(self.num_queries)
        run, fold = loop("dense", self.bits, tiles, columns), loop("fold", tiles, columns)
        most = WIDE // (8 * columns)  # rows at a time, of one group
        space = np.empty(self.space, np.uint8)
        held = np.empty((min(most, (end - first) * num_groups) + LANES) * columns)  # whole vectors are written
        for group in range(0, num_groups, GROUPS):
            groups = min(GROUPS, num_groups - group)
            queries = min(self.num_queries - group * columns, groups * columns)
            step = most // groups
            for lo in range(first, end, step):
                m = min(step, end - lo)
                run(
                    table.ctypes.data, len(table), lo, m, there, group, groups, held.ctypes.data,
                    -(-space.ctypes.data // 64) * 64,
                )  # fmt: skip
                fold(held.ctypes.data, m, queries, scores[0] + 8 * (group * columns * scores[1] + lo), scores[1])


@lru_cache(maxsize=16)  # an index is asked many times
def _plan(widths: tuple[int, ...], num_queries: int, bits: str) -> tuple[np.ndarray, tuple[int, ...], int]:
    """The table of blocks of such widths but for addresses, with where in each of three buffers in place of theirs; the
    bytes of these; and those of a thread's space."""
    tiles, columns, groups = _shape(num_queries)
    table = np.zeros((len(widths), TILE_LINE), np.int64)
    width = table[:, 7] = np.array(widths)
    table[:, 2] = 2 * width if bits == "bfloat16" else -(-width // PER_BYTE[bits])
    table[:, 3] = _steps(width, bits)
    weights = groups * tiles * columns * 8
    sizes = weights * 8 * table[:, 3], weights + 0 * width, groups * columns * 8 + 0 * width  # a tile: 16 x 4 bytes
    ends = np.cumsum(sizes, 1)
    table[:, 4:7] = (ends - sizes).T
    return table, tuple(ends[:, -1].tolist()), _space(table, bits)


def _space(table: np.ndarray, bits: str) -> int:
    """Bytes for accumulators, unpacked codes, and the rows that are copied: those of three blocks, and what a left tile
    is wider than narrow rows."""
    stride, steps = np.maximum(table[:, 2], 1), table[:, 3]
    copied = 4 * TILE_BLOCK + 64 // stride
    return 64 + (16 + max(TILE_RING.values())) * TILE + int((copied * -(-steps * TILE_STEP[bits] // 64) * 64).max())


def _shape(num_queries: int) -> tuple[int, int, int]:
    """Right tiles of a step, one for all pieces or one for each; their columns; and groups of queries."""
    for columns, few in TILE_FEW.items():
        if num_queries <= few:
            return 1, columns, 1
    return TILE_PIECES, COLUMNS, -(-num_queries // COLUMNS)


def _steps(width: np.ndarray, bits: str) -> np.ndarray:
    """Left tiles of rows so wide."""
    if bits == "bfloat16":
        return -(-width // 32)
    return -(-width // (64 * TILE_PLANES[bits])) * TILE_PLANES[bits]

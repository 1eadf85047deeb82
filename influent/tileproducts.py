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

Not here: the loops (tiles.py, and signs.py for one query of signs), whose rows lie where.
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
    TILE_STAGED,
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

    @staticmethod
    def of(keys: Sequence[str], queries: Sequence[Float[Tensor, "Q _"]], bits: str) -> "DenseProgram":
        """The queries [Q, K] of each block; at least one block."""
        given = readable(queries)
        tiles, columns, _ = _shape(len(given[0]), bits)
        table, sizes = _plan(tuple([q.shape[1] for q in given]), len(given[0]), bits)
        held, table = [torch.zeros(size, dtype=torch.uint8) for size in sizes], table.copy()
        table[:, 0] = [q.data_ptr() for q in given]
        table[:, 4:7] += [x.data_ptr() for x in held]
        loop("lay", bits, tiles, columns)(table.ctypes.data, len(table), len(given[0]))
        return DenseProgram(tuple(keys), bits, len(given[0]), table, tuple(held))

    def add(self, scores: Float[Tensor, "Q n"], places: Int64[np.ndarray, "blocks 2"]) -> None:
        """scores += <query, row> of the n rows that lie, block by block, from `places` on."""
        n, table = scores.shape[1], self.table.copy()
        table[:, :2] = places
        in_parts(n, LEAST, lambda lo, hi: self._add(scores[:, lo:hi], table, lo, n))

    def _add(self, scores: Float[Tensor, "Q m"], table: np.ndarray, first: int, there: int) -> None:
        """The scores of rows from `first` on, of `there` rows."""
        n, (tiles, columns, num_groups) = scores.shape[1], _shape(self.num_queries, self.bits)
        run = loop("signs") if columns == 1 else loop("dense", self.bits, tiles, columns)
        space = self._space(n)
        for group in range(0, num_groups, GROUPS):
            groups = min(GROUPS, num_groups - group)
            step = WIDE // (8 * columns * groups)
            into = scores if tiles == 1 else scores[group * columns : (group + groups) * columns]
            for lo in range(0, n, step):
                m = min(step, n - lo)
                held = np.zeros((groups * m + LANES, columns))  # whole vectors are written
                run(
                    table.ctypes.data, len(table), first + lo, m, there, group, groups, held.ctypes.data,
                    -(-space.data_ptr() // 64) * 64,
                )  # fmt: skip
                wide = held[: groups * m].reshape(groups, m, columns)
                # NumPy, since PyTorch's modes are a thread's own, and its threads would be started by each of ours.
                into.numpy()[:, lo : lo + m] += _folded(wide, len(into), tiles)

    def _space(self, n: int) -> Tensor:
        """Accumulators, unpacked codes, and the rows that are copied: those of two groups, and what a left tile is
        wider than narrow rows."""
        tiles = _shape(self.num_queries, self.bits)[0]
        stride, steps, block = self.table[:, 2], self.table[:, 3], TILE_BLOCK[tiles]
        size = -(-steps * TILE_STEP[self.bits] // 64) * 64
        copied = np.minimum(n, 3 * block + 64 // stride) + block
        return torch.empty(64 + 8 * TILE + TILE_STAGED[tiles] * TILE + int((copied * size).max()), dtype=torch.uint8)


@lru_cache(maxsize=16)  # an index is asked many times
def _plan(widths: tuple[int, ...], num_queries: int, bits: str) -> tuple[np.ndarray, tuple[int, ...]]:
    """The table of blocks of such widths but for addresses, with where in each of three buffers in place of theirs; and
    the bytes of these."""
    tiles, columns, groups = _shape(num_queries, bits)
    table = np.zeros((len(widths), TILE_LINE), np.int64)
    width = table[:, 7] = np.array(widths)
    table[:, 2] = 2 * width if bits == "bfloat16" else -(-width // PER_BYTE[bits])
    table[:, 3] = _steps(width, bits)
    weights = groups * tiles * columns * 8
    sizes = weights * 8 * table[:, 3], weights + 0 * width, groups * columns * 8 + 0 * width  # a tile: 16 x 4 bytes
    ends = np.cumsum(sizes, 1)
    table[:, 4:7] = (ends - sizes).T
    return table, tuple(ends[:, -1].tolist())


def _shape(num_queries: int, bits: str) -> tuple[int, int, int]:
    """Right tiles of a step, one for all pieces or one for each; their columns; and groups of queries. One query of
    signs is not multiplied by tiles (signs.py)."""
    if bits == "sign" and num_queries == 1:
        return TILE_PIECES, 1, 1
    for columns, few in TILE_FEW.items():
        if num_queries <= few:
            return 1, columns, 1
    return TILE_PIECES, COLUMNS, -(-num_queries // COLUMNS)


def _steps(width: np.ndarray, bits: str) -> np.ndarray:
    """Left tiles of rows so wide."""
    if bits == "bfloat16":
        return -(-width // 32)
    return -(-width // 64) if bits != "int4" else -(-width // 2 // 64) * 2


def _folded(wide: np.ndarray, num_queries: int, tiles: int) -> np.ndarray:
    """The sums of each query [Q, m], its pieces' together, of those of groups [groups, m, columns]."""
    if tiles > 1:
        return wide.transpose(0, 2, 1).reshape(-1, wide.shape[1])[:num_queries]
    few = TILE_FEW[wide.shape[2]]
    pieces = wide[0, :, : TILE_PIECES * few].reshape(-1, TILE_PIECES, few)
    return pieces[:, :, :num_queries].sum(1).T

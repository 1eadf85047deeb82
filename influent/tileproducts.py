"""Inner products of dense stored rows with queries on the matrix tiles of the processor (AMX), all blocks in one call.

A query is cut into three pieces that its rows' numbers are multiplied with as they are stored. Against bfloat16 rows
they are the three bfloat16 numbers that sum to a float32 one, after the query's largest number in the block has been
brought to between 1/2 and 1 by a power of two: exact, but for what is below 2^-126 then. Against codes they are digits
of base 254, q = s (d1 + d2 / 254 + d3 / 254^2) up to |q|max 2^-24, as in digits.py, and sums are exact.

So the score of a row in codes is off by at most 2^-24 |q|max sum_j |code_j| |scale|, of signs by twice that; of a
bfloat16 row, whose float32 sums have chains of 16 products in a step and of a quarter of a piece's steps (or half of a
shorter one's), by (16 + 32 + 3) 2^-24 sum_j |q_j x_j|. Numbers of bfloat16 rows below 2^-126 count as zero. The order
of the sums depends on nothing but the number of queries: a row scores the same to the bit in any company.

Not here: the loops (tiles.py), whose rows lie where.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from .codec import PER_BYTE
from .compiled import LANES, TILE_LINE, TILE_PIECE, TILE_STEP, loop

PIECES = 3  # of a query: columns of one tile if there are few queries, else a tile each
FEW = LANES // PIECES  # queries whose pieces one tile has columns for
BASE = 254
NUMBERS = {"bfloat16": 32, "int8": 64, "int4": 64, "sign": 64}  # of a row in a left tile
WIDE = 1 << 19  # bytes of sums on their way: rows are taken so many at a time
GROUPS = 8  # of sixteen queries that are taken at a time, whose tiles then stay in cache
TILE = 1024


@dataclass(frozen=True, slots=True, eq=False)
class DenseProgram:
    """The queries of blocks whose dense rows are stored with the same bits, as right tiles. A place of a block has the
    addresses of its codes (or numbers) and of their scales, the latter 0 for bfloat16."""

    keys: tuple[str, ...]
    bits: str
    num_queries: int
    table: np.ndarray  # [blocks, TILE_LINE] int64
    held: tuple[Tensor, ...]  # what the table has addresses of

    @staticmethod
    def of(keys: Sequence[str], queries: Sequence[Float[Tensor, "Q _"]], bits: str) -> "DenseProgram":
        """The queries [Q, K] of each block; at least one block."""
        table, held = np.zeros((len(keys), TILE_LINE), np.int64), []
        widths: dict[int, list[int]] = {}
        for block, q in enumerate(queries):
            widths.setdefault(q.shape[1], []).append(block)
        for width, blocks in widths.items():
            tensors = _prepared(torch.stack([queries[block].detach().float() for block in blocks]), bits)
            table[blocks, 2] = 2 * width if bits == "bfloat16" else -(-width // PER_BYTE[bits])
            table[blocks, 3] = tensors[0].shape[2]
            for column, x in enumerate(tensors, 4):
                assert x.is_contiguous()
                table[blocks, column] = x.data_ptr() + np.arange(len(blocks)) * x[0].numel() * x.element_size()
            held.extend(tensors)
        return DenseProgram(tuple(keys), bits, len(queries[0]), table, tuple(held))

    def add(self, scores: Float[Tensor, "Q n"], places: Sequence[tuple[int, ...]]) -> None:
        """scores += <query, row> of the n rows that lie, block by block, from `places` on."""
        n, tiles = scores.shape[1], _tiles(self.num_queries)
        if not n or not len(self.table):
            return
        table = self.table.copy()
        table[:, :2] = places
        run, space = loop("dense", self.bits, tiles), self._space(n)
        num_groups = -(-self.num_queries // LANES) if tiles > 1 else 1
        for group in range(0, num_groups, GROUPS):
            groups = min(GROUPS, num_groups - group)
            for lo, m in _spans(n, WIDE // (8 * LANES * groups)):
                wide = torch.zeros(groups, m, LANES, dtype=torch.float64)
                run(
                    table.ctypes.data, len(table), lo, m, n, group, groups, wide.data_ptr(), space.data_ptr()
                )  # fmt: skip
                into = scores[group * LANES : (group + groups) * LANES, lo : lo + m]
                into += _folded(wide, self.num_queries - group * LANES, tiles)

    def _space(self, n: int) -> Tensor:
        """Accumulators, unpacked codes, and the rows that are copied: those of two groups, and what a left tile is
        wider than narrow rows."""
        stride, steps = self.table[:, 2], self.table[:, 3]
        size = -(-steps * TILE_STEP[self.bits] // 64) * 64
        copied = np.minimum(n, 32 + 64 // stride) * size
        unpacked = TILE_PIECE[self.bits, _tiles(self.num_queries)] * TILE
        return torch.empty(8 * TILE + unpacked + int(copied.max()), dtype=torch.uint8)


def _tiles(num_queries: int) -> int:
    """Right tiles of a step: one for all pieces, or one for each."""
    return 1 if num_queries <= FEW else PIECES


def _spans(n: int, step: int) -> Iterator[tuple[int, int]]:
    for lo in range(0, n, step):
        yield lo, min(step, n - lo)


def _folded(wide: Float[Tensor, "groups m 16"], num_queries: int, tiles: int) -> Float[Tensor, "Q m"]:
    if tiles > 1:
        return wide.transpose(1, 2).flatten(0, 1)[:num_queries]
    pieces = wide[0, :, : PIECES * FEW].unflatten(1, (PIECES, FEW))[:, :, :num_queries]
    return pieces.sum(1).T


def _prepared(q: Float[Tensor, "B Q K"], bits: str) -> tuple[Tensor, Tensor, Tensor]:
    """Right tiles [B, groups, steps, tiles, 16, 16, -1], weights [B, groups, tiles, 16] and constants [B, groups, 16]
    of blocks of one width."""
    num_blocks, num_queries, _ = q.shape
    largest = torch.linalg.vector_norm(q, ord=torch.inf, dim=2).double()
    largest = torch.where(largest > 0, largest, 1.0)
    pieces, scale = (_floats if bits == "bfloat16" else _digits)(q, largest)
    pieces = _in_steps(pieces, bits)  # [pieces, B, Q, steps, 16, -1]
    _, steps, rows, numbers = pieces.shape[2:][0], *pieces.shape[3:]
    bases = torch.ones(PIECES, 1, dtype=torch.float64)
    if bits != "bfloat16":
        bases = torch.tensor([[1.0], [1 / BASE], [1 / BASE**2]], dtype=torch.float64)
    weights = {"int4": 1 / 16, "sign": 2.0}.get(bits, 1.0) * scale[:, None] * bases  # [B, pieces, Q]
    tiles = _tiles(num_queries)
    groups = 1 if tiles == 1 else -(-num_queries // LANES)
    right = pieces.new_zeros(num_blocks, groups, steps, tiles, rows, LANES, numbers)
    weighted = torch.zeros(num_blocks, groups, tiles, LANES, dtype=torch.float64)
    constant = torch.zeros(num_blocks, groups, LANES, dtype=torch.float64)
    if bits == "sign":
        constant.flatten(1)[:, :num_queries] = q.sum(2, dtype=torch.float64)
    if tiles == 1:
        columns = right[:, 0, :, 0, :, : PIECES * FEW].unflatten(3, (PIECES, FEW))[:, :, :, :, :num_queries]
        columns.copy_(pieces.permute(1, 3, 4, 0, 2, 5))
        weighted[:, 0, 0, : PIECES * FEW].unflatten(1, (PIECES, FEW))[:, :, :num_queries] = weights
    else:
        for group in range(groups):
            some = slice(group * LANES, min(num_queries, (group + 1) * LANES))
            part = pieces[:, :, some].permute(1, 3, 0, 4, 2, 5)
            right[:, group, :, :, :, : part.shape[4]] = part
            weighted[:, group, :, : part.shape[4]] = weights[:, :, some]
    return right, weighted, constant


def _floats(q: Float[Tensor, "B Q K"], largest: Float[Tensor, "B Q"]) -> tuple[Tensor, Float[Tensor, "B Q"]]:
    """Three bfloat16 numbers for each, and the power of two that they are to be multiplied by."""
    power = torch.exp2(torch.frexp(largest).exponent.double())
    rest, found = (q / power[..., None]).float(), []
    for _ in range(PIECES):
        found.append(rest.bfloat16())
        rest = rest - found[-1]
    return torch.stack(found), power


def _digits(q: Float[Tensor, "B Q K"], largest: Float[Tensor, "B Q"]) -> tuple[Tensor, Float[Tensor, "B Q"]]:
    """Three digits for each number, and what the first is worth."""
    scale = largest / (BASE // 2)
    rest, found = q / scale[..., None], []
    for _ in range(PIECES):
        digit = rest.round()
        rest = (rest - digit) * BASE
        found.append(digit.to(torch.int8))
    return torch.stack(found), scale


def _in_steps(pieces: Tensor, bits: str) -> Tensor:
    """[..., K] as [..., steps, 16, numbers of four bytes], in the order in which rows are read, with zeros behind."""
    per, planes, width = NUMBERS[bits], 2 if bits == "int4" else 1, pieces.shape[-1]
    plane = -(-width // planes)
    steps = -(-plane // per)
    laid = pieces.new_zeros(*pieces.shape[:-1], planes, steps * per)
    for i in range(planes):
        part = pieces[..., i * plane : (i + 1) * plane]
        laid[..., i, : part.shape[-1]] = part
    laid = laid.unflatten(-1, (steps, LANES, -1)).transpose(-4, -3)  # a plane's step after the other's
    return laid.flatten(-4, -3)

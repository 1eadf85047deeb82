"""What is asked of the blocks of an index, and how their rows are read: some of a block's at a time.

Not here: the products (kernels.py), which rows are read and what becomes of their scores (score.py).
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .errors import NumericsError
from .gradients import Flat, LowRank, Packed, PackedPairs, Row
from .gram import RowSource, Shard
from .kernels import BlockQueries, Sums, prepare

FETCH_NUMBERS = 1 << 21  # numbers of a block decoded at once: 8 MiB of float32, or views of the file; bytes of codes


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """What is asked of one block, and how many of its rows are read at a time."""

    key: str
    queries: BlockQueries
    step: int

    def pieces(self, shard: Shard, lo: int, hi: int) -> Iterator[tuple[int, Row]]:
        """Rows lo to hi of the index, from their shard, some at a time: (the first one's number, rows)."""
        for at in range(lo, hi, self.step):
            yield at, shard.grads(self.key, at - shard.lo, min(at + self.step, hi) - shard.lo)

    def add(self, sums: Sums, squares: Float[Tensor, " n"] | None, shard: Shard, lo: int) -> None:
        """sums += <query, row> of the rows from `lo` on; and squares += <row, row>, unless that is not wanted."""
        n = sums.scores.shape[1]
        for at, row in self.pieces(shard, lo, lo + n):
            into = slice(at - lo, at - lo + len(row))
            if len(row) == n:
                self.queries.add(sums, row)
            else:
                part = Sums(sums.scores[:, into])
                self.queries.add(part, row)
                part.close()
            if squares is not None:
                squares[into] += row.squares()


def ask(index: RowSource, queries: Mapping[str, Tensor], query_rank: int | None) -> list[Block]:
    """The blocks of the index, each with its queries [Q, K]."""
    return [_block(index, key, queries[key], query_rank) for key in index.widths]


def _block(index: RowSource, key: str, q: Tensor, query_rank: int | None) -> Block:
    width, factors, coded = index.widths[key], None, None
    match index.shards[0].grads(key, 0, 0) if index.shards else None:  # no row, but the form that rows have
        case LowRank(u=u, v=v):
            factors = (v.shape[2], u.shape[2])
            width = u.shape[1] * sum(factors)
        case PackedPairs(u=u, factors=(a, b)):
            factors = (a, b)
            width = u.shape[1] * (a + b)
        case Packed(codes=codes, bits=bits):
            coded, width = bits, codes.shape[1]
    return Block(key, prepare(q, factors, query_rank, bits=coded), max(1, FETCH_NUMBERS // max(1, width)))


def blame_rows(shard: Shard, blocks: Iterable[Block]) -> None:
    """NumericsError, naming block and row, if a row is not finite; finite ones whose scores overflow are let pass."""
    for block in blocks:
        for lo, row in block.pieces(shard, shard.lo, shard.hi):
            finite = torch.stack([side.isfinite().flatten(1).all(dim=1) for side in _numbers(row)]).all(dim=0)
            if not bool(finite.all()):
                raise NumericsError(
                    f"shard {shard.name}, block {block.key!r}, row {lo + int((~finite).nonzero()[0])}: "
                    "the index's rows are not finite: run `influent verify` on the index"
                )


def _numbers(row: Row) -> list[Tensor]:
    match row:
        case Flat(g=g):
            return [g]
        case Packed(scale=scale):
            return [scale[:, None]]
        case PackedPairs(scale=scale):
            return [scale]
        case LowRank(u=u, v=v):
            return [u, v]

"""What is asked of the blocks of an index, by programs or block by block, and how their rows are read.

Not here: the products (kernels.py, programs.py), which rows are read and what becomes of their scores (score.py).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from . import programs
from .codec import Form
from .errors import NumericsError
from .gradients import Flat, LowRank, Packed, PackedPairs, Row
from .gram import RowSource, Shard
from .kernels import BlockQueries, Sums, by_tiles, prepare
from .programs import Program, forms_of

FETCH_NUMBERS = 1 << 21  # numbers of blocks decoded at once: 8 MiB of float32, or views of the file; bytes of codes


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """What is asked of one block."""

    key: str
    form: Form
    queries: BlockQueries

    def add(self, sums: Sums, squares: Float[Tensor, " n"] | None, shard: Shard, lo: int) -> None:
        """sums += <query, row> of the rows from `lo` on; and squares += <row, row>, unless that is not wanted."""
        n = sums.scores.shape[1]
        for at, row in _pieces(shard, self.key, self.form, lo, lo + n):
            into = slice(at - lo, at - lo + len(row))
            if len(row) == n:
                self.queries.add(sums, row)
            else:
                part = Sums(sums.scores[:, into])
                self.queries.add(part, row)
                part.close()
            if squares is not None:
                squares[into] += row.squares()


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """What is asked of an index: of some blocks together, by programs, and of the others one by one."""

    num_queries: int
    forms: Mapping[str, Form]
    programs: Sequence[Program]
    blocks: Sequence[Block]

    def add(self, scores: Float[Tensor, "Q n"], squares: Float[Tensor, " n"] | None, shard: Shard, lo: int) -> None:
        """scores += <query, row> of the rows from `lo` on, all in `shard`; and squares += <row, row>, if wanted."""
        n = scores.shape[1]
        for program in self.programs:
            programs.add(scores, program, self.forms, shard, lo, numbers=FETCH_NUMBERS)
            if squares is not None:
                for key in program.keys:
                    for at, row in _pieces(shard, key, self.forms[key], lo, lo + n):
                        squares[at - lo : at - lo + len(row)] += row.squares()
        sums = Sums(scores)
        for block in self.blocks:
            block.add(sums, squares, shard, lo)
        sums.close()


def ask(index: RowSource, queries: Mapping[str, Tensor], query_rank: int | None) -> Asked:
    """The queries [Q, K] of each block, cut to `query_rank` where rows are pairs and that is less work."""
    forms, num_queries = forms_of(index), len(next(iter(queries.values())))
    kinds = {form: _kind(form, num_queries, query_rank) for form in set(forms.values())}
    together, blocks = {}, []
    for key, form in forms.items():
        if (kind := kinds[form]) is not None:
            together.setdefault(kind, []).append(key)
        else:
            bits = form.bits if form.packed and form.factors is None else None
            blocks.append(Block(key, form, prepare(queries[key], form.factors, query_rank, bits=bits)))
    made = []
    for (bits, rank), keys in together.items():
        held, whole = [forms[key] for key in keys], [queries[key] for key in keys]
        if query_rank is not None:
            whole = [prepare(q, form.factors, query_rank).whole for q, form in zip(whole, held, strict=True)]
        made.append(programs.program_of(bits, rank, keys, whole, held))
    return Asked(num_queries, forms, made, blocks)


def _kind(form: Form, num_queries: int, query_rank: int | None) -> tuple[str, int] | None:
    """(bits, rank) of the program that such rows are best left to, with all others of that kind; None without one."""
    return (form.bits, form.rank) if by_tiles(form, num_queries, query_rank) else None


def captured(index: RowSource, queries: Mapping[str, Tensor], query_rank: int) -> Float[Tensor, "blocks Q"]:
    """The share of each query's squared length that its cut keeps in each block: 1 where there is none."""
    found = []
    for key, form in forms_of(index).items():
        kept = prepare(queries[key], form.factors, query_rank).captured
        found.append(torch.ones(len(queries[key])) if kept is None else kept)
    return torch.stack(found)


def _pieces(shard: Shard, key: str, form: Form, lo: int, hi: int) -> Iterator[tuple[int, Row]]:
    """Rows lo to hi of the index, from their shard, some at a time: (the first one's number, rows)."""
    step = max(1, FETCH_NUMBERS // max(1, form.numbers))
    for at in range(lo, hi, step):
        yield at, shard.grads(key, at - shard.lo, min(at + step, hi) - shard.lo)


def blame_rows(shard: Shard, forms: Mapping[str, Form]) -> None:
    """NumericsError, naming block and row, if a row is not finite; finite ones whose scores overflow are let pass."""
    for key, form in forms.items():
        for lo, row in _pieces(shard, key, form, shard.lo, shard.hi):
            finite = torch.stack([side.isfinite().flatten(1).all(dim=1) for side in _numbers(row)]).all(dim=0)
            if not bool(finite.all()):
                raise NumericsError(
                    f"shard {shard.name}, block {key!r}, row {lo + int((~finite).nonzero()[0])}: "
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

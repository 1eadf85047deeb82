"""Blocks that one compiled program scores together, in one call for a window of rows: from where their rows lie.

A program takes addresses, so that hundreds of small blocks cost no tensors; whoever gives it addresses answers for what
lies there. A stored shard gives those of its mapped file, checked against the index's layout; rows that are fetched, or
made, are held while their addresses are used. Not here: the programs, which blocks they are the fastest for
(kernels.py), the other blocks (asking.py).
"""

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int64
from torch import Tensor

from .codec import Form
from .errors import MismatchError
from .gradients import Flat, LowRank, Packed, PackedPairs, Row
from .gram import Described, Mapped, RowSource, Shard
from .pairprograms import PairProgram
from .payload import Places
from .tileproducts import DenseProgram

TOGETHER = 32  # blocks whose rows may be in memory at a time


@runtime_checkable
class Program(Protocol):
    """The queries of blocks `keys` as a loop reads them; only where `compiled.tiles_usable`."""

    @property
    def keys(self) -> tuple[str, ...]: ...
    def add(self, scores: Float[Tensor, "Q n"], places: Int64[np.ndarray, "blocks tensors"]) -> None:
        """scores += <query, row> of n rows; `places` are the addresses of each block's tensors at the first of them:
        those of `Form.tensors`, and 0 for the scales of floats."""
        ...


def program_of(bits: str, rank: int, keys: list[str], queries: list[Tensor], forms: list[Form]) -> Program:
    """That of blocks whose rows are of one kind, dense if their rank is 0; queries [Q, K] and form of each."""
    if rank == 0:
        return DenseProgram.of(keys, queries, bits)
    return PairProgram.of(keys, queries, [form.factors for form in forms if form.factors], rank=rank, bits=bits)


def add(
    scores: Float[Tensor, "Q n"], program: Program, forms: Mapping[str, Form], shard: Shard, lo: int, *, numbers: int
) -> None:
    """scores += <query, row> of the rows from `lo` on; of those that are not in memory TOGETHER times so many numbers
    are read at a time."""
    n = scores.shape[1]
    assert shard.lo <= lo <= lo + n <= shard.hi
    if isinstance(shard, Mapped) and shard.is_mapped:
        places = shard.places(program.keys, lo - shard.lo)
        program.add(scores, places.addresses)
        del places  # its mapping was needed until now
        return
    # As much together as a few blocks take one after the other: each piece of each block is a request of its own.
    step = max(1, TOGETHER * numbers // max(1, sum(forms[key].numbers for key in program.keys)))
    for at in range(lo, lo + n, step):
        end = min(at + step, lo + n)
        places = _fetched(shard, program.keys, forms, at, end)
        part = scores.new_zeros(len(scores), end - at)
        program.add(part, places.addresses)
        scores[:, at - lo : end - lo] += part
        del places


def _fetched(shard: Shard, keys: Sequence[str], forms: Mapping[str, Form], lo: int, hi: int) -> Places:
    """Rows lo to hi, in memory; MismatchError for those that are not of their form."""
    addresses, held = [], []
    for key in keys:
        tensors = _tensors(shard.grads(key, lo - shard.lo, hi - shard.lo))
        got = [(_name(x), tuple(x.shape)) for x in tensors]
        if got != (expected := [(dtype, (hi - lo, *tail)) for dtype, tail in forms[key].tensors(key).values()]):
            raise MismatchError(f"shard {shard.name}, block {key!r}: expected rows of {expected}, got {got}")
        held += tensors
        absent = () if forms[key].packed else (0,)
        addresses.append((*[x.data_ptr() for x in tensors], *absent))
    return Places(np.array(addresses, np.int64), held)


def _tensors(row: Row) -> list[Tensor]:
    """As `Form.tensors` has them, without holes."""
    match row:
        case Flat(g=g):
            found = [g]
        case Packed(codes=codes, scale=scale):
            found = [codes, scale]
        case LowRank(u=u, v=v):
            found = [v, u]
        case PackedPairs(u=u, v=v, scale=scale):
            found = [v, u, scale]
    return [x.cpu().contiguous() for x in found]


def _name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def form_of(row: Row) -> Form:
    """How such rows are stored."""
    match row:
        case Flat(g=g):
            return Form(_name(g), g.shape[1])
        case Packed(bits=bits, width=width):
            return Form(bits, width)
        case LowRank(u=u, v=v):
            a, b = v.shape[2], u.shape[2]
            return Form(_name(u), a * b, (a, b), u.shape[1])
        case PackedPairs(u=u, bits=bits, factors=(a, b)):
            return Form(bits, a * b, (a, b), u.shape[1])


def forms_of(source: RowSource) -> Mapping[str, Form]:
    """How the rows of each block are stored; those of a source without rows and without a layout are dense."""
    if isinstance(source, Described):
        return source.forms
    if not source.shards:
        return {key: Form("float32", width) for key, width in source.widths.items()}
    return {key: form_of(source.shards[0].grads(key, 0, 0)) for key in source.widths}

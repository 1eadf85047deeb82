"""Lengths and weighted sums of an index's rows, in two streaming passes: what a diversity term is made of.

Not here: which rows are weighted (selecting.py, valuing.py).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from influent.errors import SpecError
from influent.gram import RowSource
from influent.progress import Progress
from influent.rowstore import Index

STEP_NUMBERS = 1 << 22  # numbers of a block decoded at once


def check_stored(index: Index, what: str) -> None:
    """SpecError, saying `what` adds rows up, for an index that stores none."""
    if not index.codec.stored:
        raise SpecError(
            f"{index.path}: stores no rows (rows none), and {what} reads them: index again with --rows float32"
        )


@torch.no_grad()
def lengths(index: RowSource) -> Float[Tensor, " N"]:
    """The length of each row over all blocks, as stored and decoded, float32."""
    parts = []
    for shard in index.shards:
        squares = torch.zeros(shard.hi - shard.lo, dtype=torch.float64)
        for key, width in index.widths.items():
            for lo, hi in _steps(shard.hi - shard.lo, width):
                squares[lo:hi] += shard.grads(key, lo, hi).squares()
        parts.append(squares.sqrt().float())
    return torch.cat([torch.empty(0), *parts])


@torch.no_grad()
def weighted(
    index: RowSource, weights: Float[Tensor, "G N"], *, progress: Progress | None = None
) -> dict[str, Float[Tensor, "G K"]]:
    """sum over rows of weights[:, i] g_i for every block, float32; rows whose weights are all 0 are not decoded."""
    sums = {key: torch.zeros(len(weights), width, dtype=torch.float64) for key, width in index.widths.items()}
    wanted = (weights != 0).any(dim=0)
    for shard in index.shards:
        here = wanted[shard.lo : shard.hi]
        for key, width in index.widths.items() if bool(here.any()) else ():
            for lo, hi in _steps(shard.hi - shard.lo, width):
                if bool(here[lo:hi].any()):
                    rows = shard.grads(key, lo, hi).to(torch.float32).flat()
                    sums[key] += (weights[:, shard.lo + lo : shard.lo + hi].float() @ rows).double()
        if progress is not None:
            progress("sums", shard.hi, index.n)
    return {key: total.float() for key, total in sums.items()}


def _steps(count: int, width: int) -> list[tuple[int, int]]:
    step = max(1, STEP_NUMBERS // max(1, width))
    return [(lo, min(lo + step, count)) for lo in range(0, count, step)]

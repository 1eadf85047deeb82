"""DataInf (Kwon et al., 2024): (F + lambda I)^-1 replaced by the mean of (g_i g_i^T + lambda I)^-1, block by block.

By Sherman and Morrison the mean is (I - mean_i g_i g_i^T / (lambda + |g_i|^2)) / lambda: a query is solved in one pass
over the block's rows, and no matrix is formed. Kept under `curvature/` are the rows' squared lengths alone, which every
damping shares. Self-influence takes the smaller of a K x K and an N x N matrix, for which it is the closed form too.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .artifact import Artifact, digest, finished
from .damping import DEFAULT, Damping
from .errors import NumericsError
from .fitting import Compute, Health, Solver, block_rows, write_blocks
from .gram import MEMORY, BlockRows, RowSource, Vanishing, gram, per_row
from .progress import Progress

NAME = "datainf"
KIND = "lengths"


@dataclass(frozen=True, slots=True, eq=False)
class Averaged:
    """q -> (q - mean_i g_i (g_i . q) / (lambda + |g_i|^2)) / lambda of one block, float64."""

    rows: BlockRows
    damping: float
    squares: Float[Tensor, " N"]  # |g_i|^2

    @property
    def _weights(self) -> Float[Tensor, " N"]:
        return 1 / (self.damping + self.squares) / len(self.squares)

    def __call__(self, q: Float[Tensor, "Q K"]) -> Float[Tensor, "Q K"]:
        answer, weights = q.clone(), self._weights
        for lo, hi, g in self.rows.chunks():
            answer.addmm_((q @ g.T) * weights[lo:hi], g, alpha=-1)
        return answer.div_(self.damping)

    def self_influence(self, rows: BlockRows) -> Float[Tensor, " N"]:
        """(|g|^2 - mean_i (g . g_i)^2 / (lambda + |g_i|^2)) / lambda of each row."""
        weights = self._weights
        if rows.num_rows < rows.width:
            lower = gram(rows).tril_()
            taken = (lower + lower.tril(-1).T).square() @ weights
        else:
            mean = torch.zeros(rows.width, rows.width, dtype=torch.float64)
            for lo, hi, g in rows.chunks():
                mean.addmm_((g * weights[lo:hi, None]).T, g)
            taken = per_row(rows, lambda g: (g @ mean).mul_(g).sum(dim=1))
        return ((self.squares - taken) / self.damping).clamp_(min=0)


class DataInf:
    """DataInf with one damping; one block in memory at a time."""

    def __init__(self, index: RowSource, lengths: Artifact, damping: Damping, *, memory: int = MEMORY):
        self.index, self.lengths, self.damping, self.memory = index, lengths, damping, memory
        self.name = f"{NAME}:{damping}"
        self.digest = digest({"curvature": NAME, "lengths": lengths.digest, "damping": str(damping)})
        self._traces = {record.name: record.meta["trace"] for record in lengths.records}

    def solver(self, key: str) -> Solver:
        """Raises NumericsError without a damping: g g^T alone has no inverse."""
        rows = block_rows(self.index, key, self.memory)
        amount = self._amount(key)
        if amount == 0:
            if self._traces[key] == 0:
                return Solver(rows, Vanishing())
            raise NumericsError(f"block {key!r}: {NAME} inverts one row at a time: expected a damping above 0")
        return Solver(rows, Averaged(rows, amount, self._squares(key)))

    def health(self) -> Health:
        """Per block: `lambda` in use, `trace` of F, and `d_eff` = mean of |g|^2 / (lambda + |g|^2), 1 at most: K less
        lambda times the trace of the inverse, as of the other curvatures."""
        found = {}
        for key in self.index.widths:
            amount, squares = self._amount(key), self._squares(key)
            alive = torch.where(squares > 0, squares / (amount + squares), 0.0)
            found[key] = {
                "lambda": amount, "trace": self._traces[key], "d_eff": float(alive.mean()), "form": "mean of inverses"
            }  # fmt: skip
        return found

    def _amount(self, key: str) -> float:
        return self.damping.amount(self._traces[key], min(self.index.n, self.index.widths[key]))

    def _squares(self, key: str) -> Float[Tensor, " N"]:
        self.lengths.check(key)
        return self.lengths.tensors(key)["squares"].clone()


def fit_datainf(
    index: RowSource, damping: Damping, *, memory: int = MEMORY, progress: Progress | None = None
) -> DataInf:
    """The squared lengths of all rows, in one pass over each block; found if they are there."""
    spec = {"statistic": KIND, "index": index.digest}
    lengths = write_blocks(index, KIND, spec, _measure(index, memory), progress=progress)
    return DataInf(index, lengths, damping, memory=memory)


def find_datainf(index: RowSource, name: str) -> DataInf | None:
    """The fit of that name, `datainf` or `datainf:relative:0.1`; None when nothing was fitted to these rows."""
    written = name.partition(":")[2]
    lengths = fitted_lengths(index)
    return None if lengths is None else DataInf(index, lengths, Damping.parse(written) if written else DEFAULT)


def fitted_lengths(index: RowSource) -> Artifact | None:
    """The finished artifact of these rows' lengths, if it is there."""
    for folder, kind in finished(index.store, "curvature/"):
        if kind == KIND:
            found = Artifact.open(folder, KIND)
            if found.spec["index"] == index.digest:
                return found
    return None


def _measure(index: RowSource, memory: int) -> Compute:
    def compute(key: str):
        squares = per_row(BlockRows(index, key, memory), lambda g: g.square().sum(dim=1))
        if not bool(squares.isfinite().all()):
            raise NumericsError(f"block {key!r}: its rows are not finite: run `influent verify` on the index")
        return {"squares": squares}, {"trace": float(squares.mean())}

    return compute

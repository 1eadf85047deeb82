"""Curvature of the stored rows: the block-diagonal Fisher matrix with damping, in full or of low rank, or the identity.

Fitting is block by block: a Gram matrix per block (once per index) and a Cholesky factor per block and damping, each
set an artifact under `curvature/`, so that a killed fit resumes at the block it was in and another damping costs no
pass over the rows. The curvature is that of the rows as stored, rounding included. Low rank: truncated.py. No scoring
here.
"""

from functools import cached_property
from math import isfinite
from typing import Any

import torch

from . import datainf, fisher, kron, kronname
from .artifact import Artifact, digest
from .damping import Damping as Damping
from .damping import Published
from .errors import DataError, NumericsError, SpecError
from .fitting import AnyCurvature as AnyCurvature
from .fitting import Compute, Health, Solver, block_rows, place, write_blocks
from .fitting import Curvature as Curvature
from .gram import (
    CPU,
    MEMORY,
    BlockRows,
    Dual,
    Primal,
    RowSource,
    Unchanged,
    Vanishing,
    cholesky,
    gram,
    pack,
    trace_of_inverse,
    unpack,
)
from .progress import Progress
from .truncated import Truncated, bases, fit_basis, parse_name


class Identity:
    """No curvature: gradient dot products (TracIn, GradDot, LinFiK)."""

    name = "identity"

    def __init__(self, index: RowSource, *, memory: int = MEMORY):
        self.index, self.memory = index, memory
        self.digest = digest({"curvature": self.name})

    def solver(self, key: str) -> Solver:
        return Solver(block_rows(self.index, key, self.memory), Unchanged())

    def health(self) -> Health:
        return {}


class FIM:
    """The damped block-diagonal Fisher matrix F = (1/N) sum_i g_i g_i^T, factored: see docs/scores.md.

    A factor is read when its solver is asked for and freed with it: one block in memory at a time, on `device`.
    """

    def __init__(self, index: RowSource, factors: Artifact, *, memory: int = MEMORY, device: torch.device = CPU):
        self.index, self.factors, self.digest, self.memory = index, factors, factors.digest, memory
        self.device = device
        self.damping = Damping.parse(factors.spec["damping"])
        self.name = f"fim:{self.damping}"
        self._meta = {record.name: record.meta for record in factors.records}

    def solver(self, key: str) -> Solver:
        rows = block_rows(self.index, key, self.memory, self.device)
        meta = self._meta[key]
        if meta["form"] == "zero":
            return Solver(rows, Vanishing())
        self.factors.check(key)
        factor = unpack(self.factors.tensors(key)["factor"]).to(self.device)
        if meta["form"] == "primal":
            return Solver(rows, Primal(factor, self.index.n))
        return Solver(rows, Dual(factor, meta["lambda"], rows, self.grams.tensors(key)["gram"]))

    @cached_property
    def grams(self) -> Artifact:
        """What the factors are of; opened once, since its manifest has a record for every block."""
        return Artifact.open(place(self.index, self.factors.spec["gram"]), "gram")

    def health(self) -> Health:
        """As `fisher.health` has it."""
        return fisher.health(self.index, self.factors)


def fit(
    index: RowSource,
    *,
    curvature: str = "fim",
    damping: Damping | Published | None = None,
    memory: int = MEMORY,
    device: torch.device = CPU,
    progress: Progress | None = None,
) -> AnyCurvature:
    """Fit a curvature to an index, or find what an earlier fit left.

    `curvature` is `identity`, `fim`, `datainf`, `lowrank:R` or `sketch:R` (alone: R is 512), or the name of a low-rank
    one fitted to fewer rows; those that need the model (kfac, ekfac) are only found here, see recompute.py. All but
    identity need a damping; the published rules are for low rank. What costs, the Gram matrices or the eigenvectors, is
    shared by all dampings. Killed at any point and called again, it goes on with the next block. `memory` bounds, in
    MiB, what is held of the rows; `device` is where fim is fitted and solved, in float64 (the others on the CPU).
    Results depend on neither by more than rounding.
    Raises NumericsError, naming the block, for a Fisher matrix that this damping leaves singular, and SpecError for
    names that are not known and a damping that the kept precision does not carry.
    """
    if kronname.parse(curvature) is not None:
        return _through_model(index, curvature, damping)
    name = parse_name(curvature)
    if name is None and curvature not in ("fim", "identity", datainf.NAME):
        raise SpecError(f"curvature: expected fim, lowrank:R, sketch:R, datainf or identity, got {curvature!r}")
    if (damping is None) != (curvature == "identity"):
        raise SpecError(f"curvature {curvature}: all but identity need a damping such as relative:0.1, identity none")
    if memory < 1:
        raise SpecError(f"memory is {memory}, expected 1 MiB or more")
    if damping is None:
        return Identity(index, memory=memory)
    if index.n == 0:
        raise DataError("this index has no rows: there is no curvature to fit")
    if name is not None:
        return Truncated(index, fit_basis(index, name, memory=memory, progress=progress), damping, memory=memory)
    if isinstance(damping, Published):
        raise SpecError(f"parity {damping} is for a low-rank curvature: give --curvature lowrank:R with it")
    if curvature == datainf.NAME:
        return datainf.fit_datainf(index, damping, memory=memory, progress=progress)
    grams = write_blocks(
        index, "gram", {"statistic": "gram", "index": index.digest}, _measure(index, memory, device),
        progress=progress,
    )  # fmt: skip
    spec = {"statistic": "cholesky", "index": index.digest, "gram": grams.digest, "damping": str(damping)}
    factors = write_blocks(index, "cholesky", spec, _factor(index, grams, damping, device), progress=progress)
    return FIM(index, factors, memory=memory, device=device)


def list_fitted(index: RowSource) -> list[str]:
    """The names of the finished fits in an index, which `find` takes; identity, which needs no fit, is not listed.

    One of low rank is fitted without a damping: `lowrank:512`; or `lowrank:512@900` if it has seen only the 900 rows
    that there were before others were appended.
    """
    mean = [] if datainf.fitted_lengths(index) is None else [datainf.NAME]
    return [*sorted(fisher.fitted(index)), *sorted(bases(index)), *mean, *sorted(kron.fits(index))]


def find(index: RowSource, name: str) -> AnyCurvature:
    """The curvature of that name: `identity`, `fim:relative:0.1`, or `fim` if there is just one; `lowrank:512`, which
    is then damped by relative:1, or `lowrank:512:relative:0.5`; `ekfac`, damped by relative:0.01, and its like.

    Raises SpecError, listing what there is, when it has not been fitted or the name is not enough.
    """
    if name == Identity.name:
        return Identity(index)
    if name.partition(":")[0] == datainf.NAME and (mean := datainf.find_datainf(index, name)) is not None:
        return mean
    if kronname.parse(name) is not None:
        return _through_model(index, name, None)
    wanted = parse_name(name)
    fitted = fisher.fitted(index) if wanted is None else bases(index)
    basis = name if wanted is None else wanted.basis
    matching = [full for full in fitted if basis in (full, full.partition(":")[0])]
    if len(matching) != 1:
        problem = "not fitted" if not matching else "more than one is fitted"
        known = ", ".join([*list_fitted(index), "identity"])
        raise SpecError(f"curvature {name!r}: {problem}: give --curvature with one of {known}")
    found = fitted[matching[0]]
    return FIM(index, found) if wanted is None else Truncated(index, found, wanted.damping)


def describe(index: RowSource, name: str) -> dict[str, Any]:
    """`{"name", "health"}` of a fitted curvature, as `influent info` lists it; of one of low rank also `seen`, the
    share of the rows that it was fitted to, and `stale`, whether that is not all of them."""
    found = find(index, name)
    facts = {"name": name, "health": found.health()}
    return facts | {"seen": found.seen, "stale": found.seen < 1} if isinstance(found, Truncated) else facts


def _through_model(index: RowSource, name: str, damping: Damping | Published | None) -> AnyCurvature:
    """K-FAC or EK-FAC, as `recompute.py` fits it; what was not fitted cannot be had without the model."""
    wanted, fitted = kronname.parse(name), kron.fits(index)
    assert wanted is not None
    if isinstance(damping, Published):
        raise SpecError(f"parity {damping} is for a low-rank curvature: give --curvature lowrank:R with it")
    if (found := fitted.get(str(wanted.basis))) is None:
        raise SpecError(
            f"curvature {str(wanted.basis)!r}: not fitted: `influent fit INDEX --curvature {wanted.basis}` does it, "
            f"through the model; there is {', '.join([*list_fitted(index), 'identity'])}"
        )
    amount = wanted.damped(damping).damping or wanted.default
    return kron.KronRows(index, found, amount) if wanted.compressed else kron.KronFull(found, amount)


def _measure(index: RowSource, memory: int, device: torch.device) -> Compute:
    def compute(key: str):
        rows = BlockRows(index, key, memory, device=device)
        total = gram(rows)
        trace = float(total.diagonal().sum()) / rows.num_rows
        if not isfinite(trace):
            raise NumericsError(f"block {key!r}: its rows are not finite: run `influent verify` on the index")
        return {"gram": pack(total.cpu())}, {"trace": trace, "form": _form(rows)}

    return compute


def _factor(index: RowSource, grams: Artifact, damping: Damping, device: torch.device) -> Compute:
    measured = {record.name: record.meta for record in grams.records}

    def compute(key: str):
        rows, trace = BlockRows(index, key), measured[key]["trace"]
        rank = min(rows.num_rows, rows.width)
        amount = damping.amount(trace, rank)
        meta = {"lambda": amount, "trace": trace, "d_eff": 0.0, "form": _form(rows)}
        if trace == 0 and amount == 0:
            return {"factor": torch.empty(0, dtype=torch.float64)}, meta | {"form": "zero"}
        if amount == 0 and meta["form"] == "dual":
            raise NumericsError(
                f"block {key!r}: {rows.num_rows} rows of width {rows.width} have a singular Fisher matrix: "
                "expected a damping above 0"
            )
        shift = rows.num_rows * amount
        grams.check(key)
        factor = cholesky(unpack(grams.tensors(key)["gram"]).to(device), shift, block=key)
        d_eff = rank - shift * trace_of_inverse(factor)
        return {"factor": pack(factor.cpu())}, meta | {"d_eff": min(max(d_eff, 0.0), float(rank))}

    return compute


def _form(rows: BlockRows) -> str:
    return "primal" if rows.num_rows >= rows.width else "dual"

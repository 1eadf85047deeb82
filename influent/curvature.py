"""Curvature of the stored rows: the block-diagonal Fisher matrix with damping, or the identity.

Fitting is block by block: a Gram matrix per block (once per index) and a Cholesky factor per block and damping, each
set an artifact under `curvature/`, so that a killed fit resumes at the block it was in and another damping costs no
pass over the rows. The curvature is that of the rows as stored, rounding included. No scoring here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from .artifact import Artifact, ArtifactWriter, digest, kind_of
from .errors import DataError, MismatchError, NumericsError, SpecError
from .gram import (
    BlockRows,
    Dual,
    Inverse,
    Primal,
    RowSource,
    Unchanged,
    Vanishing,
    check_bytes,
    cholesky,
    gram,
    pack,
    trace_of_inverse,
    unpack,
)
from .progress import Progress
from .storage import Store

Health = dict[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Damping:
    """lambda with its unit: `relative:0.1` of the mean eigenvalue tr(F) / min(N, K) of each block, or `absolute:1e-3`.

    >>> str(Damping.parse("relative:1e-1"))
    'relative:0.1'
    """

    unit: str
    value: float

    def __post_init__(self):
        if self.unit not in ("relative", "absolute"):
            raise SpecError(f"damping: expected relative:NUMBER or absolute:NUMBER, got the unit {self.unit!r}")
        if not (isfinite(self.value) and self.value >= 0):
            raise SpecError(f"damping: expected a finite number of 0 or more, got {self.value}")

    @classmethod
    def parse(cls, text: str) -> "Damping":
        unit, _, number = text.partition(":")
        try:
            return cls(unit.strip(), float(number))
        except ValueError as e:
            if isinstance(e, SpecError):
                raise
            raise SpecError(f"damping: expected relative:NUMBER or absolute:NUMBER, got {text!r}") from None

    def __str__(self) -> str:
        return f"{self.unit}:{self.value!r}".removesuffix(".0")

    def amount(self, trace: float, rank: int) -> float:
        """lambda for a block whose Fisher matrix has this trace and at most this rank."""
        return self.value * trace / rank if self.unit == "relative" else self.value


@dataclass(frozen=True, slots=True, eq=False)
class Solver:
    """One block's curvature, inverted: q [Q, K] -> (F + lambda I)^-1 q, computed in float64, in the dtype of q.

    Raises NumericsError, naming the block, when q, the rows or the answer is not finite.
    """

    rows: BlockRows
    inverse: Inverse

    def __call__(self, q: Float[Tensor, "Q K"]) -> Float[Tensor, "Q K"]:
        block, width = self.rows.key, self.rows.width
        if q.shape[1] != width:
            raise MismatchError(f"block {block!r}: expected queries of width {width}, got {q.shape[1]}")
        if not bool(q.isfinite().all()):
            raise NumericsError(f"block {block!r}: a query's gradient is not finite: look at the query's loss")
        exact = self.inverse(q.detach().cpu().double())
        if not bool(exact.isfinite().all()):  # in float64, in which finite rows and queries do not overflow
            raise NumericsError(f"block {block!r}: the index's rows are not finite: run `influent verify` on the index")
        answer = exact.to(q.dtype)
        if not bool(answer.isfinite().all()):
            raise NumericsError(f"block {block!r}: the preconditioned query is not finite: raise the damping")
        return answer

    def self_influence(self) -> Float[Tensor, " N"]:
        """g_i (F + lambda I)^-1 g_i of every row of the block, float64."""
        return self.inverse.self_influence(self.rows)


@runtime_checkable
class Curvature(Protocol):
    """A fitted curvature: cheap to ask many times. `name` is how a command picks it; `digest` is its identity."""

    name: str
    digest: str

    def solver(self, key: str) -> Solver: ...
    def health(self) -> Health: ...


class Identity:
    """No curvature: gradient dot products (TracIn, GradDot, LinFiK)."""

    name = "identity"

    def __init__(self, index: RowSource):
        self.index = index
        self.digest = digest({"curvature": self.name})

    def solver(self, key: str) -> Solver:
        return Solver(_block(self.index, key), Unchanged())

    def health(self) -> Health:
        return {}


class FIM:
    """The damped block-diagonal Fisher matrix F = (1/N) sum_i g_i g_i^T, factored: see docs/scores.md.

    A factor is read when its solver is asked for and freed with it: one block in memory at a time.
    """

    def __init__(self, index: RowSource, factors: Artifact):
        self.index, self.factors, self.digest = index, factors, factors.digest
        self.damping = Damping.parse(factors.spec["damping"])
        self.name = f"fim:{self.damping}"
        self._meta = {record.name: record.meta for record in factors.records}

    def solver(self, key: str) -> Solver:
        rows = _block(self.index, key)
        meta = self._meta[key]
        if meta["form"] == "zero":
            return Solver(rows, Vanishing())
        self.factors.check(key)
        factor = unpack(self.factors.tensors(key)["factor"])
        if meta["form"] == "primal":
            return Solver(rows, Primal(factor, self.index.n))
        grams = Artifact.open(_place(self.index, self.factors.spec["gram"]), "gram")
        return Solver(rows, Dual(factor, meta["lambda"], rows, grams.tensors(key)["gram"]))

    def health(self) -> Health:
        """Per block: `lambda` in use, `trace` of F, `d_eff` = sum of s / (s + lambda) over the eigenvalues s of F (how
        many directions the damping leaves alive), and `form`: primal, dual, or zero (every row is zero)."""
        return {key: dict(self._meta[key]) for key in self.index.widths}


def fit(
    index: RowSource, *, curvature: str = "fim", damping: Damping | None = None, progress: Progress | None = None
) -> Curvature:
    """Fit `fim` (with `damping`, required) or `identity` (without) to an index, or find what an earlier fit left.

    The Gram matrix is shared by all dampings. Killed at any point and called again, it goes on with the next block.
    Raises NumericsError, naming the block, for a Fisher matrix that this damping leaves singular.
    """
    if curvature not in ("fim", "identity"):
        raise SpecError(f"curvature: expected fim or identity, got {curvature!r}")
    if (damping is None) == (curvature == "fim"):
        raise SpecError(f"curvature {curvature}: fim needs a damping such as relative:0.1, identity takes none")
    if damping is None:
        return Identity(index)
    if index.n == 0:
        raise DataError("this index has no rows: there is no curvature to fit")
    grams = write_blocks(
        index, "gram", {"statistic": "gram", "index": index.digest}, _measure(index), progress=progress
    )
    spec = {"statistic": "cholesky", "index": index.digest, "gram": grams.digest, "damping": str(damping)}
    return FIM(index, write_blocks(index, "cholesky", spec, _factor(index, grams, damping), progress=progress))


def list_fitted(index: RowSource) -> list[str]:
    """The names of the finished fits in an index, which `find` takes; identity, which needs no fit, is not listed."""
    return sorted(_fitted(index))


def find(index: RowSource, name: str) -> Curvature:
    """The curvature of that name: `identity`, `fim:relative:0.1`, or `fim` if there is just one.

    Raises SpecError, listing what there is, when it has not been fitted or the name is not enough.
    """
    if name == Identity.name:
        return Identity(index)
    fitted = _fitted(index)
    matching = [full for full in fitted if full == name or name == full.partition(":")[0]]
    if len(matching) != 1:
        problem = "not fitted" if not matching else "more than one is fitted"
        raise SpecError(
            f"curvature {name!r}: {problem}: give --curvature with one of {', '.join([*sorted(fitted), 'identity'])}"
        )
    return FIM(index, fitted[matching[0]])


Compute = Callable[[str], tuple[Mapping[str, Tensor], dict[str, Any]]]


def write_blocks(
    index: RowSource, kind: str, spec: dict[str, Any], compute: Compute, *, progress: Progress | None = None
) -> Artifact:
    """One artifact under `curvature/` with a payload (tensors, facts) per block; blocks already there are kept.

    Raises CorruptError, naming the shard, before it computes anything from rows that are not the committed ones:
    what is kept here would outlive the damage.
    """
    writer = ArtifactWriter.open(_place(index, digest(spec)), kind, spec)
    if not writer.committed:
        if kind != "cholesky":  # which is computed from the Gram matrix alone
            for shard in index.shards:
                check_bytes(shard)
        for done, key in enumerate(index.widths, start=1):
            if key not in writer.records:
                writer.put(key, *compute(key))
            if progress is not None:
                progress(kind, done, len(index.widths))
        writer.commit({"blocks": len(index.widths), "rows": index.n})
    return Artifact.open(writer.store, kind)


def _measure(index: RowSource) -> Compute:
    def compute(key: str):
        rows = BlockRows(index, key)
        total = gram(rows)
        trace = float(total.diagonal().sum()) / rows.num_rows
        if not isfinite(trace):
            raise NumericsError(f"block {key!r}: its rows are not finite: run `influent verify` on the index")
        return {"gram": pack(total)}, {"trace": trace, "form": _form(rows)}

    return compute


def _factor(index: RowSource, grams: Artifact, damping: Damping) -> Compute:
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
        factor = cholesky(unpack(grams.tensors(key)["gram"]), shift, block=key)
        d_eff = rank - shift * trace_of_inverse(factor)
        return {"factor": pack(factor)}, meta | {"d_eff": min(max(d_eff, 0.0), float(rank))}

    return compute


def _form(rows: BlockRows) -> str:
    return "primal" if rows.num_rows >= rows.width else "dual"


def _block(index: RowSource, key: str) -> BlockRows:
    if key not in index.widths:
        raise MismatchError(f"block {key!r}: not in this index, whose blocks are {', '.join(index.widths)}")
    return BlockRows(index, key)


def _place(index: RowSource, identity: str) -> Store:
    return index.store.child(f"curvature/{identity.partition(':')[2][:16]}")


def _fitted(index: RowSource) -> dict[str, Artifact]:
    found = {}
    for name in index.store.names("curvature/"):
        path, _, file = name.rpartition("/")
        folder = index.store.child(path)
        if file == "manifest.json" and kind_of(folder) == "cholesky":
            factors = Artifact.open(folder, "cholesky")
            if factors.spec["index"] == index.digest:
                found[f"fim:{factors.spec['damping']}"] = factors
    return found

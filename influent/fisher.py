"""The Fisher matrices that were fitted to an index, as the records of their artifacts tell of them.

Light: none of their numbers is read, and torch is not needed. Not here: fitting and solving them (curvature.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .artifact import Artifact, finished

if TYPE_CHECKING:
    from .gram import RowSource
    from .rowstore import Index

FACTORS = "cholesky"
KINDS = {"gram", FACTORS, "self-influence"}  # of what such a fit leaves, and what is asked of it


def fitted(index: RowSource | Index) -> dict[str, Artifact]:
    """The factors of each, by name: `fim:` and the damping."""
    found = {}
    for folder, kind in finished(index.store, "curvature/"):
        if kind == FACTORS:
            factors = Artifact.open(folder, FACTORS)
            if factors.spec["index"] == index.digest:
                found[f"fim:{factors.spec['damping']}"] = factors
    return found


def health(index: RowSource | Index, factors: Artifact) -> dict[str, dict[str, Any]]:
    """Per block: `lambda` in use, `trace` of F, `d_eff` = sum of s / (s + lambda) over the eigenvalues s of F (how many
    directions the damping leaves alive), and `form`: primal, dual, or zero (every row is zero)."""
    facts = {record.name: record.meta for record in factors.records}
    return {key: dict(facts[key]) for key in index.widths}


def describe(index: RowSource | Index) -> list[dict[str, Any]] | None:
    """`{"name", "health"}` of all that was fitted, as `curvature.describe` has them; None if there are other kinds."""
    if not KINDS.issuperset(kind for _, kind in finished(index.store, "curvature/")):
        return None
    return [{"name": name, "health": health(index, factors)} for name, factors in sorted(fitted(index).items())]

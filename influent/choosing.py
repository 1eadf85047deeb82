"""Which curvature a query means by the name and damping it was given, and what a result says of it.

Not here: the fit itself (curvature.py). Torch is imported only by what needs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from influent.errors import SpecError
from influent.progress import Progress
from influent.rowstore import Index

if TYPE_CHECKING:
    from influent.curvature import Curvature, Damping

DEFAULT_DAMPING = "relative:0.1"


def choose_curvature(
    index: Index, name: str | None, damping: str | None, *, own: str, progress: Progress | None = None
) -> Curvature:
    """The curvature that `check_curvature` settles on, fitted now if need be."""
    from influent import curvature as curvatures

    kind, amount = check_curvature(index, name, damping, own=own)
    return curvatures.fit(index, curvature=kind, damping=amount, progress=progress)


def check_curvature(index: Index, name: str | None, damping: str | None, *, own: str) -> tuple[str, Damping | None]:
    """What a query's curvature will be, as `curvature.fit` takes it; nothing is fitted and no row is read.

    Without a damping it is that of the one fit there is; of several, or of none, the default. Without a name it is
    the method's own curvature, `own`, or fim if there is a damping.

    Raises:
        SpecError: no such curvature; its name and `damping` differ; or it names a damping that is not fitted, or
            several are fitted, none of them the default, and neither the name nor `damping` picks one.
    """
    from influent import curvature as curvatures
    from influent.curvature import Damping

    name = name or (own if damping is None else "fim")
    if name == "identity":
        return name, damping_of(name, damping)
    kind, _, written = name.partition(":")
    if kind != "fim":
        known = ", ".join(["identity", "fim", *curvatures.list_fitted(index)])
        raise SpecError(f"curvature {name!r} is not known; expected one of {known}, or fim with a --damping")
    asked = Damping.parse(damping) if damping is not None else None
    named = Damping.parse(written) if written else asked
    if asked is not None:
        if named != asked:
            raise SpecError(f"curvature {name!r} and damping {damping!r} differ: give one of the two")
        return kind, asked
    fitted, default = curvatures.list_fitted(index), Damping.parse(DEFAULT_DAMPING)
    if named is None and (not fitted or f"fim:{default}" in fitted):
        return kind, default
    found = curvatures.find(index, kind if named is None else f"fim:{named}")
    return kind, Damping.parse(found.name.partition(":")[2])


def method_facts(index: Index, fitted: Curvature) -> dict[str, Any]:
    """What a result says of how it was made."""
    return {
        "name": index.notes["method"],
        "compress": index.spec["compress"],
        "curvature": fitted.name,
        "layers": len(index.keys),
        "rows": index.n,
        "health": fitted.health(),
    }


def damping_of(curvature: str, text: str | None) -> Damping | None:
    """The damping that a fit of this curvature is asked for; SpecError for one that identity cannot take."""
    from influent.curvature import Damping

    if curvature != "identity":
        return Damping.parse(text or DEFAULT_DAMPING)
    if text is not None:
        raise SpecError(f"curvature identity takes no damping, got {text!r}")
    return None

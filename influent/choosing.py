"""Which curvature a query means by the name and damping it was given, and what a result says of it.

Not here: the fit itself (curvature.py). Torch is imported only by what needs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from influent import kronname
from influent.damping import DEFAULT, LOW_RANK, Damping, Published
from influent.ensemble import Ensemble
from influent.errors import SpecError
from influent.kronname import KronName
from influent.progress import Progress
from influent.rowstore import Index

if TYPE_CHECKING:
    from influent.fitting import AnyCurvature
    from influent.truncated import Name


@dataclass(frozen=True, slots=True)
class Choice:
    """A curvature as `curvature.fit` takes it, or, with `kron`, as `recompute.py` fits it through the model."""

    curvature: str
    damping: Damping | Published | None

    @property
    def kron(self) -> KronName | None:
        name = kronname.parse(self.curvature)
        return None if name is None or isinstance(self.damping, Published) else name.damped(self.damping)


def choose_curvature(
    index: Index,
    name: str | None,
    damping: str | None,
    *,
    own: str,
    parity: str | None = None,
    memory: int | None = None,
    progress: Progress | None = None,
) -> AnyCurvature:
    """The curvature that `check_curvature` settles on, fitted now if need be; `memory` MiB bound the rows held."""
    from influent import curvature as curvatures

    wanted = check_curvature(index, name, damping, own=own, parity=parity)
    return curvatures.fit(
        index,
        curvature=wanted.curvature,
        damping=wanted.damping,
        memory=curvatures.MEMORY if memory is None else memory,
        progress=progress,
    )


def check_curvature(
    index: Index, name: str | None, damping: str | None, *, own: str, parity: str | None = None
) -> Choice:
    """What a query's curvature will be; nothing is fitted and no row is read.

    Without a name it is the method's own curvature, `own`, or fim if that takes no damping and there is one. Without a
    damping, fim has that of the one fit there is; of several, or of none, the default. Without a rank, lowrank and
    sketch have that of the one that is fitted to the present rows or, if none is, to earlier ones; of several, or of
    none, the default. `parity`, paper or
    release, is a published rule for the damping of a low-rank curvature, in place of one.

    Raises:
        SpecError: no such curvature; its name and `damping` differ; or it names a damping that is not fitted, or
            several are fitted, none of them the default, and neither the name nor `damping` picks one.
    """
    from influent import curvature as curvatures
    from influent.truncated import split_name

    rule = _rule(parity, damping)
    if name is None and own == "identity" and damping is not None:
        name = "fim"
    name = name or own
    check_steps(index, name)
    if (kron := kronname.parse(name)) is not None:
        return _kron(kron, damping, rule)
    wanted, has_own = split_name(name)
    if rule is not None and wanted is None:
        raise SpecError(f"parity {rule} is for a low-rank curvature: give --curvature lowrank:R with it")
    if name == "identity":
        return Choice(name, _none(damping))
    if wanted is not None:
        return Choice(
            _basis(index, wanted), _agreed(name, wanted.damping if has_own else None, rule, damping, LOW_RANK)
        )
    kind, _, written = name.partition(":")
    if kind == "datainf" and rule is None:
        return Choice(kind, _agreed(name, Damping.parse(written) if written else None, None, damping, DEFAULT))
    if kind not in ("fim", "datainf"):
        kinds = ["identity", "fim", "lowrank:R", "sketch:R", "datainf", *kronname.FORMS]
        known = ", ".join([*kinds, *curvatures.list_fitted(index)])
        raise SpecError(f"curvature {name!r} is not known; expected one of {known}, or fim with a --damping")
    return Choice(kind, _fim_damping(index, name, written, damping))


def check_steps(index: Index, what: str) -> None:
    """SpecError where `what` takes an index's rows for gradients and they are an optimizer's steps."""
    if what != "identity" and index.spec.get("scale", {}).get("kind") == "adam-step":
        raise SpecError(
            f"{index.path}: its rows are steps of Adam, and {what} is of gradients: use --curvature identity and "
            "--normalize none or cosine, or index again without --scale adam-step"
        )


def _fim_damping(index: Index, name: str, written: str, damping: str | None) -> Damping:
    from influent import curvature as curvatures

    asked = Damping.parse(damping) if damping is not None else None
    named = Damping.parse(written) if written else asked
    if asked is not None:
        if named != asked:
            raise SpecError(f"curvature {name!r} and damping {damping!r} differ: give one of the two")
        return asked
    fitted = [full for full in curvatures.list_fitted(index) if full.startswith("fim:")]
    if named is None and (not fitted or f"fim:{DEFAULT}" in fitted):
        return DEFAULT
    found = curvatures.find(index, "fim" if named is None else f"fim:{named}")
    return Damping.parse(found.name.partition(":")[2])


def _basis(index: Index, wanted: Name) -> str:
    """The eigenvectors that are meant; those of earlier rows only by their number of rows."""
    from influent.truncated import RANK, bases

    if wanted.rows is None and wanted.rank is not None:
        return wanted.basis
    fitted = bases(index)
    if wanted.rows is not None:
        if wanted.basis not in fitted:
            known = ", ".join(sorted(fitted)) or "none"
            raise SpecError(f"curvature {wanted.basis!r}: not fitted: of low rank there is {known}")
        return wanted.basis
    of_form = [full for full in fitted if full.startswith(f"{wanted.form}:")]
    present = [full for full in of_form if "@" not in full]
    ranks = {full.partition("@")[0] for full in present or of_form}  # after an append, those of the rows before it
    return ranks.pop() if len(ranks) == 1 else f"{wanted.form}:{RANK}"


def _rule(parity: str | None, damping: str | None) -> Published | None:
    if parity is None:
        return None
    if damping is not None:
        raise SpecError(f"parity {parity!r} sets the damping: give it or damping {damping!r}, not both")
    return Published(parity)


def _agreed(
    name: str, own: Damping | Published | None, rule: Published | None, damping: str | None, default: Damping
) -> Damping | Published:
    """The one damping that the name, the parity and the damping speak of; `default` if none does."""
    asked = rule if damping is None else Damping.parse(damping)
    if own is not None and asked is not None and own != asked:
        what = f"damping {damping!r}" if rule is None else f"parity {str(rule)!r}"
        raise SpecError(f"curvature {name!r} and {what} differ: give one of the two")
    return own or asked or default


def method_facts(opened: Ensemble, fits: Sequence[AnyCurvature]) -> dict[str, Any]:
    """What a result says of how it was made, with the curvature fitted to each member."""
    from influent.fitting import FullCurvature

    index = opened.first
    facts = {
        "name": index.notes["method"],
        "compress": index.spec["compress"],
        "curvature": fits[0].name,
        "layers": len(index.keys),
        "rows": index.n,
        "health": opened.named([fitted.health() for fitted in fits]),
    }
    for fitted in fits:
        facts |= fitted.facts() if isinstance(fitted, FullCurvature) else {}
    return facts if opened.artifact is None else {**facts, "members": len(opened.members)}


def check_fit(name: str, damping: str | None, labels: str | None = None) -> Choice:
    """What `influent fit` is asked for, from a name with or without a damping (by default 0.1, of ekfac 0.01).

    Raises SpecError for a damping that identity or a fit of low rank cannot take, or a name and a damping that differ.
    """
    from influent.truncated import split_name

    kron = kronname.parse(name)
    if labels is not None and kron is None:
        raise SpecError(f"labels {labels!r} are for kfac, ekfac and cg, got curvature {name!r}")
    if kron is not None:
        return _kron(kronname.with_labels(kron, labels), damping, None)
    if name == "identity":
        return Choice(name, _none(damping))
    wanted, has_own = split_name(name)
    if wanted is not None:
        if has_own or damping is not None:
            raise SpecError(
                f"curvature {wanted.basis} is fitted without a damping, which each query chooses: give it to "
                "`influent query`, or `--curvature fim` here"
            )
        return Choice(wanted.basis, LOW_RANK)
    kind, _, written = name.partition(":")
    own = Damping.parse(written) if written else None
    return Choice(kind, _agreed(name, own, None, damping, DEFAULT))


def _kron(name: KronName, damping: str | None, rule: Published | None) -> Choice:
    if rule is not None:
        raise SpecError(f"parity {rule} is for a low-rank curvature: give --curvature lowrank:R with it")
    damped = name.damped(None if damping is None else Damping.parse(damping))
    return Choice(str(name.basis), damped.damping)


def _none(damping: str | None) -> None:
    if damping is not None:
        raise SpecError(f"curvature identity takes no damping, got {damping!r}")

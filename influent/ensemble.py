"""An ensemble: the same data indexed with several checkpoints, as one directory that every verb takes like an index.

OUT/members/000/, 001, … are ordinary indexes, one a checkpoint, with the same rows; beside them an artifact of kind
"ensemble", committed last, lists them with their digests and the weights with which their scores are added. A plain
index opens as an ensemble of one. Not here: making the members (methods.py), scoring them (score.py).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .artifact import Artifact, ArtifactWriter
from .errors import CorruptError, FormatError, InfluentError
from .rowstore import Index
from .rowstore import verify as verify_index
from .storage import Store

KIND = "ensemble"
FOLDER = "members"


@dataclass(frozen=True, eq=False)
class Ensemble:
    """Finished indexes of the same rows, with weights; read only. `artifact` is None for a plain index."""

    path: str
    members: tuple[Index, ...]
    weights: tuple[float, ...]
    digest: str
    artifact: Artifact | None = None

    @classmethod
    def open(cls, path: str | os.PathLike[str] | Store) -> Ensemble:
        """An ensemble, or an index as the only member of one.

        Raises FormatError for what is neither, or is unfinished, CorruptError when a member is not the one listed.
        """
        store = Store.at(path)
        if not is_ensemble(store):
            index = Index.open(store)
            return cls(index.path, (index,), (1.0,), index.digest)
        if not store.exists("manifest.json"):
            raise FormatError(f"{store}: this ensemble is not finished: run the same command again to resume")
        artifact = Artifact.open(store, KIND)
        try:
            listed = [(m["place"], m["digest"], float(m["weight"])) for m in artifact.spec["members"]]
        except (KeyError, TypeError, ValueError) as e:
            raise CorruptError(f"{store}/spec.json: not the spec of an ensemble: {type(e).__name__}: {e}") from e
        members = tuple(Index.open(store.child(place)) for place, _, _ in listed)
        found = cls(str(store), members, tuple(weight for _, _, weight in listed), artifact.digest, artifact)
        found._check([digest for _, digest, _ in listed])
        return found

    def _check(self, digests: Sequence[str]) -> None:
        if not self.members:
            raise CorruptError(f"{self.path}/spec.json: expected at least one member, got none")
        for member, digest in zip(self.members, digests, strict=True):
            if member.digest != digest:
                raise CorruptError(f"{member.path}: its digest is {member.digest}, but the ensemble has {digest}")
            if (member.n, member.spec["data"]) != (self.n, self.first.spec["data"]):
                raise CorruptError(f"{member.path}: its rows are not those of {self.first.path}")

    @property
    def first(self) -> Index:
        """The first member: catalog, layout and method are alike in all."""
        return self.members[0]

    @property
    def n(self) -> int:
        return self.first.n

    @property
    def skipped(self) -> dict[str, int]:
        """Reason -> how many rows were skipped, in the member that skipped most for it."""
        counts: dict[str, int] = {}
        for member in self.members:
            for reason, count in member.summary["skipped"].items():
                counts[reason] = max(count, counts.get(reason, 0))
        return counts

    def named(self, facts: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Facts by block of each member as one dict; the blocks of an ensemble get the member's number in front."""
        if self.artifact is None:
            return facts[0]
        return {f"{i:03d}/{key}": value for i, each in enumerate(facts) for key, value in each.items()}


def is_ensemble(path: str | os.PathLike[str] | Store) -> bool:
    """Whether an ensemble, finished or not, is there: no index has members."""
    store = Store.at(path)
    return any(store.exists(f"{place(0)}/{name}") for name in ("spec.json", "manifest.json"))


def place(number: int) -> str:
    """Where a member lies in its ensemble."""
    return f"{FOLDER}/{number:03d}"


def commit(store: Store, weights: Sequence[float]) -> None:
    """List the finished members, in order, with their weights: from now on the ensemble exists for readers.

    Raises MismatchError, naming the first field that differs, when another ensemble is there.
    """
    members = [Index.open(store.child(place(i))) for i in range(len(weights))]
    listed = [
        {"place": place(i), "digest": member.digest, "weight": float(weight)}
        for i, (member, weight) in enumerate(zip(members, weights, strict=True))
    ]
    spec = {"members": listed, "data": members[0].spec["data"]}
    writer = ArtifactWriter.open(store, KIND, spec, notes={"method": members[0].notes["method"]}, requires=(KIND,))
    if not writer.committed:
        size = sum(member.bytes for member in members)
        summary = {"rows": members[0].n, "bytes": size, "members": len(members)}
        writer.commit(summary, files=[f"{place(i)}/manifest.json" for i in range(len(members))])


def verify(path: str | os.PathLike[str] | Store) -> dict[str, Any]:
    """`rowstore.verify` of an index, or of every member of an ensemble and of the list of them."""
    store = Store.at(path)
    if not (is_ensemble(store) and store.exists("manifest.json")):
        return verify_index(store)
    try:
        artifact = Artifact.open(store, KIND)
        errors = artifact.verify()
        places = [str(member["place"]) for member in artifact.spec["members"]]
    except (CorruptError, KeyError, TypeError) as e:
        return {"ok": False, "errors": [str(e)]}
    for member in places:
        try:
            errors += verify_index(store.child(member))["errors"]
        except InfluentError as e:
            errors.append(str(e))
    if not errors:
        try:
            Ensemble.open(store)
        except InfluentError as e:
            errors.append(str(e))
    return {"ok": not errors, "errors": errors}

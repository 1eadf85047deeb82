"""Work in pieces that outlives a kill: what is finished lies under a long job's directory until the job is done.

Each stage is an artifact (artifact.py) named by what it is made of, so that only the very same work is taken up again.
Not here: which stages a job has (distilling.py), and that it clears them away at its end.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch

from influent.artifact import Artifact, ArtifactWriter
from influent.digests import digest
from influent.storage import Store

Arrays = Mapping[str, np.ndarray]


def in_pieces(
    store: Store, kind: str, spec: dict[str, object], n: int, step: int, make: Callable[[int, int], Arrays]
) -> dict[str, np.ndarray]:
    """The arrays of `make(lo, hi)` for every `step` of n rows, joined; those that were made before are read.

    Args:
        spec: what the numbers depend on.

    Raises:
        CorruptError: a finished stage was damaged since; says what to delete.
    """
    writer = ArtifactWriter.open(store.child(f"{kind}-{digest(spec)[-16:]}"), kind, spec)
    if not writer.committed:
        for lo in range(0, n, step):
            hi, name = min(lo + step, n), f"{lo:012d}"
            if name not in writer.records:
                made = make(lo, hi)
                writer.put(name, {key: torch.from_numpy(np.ascontiguousarray(x)) for key, x in made.items()})
        writer.commit({"rows": n})
    kept, parts = Artifact.open(writer.store, kind), []
    for record in kept.records:
        kept.check(record.name)
        parts.append({key: tensor.numpy().copy() for key, tensor in kept.tensors(record.name).items()})
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def clear(store: Store) -> None:
    """Remove every stage, and on a local disk its folders."""
    for name in store.names():
        store.delete(name)
    folder = store.local("")
    if folder is not None and folder.is_dir():
        for each in [*sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True), folder]:
            each.rmdir()

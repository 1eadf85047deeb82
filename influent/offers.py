"""An offer's scores on disk: one shard of rows after another, an artifact (kind `scores`) beside the offer's catalog.

Not here: who scores (student.py), what the scores say of providers (appraising.py).
"""

import numpy as np
import torch

from influent.artifact import Artifact, ArtifactWriter
from influent.catalog import Catalog
from influent.progress import Progress
from influent.storage import Store
from influent.student import Student

KIND = "scores"
SHARD_ROWS = 1024
FILES = ("catalog.json", "catalog.parquet")


def score_rows(
    student: Student, listed: Catalog, store: Store, progress: Progress | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Scores [N] float32 and target tokens [N] of the rows of a catalog, from the shards in `store` or into them."""
    spec = {"student": student.digest, "data": listed.digest}
    writer = ArtifactWriter.open(store, KIND, spec, notes={"shard_rows": SHARD_ROWS})
    size = writer.notes["shard_rows"]
    for number, lo in enumerate(range(0, listed.n, size)):
        hi, name = min(lo + size, listed.n), f"{number:06d}"
        if name not in writer.records:
            values, tokens = student(listed.examples(lo, hi))
            shard = {"score": torch.from_numpy(values), "tokens": torch.from_numpy(tokens.astype(np.float32))}
            writer.put(name, shard, rows=(lo, hi))
        if progress is not None:
            progress("appraise", hi, listed.n)
    if not writer.committed:
        writer.commit({"rows": listed.n, "skipped": listed.skipped}, files=FILES)
    return read_scores(Artifact.open(store, KIND))


def read_scores(scores: Artifact) -> tuple[np.ndarray, np.ndarray]:
    """Scores and target tokens of every row; CorruptError when a shard's bytes are not those that were written."""
    found = []
    for record in scores.records:
        scores.check(record.name)
        shard = scores.tensors(record.name)
        found.append((shard["score"].numpy().copy(), shard["tokens"].numpy().astype(np.float64)))
    return np.concatenate([s for s, _ in found]), np.concatenate([t for _, t in found])

"""What is judged: score matrices by name, from an index, from files, and the two baselines beside them.

Every matrix is [Q, N] float64, larger = training on the row pushes the query's loss further down. Not here: judging.
"""

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from influent import baselines
from influent.artifact import Artifact, finished
from influent.curvature import list_fitted
from influent.digests import digest
from influent.ensemble import Ensemble
from influent.errors import DataError, NumericsError, SpecError
from influent.methods import self_influence
from influent.progress import Progress
from influent.querying import query
from influent.records import content_hash, display_text, read_examples
from influent.rng import Stream
from influent.rowstore import Index

BM25, RANDOM, LOSS = "bm25", "random", "loss"
LABELS = ("id", "source", "provider")


@dataclass(frozen=True, slots=True)
class Rows:
    """Training rows or queries as records: contents, and the labels that rows carry."""

    contents: list[dict[str, Any]]
    labels: Mapping[str, list[str | None]]

    @property
    def digest(self) -> str:
        """Of the contents in order: the same from an index and from its file."""
        return digest([content_hash(content) for content in self.contents])

    def texts(self) -> Iterable[str]:
        return map(display_text, self.contents)


def read_rows(data: Any, what: str = "data") -> Rows:
    """The records of a file or sequence that can be rows, in order: those that an index of it has. DataError, which
    names the argument `what` they are, when there is none."""
    kept = [example for example in read_examples(data) if example.skip is None]
    if not kept:
        raise DataError(f"{what}: there is no record with a text in {data if isinstance(data, str) else 'it'}")
    labels = {name: [getattr(example, name) for example in kept] for name in LABELS}
    return Rows([example.content for example in kept], labels)


def indexed_rows(index: Ensemble) -> Rows | None:
    """The records behind an index's rows; None where it was made of examples that are not records."""
    catalog = index.first.catalog
    described = catalog.describe(list(range(index.n)))
    labels = {name: [row[name] for row in described] for name in LABELS}
    try:
        return Rows(catalog.examples(0, index.n), labels)
    except SpecError:  # a catalog of ids alone
        return None


def read_scores(name: str, given: Any) -> np.ndarray:
    """A score matrix [Q, N], or a vector [N] for detection, from an array or a .npy file.

    Raises SpecError (no such file, or not numbers in one of these shapes), NumericsError (not finite).
    """
    scores = load_array(f"scores {name}", given) if isinstance(given, str | Path) else np.asarray(given)
    if scores.ndim not in (1, 2) or scores.size == 0 or scores.dtype.kind not in "fiub":
        got = f"shape {list(scores.shape)} of {scores.dtype}"
        raise SpecError(f"scores {name}: expected numbers, [queries, rows] or [rows], got {got}")
    scores = scores.astype(np.float64)
    if not np.isfinite(scores).all():
        place = np.argwhere(~np.isfinite(scores))[0]
        raise NumericsError(f"scores {name}: not finite at {place.tolist()}: {scores[tuple(place)]}")
    return scores


def load_array(what: str, path: str | Path) -> np.ndarray:
    """The array in a .npy file; SpecError when there is none."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise SpecError(f"{what}: {path}: no such file")
    try:
        return np.load(file, allow_pickle=False)
    except (ValueError, OSError, EOFError) as e:
        raise SpecError(f"{what}: {path}: not a .npy file of numbers ({str(e).splitlines()[0]})") from e


def chance(num_queries: int, num_rows: int) -> np.ndarray:
    """Random scores: standard normals, the same every time."""
    return Stream(0, "baseline", "random", "matrix").normals(num_queries * num_rows).reshape(num_queries, -1) * 1.0


def shared_words(rows: Rows, queries: Rows) -> np.ndarray:
    """BM25 of every row for every query; 0 where they share no word."""
    matrix = np.zeros((len(queries.contents), len(rows.contents)))
    found = baselines.bm25(rows, list(queries.texts()), k=len(rows.contents))
    for query_number, pairs in enumerate(found):
        for row, score in pairs:
            matrix[query_number, row] = score
    return matrix


@dataclass(frozen=True, slots=True, kw_only=True)
class FromIndex:
    """How an index's own scores are made: the options of `influent query`."""

    index: Ensemble
    queries: Any
    normalize: str = "none"
    curvature: str | None = None
    damping: str | None = None
    parity: str | None = None
    memory: int | None = None
    model: Any = None
    task: Any = None
    token_budget: int = 4096
    device: str | None = None

    @property
    def name(self) -> str:
        return str(self.index.first.notes["method"])

    def matrix(self, damping: str | None, progress: Progress | None) -> tuple[np.ndarray, dict[str, Any]]:
        """The scores with this damping (by default that of the options), and what `influent query` says of its
        method. A missing fit is made, in the index's folder."""
        with tempfile.TemporaryDirectory(prefix="influent-") as folder:
            path = f"{folder}/scores.npy"
            document = query(
                self.index.path, queries=self.queries, k=1, bottom=False, scores=path, normalize=self.normalize,
                curvature=self.curvature, damping=damping or self.damping, parity=self.parity,
                memory=self.memory, model=self.model,
                task=self.task, token_budget=self.token_budget, device=self.device, progress=progress,
            )  # fmt: skip
            return np.load(path).astype(np.float64), document["method"]

    def suspicion(self, progress: Progress | None) -> np.ndarray:
        """Self-influence of every row, [N]."""
        document = self_influence(
            self.index.path, k=self.index.n, curvature=self.curvature, damping=self.damping, parity=self.parity,
            memory=self.memory, model=self.model, task=self.task, token_budget=self.token_budget, device=self.device,
            progress=progress,
        )  # fmt: skip
        values = np.empty(self.index.n)
        for row in document["rows"]:
            values[row["row"]] = row["score"]
        return values


def own_losses(index: Ensemble) -> np.ndarray:
    """The loss of every row a target token, mean over the members, [N]: the plainest sign of a wrong label."""
    each = [member.stat("loss").double() / member.stat("tokens").double().clamp(min=1) for member in index.members]
    return np.mean([losses.numpy() for losses in each], axis=0)


def forget(index: Index, before: Sequence[str], keep: str) -> None:
    """Delete the factors that a grid of dampings left, but for those there were `before` and the one to `keep`.

    More than one fit in an index would make a later query without a damping ambiguous.
    """
    extra = set(list_fitted(index)) - {*before, keep}
    for folder, kind in finished(index.store, "curvature/"):
        if kind != "cholesky":
            continue
        factors = Artifact.open(folder, "cholesky")
        if factors.spec["index"] == index.digest and f"fim:{factors.spec['damping']}" in extra:
            folder.delete("manifest.json")  # the commit first: no reader then finds half of it
            for other in folder.names():
                folder.delete(other)

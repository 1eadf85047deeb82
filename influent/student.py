"""A student: a small model's view of rows, with a fitted head, that scores them as the owner's gradients would.

The artifact (kind `student`) is self-contained and verifiable: safetensors and JSON, nothing to unpickle. Its spec
carries the owner's model fingerprint, the target's digest, the labels it was fitted to and the small model's
fingerprint; its summary the fidelity on held-out labels and the date. The small model is named by its path, or lies in
`model/` beside the rest. Labels are an artifact of their own in `labels/`, which a student works without: it can be
handed out alone. Not here: fitting (distilling.py), scoring an offer (appraising.py).
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from influent import tangent
from influent.artifact import Artifact, ArtifactWriter
from influent.digests import digest
from influent.errors import CorruptError, MismatchError, SpecError
from influent.features import Features, LanguageModel, Words, load_encoder, load_lm
from influent.ridge import Calibration, Ridge
from influent.storage import Store

KIND, LABELS = "student", "labels"
HEAD = "head"


class Head(NamedTuple):
    """What turns features into values of the owner's unit."""

    ridge: Ridge
    calibration: Calibration

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return self.calibration(self.ridge(x))


@dataclass(frozen=True, slots=True, eq=False)
class Student:
    """A student ready to score. `spec` and `summary` are the artifact's; `digest` its identity."""

    features: Features
    head: Head
    spec: dict[str, Any]
    summary: dict[str, Any]
    digest: str

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
        """Scores [n] float32, in the owner's unit, and target tokens [n]; a row without a token to predict scores 0."""
        x, tokens = self.features(rows)
        return np.where(tokens > 0, self.head(x), 0.0).astype(np.float32), tokens


def save(
    store: Store,
    spec: dict[str, Any],
    features: Features,
    head: Head,
    *,
    summary: dict[str, Any],
    notes: dict[str, Any],
    files: Callable[[], Sequence[str]] = tuple,
) -> str:
    """Write a student; its digest. `files` puts the small model's files there, if it goes along, and names them: the
    student then vouches for them. Nothing is written over another student.

    Raises MismatchError when another student is there.
    """
    writer = ArtifactWriter.open(store, KIND, {**spec, "features": features.facts}, notes=notes)
    if not writer.committed:
        tensors = {
            "ridge.mean": head.ridge.mean,
            "ridge.scale": head.ridge.scale,
            "ridge.weights": head.ridge.weights,
            "ridge.bias": np.array([head.ridge.bias, head.ridge.penalty]),
            "calibration.x": head.calibration.x,
            "calibration.y": head.calibration.y,
        }
        stored = {name: torch.from_numpy(np.asarray(value, dtype=np.float64)) for name, value in tensors.items()}
        stored |= {f"features.{name}": tensor for name, tensor in features.tensors.items()}
        writer.put(HEAD, stored)
        writer.commit(summary, files=files())
    return writer.digest


def open_student(
    path: str | Store, *, model: str | None = None, token_budget: int = 4096, device: str | None = None
) -> Student:
    """A student from its directory.

    Args:
        model: where the small model is, if not where it was.

    Raises:
        FormatError, CorruptError: the directory is not a finished, sound student.
        MismatchError: the small model is not the one that it was fitted with.
    """
    store = Store.at(path)
    artifact = Artifact.open(store, KIND)
    artifact.check(HEAD)
    tensors = dict(artifact.tensors(HEAD))
    try:
        arrays = {name: tensor.numpy().copy() for name, tensor in tensors.items()}
        bias, penalty = arrays["ridge.bias"].tolist()
        ridge = Ridge(arrays["ridge.mean"], arrays["ridge.scale"], arrays["ridge.weights"], bias, penalty)
        head = Head(ridge, Calibration(arrays["calibration.x"], arrays["calibration.y"]))
        facts = artifact.spec["features"]
        made = {name.removeprefix("features."): t for name, t in tensors.items() if name.startswith("features.")}
        features = _features(store, facts, made, artifact.notes, model, token_budget, device)
    except (KeyError, ValueError) as e:
        if isinstance(e, SpecError | MismatchError):
            raise
        raise CorruptError(f"{store}: not a student's content: {type(e).__name__}: {e}; distil it again") from e
    return Student(features, head, artifact.spec, artifact.summary, artifact.digest)


def _features(
    store: Store,
    facts: dict[str, Any],
    tensors: Mapping[str, Tensor],
    notes: dict[str, Any],
    model: str | None,
    token_budget: int,
    device: str | None,
) -> Features:
    if facts["kind"] in ("tfidf", "bm25"):
        return Words.restore(facts["kind"], tensors)
    inside = store.local("model/config.json")
    where = model or (str(inside.parent) if inside is not None and inside.is_file() else notes.get("model"))
    if where is None:
        raise SpecError(f"{store}: does not say where its small model is; give --model")
    given: dict[str, Any] = {"max_length": facts["max_length"], "token_budget": token_budget, "device": device}
    if facts["kind"] == tangent.KIND:
        features: Features = tangent.restore(load_lm(where, side=0, **given), tensors)
        return _same(store, features, facts, where)
    lm = facts["kind"] in ("lm", "tuned")
    # Students made before e h^T was a feature have no `side`.
    sided = {"kind": facts["kind"], "side": facts.get("side", 0)} if lm else {}
    return _same(store, load_lm(where, **sided, **given) if lm else load_encoder(where, **given), facts, where)


def _same(store: Store, features: Features, facts: dict[str, Any], where: str) -> Features:
    """The features, if they are those of the facts."""
    if features.facts != facts:
        name = next(name for name in facts if features.facts.get(name) != facts[name])
        raise MismatchError(
            f"{store}: was fitted with another small model: {name} is {facts[name]}, {where} has "
            f"{features.facts.get(name)}; give --model with the right one"
        )
    return features


class Labels(NamedTuple):
    """Labelled rows by content hash: `values` [n, Q] of each query, and whether a row was held out of the fit [n]."""

    hashes: list[str]
    values: np.ndarray
    held: np.ndarray


def save_labels(store: Store, student: str, labels: Labels) -> None:
    """Write the labels of the student with digest `student` beside it."""
    place = store.child(LABELS)
    content = digest([labels.hashes, labels.held.astype(int).tolist()])
    writer = ArtifactWriter.open(place, LABELS, {"student": student, "rows": content})
    if not writer.committed:
        raw = np.frombuffer(bytes.fromhex("".join(labels.hashes)), dtype=np.uint8).reshape(-1, 16).copy()
        tensors = {
            "hash": torch.from_numpy(raw),
            "values": torch.from_numpy(np.ascontiguousarray(labels.values, dtype=np.float32)),
            "held": torch.from_numpy(labels.held.astype(np.uint8)),
        }
        writer.put(LABELS, tensors, rows=(0, len(labels.hashes)))
        writer.commit({"rows": len(labels.hashes)})


def read_labels(store: Store, student: str) -> Labels | None:
    """The labels that lie beside a student; None when it was handed out without them.

    Raises MismatchError for those of another student.
    """
    place = store.child(LABELS)
    if not place.exists("manifest.json"):
        return None
    artifact = Artifact.open(place, LABELS)
    if artifact.spec["student"] != student:
        raise MismatchError(f"{place}: are labels of another student ({artifact.spec['student']}); remove them")
    artifact.check(LABELS)
    tensors = artifact.tensors(LABELS)
    hashes = [bytes(row).hex() for row in tensors["hash"].numpy()]
    return Labels(hashes, tensors["values"].numpy().copy(), tensors["held"].numpy().astype(bool))


def save_model(features: LanguageModel | tangent.Tangent, store: Store) -> list[str]:
    """Put a small model that lies nowhere else into the student; the names of its files there."""
    with tempfile.TemporaryDirectory(prefix="influent-") as folder:
        cast(Any, features.model).save_pretrained(folder)
        features.task.tokenizer.save_pretrained(folder)
        return copy_model(folder, store)


def copy_model(source: str, store: Store) -> list[str]:
    """Put a small model's folder into the student, weights as safetensors only; the names of its files there.

    Raises SpecError for one that is not a local folder.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise SpecError(f"{source}: only a local folder can be put into the student")
    names = []
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix in (".json", ".safetensors", ".txt", ".model", ".jinja"):
            names.append(f"model/{path.name}")
            store.put_file(names[-1], path)
    return names

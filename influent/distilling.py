"""The verb `distill`: ALinFiK, a small model that learns to value rows as the owner's gradients do.

Rows of the index are drawn by provider and labelled with their LinFiK; a ladder of students is fitted to four fifths
of them and each is measured on the rest. The one whose left-out predictions rank best is kept; its fidelity is what it
reaches on the held-out fifth, which took no part in the choice. One head for one target: a single one for mixed tasks
fails. What is public of ALinFiK (Pan et al., NAACL 2025) is an abstract; this is our reading. Not here: features
(features.py, lexical.py), regression (ridge.py), what a student is on disk (student.py).
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from math import ceil
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from influent import metrics, providers, score, stages, tuning, untrained
from influent import student as students
from influent import target as targets
from influent.attach import Run
from influent.catalog import Catalog
from influent.digests import digest
from influent.errors import DataError, SpecError
from influent.features import Features, LanguageModel, Words, load_encoder, load_lm
from influent.lexical import Bm25, TfIdf
from influent.loading import noted_path
from influent.payments import MIN_FIDELITY, MIN_LABELS
from influent.progress import Progress
from influent.querying import model_of
from influent.recompute import Recomputed, reattached
from influent.records import content_hash, display_text
from influent.reduce import Pick
from influent.ridge import CALIBRATIONS, fit
from influent.rng import Stream
from influent.rowstore import Index
from influent.storage import Store
from influent.student import Head, Labels
from influent.target import Target
from influent.task import Encodes, Task
from influent.valuing import FORMS, unit_of

RUNGS = ("bm25", "tfidf", "encoder", "lm", "tuned")
MAKING = "making"  # what is kept while a student is made, and gone once it is
LEAST = 20  # labels of each provider, as far as it has rows
HELD = 0.2
BEST = 0.05  # recall is of the best 5 %
BATCH = 256  # rows whose features are made, and kept, together
LIVE = 256  # rows that are labelled together where none are stored


def distill(
    index: str,
    *,
    target: Any,
    student: str,
    out: str,
    labels: int | None = None,
    rung: str = "auto",
    encoder: str | None = None,
    by: str = "provider",
    normalize: str = "cosine",
    calibration: str = "linear",
    epochs: int | None = None,
    rate: float = 1e-4,
    embed_model: bool = False,
    seed: int = 0,
    model: str | nn.Module | None = None,
    token_budget: int = 4096,
    device: str | None = None,
    task: Task | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Distil the value of rows for a target into a small model, and say how well it does.

    Args:
        target: a file or sequence of records: what the model should do better.
        student: the small causal language model, a folder or hub name.
        labels: how many rows of the index to label, at least 20 a provider; all of them by default.
        rung: `bm25`, `tfidf`, `encoder`, `lm` or `tuned`; `auto` keeps the one whose left-out predictions rank best.
        encoder: a sentence encoder, for the rung of that name.
        epochs, rate: fine-tune the small model on the labels for so many epochs at most (8 for the rung `tuned`), at
            this rate of AdamW; `auto` climbs that rung where epochs are given.
        calibration: `linear` or `isotonic`: how scores become values of the owner's unit.
        embed_model: put the small model into the student.

    Returns:
        The document of docs/schemas/distill.json.

    Raises:
        SpecError, DataError, MismatchError, NumericsError: as their classes say.
    """
    asked = _asked(rung, encoder, normalize, calibration, task, epochs)
    recipe = tuning.Recipe(epochs=8 if epochs is None else epochs, rate=rate, seed=seed)
    store = Store(out)
    opened, wanted = Index.open(index), targets.read(target, task)
    groups = providers.groups_of(opened.catalog.fields("provider", "source"), by)
    chosen, held = split(groups.labels, labels, seed=seed)
    if held.sum() < 3 or (~held).sum() < 3:
        raise DataError(f"{index}: {len(chosen)} rows are too few to fit a student and to measure it: index more")
    run, making = Run(token_budget=token_budget, device=device), store.child(MAKING)
    values = _labels(opened, wanted, chosen, normalize, model, task, run, making, progress)
    rows = _contents(opened.catalog, chosen)
    made: dict[str, _Rung] = {}
    for name in asked:
        features = _features(name, student, encoder, rows, wanted, held, token_budget, device)
        if name == "tuned":
            assert isinstance(features, LanguageModel)
            made[name] = _tuned(features, rows, values.mean(axis=1), held, calibration, recipe, making, progress)
        else:
            made[name] = _rung(features, rows, values.mean(axis=1), held, calibration, making, progress)
    kept = max(made, key=lambda name: made[name].left_out)
    best, small, baseline = made[kept], made.get("lm") or made.get("tuned"), None
    if small is not None:
        own = _own_values(small, student, _picked(rows, held), wanted, normalize, run, making)
        baseline = dict(zip(("spearman", "recall"), _quality(own, values.mean(axis=1)[held]), strict=True))
    spec = {
        "model": opened.spec["model"]["fingerprint"], "index": opened.digest, "target": wanted.digest,
        "queries": len(wanted), "normalize": normalize, "by": by, "rung": kept, "calibration": calibration,
        "labels": len(chosen), "held": int(held.sum()), "seed": seed,
        **({"unit": unit_of(opened, normalize)} if "scale" in opened.spec else {}),
    }  # fmt: skip
    path = student if kept == "lm" else encoder
    files: Callable[[], Sequence[str]] = tuple
    if kept == "tuned" and isinstance(best.features, LanguageModel):
        path, files = None, partial(students.save_model, best.features, store)
    elif embed_model and path is not None and kept in ("lm", "encoder"):
        path, files = None, partial(students.copy_model, path, store)
    fidelity = {
        "spearman": best.spearman, "recall": best.recall, "labels": len(chosen), "held": int(held.sum()),
    }  # fmt: skip
    document = {
        "student": out, "rung": kept, "rungs": [rung.document(name) for name, rung in made.items()],
        "fidelity": fidelity, "priced": best.spearman >= MIN_FIDELITY, "target": wanted.facts(target),
        "labels": {name: int(n) for name, n in zip(groups.names, np.bincount(groups.labels[chosen],
                   minlength=len(groups.names)), strict=True)},
        "baseline": baseline, "cost": _cost(opened, small, len(chosen)),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    notes = {"model": None if path is None else noted_path(path), "target": wanted.facts(target)["file"]}
    summary = {name: document[name] for name in ("fidelity", "rungs", "labels", "target", "date")}
    saved = students.save(store, spec, best.features, best.head, summary=summary, notes=notes, files=files)
    every = [row["hash"] or "" for row in opened.catalog.fields("hash")]
    hashes = [every[row] for row in chosen.tolist()]
    students.save_labels(store, saved, Labels(hashes, values, held))
    stages.clear(making)
    return {**document, "digest": saved}


@dataclass(frozen=True, slots=True, eq=False)
class _Rung:
    """One rung of the ladder: its head, and how it did."""

    features: Features
    head: Head
    left_out: float  # Spearman of leave-one-out predictions, by which the rung is chosen
    spearman: float  # with the held-out labels
    recall: float  # of the best 5 % of the held-out labels among as many best scores
    seconds: float  # of a row's features

    def document(self, name: str) -> dict[str, Any]:
        return {
            "rung": name, "spearman": self.spearman, "recall": self.recall, "left_out": self.left_out,
            "seconds_a_row": self.seconds,
        }  # fmt: skip


def split(labels: np.ndarray, wanted: int | None, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows to label [n], ascending; which of them are held out [n] bool), drawn within each group.

    A group gets its share of `wanted`, at least 20 rows as far as it has them; of these a fifth is held out, and five
    at least where there are ten.
    """
    chosen, held = [], []
    for group in range(int(labels.max()) + 1):
        rows = np.flatnonzero(labels == group)
        order = rows[Stream(seed, "distill", "labels", f"group/{group}").permutation(len(rows))]
        share = len(rows) if wanted is None else ceil(wanted * len(rows) / len(labels))
        take = min(len(rows), max(LEAST, share))
        out = max(round(HELD * take), min(MIN_LABELS, take // 2))
        chosen.append(order[:take])
        held.append(np.arange(take) < out)
    rows, flags = np.concatenate(chosen), np.concatenate(held)
    order = np.argsort(rows)
    return rows[order], flags[order]


def _cost(index: Index, small: _Rung | None, labels: int) -> dict[str, Any] | None:
    """What labelling a row costs beside scoring it, by arithmetic: two passes of the large model (forward, and backward
    without weight gradients) for one of the small one; and from how many rows on a student pays for its labels."""
    coverage = index.summary.get("coverage")
    if small is None or not coverage:
        return None
    tracked = sum(block["in"] * block["out"] for block in index.spec["layout"] if block["kind"] != "norm")
    large, little = round(tracked / coverage), small.features.facts["parameters"]
    ratio = 2 * large / little
    return {
        "teacher_parameters": large, "student_parameters": little, "ratio": ratio,
        "break_even_rows": ceil(labels * ratio / (ratio - 1)) if ratio > 1 else None,
    }  # fmt: skip


def _labels(
    index: Index,
    wanted: Target,
    chosen: np.ndarray,
    normalize: str,
    model: str | nn.Module | None,
    task: Task | None,
    run: Run,
    making: Store,
    progress: Progress | None,
) -> np.ndarray:
    """LinFiK of the chosen rows by query, [n, Q] float64: from the stored rows, or, where none are, by passes of the
    owner's model over these rows alone."""
    asked: list[dict[str, Tensor]] = []  # the queries' gradients, once they are needed
    models: list[Recomputed] = []  # and the owner's model, if it is

    def label(lo: int, hi: int) -> dict[str, np.ndarray]:
        rows = chosen[lo:hi]
        if not asked:
            asked.append(targets.gradients(index, wanted, model=model, task=task, run=run, progress=progress))
        if index.codec.stored:
            member = score.Member(index, asked[0])
        else:
            if not models:
                models.append(attached.enter_context(reattached(index, model_of(model, index), task, run)))
            live = models[0].scorer(asked[0], normalize=normalize, rows=set(rows.tolist()), progress=progress)
            member = score.Member(index, {}, scores=live)
        reducers = {"each": Pick(torch.from_numpy(rows))}
        found = score.score_members([member], reducers, normalize=normalize, progress=progress)
        return {"values": found["each"].double().numpy().T}

    spec = {"index": index.digest, "target": wanted.digest, "normalize": normalize, "rows": chosen.tolist()}
    step = len(chosen) if index.codec.stored else LIVE
    with ExitStack() as attached:
        return stages.in_pieces(making, "labels", spec, len(chosen), step, label)["values"]


def _rung(
    features: Features,
    rows: Sequence[Mapping[str, Any]],
    y: np.ndarray,
    held: np.ndarray,
    calibration: str,
    making: Store,
    progress: Progress | None,
) -> _Rung:
    kind = features.facts["kind"]

    def see(lo: int, hi: int) -> dict[str, np.ndarray]:
        start = time.process_time()
        found = features(rows[lo:hi])[0]
        if progress is not None:
            progress(f"features: {kind}", hi, len(rows))
        return {"x": found, "seconds": np.array([time.process_time() - start])}

    if features.tensors:  # of words: cheaper made again than kept
        seen = see(0, len(rows))
    else:
        spec = {"features": features.facts, "rows": _digest_of(rows)}
        seen = stages.in_pieces(making, "features", spec, len(rows), BATCH, see)
    x, seconds = seen["x"], float(seen["seconds"].sum()) / len(rows)
    head, left_out = fitted(x[~held], y[~held], kind=kind, calibration=calibration)
    reached = _quality(head(x[held]), y[held])
    return _Rung(
        features, head, float(metrics.spearman(left_out, y[~held])), *reached, seconds,
    )  # fmt: skip


def fitted(x: np.ndarray, y: np.ndarray, *, kind: str, calibration: str = "linear") -> tuple[Head, np.ndarray]:
    """The head that turns features x [n, D] of a rung into values, and its left-out predictions of y [n]."""
    ridge, left_out = fit(x, y, standardise=kind != "tfidf")
    return Head(ridge, CALIBRATIONS[calibration](left_out, y)), left_out


def _tuned(
    small: LanguageModel,
    rows: Sequence[Mapping[str, Any]],
    y: np.ndarray,
    held: np.ndarray,
    calibration: str,
    recipe: tuning.Recipe,
    making: Store,
    progress: Progress | None,
) -> _Rung:
    """The rung that is trained: what says how it ranks is the part of the labels that its training left out."""
    found = tuning.tune(small, _picked(rows, ~held), y[~held], recipe, store=making, progress=progress)
    left = y[~held][found.validation]
    head = Head(found.ridge, CALIBRATIONS[calibration](found.predicted, left))
    start = time.process_time()
    x, _ = found.features(_picked(rows, held))
    seconds = (time.process_time() - start) / len(x)
    return _Rung(
        found.features, head, float(metrics.spearman(found.predicted, left)), *_quality(head(x), y[held]), seconds
    )  # fmt: skip


def _own_values(
    small: _Rung,
    path: str,
    rows: Sequence[Mapping[str, Any]],
    wanted: Target,
    normalize: str,
    run: Run,
    making: Store,
) -> np.ndarray:
    """The small model's own LinFiK of some rows, [n]: the baseline to beat."""
    facts = small.features.facts
    spec = {
        "model": facts["model"], "target": wanted.digest, "normalize": normalize, "max_length": facts["max_length"],
        "rows": _digest_of(rows),
    }  # fmt: skip

    def value(*_: int) -> dict[str, np.ndarray]:
        own = untrained.own_values(
            path, rows, wanted, normalize=normalize, max_length=facts["max_length"], token_budget=run.token_budget,
            device=run.device,
        )  # fmt: skip
        return {"values": own}

    return stages.in_pieces(making, "baseline", spec, 1, 1, value)["values"]


def _quality(scores: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """Spearman of scores with labels, and the share of the best 5 % of the labels among as many best scores."""
    best = truth >= np.sort(truth)[-max(1, round(BEST * len(truth)))]
    recall = metrics.recall_at(scores, best, int(best.sum())) if not best.all() else 1.0
    return float(metrics.spearman(scores, truth)), recall


def _digest_of(rows: Sequence[Mapping[str, Any]]) -> str:
    return digest([content_hash(dict(row)) for row in rows])


def _picked(rows: Sequence[Mapping[str, Any]], flags: np.ndarray) -> list[Mapping[str, Any]]:
    return [row for row, flag in zip(rows, flags, strict=True) if flag]


def _features(
    name: str,
    small: str,
    encoder: str | None,
    rows: Sequence[Mapping[str, Any]],
    wanted: Target,
    held: np.ndarray,
    token_budget: int,
    device: str | None,
) -> Features:
    if name in ("lm", "tuned"):
        return load_lm(small, token_budget=token_budget, device=device)
    if name == "encoder" and encoder is not None:
        return load_encoder(encoder, token_budget=token_budget, device=device)
    seen = [text for text, out in zip(_texts(rows), held, strict=True) if not out]
    return Words(name, TfIdf.fit(seen) if name == "tfidf" else Bm25.fit(seen, wanted.texts))


def _texts(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [display_text(dict(row)) for row in rows]


def _contents(catalog: Catalog, chosen: np.ndarray, block: int = 4096) -> list[dict[str, Any]]:
    """The contents of some rows, in their order, a block of the catalog at a time."""
    found: list[dict[str, Any]] = []
    for lo in range(0, catalog.n, block):
        here = chosen[(chosen >= lo) & (chosen < lo + block)]
        if len(here):
            contents = catalog.examples(int(here[0]), int(here[-1]) + 1)
            found += [contents[row - here[0]] for row in here.tolist()]
    return found


def _asked(
    rung: str, encoder: str | None, normalize: str, calibration: str, task: Task | None, epochs: int | None
) -> list[str]:
    """The rungs to climb."""
    if task is not None and not isinstance(task, Encodes):
        raise SpecError("a student reads texts: this task has none")
    for name, value, allowed in (
        ("rung", rung, ("auto", *RUNGS)),
        ("normalize", normalize, FORMS),
        ("calibration", calibration, tuple(CALIBRATIONS)),
    ):
        if value not in allowed:
            raise SpecError(f"{name} is {value!r}, expected {', '.join(allowed[:-1])} or {allowed[-1]}")
    if rung == "encoder" and encoder is None:
        raise SpecError("the rung encoder needs --encoder, a sentence encoder's folder")
    if epochs is not None and rung not in ("auto", "tuned"):
        raise SpecError(f"epochs are for the rung tuned (or auto), not for {rung}: leave them out")
    climbed = {"encoder": encoder is not None, "tuned": epochs is not None}
    return [name for name in RUNGS if name == rung or (rung == "auto" and climbed.get(name, True))]

"""The verb `distill`: ALinFiK, a small model that learns to value rows as the owner's gradients do.

Rows of the index are drawn by provider and labelled with their LinFiK; a ladder of students is fitted to four fifths
of them and each is measured on the rest. The one whose left-out predictions rank best is kept; its fidelity is what it
reaches on the held-out fifth, which took no part in the choice. One head for one target: a single one for mixed tasks
fails. What is public of ALinFiK (Pan et al., NAACL 2025) is an abstract; this is our reading. Not here: the rungs
(ladder.py), what a student is on disk (student.py).
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from functools import partial
from math import ceil
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from influent import providers, score, stages, untrained
from influent import student as students
from influent import target as targets
from influent.attach import Run
from influent.catalog import Catalog
from influent.errors import DataError, SpecError
from influent.features import LanguageModel
from influent.ladder import RUNGS, TRAINED, Ladder, Rung, digest_of, picked
from influent.loading import noted_path
from influent.payments import MIN_FIDELITY, MIN_LABELS
from influent.progress import Progress
from influent.querying import model_of
from influent.recompute import Recomputed, reattached
from influent.reduce import Pick
from influent.ridge import CALIBRATIONS
from influent.rng import Stream
from influent.rowstore import Index
from influent.storage import Store
from influent.student import Labels
from influent.tangent import Tangent
from influent.target import Target
from influent.task import Encodes, Task
from influent.training import Recipe
from influent.valuing import FORMS, unit_of

MAKING = "making"  # what is kept while a student is made, and gone once it is
LEAST = 20  # labels of each provider, as far as it has rows
HELD = 0.2
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
    rate: float | None = None,
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
        rung: one of RUNGS (ladder.py); `auto` keeps the one whose left-out predictions rank best.
        encoder: a sentence encoder, for the rung of that name.
        epochs, rate: of the rungs that train the small model, `tangent` (12 epochs at most, rate 0.1 over the model's
            width) and `tuned` (8, 1e-4); `auto` climbs `tuned` only where epochs are given.
        calibration: `linear` or `isotonic`: how scores become values of the owner's unit.
        embed_model: put the small model into the student.

    Returns:
        The document of docs/schemas/distill.json.

    Raises:
        SpecError, DataError, MismatchError, NumericsError: as their classes say.
    """
    asked = _asked(rung, encoder, normalize, calibration, task, epochs, rate)
    store = Store(out)
    opened, wanted = Index.open(index), targets.read(target, task)
    groups = providers.groups_of(opened.catalog.fields("provider", "source"), by)
    chosen, held = split(groups.labels, labels, seed=seed)
    if held.sum() < 3 or (~held).sum() < 3:
        raise DataError(f"{index}: {len(chosen)} rows are too few to fit a student and to measure it: index more")
    run, making = Run(token_budget=token_budget, device=device), store.child(MAKING)
    values = _labels(opened, wanted, chosen, normalize, model, task, run, making, progress)
    ladder = Ladder(
        index=opened, wanted=wanted, rows=_contents(opened.catalog, chosen), y=values.mean(axis=1), held=held,
        student=student, encoder=encoder, normalize=normalize, calibration=calibration, epochs=epochs, rate=rate,
        seed=seed, model=model, task=task, run=run, making=making, progress=progress,
    )  # fmt: skip
    made, skipped = _climb(ladder, asked, all_of_them=rung != "auto")
    kept = max(made, key=lambda name: made[name].left_out)
    best, small, baseline = made[kept], next((made[name] for name in ("lm", *TRAINED) if name in made), None), None
    if small is not None:
        own = _own_values(small, student, picked(ladder.rows, held), wanted, normalize, run, making)
        baseline = dict(zip(("spearman", "recall"), ladder.quality(own), strict=True))
    spec = {
        "model": opened.spec["model"]["fingerprint"], "index": opened.digest, "target": wanted.digest,
        "queries": len(wanted), "normalize": normalize, "by": by, "rung": kept, "calibration": calibration,
        "labels": len(chosen), "held": int(held.sum()), "seed": seed,
        **({"unit": unit_of(opened, normalize)} if "scale" in opened.spec else {}),
    }  # fmt: skip
    path = student if kept == "lm" else encoder
    files: Callable[[], Sequence[str]] = tuple
    if kept in TRAINED and isinstance(best.features, LanguageModel | Tangent):
        path, files = None, partial(students.save_model, best.features, store)
    elif embed_model and path is not None and kept in ("lm", "encoder"):
        path, files = None, partial(students.copy_model, path, store)
    fidelity = {
        "spearman": best.spearman, "recall": best.recall, "labels": len(chosen), "held": int(held.sum()),
    }  # fmt: skip
    document = {
        "student": out, "rung": kept, "rungs": [rung.document(name) for name, rung in made.items()],
        "skipped": skipped,
        "fidelity": fidelity, "priced": best.spearman >= MIN_FIDELITY, "target": wanted.facts(target),
        "labels": {name: int(n) for name, n in zip(groups.names, np.bincount(groups.labels[chosen],
                   minlength=len(groups.names)), strict=True)},
        "baseline": baseline, "cost": _cost(opened, small, len(chosen) + best.passes),
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


def _climb(ladder: Ladder, asked: Sequence[str], *, all_of_them: bool) -> tuple[dict[str, Rung], list[dict[str, str]]]:
    """The rungs by name, and those that cannot be climbed with these models, with the reason; with `all_of_them` that
    is an error."""
    made: dict[str, Rung] = {}
    skipped = []
    for name in asked:
        try:
            made[name] = ladder.climb(name)
        except SpecError as error:
            if all_of_them or name != "tangent":
                raise
            skipped.append({"rung": name, "reason": str(error)})
    return made, skipped


def _cost(index: Index, small: Rung | None, labels: int) -> dict[str, Any] | None:
    """What labelling a row costs beside scoring it, by arithmetic: two passes of the large model (forward, and backward
    without weight gradients) for one of the small one; and from how many rows on a student pays for its labels. A pass
    for slopes costs as much as a label: two forward passes."""
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


def _own_values(
    small: Rung,
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
        "rows": digest_of(rows),
    }  # fmt: skip

    def value(*_: int) -> dict[str, np.ndarray]:
        own = untrained.own_values(
            path, rows, wanted, normalize=normalize, max_length=facts["max_length"], token_budget=run.token_budget,
            device=run.device,
        )  # fmt: skip
        return {"values": own}

    return stages.in_pieces(making, "baseline", spec, 1, 1, value)["values"]


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
    rung: str,
    encoder: str | None,
    normalize: str,
    calibration: str,
    task: Task | None,
    epochs: int | None,
    rate: float | None,
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
    for name, value in (("epochs", epochs), ("rate", rate)):
        if value is not None and rung not in ("auto", *TRAINED):
            raise SpecError(f"{name} is for the rungs {' and '.join(TRAINED)} (or auto), not for {rung}: leave it out")
    Recipe(epochs=epochs or 1, rate=rate or 1.0)  # says what is wrong with them before anything is labelled
    climbed = {"encoder": encoder is not None, "tuned": epochs is not None}
    return [name for name in RUNGS if name == rung or (rung == "auto" and climbed.get(name, True))]

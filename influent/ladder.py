"""The ladder of students: each rung is fitted to labels, ranks those that it left out, and is measured on others.

`bm25` and `tfidf` see words, `encoder` and `lm` the states of a frozen model (features.py), all by ridge regression;
`tuned` (tuning.py) and `tangent` (tangent.py) train the small model. Not here: which rows are labelled, and which rung
is kept (distilling.py).
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from influent import metrics, stages, tangent, tuning
from influent.attach import Run
from influent.digests import digest
from influent.features import Features, LanguageModel, Words, load_encoder, load_lm
from influent.lexical import Bm25, TfIdf
from influent.progress import Progress
from influent.records import content_hash, display_text
from influent.ridge import CALIBRATIONS, Ridge, fit
from influent.rng import Stream
from influent.rowstore import Index
from influent.slopes import slopes
from influent.storage import Store
from influent.student import Head
from influent.target import Target
from influent.task import Task
from influent.training import Recipe

RUNGS = ("bm25", "tfidf", "encoder", "lm", "tuned", "tangent")
TRAINED = ("tuned", "tangent")
TUNED_EPOCHS, TUNED_RATE = 8, 1e-4
BEST = 0.05  # recall is of the best 5 %
BATCH = 256  # rows whose features are made, and kept, together
PASSED = 4096  # labelled rows at most over which the rung `tangent` passes the owner's model once more

Contents = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True, eq=False)
class Rung:
    """One rung of the ladder: its head, and how it did."""

    features: Features
    head: Head
    left_out: float  # Spearman of predictions of labels that were left out, by which the rung is chosen
    spearman: float  # with the held-out labels
    recall: float  # of the best 5 % of the held-out labels among as many best scores
    seconds: float  # of a row's features
    passes: int = 0  # of the owner's model beside those of the labels

    def document(self, name: str) -> dict[str, Any]:
        return {
            "rung": name, "spearman": self.spearman, "recall": self.recall, "left_out": self.left_out,
            "seconds_a_row": self.seconds, "passes": self.passes,
        }  # fmt: skip


@dataclass(frozen=True, eq=False)
class Ladder:
    """What the rungs are fitted to and with: labelled rows [n] with labels y [n], of which some are held out of it."""

    index: Index
    wanted: Target
    rows: Contents
    y: np.ndarray
    held: np.ndarray
    student: str
    encoder: str | None
    normalize: str
    calibration: str
    epochs: int | None
    rate: float | None
    seed: int
    model: str | nn.Module | None
    task: Task | None
    run: Run
    making: Store
    progress: Progress | None

    def climb(self, name: str) -> Rung:
        """The rung of a name.

        Raises:
            SpecError: a model cannot be loaded, or does not go with the owner's (tangent.py).
            NumericsError: a training diverged.
        """
        if name == "tuned":
            return self._tuned()
        if name == "tangent":
            return self._tangent()
        return self._ridge(self._features(name))

    def quality(self, scores: np.ndarray) -> tuple[float, float]:
        """Spearman of scores of the held-out rows with their labels, and the share of the best 5 % of these labels
        among as many best scores."""
        truth = self.y[self.held]
        best = truth >= np.sort(truth)[-max(1, round(BEST * len(truth)))]
        recall = metrics.recall_at(scores, best, int(best.sum())) if not best.all() else 1.0
        return float(metrics.spearman(scores, truth)), recall

    def _features(self, name: str) -> Features:
        if name == "lm":
            return self._small()
        if name == "encoder" and self.encoder is not None:
            return load_encoder(self.encoder, token_budget=self.run.token_budget, device=self.run.device)
        seen = [display_text(dict(row)) for row in picked(self.rows, ~self.held)]
        return Words(name, TfIdf.fit(seen) if name == "tfidf" else Bm25.fit(seen, self.wanted.texts))

    def _small(self) -> LanguageModel:
        return load_lm(self.student, token_budget=self.run.token_budget, device=self.run.device)

    def _ridge(self, features: Features) -> Rung:
        kind, rows = features.facts["kind"], self.rows

        def see(lo: int, hi: int) -> dict[str, np.ndarray]:
            start = time.process_time()
            found = features(rows[lo:hi])[0]
            if self.progress is not None:
                self.progress(f"features: {kind}", hi, len(rows))
            return {"x": found, "seconds": np.array([time.process_time() - start])}

        if features.tensors:  # of words: cheaper made again than kept
            seen = see(0, len(rows))
        else:
            spec = {"features": features.facts, "rows": digest_of(rows)}
            seen = stages.in_pieces(self.making, "features", spec, len(rows), BATCH, see)
        x, fitted_y = seen["x"], self.y[~self.held]
        head, left_out = fitted(x[~self.held], fitted_y, kind=kind, calibration=self.calibration)
        reached = self.quality(head(x[self.held]))
        seconds = float(seen["seconds"].sum()) / len(rows)
        return Rung(features, head, float(metrics.spearman(left_out, fitted_y)), *reached, seconds)

    def _tuned(self) -> Rung:
        recipe = Recipe(
            epochs=self.epochs or TUNED_EPOCHS, rate=TUNED_RATE if self.rate is None else self.rate, seed=self.seed
        )
        rows, y = picked(self.rows, ~self.held), self.y[~self.held]
        found = tuning.tune(self._small(), rows, y, recipe, store=self.making, progress=self.progress)
        head = self._calibrated(found.ridge, found.predicted, y[found.validation])
        return self._measured(found.features, head, found.predicted, y[found.validation])

    def _tangent(self) -> Rung:
        small, numbers = self._small(), np.flatnonzero(~self.held)
        order = Stream(self.seed, "tangent", "labels", "rows").permutation(len(numbers))
        numbers = np.sort(numbers[order[:PASSED]])
        rows, y = [self.rows[i] for i in numbers], self.y[numbers]
        known = slopes(
            self.index, self.wanted, rows, normalize=self.normalize, seed=self.seed, model=self.model, task=self.task,
            run=self.run, store=self.making, progress=self.progress,
        )  # fmt: skip
        recipe = tangent.recipe_for(small, epochs=self.epochs, rate=self.rate, seed=self.seed)
        found = tangent.teach(small, rows, y, known, recipe, store=self.making, progress=self.progress)
        head = self._calibrated(found.ridge, found.predicted, y[found.left_out])
        return self._measured(found.features, head, found.predicted, y[found.left_out], passes=len(rows))

    def _calibrated(self, ridge: Ridge, predicted: np.ndarray, y: np.ndarray) -> Head:
        return Head(ridge, CALIBRATIONS[self.calibration](predicted, y))

    def _measured(
        self, features: Features, head: Head, predicted: np.ndarray, y: np.ndarray, *, passes: int = 0
    ) -> Rung:
        """A rung that was trained: what says how it ranks is the part of the labels that its training left out."""
        start = time.process_time()
        x, _ = features(picked(self.rows, self.held))
        seconds = (time.process_time() - start) / len(x)
        return Rung(
            features, head, float(metrics.spearman(predicted, y)), *self.quality(head(x)), seconds, passes
        )  # fmt: skip


def fitted(x: np.ndarray, y: np.ndarray, *, kind: str, calibration: str = "linear") -> tuple[Head, np.ndarray]:
    """The head that turns features x [n, D] of a rung into values, and its left-out predictions of y [n]."""
    ridge, left_out = fit(x, y, standardise=kind != "tfidf")
    return Head(ridge, CALIBRATIONS[calibration](left_out, y)), left_out


def picked(rows: Contents, flags: np.ndarray) -> list[Mapping[str, Any]]:
    return [row for row, flag in zip(rows, flags, strict=True) if flag]


def digest_of(rows: Contents) -> str:
    return digest([content_hash(dict(row)) for row in rows])

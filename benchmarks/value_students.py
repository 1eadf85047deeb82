"""The ladder of students in value.py: how well each rung ranks rows that were not labelled, from how many labels.

`imitated` is `lm` with a small model that has learnt to predict as the teacher does (influent/imitating.py); `tuned`
and `tangent` are trained from that one, `tuned` for up to a tenth of the rows. `whole` is the agreement with values of
whole gradients, the rest that with those of the index. Every rung but `tangent` sees the index's labels alone;
`tangent` also takes a forward-mode pass over each labelled row that it is fitted to (influent/slopes.py).
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import offer

from influent import distilling, features, ladder, metrics, slopes, tangent, target, tuning, untrained
from influent.attach import Run
from influent.lexical import Bm25, TfIdf
from influent.records import display_text
from influent.rowstore import Index
from influent.storage import Store
from influent.training import Recipe

LENGTH, TEST = 128, 2000
SHARES = (0.04, 0.1, 0.32)  # of the rows, that are labelled
RUNGS = ("bm25", "tfidf", "encoder", "lm", "imitated", "tuned", "tangent")
TUNED, TUNED_RATE = 700, 1e-3  # labels that `tuned` is measured with at most; its rate
WHOLE = 600  # tested rows whose whole gradients are taken
Document = dict[str, Any]


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    return float(metrics.spearman(a.astype(float), b.astype(float)))


def detection(values: np.ndarray, kinds: np.ndarray) -> dict[str, float]:
    """AUC of the planted rows against each other kind."""
    found = {}
    for kind in (*offer.KINDS[1:], "ordinary"):
        both = (kinds == "trigger") | (kinds == kind)
        found[kind] = metrics.auc(values[both].astype(float), kinds[both] == "trigger")
    return found


class Students:
    """The ladder over one seed's offer. Which rows are labelled depends on neither teacher nor target, and a larger
    number of labels contains a smaller; all rungs are measured on the same rows, that are never labelled."""

    def __init__(self, work: Any, size: str, index: Index, imitated: str, encoder: Path | None) -> None:
        self.work, self.index, self.large, self.imitated = work, index, work.model(size), imitated
        rows = work.offer.rows
        names = {name: i for i, name in enumerate(work.offer.providers)}
        self.groups = np.array([names[row["provider"]] for row in rows])
        self.counts = [round(share * len(rows)) for share in SHARES]
        most, _ = distilling.split(self.groups, self.counts[-1], seed=work.seed)
        rest = np.setdiff1d(np.arange(len(rows)), most)
        self.test = np.sort(np.random.default_rng(work.seed).permutation(rest)[:TEST])
        self.used = np.union1d(most, self.test)
        self.rows, self.texts = rows, [display_text(dict(row)) for row in rows]
        small = {"lm": work.model("student"), "imitated": imitated}
        given: dict[str, Any] = {"max_length": LENGTH, "token_budget": work.budget, "device": work.device}
        self.states = {rung: self.seen(features.load_lm(folder, **given)) for rung, folder in small.items()}
        if encoder is not None:
            self.states["encoder"] = self.seen(features.load_encoder(str(encoder), **given))
        self.whole: dict[str, np.ndarray] = {}

    def seen(self, small: features.Features) -> np.ndarray:
        """A small model's features of the rows that are used."""
        parts = [small([self.rows[row] for row in self.used[lo : lo + 512]])[0] for lo in range(0, len(self.used), 512)]
        out = np.zeros((len(self.rows), parts[0].shape[1]), np.float32)
        out[self.used] = np.concatenate(parts)
        return out

    def made(self, rung: str, queries: list[str], fitted: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        """Features of rows by number."""
        if rung in self.states:
            return lambda rows: self.states[rung][rows]
        seen = [self.texts[row] for row in fitted]
        words = TfIdf.fit(seen) if rung == "tfidf" else Bm25.fit(seen, queries)
        return lambda rows: words([self.texts[row] for row in rows])

    def ladder(self, name: str, values: np.ndarray, labels: int) -> list[Document]:
        """Each rung at a number of labels."""
        chosen, held = distilling.split(self.groups, labels, seed=self.work.seed)
        fitted, queries = chosen[~held], [display_text(dict(query)) for query in self.work.offer.targets[name]]
        out = []
        for rung in RUNGS:
            if (rung == "encoder" and rung not in self.states) or (rung == "tuned" and labels > TUNED):
                continue
            if rung in ("tuned", "tangent"):
                score, left_out, epochs = self.trained(rung, name, fitted, values[fitted])
            else:
                made = self.made(rung, queries, fitted)
                head, predicted = ladder.fitted(made(fitted), values[fitted], kind=rung)
                score, left_out, epochs = _scorer(head, made), spearman(predicted, values[fitted]), None
            scores = np.concatenate([score(part) for part in np.array_split(self.test, 8)])
            out.append(
                {
                    "rung": rung, "labels": len(chosen), **self.quality(scores, values[self.test]),
                    "whole": self.quality(scores[:WHOLE], self.whole_values(name)),
                    "held out": spearman(score(chosen[held]), values[chosen[held]]),
                    "left out": left_out, "epochs": epochs,
                    "planted": detection(scores, self.work.kinds[self.test]),
                }
            )  # fmt: skip
        return out

    def trained(
        self, rung: str, name: str, fitted: np.ndarray, y: np.ndarray
    ) -> tuple[Callable[[np.ndarray], np.ndarray], float, int]:
        """Scores of rows by number, the Spearman of the labels that the training left out, and its epochs."""
        work, rows = self.work, [self.rows[row] for row in fitted]
        small = features.load_lm(self.imitated, max_length=LENGTH, token_budget=work.budget, device=work.device)
        with tempfile.TemporaryDirectory(dir=work.folder) as folder:
            store = Store(folder)
            if rung == "tuned":
                tuned = tuning.tune(small, rows, y, Recipe(rate=TUNED_RATE, seed=work.seed), store=store)
                made, ridge = tuned.features, tuned.ridge
                out, predicted, epochs = tuned.validation, tuned.predicted, tuned.epochs
            else:
                known = slopes.slopes(
                    self.index, target.read(work.file(name)), rows, normalize="cosine", seed=work.seed,
                    model=self.large, task=None, run=Run(token_budget=work.budget, device=work.device), store=store,
                )  # fmt: skip
                recipe = tangent.recipe_for(small, epochs=None, rate=None, seed=work.seed)
                taught = tangent.teach(small, rows, y, known, recipe, store=store)
                made, ridge = taught.features, taught.ridge
                out, predicted, epochs = taught.left_out, taught.predicted, taught.epochs
        score = _scorer(ridge, lambda numbers: made([self.rows[row] for row in numbers])[0])
        return score, spearman(predicted, y[out]), epochs

    def whole_values(self, name: str) -> np.ndarray:
        """Values by whole gradients of the first rows that are tested."""
        if name not in self.whole:
            self.whole[name] = self.untrained(self.large, name, self.test[:WHOLE], compress="id")
        return self.whole[name]

    def own(self, name: str, values: np.ndarray) -> Document:
        """The small model's own LinFiK, which takes its gradients and no label."""
        some = self.test[:WHOLE]
        found = self.untrained(self.work.model("student"), name, some, compress=untrained.COMPRESS)
        return {**self.quality(found, values[some]), "whole": self.quality(found, self.whole_values(name))}

    def untrained(self, model: str, name: str, numbers: np.ndarray, *, compress: str) -> np.ndarray:
        return untrained.own_values(
            model, [self.rows[row] for row in numbers], target.read(self.work.file(name)), normalize="cosine",
            max_length=LENGTH, token_budget=self.work.budget, device=self.work.device, compress=compress,
        )  # fmt: skip

    @staticmethod
    def quality(scores: np.ndarray, values: np.ndarray) -> Document:
        best = values >= np.quantile(values, 0.95)
        return {"spearman": spearman(scores, values), "recall": metrics.recall_at(scores, best, int(best.sum()))}


def _scorer(
    head: Callable[[np.ndarray], np.ndarray], made: Callable[[np.ndarray], np.ndarray]
) -> Callable[[np.ndarray], np.ndarray]:
    return lambda rows: head(made(rows))

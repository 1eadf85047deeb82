"""One evaluation, from its request to its document: gathers what is judged, the ground truth, and asks each metric.

Not here: what may be asked (evaluating.py), where scores come from (contenders.py), the metrics (judging.py,
tailpatch.py), pages and plots (scorecard.py, plots.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from influent import contenders, judging, plots, relevance, scorecard
from influent.contenders import BM25, LOSS, RANDOM, FromIndex, Rows
from influent.curvature import list_fitted
from influent.digests import digest
from influent.ensemble import Ensemble
from influent.errors import DataError, MismatchError, SpecError
from influent.finetune import FineTune, Recipe
from influent.judging import Halves
from influent.progress import Progress
from influent.rerun import Reruns, Trainer, identify, load_trainer
from influent.rng import Stream
from influent.storage import Store
from influent.tailpatch import tail_patch
from influent.truth import Truth

if TYPE_CHECKING:
    from influent.evaluating import Request

TUNING_SHARE = 0.1  # of the queries, on which a damping is chosen
DEFAULT_LENGTH = 512
SIGN = "positive = training on it lowered this loss"
Doc = dict[str, Any]


class Trial:
    """One call of `evaluate`."""

    def __init__(self, request: Request, progress: Progress | None):
        self.ask, self.progress = request, progress
        self.index = None if request.index is None else Ensemble.open(request.index)
        self.queries = (
            None if request.queries is None or self._plain else contenders.read_rows(request.queries, "--queries")
        )
        self.files = self._files()
        self.matrices: dict[str, np.ndarray] = {}
        self.reported = np.arange(self.num_queries)

    def run(self) -> Doc:
        ask = self.ask
        document: Doc = {"index": ask.index, "rows": self.num_rows, "queries": self.num_queries}
        if self.num_queries:
            document |= self._gather()
        metrics: dict[str, Callable[[], Doc]] = {
            "lds": self._lds, "loo": self._loo, "tail-patch": self._tail_patch, "mislabel": self._mislabel,
            "brittleness": self._brittleness, "selection": lambda: self._curve(keep=True),
            "removal": lambda: self._curve(keep=False), "retrieval": self._retrieval,
        }  # fmt: skip
        judged = {name: _headed(metrics[name]()) for name in ask.metrics}
        document |= {"reported": self.reported.tolist(), **judged, "sign": SIGN}
        self._write(document)
        return document

    # what there is

    @property
    def _plain(self) -> bool:
        """Whether examples are not records: the task of a model of the user's own."""
        from influent.task import Encodes

        return self.ask.task is not None and not isinstance(self.ask.task, Encodes)

    @cached_property
    def rows(self) -> Rows | None:
        """The training rows as records, read when first needed; None where there are none."""
        if self.ask.data is not None and not self._plain:
            return contenders.read_rows(self.ask.data)
        return None if self.index is None else contenders.indexed_rows(self.index)

    def _files(self) -> dict[str, np.ndarray]:
        """The score files and arrays; vectors, which only detection takes, are rows of length N."""
        found: dict[str, np.ndarray] = {}
        for name, given in self.ask.files.items():
            if name in (BM25, RANDOM, LOSS) or (self.index is not None and name == self._own.name):
                raise SpecError(f"scores {name}: expected another name: that one is taken here")
            found[name] = contenders.read_scores(name, given)
            if found[name].ndim == 1 and "mislabel" not in self.ask.metrics:
                raise SpecError(f"scores {name}: a vector is for mislabel only; expected [queries, rows]")
        return found

    @cached_property
    def num_rows(self) -> int:
        known = [
            *([("the index", self.index.n)] if self.index is not None else []),
            *([("data", len(self.rows.contents))] if self.ask.data is not None and self.rows is not None else []),
            *((f"scores {name}", matrix.shape[-1]) for name, matrix in self.files.items()),
        ]
        return _agreed("rows", known)

    @cached_property
    def num_queries(self) -> int:
        """0 where nothing is asked: detection by self-influence or by vectors alone."""
        given = self.ask.queries
        known = [
            *([("queries", len(given))] if self._plain and given is not None else []),
            *([("queries", len(self.queries.contents))] if self.queries is not None else []),
            *((f"scores {name}", len(matrix)) for name, matrix in self.files.items() if matrix.ndim == 2),
        ]
        return _agreed("queries", known) if known else 0

    @cached_property
    def _own(self) -> FromIndex:
        ask = self.ask
        assert self.index is not None
        return FromIndex(
            index=self.index, queries=ask.queries, normalize=ask.normalize, curvature=ask.curvature,
            damping=ask.damping, parity=ask.parity, memory=ask.memory, model=ask.model, task=ask.task,
            token_budget=ask.token_budget, device=ask.device,
        )  # fmt: skip

    def _gather(self) -> Doc:
        """Every matrix that is judged, [Q, N], those of the index first; what is to be said of them."""
        told: Doc = {}
        if self.index is not None and self.ask.queries is not None:
            matrix, method = self._tuned(told) if self.ask.grid else self._own.matrix(None, self.progress)
            self.matrices[self._own.name] = matrix
            told["method"] = {**method, "normalize": self.ask.normalize}
        self.matrices |= {name: matrix for name, matrix in self.files.items() if matrix.ndim == 2}
        if self.rows is not None and self.queries is not None:
            self.matrices[BM25] = contenders.shared_words(self.rows, self.queries)
        self.matrices[RANDOM] = contenders.chance(self.num_queries, self.num_rows)
        return told

    def _tuned(self, told: Doc) -> tuple[np.ndarray, Doc]:
        """The index's scores with the damping of the grid that has the best LDS on a tenth of the queries; the others
        are what is reported from here on, of everything."""
        if self.num_queries < 2:
            raise DataError("--damping-grid: expected 2 or more queries: some choose, the others are reported")
        size = max(1, round(TUNING_SHARE * self.num_queries))
        tuning = Stream(0, "", "evaluate", "tuning").subset(self.num_queries, size)
        self.reported = np.delete(self.reported, tuning)
        assert self.index is not None
        fitted = [list_fitted(member) for member in self.index.members]
        found, values = {}, {}
        for damping in self.ask.grid:
            found[damping] = self._own.matrix(damping, self.progress)
            values[damping] = float(self.halves.lds(found[damping][0], tuning).mean())
        chosen = max(values, key=lambda damping: values[damping])
        for member, before in zip(self.index.members, fitted, strict=True):
            contenders.forget(member, before, f"fim:{chosen}")
        told["damping"] = {"chosen": chosen, "lds": values, "tuned_on": tuning.tolist()}
        return found[chosen]

    # the ground truth

    @cached_property
    def trainer(self) -> Trainer | None:
        ask = self.ask
        if ask.base is not None:
            return self._finetune(ask.base)
        return load_trainer(ask.train)[0] if isinstance(ask.train, str) else ask.train

    def _finetune(self, model: str) -> FineTune:
        ask = self.ask
        if self.rows is None or self.queries is None:
            raise SpecError("the built-in training needs texts: give --data FILE and --queries FILE")
        length = ask.max_length or (self.index.first.notes["max_length"] if self.index is not None else None)
        recipe = Recipe(epochs=ask.epochs, rate=ask.rate, batch=ask.batch, max_length=length or DEFAULT_LENGTH)
        return FineTune.load(
            model, self.rows.contents, self.queries.contents, recipe, token_budget=ask.token_budget, device=ask.device
        )

    @cached_property
    def truth(self) -> Truth:
        trainer = self.trainer
        told = None
        if trainer is not None:
            told = load_trainer(self.ask.train)[1] if isinstance(self.ask.train, str) else identify(trainer)
        assert self.ask.truth is not None
        known = {"rows": self.num_rows, "queries": self.num_queries, "trainer": told, **self._digests}
        return Truth.open(self.ask.truth, known)

    @cached_property
    def _digests(self) -> Doc:
        return {
            "data": None if self.rows is None else self.rows.digest,
            "asked": None if self.queries is None else self.queries.digest,
        }

    @cached_property
    def reruns(self) -> Reruns:
        stored = {each.seed for each in self.truth.of_role("subset")}
        seeds = range(self.ask.seeds) if self.ask.seeds is not None else sorted(stored) or [0]
        return Reruns(self.truth, self.trainer, seeds=seeds, progress=self.progress)

    @cached_property
    def halves(self) -> Halves:
        return judging.subset_outcomes(self.reruns, self.ask.subsets)

    # the metrics

    def _lds(self) -> Doc:
        return judging.lds(self.matrices, self.halves, self.reported)

    def _loo(self) -> Doc:
        groups = self._groups()
        if self.ask.left_out is not None and self.ask.left_out < len(groups):
            picked = Stream(0, "", "evaluate", "left out").subset(len(groups), self.ask.left_out)
            groups = [groups[i] for i in picked]
        if len(groups) < 2:
            raise DataError(f"loo: expected 2 or more of each {self.ask.leave} to leave out, got {len(groups)}")
        return judging.leave_out(self.matrices, self.reruns, self.reported, groups, self.ask.leave)

    def _groups(self) -> list[np.ndarray]:
        """Row numbers of what is left out at a time."""
        if self.ask.leave == "row":
            return [np.array([row]) for row in range(self.num_rows)]
        labels = self._labels(self.ask.leave)
        return [np.array([row for row, own in enumerate(labels) if own == each]) for each in dict.fromkeys(labels)]

    def _labels(self, name: str) -> list[str | None]:
        if self.rows is None:
            raise SpecError(f"--leave {name}, or flags by it, need rows that carry a {name}: give an INDEX or --data")
        return self.rows.labels[name]

    def _tail_patch(self) -> Doc:
        ask = self.ask
        model = ask.model if ask.model is not None else self.index and self.index.first.notes["model"]
        if isinstance(model, Sequence) and not isinstance(model, str):
            model = model[0]  # of an ensemble, that of its first member
        if not isinstance(model, str):
            raise SpecError("tail-patch needs the model as a folder or name: give --model")
        tuned = self._finetune(model)
        facts = tuned.describe()
        spec = {name: facts[name] for name in ("base", "rate", "max_length")} | {"k": ask.k, **self._digests}
        assert ask.truth is not None
        store = Store(ask.truth).child(f"tail-patch/{digest(spec).rpartition(':')[2][:16]}")
        return tail_patch(self.matrices, tuned, store, spec, self.reported, k=ask.k, progress=self.progress)

    def _mislabel(self) -> Doc:
        suspicion: dict[str, np.ndarray] = {}
        if self.index is not None:
            suspicion[self._own.name] = self._own.suspicion(self.progress)
        for name, given in self.files.items():
            # Rows that raise the queries' losses are the suspicious ones.
            suspicion[name] = -given[self.reported].mean(0) if given.ndim == 2 else given
        if self.index is not None:
            suspicion[LOSS] = contenders.own_losses(self.index)
        suspicion[RANDOM] = contenders.chance(1, self.num_rows)[0]
        return judging.detection(suspicion, self._flags())

    def _retrieval(self) -> Doc:
        if not self.num_queries:
            raise SpecError("retrieval needs queries: --queries FILE, or a matrix of queries x rows")
        ids = self.rows.labels["id"] if self.rows is not None else None
        wanted = relevance.read(self.ask.relevant, ids, (self.num_queries, self.num_rows))
        return judging.retrieval(self.matrices, wanted, self.reported, k=self.ask.k)

    def _flags(self) -> np.ndarray:
        flags = self.ask.flags
        if isinstance(flags, str) and not flags.endswith(".npy"):
            field, _, value = flags.partition("=")
            if field not in ("source", "provider"):
                raise SpecError(f"--flags: expected a .npy file, source=NAME or provider=NAME, got {flags!r}")
            return np.array([label == value for label in self._labels(field)])
        flags = contenders.load_array("flags", flags) if isinstance(flags, str) else np.asarray(flags)
        if flags.shape != (self.num_rows,):
            raise MismatchError(f"--flags: expected one for each of the {self.num_rows} rows, got {list(flags.shape)}")
        return flags.astype(bool)

    def _brittleness(self) -> Doc:
        probed = Stream(0, "", "evaluate", "probes").subset(len(self.reported), self.ask.probes)
        return judging.brittleness(self.matrices, self.reruns, self.reported[probed], self.ask.removed)

    def _curve(self, *, keep: bool) -> Doc:
        return judging.curve(self.matrices, self.reruns, self.reported, self.ask.parts, keep=keep, seed=0)

    def _write(self, document: Doc) -> None:
        ask = self.ask
        if ask.plot is None and ask.html is None:
            return
        picture = plots.png(document)
        for path, content in ((ask.plot, picture), (ask.html, ask.html and scorecard.html(document, picture))):
            if path is not None and content is not None:
                where = Path(path).expanduser()
                Store(str(where.parent)).put(where.name, content if isinstance(content, bytes) else content.encode())


def _headed(found: Doc) -> Doc:
    """A metric's part of the document, headed by the numbers of the first that was judged."""
    name = next(iter(found["methods"]))
    return {"name": name, **{key: found["methods"][name][key] for key in ("mean", "low", "high")}, **found}


def _agreed(what: str, known: list[tuple[str, int]]) -> int:
    """The one number that all sources agree on; MismatchError naming two that do not."""
    (first, number), *others = known
    for source, other in others:
        if other != number:
            raise MismatchError(f"{source}: has {other} {what}, but {first} has {number}; give what belongs together")
    return number

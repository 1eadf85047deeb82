"""Counterfactuals: which rows to train on again, and the trainings themselves, each kept as soon as it is done.

A trainer is one callable, `train(rows, seed)`: rows are row numbers, int64 ascending; it trains a fresh model on just
these and returns the loss of each query, [Q], or (losses, answers) with answers [Q] of any integers that are equal when
the model says the same. It must depend on its two arguments only. Not here: how a language model is trained
(finetune.py), how outcomes are kept (truth.py), what is made of them (judging.py).
"""

import importlib
import importlib.util
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from influent.digests import hash_bytes
from influent.errors import DataError, FormatError, SpecError
from influent.progress import Progress
from influent.rng import Stream
from influent.truth import Outcome, Truth

log = logging.getLogger(__name__)


@runtime_checkable
class Trainer(Protocol):
    """Training as a function; see the module's docstring."""

    def __call__(self, rows: np.ndarray, seed: int, /) -> Any: ...


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """A training wanted: what for, which of that, and its rows, booleans [N]."""

    role: str
    number: int
    rows: np.ndarray


class Reruns:
    """A ground truth, and what adds to it. Without a trainer only what is stored can be had."""

    def __init__(
        self, truth: Truth, trainer: Trainer | None, *, seeds: Sequence[int] = (0,), progress: Progress | None = None
    ):
        self.truth, self.trainer, self.seeds, self.progress = truth, trainer, list(seeds), progress

    def run(self, plans: Sequence[Plan]) -> list[list[Outcome]]:
        """The outcomes by seed, then by plan; those that are missing are trained first, a seed after another, so that
        what an interruption leaves covers all plans.

        Raises FormatError when some are missing and there is no trainer; what the trainer raises.
        """
        jobs = {
            (seed, plan.rows.tobytes()): (seed, plan)
            for seed in self.seeds
            for plan in plans
            if self.truth.find(plan.rows, seed) is None
        }
        if jobs and self.trainer is None:
            raise FormatError(
                f"{self.truth.store}: {len(jobs)} of {len(plans) * len(self.seeds)} retrainings ({plans[0].role}) are "
                "not there: give --train or --base, and they are made"
            )
        if jobs:
            there = len(plans) * len(self.seeds) - len(jobs)
            log.info("%s: %d trainings to do, %d are there", plans[-1].role, len(jobs), there)
        for done, (seed, plan) in enumerate(jobs.values()):
            if self.progress is not None:
                self.progress("retrain", done, len(jobs))
            self._train(plan, seed)
        if jobs and self.progress is not None:
            self.progress("retrain", len(jobs), len(jobs))
        self.truth.close()
        found = [[self.truth.find(plan.rows, seed) for plan in plans] for seed in self.seeds]
        return [[outcome for outcome in row if outcome is not None] for row in found]

    def losses(self, plans: Sequence[Plan]) -> np.ndarray:
        """The loss of each query after each training, mean over the seeds, [plans, Q]."""
        return np.mean([[outcome.loss for outcome in row] for row in self.run(plans)], axis=0)

    def _train(self, plan: Plan, seed: int) -> None:
        assert self.trainer is not None
        rows = plan.rows.nonzero()[0]
        if len(rows) == 0:
            raise DataError(f"{plan.role} {plan.number}: no row is left to train on: remove fewer")
        start = time.monotonic()
        outcome = Outcome.of(self.trainer(rows, seed), self.truth.num_queries, f"train({len(rows)} rows, seed {seed})")
        self.truth.add(plan.role, plan.number, plan.rows, seed, outcome, seconds=time.monotonic() - start)


def halves(num_rows: int, count: int, *, seed: int = 0, share: float = 0.5) -> list[Plan]:
    """Random subsets of a share of the rows; the first of more subsets are those of fewer."""
    size = max(1, round(share * num_rows))
    drawn = (Stream(seed, "", "subset", f"{share}/{j}").subset(num_rows, size) for j in range(count))
    return [Plan("subset", j, only(rows, num_rows)) for j, rows in enumerate(drawn)]


def everything(num_rows: int) -> Plan:
    """The training on all rows, which the others are compared with."""
    return Plan("all", 0, np.ones(num_rows, bool))


def without(role: str, removed: Sequence[np.ndarray], num_rows: int) -> list[Plan]:
    """For each of the given groups of row numbers, the training on all others."""
    return [Plan(role, number, ~only(rows, num_rows)) for number, rows in enumerate(removed)]


def only(rows: np.ndarray, num_rows: int) -> np.ndarray:
    """Booleans [N] from row numbers."""
    mask = np.zeros(num_rows, bool)
    mask[rows] = True
    return mask


def best(scores: np.ndarray, k: int) -> np.ndarray:
    """The numbers of the `k` largest of scores [N], equal ones by number, best first."""
    return np.argsort(-scores, kind="stable")[:k]


def load_trainer(text: str) -> tuple[Trainer, dict[str, Any]]:
    """The function that `module:function` or `file.py:function` names, and what identifies it: its name and source.

    Raises SpecError when there is none; what the module itself raises on import goes through.
    """
    where, _, name = text.rpartition(":")
    if not where or not name.isidentifier():
        raise SpecError(f"--train: expected module:function or file.py:function, got {text!r}")
    module = _from_file(Path(where).expanduser()) if where.endswith(".py") else _from_name(where)
    found = getattr(module, name, None)
    if not callable(found):
        raise SpecError(f"--train: {where} has no function {name!r}")
    path = Path(str(module.__file__)) if getattr(module, "__file__", None) else None
    source = hash_bytes([path.read_bytes()]) if path is not None and path.is_file() else None
    return found, {"kind": "function", "name": f"{Path(where).stem}:{name}", "source": source}


def identify(trainer: Trainer) -> dict[str, Any]:
    """What a ground truth says of its trainer: its own `describe()`, or its name."""
    describe = getattr(trainer, "describe", None)
    if callable(describe):
        told = describe()
        if not isinstance(told, Mapping):
            raise SpecError(f"the trainer's describe() gave a {type(told).__name__}, expected a mapping")
        return dict(told)
    kind = trainer if hasattr(trainer, "__qualname__") else type(trainer)
    return {"kind": "function", "name": f"{kind.__module__}:{getattr(kind, '__qualname__', kind)}"}


def _from_file(path: Path) -> Any:
    if not path.is_file():
        raise SpecError(f"--train: {path}: no such file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None  # its name ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # dataclasses and pickling look their module up
    spec.loader.exec_module(module)
    return module


def _from_name(name: str) -> Any:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)  # as `python -m` would: a user's own module lies beside them
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as e:
        if e.name is not None and (name == e.name or name.startswith(f"{e.name}.")):
            raise SpecError(f"--train: there is no module {name!r} here or installed") from e
        raise

"""The verb `evaluate`: scores of an index, and of any other tool, judged by what retraining does.

Here is what can be asked and the checks of it that need no torch; the work itself is a Trial (trial.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from influent import preflight
from influent.damping import Damping
from influent.errors import SpecError
from influent.progress import Progress

if TYPE_CHECKING:
    from influent.rerun import Trainer

METRICS = ("lds", "loo", "tail-patch", "mislabel", "brittleness", "selection", "removal", "retrieval")
RETRAINED = ("lds", "loo", "brittleness", "selection", "removal")
UNITS = ("row", "source", "provider")


def evaluate(
    index: str | None = None,
    *,
    scores: Sequence[str] | Mapping[str, Any] | None = None,
    queries: Any = None,
    data: Any = None,
    truth: str | None = None,
    metric: str = "lds",
    train: str | Trainer | None = None,
    base: str | None = None,
    epochs: int = 3,
    rate: float = 5e-5,
    batch: int = 8,
    max_length: int | None = None,
    subsets: int | None = None,
    seeds: int | None = None,
    leave: str = "row",
    left_out: int | None = None,
    remove: str = "10,50",
    probes: int = 10,
    shares: str = "0.1,0.25,0.5,0.75",
    k: int = 10,
    relevant: Any = None,
    flags: Any = None,
    normalize: str = "none",
    curvature: str | None = None,
    damping: str | None = None,
    parity: str | None = None,
    damping_grid: str | None = None,
    memory: int | None = None,
    model: Any = None,
    token_budget: int = 4096,
    device: str | None = None,
    plot: str | None = None,
    html: str | None = None,
    task: Any = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Judge the scores of an index, and any other score matrices, by what retraining does. docs/evaluate.md has the
    protocol of each metric.

    Args:
        index: an index, scored with `normalize`, `curvature`, `damping`, `parity` as `query` would.
        scores: other score matrices, queries x training rows, larger = stronger: `NAME=FILE.npy` each, or a mapping of
            names to arrays or files. For `mislabel` also vectors [N], larger = more suspicious.
        queries, data: records; `data` is the training rows, by default those of the index.
        truth: the directory of the retrainings; made if missing, resumed if not complete.
        metric: of lds, loo, tail-patch, mislabel, brittleness, selection, removal, retrieval, joined by commas.
        train: a function `train(rows, seed)` that trains on these row numbers and returns the loss of every query (or
            losses and answers); or its name, `module:function` or `file.py:function`.
        base: instead, a causal language model to fine-tune on the rows (`epochs`, `rate`, `batch`, `max_length`).
        subsets, seeds: how many random halves, and how often each is trained. By default all that `truth` holds, and
            50 and 1 at least if they can be trained.
        leave, left_out: what is left out for `loo`: a row, or all rows of a source or provider; and how many of them.
        remove, probes: for `brittleness`, how many top rows are removed, and for how many queries.
        shares: for `selection` and `removal`, shares of the rows.
        k: top rows patched by `tail-patch`, or among which `retrieval` looks for a relevant one.
        relevant: for `retrieval`, which rows are right answers: booleans [queries, rows] (an array or .npy), or a table
            of `query` and `id` (or `row`).
        flags: the bad rows for `mislabel`: a .npy of booleans [N], an array, or `source=NAME` or `provider=NAME`.
        damping_grid: relative dampings such as `1e-3,1e-2,0.1`: the one with the best LDS on a tenth of the queries is
            used, and everything is reported on the others.
        plot, html: write the plots to this .png, and a page with plots and tables to this .html.

    Returns:
        The document of docs/schemas/evaluate.json.

    Raises:
        SpecError, DataError, FormatError, MismatchError, NumericsError: as their classes say. Retrainings that were
            finished are kept.
    """
    asked = {name: value for name, value in locals().items() if name != "progress"}
    request = Request(**asked)
    from influent.trial import Trial  # imports torch

    return Trial(request, progress).run()


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What `evaluate` was asked, checked as far as can be without torch."""

    index: str | None
    scores: Sequence[str] | Mapping[str, Any] | None
    queries: Any
    data: Any
    truth: str | None
    metric: str
    train: str | Trainer | None
    base: str | None
    epochs: int
    rate: float
    batch: int
    max_length: int | None
    subsets: int | None
    seeds: int | None
    leave: str
    left_out: int | None
    remove: str
    probes: int
    shares: str
    k: int
    relevant: Any
    flags: Any
    normalize: str
    curvature: str | None
    damping: str | None
    parity: str | None
    damping_grid: str | None
    memory: int | None
    model: Any
    token_budget: int
    device: str | None
    plot: str | None
    html: str | None
    task: Any
    metrics: list[str] = field(init=False)

    def __post_init__(self) -> None:
        names = [preflight.choice("--metric", name.strip(), METRICS) for name in self.metric.split(",")]
        object.__setattr__(self, "metrics", list(dict.fromkeys(names)))
        self._check_sources()
        self._check_numbers()
        for option, path, suffix in (("--plot", self.plot, ".png"), ("--html", self.html, ".html")):
            preflight.output(option, path, (suffix,))
            if path is not None and find_spec("matplotlib") is None:
                raise SpecError(f"{option} needs matplotlib: pip install 'influent[plots]'")
        if isinstance(self.queries, str):
            preflight.queries("--queries", self.queries)
        if isinstance(self.data, str):
            preflight.data(self.data)
        if self.index is not None:
            opened = preflight.ensemble(self.index)
            if self.queries is not None and all(isinstance(path, str) for path in self._models):
                preflight.same_models(opened, self._models)
        for path in (self.base, *(self._models if self.index is None else ())):
            if isinstance(path, str):
                preflight.model(path)

    @property
    def _models(self) -> list[Any]:
        return list(self.model) if isinstance(self.model, list | tuple) else [self.model] * (self.model is not None)

    def _check_sources(self) -> None:
        files = self.files
        retrained = [name for name in self.metrics if name in (*RETRAINED, "tail-patch")]
        if self.index is None and not files:
            raise SpecError("give an INDEX, or --scores NAME=FILE.npy, or both: there is nothing to judge")
        if retrained and self.truth is None:
            raise SpecError(f"{retrained[0]} needs --truth DIR: where retrainings are kept (made if missing)")
        if retrained and self.index is not None and self.queries is None:
            raise SpecError(f"{retrained[0]} of an index needs --queries FILE")
        if "mislabel" in self.metrics and self.flags is None:
            raise SpecError("mislabel needs --flags: a .npy of booleans, or source=NAME or provider=NAME")
        if "retrieval" in self.metrics:
            if self.relevant is None:
                raise SpecError("retrieval needs --relevant FILE: which rows are right answers to which query")
            if self.index is not None and self.queries is None:
                raise SpecError("retrieval of an index needs --queries FILE")
        if self.train is not None and self.base is not None:
            raise SpecError("give --train or --base, not both: each says how to train")
        if self.base is not None or "tail-patch" in self.metrics:
            what = "--base" if self.base is not None else "tail-patch"
            if self.queries is None or (self.index is None and self.data is None):
                raise SpecError(f"{what} needs texts: --queries FILE, and --data FILE (or an INDEX, which has them)")
        if "tail-patch" in self.metrics and self.index is None and self.model is None:
            raise SpecError("tail-patch needs the final model: --model PATH, or an INDEX of it")
        if self.damping_grid is not None and (self.index is None or "lds" not in self.metrics):
            raise SpecError("--damping-grid chooses an index's damping by LDS: give an INDEX and --metric lds")

    def _check_numbers(self) -> None:
        preflight.choice("--leave", self.leave, UNITS)
        preflight.choice("--normalize", self.normalize, ("none", "cosine", "relatif"))
        preflight.curvature(self.curvature)
        preflight.damping(self.damping)
        preflight.parity(self.parity)
        for option, value, least in (
            ("--epochs", self.epochs, 1), ("--batch", self.batch, 1), ("--subsets", self.subsets, 2),
            ("--seeds", self.seeds, 1), ("--left-out", self.left_out, 2), ("--probes", self.probes, 1),
            ("-k", self.k, 1),
        ):  # fmt: skip
            if value is not None and value < least:
                raise SpecError(f"{option} is {value}, expected {least} or more")
        if not self.rate > 0:
            raise SpecError(f"--rate is {self.rate}, expected a number above 0")
        _ = self.removed, self.parts, self.grid

    @property
    def files(self) -> dict[str, Any]:
        """Score files and arrays by name."""
        return named_files(self.scores)

    @property
    def removed(self) -> list[int]:
        return [int(n) for n in _numbers("--remove", self.remove, lambda n: n >= 1 and n == int(n), "whole numbers")]

    @property
    def parts(self) -> list[float]:
        return _numbers("--shares", self.shares, lambda n: 0 < n < 1, "numbers between 0 and 1")

    @property
    def grid(self) -> list[str]:
        if self.damping_grid is None:
            return []
        if self.damping is not None:
            raise SpecError("give --damping or --damping-grid, not both")
        values = _numbers("--damping-grid", self.damping_grid, lambda n: n >= 0, "numbers of 0 or more")
        return [str(Damping("relative", value)) for value in values]


def _numbers(option: str, text: str, right: Callable[[float], bool], words: str) -> list[float]:
    """Ascending numbers joined by commas; SpecError unless each is right."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(map(right, values)):
        raise SpecError(f"{option}: expected {words} joined by commas, got {text!r}")
    return sorted(set(values))


def named_files(scores: Sequence[str] | Mapping[str, Any] | None) -> dict[str, Any]:
    """Name to file or array; `NAME=FILE`, or a file alone, which is named by its stem. SpecError for a name twice."""
    if scores is None:
        return {}
    if isinstance(scores, Mapping):
        return {str(name): given for name, given in scores.items()}
    found: dict[str, Any] = {}
    for text in scores:
        name, separator, path = text.partition("=")
        name, path = (name, path) if separator else (Path(text).stem, text)
        if not name or name in found:
            raise SpecError(f"--scores {text!r}: expected another name than {name!r}: NAME=FILE.npy")
        found[name] = path
    return found

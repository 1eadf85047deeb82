"""One model made ready for collecting: loaded, its layers tracked, its maps drawn, and what identifies the whole.

Indexing and querying attach in the same way, so that a query's rows can only be compared with an index whose identity
is the same. Not here: the verbs (methods.py), collecting itself (collect.py).
"""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from influent import loading, selection
from influent.bases import FOLDER, Bases, Calibration, Sample
from influent.budget import Budget
from influent.codec import NONE, Codec
from influent.collect import Collector
from influent.compress import Compress
from influent.errors import MismatchError, SpecError
from influent.extract import frozen
from influent.layers import Block, Plan, device_of, plan
from influent.layout import SCALES, with_factors
from influent.optimizer import AdamStep, Scale, read_scale, read_step
from influent.progress import Progress
from influent.rng import VERSION as RNG_VERSION
from influent.rowstore import Index
from influent.storage import Store
from influent.task import CausalLM, Margins, Task, describe
from influent.whole import ALL, bind_whole, check_flat, is_whole, whole_block

KEYS = ("block", "all")


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What changes a row, apart from the model and the data: it is hashed into an index's digest (or leads to it)."""

    compress: str
    rows: str = "float32"
    budget: Budget | None = None  # given, it replaces `compress` and `rows`
    layers: str | None = None
    exclude: str | None = None
    max_length: int = 512
    dtype: str = "float32"
    matmul: str = "highest"
    seed: int = 0
    target: str = "loss"
    key: str = "block"
    optimizer: str | None = None  # the state by which gradients are scaled, or that steps on them (optimizer.py)
    scale: str = "adam"  # which of the two, given a state
    calibration: int = 512  # training rows from which a learned stage is made

    def __post_init__(self) -> None:
        if self.dtype not in loading.DTYPES:
            raise SpecError(f"dtype is {self.dtype!r}, expected one of {', '.join(loading.DTYPES)}")
        if self.matmul not in ("highest", "medium"):
            raise SpecError(f"matmul is {self.matmul!r}, expected highest or medium")
        if self.target not in ("loss", "margin"):
            raise SpecError(f"target is {self.target!r}, expected loss or margin")
        if self.key not in KEYS:
            raise SpecError(f"key is {self.key!r}, expected {' or '.join(KEYS)}")
        if self.scale not in SCALES:
            raise SpecError(f"scale is {self.scale!r}, expected {' or '.join(SCALES)}")
        if self.optimizer is not None and self.rows == NONE:
            raise SpecError("rows none: plain gradients are computed anew, so that an optimizer's state has no part")
        if self.optimizer is not None and self.scale == "adam-step" and self.target != "loss":
            raise SpecError(f"scale adam-step: an optimizer steps on the loss, and the target is {self.target!r}")
        if self.seed < 0:
            raise SpecError(f"seed is {self.seed}, expected 0 or more")
        if self.calibration < 1:
            raise SpecError(f"calibration is {self.calibration}, expected 1 row or more")
        if self.rows == NONE and (self.compress != "id" or self.budget is not None):
            raise SpecError("rows none: nothing is stored, so that no compressor and no size of a row can be given")
        for name, pattern in (("layers", self.layers), ("exclude", self.exclude)):
            try:
                re.compile(pattern or "")
            except re.error as error:
                raise SpecError(f"{name} is {pattern!r}, which is not a regular expression: {error}") from error


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What may not change a row beyond rounding."""

    token_budget: int = 4096
    device: str | None = None
    skip_nonfinite: bool = False


@dataclass(frozen=True, eq=False)
class Attached:
    """A frozen model with its collector; `rows`, the codec to store with; and `identity`: the digested facts that
    queries and index must share."""

    collector: Collector
    rows: str
    identity: dict[str, Any]
    facts: dict[str, Any]


@contextmanager
def attach(
    model: str | nn.Module,
    task: Task | None,
    setting: Setting,
    run: Run,
    *,
    index: Store | None = None,
    sample: Sample | None = None,
    progress: Progress | None = None,
) -> Iterator[Attached]:
    """The model ready for collecting; within the context it is in evaluation mode and its parameters are frozen.

    Args:
        index: where the bases of a learned stage (pca, whiten, select) are; not needed without one.
        sample: the training rows to learn such bases from, while indexing. Without it they are read.

    Raises:
        SpecError: the model cannot be loaded, is a module without a task, or reads fewer tokens than `max_length`.
        LayerError: the layers asked for cannot be tracked.
        MismatchError, CorruptError, FormatError: the bases are those of another model, damaged, or not finished.
    """
    with ExitStack() as stack:
        stack.enter_context(loading.matmul_precision(setting.matmul))
        module, task = _load(model, task, setting, run)
        stack.enter_context(frozen(module))
        tracked = plan(module, setting.layers, setting.exclude)
        kept = tracked if setting.key == "block" else replace(tracked, blocks=(whole_block(tracked),))
        text, rows = (setting.compress, setting.rows) if setting.budget is None else setting.budget.choose(kept)
        (compressor, mask), device = selection.resolve(Compress.parse(text)), device_of(module)
        if setting.key == "all":
            check_flat(compressor)
        facts = _facts(module, task, setting)
        state, bases = _state(setting, module, tracked, task, compressor), None
        if compressor.learned is not None:
            calibration = Calibration(
                stage=compressor.learned, model=module, plan=tracked, task=task, facts=facts, size=setting.calibration,
                scale=state if isinstance(state, Scale) else None,
                token_budget=run.token_budget, skip_nonfinite=run.skip_nonfinite,
            )  # fmt: skip
            bases = _bases(calibration, index, sample, progress)
        elif compressor.selects is not None:
            bases = _selected(compressor, mask, tracked, index)
        matrices = {} if bases is None else bases.matrices
        if setting.key == "all":
            bound = {ALL: bind_whole(compressor, tracked, setting.seed, matrices).to(device)}
        else:
            bound = {
                block.name: compressor.bind(block, setting.seed, matrices.get(block.name)).to(device)
                for block in tracked.blocks
            }
        if isinstance(state, Scale):
            bound = {
                name: replace(each, weight=_weight(state, name, tracked)).to(device) for name, each in bound.items()
            }
        collector = Collector(
            module, tracked, bound, task, run.token_budget, run.skip_nonfinite, target=setting.target,
            step=state if isinstance(state, AdamStep) else None,
        )  # fmt: skip
        identity = _identity(collector, facts, str(compressor), rows)
        if bases is not None:
            identity["bases"] = bases.digest
        if state is not None:
            identity["scale"] = {"kind": setting.scale, "state": state.digest}
        yield Attached(collector, rows, identity, loading.config_facts(module))


def _bases(calibration: Calibration, index: Store | None, sample: Sample | None, progress: Progress | None) -> Bases:
    """What a compressor's learned stage needs, from the index or into it."""
    if index is None:
        raise SpecError(f"compressor: '{calibration.stage}' is learned from an index's data; give the index")
    place = index.child(FOLDER)
    return calibration.load(place) if sample is None else calibration.learn(place, sample, progress)


def _selected(compressor: Compress, file: str | None, tracked: Plan, index: Store | None) -> Bases:
    """The entries that a learned mask keeps: from the index, into which a `file` is copied first."""
    place = None if index is None else index.child(FOLDER)
    if place is None or (file is None and not place.exists("manifest.json")):
        raise SpecError(
            f"compressor '{compressor}': a size stands for the mask that is kept with an index; name one that was "
            "learned, select:FILE"
        )
    if file is not None:
        selection.adopt(file, place)
    return Bases(*selection.load(place, compressor, tracked.blocks))


def check_same(index: Index, attached: Attached) -> None:
    """Refuse a query whose model, task, layers or maps are not the index's.

    Raises:
        MismatchError: names the first thing that differs.
    """
    for field, value in attached.identity.items():
        stored = index.spec.get(field)
        if stored == value:
            continue
        if field == "model":
            got, expected = value["fingerprint"], (stored or {}).get("fingerprint")
            raise MismatchError(
                f"{index.path}: was built with another model: expected weights {expected}, got {got}; "
                f"give --model with the one that was indexed ({index.notes.get('model')})"
            )
        raise MismatchError(
            f"{index.path}: {field} differs: expected {_brief(stored)}, got {_brief(value)}; query as it was indexed"
        )


def _load(model: str | nn.Module, task: Task | None, setting: Setting, run: Run) -> tuple[nn.Module, Task]:
    if isinstance(model, nn.Module):
        if task is None:
            raise SpecError(
                "a model given as a module needs its task: influent.CausalLM(tokenizer), influent.Classification(), …"
            )
        module = model if run.device is None else model.to(loading.choose_device(run.device))
    else:
        module, tokenizer = loading.load(model, dtype=setting.dtype, device=run.device)
        task = task or CausalLM(tokenizer, max_length=setting.max_length)
    if setting.target == "margin" and not isinstance(task, Margins):
        raise SpecError(
            f"the target margin needs a task with margin and residual, which {type(task).__name__} has not: see "
            "influent.task.Margins, or choose a method whose target is the loss"
        )
    longest = loading.context_length(module)
    if isinstance(task, CausalLM) and longest is not None and task.max_length > longest:
        raise SpecError(f"--max-length is {task.max_length}, but the model reads at most {longest} tokens")
    return module, task


def _facts(module: nn.Module, task: Task, setting: Setting) -> dict[str, Any]:
    """What identifies the gradients, whatever is kept of them."""
    return {
        "model": {"fingerprint": loading.fingerprint(module)},
        "task": describe(task),
        "seed": setting.seed,
        "rng": RNG_VERSION,
        "numerics": {"dtype": loading.dtype_of(module), "matmul": setting.matmul},
    }


def _identity(collector: Collector, facts: dict[str, Any], compress: str, rows: str) -> dict[str, Any]:
    layout = [{**_described(b.block), "width": b.width} for b in collector.bound.values()]
    if is_whole(collector.bound):
        layout[0]["parts"] = [_described(block) for block in collector.plan.blocks]
    codec = Codec.parse(rows)
    layout = [with_factors(block, codec, collector.factors[block["block"]]) for block in layout]
    identity = {"model": facts["model"], "task": facts["task"], "layout": layout, "compress": compress, **facts}
    return identity if collector.target == "loss" else {**identity, "target": collector.target}


def _state(
    setting: Setting, module: nn.Module, tracked: Plan, task: Task, compressor: Compress
) -> Scale | AdamStep | None:
    """What an optimizer's state does to gradients."""
    if setting.optimizer is None:
        return None
    if (learned := compressor.learned) is not None and (setting.scale != "adam" or learned.moments == "kfac"):
        raise SpecError(
            f"compressor '{compressor}': '{learned}' is learned from gradients that are not scaled; use another one "
            f"with --scale {setting.scale}"
        )
    if setting.scale == "adam":
        return read_scale(setting.optimizer, module, tracked)
    by_token = isinstance(task, CausalLM) and task.reduction == "sum"  # trainers step on the mean
    return read_step(setting.optimizer, module, tracked, by_token=by_token)


def _weight(scaled: Scale, name: str, tracked: Plan) -> Tensor:
    """The scale of a block, or of all blocks together."""
    return (
        scaled.weights[name] if name in scaled.weights else torch.cat([scaled.weights[b.name] for b in tracked.blocks])
    )


def _described(block: Block) -> dict[str, Any]:
    return {"block": block.name, "kind": block.kind, "in": block.in_width, "out": block.out_width}


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "…"

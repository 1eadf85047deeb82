"""The verb `index`: checks the settings and the data, then fills one index, or one a checkpoint.

The data is checked before torch is imported, so that a mistake in it is told at once. Not here: what any of the stages
does (filling.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import isfinite
from typing import TYPE_CHECKING, Any, Literal, cast

from influent import catalog as catalogs
from influent import ensemble as ensembles
from influent.catalog import Catalog
from influent.codec import Codec
from influent.compress import Compress
from influent.errors import DataError, FormatError, SpecError
from influent.layout import SCALES
from influent.methods import METHODS, Method, info
from influent.progress import Progress
from influent.storage import Store

if TYPE_CHECKING:
    from torch import nn

    from influent.task import Task

DEFAULT_LENGTH = 512


def index(
    model: str | nn.Module,
    data: Any,
    out: str,
    *,
    checkpoints: Sequence[Any] | None = None,
    rates: Sequence[float] | None = None,
    method: str = "factgrass",
    key: str | None = None,
    scale: str = "none",
    optimizer: str | Sequence[str] | None = None,
    compress: str | None = None,
    row_bytes: int | None = None,
    rows: str | None = None,
    layers: str | None = None,
    exclude: str | None = None,
    max_length: int = DEFAULT_LENGTH,
    token_budget: int = 4096,
    dtype: str = "float32",
    matmul: str = "highest",
    catalog: str = "text",
    shard_rows: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    skip_nonfinite: bool = False,
    device: str | None = None,
    task: Task | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Collect one compressed gradient per training example into the directory `out`; called again, it resumes.

    Args:
        model: a Hugging Face folder, hub name or GGUF file of a causal language model; or any module, with its `task`.
        data: a file, folder, hub name or sequence of records; for a task without records, a map-style data set.
        checkpoints: further models of the same kind (for a module also its state dicts); `out` is then an ensemble
            with one index a checkpoint, `model` first, whose scores are the mean over all of them.
        rates: of each checkpoint (`model` first) the learning rate, for a method that adds scores up by it.
        key: `block` for a row in each layer, `all` for one row of all layers together. By default the method's way.
        scale: `adam` divides each entry of a gradient by the root of Adam's second moment before it is compressed;
            `optimizer` is then the file of that state (of an ensemble one a checkpoint): safetensors of exp_avg_sq by
            name, or torch's optimizer.pt.
            `adam-step` makes each row the step that Adam would take on it, and leaves queries' gradients as they are:
            for linfik and graddot, whose scores are then the drop of a query's loss.
        rows: how a row is stored: `float32`, `bfloat16`, `rank:8:int4`, `dense:sign`, … By default the method's way.
        row_bytes: the size of a stored row; the method's compressor (and codec) is then the largest that fits it.
        task: needed for a module; by default CausalLM with the model's tokenizer.

    Returns:
        The `info` document of the finished index.

    Raises:
        SpecError, LayerError, DataError, MismatchError, NumericsError: see each class; shards already written stay.
    """
    if method not in METHODS:
        raise SpecError(f"method {method!r} is not known; expected one of {', '.join(METHODS)}")
    if key not in (None, "block", "all"):
        raise SpecError(f"key is {key!r}, expected block or all")
    states = _check_scale(scale, optimizer, METHODS[method], 1 + len(checkpoints or ()))
    if shard_rows is not None and shard_rows < 1:
        raise SpecError(f"shard_rows is {shard_rows}, expected 1 or more")
    if task is not None and max_length != DEFAULT_LENGTH:
        raise SpecError("max_length belongs to the task that was passed: CausalLM(tokenizer, max_length=…)")
    if not isinstance(model, str) and dtype != "float32":
        raise SpecError("dtype is for a model that is loaded here; a module has its own")
    if compress is not None and row_bytes is not None:
        raise SpecError("give --compress or --row-bytes, not both: each sets the size of a row")
    own = METHODS[method]
    weights = _weights(method, 1 + len(checkpoints or ()), rates)
    chosen = Codec.parse(rows or own.rows)
    Compress.parse(compress or own.compress).check_rank(chosen)
    codec = str(chosen)
    kept = own.codec if rows is None else lambda side: codec
    from influent.attach import Run, Setting  # these import torch
    from influent.budget import Budget
    from influent.checkpoints import instances
    from influent.filling import fill

    small = None
    if row_bytes is not None and rows is None and own.small is not None:
        coarse, bits = own.small
        small = Budget(row_bytes, coarse, lambda side: bits)
    setting = Setting(
        compress=compress or own.compress, rows=codec,
        budget=None if row_bytes is None else Budget(row_bytes, own.sized, kept, own.least, small),
        layers=layers, exclude=exclude, max_length=max_length, dtype=dtype, matmul=matmul,
        seed=seed, target=own.target, key=key or own.key,
        scale="adam" if scale == "none" else scale,
    )  # fmt: skip
    run = Run(token_budget=token_budget, device=device, skip_nonfinite=skip_nonfinite)
    places = _places(Store(out), len(weights))
    for place, each, state in zip(places, instances([model, *(checkpoints or ())]), states, strict=True):
        listed = catalogue(data, place, task=task, limit=limit, keep=catalog, progress=progress)
        fill(
            each, data, listed, task=task, method=method, shard_rows=shard_rows, progress=progress,
            setting=replace(setting, optimizer=state), run=run,
        )  # fmt: skip
    if len(weights) > 1:
        ensembles.commit(Store(out), weights)
    return info(out)


def _check_scale(
    scale: str, optimizer: str | Sequence[str] | None, own: Method, num_members: int
) -> list[str] | list[None]:
    """The state of each checkpoint."""
    states = [optimizer] if isinstance(optimizer, str) else list(optimizer or ())
    if scale not in ("none", *SCALES):
        raise SpecError(f"scale is {scale!r}, expected none, {' or '.join(SCALES)}")
    if (scale == "none") != (not states):
        raise SpecError(f"--optimizer FILE, a state of Adam, and --scale {' or '.join(SCALES)} go together: give both")
    if states and len(states) != num_members:
        raise SpecError(f"optimizer: expected {num_members} states, one a checkpoint in their order, got {len(states)}")
    if scale == "adam-step" and (own.curvature, own.target) != ("identity", "loss"):
        raise SpecError("scale adam-step is for a plain product with the loss's gradients: use --method linfik")
    return states or [None] * num_members


def _weights(method: str, num_members: int, rates: Sequence[float] | None) -> list[float]:
    """With which weight each checkpoint's scores are added."""
    if METHODS[method].members == "rates" and rates is not None:
        if len(rates) != num_members or not all(isfinite(rate) and rate > 0 for rate in rates):
            raise SpecError(f"rates: expected {num_members} numbers above 0, one a checkpoint, got {list(rates)}")
        return list(rates)
    if rates is not None:
        raise SpecError(f"rates are for a method that adds checkpoints up by them, not for {method}: leave them out")
    return [1 / num_members] * num_members


def _places(store: Store, num_members: int) -> list[Store]:
    """Where each checkpoint's index goes; FormatError when an index is where an ensemble shall be, or the reverse."""
    there = ensembles.is_ensemble(store)
    if num_members == 1:
        if there:
            raise FormatError(f"{store}: holds an ensemble of checkpoints, not one index; give another --out")
        return [store]
    if not there and store.exists("spec.json"):
        raise FormatError(f"{store}: holds one index, not an ensemble of checkpoints; give another --out")
    return [store.child(ensembles.place(number)) for number in range(num_members)]


def catalogue(
    data: Any,
    store: Store,
    *,
    task: Task | None,
    limit: int | None,
    keep: str,
    progress: Progress | None,
) -> Catalog:
    """The checked rows of `data`, whose catalog goes into `store`."""
    if keep not in ("text", "reference"):
        raise SpecError(f"catalog is {keep!r}, expected text or reference")
    if task is None or _encodes(task):
        keep = cast(Literal["text", "reference"], keep)
        return catalogs.build(data, store, limit=limit, keep=keep, progress=progress)
    from influent.examples import ids_and_hashes

    pairs = list(ids_and_hashes(data, limit=limit))
    if not pairs:
        raise DataError("the data set has no examples")
    return catalogs.build_from_ids([i for i, _ in pairs], [digest for _, digest in pairs], store)


def _encodes(task: Task) -> bool:
    from influent.task import Encodes

    return isinstance(task, Encodes)

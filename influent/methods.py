"""The method table, and the verbs of the public API: index, fit, self_influence, info, verify (query: querying.py).

Every published method is a row of METHODS. A verb is the function behind the command of the same name: it takes the
same options and returns the document that the command prints with --json. The data is checked before torch is
imported, so that a mistake in it is told at once. Not here: what any of the stages does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import isfinite
from typing import TYPE_CHECKING, Any, Literal, cast

from influent import catalog as catalogs
from influent import ensemble as ensembles
from influent import rowstore
from influent.artifact import Artifact
from influent.catalog import Catalog
from influent.choosing import check_curvature, check_fit, check_steps, method_facts
from influent.codec import Codec
from influent.compress import Compress
from influent.ensemble import Ensemble
from influent.errors import DataError, FormatError, SpecError
from influent.progress import Progress
from influent.rowstore import Index
from influent.storage import Store

if TYPE_CHECKING:
    from torch import Tensor, nn

    from influent.task import Task

DEFAULT_LENGTH = 512


@dataclass(frozen=True, slots=True)
class Method:
    """One row of the table: what is differentiated, how it is compressed and stored, and a query's curvature."""

    target: str  # loss, or margin: see task.Margins
    sized: Callable[[int], str]  # the compressor whose rows have side * side entries a layer
    curvature: str
    codec: Callable[[int], str] = lambda side: "float32"  # how such rows are stored
    least: int = 0  # where a budget allows only smaller sides, the compressor and rows `small` are taken instead
    small: tuple[Callable[[int], str], str] | None = None
    key: str = "block"  # a row for each block, or `all`: one for the gradients of all blocks together
    members: str = "mean"  # how several checkpoints make one score: their mean, or weighted by their learning `rates`
    scale: str = "none"  # what multiplies a row's score: nothing, or its `residual`

    @property
    def compress(self) -> str:
        """The compressor at its default size, 4,096 entries a layer."""
        return self.sized(DEFAULT_SIDE)

    @property
    def rows(self) -> str:
        """The row codec at that size."""
        return self.codec(DEFAULT_SIDE)


def _factgrass(side: int) -> str:
    return f"mask:{2 * side}x{2 * side} | sjlt:{side * side}"


def _grass(side: int) -> str:
    return f"mask:{4 * side * side} | sjlt:{side * side}"


def _flat(side: int) -> str:
    return f"sjlt:{side * side}"


def _logra(side: int) -> str:
    return f"gauss:{side}x{side}"


def _lorif(side: int) -> str:
    return f"whiten:{side}x{side}"


def _lorif_rows(side: int) -> str:
    return f"rank:{max(1, side // 16)}:int4"


def _lorif_small(side: int) -> str:
    return f"whiten:{side}x{side} | rotate"


DEFAULT_SIDE = 64
METHODS: dict[str, Method] = {
    "factgrass": Method("loss", _factgrass, "fim"),
    "grass": Method("loss", _grass, "fim"),
    "logra": Method("loss", _logra, "fim"),
    "graddot": Method("loss", _factgrass, "identity"),
    "linfik": Method("loss", _factgrass, "identity"),  # as graddot, asked by `value` for the mean over a target
    "tracin": Method("loss", _factgrass, "identity", members="rates"),
    "datainf": Method("loss", _factgrass, "datainf"),
    "trak": Method("margin", _flat, "fim", key="all", scale="residual"),
    # Where 4-bit rows would be of rank 1, one bit a number is better, in the mean over three models (README).
    "lorif": Method("loss", _lorif, "lowrank", _lorif_rows, least=32, small=(_lorif_small, "dense:sign")),
    "kfac": Method("loss", lambda side: "id", "kfac", lambda side: "none"),
    "ekfac": Method("loss", lambda side: "id", "ekfac", lambda side: "none"),
}


def own_curvature(index: Index) -> str:
    """The curvature that the index's method asks for when a query names none."""
    return METHODS[index.notes["method"]].curvature


def scale_of(opened: Ensemble) -> Tensor | None:
    """What multiplies each row's score, [N], by the method: nothing, or the mean of its residuals over the members."""
    if METHODS[opened.first.notes["method"]].scale == "none":
        return None
    import torch

    residuals = torch.stack([member.stat("residual").double() for member in opened.members])  # [members, N]
    return torch.tensor(opened.weights, dtype=torch.float64) @ residuals


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
    if scale not in ("none", "adam", "adam-step") or (scale == "none") != (not states):
        raise SpecError(
            f"scale is {scale!r} and optimizer {optimizer!r}: expected none, or adam or adam-step and its state's file"
        )
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


def fit(
    index: str,
    *,
    curvature: str | None = None,
    damping: str | None = None,
    labels: str | None = None,
    memory: int | None = None,
    model: Any = None,
    data: Any = None,
    token_budget: int = 4096,
    device: str | None = None,
    task: Task | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Fit a curvature to an index. The costly part, Gram matrices or eigenvectors, is shared by all dampings.

    Args:
        curvature: `fim` (the block-diagonal empirical Fisher matrix), `lowrank:512` (its leading eigenvectors),
            `sketch:512` (the same from one pass, and from the new rows alone once rows are appended) or `identity`; or,
            through the model, `kfac` or `ekfac` of whole gradients, which then act on a query before its compressor,
            `ekfac:compressed` of the compressed sides. By default the method's own, or fim if that is identity.
        damping: `relative:0.1` of each block's mean eigenvalue (the default; 1 of low rank), or `absolute:1e-3`.
        labels: for kfac and ekfac `sampled` from the model (the default) or `empirical`: the data's.
        memory: MiB for the rows that are held at a time (256 by default), or for the layers of kfac and ekfac (2,048).
            Results do not depend on it.
        device: where fim is fitted, in float64; by default an accelerator if there is one. The other curvatures of
            stored rows are fitted on the CPU.
        model, task, data: for kfac and ekfac, as for `query`.

    Returns:
        `{"name", "curvature", "damping", "health": {block: {"lambda", "trace", "d_eff", "form"}}}`; of low rank also
        `rank`, `tail`, `captured` and `top` for each block.
    """
    from influent import curvature as curvatures
    from influent.loading import choose_device, exact_device

    opened = Ensemble.open(index)
    own = own_curvature(opened.first) if curvature is None else curvature
    wanted = check_fit("fim" if curvature is None and own == "identity" else own, damping, labels)
    check_steps(opened.first, wanted.curvature)
    if wanted.kron is not None:
        from influent.recompute import remodelled

        models = remodelled(opened, model, task, data, token_budget=token_budget, device=device)
        fitted = [again.settle(wanted, memory=memory, progress=progress) for again in models]
    else:
        fits = partial(
            curvatures.fit, memory=curvatures.MEMORY if memory is None else memory,
            device=exact_device(choose_device(device)), progress=progress,
        )  # fmt: skip
        fitted = [fits(each, curvature=wanted.curvature, damping=wanted.damping) for each in opened.members]
    shown = None if wanted.damping is None else str(wanted.damping)
    health = opened.named([each.health() for each in fitted])
    return {"name": fitted[0].name, "curvature": wanted.curvature, "damping": shown, "health": health}


def self_influence(
    index: str,
    *,
    k: int = 20,
    curvature: str | None = None,
    damping: str | None = None,
    parity: str | None = None,
    memory: int | None = None,
    model: Any = None,
    data: Any = None,
    token_budget: int = 4096,
    device: str | None = None,
    task: Task | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The rows with the largest g (F + lambda I)^-1 g: outliers, and wrong or planted labels, come first.

    Args:
        parity: `paper` or `release`: LoRIF's published rule in place of a damping, for a low-rank curvature.
        memory: MiB for the rows that are held at a time; 256 by default. Results do not depend on it.
        model, task, data: for kfac, ekfac and rows that are not stored, as for `query`.

    Returns:
        `{"rows": [{"row", "id", "score", "source", "provider", "text"}], "method": {...}}`, larger first.
    """
    import torch

    from influent import curvature as curvatures
    from influent import score
    from influent.loading import choose_device, exact_device
    from influent.recompute import remodelled
    from influent.reduce import TopK

    opened = Ensemble.open(index)
    check_steps(opened.first, "self-influence")
    choices = [
        check_curvature(member, curvature, damping, own=own_curvature(member), parity=parity)
        for member in opened.members
    ]
    values, fits = torch.zeros(opened.n, dtype=torch.float64), []
    if any(choice.kron is not None for choice in choices) or not opened.first.codec.stored:
        models = remodelled(opened, model, task, data, token_budget=token_budget, device=device)
        for again, choice, weight in zip(models, choices, opened.weights, strict=True):
            fits.append(again.settle(choice, memory=memory, progress=progress))
            values += weight * again.self_influence(fits[-1], progress=progress).double()
    else:
        where = exact_device(choose_device(device))
        for member, choice, weight in zip(opened.members, choices, opened.weights, strict=True):
            fitted = curvatures.fit(
                member, curvature=choice.curvature, damping=choice.damping, device=where, progress=progress,
                memory=curvatures.MEMORY if memory is None else memory,
            )  # fmt: skip
            fits.append(fitted)
            values += weight * score.self_influence(member, fits[-1], progress=progress).double()
    if (scale := scale_of(opened)) is not None:
        values *= scale.double()
    top = TopK(k)
    best = top.result(top.push(top.empty(1), torch.arange(opened.n), values.float().unsqueeze(0)))
    numbers, scores = best.rows[0].tolist(), best.scores[0].tolist()
    described = opened.first.catalog.describe(numbers)
    rows = [{**row, "score": value} for row, value in zip(described, scores, strict=True)]
    return {"rows": rows, "method": method_facts(opened, fits)}


def info(index: str) -> dict[str, Any]:
    """What an index holds, what it cost, what was skipped, and what was fitted to it."""
    from influent import curvature as curvatures

    opened = Ensemble.open(index)
    found = []
    for member in opened.members:
        fitted = [curvatures.describe(member, name) for name in curvatures.list_fitted(member)]
        found.append({**rowstore.info(member), "curvatures": fitted})
    if opened.artifact is None:
        return found[0]
    sums = {name: sum(each[name] for each in found) for name in ("bytes", "bytes_per_row", "shards", "catalog_bytes")}
    whole = {"path": opened.path, "digest": opened.digest, "skipped": opened.skipped, "members": len(found)}
    return {**found[0], **sums, **whole, "weights": list(opened.weights), "each": found}


def verify(index: str) -> dict[str, Any]:
    """Check every committed byte of an index (or student, or scores): `{"ok", "errors": [one line each]}`."""
    kind = _kind(Store(index))
    if kind not in ("student", "labels", "scores"):
        return ensembles.verify(index)
    errors = Artifact.open(Store(index), kind).verify()
    return {"ok": not errors, "errors": errors}


def _kind(store: Store) -> str:
    """What a directory holds, as far as it says; an index where it does not: its own check says what is wrong."""
    try:
        return str(json.loads(store.get("manifest.json"))["kind"]) if store.exists("manifest.json") else "index"
    except (ValueError, KeyError, TypeError):
        return "index"


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

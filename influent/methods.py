"""The method table, and the verbs fit, self_influence, info, verify (index: indexing.py; query: querying.py).

Every published method is a row of METHODS. A verb is the function behind the command of the same name: it takes the
same options and returns the document that the command prints with --json. Not here: what any of the stages does.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from influent import ensemble as ensembles
from influent import fisher, rowstore
from influent.artifact import Artifact
from influent.choosing import check_curvature, check_fit, check_steps, method_facts
from influent.ensemble import Ensemble
from influent.progress import Progress
from influent.rowstore import Index
from influent.storage import Store

if TYPE_CHECKING:
    from torch import Tensor

    from influent.task import Task


@dataclass(frozen=True, slots=True)
class Method:
    """One row of the table: what is differentiated, how it is compressed and stored, and a query's curvature."""

    target: str  # loss, or margin: see task.Margins
    sized: Callable[[int], str]  # the compressor whose rows have side * side entries a layer
    curvature: str
    codec: Callable[[int], str] = lambda side: "float32"  # how such rows are stored
    least: int = 0  # where a budget allows only smaller sides, `small` is taken instead:
    small: tuple[Callable[[int], str], str] | None = None  # compressor, by entries a layer in the mean, and rows
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


def _lorif_small(numbers: int) -> str:
    return f"whiten:{max(8, numbers)},share | rotate"


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
    # Where 4-bit rows would be of rank 3 or less, one bit a number, shared among the layers, is better (README).
    "lorif": Method("loss", _lorif, "lowrank", _lorif_rows, least=64, small=(_lorif_small, "dense:sign")),
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
        damping: `relative:0.1` of each block's mean eigenvalue (the default; 0.01 of ekfac, 1 of low rank), or
            `absolute:1e-3`.
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
    opened = Ensemble.open(index)
    found = [{**rowstore.info(member), "curvatures": _fitted(member)} for member in opened.members]
    if opened.artifact is None:
        return found[0]
    sums = {name: sum(each[name] for each in found) for name in ("bytes", "bytes_per_row", "shards", "catalog_bytes")}
    whole = {"path": opened.path, "digest": opened.digest, "skipped": opened.skipped, "members": len(found)}
    return {**found[0], **sums, **whole, "weights": list(opened.weights), "each": found}


def _fitted(index: Index) -> list[dict[str, Any]]:
    """What `info` lists; torch, which takes seconds to import, is there for what has numbers to be looked at."""
    if (found := fisher.describe(index)) is not None:
        return found
    from influent import curvature as curvatures

    return [curvatures.describe(index, name) for name in curvatures.list_fitted(index)]


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

"""LinFiK and the verb `value`: what each row, and each provider, would do for a target, by one step of training.

For a row z with gradient g_z at the model as it is now, and queries q_1 .. q_m that the owner cares about,

    LinFiK(z, Q) = <mean_j g_qj, g_z>          eta times it = the drop of the mean query loss after one SGD step on z

or its cosine form, mean_j cos(g_qj, g_z), by which rows are ranked. No inverse, no damping; any index, any compressor.
The formulas are our reading of Pan et al., ALinFiK (NAACL 2025), of which the abstract is public. Not here: estimates
and their intervals (bootstrap.py, providers.py), money (settling.py), values without gradients (appraise.py).
"""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from influent import providers, rowsums, settling
from influent import score as scoring
from influent import target as targets
from influent.attach import Run
from influent.bootstrap import DRAWS, Means, TwoWay
from influent.catalog import Catalog
from influent.errors import SpecError
from influent.payments import money, refuse
from influent.progress import Progress
from influent.providers import Groups, Overlap
from influent.recompute import answering
from influent.rowstore import Index
from influent.tables import write_array, write_table
from influent.target import Target, direction
from influent.task import Task

FORMS = ("cosine", "none")
INTERVALS = ("queries", "delivery")
UNITS = {
    "cosine": "mean cosine of the row's gradient with the queries'",
    "none": "drop of the mean query loss per unit of learning rate, after one SGD step on the row",
}
STEP_UNITS = {
    "cosine": "mean cosine of Adam's step on the row with the queries' gradients",
    "none": "drop of the mean query loss per unit of learning rate, after one Adam step on the row",
}


def value(
    index: str,
    *,
    target: Any,
    by: str = "provider",
    normalize: str = "cosine",
    interval: str = "queries",
    budget: str | None = None,
    costs: str | None = None,
    diversity: float = 0.0,
    rows: int = 5,
    draws: int = DRAWS,
    seed: int = 0,
    values: str | None = None,
    model: str | nn.Module | None = None,
    token_budget: int = 4096,
    device: str | None = None,
    task: Task | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """What every row of an index, and every provider, is worth for a target.

    Args:
        target: a file or sequence of records: what the model should do better.
        by: `provider` or `source`, the field that groups rows.
        normalize: `cosine`, or `none` for the predicted drop of the loss itself.
        interval: whose chance the shown interval is about: `queries` (these very rows, other queries like these) or
            `delivery` (other rows like these as well). Both are in the document.
        budget: money to divide, or with `costs`, to buy for. `costs` is a file of `provider` and `cost`.
        diversity: what a provider bought already takes from those like it, in a purchase; 0 for nothing.
        rows: the best and worst rows of each provider that are shown.
        draws: of the bootstrap.
        values: write every row's value to this file: `.npy` (float32 [N]), `.parquet` or `.csv` (with id and provider).

    Returns:
        The document of docs/schemas/value.json.

    Raises:
        MismatchError: the model or task is not the one that was indexed.
        SpecError, DataError, NumericsError: as their classes say.
    """
    _check(normalize, interval, diversity, costs, budget)
    purse, asked = None if budget is None else money(budget), settling.read_costs(costs)
    opened, wanted = Index.open(index), targets.read(target, task)
    if diversity:
        rowsums.check_stored(opened, "--diversity")
    groups = providers.groups_of(opened.catalog.fields("provider", "source"), by)
    run = Run(token_budget=token_budget, device=device)
    queries = targets.gradients(opened, wanted, model=model, task=task, run=run, progress=progress)
    reducers = {
        "values": Means(),
        "draws": TwoWay(torch.from_numpy(groups.labels), len(groups.names), draws, seed),
    }
    with answering(
        opened, queries, normalize=normalize, model=model, task=task, run=run, progress=progress
    ) as member:  # fmt: skip
        found = scoring.score_members([member], reducers, normalize=normalize, progress=progress)
    each = found["values"].numpy()
    if values is not None:
        write_values(opened.catalog, each, values)
    means = np.bincount(groups.labels, weights=each) / groups.counts
    estimates = providers.from_draws(
        means.tolist(), found["draws"], queries=len(wanted), rows=groups.counts.tolist(), shown=interval
    )
    document = providers.report(
        groups, each, opened.stat("tokens").double().numpy(), estimates,
        draws=(found["draws"].queries if interval == "queries" else found["draws"].both).numpy(),
        found=copies(opened.catalog, wanted, progress), describe=opened.catalog.describe, shown=rows,
    )  # fmt: skip
    beside = None
    if asked is not None and diversity:
        beside = _beside(opened, groups, direction(queries, normalize), normalize, diversity, progress)
    payments = settling.settle(
        document, budget=purse, costs=asked, refused=refuse(queries=len(wanted)), marginal=beside
    )
    return {
        "target": wanted.facts(target),
        "by": by,
        "providers": document,
        "payments": payments,
        "rows": _rows(opened, each, rows),
        "method": {**facts(opened, normalize), "interval": interval},
        "fidelity": None,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def row_values(
    index: Index, queries: dict[str, Tensor], *, normalize: str = "cosine", progress: Progress | None = None
) -> np.ndarray:
    """LinFiK of every row, [N] float32."""
    found = scoring.score(index, queries, {"values": Means()}, normalize=normalize, progress=progress)
    return found["values"].numpy()


def write_values(catalog: Catalog, values: np.ndarray, path: str) -> None:
    """One value a row, whole or not at all."""
    if not path.endswith(".npy"):
        named = catalog.fields("id", "source", "provider")
        write_table([{"row": i, **row, "value": float(values[i])} for i, row in enumerate(named)], path)
        return
    write_array(values, path)


def facts(index: Index, normalize: str) -> dict[str, Any]:
    """What a value rests on: it ages with the model, so the model is named."""
    return {
        "method": "linfik",
        "normalize": normalize,
        "unit": unit_of(index, normalize),
        "model": index.spec["model"]["fingerprint"],
        "index": index.digest,
        "compress": index.spec["compress"],
    }


def unit_of(index: Index, normalize: str) -> str:
    """What a value of 1 means."""
    stepped = index.spec.get("scale", {}).get("kind") == "adam-step"
    return (STEP_UNITS if stepped else UNITS)[normalize]


def copies(catalog: Catalog, target: Target, progress: Progress | None) -> Overlap | None:
    """Copies among the rows and queries in them; None when the catalog holds no texts."""
    if not target.texts:
        return None
    hashes = [row["hash"] or "" for row in catalog.fields("hash")]
    return providers.overlap(hashes, catalog.texts(), target.texts, progress=progress)


def _check(normalize: str, interval: str, diversity: float, costs: str | None, budget: str | None) -> None:
    if normalize not in FORMS:
        raise SpecError(f"normalize is {normalize!r}, expected {' or '.join(FORMS)}")
    if interval not in INTERVALS:
        raise SpecError(f"interval is {interval!r}, expected {' or '.join(INTERVALS)}")
    if not 0 <= diversity < float("inf"):
        raise SpecError(f"diversity is {diversity}, expected a number of 0 or more")
    if budget is None and (costs is not None or diversity):
        raise SpecError("costs and diversity are for a purchase: give --budget as well")
    if diversity and costs is None:
        raise SpecError("diversity is for a purchase at asked prices: give --costs as well")


def _beside(
    index: Index,
    groups: Groups,
    asked: dict[str, Tensor],
    normalize: str,
    diversity: float,
    progress: Progress | None,
) -> Callable[[str, Sequence[str]], float]:
    """The marginal value of a provider's rows, taken one after another: the sum over them of <g_Q - mu s, g_z>, s the
    sum of the rows taken before, of those bought and of its own, and mu = `diversity` / N; rows of unit length under
    cosine. Over its own rows in any order, sum <s, g_z> = (|sum g_z|^2 - sum |g_z|^2) / 2."""
    squares = rowsums.lengths(index).double().square()
    weights = torch.zeros(len(groups.names), index.n)
    weights[torch.from_numpy(groups.labels), torch.arange(index.n)] = 1.0
    if normalize == "cosine":
        weights *= torch.where(squares > 0, squares.rsqrt(), 0.0).float()
    sums = rowsums.weighted(index, weights, progress=progress)
    own = sum((total.double() @ asked[key][0].double() for key, total in sums.items()), torch.zeros(()))
    gram = sum((total.double() @ total.double().T for total in sums.values()), torch.zeros(()))
    repeated = (gram.diagonal() - weights.double().square() @ squares) / 2
    place = {name: g for g, name in enumerate(groups.names)}

    def marginal(name: str, bought: Sequence[str]) -> float:
        taken = sum(float(gram[place[name], place[other]]) for other in bought)
        return float(own[place[name]]) - diversity / index.n * (taken + float(repeated[place[name]]))

    return marginal


def _rows(index: Index, values: np.ndarray, shown: int) -> dict[str, Any]:
    falling = np.argsort(-values, kind="stable")
    lists = {"best": falling[:shown], "worst": falling[::-1][:shown]}
    return {
        name: [{**row, "value": float(values[row["row"]])} for row in index.catalog.describe(picked.tolist())]
        for name, picked in lists.items()
    }

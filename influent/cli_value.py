"""The verbs of data valuation: value. Each parses, checks what can be checked at once, calls its namesake, prints.

Does: what cli.py says of every verb; a budget that cannot be priced prints the report, says why, and exits with 2.
Does not: compute.
"""

from __future__ import annotations

from typing import Annotated

import typer

import influent
from influent import preflight
from influent.options import Device, IndexPath, Json, TokenBudget
from influent.payments import money
from influent.terminal import Doc, print_document, progress_bars

Target = Annotated[
    str, typer.Option(metavar="FILE", help="What the model should do better: rows like the data's, as queries.")
]
By = Annotated[str, typer.Option(metavar="FIELD", help="Group rows by provider or source.")]
Budget = Annotated[str | None, typer.Option(metavar="MONEY", help="Divide so much among the providers, to the cent.")]
Costs = Annotated[
    str | None, typer.Option(metavar="FILE", help="What each asks (CSV, JSONL: provider, cost): buy within the budget.")
]
Rows = Annotated[int, typer.Option(metavar="N", min=1, help="Best and worst rows to show of each provider.")]
Table = Annotated[
    str | None, typer.Option("-o", "--out", metavar="FILE", help="Also write the providers: .parquet or .csv.")
]
Page = Annotated[str | None, typer.Option("--html", metavar="FILE", help="Also write the report as one HTML page.")]
Seed = Annotated[int, typer.Option(metavar="N", min=0, help="Of the draws.")]
ModelPath = Annotated[str | None, typer.Option(metavar="PATH", help="Default: the one noted in the index.")]


def value(
    index: IndexPath,
    target: Target,
    by: By = "provider",
    normalize: Annotated[
        str, typer.Option(metavar="NAME", help="cosine, or none: the predicted drop of the loss.")
    ] = "cosine",
    interval: Annotated[
        str, typer.Option(metavar="NAME", help="queries (these very rows) or delivery (other rows like these too).")
    ] = "queries",
    budget: Budget = None,
    costs: Costs = None,
    diversity: Annotated[
        float, typer.Option(metavar="MU", min=0, help="In a purchase, what is bought takes from what is like it.")
    ] = 0.0,
    rows: Rows = 5,
    draws: Annotated[int, typer.Option(metavar="N", min=100, help="Of the bootstrap.")] = 1000,
    seed: Seed = 0,
    values: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write every row's value: .npy, .parquet or .csv.")
    ] = None,
    model: ModelPath = None,
    token_budget: TokenBudget = 4096,
    device: Device = None,
    out: Table = None,
    html: Page = None,
    json: Json = False,
) -> None:
    """Say what rows and providers are worth.

    For a target, by one step of training (LinFiK), with intervals, duplicates, leaks and payments.
    """
    preflight.choice("--by", by, ("provider", "source"))
    preflight.choice("--normalize", normalize, ("cosine", "none"))
    preflight.choice("--interval", interval, ("queries", "delivery"))
    if budget is not None:
        money(budget)
    preflight.output("--values", values, (".npy", ".parquet", ".csv"))
    _outputs(out, html)
    opened = preflight.index(index)
    preflight.same_model(opened, model)
    preflight.queries("--target", target)
    with progress_bars() as progress:
        document = influent.value(
            index, target=target, by=by, normalize=normalize, interval=interval, budget=budget, costs=costs,
            diversity=diversity, rows=rows, draws=draws, seed=seed, values=values, model=model,
            token_budget=token_budget, device=device, progress=progress,
        )  # fmt: skip
    _report(document, out, html, json=json)


def _outputs(out: str | None, html: str | None) -> None:
    preflight.output("--out", out, (".parquet", ".csv"))
    preflight.output("--html", html, (".html", ".htm"))


def _report(document: Doc, out: str | None, html: str | None, *, json: bool) -> None:
    from influent.tables import write_table
    from influent.value_page import print_value, value_records, write_html

    if out is not None:
        write_table(list(value_records(document)), out)
    if html is not None:
        write_html(document, html)
    print_document(document, print_value, json=json)
    if document["payments"] is not None and document["payments"]["refused"] is not None:
        raise typer.Exit(2)


VERBS = (value,)

"""The verbs of data valuation: value, select, … Each parses, checks what can be checked, calls its namesake, prints.

Does: what cli.py says of every verb; a budget that cannot be priced prints the report, says why, and exits with 2.
Does not: compute.
"""

from __future__ import annotations

from typing import Annotated

import typer

import influent
from influent import preflight
from influent.errors import SpecError
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
Normalize = Annotated[str, typer.Option(metavar="NAME", help="cosine, or none: the predicted drop of the loss.")]
Draws = Annotated[int, typer.Option(metavar="N", min=100, help="Of the bootstrap.")]
ModelPath = Annotated[str | None, typer.Option(metavar="PATH", help="Default: the one noted in the index.")]


def value(
    index: IndexPath,
    target: Target,
    by: By = "provider",
    normalize: Normalize = "cosine",
    interval: Annotated[
        str, typer.Option(metavar="NAME", help="queries (these very rows) or delivery (other rows like these too).")
    ] = "queries",
    budget: Budget = None,
    costs: Costs = None,
    diversity: Annotated[
        float, typer.Option(metavar="MU", min=0, help="In a purchase, what is bought takes from what is like it.")
    ] = 0.0,
    rows: Rows = 5,
    draws: Draws = 1000,
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


def select(
    index: IndexPath,
    target: Target,
    out: Annotated[str, typer.Option("-o", "--out", metavar="FILE", help="The data set to write: .jsonl or .parquet.")],
    budget: Annotated[str | None, typer.Option(metavar="N", help="How many rows: a number, or a share: 10%.")] = None,
    tokens: Annotated[int | None, typer.Option(metavar="N", min=1, help="How many target tokens at most.")] = None,
    diversity: Annotated[
        float, typer.Option(metavar="MU", min=0, help="What is taken already takes from what is like it; try 1.")
    ] = 0.0,
    rounds: Annotated[
        int, typer.Option(metavar="N", min=1, help="Passes over the index when there is a diversity term.")
    ] = 20,
    normalize: Normalize = "cosine",
    model: ModelPath = None,
    token_budget: TokenBudget = 4096,
    device: Device = None,
    json: Json = False,
) -> None:
    """Write the rows that serve a target best.

    As a data set, with a card of how it was chosen.
    """
    if (budget is None) == (tokens is None):
        raise SpecError("give --budget (rows, or a share such as 10%) or --tokens, one of them")
    preflight.choice("--normalize", normalize, ("cosine", "none"))
    preflight.output("--out", out, (".jsonl", ".parquet"))
    opened = preflight.index(index)
    preflight.same_model(opened, model)
    preflight.queries("--target", target)
    with progress_bars() as progress:
        document = influent.select(
            index, target=target, out=out, budget=budget, tokens=tokens, diversity=diversity, rounds=rounds,
            normalize=normalize, model=model, token_budget=token_budget, device=device, progress=progress,
        )  # fmt: skip
    from influent.value_page import print_selection

    print_document(document, print_selection, json=json)


def distill(
    index: IndexPath,
    target: Target,
    student: Annotated[str, typer.Option(metavar="MODEL", help="The small causal language model: folder or hub name.")],
    out: Annotated[str, typer.Option("-o", "--out", metavar="STUDENT", help="Directory to write.")],
    labels: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Rows to label, 20 a provider at least. Default: all.")
    ] = None,
    rung: Annotated[
        str, typer.Option(metavar="NAME", help="bm25, tfidf, encoder, lm, tuned, tangent, or auto: what ranks best.")
    ] = "auto",
    encoder: Annotated[str | None, typer.Option(metavar="PATH", help="A sentence encoder, for its rung.")] = None,
    by: By = "provider",
    normalize: Normalize = "cosine",
    calibration: Annotated[str, typer.Option(metavar="NAME", help="linear or isotonic.")] = "linear",
    epochs: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Of training the small model (tangent; tuned too if given).")
    ] = None,
    rate: Annotated[float | None, typer.Option(metavar="R", help="Of training the small model.")] = None,
    embed_model: Annotated[bool, typer.Option("--embed-model", help="Put the small model into the student.")] = False,
    seed: Seed = 0,
    model: ModelPath = None,
    token_budget: TokenBudget = 4096,
    device: Device = None,
    json: Json = False,
) -> None:
    """Teach a small model to value rows.

    It learns what the gradients say of a target (ALinFiK), is measured on held-out labels, and can be handed out.
    """
    preflight.choice("--rung", rung, ("auto", "bm25", "tfidf", "encoder", "lm", "tuned", "tangent"))
    preflight.choice("--by", by, ("provider", "source"))
    preflight.choice("--normalize", normalize, ("cosine", "none"))
    preflight.choice("--calibration", calibration, ("linear", "isotonic"))
    opened = preflight.index(index)
    preflight.same_model(opened, model)
    preflight.queries("--target", target)
    preflight.model(student)
    with progress_bars() as progress:
        document = influent.distill(
            index, target=target, student=student, out=out, labels=labels, rung=rung, encoder=encoder, by=by,
            normalize=normalize, calibration=calibration, epochs=epochs, rate=rate, embed_model=embed_model, seed=seed,
            model=model,
            token_budget=token_budget, device=device, progress=progress,
        )  # fmt: skip
    from influent.value_page import print_student

    print_document(document, print_student, json=json)


def appraise(
    student: Annotated[str, typer.Argument(metavar="STUDENT", help="Directory that `influent distill` wrote.")],
    data: Annotated[str, typer.Argument(metavar="DATA", help="The offer: rows like those of `influent index`.")],
    out: Annotated[
        str | None, typer.Option("-o", "--out", metavar="DIR", help="Keep the scores here; resumed if unfinished.")
    ] = None,
    by: By = "provider",
    budget: Budget = None,
    costs: Costs = None,
    labels: Annotated[
        str | None, typer.Option(metavar="FILE", help="Rows labelled since (CSV, JSONL: hash, value): an audit.")
    ] = None,
    commit: Annotated[
        bool, typer.Option("--commit", help="Commit to the scores in --out, so that a buyer can audit them.")
    ] = False,
    rows: Rows = 5,
    draws: Draws = 1000,
    seed: Seed = 0,
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="Only the first so many rows.")] = None,
    model: Annotated[
        str | None, typer.Option(metavar="PATH", help="The small model, if it is not where it was.")
    ] = None,
    token_budget: TokenBudget = 4096,
    device: Device = None,
    table: Annotated[
        str | None, typer.Option("--table", metavar="FILE", help="Also write the providers: .parquet or .csv.")
    ] = None,
    html: Page = None,
    json: Json = False,
) -> None:
    """Say what an offer is worth, by a student.

    Needs neither the large model nor gradients: one forward pass of a small model a row.
    """
    preflight.choice("--by", by, ("provider", "source"))
    if budget is not None:
        money(budget)
    if commit and out is None:
        raise SpecError("--commit is to scores that are kept: give --out as well")
    _outputs(table, html)
    preflight.directory(student, "student")
    preflight.data(data)
    with progress_bars() as progress:
        document = influent.appraise(
            student, data, out=out, by=by, budget=budget, costs=costs, labels=labels, commit=commit, rows=rows,
            draws=draws, seed=seed, limit=limit, model=model, token_budget=token_budget, device=device,
            progress=progress,
        )  # fmt: skip
    _report(document, table, html, json=json)


AuditSeed = Annotated[str, typer.Option(metavar="TEXT", help="Agreed on in public after the root was known.")]
Count = Annotated[int, typer.Option(metavar="N", min=1, help="Rows that are audited.")]


def reveal(
    scores: Annotated[str, typer.Argument(metavar="DIR", help="Where `influent appraise --commit` left its scores.")],
    seed: AuditSeed,
    count: Count,
    out: Annotated[str, typer.Option("-o", "--out", metavar="FILE", help="The revealed rows, as JSONL.")],
    json: Json = False,
) -> None:
    """Reveal the rows that an audit draws.

    The provider's side: their content, with what proves that they are the committed ones.
    """
    preflight.directory(scores, "folder of scores")
    document = influent.reveal(scores, seed=seed, count=count, out=out)
    from influent.value_page import print_revealed

    print_document(document, print_revealed, json=json)


def audit(
    commitment: Annotated[
        str, typer.Argument(metavar="DIR", help="Folder of commitment.json and commitment.parquet, as handed over.")
    ],
    revealed: Annotated[str, typer.Argument(metavar="FILE", help="What `influent reveal` wrote.")],
    seed: AuditSeed,
    count: Count,
    student: Annotated[
        str | None, typer.Option(metavar="STUDENT", help="Recompute the revealed rows' scores with it.")
    ] = None,
    labels: Annotated[
        str | None, typer.Option(metavar="FILE", help="The revealed rows, labelled (CSV, JSONL: hash, value).")
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="PATH", help="The small model, if it is not where it was.")
    ] = None,
    token_budget: TokenBudget = 4096,
    device: Device = None,
    json: Json = False,
) -> None:
    """Check a provider's committed scores.

    The buyer's side. Exit code 2 when something is not what was committed.
    """
    preflight.directory(commitment, "commitment")
    with progress_bars() as progress:
        document = influent.audit(
            commitment, revealed, seed=seed, count=count, student=student, labels=labels, model=model,
            token_budget=token_budget, device=device, progress=progress,
        )  # fmt: skip
    from influent.value_page import print_audit

    print_document(document, print_audit, json=json)
    if not document["ok"]:
        raise typer.Exit(2)


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


VERBS = (value, select, distill, appraise, reveal, audit)

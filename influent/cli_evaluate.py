"""The verb `evaluate` of the command line. Checking and judging are those of the function of the same name."""

from __future__ import annotations

from typing import Annotated

import typer

import influent
from influent.options import CurvatureName, Damping, Device, Json, Memory, Models, Parity, TokenBudget
from influent.terminal import print_document, progress_bars


def evaluate(
    index: Annotated[
        str | None, typer.Argument(metavar="[INDEX]", help="Directory that `influent index` wrote; or only --scores.")
    ] = None,
    scores: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FILE", help="Any queries x rows .npy, judged beside it; may be repeated."),
    ] = None,
    queries: Annotated[str | None, typer.Option(metavar="FILE", help="Rows like the data's: what is asked.")] = None,
    data: Annotated[
        str | None, typer.Option(metavar="FILE", help="The training rows. Default: those of the index.")
    ] = None,
    truth: Annotated[
        str | None, typer.Option(metavar="DIR", help="Where retrainings are kept; made if missing, resumed.")
    ] = None,
    metric: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="Of lds, loo, tail-patch, mislabel, brittleness, selection, removal, retrieval; joined by commas.",
        ),
    ] = "lds",
    train: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="file.py:function or module:function; called with (rows, seed)."),
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Instead: the language model that fine-tuning starts from.")
    ] = None,
    epochs: Annotated[int, typer.Option(metavar="N", help="Of fine-tuning.")] = 3,
    rate: Annotated[float, typer.Option(metavar="NUMBER", help="Learning rate of it, falling linearly to 0.")] = 5e-5,
    batch: Annotated[int, typer.Option(metavar="N", help="Rows in one step of it.")] = 8,
    max_length: Annotated[
        int | None, typer.Option(metavar="N", min=2, help="Tokens. Default: the index's, or 512.")
    ] = None,
    subsets: Annotated[
        int | None, typer.Option(metavar="N", help="Random halves. Default: those stored, or 50.")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(metavar="N", help="Trainings of each subset. Default: those stored, or 1.")
    ] = None,
    leave: Annotated[
        str, typer.Option(metavar="UNIT", help="For loo, what is left out at a time: row, source or provider.")
    ] = "row",
    left_out: Annotated[
        int | None, typer.Option(metavar="N", help="For loo, how many of them, drawn at random. Default: all.")
    ] = None,
    remove: Annotated[
        str, typer.Option(metavar="N,N", help="For brittleness, how many of a query's top rows are removed.")
    ] = "10,50",
    probes: Annotated[int, typer.Option(metavar="N", help="For brittleness, how many queries.")] = 10,
    shares: Annotated[
        str, typer.Option(metavar="X,X", help="For selection and removal, shares of the rows.")
    ] = "0.1,0.25,0.5,0.75",
    k: Annotated[int, typer.Option("-k", metavar="N", help="For tail-patch and retrieval, a query's top rows.")] = 10,
    relevant: Annotated[
        str | None, typer.Option(metavar="FILE", help="For retrieval: a .npy of booleans, or a table of query and id.")
    ] = None,
    flags: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="For mislabel, the bad rows: a .npy of booleans, source=X or provider=X."),
    ] = None,
    normalize: Annotated[str, typer.Option(metavar="NAME", help="none, cosine or relatif.")] = "none",
    curvature: CurvatureName = None,
    damping: Damping = None,
    parity: Parity = None,
    damping_grid: Annotated[
        str | None,
        typer.Option(metavar="X,X", help="Relative dampings; the best on a tenth of the queries is used on the rest."),
    ] = None,
    memory: Memory = None,
    model: Models = None,
    token_budget: TokenBudget = 4096,
    device: Device = None,
    plot: Annotated[str | None, typer.Option(metavar="FILE.png", help="Write plots (needs influent[plots]).")] = None,
    html: Annotated[
        str | None, typer.Option(metavar="FILE.html", help="Write a page with plots and tables (needs the same).")
    ] = None,
    json: Json = False,
) -> None:
    """Judge scores by what retraining does.

    Those of an index, those of other tools, and two baselines; interrupted, the same command goes on.
    """
    with progress_bars() as progress:
        document = influent.evaluate(
            index, scores=scores, queries=queries, data=data, truth=truth, metric=metric, train=train, base=base,
            epochs=epochs, rate=rate, batch=batch, max_length=max_length, subsets=subsets, seeds=seeds, leave=leave,
            left_out=left_out, remove=remove, probes=probes, shares=shares, k=k, relevant=relevant, flags=flags,
            normalize=normalize,
            curvature=curvature, damping=damping, parity=parity, damping_grid=damping_grid, memory=memory, model=model,
            token_budget=token_budget, device=device, plot=plot, html=html, progress=progress,
        )  # fmt: skip
    from influent.scorecard import print_evaluate

    print_document(document, print_evaluate, json=json)


VERBS = (evaluate,)

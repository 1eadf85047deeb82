"""The command line: every verb parses, checks what can be checked at once, calls its namesake of the API, prints.

Does: one line on stderr and exit code 2 for anything a user can mend; progress on stderr; one JSON document on stdout
with `--json`. Does not: compute. Whatever imports torch is imported inside the verb, after the checks. Verbs of another
theme are plain functions of their own module (`cli_THEME.py`, over options.py and terminal.py), registered at the end.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any, cast

import typer

import influent
from influent import cli_evaluate, cli_mask, cli_value, preflight
from influent.errors import InfluentError
from influent.kronname import LABELS
from influent.layout import SCALES
from influent.options import (
    Checkpoints,
    CurvatureName,
    Damping,
    Device,
    FitDamping,
    IndexPath,
    Json,
    Labels,
    Memory,
    Models,
    Out,
    Parity,
    SkipNonfinite,
    TokenBudget,
)
from influent.terminal import print_document, progress_bars

# click's ClickException, wherever this release of Typer keeps click
CommandLineError: type[Exception] = typer.BadParameter.__mro__[2]
METHODS = ("factgrass", "lorif", "logra", "grass", "ekfac", "kfac", "graddot", "linfik", "trak", "tracin", "datainf")

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,  # a bug shows Python's own traceback
    rich_markup_mode=None,
    help="Which training examples made a language model say that.",
)


@app.command()
def index(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hugging Face model folder, GGUF file, or hub name.")],
    data: Annotated[
        str,
        typer.Argument(metavar="DATA", help="JSONL, CSV, Parquet, Arrow or text file, a folder of them, or hub name."),
    ],
    out: Annotated[
        str, typer.Option("-o", "--out", metavar="INDEX", help="Directory to write; resumed if unfinished.")
    ],
    checkpoints: Checkpoints = None,
    rates: Annotated[
        list[float] | None,
        typer.Option("--rate", metavar="R", help="Learning rate of each checkpoint, MODEL's first (tracin)."),
    ] = None,
    method: Annotated[str, typer.Option(metavar="NAME", help=", ".join(METHODS))] = "factgrass",
    key: Annotated[
        str | None, typer.Option(metavar="NAME", help="A row for each layer: block; one for all: all. By method.")
    ] = None,
    scale: Annotated[str, typer.Option(metavar="NAME", help=f"none; by --optimizer: {', '.join(SCALES)}.")] = "none",
    optimizer: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="Adam's state, of each checkpoint: safetensors by name, or optimizer.pt."),
    ] = None,
    compress: Annotated[str | None, typer.Option(metavar="TEXT", help='e.g. "mask:128x128 | sjlt:4096".')] = None,
    row_bytes: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Size of a stored row, e.g. 64KiB; sets the compressor's sizes.")
    ] = None,
    rows: Annotated[
        str | None,
        typer.Option(metavar="CODEC", help="dense:BITS or rank:C:BITS; BITS float32, bf16, int8, int4, sign, …"),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(metavar="REGEX", help="Layers to track: searched in module names. Default: the blocks' Linears."),
    ] = None,
    exclude: Annotated[
        str | None, typer.Option(metavar="REGEX", help="Layers to leave out: searched likewise.")
    ] = None,
    max_length: Annotated[
        int, typer.Option(metavar="N", min=2, help="Longer documents are split, their gradients summed.")
    ] = 512,
    token_budget: TokenBudget = 4096,
    dtype: Annotated[str, typer.Option(metavar="NAME", help="The model's: float32, bfloat16 or float16.")] = "float32",
    matmul: Annotated[
        str, typer.Option(metavar="NAME", help="Precision of float32 products: highest or medium.")
    ] = "highest",
    catalog: Annotated[
        str, typer.Option(metavar="KIND", help="Keep the text, or a reference to it: text or reference.")
    ] = "text",
    shard_rows: Annotated[int | None, typer.Option(metavar="N", min=1, help="Rows a shard. Default: by size.")] = None,
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="Index only the first so many rows.")] = None,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Of the random projections.")] = 0,
    skip_nonfinite: SkipNonfinite = False,
    device: Device = None,
    json: Json = False,
) -> None:
    """Collect one compressed gradient per example.

    The same command again resumes an interrupted one.
    """
    preflight.choice("--method", method, METHODS)
    preflight.choice("--scale", scale, ("none", *SCALES))
    preflight.choice("--key", key or "block", ("block", "all"))
    preflight.choice("--dtype", dtype, ("float32", "bfloat16", "float16"))
    preflight.choice("--matmul", matmul, ("highest", "medium"))
    preflight.choice("--catalog", catalog, ("text", "reference"))
    rows, compress, row_size = preflight.rows(rows), preflight.compressor(compress), preflight.size(row_bytes)
    preflight.pattern("--layers", layers)
    preflight.pattern("--exclude", exclude)
    preflight.data(data)
    for each in (model, *(checkpoints or ())):
        preflight.model(each)
        preflight.context(each, max_length)
        preflight.layers(each, layers, exclude)
    numerics = {"dtype": dtype, "matmul": matmul}
    wanted = {"compress": preflight.stored_compressor(compress), "rows": rows, "seed": seed, "numerics": numerics}
    preflight.place(out, wanted, 1 + len(checkpoints or ()))
    with progress_bars() as progress:
        document = influent.index(
            model, data, out=out, checkpoints=checkpoints, rates=rates, method=method, key=key,
            scale=scale, optimizer=optimizer,
            compress=compress, row_bytes=row_size, rows=rows, layers=layers,
            exclude=exclude,
            max_length=max_length, token_budget=token_budget, dtype=dtype, matmul=matmul, catalog=cast(Any, catalog),
            shard_rows=shard_rows, limit=limit, seed=seed, skip_nonfinite=skip_nonfinite, device=device,
            progress=progress,
        )  # fmt: skip
    from influent.report import print_info

    print_document(document, print_info, json=json)


@app.command()
def append(
    index: IndexPath,
    data: Annotated[str, typer.Argument(metavar="DATA", help="More rows like those of the index, with new ids.")],
    model: Annotated[str | None, typer.Option(metavar="PATH", help="Default: the one noted in the index.")] = None,
    token_budget: TokenBudget = 4096,
    skip_nonfinite: SkipNonfinite = False,
    device: Device = None,
    json: Json = False,
) -> None:
    """Add rows to an index.

    The rows that are there are not touched; the same command again resumes an interrupted one.
    """
    preflight.data(data)
    preflight.same_model(preflight.index(index), model)
    with progress_bars() as progress:
        document = influent.append(
            index, data, model=model, token_budget=token_budget, skip_nonfinite=skip_nonfinite, device=device,
            progress=progress,
        )  # fmt: skip
    from influent.report import print_info

    print_document(document, print_info, json=json)


@app.command()
def fit(
    index: IndexPath,
    curvature: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="fim, lowrank:R, sketch:R, datainf, kfac, ekfac, … Default: the method's own."
        ),
    ] = None,
    damping: FitDamping = None,
    labels: Labels = None,
    memory: Memory = None,
    model: Models = None,
    token_budget: TokenBudget = 4096,
    device: Device = None,
    json: Json = False,
) -> None:
    """Fit a curvature to an index.

    Any number of them may be fitted; another damping reuses the costly part.
    """
    preflight.curvature(curvature)
    preflight.damping(damping)
    preflight.choice("--labels", labels or LABELS[0], LABELS)
    opened = preflight.ensemble(index)
    if model is not None:
        preflight.same_models(opened, model)
    with progress_bars() as progress:
        document = influent.fit(
            index, curvature=curvature, damping=damping, labels=labels, memory=memory, model=model,
            token_budget=token_budget, device=device, progress=progress,
        )  # fmt: skip
    from influent.report import print_fit

    print_document(document, print_fit, json=json)


@app.command()
def query(
    index: IndexPath,
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="What the model was given.")] = None,
    completion: Annotated[str | None, typer.Option(metavar="TEXT", help="What it answered.")] = None,
    queries: Annotated[str | None, typer.Option(metavar="FILE", help="Many queries: rows like the data's.")] = None,
    control: Annotated[
        str | None, typer.Option(metavar="FILE", help="Subtract the mean of these from the queries'.")
    ] = None,
    k: Annotated[int, typer.Option("-k", metavar="N", min=1, help="Rows to show on each side.")] = 10,
    bottom: Annotated[bool, typer.Option(help="Also the rows that pushed the other way.")] = True,
    normalize: Annotated[str, typer.Option(metavar="NAME", help="none, cosine or relatif.")] = "none",
    curvature: CurvatureName = None,
    damping: Damping = None,
    parity: Parity = None,
    mix: Annotated[
        float | None, typer.Option(metavar="M", help="Share of the queries' own rows in the Fisher matrix, e.g. 0.5.")
    ] = None,
    query_rank: Annotated[
        int | None, typer.Option(metavar="R", min=1, help="Cut preconditioned queries to this rank: faster.")
    ] = None,
    memory: Memory = None,
    model: Models = None,
    scores: Annotated[str | None, typer.Option(metavar="FILE", help="Write queries x rows as float32 .npy.")] = None,
    out: Out = None,
    token_budget: TokenBudget = 4096,
    device: Device = None,
    json: Json = False,
) -> None:
    """Rank the training examples behind a completion."""
    preflight.asked(prompt, completion, queries)
    preflight.choice("--normalize", normalize, ("none", "cosine", "relatif"))
    preflight.curvature(curvature)
    preflight.damping(damping)
    preflight.parity(parity)
    preflight.output("--scores", scores, (".npy",))
    preflight.output("--out", out, (".parquet", ".csv"))
    preflight.same_models(preflight.ensemble(index), model)
    preflight.queries("--queries", queries)
    preflight.queries("--control", control)
    with progress_bars() as progress:
        document = influent.query(
            index, prompt=prompt, completion=completion, queries=queries, control=control, k=k, bottom=bottom,
            normalize=normalize, curvature=curvature, damping=damping, parity=parity, mix=mix,
            query_rank=query_rank,
            memory=memory, model=model, scores=scores, token_budget=token_budget, device=device, progress=progress,
        )  # fmt: skip
    from influent.report import FIELDS, print_query, query_records
    from influent.tables import write_table

    if out is not None:
        write_table(list(query_records(document)), out, columns=FIELDS)
    print_document(document, print_query, json=json)


@app.command("self")
def self_influence(
    index: IndexPath,
    k: Annotated[int, typer.Option("-k", metavar="N", min=1, help="Rows to show.")] = 20,
    curvature: CurvatureName = None,
    damping: Damping = None,
    parity: Parity = None,
    memory: Memory = None,
    model: Models = None,
    out: Out = None,
    token_budget: TokenBudget = 4096,
    device: Device = None,
    json: Json = False,
) -> None:
    """Rank examples by influence on themselves.

    Outliers, wrong labels and poisoned rows come first.
    """
    preflight.curvature(curvature)
    preflight.damping(damping)
    preflight.parity(parity)
    preflight.output("--out", out, (".parquet", ".csv"))
    opened = preflight.ensemble(index)
    if model is not None:
        preflight.same_models(opened, model)
    with progress_bars() as progress:
        document = influent.self_influence(
            index, k=k, curvature=curvature, damping=damping, parity=parity, memory=memory, model=model,
            token_budget=token_budget, device=device, progress=progress,
        )  # fmt: skip
    from influent.report import print_self, self_records
    from influent.tables import write_table

    if out is not None:
        write_table(list(self_records(document)), out)
    print_document(document, print_self, json=json)


@app.command()
def info(index: IndexPath, json: Json = False) -> None:
    """Say what an index holds.

    What it cost, what was skipped and why, and which curvatures are fitted.
    """
    preflight.ensemble(index)
    from influent.report import print_info

    print_document(influent.info(index), print_info, json=json)


@app.command()
def verify(index: IndexPath, json: Json = False) -> None:
    """Check every committed byte of an index.

    Exit code 2 when something is wrong.
    """
    preflight.directory(index)
    from influent.report import print_verify

    document = influent.verify(index)
    print_document(document, print_verify, json=json)
    if not document["ok"]:
        raise typer.Exit(2)


@app.command()
def demo(
    out: Annotated[str, typer.Option("-o", "--out", metavar="DIR", help="Where the demo's index goes.")] = "demo-index",
    json: Json = False,
) -> None:
    """Index and query a real model and real text.

    Takes under three minutes on two cores.
    """
    from influent.demo import demo as run
    from influent.demo import page

    with progress_bars() as progress:
        document = run(out, progress=progress)
    print_document(document, page, json=json)


for verb in (*cli_evaluate.VERBS, *cli_mask.VERBS, *cli_value.VERBS):
    app.command()(verb)


def main() -> None:
    """The `influent` command. Exit codes: 0 done, 1 a bug of ours (with its traceback), 2 mend what the line says."""
    sys.exit(run(sys.argv[1:] or ["--help"]))


def run(arguments: list[str]) -> int:
    """One command line; the exit code. Errors that a user can mend become one line on stderr."""
    try:
        command = typer.main.get_command(app)
        with command.make_context("influent", arguments) as context:
            command.invoke(context)
        sys.stdout.flush()
    except typer.Exit as e:
        return e.exit_code
    except InfluentError as e:
        return _complain(str(e), 2)
    except CommandLineError as e:
        return _complain(e.format_message(), 2)  # pyright: ignore[reportAttributeAccessIssue]
    except KeyboardInterrupt:
        return _complain("interrupted; what was finished is kept: the same command again resumes", 130)
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def _complain(message: str, code: int) -> int:
    line = " ".join(message.split())
    sys.stderr.write(f"influent: {line}\n")
    return code


if __name__ == "__main__":
    main()

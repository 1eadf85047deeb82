"""The verb `mask` of the command line; registered in cli.py."""

from __future__ import annotations

from typing import Annotated

import typer

import influent
from influent import preflight
from influent.options import Device, Json, TokenBudget
from influent.terminal import print_document, progress_bars


def mask(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hugging Face model folder, GGUF file, or hub name.")],
    data: Annotated[str, typer.Argument(metavar="DATA", help="Training rows, as for `influent index`.")],
    out: Annotated[str, typer.Option("-o", "--out", metavar="FILE", help="Folder to write; resumed if unfinished.")],
    size: Annotated[
        str, typer.Option(metavar="SIZE", help="AxB entries of a layer's two sides, or K of its flat gradient.")
    ] = "128x128",
    scope: Annotated[
        str, typer.Option(metavar="NAME", help="block, a mask for each layer; or all, K entries of all together.")
    ] = "block",
    target: Annotated[str, typer.Option(metavar="NAME", help="Of whose gradients: loss, or for trak margin.")] = "loss",
    queries: Annotated[
        str | None, typer.Option(metavar="FILE", help="What to agree on: rows like the data's. Default: the sample.")
    ] = None,
    sample: Annotated[int, typer.Option(metavar="N", min=1, help="Training rows to draw.")] = 256,
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="Draw from the first so many rows.")] = None,
    steps: Annotated[int, typer.Option(metavar="N", min=1, help="Of Adam, at most.")] = 200,
    rate: Annotated[float, typer.Option(metavar="R", help="Adam's.")] = 2e-4,
    penalty: Annotated[
        float, typer.Option("--lambda", metavar="L", help="Weight of the number of entries. 0: tuned to the size.")
    ] = 0.0,
    layers: Annotated[
        str | None, typer.Option(metavar="REGEX", help="Layers to learn masks of, as for `influent index`.")
    ] = None,
    exclude: Annotated[str | None, typer.Option(metavar="REGEX", help="Layers to leave out.")] = None,
    max_length: Annotated[int, typer.Option(metavar="N", min=2, help="Longer documents are split.")] = 512,
    token_budget: TokenBudget = 4096,
    dtype: Annotated[str, typer.Option(metavar="NAME", help="The model's: float32, bfloat16 or float16.")] = "float32",
    matmul: Annotated[
        str, typer.Option(metavar="NAME", help="Precision of float32 products: highest or medium.")
    ] = "highest",
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Of the sample and of the first guess.")] = 0,
    memory: Annotated[int, typer.Option(metavar="MIB", min=1, help="For sampled gradients held at a time.")] = 2048,
    device: Device = None,
    json: Json = False,
) -> None:
    """Learn which gradient entries to keep.

    Use it as --compress "select:FILE" or "select:FILE | sjlt:4096".
    """
    preflight.choice("--scope", scope, ("block", "all"))
    preflight.choice("--target", target, ("loss", "margin"))
    preflight.choice("--dtype", dtype, ("float32", "bfloat16", "float16"))
    preflight.choice("--matmul", matmul, ("highest", "medium"))
    preflight.mask_size(size, scope)
    preflight.pattern("--layers", layers)
    preflight.pattern("--exclude", exclude)
    preflight.data(data)
    preflight.model(model)
    preflight.context(model, max_length)
    preflight.layers(model, layers, exclude)
    preflight.queries("--queries", queries)
    with progress_bars() as progress:
        document = influent.mask(
            model, data, out, size=size, scope=scope, target=target, queries=queries, sample=sample, limit=limit,
            steps=steps, rate=rate, penalty=penalty, layers=layers, exclude=exclude, max_length=max_length,
            token_budget=token_budget, dtype=dtype, matmul=matmul, seed=seed, memory=memory, device=device,
            progress=progress,
        )  # fmt: skip
    from influent.report import print_mask

    print_document(document, print_mask, json=json)


VERBS = (mask,)

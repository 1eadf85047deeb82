"""The command line's options that several verbs share, each said once: its flag, its metavar and its help.

Does not: check a value (preflight.py) or use one (the verbs).
"""

from __future__ import annotations

from typing import Annotated

import typer

IndexPath = Annotated[str, typer.Argument(metavar="INDEX", help="Directory that `influent index` wrote.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")]
Out = Annotated[str | None, typer.Option("-o", "--out", metavar="FILE", help="Also write the rows: .parquet or .csv.")]
DAMPING = "relative:NUMBER of the mean eigenvalue, or absolute:NUMBER. Default: "
FitDamping = Annotated[
    str | None,
    typer.Option(
        metavar="D", help=f"{DAMPING}relative:0.1; of ekfac 0.01, of low rank 1 (shown now, chosen at the query)."
    ),
]
Damping = Annotated[
    str | None,
    typer.Option(metavar="D", help=f"{DAMPING}that of the only fim fit; else 0.1, of ekfac 0.01, of low rank 1."),
]
Checkpoints = Annotated[
    list[str] | None,
    typer.Option(
        "--checkpoint", metavar="PATH", help="Another checkpoint of MODEL; given again for each. An ensemble."
    ),
]
Models = Annotated[
    list[str] | None,
    typer.Option("--model", metavar="PATH", help="Default: as noted in the index. Of an ensemble, one a checkpoint."),
]
CurvatureName = Annotated[
    str | None, typer.Option(metavar="NAME", help="A fitted one by name, or identity. Default: the method's own.")
]
Parity = Annotated[
    str | None, typer.Option(metavar="RULE", help="LoRIF's published damping: paper or release (for lowrank, sketch).")
]
Labels = Annotated[
    str | None, typer.Option(metavar="KIND", help="kfac, ekfac: sampled from the model (default) or empirical.")
]
Memory = Annotated[
    int | None, typer.Option(metavar="MIB", min=1, help="For the rows (or layers) held. Default: 256 (ekfac 2,048).")
]
Device = Annotated[
    str | None, typer.Option(metavar="NAME", help="cpu, cuda, cuda:1, … Default: the first accelerator, else cpu.")
]
SkipNonfinite = Annotated[bool, typer.Option("--skip-nonfinite", help="Skip rows with a NaN loss, counted.")]
TokenBudget = Annotated[int, typer.Option(metavar="N", min=1, help="Tokens in a batch, padding included.")]

"""From the scores that frontier.py saved: LDS with intervals, comparisons at equal bytes and at equal width, a plot.

A setting's damping is the best on a tenth of the queries; what is reported comes from the other queries. Values of
several seeds are averaged query by query. Intervals are of the mean over the queries, 95 %, by resampling queries;
those of a comparison resample the differences.
"""

import itertools
import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from environment import save
from lds import Truth, interval, spearman

WHITENED, OTHERS = "1.0", "0.1"  # the default relative damping of rows in a whitened basis, and of others
RULE = "rank:side/16:int4"
OURS = (
    ("whiten 1/2, shared", "dense:sign"),
    ("whiten 1/2", RULE),
    ("whiten 1/2", "rank:side/8:int4"),
    ("whiten 1/2", "dense:sign"),
    ("gauss", "rank:side/8:int4"),
    ("gauss", "rank:1:bf16"),  # LoRIF as published
)
EXACT = ("id", "float32", None)
Name = tuple[str, str, int | None]  # projection, codec, budget


@dataclass(frozen=True, eq=False)
class Measured:
    """One setting with one seed: its facts and, by damping, the LDS of each query."""

    entry: dict[str, Any]
    facts: dict[str, Any]
    path: Path
    lds: dict[str, np.ndarray]

    @property
    def name(self) -> Name:
        return self.entry["projection"], self.entry["codec"], self.entry["budget"]


@dataclass(frozen=True, eq=False)
class Result:
    """One setting, its seeds averaged: the LDS of each query that was not used to choose the damping."""

    runs: list[Measured]
    dampings: list[str]
    tuned: np.ndarray
    default: np.ndarray
    by_damping: dict[str, float]
    by_seed: list[float]

    def row(self) -> dict[str, Any]:
        first = self.runs[0]
        return {
            **{key: first.entry[key] for key in ("projection", "codec", "compress", "rows", "budget")},
            "bytes": first.facts.get("bytes"),
            "captured": first.facts.get("captured"),
            **summary(self.tuned),
            "damping": self.dampings[0] if len(set(self.dampings)) == 1 else self.dampings,
            "lds at default damping": round(float(self.default.mean()), 4),
            "by damping": {damping: round(value, 4) for damping, value in self.by_damping.items()},
            "by seed": [round(each, 4) for each in self.by_seed],
        }


def summary(values: np.ndarray) -> dict[str, Any]:
    low, high = interval(values)
    return {"lds": round(float(values.mean()), 4), "low": round(low, 4), "high": round(high, 4)}


def read(folder: Path, truth: Truth) -> list[Measured]:
    found = []
    for path in sorted((folder / "scores").glob("*.npz")):
        held = np.load(path)
        facts = json.loads(str(held["facts"]))
        lds = {damping: truth.lds(held[damping]) for damping in held.files if damping != "facts"}
        found.append(Measured(facts.pop("entry"), facts, path, lds))
    return found


def results(measured: Sequence[Measured]) -> dict[Name, Result]:
    """Settings by name, those compared at one width (which have no budget) left out."""
    grouped: dict[Name, list[Measured]] = defaultdict(list)
    for each in sorted(measured, key=lambda each: each.entry["seed"]):
        if each.entry["budget"] is not None or each.entry["compress"] in ("id", "none"):
            grouped[each.name].append(each)
    return {name: combine(runs) for name, runs in grouped.items()}


def usual(projection: str) -> str:
    return WHITENED if projection.startswith("whiten") else OTHERS


def combine(runs: list[Measured]) -> Result:
    num_queries = len(next(iter(runs[0].lds.values())))
    order = np.random.default_rng(0).permutation(num_queries)
    chosen, rest = order[: num_queries // 10], order[num_queries // 10 :]
    dampings = [max(run.lds, key=lambda damping, run=run: run.lds[damping][chosen].mean()) for run in runs]
    tuned = [run.lds[damping][rest] for run, damping in zip(runs, dampings, strict=True)]
    default = [run.lds.get(usual(run.entry["projection"]), next(iter(run.lds.values())))[rest] for run in runs]
    by_damping = {damping: float(np.mean([run.lds[damping][rest] for run in runs])) for damping in runs[0].lds}
    by_seed = [float(values.mean()) for values in tuned]
    return Result(runs, dampings, np.mean(tuned, axis=0), np.mean(default, axis=0), by_damping, by_seed)


def compare(found: Mapping[Name, Result], ours: Name, theirs: Name) -> dict[str, Any] | None:
    """The difference in LDS, paired by query."""
    if ours not in found or theirs not in found:
        return None
    a, b = found[ours], found[theirs]
    less = summary(a.tuned - b.tuned)
    return {
        "budget": ours[2],
        "ours": f"{ours[0]} {ours[1]}",
        "theirs": f"{theirs[0]} {theirs[1]}",
        "lds": [round(float(a.tuned.mean()), 4), round(float(b.tuned.mean()), 4)],
        "difference": less["lds"],
        "low": less["low"],
        "high": less["high"],
        "at default damping": summary(a.default - b.default),
        "bytes": [a.runs[0].facts["bytes"], b.runs[0].facts["bytes"]],
    }


def comparisons(found: Mapping[Name, Result]) -> list[dict[str, Any]]:
    out = []
    for budget in sorted({name[2] for name in found if name[2] is not None}):
        rivals = (("gauss", "bf16", budget), ("factgrass", "bf16", budget), EXACT)
        for ours, theirs in itertools.product(OURS, rivals):
            if row := compare(found, (*ours, budget), theirs):
                out.append(row)
    return out


def same_width(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """Rows of rank c and rows of learned bases beside LoGRA's, which are dense over random maps of the same sides.

    Differences are of the seeds that both have, paired by query. `agreement` is with the scores of dense rows of the
    same maps.
    """
    runs: dict[tuple[str, str], dict[int, Measured]] = defaultdict(dict)  # by compressor and codec, then by seed
    for each in sorted(measured, key=lambda each: each.entry["seed"]):
        if each.entry["budget"] is None and ":" in each.entry["compress"]:
            runs[each.entry["compress"], each.entry["rows"]][each.entry["seed"]] = each
    out = []
    for (compress, rows), mine in runs.items():
        theirs = runs.get(("gauss:" + compress.partition(":")[2], "bfloat16"), {})
        dense = runs.get((compress, "bfloat16"), {})
        if not (seeds := [seed for seed in mine if seed in theirs]):
            continue
        ours, logra = (combine([each[seed] for seed in seeds]) for each in (mine, theirs))
        agreement = [agreeing(mine[seed], dense[seed]) for seed in seeds if seed in dense]
        out.append(
            {
                "projection": mine[seeds[0]].entry["projection"],
                "compress": compress,
                "rows": rows,
                "rank": rank_below_dense(rows, mine[seeds[0]].facts["captured"]),
                "seeds": seeds,
                "bytes": mine[seeds[0]].facts["bytes"],
                "captured": mine[seeds[0]].facts["captured"],
                "agreement": round(float(np.mean(agreement)), 4) if agreement else None,
                **summary(ours.tuned),
                "lds at default damping": round(float(ours.default.mean()), 4),
                "less LoGRA": {
                    "best damping": summary(ours.tuned - logra.tuned),
                    "default damping": summary(ours.default - logra.default),
                },
            }
        )
    return sorted(out, key=lambda row: (row["compress"], row["bytes"]))


def agreeing(a: Measured, b: Measured) -> float:
    """Rank correlation of the scores of two settings of one projection at its default damping, mean over queries."""
    damping = usual(a.entry["projection"])
    return float(spearman(np.load(a.path)[damping], np.load(b.path)[damping]).mean())


def rank_below_dense(rows: str, captured: float) -> int | None:
    """The rank of rows in 16 bits; None of others, and where the cut leaves rows as they were."""
    cut = re.fullmatch(r"rank:(\d+):bfloat16", rows)
    return int(cut[1]) if cut and captured < 0.9999 else None


def level_with_logra(rows: Sequence[Mapping[str, Any]], *, damping: str) -> dict[str, int | None]:
    """By compressor the least rank from which on no interval of the difference to LoGRA at the same D is below 0; None
    if that of the highest rank measured is."""
    found: dict[str, int | None] = {}
    for row in sorted((row for row in rows if row["rank"]), key=lambda row: row["rank"]):
        compress = row["compress"]
        if row["less LoGRA"][damping]["high"] < 0:
            found[compress] = None
        elif found.get(compress) is None:
            found[compress] = row["rank"]
    return found


def write(work: Path) -> None:
    """results/frontier.json and docs/frontier.png, of the models whose ground truth is in `work`."""
    document, panels = {}, {}
    for folder in sorted(path.parent for path in work.glob("*/truth.npz")):
        truth = Truth.load(folder)
        measured = read(folder, truth)
        if not measured:
            continue
        found = panels[folder.name] = results(measured)
        document[folder.name] = {
            "subsets": len(truth.used),
            "seeds": truth.by_seed.shape[1],
            "queries": truth.gain.shape[1],
            "rank correlation of two seeds": truth.reliability(),
            "the package's own verbs": json.loads((folder / "check.json").read_text()),
            "comparisons": comparisons(found),
            "one width": (one_width := same_width(measured)),
            "level with LoGRA from rank": {
                damping: level_with_logra(one_width, damping=damping) for damping in ("best damping", "default damping")
            },
            "settings": sorted(
                (each.row() for each in found.values()), key=lambda row: (row["budget"] or 0, -row["lds"])
            ),
        }
    save("frontier", document)
    plot(panels, Path(__file__).parent.parent / "docs" / "frontier.png")


LINES = (
    ("whiten 1/2", RULE, "whitened, rank side/16, int4", "C3", "o-"),
    ("whiten 1/2", "rank:side/8:int4", "whitened, rank side/8, int4", "C1", "o-"),
    ("whiten 1/2", "dense:sign", "whitened, 1 bit", "C4", "o-"),
    ("whiten 1/2, shared", "dense:sign", "whitened, 1 bit, layers share", "C5", "o-"),
    ("gauss", "rank:side/8:int4", "random, rank side/8, int4", "C0", "o-"),
    ("gauss", "bf16", "LoGRA: random, dense bf16", "C0", "s--"),
    ("factgrass", "bf16", "FactGraSS, bf16", "C2", "s--"),
)
TITLES = {"llama": "Llama, BBC news", "gpt2": "GPT-2, State of the Union", "qwen": "Qwen2, Brown corpus"}


def plot(panels: Mapping[str, Mapping[Name, Result]], path: Path) -> None:
    """LDS at the default damping against bytes of a row; the exact Fisher of uncompressed gradients as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(panels), figsize=(5.2 * len(panels), 4.2), squeeze=False)
    for axis, (model, found) in zip(axes[0], panels.items(), strict=True):
        for projection, codec, label, color, style in LINES:
            points = sorted(
                (each.runs[0].facts["bytes"], *summary(each.default).values())
                for name, each in found.items()
                if name[:2] == (projection, codec) and name[2] is not None
            )
            if points:
                size, mean, low, high = np.array(points).T
                axis.plot(size / 1e3, mean, style, color=color, label=label, markersize=5)
                axis.fill_between(size / 1e3, low, high, color=color, alpha=0.06, linewidth=0)
        for name, label, style in (
            (("id", "bf16", None), "exact Fisher, whole gradients, bf16", "--"),
            (("graddot", "none", None), "GradDot", ":"),
        ):
            if name in found:
                axis.axhline(found[name].default.mean(), color="0.3", linestyle=style, linewidth=1, label=label)
        axis.set(xscale="log", xlabel="KB a row on disk", title=TITLES.get(model, model))
        axis.grid(alpha=0.25)
    axes[0][0].set_ylabel("LDS")
    named = {label: handle for axis in axes[0] for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    labels, handles = list(named), list(named.values())
    figure.tight_layout(rect=(0, 0.14, 1, 1))
    figure.legend(handles, labels, loc="lower center", ncol=4, fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)

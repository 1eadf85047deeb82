"""GraSS's two experiments on images: TRAK with ten checkpoints under each compressor, judged by 50 random halves.

Needs what image_truth.py leaves in DIR. Each compressor and size is one ensemble of ten indexes with one row for all
layers; masks are learned once, on the first checkpoint's margins. The damping is chosen for each of them on a tenth of
the queries and reported on the others, beside the default of relative:0.1. LDS is that of margins, which is that of
losses: one falls as the other rises. Interrupted, it resumes: what is finished is kept in DIR/mlp/lds.

    python benchmarks/grass_images.py --work DIR --model mlp     # resnet; --only SM,RM --sizes 2048
    python benchmarks/grass_images.py --work DIR --report

The report is results/grass_images.json and docs/grass_images.png, of what is finished.
"""

import argparse
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import environment
import numpy as np
import torch
from image_truth import NUM_CHECKPOINTS, SETTINGS, images, load, new_model
from safetensors.torch import load_file

import influent
from influent.attach import Run, Setting, attach
from influent.gradients import Flat
from influent.metrics import bootstrap, lds, spearman
from influent.storage import Store

SIZES = (2048, 4096, 8192)
BLOW_UP = 4  # the mask of GraSS keeps so many times the entries of its rows
DEFAULT = "relative:0.1"
DAMPINGS = (DEFAULT, "relative:0.01", "relative:1", "relative:10")
TIMED = 256  # gradients whose compression is timed
COMPRESSORS = {
    "RM": "mask:{k}",
    "SM": "select:{sm}",
    "SJLT": "sjlt:{k}",
    "GraSS(RM)": "mask:{wide} | sjlt:{k}",
    "GraSS(SM)": "select:{gsm} | sjlt:{k}",
    "FJLT": "fjlt:{k}",
    "GAUSS": "gauss:{k}",
}
# The dense matrix of a ResNet has a billion entries and more; GraSS has no such row either.
WHICH = {"mlp": ("RM", "SM", "SJLT", "FJLT", "GAUSS"), "resnet": tuple(COMPRESSORS)[:-1]}


def examples(data: tuple[torch.Tensor, torch.Tensor]) -> list[tuple[torch.Tensor, int]]:
    return [(pixels, int(label)) for pixels, label in zip(*data, strict=True)]


def checkpoints(name: str, work: Path) -> tuple[torch.nn.Module, list[dict[str, torch.Tensor]]]:
    """The first one as a module, the others as state dicts."""
    paths = [work / "checkpoints" / f"{c}.safetensors" for c in range(NUM_CHECKPOINTS)]
    return load(name, paths[0]), [load_file(path) for path in paths[1:]]


def timed(stage: Callable[[], Any], place: Path) -> float:
    """CPU seconds of a stage that fills a folder; kept beside the folder, so that they are known when a later stage is
    interrupted. NaN if the stage itself was."""
    note, begun, start = place.parent / f"{place.name}.seconds", place.exists(), time.process_time()
    stage()
    if not note.exists():
        note.write_text("nan" if begun else str(time.process_time() - start))
    return float(note.read_text())


def compressor(kind: str, k: int, name: str, work: Path, rows: list[Any]) -> tuple[str, float]:
    """Its text, and the CPU seconds of learning its mask (0 if there is none)."""
    text = COMPRESSORS[kind]
    for size, key in ((k, "{sm}"), (BLOW_UP * k, "{gsm}")):
        if key in text:
            place = work / "masks" / str(size)
            model = load(name, work / "checkpoints" / "0.safetensors")
            learn = partial(
                influent.mask, model, rows, str(place), size=str(size), scope="all", target="margin", memory=4096,
                task=influent.Classification(),
            )  # fmt: skip
            return text.format(k=k, sm=place, gsm=place), timed(learn, place)
    return text.format(k=k, wide=BLOW_UP * k), 0.0


def compress_seconds(name: str, work: Path, text: str, rows: list[Any]) -> float:
    """CPU seconds, on one thread, to compress 5,000 gradients that are there already, as GraSS's tables count."""
    model = load(name, work / "checkpoints" / "0.safetensors")
    setting = Setting(compress="id", target="margin", key="all")
    with attach(model, influent.Classification(), setting, Run(token_budget=64)) as attached:
        g = attached.collector.collect(rows[:TIMED], name=str).rows["all"]
    place = work / "timing"
    setting = Setting(compress=text, target="margin", key="all")
    with attach(model, influent.Classification(), setting, Run(), index=Store(str(place))) as attached:
        bound = attached.collector.bound["all"]
        batch, seconds = 16, []
        for lo in range(0, len(g), batch):
            start = time.process_time()
            bound.join(Flat(g[lo : lo + batch]))
            seconds.append((time.process_time() - start) / batch)
            if sum(seconds) * batch > 20:  # a dense matrix is drawn anew for each batch
                break
    shutil.rmtree(place, ignore_errors=True)
    return 5000 * float(np.median(seconds))


def run(name: str, kind: str, k: int, work: Path) -> None:
    """Index, query at each damping, and keep the LDS of every query."""
    target = work / "lds" / f"{kind}-{k}.npz"
    if target.exists():
        return
    target.parent.mkdir(exist_ok=True)
    data, truth = images(SETTINGS[name]), np.load(work / "truth.npz")
    rows, asked = examples(data.train), examples(data.queries)
    text, learning = compressor(kind, k, name, work, rows)
    model, others = checkpoints(name, work)
    place, task = work / "indexes" / f"{kind}-{k}", influent.Classification()
    collect = partial(
        influent.index, model, rows, str(place), checkpoints=others, method="trak", compress=text, task=task,
        token_budget=64,
    )  # fmt: skip
    indexing = timed(collect, place)
    found: list[np.ndarray] = []
    for damping in DAMPINGS:
        influent.query(
            str(place), queries=asked, model=[model, *others], task=task, damping=damping, k=1, token_budget=64,
            scores=str(work / "scores.npy"),
        )  # fmt: skip
        scores = np.load(work / "scores.npy")
        found.append(lds(scores, truth["rows"], truth["margins"].mean(1)))
        print(f"{kind} {k} {damping}: {found[-1].mean():.4f}", flush=True)
    compressing = compress_seconds(name, work, text, rows)
    beside = target.with_suffix(".part")
    with beside.open("wb") as file:
        np.savez(
            file, lds=np.array(found), seeds=truth["margins"].shape[1], indexing=indexing,
            learning=learning, compressing=compressing,
        )  # fmt: skip
    beside.rename(target)
    shutil.rmtree(place)  # gigabytes that the same command makes again


def judged(each: np.ndarray) -> dict[str, float]:
    interval = bootstrap(each)
    return {"mean": round(interval.mean, 4), "low": round(interval.low, 4), "high": round(interval.high, 4)}


def seconds(measured: Any) -> float | None:
    """To one decimal; None of a stage that was interrupted."""
    return None if np.isnan(measured) else round(float(measured), 1)


def tuning(num_queries: int) -> np.ndarray:
    """The tenth of the queries on which the damping is chosen."""
    chosen = np.zeros(num_queries, bool)
    chosen[np.random.default_rng(2).permutation(num_queries)[: num_queries // 10]] = True
    return chosen


def results(work: Path) -> list[dict[str, Any]]:
    """One entry for each finished compressor and size."""
    found = []
    for path in sorted((work / "lds").glob("*.npz")):
        kind, _, k = path.stem.rpartition("-")
        with np.load(path) as held:
            tune = tuning(held["lds"].shape[1])
            best = int(held["lds"][:, tune].mean(1).argmax())
            default = DAMPINGS.index(DEFAULT)
            found.append(
                {
                    "compressor": kind, "k": int(k), "damping": DAMPINGS[best],
                    "lds": judged(held["lds"][best, ~tune]), "default": judged(held["lds"][default, ~tune]),
                    "grid": dict(zip(DAMPINGS, held["lds"][:, ~tune].mean(1).round(4).tolist(), strict=True)),
                    "compress_s": round(float(held["compressing"]), 3),
                    "index_s": seconds(held["indexing"]),
                    "mask_s": seconds(held["learning"]), "each": held["lds"][best, ~tune],
                }
            )  # fmt: skip
    order = list(COMPRESSORS)
    return sorted(found, key=lambda one: (order.index(one["compressor"]), one["k"]))


def ceiling(truth: Any) -> float | None:
    """The rank correlation, over the halves, of one seed's margins with another's: what a perfect score of these noisy
    outcomes could hardly exceed."""
    margins = truth["margins"]
    if margins.shape[1] < 2:
        return None
    pairs = [(a, b) for a in range(margins.shape[1]) for b in range(a)]
    return round(float(np.mean([spearman(margins[:, a].T, margins[:, b].T).mean() for a, b in pairs])), 4)


def difference(one: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """Of two compressors' LDS, query by query."""
    return judged(one["each"] - other["each"])


def orderings(found: list[dict[str, Any]], model: str) -> list[dict[str, Any]]:
    """The paper's claims, each with the difference and whether it holds: None until both sides are measured."""
    by = {(one["compressor"], one["k"]): one for one in found}
    claims: list[tuple[str, str, str, Any]] = [("SM >= RM", "SM", "RM", lambda d, t: d >= 0)]
    claims += [
        (f"SJLT within .02 of {o}, faster", "SJLT", o, lambda d, t: d >= -0.02 and t > 1) for o in ("FJLT", "GAUSS")
    ]
    if model == "resnet":
        claims += [
            (f"{kind} within .03 of SJLT at 20 times its speed", kind, "SJLT", lambda d, t: d >= -0.03 and t >= 20)
            for kind in ("GraSS(RM)", "GraSS(SM)")
        ]
    out = []
    for k in SIZES:
        for claim, first, second, holds in claims:
            if (first, k) not in by or (second, k) not in by:
                out.append({"claim": claim, "k": k, "holds": None})  # not measured yet
            else:
                one, other = by[first, k], by[second, k]
                gap, times = difference(one, other), other["compress_s"] / one["compress_s"]
                verdict = bool(holds(gap["mean"], times))
                out.append({"claim": claim, "k": k, "difference": gap, "times": round(times, 1), "holds": verdict})
    return out


def report(work: Path) -> dict[str, Any]:
    """Everything that is finished, of both models."""
    document: dict[str, Any] = {
        "queries": "9/10 of 500; the damping of each setting is the best on the other tenth",
        "compress_s": "CPU seconds of one thread for 5,000 gradients that are formed already, one checkpoint",
    }
    for model in SETTINGS:
        if not (work / model / "lds").is_dir():
            continue
        truth, found = np.load(work / model / "truth.npz"), results(work / model)
        document[model] = {
            "halves": len(truth["rows"]), "seeds": truth["margins"].shape[1],
            "parameters": sum(p.numel() for p in new_model(model).parameters()),
            "training_s": round(float(truth["seconds"].mean()), 1), "ceiling": ceiling(truth),
            "orderings": orderings(found, model),
            "settings": [{key: value for key, value in one.items() if key != "each"} for one in found],
        }  # fmt: skip
    return document


def plot(document: dict[str, Any], path: Path) -> None:
    """LDS against the seconds of compression, one panel a model, a line a compressor."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    models = [model for model in SETTINGS if model in document]
    figure, axes = plt.subplots(1, len(models), figsize=(5.5 * len(models), 4), squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        for kind in COMPRESSORS:
            line = [one for one in document[model]["settings"] if one["compressor"] == kind]
            if line:
                means = [one["lds"]["mean"] for one in line]
                spread = [
                    [mean - one["lds"]["low"] for mean, one in zip(means, line, strict=True)],
                    [one["lds"]["high"] - mean for mean, one in zip(means, line, strict=True)],
                ]
                axis.errorbar(
                    [one["compress_s"] for one in line], means, yerr=spread, marker="o", capsize=2, label=kind
                )
        axis.set(title=model, xscale="log", xlabel="CPU seconds to compress 5,000 gradients", ylabel="LDS")
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", choices=SETTINGS)
    parser.add_argument("--only", help="compressors, by commas")
    parser.add_argument("--sizes", help="sizes, by commas")
    parser.add_argument("--report", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.model:
        kinds = given.only.split(",") if given.only else WHICH[given.model]
        for k in map(int, given.sizes.split(",")) if given.sizes else SIZES:
            for kind in kinds:
                run(given.model, kind, k, given.work / given.model)
    if given.report:
        document = report(given.work)
        environment.save("grass_images", document)
        plot(document, Path(__file__).parent.parent / "docs" / "grass_images.png")


if __name__ == "__main__":
    main()

"""What GraSS's two experiments on images came to: results/grass_images.json and docs/grass_images.png.

Reads what image_truth.py and grass_images.py left in DIR; of what is finished.

    python benchmarks/grass_images_report.py --work DIR
"""

import argparse
import json
from pathlib import Path
from typing import Any

import environment
import numpy as np
from grass_images import COMPRESSORS, DEFAULT, SIZES, TRIED
from image_models import new_model
from image_truth import SETTINGS

from influent.metrics import bootstrap, spearman

COLUMNS = {"cpu": "compress_s", "cuda": "compress_gpu_s"}  # seconds by device


def judged(each: np.ndarray) -> dict[str, float]:
    interval = bootstrap(each)
    return {"mean": round(interval.mean, 4), "low": round(interval.low, 4), "high": round(interval.high, 4)}


def whiskers(judged: list[dict[str, float]]) -> list[list[float]]:
    """How far the intervals reach below and above their means, [2][n]: `yerr` of matplotlib."""
    return [[one["mean"] - one["low"] for one in judged], [one["high"] - one["mean"] for one in judged]]


def tuning(num_queries: int) -> np.ndarray:
    """The tenth of the queries on which the damping is chosen."""
    chosen = np.zeros(num_queries, bool)
    chosen[np.random.default_rng(2).permutation(num_queries)[: num_queries // 10]] = True
    return chosen


def scored(work: Path, margins: np.ndarray) -> dict[tuple[str, int], dict[int, np.ndarray]]:
    """LDS [1 + seeds, dampings, queries] of each finished unit, by compressor and size, then by the seed of its maps:
    of the mean of the margins over the trainings' seeds, and of each of those alone."""
    outcomes = np.stack([margins.mean(1), *margins.swapaxes(0, 1)])  # [1 + seeds, halves, queries]
    found: dict[tuple[str, int], dict[int, np.ndarray]] = {}
    for path in sorted((work / "ranks").glob("*.npz")):
        kind, k, seed = path.stem.rsplit("-", 2)
        with np.load(path) as held:
            order = held["ranks"].astype(np.float64)
        each = np.stack([[spearman(one, np.ascontiguousarray(gain.T)) for one in order] for gain in outcomes])
        found.setdefault((kind, int(k)), {})[int(seed)] = each
    return found


def results(work: Path, margins: np.ndarray) -> list[dict[str, Any]]:
    """One entry for each finished compressor and size; means over the seeds of its maps."""
    found, tune = [], tuning(margins.shape[2])
    for (kind, k), by_seed in scored(work, margins).items():
        each = np.mean(list(by_seed.values()), 0)
        best, default = int(each[0][:, tune].mean(1).argmax()), TRIED.index(DEFAULT)
        found.append(
            {
                "compressor": kind, "k": k, "damping": TRIED[best],
                "lds": judged(each[0][best, ~tune]), "default": judged(each[0][default, ~tune]),
                "grid": dict(zip(TRIED, each[0][:, ~tune].mean(1).round(4).tolist(), strict=True)),
                "by map seed": {
                    str(seed): round(float(one[0][best, ~tune].mean()), 4) for seed, one in by_seed.items()
                },
                "compress_s": taken(work, kind, k, "cpu"), "compress_gpu_s": taken(work, kind, k, "cuda"),
                "each": {seed: one[:, best][:, ~tune] for seed, one in by_seed.items()},
                "each default": {seed: one[:, default][:, ~tune] for seed, one in by_seed.items()},
            }
        )  # fmt: skip
    order = list(COMPRESSORS)
    return sorted(found, key=lambda one: (order.index(one["compressor"]), one["k"]))


def taken(work: Path, kind: str, k: int, on: str) -> float | None:
    """Measured seconds, to three decimals (of a GPU five)."""
    path = work / "timings" / f"{kind}-{k}-{on}.json"
    return round(json.loads(path.read_text())["seconds"], 5 if on == "cuda" else 3) if path.exists() else None


def machines(work: Path) -> list[str]:
    return sorted({json.loads(path.read_text())["machine"] for path in (work / "timings").glob("*.json")})


def ceiling(truth: Any) -> float | None:
    """The rank correlation, over the halves, of one seed's margins with another's: what a perfect score of these noisy
    outcomes could hardly exceed."""
    margins = truth["margins"]
    if margins.shape[1] < 2:
        return None
    pairs = [(a, b) for a in range(margins.shape[1]) for b in range(a)]
    return round(float(np.mean([spearman(margins[:, a].T, margins[:, b].T).mean() for a, b in pairs])), 4)


def difference(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Of two compressors' LDS, query by query, over the seeds of maps that both have; also at the default damping, by
    seed of the trainings, and by seed of the maps."""
    common = sorted(one["each"].keys() & other["each"].keys())
    gaps, default = (
        np.stack([one[which][seed] - other[which][seed] for seed in common])  # [map seeds, 1 + seeds, queries]
        for which in ("each", "each default")
    )
    return {
        **judged(gaps.mean(0)[0]), "at default": judged(default.mean(0)[0]),
        "by training seed": gaps.mean((0, 2)).round(4).tolist()[1:],
        "by map seed": gaps[:, 0].mean(1).round(4).tolist(),
    }  # fmt: skip


def claims_of(model: str) -> list[tuple[str, str, str, float, float]]:
    """The paper's claims: text, the two compressors, the least difference of LDS, and how many times faster."""
    claims = [("SM >= RM", "SM", "RM", 0.0, 0.0)]
    claims += [(f"SJLT within .02 of {o}, faster", "SJLT", o, -0.02, 1.0) for o in ("FJLT", "GAUSS")]
    if model != "mlp":
        claims += [
            (f"{kind} within .03 of SJLT at 20 times its speed", kind, "SJLT", -0.03, 20.0)
            for kind in ("GraSS(RM)", "GraSS(SM)")
        ]
    return claims


def orderings(found: list[dict[str, Any]], model: str) -> list[dict[str, Any]]:
    """The paper's claims, each with the difference and whether it holds: None until both sides are measured.

    `settled`: the interval has the least difference on one side, and so has that at the default damping. `fast`:
    whether it is as fast as claimed, once that is known.
    """
    by, out = {(one["compressor"], one["k"]): one for one in found}, []
    for k in SIZES:
        for claim, first, second, least, faster in claims_of(model):
            entry: dict[str, Any] = {"claim": claim, "k": k, "holds": None}
            if (first, k) in by and (second, k) in by:
                one, other = by[first, k], by[second, k]
                gap = difference(one, other)
                entry |= {"difference": gap, "holds": bool(gap["mean"] >= least)}
                side = "low" if entry["holds"] else "high"
                ends = gap[side], gap["at default"][side]
                entry["settled"] = all(bool(end >= least) == entry["holds"] for end in ends)
                times = {
                    on: round(other[column] / one[column], 1)
                    for on, column in COLUMNS.items()
                    if None not in (one[column], other[column])
                }
                if faster and times:
                    entry |= {"times": times, "fast": {on: ratio >= faster for on, ratio in times.items()}}
            out.append(entry)
    return out


def report(work: Path) -> dict[str, Any]:
    """Everything that is finished, of both models."""
    document: dict[str, Any] = {
        "queries": "9/10 of 500; the damping of each setting is the best on the other tenth",
        "compress_s": "CPU seconds of one thread for 5,000 gradients that are formed already, one checkpoint, at the "
        "pace of the fastest batch; a dense matrix is drawn beforehand; compress_gpu_s: of one GPU",
    }
    for model in SETTINGS:
        if not (work / model / "ranks").is_dir():
            continue
        truth = np.load(work / model / "truth.npz")
        found = results(work / model, truth["margins"])
        document[model] = {
            "halves": len(truth["rows"]), "seeds": truth["margins"].shape[1],
            "parameters": sum(p.numel() for p in new_model(model).parameters()),
            "trained on": {
                str(on): {
                    "trainings": int((truth["machines"] == on).sum()),
                    "seconds": round(float(truth["seconds"][truth["machines"] == on].mean()), 1),
                }
                for on in np.unique(truth["machines"])
            },
            "timed on": machines(work / model), "ceiling": ceiling(truth),
            "orderings": orderings(found, model),
            "settings": [{key: value for key, value in one.items() if "each" not in key} for one in found],
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
            settings = document[model]["settings"]
            line = [one for one in settings if one["compressor"] == kind and one["compress_s"] is not None]
            if line:
                found = [one["lds"] for one in line]
                axis.errorbar(
                    [one["compress_s"] for one in line], [one["mean"] for one in found], yerr=whiskers(found),
                    marker="o", capsize=2, label=kind,
                )  # fmt: skip
        axis.set(title=model, xscale="log", xlabel="CPU seconds to compress 5,000 gradients", ylabel="LDS")
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    document = report(parser.parse_args().work)
    environment.save("grass_images", document)
    plot(document, Path(__file__).parent.parent / "docs" / "grass_images.png")


if __name__ == "__main__":
    main()

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
from grass_page import DEVICES
from image_models import new_model
from image_truth import SETTINGS
from predictions import COLUMNS, Claim, Judged, ceiling, orderings, tuning, whiskers

from influent.metrics import spearman


def scored(work: Path, outcomes: np.ndarray) -> dict[tuple[str, int], Judged]:
    """Each finished compressor and size, its LDS the mean over the seeds of its maps; `by map seed` beside it."""
    tune = tuning(outcomes.shape[2])
    gains = np.stack([outcomes.mean(1), *outcomes.swapaxes(0, 1)])  # [1 + seeds, halves, queries]
    by_map: dict[tuple[str, int], dict[str, np.ndarray]] = {}
    for path in sorted((work / "ranks").glob("*.npz")):
        kind, k, seed = path.stem.rsplit("-", 2)
        with np.load(path) as held:
            order = held["ranks"].astype(np.float64)
        each = [[spearman(one, np.ascontiguousarray(gain.T)) for one in order] for gain in gains]
        by_map.setdefault((kind, int(k)), {})[seed] = np.stack(each)  # [1 + seeds, dampings, queries]
    found = {}
    for (kind, k), maps in by_map.items():
        each = np.mean(list(maps.values()), 0)
        best, default = int(each[0][:, tune].mean(1).argmax()), TRIED.index(DEFAULT)
        facts: dict[str, Any] = {"compressor": kind, "k": k}
        facts["by map seed"] = {seed: round(float(one[0][best, ~tune].mean()), 4) for seed, one in maps.items()}
        facts |= {column: taken(work, kind, k, on) for on, column in COLUMNS.items()}
        grid = dict(zip(TRIED, each[0][:, ~tune].mean(1).round(4).tolist(), strict=True))
        held_out = each[:, :, ~tune]
        found[kind, k] = Judged(
            facts, TRIED[best], held_out[0, best], held_out[0, default], held_out[1:, best], grid
        )  # fmt: skip
    order = list(COMPRESSORS)
    return dict(sorted(found.items(), key=lambda one: (order.index(one[0][0]), one[0][1])))


def taken(work: Path, kind: str, k: int, on: str) -> float | None:
    """Measured seconds, to three decimals (of a GPU five)."""
    path = work / "timings" / f"{kind}-{k}-{on}.json"
    return round(json.loads(path.read_text())["seconds"], 5 if on == "cuda" else 3) if path.exists() else None


def machines(work: Path) -> list[str]:
    return sorted({json.loads(path.read_text())["machine"] for path in (work / "timings").glob("*.json")})


def claims_of(model: str) -> list[Claim]:
    """The paper's claims."""
    claims = [Claim("SM >= RM", "SM", "RM")]
    claims += [
        Claim(f"SJLT within .02 of {other}, and faster", "SJLT", other, 0.02, 1.0) for other in ("FJLT", "GAUSS")
    ]
    if model != "mlp":
        claims += [
            Claim(f"{kind} within .03 of SJLT, at 20 times its speed", kind, "SJLT", 0.03, 20.0)
            for kind in ("GraSS(RM)", "GraSS(SM)")
        ]
    return claims


def seconds(found: dict[tuple[str, int], Judged]) -> dict[str, dict[str, float]]:
    """By device, of each compressor and size that was timed."""
    out: dict[str, dict[str, float]] = {on: {} for on in COLUMNS}
    for (kind, k), one in found.items():
        for on, column in COLUMNS.items():
            if one.facts[column] is not None:
                out[on][f"{kind}-{k}"] = one.facts[column]
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
        found = scored(work / model, truth["margins"])
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
            "timed on": machines(work / model), "ceiling": ceiling(truth["margins"]),
            "orderings": orderings(claims_of(model), SIZES, found, seconds(found)),
            "settings": [one.document() for one in found.values()],
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
        settings = document[model]["settings"]
        on = next(on for on, column in COLUMNS.items() if any(one[column] is not None for one in settings))
        column = COLUMNS[on]
        for kind in COMPRESSORS:
            line = [one for one in settings if one["compressor"] == kind and one[column] is not None]
            if line:
                found = [one["lds"] for one in line]
                axis.errorbar(
                    [one[column] for one in line], [one["mean"] for one in found], yerr=whiskers(found),
                    marker="o", capsize=2, label=kind,
                )  # fmt: skip
        axis.set(title=model, xscale="log", xlabel=f"{DEVICES[on]} seconds to compress 5,000 gradients", ylabel="LDS")
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

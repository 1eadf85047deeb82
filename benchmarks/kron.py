"""K-FAC, EK-FAC and conjugate gradients against the Fisher matrix of the rows: the linear datamodelling score (LDS).

On the ground truths of ground_truth.py, through the package's own `index` and `query`. A curvature of whole gradients
acts on the query before the compressor ("before sketch"), so that the rows are the same for every line of a table;
`live` has no rows, and recomputes the training gradients. The damping of the main table is the default; the others show
how much it matters. Seconds are of one thread, on a machine that had other work.

    python benchmarks/kron.py --work DIR --out FOLDER [--model llama gpt2]     # interrupted, it resumes
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from environment import RESULTS, save
from lds import MAX_LENGTH, Truth, interval

import influent

# Rows by name: method, options of `index`.
ROWS: dict[str, dict[str, Any]] = {
    "logra 16": {"method": "logra", "compress": "gauss:16x16"},
    "live": {"method": "ekfac"},
    "factgrass 256": {"method": "factgrass", "compress": "mask:32x32 | sjlt:256"},
    "logra 64": {"method": "logra"},
}
DAMPINGS = ("relative:0.01", "relative:0.1", "relative:1", "relative:10")
CURVATURES = ("identity", "fim", "kfac", "ekfac", "ekfac:empirical", "ekfac:compressed", "cg:10@512", "cg:30@512")
DEFAULT = "relative:0.1"


def wanted(rows: str, curvature: str, damping: str | None) -> bool:
    """Which lines are run: all curvatures at the default damping, the main ones at the others."""
    if curvature == "identity":
        return damping is None
    if damping is None or (curvature == "fim" and rows == "live"):
        return False
    if curvature == "ekfac:compressed" and not rows.startswith("logra"):
        return False
    if curvature.startswith("cg"):
        return damping == DEFAULT or (curvature == "cg:10@512" and rows == "logra 64")
    return damping == DEFAULT or curvature in ("fim", "ekfac")


def run(folder: Path, out: Path, truth: Truth, rows: str, curvature: str, damping: str | None) -> dict[str, Any]:
    """One line: LDS with its interval, and the seconds of fit and query."""
    place, scores = out / rows.replace(" ", "-"), out / "scores.npy"
    began = time.time()
    influent.index(str(folder / "model"), str(folder / "train.jsonl"), str(place), max_length=MAX_LENGTH, **ROWS[rows])
    indexed = time.time() - began
    began = time.time()
    if curvature not in ("identity",) and not curvature.startswith("cg"):
        influent.fit(str(place), curvature=curvature, damping=damping)
    fitted = time.time() - began
    began = time.time()
    document = influent.query(
        str(place), queries=str(folder / "queries.jsonl"), curvature=curvature, damping=damping, scores=str(scores)
    )
    lds = truth.lds(np.load(scores))
    return {
        "rows": rows, "curvature": curvature, "damping": damping, "lds": round(float(lds.mean()), 4),
        "interval": [round(x, 4) for x in interval(lds)], "seconds": {
            "index": round(indexed, 1), "fit": round(fitted, 1), "query": round(time.time() - began, 1)
        }, "convergence": document["method"].get("convergence"),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where ground_truth.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="for the indexes")
    parser.add_argument("--model", nargs="+", default=["llama", "gpt2"])
    parser.add_argument("--curvature", nargs="+", default=list(CURVATURES))
    given = parser.parse_args()
    torch.set_num_threads(1)
    path = RESULTS / "kron.json"
    done: list[dict[str, Any]] = json.loads(path.read_text())["lines"] if path.exists() else []
    seen = {(line["model"], line["rows"], line["curvature"], line["damping"]) for line in done}
    for model in given.model:
        folder, out = given.work / model, given.out / model
        out.mkdir(parents=True, exist_ok=True)
        truth = Truth.load(folder)
        for curvature in given.curvature:
            for rows in ROWS:
                for damping in (None, *DAMPINGS):
                    if (model, rows, curvature, damping) in seen or not wanted(rows, curvature, damping):
                        continue
                    done.append({"model": model, **run(folder, out, truth, rows, curvature, damping)})
                    print(done[-1], flush=True)
                    save("kron", {"reliability": _reliability(given), "lines": done})


def _reliability(given: argparse.Namespace) -> dict[str, float | None]:
    return {model: Truth.load(given.work / model).reliability() for model in given.model}


if __name__ == "__main__":
    main()

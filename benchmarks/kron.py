"""K-FAC, EK-FAC and conjugate gradients against the Fisher matrix of the rows: the linear datamodelling score (LDS).

On the ground truths of ground_truth.py, through the package's own `index` and `query`. A curvature of whole gradients
acts on the query before the compressor ("before sketch"), so that the rows are the same for every line of a table;
`live` has no rows, and recomputes the training gradients. The damping of the main table is the default; the others show
how much it matters. Seconds on a CPU are of one thread, on a machine that had other work.

    python benchmarks/kron.py --work DIR --out FOLDER [--model llama gpt2 qwen] [--device cuda]  # interrupted, resumes
    python benchmarks/kron.py --merge PART.json ...  # of several processes, each with --results of its own
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from environment import RESULTS, environment
from lds import MAX_LENGTH, Truth, interval

import influent

# Rows by name: method, options of `index`.
ROWS: dict[str, dict[str, Any]] = {
    "live": {"method": "ekfac"},
    "logra 16": {"method": "logra", "compress": "gauss:16x16"},
    "logra 64": {"method": "logra"},
    "factgrass 256": {"method": "factgrass", "compress": "mask:32x32 | sjlt:256"},
    "pca 16": {"method": "logra", "compress": "pca:16x16"},
    "pca 64": {"method": "logra", "compress": "pca:64x64"},
    "whiten 16": {"method": "logra", "compress": "whiten:16x16"},
    "whiten 64": {"method": "logra", "compress": "whiten:64x64"},
}
DEFAULT = "relative:0.1"
DAMPINGS = ("relative:0.001", "relative:0.01", DEFAULT, "relative:1", "relative:10")
CURVATURES = ("ekfac", "fim", "identity", "kfac", "ekfac:empirical", "ekfac:compressed", "cg:10@512", "cg:30@512")
TOKENS = {"cpu": 4096, "cuda": 32768}  # of a batch


def wanted(rows: str, curvature: str, damping: str | None) -> bool:
    """Which lines are run: the main curvatures at all dampings, the others at one or two."""
    live, sided = rows == "live", rows.split()[0] in ("logra", "pca", "whiten")
    if curvature == "identity" or damping is None:
        return curvature == "identity" and damping is None
    if curvature == "fim":
        return not live and damping != "relative:0.001"
    if curvature == "ekfac":
        return True
    if curvature == "ekfac:compressed":
        return sided and damping in ("relative:0.01", DEFAULT)
    if curvature in ("kfac", "ekfac:empirical"):
        return damping == DEFAULT or (live and damping == "relative:0.01")
    if damping == "relative:0.01":
        return live and curvature == "cg:10@512"
    return damping == DEFAULT and (curvature == "cg:10@512" or rows in ("live", "logra 64"))


def run(
    folder: Path, out: Path, truth: Truth, rows: str, curvature: str, damping: str | None, device: str
) -> dict[str, Any]:
    """One line: LDS with its interval, and the seconds of fit and query."""
    place, scores = out / rows.replace(" ", "-"), out / "scores.npy"
    how = {"device": device, "token_budget": TOKENS[device]}
    began = time.time()
    influent.index(
        str(folder / "model"), str(folder / "train.jsonl"), str(place), max_length=MAX_LENGTH, **how, **ROWS[rows]
    )
    indexed = time.time() - began
    began = time.time()
    if curvature != "identity" and not curvature.startswith("cg"):
        influent.fit(str(place), curvature=curvature, damping=damping, model=str(folder / "model"), **how)
    fitted = time.time() - began
    began = time.time()
    document = influent.query(
        str(place), queries=str(folder / "queries.jsonl"), curvature=curvature, damping=damping, scores=str(scores),
        model=str(folder / "model"), **how,
    )  # fmt: skip
    asked = time.time() - began
    lds = truth.lds(np.load(scores))
    return {
        "rows": rows, "curvature": curvature, "damping": damping, "lds": round(float(lds.mean()), 4),
        "interval": [round(x, 4) for x in interval(lds)],
        "seconds": {"index": round(indexed, 1), "fit": round(fitted, 1), "query": round(asked, 1)},
        "device": torch.cuda.get_device_name() if device == "cuda" else "one CPU thread",
        "convergence": document["method"].get("convergence"),
    }  # fmt: skip


def key(line: dict[str, Any]) -> tuple[Any, ...]:
    return line["model"], line["rows"], line["curvature"], line["damping"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="where ground_truth.py wrote")
    parser.add_argument("--out", type=Path, help="for the indexes")
    parser.add_argument("--results", type=Path, default=RESULTS / "kron.json")
    parser.add_argument("--model", nargs="+", default=["llama", "gpt2", "qwen"])
    parser.add_argument("--curvature", nargs="+", default=list(CURVATURES))
    parser.add_argument("--rows", nargs="+", default=list(ROWS))
    parser.add_argument("--damping", nargs="+", default=list(DAMPINGS))
    parser.add_argument("--device", default="cpu", choices=list(TOKENS))
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no line later than this")
    parser.add_argument("--merge", nargs="+", type=Path, default=[])
    given = parser.parse_args()
    if given.merge:
        merge(given.results, given.merge)
        return
    torch.set_num_threads(1)
    held = json.loads(given.results.read_text()) if given.results.exists() else {"lines": [], "reliability": {}}
    done, began = held["lines"], time.time()
    seen = {key(line) for line in done}
    for curvature in given.curvature:
        for rows in given.rows:
            for damping in (None, *given.damping):
                for model in given.model:
                    if (model, rows, curvature, damping) in seen or not wanted(rows, curvature, damping):
                        continue
                    if time.time() - began > given.seconds:
                        return
                    (out := given.out / model).mkdir(parents=True, exist_ok=True)
                    truth = Truth.load(given.work / model)
                    held["reliability"][model] = truth.reliability()
                    found = run(given.work / model, out, truth, rows, curvature, damping, given.device)
                    done.append({"model": model, **found})
                    print(done[-1], flush=True)
                    write(given.results, held)


def write(path: Path, held: dict[str, Any]) -> None:
    text = json.dumps({**held, "environment": environment()}, indent=1)
    path.write_text(text + "\n")


def merge(path: Path, parts: list[Path]) -> None:
    """All lines in one file, those of the parts in the place of equal ones."""
    held = json.loads(path.read_text()) if path.exists() else {"lines": [], "reliability": {}}
    lines = {key(line): line for line in held["lines"]}
    for part in parts:
        found = json.loads(part.read_text())
        lines |= {key(line): line for line in found["lines"]}
        held = {**held, "environment": found["environment"], "reliability": held["reliability"] | found["reliability"]}
    order = {name: place for place, name in enumerate([*ROWS, *CURVATURES])}
    ranked = sorted(lines.values(), key=lambda line: (line["model"], order[line["rows"]], order[line["curvature"]],
                                                      str(line["damping"])))  # fmt: skip
    path.write_text(json.dumps({**held, "lines": ranked}, indent=1) + "\n")


if __name__ == "__main__":
    main()

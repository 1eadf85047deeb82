"""Do the shortcuts of frontier.py give what the package gives? A few settings through `index` and `query`.

    python benchmarks/frontier_check.py --work DIR --model llama     # after frontier.py; writes DIR/llama/check.json

Compared: the scores (rank correlation, mean over queries) and the bytes a row takes on disk, files of shards whole.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lds import MAX_LENGTH, Truth, spearman

import influent
from influent.rowstore import Index

DAMPING = "1.0"
SETTINGS = (("whiten 1/2", "rank:side/16:int4", 2_700), ("gauss", "bf16", 10_800))


def through_the_package(folder: Path, entry: dict[str, Any]) -> tuple[np.ndarray, float]:
    """Scores [Q, N] and bytes a row."""
    out, path = folder / "check", folder / "check.npy"
    shutil.rmtree(out, ignore_errors=True)
    influent.index(
        str(folder / "model"), str(folder / "train.jsonl"), str(out), compress=entry["compress"], rows=entry["rows"],
        max_length=MAX_LENGTH, seed=entry["seed"],
    )  # fmt: skip
    influent.query(
        str(out),
        queries=str(folder / "queries.jsonl"),
        curvature="fim",
        damping=f"relative:{DAMPING}",
        scores=str(path),
    )
    index = Index.open(str(out))
    return np.load(path), sum(shard.stat().st_size for shard in out.glob("shards/*.safetensors")) / index.n


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", choices=("llama", "gpt2", "qwen"), required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    folder, found = given.work / given.model, []
    truth = Truth.load(folder)
    for path in sorted((folder / "scores").glob("*.npz")):
        held = np.load(path)
        facts = json.loads(str(held["facts"]))
        entry = facts["entry"]
        if (entry["projection"], entry["codec"], entry["budget"]) in SETTINGS and entry["seed"] == 0:
            scores, size = through_the_package(folder, entry)
            row = {
                "compress": entry["compress"],
                "rows": entry["rows"],
                "bytes reckoned": facts["bytes"],
                "bytes on disk": round(size, 1),
                "rank correlation": round(float(spearman(scores, held[DAMPING]).mean()), 6),
                "lds": [round(float(truth.lds(each).mean()), 4) for each in (scores, held[DAMPING])],
            }
            print(row, flush=True)
            found.append(row)
    (folder / "check.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()

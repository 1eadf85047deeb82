"""Peak memory against the number of rows: index, fit, query and self-influence, each in a process of its own.

A tiny Llama and synthetic sentences, so that rows and not the model set the memory. `python benchmarks/memory.py`
"""

import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from environment import save

WORDS = "the a red blue old new fox dog river money capital runs jumps sleeps over under near far and"
SIZES = (1000, 4000, 16000)
CHILD = """
import json, resource, sys, influent
stage, folder, rows = sys.argv[1], sys.argv[2], sys.argv[3]
index = f"{folder}/index-{rows}"
if stage == "index":
    influent.index(f"{folder}/model", f"{folder}/data.jsonl", index, compress="mask:16x16 | sjlt:64", limit=int(rows),
                   max_length=32, shard_rows=256)
elif stage == "fit":
    influent.fit(index)
elif stage == "query":
    influent.query(index, prompt="the red fox", completion=" jumps over a dog")
else:
    influent.self_influence(index)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from tiny_model import make_model

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "model", width=32)
        write_sentences(folder / "data.jsonl", max(SIZES))
        found = [
            {"stage": stage, "rows": rows, "peak_mib": peak(stage, folder, rows)}
            for rows in SIZES
            for stage in ("index", "fit", "query", "self-influence")
        ]
    save("memory", {"compress": "mask:16x16 | sjlt:64", "peaks": found})


def peak(stage: str, folder: Path, rows: int) -> float:
    command = [sys.executable, "-c", CHILD, stage, str(folder), str(rows)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return round(float(done.stdout.split()[-1]), 1)


def write_sentences(path: Path, count: int) -> None:
    words = tuple(WORDS.split())
    draw = random.Random(0)
    with path.open("w") as file:
        for i in range(count):
            file.write(json.dumps({"id": str(i), "text": " ".join(draw.choices(words, k=12))}) + "\n")


if __name__ == "__main__":
    main()

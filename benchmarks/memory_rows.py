"""Peak memory of fitting and querying low-rank rows against their number: 2,000, 20,000 and 200,000 synthetic rows.

Each stage is a process of its own, so that its peak is its own. The rows are drawn as they are written; their spectrum
falls as a power law. `python benchmarks/memory_rows.py`
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from environment import save

SIZES = (2_000, 20_000, 200_000)
BLOCKS, SIDE, CODEC = 2, 32, "rank:1:bfloat16"
CHILD = """
import json, resource, sys, time
import torch
from influent import curvature, score
from influent.damping import Damping
from influent.reduce import TopK
from influent.rowstore import Index
from influent.rowwriter import write_rows

stage, folder, count, blocks, side, codec = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6]), sys.argv[6]
torch.set_num_threads(1)
keys = [f"layer.{i}" for i in range(blocks)]
scale = torch.arange(1, side + 1) ** -0.7

def rows(lo, hi):
    draw = torch.Generator().manual_seed(lo)
    made = {}
    for key in keys:
        u, v = (torch.randn(hi - lo, side, generator=draw) * scale for _ in "uv")
        made[key] = (v[:, :, None] * u[:, None, :]).flatten(1)
    return made

start = time.perf_counter()
if stage == "write":
    write_rows(folder, rows, num_rows=count, codec=codec, factors={key: (side, side) for key in keys}, shard_rows=2000)
else:
    index = Index.open(folder)
    fitted = curvature.fit(index, curvature=stage if stage != "query" else "lowrank:128",
                           damping=Damping.parse("relative:0.1"))
    if stage == "query":
        asked = {key: torch.randn(64, side * side, generator=torch.Generator().manual_seed(1)) for key in keys}
        score.score(index, score.precondition(asked, fitted), {"top": TopK(10)})
print(json.dumps([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, time.perf_counter() - start]))
"""


def main() -> None:
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for count in SIZES:
            for stage in ("write", "lowrank:128", "sketch:128", "query"):
                peak, seconds = child(stage, Path(folder) / str(count), count)
                found.append({"rows": count, "stage": stage, "peak_mib": round(peak, 1), "seconds": round(seconds, 2)})
                print(found[-1], flush=True)
    save("memory_rows", {"blocks": BLOCKS, "width": SIDE * SIDE, "codec": CODEC, "queries": 64, "peaks": found})


def child(stage: str, folder: Path, count: int) -> tuple[float, float]:
    numbers = map(str, (count, BLOCKS, SIDE))
    command = [sys.executable, "-c", CHILD, stage, str(folder), *numbers, CODEC]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, seconds = json.loads(done.stdout.splitlines()[-1])
    return peak, seconds


if __name__ == "__main__":
    main()

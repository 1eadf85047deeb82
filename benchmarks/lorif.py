"""LoRIF beside LoGRA on SmolLM2-135M: bytes, fit and query time (one thread), and how far their scores agree.

The rows of `lorif_rows.py` (2,000 texts, the same projections for all) are stored in several ways: dense as LoGRA does,
and cut to rank c as LoRIF does. LoGRA's curvature is the exact Fisher matrix; LoRIF's is the truncated one, and the
exact one of the same rows is what its scores are compared with. Query time is split: `solve` preconditions the
queries' gradients, `score` runs over the rows, once with the shards in the page cache and checked ("memory"), once
opened anew with nothing cached ("disk", the check of the hashes included). Times from memory are CPU time of the one
thread, because the machine may be busy, with the loops of `influent[fast]` and without them; ratios are of times taken
in turns. Making the queries' gradients costs the same for all and is left out. Every stage is kept under --work:
interrupted, it resumes.

    python benchmarks/lorif_rows.py --work DIR && python benchmarks/lorif.py --work DIR
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lorif_rows
import numpy as np
import torch
from environment import save
from scipy.stats import rankdata
from torch import Tensor

from influent import compiled, curvature, score
from influent.curvature import Damping
from influent.reduce import Full, TopK
from influent.rowstore import Index
from influent.rowwriter import write_rows

STORES = {
    "LoGRA float32": "float32", "LoGRA bfloat16": "bfloat16",
    "LoRIF c=1": "rank:1:bfloat16", "LoRIF c=4": "rank:4:bfloat16", "LoRIF c=8": "rank:8:bfloat16",
    "LoRIF c=1 int8": "rank:1:int8", "LoRIF c=4 int4": "rank:4:int4",
}  # fmt: skip
CURVE = {"LoRIF c=2": "rank:2:bfloat16", "LoRIF c=16": "rank:16:bfloat16"}
TRUNCATED = ("rank:1:bfloat16", "rank:4:bfloat16", "rank:8:bfloat16")
FITTED_AT_16 = ("float32", "bfloat16", "rank:1:bfloat16")  # its fits take minutes; the others' bytes
QUERIED = ("bfloat16", *TRUNCATED, "rank:1:int8", "rank:4:int4")
COUNTS = (1, 16, 256)
BESIDE = {"bfloat16": 1, "rank:1:bfloat16": 3, "rank:1:int8": 3}  # what is timed in turns, and calls of a turn
DAMPING = Damping.parse("relative:1")
SHARD_ROWS = 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="encode,fit,agree,query", help="stages, comma-separated")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    work, stages = arguments.work, arguments.only.split(",")
    for f in reversed(lorif_rows.FACTORS):  # the quick ones first
        for codec in stores(f).values():
            if "encode" in stages:
                kept(work, f"encode {f} {codec}", lambda f=f, codec=codec: encode(work, f, codec))
            if "fit" in stages and fitted(f, codec):
                kept(work, f"fit {f} {codec}", lambda f=f, codec=codec: fit(work, f, codec))
        if "agree" in stages:
            kept(work, f"agree {f}", lambda f=f: agree(work, f))
        if "query" in stages:
            for codec in (c for c in QUERIED if place(work, f, c).joinpath("manifest.json").exists()):
                kept(work, f"query {f} {codec}", lambda f=f, codec=codec: query(work, f, codec))
            kept(work, f"beside {f}", lambda f=f: beside(work, f))
    if stages == ["report"]:
        report(work)


def stores(f: int) -> dict[str, str]:
    return STORES | (CURVE if f == max(lorif_rows.FACTORS) else {})


def kept(work: Path, name: str, measure: Callable[[], Any]) -> Any:
    """The result of a stage, from its file if it has run."""
    path = work / "results" / f"{name.replace(' ', '_').replace(':', '-')}.json"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        found = measure()
        path.write_text(json.dumps(found))
        print(name, json.dumps(found)[:300], flush=True)
    return json.loads(path.read_text())


def fitted(f: int, codec: str) -> bool:
    return f != 16 or codec in FITTED_AT_16


def place(work: Path, f: int, codec: str) -> Path:
    return work / f"index-f{f}-{codec.replace(':', '-')}"


def encode(work: Path, f: int, codec: str) -> dict[str, Any]:
    files = sorted((work / "rows").glob("train-*.pt"))
    pieces = [torch.load(path, mmap=True)[f"f{f}"] for path in files]
    starts = np.cumsum([0, *(len(next(iter(piece.values()))) for piece in pieces)]).tolist()
    factors = {key: sides(key, width, f) for key, width in widths(pieces[0]).items()}

    def rows(lo: int, hi: int) -> dict[str, Tensor]:
        chosen = [i for i in range(len(pieces)) if starts[i] < hi and starts[i + 1] > lo]
        first = starts[chosen[0]]
        return {key: torch.cat([pieces[i][key] for i in chosen])[lo - first : hi - first] for key in factors}

    start = time.process_time()
    write_rows(place(work, f, codec), rows, num_rows=starts[-1], codec=codec, factors=factors, shard_rows=SHARD_ROWS)
    index = Index.open(place(work, f, codec))
    return {"cpu_seconds": time.process_time() - start, "bytes_per_row": index.bytes / index.n, "rows": index.n,
            "numbers": sum(index.widths.values())}  # fmt: skip


def widths(piece: dict[str, Tensor]) -> dict[str, int]:
    return {key: rows.shape[1] for key, rows in piece.items()}


def sides(key: str, width: int, f: int) -> tuple[int, int]:
    """The two projected widths of a SmolLM2 layer: 576, 192 or 1,536 over f."""
    hidden, inner, heads = 576 // f, 1536 // f, 192 // f
    name = key.rpartition(".")[2]
    a, b = {"down_proj": (inner, hidden), "gate_proj": (hidden, inner), "up_proj": (hidden, inner),
            "k_proj": (hidden, heads), "v_proj": (hidden, heads)}.get(name, (hidden, hidden))  # fmt: skip
    assert a * b == width, (key, width, a, b)
    return a, b


def fit(work: Path, f: int, codec: str) -> dict[str, Any]:
    """CPU-seconds of the exact Fisher matrix, and of the truncated one for LoRIF's rows."""
    index = Index.open(place(work, f, codec))
    found = {}
    for kind in ("fim", *(("lowrank",) if codec in TRUNCATED else ())):
        start = time.process_time()
        curvature.fit(index, curvature=kind, damping=DAMPING)
        found[kind] = time.process_time() - start
    folders = {path.name: sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
               for path in place(work, f, codec).glob("curvature/*")}  # fmt: skip
    return {"cpu_seconds": found, "bytes": folders}


def queries(work: Path, f: int, count: int) -> dict[str, Tensor]:
    pieces = list(lorif_rows.load(work / "rows", "queries", f"f{f}"))
    return {key: torch.cat([piece[key] for piece in pieces])[:count] for key in pieces[0]}


def scores(work: Path, f: int, codec: str, kind: str, **options: Any) -> np.ndarray:
    """[Q, N] of all queries."""
    index = Index.open(place(work, f, codec))
    asked = score.precondition(queries(work, f, max(COUNTS)), curvature.fit(index, curvature=kind, damping=DAMPING))
    return score.score(index, asked, {"full": Full()}, **options)["full"].numpy()


def spearman(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """Mean over the queries, and the least of them."""
    each = [np.corrcoef(rankdata(x), rankdata(y))[0, 1] for x, y in zip(a, b, strict=True)]
    return {"mean": float(np.mean(each)), "least": float(np.min(each))}


def agree(work: Path, f: int) -> dict[str, Any]:
    """Spearman, per query over the rows: truncated with exact curvature on the same rows; rank-c with dense rows;
    low-rank with full-rank queries."""
    dense = scores(work, f, "float32", "fim")
    found: dict[str, Any] = {"bfloat16 with float32": spearman(scores(work, f, "bfloat16", "fim"), dense)}
    for name, codec in stores(f).items():
        if "LoRIF" not in name or not fitted(f, codec):
            continue
        exact = scores(work, f, codec, "fim")
        found[name] = {"exact with dense": spearman(exact, dense)}
        if codec in TRUNCATED:
            truncated = scores(work, f, codec, "lowrank")
            found[name]["truncated with exact"] = spearman(truncated, exact)
            found[name]["truncated with dense"] = spearman(truncated, dense)
        if codec in ("rank:1:bfloat16", "rank:4:bfloat16"):
            for rank in (1, 4, 8, 16):
                cut = scores(work, f, codec, "lowrank", query_rank=rank)
                found[name][f"query rank {rank} with full"] = spearman(cut, truncated)
        print(f, name, found[name], flush=True)
    return found


def query(work: Path, f: int, codec: str) -> list[dict[str, Any]]:
    """Seconds of the two parts of a query. From memory: CPU time, the least of five; from disk: wall and CPU time, the
    least of two. Rows that were not fitted are scored with the queries' gradients, which takes as long."""
    kind = "lowrank" if codec in TRUNCATED else "fim"
    index = Index.open(place(work, f, codec))
    solver = curvature.fit(index, curvature=kind, damping=damping_of(f, kind)) if fitted(f, codec) else None
    found = []
    for count in COUNTS:
        asked = queries(work, f, count)
        run: dict[str, Any] = {"M": count, "solve": None}
        if solver is not None:
            start = time.process_time()
            asked = score.precondition(asked, solver)
            run["solve"] = time.process_time() - start
        times = 5 if count < 256 else 2
        run["memory"] = min(timed(lambda asked=asked: top(index, asked))[1] for _ in range(times))
        with without_loops():
            run["memory, PyTorch"] = min(timed(lambda asked=asked: top(index, asked))[1] for _ in range(times))
        runs = []
        for _ in range(2):
            forget(place(work, f, codec))
            runs.append(timed(lambda asked=asked: top(Index.open(place(work, f, codec)), asked)))
        run["disk"], run["disk, CPU"] = (min(each) for each in zip(*runs, strict=True))
        if codec in TRUNCATED and f != 16:
            run["memory, query rank 4"] = timed(lambda asked=asked: top(index, asked, query_rank=4))[1]
        found.append(run)
    return found


def beside(work: Path, f: int) -> dict[str, Any]:
    """Seconds of one query of rows of each codec, from memory (CPU time) and from disk (wall time), in turns, since the
    clock of the machine wanders, and it has neighbours: what it does undisturbed is in the least of many rounds."""
    indexes, asked = {codec: Index.open(place(work, f, codec)) for codec in BESIDE}, queries(work, f, 1)

    def memory(codec: str) -> float:
        return min(timed(lambda: top(indexes[codec], asked))[1] for _ in range(BESIDE[codec]))

    def plain(codec: str) -> float:
        with without_loops():
            return memory(codec)

    def disk(codec: str) -> float:
        forget(place(work, f, codec))
        return timed(lambda: top(Index.open(place(work, f, codec)), asked))[0]

    for index in indexes.values():
        top(index, asked)  # whose shards are then checked
    ways = {"memory": (memory, 40), "memory, PyTorch": (plain, 5), "disk": (disk, 5)}
    return {way: rounds(run, count) for way, (run, count) in ways.items()}


def rounds(run: Callable[[str], float], count: int) -> dict[str, list[float]]:
    each = [{codec: run(codec) for codec in BESIDE} for _ in range(count)]
    return {codec: [one[codec] for one in each] for codec in BESIDE}


def damping_of(f: int, kind: str) -> Damping:
    """That of the fit which is there: the time does not depend on it."""
    return Damping.parse("relative:0.1") if f == 16 and kind == "fim" else DAMPING


@contextmanager
def without_loops() -> Iterator[None]:
    """As on a machine without llvmlite."""
    held = compiled.usable, compiled.tiles_usable
    compiled.usable = compiled.tiles_usable = lambda: False
    try:
        yield
    finally:
        compiled.usable, compiled.tiles_usable = held


def top(index: Index, asked: dict[str, Tensor], **options: Any) -> Any:
    return score.score(index, asked, {"top": TopK(10)}, **options)


def timed(run: Callable[[], Any]) -> tuple[float, float]:
    """Wall and CPU time."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def forget(folder: Path) -> None:
    """Ask the kernel to drop the folder's pages."""
    for path in (folder / "shards").glob("*.safetensors"):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def report(work: Path) -> None:
    results = []
    for f in lorif_rows.FACTORS:
        for name, codec in stores(f).items():
            stage = {what: read(work, f"{what} {f} {codec}") for what in ("encode", "fit", "query")}
            results.append({"f": f, "store": name, "rows": codec, **stage})
    agreement = {f"f={f}": read(work, f"agree {f}") for f in lorif_rows.FACTORS}
    turns = {f"f={f}": read(work, f"beside {f}") for f in lorif_rows.FACTORS}
    save("lorif", {
        "model": "SmolLM2-135M-Instruct", "data": "BBC news, 64 tokens a row", "damping": str(DAMPING),
        "curvature": {"LoGRA": "fim", "LoRIF": "lowrank, default rank"}, "results": results, "spearman": agreement,
        "one query in turns": turns,
    })  # fmt: skip


def read(work: Path, name: str) -> Any:
    path = work / "results" / f"{name.replace(' ', '_').replace(':', '-')}.json"
    return json.loads(path.read_text()) if path.exists() else None


if __name__ == "__main__":
    main()

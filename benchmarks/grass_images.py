"""GraSS's two experiments on images: TRAK under each compressor, judged by 50 random halves.

Needs what image_truth.py leaves in DIR. Each compressor and size is one ensemble of indexes with one row for all
layers; masks are learned once, on the first checkpoint's margins. The damping is chosen for each of them on a tenth of
the queries and reported on the others, beside the default of relative:0.1. LDS is that of margins, which is that of
losses: one falls as the other rises. Interrupted, it resumes: what is finished is kept in DIR/mlp/ranks.

    python benchmarks/grass_images.py --work DIR --model mlp  # resnet, resnet64; --only SM; --sizes 2048
    python benchmarks/grass_images.py --work DIR --model mlp --time

Several of these may run at once for other compressors and sizes, if their masks are there (--masks). What came of it:
grass_images_report.py.
"""

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from image_truth import (
    SETTINGS,
    exact_float32,
    halves,
    images,
    load,
    machine,
    put,
    weights,
)

import influent
from influent import maps
from influent.attach import Run, Setting, attach
from influent.gradients import Flat
from influent.metrics import ranks
from influent.storage import Store

SIZES = (2048, 4096, 8192)
BLOW_UP = 4  # the mask of GraSS keeps so many times the entries of its rows
DEFAULT = "relative:0.1"
DAMPINGS = (DEFAULT, "relative:0.01", "relative:1", "relative:10")
TRIED = (DEFAULT, "relative:1")  # here: the others were worse with both masks of the MLP at 2,048 (docs/log.md)
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
ROUNDS = 4  # over these gradients, as long as they take no more than 20 seconds
# The dense matrix of the ResNet has a billion entries and more: it is made on request (--only GAUSS) alone.
SPARSE = tuple(kind for kind in COMPRESSORS if kind != "GAUSS")
WHICH = {"mlp": ("RM", "SM", "SJLT", "FJLT", "GAUSS"), "resnet": SPARSE, "resnet64": SPARSE}


def examples(data: tuple[torch.Tensor, torch.Tensor]) -> list[tuple[torch.Tensor, int]]:
    return [(pixels, int(label)) for pixels, label in zip(*data, strict=True)]


def checkpoints(name: str, work: Path) -> tuple[torch.nn.Module, list[dict[str, torch.Tensor]]]:
    """The first one as a module, the others as state dicts."""
    paths = [work / "checkpoints" / f"{c}.safetensors" for c in range(SETTINGS[name].checkpoints)]
    return load(name, paths[0]), [weights(path) for path in paths[1:]]


@dataclass(frozen=True, slots=True)
class Unit:
    """One compressor at one size, its maps drawn by one seed."""

    kind: str
    k: int
    seed: int = 0

    @property
    def mask_size(self) -> int | None:
        """How many entries its learned mask keeps, if it has one."""
        text = COMPRESSORS[self.kind]
        return self.k if "{sm}" in text else BLOW_UP * self.k if "{gsm}" in text else None

    def compress(self, work: Path) -> str:
        """The compressor's text; FileNotFoundError if its mask was not learned yet."""
        place = None if self.mask_size is None else work / "masks" / f"{self.mask_size}-{self.seed}"
        if place is not None and not (place / "manifest.json").exists():
            raise FileNotFoundError(f"{place}: learn this mask first, with --masks")
        return COMPRESSORS[self.kind].format(k=self.k, wide=BLOW_UP * self.k, sm=place, gsm=place)

    def __str__(self) -> str:
        return f"{self.kind}-{self.k}-{self.seed}"


def learn(name: str, unit: Unit, work: Path, device: str) -> None:
    """The unit's mask, from margins of the first checkpoint."""
    if unit.mask_size is None or (work / "masks" / f"{unit.mask_size}-{unit.seed}" / "manifest.json").exists():
        return
    model, rows = load(name, work / "checkpoints" / "0.safetensors"), examples(images(SETTINGS[name]).train)
    start = time.perf_counter()
    found = influent.mask(
        model, rows, str(work / "masks" / f"{unit.mask_size}-{unit.seed}"), size=str(unit.mask_size), scope="all",
        target="margin", memory=4096, seed=unit.seed, task=influent.Classification(), device=device, token_budget=256,
    )  # fmt: skip
    facts = {key: round(found["blocks"][0][key], 4) for key in ("held", "random")}
    print(f"{name} mask of {unit.mask_size}: {facts}, {time.perf_counter() - start:.1f} s", flush=True)


@contextmanager
def kept_matrices(device: str) -> Iterator[None]:
    """A dense matrix beyond `maps.DENSE_LIMIT` is drawn anew by blocks at each use, which ten checkpoints would make
    hundreds of times. In this context the blocks, the same numbers, stay where they are used."""
    drawn = maps._matrix
    maps._matrix = cache(lambda kind, rows, k, stream, *, row=0: drawn(kind, rows, k, stream, row=row).to(device))
    try:
        yield
    finally:
        maps._matrix = drawn


def run(name: str, unit: Unit, work: Path, device: str) -> None:
    """Index, query at each damping, and keep how each query's scores rank the halves: LDS is a rank correlation."""
    target = work / "ranks" / f"{unit}.npz"
    if target.exists():
        return
    target.parent.mkdir(exist_ok=True)
    data, start = images(SETTINGS[name]), time.perf_counter()
    model, others = checkpoints(name, work)
    place, task = work / "indexes" / str(unit), influent.Classification()
    common: dict[str, Any] = {"task": task, "token_budget": 256, "device": device}
    influent.index(
        model, examples(data.train), str(place), checkpoints=others, method="trak", compress=unit.compress(work),
        seed=unit.seed, **common,
    )  # fmt: skip
    print(f"{name} {unit}: indexed, {time.perf_counter() - start:.1f} s", flush=True)
    used, found = halves(SETTINGS[name]), []
    for damping in TRIED:
        influent.query(
            str(place), queries=examples(data.queries), model=[model, *others], damping=damping, k=1,
            scores=str(place / "scores.npy"), **common,
        )  # fmt: skip
        sums = np.load(place / "scores.npy") @ used.T.astype(np.float64)
        found.append((2 * ranks(sums)).astype(np.uint8))  # ties have the mean of their ranks
    put(target, lambda file: np.savez_compressed(file, ranks=np.stack(found)))
    shutil.rmtree(place)  # gigabytes that the same command makes again
    print(f"{name} {unit}: {time.perf_counter() - start:.1f} s", flush=True)


def compress_seconds(name: str, unit: Unit, work: Path, device: str) -> float:
    """Seconds to compress 5,000 gradients that are there already, as GraSS's tables count, at the pace of the fastest
    batch: CPU time on one thread, or time of the GPU by its own events. A dense matrix is there already, too."""
    on_gpu = torch.device(device).type == "cuda"
    model, rows = load(name, work / "checkpoints" / "0.safetensors"), examples(images(SETTINGS[name]).train)
    batch = 128 if on_gpu else 16
    run_as = Run(token_budget=64, device=device)
    setting = Setting(compress="id", target="margin", key="all")
    with attach(model, influent.Classification(), setting, run_as) as attached:
        g = attached.collector.collect(rows[:TIMED], name=str).rows["all"]
    setting = Setting(compress=unit.compress(work), target="margin", key="all", seed=unit.seed)
    with (
        tempfile.TemporaryDirectory(dir=work) as place,
        attach(model, influent.Classification(), setting, run_as, index=Store(place)) as attached,
    ):
        bound, seconds = attached.collector.bound["all"], []
        clock = _gpu_seconds if on_gpu else _cpu_seconds
        bound.join(Flat(g[:batch]))  # draws a dense matrix, makes a GPU ready
        for lo in [lo for _ in range(ROUNDS) for lo in range(0, len(g), batch)]:
            piece = Flat(g[lo : lo + batch])
            seconds.append(clock(lambda piece=piece: bound.join(piece)) / batch)
            if sum(seconds) * batch > 20:
                break
    return 5000 * min(seconds)


def _cpu_seconds(stage: Callable[[], Any]) -> float:
    start = time.process_time()
    stage()
    return time.process_time() - start


def _gpu_seconds(stage: Callable[[], Any]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    stage()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000


def timing(name: str, unit: Unit, work: Path, device: str) -> None:
    """Keep the unit's `compress_seconds` and the machine's name."""
    on = torch.device(device).type
    target = work / "timings" / f"{unit.kind}-{unit.k}-{on}.json"
    if target.exists():
        return
    target.parent.mkdir(exist_ok=True)
    found = {"seconds": compress_seconds(name, unit, work, device), "machine": machine(device)}
    put(target, lambda file: file.write(json.dumps(found).encode()))
    print(f"{name} {unit.kind} {unit.k}: {found['seconds']:.3f} s, {found['machine']}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", choices=SETTINGS, required=True)
    parser.add_argument("--only", help="compressors, by commas")
    parser.add_argument("--sizes", help="sizes, by commas")
    parser.add_argument("--seed", type=int, default=0, help="of the maps and masks")
    parser.add_argument("--device", default="cpu")
    stage = parser.add_mutually_exclusive_group()
    stage.add_argument("--masks", action="store_true", help="learn the masks alone")
    stage.add_argument("--time", action="store_true", help="measure the compressors alone")
    given = parser.parse_args()
    torch.set_num_threads(1)
    exact_float32()
    kinds = given.only.split(",") if given.only else WHICH[given.model]
    sizes = map(int, given.sizes.split(",")) if given.sizes else SIZES
    units = [Unit(kind, k, given.seed) for k in sizes for kind in kinds]
    stages = [timing] if given.time else [learn] if given.masks else [learn, run]
    with kept_matrices(given.device):
        for unit in units:
            for each in stages:
                each(given.model, unit, given.work / given.model, given.device)


if __name__ == "__main__":
    main()

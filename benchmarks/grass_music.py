"""GraSS's experiment on music: TRAK with three checkpoints under each compressor, judged by 50 random halves.

Needs what music.py leaves in DIR. Each compressor and size is what `--method trak` makes of three checkpoints, with one
row for all linear layers. Their gradients have 332,000 entries and are collected once for all compressors; k is half of
what it is there, for a fortieth of the gradient. Masks are learned once, on the first checkpoint's margins. A dense
Gaussian is left out, as there. The damping is chosen for each setting on a tenth of the queries and reported on the
others, beside the default of relative:0.1.

    python benchmarks/grass_music.py --work DIR --masks     # --device cuda; --part 0/4 does a quarter
    python benchmarks/grass_music.py --work DIR             # interrupted, it resumes; --only SM,RM --sizes 2048
    python benchmarks/grass_music.py --work DIR --seconds   # of compression, on one CPU thread or with --device cuda
    python benchmarks/grass_music.py --work DIR --report

About a quarter of an hour of one core. The report is results/grass_music.json and docs/grass_music.png, of what is
finished.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import environment
import lds
import numpy as np
import torch
from grass_images import BLOW_UP, COMPRESSORS, DAMPINGS, Unit
from grass_images import DEFAULT as OWN
from image_truth import exact_float32, machine
from music import LENGTH, NUM_CHECKPOINTS, NUM_SUBSETS, halves
from predictions import COLUMNS, DEFAULT, Claim, Judged, ceiling, judge, keep, orderings, ranks, whiskers
from together import each, share
from torch import Tensor

import influent
from influent.attach import Run, Setting, attach
from influent.collect import Collector
from influent.gradients import Flat
from influent.storage import Store

SIZES = (1024, 2048, 4096)
KINDS = tuple(kind for kind in COMPRESSORS if kind != "GAUSS")
BUDGET = 6144  # positions a batch; formed gradients are held a few at a time
FORMED, BATCH, REPEATS = 128, 16, 5  # gradients whose compression is timed, and how many at a time
EXAMPLES = 5000  # that GraSS's table counts


def models(work: Path) -> list[str]:
    return [str(work / "model" / str(i)) for i in range(NUM_CHECKPOINTS)]


def learn(work: Path, size: int, device: str) -> None:
    """The mask of so many entries, from margins of the first checkpoint."""
    place, began = work / "masks" / f"{size}-0", time.time()
    if not (place / "manifest.json").exists():
        influent.mask(
            models(work)[0], str(work / "train.jsonl"), str(place), size=str(size), scope="all", target="margin",
            memory=4096, max_length=LENGTH, device=device, token_budget=BUDGET,
        )  # fmt: skip
        print(f"mask of {size}: {time.time() - began:.1f} s", flush=True)


def records(work: Path, name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (work / f"{name}.jsonl").read_text().splitlines()]


@contextmanager
def attached(model: str, compress: str, device: str, masks: Path | None = None) -> Iterator[Collector]:
    """What makes TRAK's rows of a checkpoint under a compressor; `masks` is where a learned one is copied to."""
    setting = Setting(compress=compress, target="margin", key="all", max_length=LENGTH)
    index = None if masks is None else Store(str(masks))
    with attach(model, None, setting, Run(token_budget=BUDGET, device=device), index=index) as ready:
        yield ready.collector


def run(units: Sequence[Unit], work: Path, device: str) -> None:
    """What each unit predicts of every half, at each damping. The checkpoints' gradients are collected once for all
    units: the rows, their Fisher matrix (lds.py) and the scores are those of `--method trak` up to rounding."""
    todo = [unit for unit in units if not target(work, unit).exists()]
    grid = {damping: float(damping.removeprefix("relative:")) for damping in DAMPINGS}
    total = {unit: {damping: np.zeros(1) for damping in grid} for unit in todo}
    residual, took = np.zeros(1), dict.fromkeys(todo, 0.0)
    for unit in todo:
        if unit.mask_size is not None:
            learn(work, unit.mask_size, device)
    for path in models(work) if todo else []:
        with attached(path, "id", device) as collector:
            rows = collector.collect(records(work, "train"), name="row {}".format)
            asked = collector.collect(records(work, "queries"), name="query {}".format, query=True)
        assert rows.residual is not None
        residual = residual + rows.residual.double().cpu().numpy() / NUM_CHECKPOINTS
        for unit in todo:
            began = time.process_time()
            both = [{"all": compressed(each.rows["all"], unit, work, device)} for each in (rows, asked)]
            for damping, scores in lds.influence(both[0], both[1], list(grid.values())).items():
                name = next(name for name, value in grid.items() if value == damping)
                total[unit][name] = total[unit][name] + scores
            took[unit] += time.process_time() - began
            print(f"{Path(path).name} {unit}: {time.process_time() - began:.1f} s", flush=True)
    for unit in todo:
        found = {damping: ranks(scores * residual, halves(NUM_SUBSETS, 1)) for damping, scores in total[unit].items()}
        found[DEFAULT] = found[OWN]
        facts = {"compressor": unit.kind, "k": unit.k, "cpu seconds": round(took[unit], 1)}
        keep(target(work, unit), found, facts)


def target(work: Path, unit: Unit) -> Path:
    return work / "lds" / f"{unit.kind}-{unit.k}.npz"


def compressed(gradients: Tensor, unit: Unit, work: Path, device: str) -> Tensor:
    """Rows [N, k] of whole gradients [N, p]."""
    with attached(models(work)[0], unit.compress(work), device, work / "bound" / str(unit)) as collector:
        return torch.cat([collector.bound["all"].join(Flat(part)) for part in gradients.split(BATCH)])


def seconds(work: Path, unit: Unit, gradients: Tensor, device: str) -> float:
    """Seconds to compress EXAMPLES gradients that are there already, as GraSS's tables count: of one CPU thread, or of
    the device until it is done. The least of some repeats a batch."""
    clock = cpu_seconds if device == "cpu" else gpu_seconds
    with attached(models(work)[0], unit.compress(work), device, work / "bound" / str(unit)) as collector:
        join = collector.bound["all"].join
        took = [min(clock(partial(join, Flat(part))) for _ in range(REPEATS)) for part in gradients.split(BATCH)]
    return EXAMPLES / len(gradients) * sum(took)


def cpu_seconds(call: Callable[[], Any]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def gpu_seconds(call: Callable[[], Any]) -> float:
    """From one synchronisation to the next; on a GPU that others use too, the least of many counts."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def all_seconds(work: Path, device: str) -> None:
    """Of every compressor and size that was judged, into seconds-DEVICE.json."""
    with attached(models(work)[0], "id", device) as collector:
        gradients = collector.collect(records(work, "train")[:FORMED], name=str).rows["all"]
    units = [Unit(kind, k) for kind in KINDS for k in SIZES if target(work, Unit(kind, k)).exists()]
    found = {f"{unit.kind}-{unit.k}": round(seconds(work, unit, gradients, device), 4) for unit in units}
    (work / f"seconds-{device}.json").write_text(
        json.dumps({"on": machine(device), "entries": gradients.shape[1], "found": found})
    )
    print(json.dumps(found), flush=True)


CLAIMS = (
    Claim("SM >= RM", "SM", "RM"),
    Claim("SJLT within .02 of FJLT, and faster", "SJLT", "FJLT", 0.02, 1.0),
    Claim("GraSS(RM) within .03 of SJLT, at 20 times its speed", "GraSS(RM)", "SJLT", 0.03, 20.0),
    Claim("GraSS(SM) within .03 of SJLT, at 20 times its speed", "GraSS(SM)", "SJLT", 0.03, 20.0),
    Claim("GraSS(RM) >= RM", "GraSS(RM)", "RM"),
    Claim("SJLT >= GraSS(RM)", "SJLT", "GraSS(RM)"),
)


def report(work: Path) -> dict[str, Any]:
    """Everything that is finished."""
    found: dict[tuple[str, int | None], Judged] = {}
    outcomes = np.load(work / "truth.npz")["margins"]
    for path in (work / "lds").glob("*.npz"):
        one = judge(path, outcomes)
        found[one.facts["compressor"], one.facts["k"]] = one
    timing = {
        device: json.loads((work / f"seconds-{device}.json").read_text())
        for device in COLUMNS
        if (work / f"seconds-{device}.json").exists()
    }
    order = [(kind, k) for kind in KINDS for k in SIZES if (kind, k) in found]
    return {
        "queries": f"9/10 of {outcomes.shape[2]}; the damping of each setting is the best on the other tenth",
        "halves": outcomes.shape[0], "seeds": outcomes.shape[1], "ceiling": ceiling(outcomes),
        "seconds": "of 5,000 gradients that are formed already, one checkpoint; CPU: one thread",
        "timed on": {device: {"on": took["on"], "entries": took["entries"]} for device, took in timing.items()},
        "orderings": orderings(CLAIMS, SIZES, found, {device: took["found"] for device, took in timing.items()}),
        "settings": [
            found[key].document()
            | {COLUMNS[device]: took["found"].get(f"{key[0]}-{key[1]}") for device, took in timing.items()}
            for key in order
        ],
    }  # fmt: skip


def plot(document: dict[str, Any], path: Path) -> None:
    """LDS against the size of a row, and against the seconds of compression; a line a compressor."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found = document["settings"]
    labels = {
        "k": "numbers a row", "compress_s": "seconds to compress 5,000 gradients, one CPU thread",
        "compress_gpu_s": "seconds to compress 5,000 gradients, GPU",
    }  # fmt: skip
    columns = [column for column in labels if column in found[0]]
    figure, axes = plt.subplots(1, len(columns), figsize=(5.5 * len(columns), 4), squeeze=False, sharey=True)
    for axis, column in zip(axes[0], columns, strict=True):
        for kind in KINDS:
            line = [one for one in found if one["compressor"] == kind]
            if not line:  # not measured yet
                continue
            judged = [one["lds"] for one in line]
            axis.errorbar(
                [one[column] for one in line], [one["mean"] for one in judged], yerr=whiskers(judged),
                marker="o", capsize=2, label=kind,
            )  # fmt: skip
        axis.set(xscale="log", xlabel=labels[column], ylabel="LDS")
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--part", default="0/1", help="I/N: this process is the I-th of N, from 0")
    parser.add_argument("--only", help="compressors, by commas")
    parser.add_argument("--sizes", help="sizes, by commas")
    parser.add_argument("--masks", action="store_true", help="only learn the masks")
    parser.add_argument("--seconds", action="store_true", help="only time the compression")
    parser.add_argument("--report", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    work = given.work.resolve()
    exact_float32()
    sizes = [int(k) for k in given.sizes.split(",")] if given.sizes else list(SIZES)
    if given.report:
        document = report(work)
        environment.save("grass_music", document)
        plot(document, Path(__file__).parent.parent / "docs" / "grass_music.png")
    elif given.seconds:
        all_seconds(work, given.device)
    elif given.masks:
        todo = share(sorted({factor * k for k in sizes for factor in (1, BLOW_UP)}), given.part)
        each(todo, lambda size: learn(work, size, given.device))
    else:
        units = [Unit(kind, k) for k in sizes for kind in (given.only.split(",") if given.only else KINDS)]
        run(share(units, given.part), work, given.device)


if __name__ == "__main__":
    main()

"""Experiment (d) of GraSS: factorised compressors and their rivals on a GPT-2-style model and real text, by LDS.

In place of GPT-2 small on WikiText (4,656 blocks of 512, 481 queries): the GPT-2 of .6 M parameters of ground_truth.py,
1,000 passages of 64 tokens of State of the Union speeches, 64 queries, 50 random halves; block-diagonal Fisher matrix
of its 12 linear layers, whose widths of 96 to 384 leave k_l = 4,096 little to compress. The compressors are applied to
gradients that are collected once (lds.py: what an index holds, up to rounding); all else goes through the package's own
verbs. Damping: the best of a relative grid on a tenth of the queries, LDS reported on the others, beside the method's
default. TracIn: checkpoints after each of three epochs. Compression seconds, as in Table 1 there: 4,656 examples of 512
positions at the layer shapes of GPT-2 small, each side just written, of one CPU thread (or of a GPU).

    python benchmarks/ground_truth.py --work DIR --model gpt2 --subsets 50
    python benchmarks/grass_text.py --work DIR                     # --device cuda; --part 0/3; interrupted, it resumes
    python benchmarks/grass_text.py --work DIR --seconds           # with --device cuda of the GPU
    python benchmarks/grass_text.py --work DIR --report            # results/grass_text.json and docs/grass_text.png

The second line takes about half an hour of one quiet core.
"""

import argparse
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import compression
import ground_truth
import lds
import numpy as np
import together
import torch
from environment import save
from grass_music import cpu_seconds, gpu_seconds
from image_truth import exact_float32, machine
from lds import MAX_LENGTH
from predictions import DEFAULT, Claim, Judged, ceiling, judge, keep, orderings, ranks, whiskers

import influent
from influent.attach import Run, Setting, attach
from influent.bind import Bound, bind
from influent.compress import Compress
from influent.damping import DEFAULT as OWN
from influent.gradients import Outer
from influent.layers import Block
from influent.storage import Store

MODEL, NUM_SUBSETS = "gpt2", 50
GRID = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
SIDES = (16, 32, 64)  # k_l = 256, 1,024, 4,096
SHAPES = ((769, 2304), (769, 768), (769, 3072), (3073, 768))  # a block of GPT-2 small, biases as ones columns
BLOCKS, EXAMPLES, POSITIONS = 12, 4656, 512
TIMED, REPEATS = {"cpu": 4, "cuda": 32}, {"cpu": 7, "cuda": 50}  # examples a call, and calls of which the best counts
BUDGET = 8192  # positions a batch


@dataclass(frozen=True, slots=True)
class Entry:
    """One row of the table: `index` are options of the verb; dampings are tried where the curvature takes one."""

    name: str
    k: int | None
    index: dict[str, Any]
    curvature: str | None = None
    grid: tuple[float, ...] = GRID

    @property
    def mask(self) -> str:
        """The folder of its learned mask, or nothing."""
        kind, _, place = self.index.get("compress", "").partition(" ")[0].partition(":")
        return place if kind == "select" else ""

    @property
    def at_hand(self) -> bool:
        """Whether its scores can be had from gradients that are held whole."""
        return self.curvature in (None, "fim", "identity") and "method" not in self.index

    @property
    def file(self) -> str:
        return f"{self.name}-{self.k}".replace(" ", "_").replace("/", "_")


def drawn(side: int) -> dict[str, str]:
    """The compressors that need no data, at k_l = side * side."""
    return {
        "RM": f"mask:{side}x{side}",
        "SJLT": f"sjlt:{side}x{side}",
        "FactGraSS(RM)": f"mask:{2 * side}x{2 * side} | sjlt:{side * side}",
        "LoGRA": f"gauss:{side}x{side}",
    }


def entries(work: Path) -> Iterator[Entry]:
    for side in SIDES:
        k = side * side
        texts = drawn(side) | {
            "SM": f"select:{work / 'masks' / str(side)}",
            "FactGraSS(SM)": f"select:{work / 'masks' / str(2 * side)} | sjlt:{k}",
        }
        for name, text in texts.items():
            yield Entry(name, k, {"compress": text})
    whole: dict[str, Any] = {"compress": "id"}
    yield Entry("EK-FAC", None, whole, "ekfac")
    yield Entry("K-FAC", None, whole, "kfac")
    yield Entry("DataInf", None, whole, "datainf")
    yield Entry("GradDot", None, whole, "identity", ())
    yield Entry("exact Fisher", None, whole, "fim")
    for size in (3, 11, 43):
        yield Entry(f"LoRIF {size} KiB", None, {"method": "lorif", "row_bytes": 1024 * size}, "fim")
    yield Entry("EK-FAC, LoGRA rows", 4096, {"compress": "gauss:64x64"}, "ekfac")
    yield Entry("TracIn", None, {"compress": "id", "method": "tracin"}, "identity", ())


def units(work: Path) -> list[list[Entry]]:
    """Entries of the same index together, in the order of their first."""
    found: dict[str, list[Entry]] = {}
    for entry in entries(work):
        found.setdefault(json.dumps(entry.index), []).append(entry)
    return list(found.values())


def learn(work: Path, path: Path, device: str) -> None:
    """A selective mask of side x side entries a layer, learned from the training rows; the side is its name."""
    influent.mask(
        str(work / "model"), str(work / "train.jsonl"), str(path), size=f"{path.name}x{path.name}",
        max_length=MAX_LENGTH, token_budget=BUDGET, device=device,
    )  # fmt: skip


def checkpoints(work: Path, device: str) -> tuple[list[str], list[float]]:
    """The model after each epoch of the training on all rows, and the mean learning rate of the epoch."""
    setting = ground_truth.SETTINGS[MODEL]
    folders = [work / "epochs" / str(epoch) for epoch in range(1, setting.epochs + 1)]
    if not all((folder / "config.json").exists() for folder in folders):
        rows, _, tokenizer, model = ground_truth.prepare(MODEL, work, device)
        left = iter(folders)

        def after_epoch() -> None:
            folder = next(left)
            tokenizer.save_pretrained(folder)
            model.save_pretrained(folder)  # pyright: ignore[reportCallIssue]

        ground_truth.train(
            model, [rows], epochs=setting.epochs, rate=setting.rate, batch=ground_truth.BATCH, seeds=[0],
            after_epoch=after_epoch,
        )  # fmt: skip
    count = setting.epochs
    return [str(folder) for folder in folders], [setting.rate * (1 - (e + 0.5) / count) for e in range(count)]


def measure_compressed(work: Path, entries: list[Entry], device: str) -> None:
    """What compressors and whole gradients predict under their Fisher matrix, and without one, from one pass over the
    model: the maps are those of an index, the Fisher matrix is in its dual form (lds.py)."""
    todo = [entry for entry in entries if not (work / "table" / f"{entry.file}.npz").exists()]
    if not todo:
        return
    gradients = lds.collect(work, [])
    together.each(todo, lambda entry: predict(work, entry, gradients, device))


def predict(work: Path, entry: Entry, gradients: lds.Gradients, device: str) -> None:
    used, began = ground_truth.subsets(NUM_SUBSETS), time.process_time()
    if entry.mask:
        learn(work, Path(entry.mask), device)
    learned, began = time.process_time() - began, time.process_time()
    setting = Setting(compress=entry.index["compress"], max_length=MAX_LENGTH)
    with attach(str(work / "model"), None, setting, Run(), index=Store(str(work / "bound" / entry.file))) as ready:
        bound = ready.collector.bound
        rows, asked = (lds.compress(each, bound) for each in (gradients.train, gradients.queries))
    if entry.curvature == "identity":
        found = {DEFAULT: ranks(lds.products(rows, asked), used)}
    else:
        tried = lds.influence(rows, asked, entry.grid)
        found = {str(damping): ranks(scores, used) for damping, scores in tried.items()}
        found[DEFAULT] = found[str(OWN.value)]
    facts = {"name": entry.name, "k": entry.k, "bytes": 4 * sum(row.shape[1] for row in rows.values())}
    facts |= {"mask cpu seconds": round(learned, 1), "cpu seconds": round(time.process_time() - began, 1)}
    keep(work / "table" / f"{entry.file}.npz", found, facts)


def measure(work: Path, entries: list[Entry], device: str) -> None:
    """One index, and of each of its entries what it predicts at every damping, and at the default."""
    todo = [entry for entry in entries if not (work / "table" / f"{entry.file}.npz").exists()]
    if not todo:
        return
    began, wall = time.process_time(), time.time()
    options, place, models = dict(todo[0].index), work / "indexes" / todo[0].file, [str(work / "model")]
    if options.get("method") == "tracin":
        models, options["rates"] = checkpoints(work, device)
        options["checkpoints"] = models[1:]
    influent.index(
        models[0], str(work / "train.jsonl"), str(place), max_length=MAX_LENGTH, token_budget=BUDGET, device=device,
        **options,
    )  # fmt: skip
    facts: dict[str, Any] = {"index cpu seconds": round(time.process_time() - began, 1), "device": device}
    if len(models) == 1:
        facts["bytes"] = influent.info(str(place))["bytes_per_row"]
    used = ground_truth.subsets(NUM_SUBSETS)
    for entry in todo:
        found, path = {}, place.with_suffix(".npy")
        for damping in (*entry.grid, None):
            influent.query(
                str(place), queries=str(work / "queries.jsonl"), curvature=entry.curvature, scores=str(path), k=1,
                damping=None if damping is None else f"relative:{damping}", token_budget=BUDGET, device=device,
            )  # fmt: skip
            found[DEFAULT if damping is None else str(damping)] = ranks(np.load(path), used)
        keep(
            work / "table" / f"{entry.file}.npz", found,
            {"name": entry.name, "k": entry.k, **facts, "wall seconds": round(time.time() - wall, 1)},
        )  # fmt: skip
    shutil.rmtree(place)


def references(work: Path) -> None:
    from influent import baselines

    train, queries = (
        [json.loads(line)["text"] for line in (work / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "queries")
    )

    class Texts:
        def texts(self) -> Iterator[str]:
            return iter(train)

    words = np.zeros((len(queries), len(train)))
    for place, found in enumerate(baselines.bm25(Texts(), queries, k=len(train))):
        for row, score in found:
            words[place, row] = score
    chance = np.random.default_rng(0).standard_normal(words.shape)
    used = ground_truth.subsets(NUM_SUBSETS)
    for name, scores in (("BM25", words), ("random", chance)):
        keep(work / "table" / f"{name}.npz", {DEFAULT: ranks(scores, used)}, {"name": name, "k": None})


def seconds(device: str) -> dict[str, float]:
    """Of compressing EXAMPLES examples at the shapes of GPT-2 small, from the two sides of each layer: of one CPU
    thread, or of the GPU until it is done."""
    torch.manual_seed(0)
    found: dict[str, float] = {}
    clock: Callable[[Callable[[], Any]], float] = cpu_seconds if device == "cpu" else gpu_seconds
    for (i, o), side in ((shape, side) for shape in SHAPES for side in SIDES):
        a, d = (torch.randn(TIMED[device], POSITIONS, width, device=device) for width in (i, o))
        layer = Block("x", "linear", i, o)
        calls = {
            name: partial(compressed, bind(Compress.parse(text), layer, 0).to(torch.device(device)), a, d)
            for name, text in drawn(side).items()
        }
        best = dict.fromkeys(calls, float("inf"))
        for _ in range(REPEATS[device]):
            for name, call in calls.items():
                a.mul_(1.0), d.mul_(1.0)  # as the model leaves them: just written
                best[name] = min(best[name], clock(call))
        for name, value in best.items():
            key = f"{name}-{side * side}"
            found[key] = found.get(key, 0.0) + value * BLOCKS * EXAMPLES / TIMED[device]
    return {key: round(value, 3) for key, value in found.items()}


def ratios() -> dict[str, dict[int, float]]:
    """How many times faster FactGraSS is than LoGRA on a CPU, by what is in its caches (compression.py), then k_l."""
    sweep, out = torch.zeros(compression.SWEEP_FLOATS), {}
    for condition in ("repeated", "fresh", "cold"):
        for side in SIDES:
            took = [
                compression.measure(shape, side * side, repeats=2, condition=condition, sweep=sweep) for shape in SHAPES
            ]
            ratio = sum(each["logra"] for each in took) / sum(each["factgrass"] for each in took)
            out.setdefault(condition, {})[side * side] = round(ratio, 1)
    return out


def compressed(bound: Bound, a: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    return bound.join(Outer(bound.map_in(a), bound.map_out(d), bound.in_width, bound.out_width))


CLAIMS = tuple(
    claim
    for kind in ("FactGraSS(RM)", "FactGraSS(SM)")
    for claim in (
        Claim(f"{kind} within .01 of LoGRA, at 2.5 times its speed", kind, "LoGRA", 0.01, 2.5),
        Claim(f"{kind} >= {kind[10:12]}", kind, kind[10:12]),
    )
) + (Claim("SJLT >= LoGRA", "SJLT", "LoGRA"), Claim("SM >= RM", "SM", "RM"))


def report(work: Path) -> None:
    outcomes = -np.load(work / "truth.npz")["losses"].astype(np.float64)
    found: dict[tuple[str, int | None], Judged] = {}
    for path in (work / "table").glob("*.npz"):
        one = judge(path, outcomes)
        found[one.facts["name"], one.facts["k"]] = one
    timing = {
        device: json.loads((work / f"seconds-{device}.json").read_text())
        for device in TIMED
        if (work / f"seconds-{device}.json").exists()
    }
    took = {device: with_learned(each["found"]) for device, each in timing.items()}
    rows = [one.document() for one in found.values()]
    rows.sort(key=lambda row: (row["k"] or 0, -row["lds"]["mean"]))
    document = {
        "queries": f"9/10 of {outcomes.shape[2]}; the damping of each entry is the best on the other tenth",
        "halves": outcomes.shape[0], "seeds": outcomes.shape[1], "ceiling": ceiling(outcomes),
        "orderings": orderings(CLAIMS, [side * side for side in SIDES], found, took),
        "compression seconds": timing, "lds": rows,
    }  # fmt: skip
    save("grass_text", document)
    plot(rows, Path(__file__).parent.parent / "docs" / "grass_text.png")


def with_learned(found: dict[str, float]) -> dict[str, float]:
    """A learned mask costs what a random one does."""
    return found | {key.replace("RM", "SM"): value for key, value in found.items() if "RM" in key}


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """LDS with its interval: the compressors by k_l, and what needs no such size as bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10.4, 4.2), width_ratios=(3, 2))
    names = list(dict.fromkeys(row["name"] for row in rows if row["k"] is not None and "rows" not in row["name"]))
    for name in names:
        points = sorted((row["k"], row["lds"]["mean"]) for row in rows if row["name"] == name)
        left.plot(*zip(*points, strict=True), "o-", label=name, markersize=4)
    left.set(xscale="log", xlabel="$k_l$")
    left.set_xticks([side * side for side in SIDES], [f"{side * side:,}" for side in SIDES])
    left.minorticks_off()
    left.set(ylabel="LDS", title="Factorised compressors, block Fisher")
    left.legend(fontsize=8, frameon=False)
    others = [row for row in rows if row["k"] is None or "rows" in row["name"]]
    others.sort(key=lambda row: -row["lds"]["mean"])
    places = np.arange(len(others))
    judged = [row["lds"] for row in others]
    means = [each["mean"] for each in judged]
    right.bar(places, means, yerr=whiskers(judged), color="C7", error_kw={"elinewidth": 0.8})
    right.set_xticks(places, [row["name"] for row in others], rotation=60, ha="right", fontsize=8)
    right.set_title("Beside them")
    for axis in (left, right):
        axis.grid(alpha=0.25, axis="y")
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", help="entries whose name begins so")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--part", default="0/1", help="I/N: this process is the I-th of N, from 0")
    parser.add_argument("--seconds", action="store_true", help="only time the compression")
    parser.add_argument("--report", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    exact_float32()
    work = given.work.resolve() / MODEL
    if given.report:
        report(work)
    elif given.seconds:
        found = {"on": machine(given.device), "examples a call": TIMED[given.device], "found": seconds(given.device)}
        if given.device == "cpu":
            found["FactGraSS over LoGRA"] = ratios()
        (work / f"seconds-{given.device}.json").write_text(json.dumps(found))
        print(json.dumps(found), flush=True)
    else:
        if not (work / "table" / "random.npz").exists():
            references(work)
        chosen = [unit for unit in units(work) if unit[0].name.startswith(given.only or "")]
        at_hand = [each for unit in chosen for each in unit if each.at_hand]
        first = given.part.startswith("0/")
        if first:
            measure_compressed(work, [each for each in at_hand if not each.mask], given.device)
        rest = [left for unit in chosen if (left := [each for each in unit if not each.at_hand])]
        together.each(together.share(rest, given.part), lambda unit: measure(work, unit, given.device))
        if first:  # learning masks takes longer than all else
            measure_compressed(work, [each for each in at_hand if each.mask], given.device)


if __name__ == "__main__":
    main()

"""Experiment (d) of GraSS: factorised compressors and their rivals on a GPT-2-style model and real text, by LDS.

In place of GPT-2 small on WikiText: the GPT-2 of 0.6 M parameters of ground_truth.py, 1,000 passages of State of the
Union speeches, 64 queries, 50 random halves, two seeds each; block-diagonal Fisher matrix of its 12 linear layers.
Everything goes through the package's own verbs. Damping: the best of a relative grid on a tenth of the queries, LDS
reported on the others, beside the method's default. TracIn: checkpoints after each of three epochs. Compression
seconds, one thread, as in Table 1 there: 4,656 examples of 512 positions at the layer shapes of GPT-2 small.

    python benchmarks/ground_truth.py --work DIR --model gpt2 --subsets 50
    python benchmarks/grass_text.py --work DIR              # interrupted, it resumes; about half an hour of one core
    python benchmarks/grass_text.py --work DIR --report     # results/grass_text.json and docs/grass_text.png
"""

import argparse
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ground_truth
import numpy as np
import torch
from environment import save
from lds import MAX_LENGTH, Truth, interval
from torch import nn

import influent
from influent.bind import bind
from influent.compress import Compress
from influent.gradients import Outer
from influent.layers import Block

GRID = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
SIDES = (16, 32, 64)  # k_l = 256, 1,024, 4,096
SHAPES = ((769, 2304), (769, 768), (769, 3072), (3073, 768))  # a block of GPT-2 small, biases as ones columns
BLOCKS, EXAMPLES, POSITIONS, TIMED = 12, 4656, 512, 4


@dataclass(frozen=True, slots=True)
class Entry:
    """One row of the table: `index` are options of the verb; dampings are tried where the curvature takes one."""

    name: str
    k: int | None
    index: dict[str, Any]
    curvature: str | None = None
    grid: tuple[float, ...] = GRID

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
    for size in ("3KiB", "11KiB", "43KiB"):
        yield Entry(f"LoRIF {size}", None, {"method": "lorif", "row_bytes": int(size[:-3]) * 1024}, "fim")
    whole: dict[str, Any] = {"compress": "id"}
    yield Entry("exact Fisher", None, whole, "fim")
    yield Entry("EK-FAC", None, whole, "ekfac")
    yield Entry("K-FAC", None, whole, "kfac")
    yield Entry("DataInf", None, whole, "datainf")
    yield Entry("GradDot", None, whole, "identity", ())
    yield Entry("TracIn", None, {"compress": "id", "method": "tracin", "checkpoints": True}, "identity", ())
    yield Entry("EK-FAC, LoGRA rows", 4096, {"compress": "gauss:64x64"}, "ekfac")


def learn(work: Path, path: Path) -> None:
    """A selective mask of side x side entries a layer, learned from the training rows; the side is its name."""
    influent.mask(
        str(work / "model"), str(work / "train.jsonl"), str(path), size=f"{path.name}x{path.name}",
        max_length=MAX_LENGTH,
    )  # fmt: skip


def checkpoints(work: Path) -> tuple[list[str], list[float]]:
    """The model after each epoch of the training on all rows, and the mean learning rate of the epoch."""
    setting = ground_truth.SETTINGS["gpt2"]
    folders = [work / "epochs" / str(epoch) for epoch in range(1, setting.epochs + 1)]
    if not all((folder / "config.json").exists() for folder in folders):
        corpus, tokenizer, model = ground_truth.prepare("gpt2", setting, work)
        if setting.linear:
            ground_truth.freeze_all_but_linear(model)
        rows = ground_truth.encode(corpus.train, tokenizer)
        train_and_keep(model, rows, setting, folders)
        for folder in folders:
            for file in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(work / "model" / file, folder / file)
    count = setting.epochs
    return [str(folder) for folder in folders], [setting.rate * (1 - (e + 0.5) / count) for e in range(count)]


def train_and_keep(model: nn.Module, ids: torch.Tensor, setting: Any, folders: list[Path]) -> None:
    """As ground_truth.train with seed 0, the model saved after each epoch."""
    rng = torch.Generator().manual_seed(0)
    adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=setting.rate, weight_decay=0)
    epochs = [torch.randperm(len(ids), generator=rng).split(ground_truth.BATCH) for _ in folders]
    total, step = sum(map(len, epochs)), 0
    for folder, batches in zip(folders, epochs, strict=True):
        for rows in batches:
            adam.param_groups[0]["lr"] = setting.rate * min(1, (step + 1) / 20) * (1 - step / total)
            adam.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = ground_truth.losses(model, ids[rows]).mean()
            loss.backward()
            adam.step()
            step += 1
        model.save_pretrained(folder)  # pyright: ignore[reportCallIssue]


def measure(work: Path, entry: Entry) -> None:
    """Scores at every damping, and at the default, in one file."""
    began = time.process_time()
    options, place = dict(entry.index), work / "indexes" / entry.file
    models = [str(work / "model")]
    if (mask := options.get("compress", "").partition(" ")[0].removeprefix("select:")).startswith("/"):
        learn(work, Path(mask))
    if options.pop("checkpoints", False):
        models, options["rates"] = checkpoints(work)
        options["checkpoints"] = models[1:]
    influent.index(models[0], str(work / "train.jsonl"), str(place), max_length=MAX_LENGTH, **options)
    indexed = time.process_time() - began
    found = {}
    for damping in (*entry.grid, None):
        path = place.with_suffix(".npy")
        influent.query(
            str(place), queries=str(work / "queries.jsonl"), curvature=entry.curvature, scores=str(path), k=1,
            damping=None if damping is None else f"relative:{damping}",
        )  # fmt: skip
        found["default" if damping is None else str(damping)] = np.load(path)
    size = influent.info(str(place))["bytes_per_row"] if "checkpoints" not in entry.index else None
    facts = {"name": entry.name, "k": entry.k, "bytes": size, "index cpu seconds": round(indexed, 1)}
    keep(work, entry.file, found, facts)
    shutil.rmtree(place)


def keep(work: Path, name: str, found: dict[str, np.ndarray], facts: dict[str, Any]) -> None:
    path = work / "table" / f"{name}.npz"
    path.parent.mkdir(exist_ok=True)
    with path.with_suffix(".part").open("wb") as file:
        np.savez(file, facts=json.dumps(facts), **found)
    path.with_suffix(".part").rename(path)
    print(json.dumps(facts), flush=True)


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
    keep(work, "BM25", {"default": words}, {"name": "BM25", "k": None})
    chance = np.random.default_rng(0).standard_normal(words.shape)
    keep(work, "random", {"default": chance}, {"name": "random", "k": None})


def seconds(work: Path) -> list[dict[str, Any]]:
    """CPU seconds of compressing EXAMPLES examples at the shapes of GPT-2 small, from the two sides of each layer."""
    out = []
    torch.manual_seed(0)
    for side in SIDES:
        k = side * side
        texts = drawn(side)
        spent = dict.fromkeys(texts, 0.0)
        for i, o in SHAPES:
            a, d = torch.randn(TIMED, POSITIONS, i), torch.randn(TIMED, POSITIONS, o)
            maps = {name: bind(Compress.parse(text), Block("x", "linear", i, o), 0) for name, text in texts.items()}
            best = dict.fromkeys(texts, float("inf"))
            for _ in range(7):
                for name, bound in maps.items():
                    began = time.process_time()
                    bound.join(Outer(bound.map_in(a), bound.map_out(d), bound.in_width, bound.out_width))
                    best[name] = min(best[name], time.process_time() - began)
            for name, value in best.items():
                spent[name] += value
        factor = BLOCKS * EXAMPLES / TIMED
        out += [{"k": k, "name": name, "seconds": round(value * factor, 1)} for name, value in spent.items()]
    return out


def report(work: Path) -> None:
    truth = Truth.load(work)
    order = np.random.default_rng(0).permutation(truth.gain.shape[1])
    chosen, rest = order[: len(order) // 10], order[len(order) // 10 :]
    rows = []
    for path in sorted((work / "table").glob("*.npz")):
        held = np.load(path)
        lds = {name: truth.lds(held[name]) for name in held.files if name != "facts"}
        tried = {name: value for name, value in lds.items() if name != "default"} or {"none": lds["default"]}
        best = max(tried, key=lambda name, tried=tried: tried[name][chosen].mean())
        low, high = interval(tried[best][rest])
        rows.append(
            {
                **json.loads(str(held["facts"])),
                "lds": round(float(tried[best][rest].mean()), 4),
                "low": round(low, 4),
                "high": round(high, 4),
                "damping": best,
                "lds at the default": round(float(lds["default"][rest].mean()), 4),
                "by damping": {name: round(float(value[rest].mean()), 4) for name, value in tried.items()},
            }
        )
    rows.sort(key=lambda row: (row["k"] or 0, -row["lds"]))
    save(
        "grass_text",
        {
            "subsets": len(truth.used),
            "seeds": truth.by_seed.shape[1],
            "rank correlation of two seeds": truth.reliability(),
            "lds": rows,
            "compression, CPU seconds": seconds(work),
        },
    )
    plot(rows, Path(__file__).parent.parent / "docs" / "grass_text.png")


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """LDS with its interval: the compressors by k_l, and what needs no such size as bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10.4, 4.2), width_ratios=(3, 2), sharey=True)
    names = list(dict.fromkeys(row["name"] for row in rows if row["k"] is not None and "rows" not in row["name"]))
    for name in names:
        points = sorted((row["k"], row["lds"]) for row in rows if row["name"] == name)
        left.plot(*zip(*points, strict=True), "o-", label=name, markersize=4)
    left.set(xscale="log", xticks=[s * s for s in SIDES], xticklabels=[s * s for s in SIDES], xlabel="$k_l$")
    left.set(ylabel="LDS", title="Factorised compressors, block Fisher")
    left.legend(fontsize=8, frameon=False)
    others = [row for row in rows if row["k"] is None or "rows" in row["name"]]
    others.sort(key=lambda row: -row["lds"])
    places = np.arange(len(others))
    spread = [[row["lds"] - row["low"] for row in others], [row["high"] - row["lds"] for row in others]]
    right.bar(places, [row["lds"] for row in others], yerr=spread, color="C7", error_kw={"elinewidth": 0.8})
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
    parser.add_argument("--report", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    work = given.work.resolve() / "gpt2"
    if given.report:
        report(work)
        return
    if not (work / "table" / "BM25.npz").exists():
        references(work)
    for entry in entries(work):
        if entry.name.startswith(given.only or "") and not (work / "table" / f"{entry.file}.npz").exists():
            measure(work, entry)


if __name__ == "__main__":
    main()

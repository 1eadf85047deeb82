"""Quality against size: the LDS of every codec over every projection at four sizes of a row, on three language models.

The ground truth of ground_truth.py must be in DIR. Each setting is the largest that fits the bytes of a row (all
layers together, as `--row-bytes` counts them), scored with the exact block-diagonal Fisher matrix of the rows as
stored. Damping: the best of a relative grid on a tenth of the queries, reported on the others; the default beside it.

    python benchmarks/frontier.py --work DIR --model llama     # gpt2, qwen; it resumes; an hour or two each
    python benchmarks/frontier.py --work DIR --report          # results/frontier.json and docs/frontier.png
"""

import argparse
import hashlib
import itertools
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import frontier_report
import numpy as np
import torch
from lds import Rows, bind, collect, compress, influence, products, records, stored

from influent import baselines
from influent.budget import Budget, row_bytes
from influent.codec import Codec
from influent.compress import LEAST, Compress
from influent.errors import SpecError

BUDGETS = (10_800, 2_700, 700, 43_200)  # bytes of a row; LoGRA's 16, 8, 4 and 32 a side in bfloat16 over 21 layers
MIDDLE, SMALL = BUDGETS[:2], BUDGETS[:3]
DAMPINGS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
SEEDS = (0, 1, 2)
PROJECTIONS = {
    "gauss": "gauss:{0}x{0}",
    "rademacher": "rademacher:{0}x{0}",
    "mask": "mask:{0}x{0}",
    "sjlt": "sjlt:{0}x{0}",
    # Gradient moments are the default of learned bases (as of 2026-11-22 07:13); the activations' are the other kind.
    "pca": "pca:{0}x{0}",
    "pca, kfac": "pca:{0}x{0},kfac",
    "whiten 1/4": "whiten:{0}x{0},p=0.25",
    "whiten 1/4, kfac": "whiten:{0}x{0},p=0.25,kfac",
    "whiten 1/2": "whiten:{0}x{0}",
    "whiten 1/2, shared": "whiten:{0},share",  # the numbers of a layer in the mean
    "whiten 1/2, kfac": "whiten:{0}x{0},kfac",
}
RULE = "rank:side/16:int4"
RULES = (RULE, "rank:side/8:int4", "rank:side/30:int4")
INT4 = ("rank:1:int4", "rank:2:int4", "rank:4:int4", "rank:8:int4", "rank:16:int4")
FLOAT = ("rank:1:bf16", "rank:4:bf16")
OTHER = ("dense:int8", "dense:int4", "dense:sign", "rank:4:int8", "rank:8:sign")
# Of a side the ranks that take at most half of the dense bytes, and of 32 and 16 those just below them too. By
# projection with the seeds.
RANDOM_RANKS = {64: (1, 4, 8, 16), 32: (1, 4, 8, 12, 14, 15), 16: (1, 4, 6, 7)}
LEARNED_RANKS = {64: (1, 2, 4, 8, 16), 32: (1, 2, 4, 8, 12), 16: (1, 2, 4, 6, 7)}
SAME_WIDTH = {"gauss": (RANDOM_RANKS, SEEDS), "whiten 1/2": (LEARNED_RANKS, SEEDS), "pca": (LEARNED_RANKS, SEEDS)}
LEARNED = tuple(name for name, text in PROJECTIONS.items() if re.match("(pca|whiten):.*x", text))
# Projections, codecs, seeds and budgets, the most important first. A learned basis's seed draws its sample.
GROUPS: tuple[tuple[Sequence[str], Sequence[str], Sequence[int], Sequence[int]], ...] = (
    (("gauss", "factgrass"), ("bf16",), (0,), BUDGETS),
    (("whiten 1/2",), (RULE,), (0,), BUDGETS),
    (("whiten 1/2, shared",), ("dense:sign",), (0,), SMALL),
    (("whiten 1/2, shared",), ("dense:sign",), (1, 2), SMALL[1:]),
    (("gauss", "factgrass"), ("bf16",), (1, 2), SMALL),
    (("whiten 1/2",), (RULE,), (1, 2), SMALL),
    (("whiten 1/2",), RULES, (0,), SMALL),
    (("whiten 1/4", "pca", "whiten 1/2, kfac"), ("rank:side/8:int4", RULE), (0,), MIDDLE),
    (("gauss",), ("rank:side/8:int4", "rank:1:int4"), (0,), SMALL),
    (("gauss",), ("rank:1:bf16", "rank:4:bf16"), (0,), MIDDLE),
    (("whiten 1/2",), ("dense:sign", "dense:int4", "bf16"), (0,), SMALL),
    (("whiten 1/2",), ("dense:sign",), (1, 2), SMALL),
    (("gauss",), (RULE,), (0,), MIDDLE),
    (("whiten 1/2",), INT4, (0,), MIDDLE[::-1]),
    (("pca", "mask", "sjlt"), (RULE,), (0,), MIDDLE),
    (("mask", "sjlt"), ("rank:8:int4", "bf16", "rank:4:bf16"), (0,), MIDDLE),
    (("whiten 1/2",), (*FLOAT, *OTHER), (0,), MIDDLE),
    (("gauss",), (*INT4, *FLOAT, *OTHER), (0,), MIDDLE),
    (LEARNED, (RULE, "bf16"), (0,), SMALL),
    (("gauss", "whiten 1/2", "whiten 1/2, kfac"), (*INT4, *FLOAT, *OTHER), (0,), SMALL),
    (("mask", "sjlt", "rademacher"), (RULE, *INT4, *FLOAT, "bf16", "dense:int4"), (0,), SMALL),
)
SAME_WIDTH_AFTER = 11  # groups
MIN_SHARE = 0.55  # of the budget; a setting that cannot use more has run out of layer


@dataclass(frozen=True, slots=True)
class Entry:
    """One setting: compressor and codec by text, and the seed of the maps; `budget` None is a comparison at one D."""

    projection: str
    codec: str
    compress: str
    rows: str
    seed: int = 0
    budget: int | None = None

    @property
    def name(self) -> str:
        return hashlib.blake2b(json.dumps(asdict(self)).encode(), digest_size=8).hexdigest()


class Bench:
    """One model and its gradients; scores go to the folder's `scores`."""

    def __init__(self, folder: Path):
        self.folder, self.gradients = folder, collect(folder, SEEDS)
        self._projected: tuple[Any, Rows, Rows] = (None, {}, {})

    def bytes(self, compress: str, rows: str) -> int:
        return row_bytes(Compress.parse(compress), Codec.parse(rows), self.gradients.plan)

    def projected(self, text: str, seed: int) -> tuple[Rows, Rows]:
        """Rows and queries through a compressor; the last ones are kept."""
        if self._projected[0] != (text, seed):
            bound = bind(self.gradients, text, seed)
            train, queries = (compress(x, bound) for x in self.sides())
            self._projected = ((text, seed), train, queries)
        return self._projected[1:]

    def sides(self) -> tuple[Rows, Rows]:
        return self.gradients.train, self.gradients.queries

    def measure(self, entry: Entry) -> None:
        began = time.time()
        rows, queries = self.projected(entry.compress, entry.seed)
        compressor, codec = Compress.parse(entry.compress), Codec.parse(entry.rows)
        shared = compressor.shared is not None  # dense rows, which need no factors
        factors = {block.name: None if shared else compressor.factors(block) for block in self.gradients.plan.blocks}
        kept, captured = stored(rows, codec, factors)
        scores = influence(kept, queries, DAMPINGS)
        size = self.bytes(entry.compress, entry.rows)
        self.save(entry, scores, bytes=size, captured=round(captured, 4), seconds=round(time.time() - began, 1))

    def save(self, entry: Entry, scores: dict[Any, np.ndarray], **facts: Any) -> None:
        """One file a setting, complete or not there: the scores [Q, N] at each damping, from which all else follows."""
        path = self.folder / "scores" / f"{entry.name}.npz"
        path.parent.mkdir(exist_ok=True)
        document = json.dumps({"entry": asdict(entry), **facts})
        with path.with_suffix(".part").open("wb") as file:
            np.savez(
                file, facts=document, **{str(damping): each.astype(np.float32) for damping, each in scores.items()}
            )
        path.with_suffix(".part").rename(path)
        print(document, flush=True)

    def has(self, entry: Entry) -> bool:
        return (self.folder / "scores" / f"{entry.name}.npz").exists()


def factgrass(side: int) -> str:
    return f"mask:{2 * side}x{2 * side} | sjlt:{side * side}"


def largest(bench: Bench, projection: str, codec: str, budget: int, seed: int) -> Entry | None:
    """The largest setting within the budget, if it makes use of it. Signs are taken of rotated sides."""
    sized: Callable[[int], str] = factgrass if projection == "factgrass" else PROJECTIONS[projection].format
    turn = " | rotate" if codec.endswith(":sign") else ""
    try:
        text, rows = Budget(
            budget,
            lambda side: sized(max(LEAST, side) if "share" in sized(side) else side) + turn,
            lambda side: re.sub(r"side/(\d+)", lambda found: str(max(1, side // int(found[1]))), codec),
        ).choose(bench.gradients.plan)
    except SpecError:  # not even one number a layer fits
        return None
    rows = str(Codec.parse(rows))
    used = bench.bytes(text, rows) > MIN_SHARE * budget
    return Entry(projection, codec, text, rows, seed, budget) if used else None


def entries(bench: Bench) -> Iterator[Entry]:
    """What is measured, the most important first."""
    yield Entry("id", "float32", "id", "float32")
    yield Entry("id", "bf16", "id", "bfloat16")
    for number, (projections, codecs, seeds, budgets) in enumerate(GROUPS):
        for budget, projection, codec, seed in itertools.product(budgets, projections, codecs, seeds):
            entry = largest(bench, projection, codec, budget, seed)
            if entry is not None:
                yield entry
        if number + 1 == SAME_WIDTH_AFTER:
            yield from same_width()


def same_width() -> Iterator[Entry]:
    """At one D: dense rows and rows of rank c, of random maps and of learned bases."""
    for seed, (projection, (widths, seeds)) in itertools.product(SEEDS, SAME_WIDTH.items()):
        for side, ranks in widths.items() if seed in seeds else ():
            # --row-bytes takes the first
            few = tuple(f"rank:{side // of}:int4" for of in (16, 8)) if projection == "whiten 1/2" else ()
            for codec in ("bf16", *(f"rank:{c}:bf16" for c in ranks), *few):
                yield Entry(projection, codec, PROJECTIONS[projection].format(side), str(Codec.parse(codec)), seed)


def references(bench: Bench) -> None:
    """What needs no curvature or no model."""
    train, queries = (records(bench.folder / f"{name}.jsonl") for name in ("train", "queries"))

    class Texts:
        def texts(self) -> Iterator[str]:
            return (row["text"] for row in train)

    words = np.zeros((len(queries), len(train)))
    for place, found in enumerate(baselines.bm25(Texts(), [row["text"] for row in queries], k=len(train))):
        for row, score in found:
            words[place, row] = score
    found = {"graddot": products(*bench.sides()), "bm25": words}
    for seed in range(3):
        found[f"random {seed}"] = np.random.default_rng(seed).standard_normal(words.shape)
    for name, scores in found.items():
        if not bench.has(entry := Entry(name, "none", "none", "none")):
            bench.save(entry, {"none": scores})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", choices=("llama", "gpt2", "qwen"))
    parser.add_argument("--one-width", action="store_true", help="only what is compared at one D")
    parser.add_argument("--report", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.report:
        frontier_report.write(given.work)
        return
    bench = Bench(given.work / given.model)
    references(bench)
    for entry in same_width() if given.one_width else entries(bench):
        if not bench.has(entry):
            bench.measure(entry)


if __name__ == "__main__":
    main()

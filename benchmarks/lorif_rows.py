"""Dense projected gradients of real text on SmolLM2-135M, for the benchmarks that store them in different ways.

One pass over 2,000 BBC news openings and 256 held-out passages (64 tokens each) gives the rows of `rademacher:/16` and
`rademacher:/32` together, because a pass costs far more than two projections. Kept in pieces: interrupted, it resumes.
`python benchmarks/lorif_rows.py --work DIR [--rows 2000]`
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from influent import extract, fetch, sides
from influent.bind import Bound
from influent.compress import Compress
from influent.layers import Plan, Site, plan
from influent.records import read_examples
from influent.task import CausalLM, Part

FACTORS = (16, 32)
LENGTH, QUERIES, PIECE, BATCH = 64, 256, 64, 16


class Several:
    """A visitor that makes rows under several compressors in one pass."""

    def __init__(self, bounds: dict[str, dict[str, Bound]]) -> None:
        self.each = {name: extract.Rows(bound) for name, bound in bounds.items()}

    def enter(self, site: Site, side: Any) -> Any:
        return [rows.enter(site, side) for rows in self.each.values()]

    def leave(self, site: Site, kept: Any, d: Tensor) -> None:
        for rows, side in zip(self.each.values(), kept, strict=True):
            rows.leave(site, side, d)

    def vector(self, site: Site, gradient: Tensor) -> None:
        for rows in self.each.values():
            rows.vector(site, gradient)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=2000)
    arguments = parser.parse_args()
    collect(arguments.work, arguments.rows)


def collect(work: Path, num_rows: int) -> None:
    """Write work/train-NNN.pt and work/queries-NNN.pt: {compressor: {block: [n, K] float32}}."""
    work.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("medium")
    folder = fetch.smollm2()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    task = CausalLM(AutoTokenizer.from_pretrained(folder), max_length=LENGTH)
    tracked = plan(model)
    compressors = {f: Compress.parse(f"rademacher:/{f}") for f in FACTORS}
    bounds = {f"f{f}": {b.name: c.bind(b, 0) for b in tracked.blocks} for f, c in compressors.items()}
    train, queries = passages(task, num_rows)
    with extract.frozen(model):
        for name, parts in (("queries", queries), ("train", train)):
            for number, lo in enumerate(range(0, len(parts), PIECE)):
                path = work / f"{name}-{number:03d}.pt"
                if not path.exists():
                    start = time.perf_counter()
                    made = rows_of(model, task, tracked, bounds, parts[lo : lo + PIECE])
                    torch.save(made, path.with_suffix(".tmp"))
                    path.with_suffix(".tmp").rename(path)
                    print(path.name, f"{time.perf_counter() - start:.1f} s", flush=True)


def passages(task: CausalLM, num_rows: int) -> tuple[list[Part], list[Part]]:
    """The first LENGTH tokens of `num_rows` documents, and later passages of the other documents."""
    documents = [task.parts(example.content) for example in read_examples(str(fetch.bbc()))]
    full = [[part for part in parts if part.length == LENGTH] for parts in documents]
    full = [parts for parts in full if parts]
    order = torch.randperm(len(full), generator=torch.Generator().manual_seed(0)).tolist()
    train = [full[i][0] for i in order[:num_rows]]
    held_out = [part for i in order[num_rows:] for part in full[i][:3]]
    return train, held_out[:QUERIES]


def rows_of(
    model: Any, task: CausalLM, tracked: Plan, bounds: dict[str, dict[str, Bound]], parts: list[Part]
) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, list[Tensor]]] = {name: {key: [] for key in bound} for name, bound in bounds.items()}
    for lo in range(0, len(parts), BATCH):
        batch = task.collate(parts[lo : lo + BATCH])
        visitor = Several(bounds)
        with torch.enable_grad(), extract.hooked(tracked, visitor, sides.Batch(*batch["input_ids"].shape)):
            task.loss(model, batch).sum().backward()
        for name, rows in visitor.each.items():
            for key, row in rows.rows.items():
                found[name][key].append(row)
    return {name: {key: torch.cat(rows) for key, rows in by_key.items()} for name, by_key in found.items()}


def load(work: Path, part: str, compressor: str) -> Iterator[dict[str, Tensor]]:
    """The pieces of `train` or `queries` under `f16` or `f32`: block -> [n, K]."""
    for path in sorted(work.glob(f"{part}-*.pt")):
        yield torch.load(path, mmap=True)[compressor]


if __name__ == "__main__":
    main()

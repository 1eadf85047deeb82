"""Compression alone: FactGraSS against LoGRA on the layer shapes of Llama-3.1-8B, 1,024 positions.

As in the hooks, the input side is mapped in one step and the output side is mapped and joined in another; a method's
time is the sum of the two. A mask that reads 1 number in 32 is bound by memory and not by arithmetic, so there are
three conditions: `repeated`, the same call several times in a row, as microbenchmarks do; `fresh`, the side written
just before the call, as the model does; `cold`, 200 MB of other memory swept before the call. Blocks of the two
methods alternate; a figure is the ratio of the medians' sums over the shapes.
`python benchmarks/compression.py [--threads 1] [--repeats 2]`
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from environment import save
from torch import Tensor

from influent.bind import Bound, bind
from influent.compress import Compress
from influent.gradients import Outer
from influent.layers import Block

SHAPES = [(4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)]
SIZES = [256, 1024, 4096]
POSITIONS = 1024
CALLS, WARMING = 12, 4  # a working set between two caches takes several calls to settle in the larger one
SWEEP_FLOATS = 50_000_000  # 200 MB, more than the last cache


def compressors(k: int) -> dict[str, str]:
    side = int(k**0.5)
    return {"factgrass": f"mask:{2 * side}x{2 * side} | sjlt:{k}", "logra": f"gauss:{side}x{side}"}


def block(step: Callable[[], object], prepare: Callable[[], object] | None) -> list[float]:
    """Seconds of a block of CALLS calls, each prepared, after WARMING more."""
    out = []
    for _ in range(CALLS + WARMING):
        if prepare is not None:
            prepare()
        start = time.perf_counter()
        step()
        out.append(time.perf_counter() - start)
    return out[WARMING:]


def measure(shape: tuple[int, int], k: int, *, repeats: int, condition: str, sweep: Tensor) -> dict[str, float]:
    """Seconds of each method on one shape: the medians of its two steps, added."""
    in_width, out_width = shape
    a, d = torch.randn(1, POSITIONS, in_width), torch.randn(1, POSITIONS, out_width)
    layer = Block("layer", "linear", in_width, out_width)
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in compressors(k)}
    maps = {name: bind(Compress.parse(text), layer, 0) for name, text in compressors(k).items()}
    ready = {
        "repeated": (None, None),
        "fresh": (lambda: a.mul_(1.0), lambda: d.mul_(1.0)),
        "cold": (lambda: sweep.add_(1.0), lambda: sweep.add_(1.0)),
    }[condition]
    for _ in range(repeats):
        for name, bound in maps.items():
            kept = bound.map_in(a)
            times[name][0].extend(block(lambda m=bound: m.map_in(a), ready[0]))
            times[name][1].extend(block(lambda m=bound, kept=kept: leave(m, kept, d), ready[1]))
    return {name: statistics.median(first) + statistics.median(second) for name, (first, second) in times.items()}


def leave(bound: Bound, kept: Tensor, d: Tensor) -> Tensor:
    return bound.join(Outer(kept, bound.map_out(d), bound.in_width, bound.out_width))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    totals, shapes = [], []
    sweep = torch.zeros(SWEEP_FLOATS)
    for condition in ("repeated", "fresh", "cold"):
        for precision in ("highest", "medium"):
            torch.set_float32_matmul_precision(precision)
            for k in SIZES:
                setting = {"condition": condition, "matmul": precision, "k": k}
                found = [
                    measure(shape, k, repeats=arguments.repeats, condition=condition, sweep=sweep) for shape in SHAPES
                ]
                for (in_width, out_width), medians in zip(SHAPES, found, strict=True):
                    shapes.append({**setting, "in": in_width, "out": out_width, "seconds": medians})
                total = {name: sum(medians[name] for medians in found) for name in compressors(k)}
                totals.append({**setting, "seconds": total, "ratio": total["logra"] / total["factgrass"]})
    save("compression", {"positions": POSITIONS, "summed_over_shapes": totals, "shapes": shapes})


if __name__ == "__main__":
    main()

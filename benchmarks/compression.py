"""Compression alone: FactGraSS against LoGRA on the layer shapes of Llama-3.1-8B, 1,024 positions.

Two conditions, because a mask that reads 1 number in 32 is bound by memory and not by arithmetic: `warm`, the sides
just produced, as in a hook (each method is called several times in a row on the same sides); and `cold`, the caches
swept before every call. Blocks of the two methods alternate; a figure is the ratio of the medians' sums over the
shapes. `python benchmarks/compression.py [--threads 1] [--repeats 15]`
"""

import argparse
import statistics
import time

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
CALLS = 4
SWEEP_FLOATS = 50_000_000  # 200 MB, more than the last cache


def compressors(k: int) -> dict[str, str]:
    side = int(k**0.5)
    return {"factgrass": f"mask:{2 * side}x{2 * side} | sjlt:{k}", "logra": f"gauss:{side}x{side}"}


def seconds(bound: Bound, a: Tensor, d: Tensor, *, sweep: Tensor | None) -> list[float]:
    """A block of CALLS calls on the same sides."""
    out = []
    for _ in range(CALLS):
        if sweep is not None:
            sweep.add_(1.0)
        start = time.perf_counter()
        bound.join(Outer(bound.map_in(a), bound.map_out(d), bound.in_width, bound.out_width))
        out.append(time.perf_counter() - start)
    return out


def measure(shape: tuple[int, int], k: int, *, repeats: int, sweep: Tensor | None) -> dict[str, float]:
    """Median seconds of each method on one shape."""
    in_width, out_width = shape
    a, d = torch.randn(1, POSITIONS, in_width), torch.randn(1, POSITIONS, out_width)
    block = Block("layer", "linear", in_width, out_width)
    maps = {name: bind(Compress.parse(text), block, 0) for name, text in compressors(k).items()}
    times: dict[str, list[float]] = {name: [] for name in maps}
    for repeat in range(repeats + 1):
        for name, bound in maps.items():
            taken = seconds(bound, a, d, sweep=sweep)
            times[name] += taken[1:] if repeat else []  # a block's first call warms; so does the first block
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    totals, shapes = [], []
    for condition, sweep in (("warm", None), ("cold", torch.zeros(SWEEP_FLOATS))):
        for precision in ("highest", "medium"):
            torch.set_float32_matmul_precision(precision)
            for k in SIZES:
                setting = {"condition": condition, "matmul": precision, "k": k}
                found = [measure(shape, k, repeats=arguments.repeats, sweep=sweep) for shape in SHAPES]
                for (in_width, out_width), medians in zip(SHAPES, found, strict=True):
                    shapes.append({**setting, "in": in_width, "out": out_width, "seconds": medians})
                total = {name: sum(medians[name] for medians in found) for name in compressors(k)}
                totals.append({**setting, "seconds": total, "ratio": total["logra"] / total["factgrass"]})
                print({**setting, "ratio": round(totals[-1]["ratio"], 2)}, flush=True)
    save("compression", {"positions": POSITIONS, "summed_over_shapes": totals, "shapes": shapes})


if __name__ == "__main__":
    main()

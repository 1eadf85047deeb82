"""What scoring one block costs: each kernel for rows of pairs, and the decoding of each row codec.

Nanoseconds per row and query, one thread, the least of several repeats. `between` puts a query's matrix between a
row's pairs, `whole` forms the rows, `cut:K` is for queries of rank K, `chosen` is what `score` would take. Decoding is
nanoseconds per number and milliseconds per stored MB, with and without the product with one query.
`python benchmarks/kernels.py [--repeats 3]`
"""

import argparse
import itertools
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from environment import save

from influent.codec import FLOATS, PER_BYTE, Codec
from influent.coding import decode, encode
from influent.gradients import LowRank
from influent.kernels import CHUNK_NUMBERS, Sums, _add_between, _add_cut, _add_whole, prepare

QUERIES = (1, 4, 16, 64, 256)
RANKS = (1, 4, 8)
SHAPES = ((36, 36), (36, 96), (64, 64))
CUTS = (4, 8)
ROW_QUERIES = 1 << 15  # scores made by one timed call, at most
CHUNK, WIDTH, NUMBERS = 128, 4096, 1 << 22


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    grid = itertools.product(SHAPES, RANKS, QUERIES)
    rows = [kernels(shape, rank, queries, repeats) for shape, rank, queries in grid]
    decoded = [decoding(bits, repeats) for bits in (*FLOATS, *PER_BYTE)]
    # Other work on the machine shows in the larger figures; the ratios of neighbours are what the switch rests on.
    save("kernels", {"load": os.getloadavg()[0], "kernels": rows, "decoding": decoded})


def least(call: Callable[[], object], repeats: int) -> float:
    call()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def kernels(shape: tuple[int, int], rank: int, num_queries: int, repeats: int) -> dict[str, Any]:
    (a, b), q = shape, torch.randn(num_queries, shape[0] * shape[1])
    whole, cuts = prepare(q, shape, None), {k: prepare(q, shape, k).cut for k in CUTS}
    calls = {
        "between": (rank * (a + b), lambda into, row: _add_between(Sums(into), row, q)),
        "whole": (a * b, lambda into, row: _add_whole(into, row, q)),
    }
    for k, cut in cuts.items():
        held = rank * (a + b + 2 * num_queries * k)
        calls[f"cut:{k}"] = (held, lambda into, row, cut=cut: _add_cut(into, row, cut))
    ns = {}
    for name, (held, call) in calls.items():
        num_rows = max(16, min(CHUNK_NUMBERS // held, ROW_QUERIES // num_queries))  # as score cuts them
        row = LowRank(torch.randn(num_rows, rank, b), torch.randn(num_rows, rank, a))
        scores = torch.zeros(num_queries, num_rows, dtype=torch.float64)
        seconds = least(lambda call=call, scores=scores, row=row: call(scores, row), repeats)
        ns[name] = round(1e9 * seconds / num_rows / num_queries, 1)
    chosen = whole._cheapest(rank, a, b)[0]
    return {"factors": list(shape), "rank": rank, "queries": num_queries, "ns": ns, "chosen": chosen}


def decoding(bits: str, repeats: int) -> dict[str, Any]:
    codec = Codec(None, bits)
    tensors = encode(codec, torch.randn(NUMBERS // WIDTH, WIDTH), None, key="k").tensors
    q = torch.randn(1, WIDTH)

    def each(use: Callable[[torch.Tensor], object]) -> None:
        for lo in range(0, NUMBERS // WIDTH, CHUNK):
            part = {name: x[lo : lo + CHUNK] for name, x in tensors.items()}
            use(decode(codec, part, "k", WIDTH, None).to(torch.float32).flat())

    alone, scored = least(lambda: each(lambda g: g), repeats), least(lambda: each(lambda g: q @ g.T), repeats)
    size = sum(x.numel() * x.element_size() for x in tensors.values()) / 1e6
    return {
        "bits": bits,
        "decode_ns_per_number": round(1e9 * alone / NUMBERS, 3),
        "score_ns_per_number": round(1e9 * scored / NUMBERS, 3),
        "decode_ms_per_mb": round(1e3 * alone / size, 2),
        "score_ms_per_mb": round(1e3 * scored / size, 2),
    }


if __name__ == "__main__":
    main()

"""What scoring one block costs: each kernel for rows of pairs, and dense rows of each codec.

Nanoseconds of CPU time per row and query, one thread, the least of several repeats. `between` puts a query's matrix
between a row's pairs, `whole` forms the rows, `cut:K` is for queries of rank K, `chosen` is what `score` would take. Of
dense rows: nanoseconds per number and per stored byte, `score N` for N queries on the integer codes where a codec has
them, `unpack N` through float32.
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
from influent.gradients import LowRank, Row
from influent.kernels import CHUNK_NUMBERS, Sums, _add_between, _add_cut, _add_whole, prepare

QUERIES = (1, 4, 16, 64, 256)
RANKS = (1, 4, 8)
SHAPES = ((36, 36), (36, 96), (64, 64))
CUTS = (4, 8)
ROW_QUERIES = 1 << 15  # scores made by one timed call, at most
CHUNK, WIDTH, NUMBERS = 512, 4096, 1 << 22  # rows at a time as score cuts them
CODEC_QUERIES = (1, 16)


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
        start = time.process_time()
        call()
        seconds.append(time.process_time() - start)
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
    """Dense rows of one codec: unpacking alone, and scoring as it is done here ("score") and by unpacking."""
    codec = Codec(None, bits)
    tensors = encode(codec, torch.randn(NUMBERS // WIDTH, WIDTH), None, key="k").tensors
    size = sum(x.numel() * x.element_size() for x in tensors.values())

    def each(use: Callable[[Row], object]) -> float:
        def run() -> None:
            for lo in range(0, NUMBERS // WIDTH, CHUNK):
                part = {name: x[lo : lo + CHUNK] for name, x in tensors.items()}
                use(decode(codec, part, "k", WIDTH, None))

        return 1e9 * least(run, repeats)

    found: dict[str, Any] = {"bits": bits, "bytes_per_number": round(size / NUMBERS, 4)}
    found["decode_ns_per_number"] = round(each(lambda row: row.to(torch.float32)) / NUMBERS, 3)
    for num_queries in CODEC_QUERIES:
        q, into = torch.randn(num_queries, WIDTH), torch.zeros(num_queries, CHUNK, dtype=torch.float64)
        ways = {"unpack": prepare(q, None, None)}
        if codec.packed:
            ways["score"] = prepare(q, None, None, bits=bits)
        for name, asked in ways.items():
            ns = each(lambda row, asked=asked, into=into: asked.add(Sums(into), row))
            found[f"{name} {num_queries}"] = {
                "ns_per_number": round(ns / NUMBERS, 3), "ns_per_byte": round(ns / size, 3)
            }  # fmt: skip
    return found


if __name__ == "__main__":
    main()

"""What scoring one block costs: each kernel for rows of pairs, and dense rows of each codec.

Nanoseconds of CPU time per row and query, one thread, the least of several repeats. `between` puts a query's matrix
between a row's pairs, `whole` forms the rows, `cut:K` is for queries of rank K, `chosen` is what `score` would take. Of
dense rows, as many bytes of each codec: nanoseconds per number and per stored byte for N queries, `unpack N` through
float32, `digits N` and `compiled N` on the integer codes, `tiles N` on the processor's matrix tiles, and `score N` as
`score` chooses without tiles. Of pairs, as many bytes of each codec, too: `tiles N`, `score N` without them, and `plain
N` without compiled loops. Dense rows of the same bytes in all codecs: nanoseconds a row and layer.
`python benchmarks/kernels.py [--repeats 3]`
"""

import argparse
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from environment import save

from influent import compiled, digits
from influent.asking import FETCH_NUMBERS
from influent.codec import FLOATS, PER_BYTE, Codec
from influent.coding import decode, encode
from influent.digits import Digits
from influent.gradients import LowRank, Row
from influent.kernels import (
    CHUNK_NUMBERS,
    TILED,
    BlockQueries,
    Sums,
    _add_between,
    _add_cut,
    _add_whole,
    _cheapest,
    prepare,
)
from influent.pairprograms import PairProgram
from influent.products import Products
from influent.programs import Program
from influent.tileproducts import DenseProgram

QUERIES = (1, 4, 16, 64, 256)
RANKS = (1, 4, 8)
SHAPES = ((36, 36), (36, 96), (64, 64))
CUTS = (4, 8)
ROW_QUERIES = 1 << 15  # scores made by one timed call, at most
WIDTH, ROW_BYTES = 4096, 1 << 23
BLOCKS = 16  # of pairs, each a sixteenth of the bytes, which a program scores in one call as those of an index
BITS, DECODE = (*FLOATS, *PER_BYTE), "decode_ns_per_number"
CODEC_QUERIES = (1, 4, 16, 64)
SIZES = (32, 128, 512)  # bytes of a row in one layer: LoGRA's 4, 8 and 16 a side in bfloat16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    grid = itertools.product(SHAPES, RANKS, QUERIES)
    rows = [kernels(shape, rank, queries, repeats) for shape, rank, queries in grid]
    decoded = codecs(repeats)
    packed = [row for shape in SHAPES for rank in RANKS[:2] for row in pairs(shape, rank, repeats)]
    equal = [row for size in SIZES for row in same_bytes(size, repeats)]
    # Other work on the machine shows in the larger figures; the ratios of neighbours are what the switch rests on.
    found = {"kernels": rows, "decoding": decoded, "pairs": packed, "rows of the same bytes": equal}
    save("kernels", {"load": os.getloadavg()[0], **found})


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
    cuts = {k: prepare(q, shape, k).cut for k in CUTS}
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
    chosen = _cheapest(num_queries, None, rank, a, b)[0]
    return {"factors": list(shape), "rank": rank, "queries": num_queries, "ns": ns, "chosen": chosen}


def codecs(repeats: int) -> list[dict[str, Any]]:
    """Dense rows of each codec, as many bytes of each: unpacking alone, and scoring in each way that there is."""
    found = [{"bits": bits, "bytes_per_number": 1 / PER_BYTE.get(bits, 1 / FLOATS.get(bits, 1))} for bits in BITS]
    timed = [(into, *each) for into in found for each in ways(into["bits"])]
    for (into, name, _), seconds in zip(timed, in_turn([call for *_, call in timed], repeats), strict=True):
        ns = 1e9 * seconds / ROW_BYTES
        numbers = round(ns * into["bytes_per_number"], 3)
        into[name] = numbers if name == DECODE else {"ns_per_number": numbers, "ns_per_byte": round(ns, 3)}
    return found


def pairs(factors: tuple[int, int], rank: int, repeats: int) -> list[dict[str, Any]]:
    """Rows of pairs of each codec, as many bytes of each; nanoseconds per stored byte."""
    found = [{"factors": list(factors), "rank": rank, "bits": bits} for bits in ("bfloat16", *PER_BYTE)]
    timed = [(into, *each) for into in found for each in pair_ways(Codec(rank, into["bits"]), factors)]
    for (into, name, num_bytes, _), seconds in zip(timed, in_turn([c for *_, c in timed], repeats), strict=True):
        into[name] = round(1e9 * seconds / num_bytes, 3)
    return found


def pair_ways(codec: Codec, factors: tuple[int, int]) -> Iterator[tuple[str, int, Callable[[], object]]]:
    """What is timed of rows of pairs of one codec: (name, bytes, call)."""
    (a, b), width = factors, factors[0] * factors[1]
    size = codec.row_bytes(width, factors)
    num_rows = max(1, ROW_BYTES // BLOCKS // size // 256) * 256
    some = encode(codec, torch.randn(256, width), factors, key="k").tensors
    tensors = {name: x.repeat(num_rows // 256, *[1] * (x.ndim - 1)) for name, x in some.items()}
    several = [{name: x.clone() for name, x in tensors.items()} for _ in range(BLOCKS)]
    step = FETCH_NUMBERS // (codec.rank or 1) // (a + b)  # as score cuts them
    for num_queries in CODEC_QUERIES[:3]:
        asked = prepare(torch.randn(num_queries, width), factors, None)
        scores = torch.zeros(num_queries, num_rows, dtype=torch.float64)

        def run(asked: BlockQueries = asked, scores: torch.Tensor = scores) -> None:
            for lo in range(0, num_rows, step):
                row = decode(codec, {name: x[lo : lo + step] for name, x in tensors.items()}, "k", width, factors)
                sums = Sums(scores[:, lo : lo + step])
                asked.add(sums, row)
                sums.close()

        def plain(run: Callable[[], None] = run) -> None:
            usable, compiled.usable = compiled.usable, lambda: False
            run()
            compiled.usable = usable

        yield f"score {num_queries}", num_rows * size, run
        if codec.packed and compiled.usable():
            yield f"plain {num_queries}", num_rows * size, plain
        if compiled.tiles_usable():
            blocks = [f"k{i}" for i in range(BLOCKS)]
            queries = [asked.whole] * BLOCKS
            program = PairProgram.of(blocks, queries, [factors] * BLOCKS, rank=codec.rank or 1, bits=codec.bits)
            yield f"tiles {num_queries}", BLOCKS * num_rows * size, by_program(program, num_queries, several)


def same_bytes(size: int, repeats: int) -> list[dict[str, Any]]:
    """Dense rows that take as many bytes of each codec, of BLOCKS layers in one call: nanoseconds a row and layer."""
    found = [{"bytes": size, "bits": bits} for bits in ("bfloat16", *PER_BYTE)] if compiled.tiles_usable() else []
    num_rows, timed = ROW_BYTES // BLOCKS // size, []
    for into in found:
        bits = into["bits"]
        width = size // FLOATS[bits] if bits in FLOATS else size * PER_BYTE[bits]
        some = encode(Codec(None, bits), torch.randn(256, width), None, key="k").tensors
        repeated = {name: x.repeat(num_rows // 256, *[1] * (x.ndim - 1)) for name, x in some.items()}
        blocks = [{name: x.clone() for name, x in repeated.items()} for _ in range(BLOCKS)]
        for num_queries in CODEC_QUERIES[:3]:
            q = [torch.randn(num_queries, width) for _ in blocks]
            program = DenseProgram.of([str(i) for i in range(BLOCKS)], q, bits)
            timed.append((into, f"tiles {num_queries}", by_program(program, num_queries, blocks)))
    for (into, name, _), seconds in zip(timed, in_turn([call for *_, call in timed], repeats), strict=True):
        into[name] = round(1e9 * seconds / num_rows / BLOCKS, 2)
    return found


def by_program(program: Program, num_queries: int, blocks: Sequence[dict[str, torch.Tensor]]) -> Callable[[], None]:
    """All rows' scores in one call."""
    names = ("k", "k.scale") if "k" in blocks[0] else ("k.v", "k.u", "k.scale")
    scores = torch.zeros(num_queries, len(blocks[0][names[0]]), dtype=torch.float64)

    def run() -> None:  # which holds the blocks whose addresses it gives
        program.add(scores, np.array([[x[name].data_ptr() if name in x else 0 for name in names] for x in blocks]))

    return run


def in_turn(calls: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """The least CPU seconds of each: one after the other, so that other work on the machine meets all of them."""
    least_of = [float("inf")] * len(calls)
    for _ in range(repeats + 1):
        for i, call in enumerate(calls):
            start = time.process_time()
            call()
            least_of[i] = min(least_of[i], time.process_time() - start)
    return least_of


def ways(bits: str) -> list[tuple[str, Callable[[], object]]]:
    """What is timed of one codec: (name, call)."""
    codec, size = Codec(None, bits), WIDTH * FLOATS[bits] if bits in FLOATS else WIDTH // PER_BYTE[bits]
    num_rows = ROW_BYTES // size
    some = encode(codec, torch.randn(256, WIDTH), None, key="k").tensors
    tensors = {name: x.repeat(num_rows // 256, *[1] * (x.ndim - 1)) for name, x in some.items()}
    step = FETCH_NUMBERS // (size if codec.packed else WIDTH)  # as score cuts them

    def each(use: Callable[[Row, int], object]) -> Callable[[], None]:
        def run() -> None:
            for lo in range(0, num_rows, step):
                part = {name: x[lo : lo + step] for name, x in tensors.items()}
                use(decode(codec, part, "k", WIDTH, None), lo)

        return run

    def numbers(row: Row, lo: int) -> None:
        for at in range(0, len(row), CHUNK_NUMBERS // WIDTH):
            row[at : at + CHUNK_NUMBERS // WIDTH].to(torch.float32)

    found: list[tuple[str, Callable[[], object]]] = [(DECODE, each(numbers))]
    for num_queries in CODEC_QUERIES:
        q, scores = torch.randn(num_queries, WIDTH), torch.zeros(num_queries, num_rows, dtype=torch.float64)
        asked = {"unpack": prepare(q, None, None)}
        if codec.packed:
            asked["score"] = prepare(q, None, None, bits=bits)
            if digits.usable():
                asked["digits"] = BlockQueries(q, coded=Digits.of(q, bits))
            if compiled.usable():
                asked["compiled"] = BlockQueries(q, coded=Products.of(q, bits))
        for name, way in asked.items():

            def add(row: Row, lo: int, way: BlockQueries = way, scores: torch.Tensor = scores) -> None:
                way.add(Sums(scores[:, lo : lo + len(row)]), row)

            found.append((f"{name} {num_queries}", each(add)))
        if bits in TILED and compiled.tiles_usable():
            program = DenseProgram.of(["k"], [q], bits)
            found.append((f"tiles {num_queries}", by_program(program, num_queries, [tensors])))
    return found


if __name__ == "__main__":
    main()

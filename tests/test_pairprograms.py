"""v^T X u of pairs by matrix tiles is the float64 one of the decoded pairs, whatever comes with them."""

import ctypes
import mmap
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from influent import compiled, pairprograms
from influent.codec import Codec
from influent.coding import decode, encode
from influent.gradients import LowRank, PackedPairs
from influent.pairprograms import PairProgram

pytestmark = pytest.mark.skipif(not compiled.tiles_usable(), reason="no llvmlite, or a machine without matrix tiles")

BITS = ["bfloat16", "int8", "int4", "sign"]
SHAPES = [(9, 7), (16, 16), (18, 18), (36, 96), (96, 36), (20, 144), (130, 35), (40, 5), (1, 64), (33, 31)]


def pairs(bits: str, n: int, rank: int, factors: tuple[int, int], seed: int = 0) -> LowRank | PackedPairs:
    a, b = factors
    u, v = (torch.randn(n, rank, side, generator=torch.Generator().manual_seed(seed + side)) for side in (b, a))
    if bits == "bfloat16":
        return LowRank(u.bfloat16(), v.bfloat16())
    codec = Codec(None, bits)
    coded = [encode(codec, side.flatten(0, 1), None, key="k").tensors["k"] for side in (u, v)]
    scale = torch.rand(n, rank, generator=torch.Generator().manual_seed(seed)).bfloat16()
    return PackedPairs(*(side.unflatten(0, (n, rank)) for side in coded), scale, bits, factors)


def asked(n: int, factors: tuple[int, int], seed: int = 7) -> torch.Tensor:
    return torch.randn(n, factors[0] * factors[1], generator=torch.Generator().manual_seed(seed))


def places(*rows: LowRank | PackedPairs) -> np.ndarray:
    scales = [row.scale.data_ptr() if isinstance(row, PackedPairs) else 0 for row in rows]
    return np.array([(row.v.data_ptr(), row.u.data_ptr(), at) for row, at in zip(rows, scales, strict=True)])


def added(row: LowRank | PackedPairs, q: torch.Tensor, bits: str) -> torch.Tensor:
    factors = (row.v.shape[2], row.u.shape[2]) if isinstance(row, LowRank) else row.factors
    scores = torch.zeros(len(q), len(row), dtype=torch.float64)
    PairProgram.of(["k"], [q], [factors], rank=row.u.shape[1], bits=bits).add(scores, places(row))
    return scores


def exact(row: LowRank | PackedPairs, q: torch.Tensor, *, sizes: bool = False) -> torch.Tensor:
    wide = row.to(torch.float64)
    u, v, x = wide.u, wide.v, q.double().unflatten(1, (wide.v.shape[2], wide.u.shape[2]))
    if sizes:
        u, v, x = u.abs(), v.abs(), x.abs()
    return torch.einsum("nca,qab,ncb->qn", v, x, u)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("factors", SHAPES)
@pytest.mark.parametrize("rank", [1, 3])
def test_products_are_those_of_the_decoded_pairs(bits, factors, rank):
    for n, num_queries in ((1, 1), (2, 3), (16, 1), (33, 2), (100, 1)):
        row, q = pairs(bits, n, rank, factors), asked(num_queries, factors)
        wide = row.to(torch.float64)
        squares = exact(LowRank(wide.u.square(), wide.v.square()), q.square())  # of independent products' sum
        assert bool(((added(row, q, bits) - exact(row, q)).abs() <= 1e-6 * squares.sqrt()).all())


@pytest.mark.parametrize("bits", BITS)
def test_rows_as_they_are_stored(bits):
    """The scales of encoded rows have both signs, and bfloat16 sides the roots of singular values."""
    x = torch.randn(50, 18 * 20, generator=torch.Generator().manual_seed(1))
    codec = Codec(2, bits)
    row = decode(codec, encode(codec, x, (18, 20), key="k").tensors, "k", 360, (18, 20))
    assert isinstance(row, LowRank | PackedPairs)
    q = asked(2, (18, 20))
    expected = exact(row, q)
    torch.testing.assert_close(added(row, q, bits), expected, rtol=0, atol=2e-6 * float(expected.std()))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("factors", [(96, 40), (36, 96), (700, 130)])
def test_the_error_is_within_what_the_module_promises(bits, factors):
    """Numbers of one sign, whose rounding errors do not cancel."""
    row, q = pairs(bits, 60, 1, factors), asked(2, factors).abs() + 1
    if isinstance(row, LowRank):
        row = LowRank(row.u.abs(), row.v.abs())
    bound = (3 * max(factors) / 32 + 32) * 2**-24
    assert bool(((added(row, q, bits) - exact(row, q)).abs() <= bound * exact(row, q, sizes=True)).all())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("factors", [(36, 96), (18, 18), (9, 7)])
def test_a_row_scores_the_same_to_the_bit_in_any_company(bits, factors, monkeypatch):
    row, q = pairs(bits, 131, 2, factors), asked(3, factors)
    whole = added(row, q, bits)
    assert torch.equal(torch.cat([added(row[i : i + 7], q, bits) for i in range(0, 131, 7)], dim=1), whole)
    assert torch.equal(added(row, q[1:2], bits), whole[1:2])
    monkeypatch.setattr(pairprograms, "MATRICES", 1)  # a query at a time
    monkeypatch.setattr(pairprograms, "SUMS", 100)  # few rows at a time
    assert torch.equal(added(row, q, bits), whole)
    monkeypatch.setattr(pairprograms, "TILES", 1)  # matrices are made when they are wanted
    assert torch.equal(added(row, q, bits), whole)
    monkeypatch.setattr(pairprograms, "LEAST", 20)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert torch.equal(added(row, q, bits), whole)


@pytest.mark.parametrize("bits", BITS)
def test_blocks_of_several_shapes_add_up(bits):
    shapes = [(18, 18), (9, 40), (64, 33), (18, 18)]
    rows = [pairs(bits, 70, 2, shape, seed=i) for i, shape in enumerate(shapes)]
    queries = [asked(2, shape, seed=20 + i) for i, shape in enumerate(shapes)]
    program = PairProgram.of([str(i) for i in range(4)], queries, shapes, rank=2, bits=bits)
    scores = torch.ones(2, 70, dtype=torch.float64)
    program.add(scores, places(*rows))
    expected = 1 + sum(exact(row, q) for row, q in zip(rows, queries, strict=True))
    torch.testing.assert_close(scores, expected, rtol=0, atol=2e-6 * float(expected.std()))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("factors", [(9, 7), (18, 18), (33, 31), (64, 64)])
def test_nothing_is_read_beyond_the_last_row(bits, factors):
    """Each side ends where a page begins that may not be read."""
    row, q = pairs(bits, 49, 1, factors), asked(1, factors)
    libc, page = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE
    held, addresses = [], []
    parts = [row.v, row.u, *([row.scale] if isinstance(row, PackedPairs) else [])]
    for part in parts:
        data = part.contiguous().view(torch.uint8).flatten().numpy().tobytes()
        size = -(-len(data) // page) * page
        region = mmap.mmap(-1, size + page)
        region[size - len(data) : size] = data
        start = ctypes.addressof(ctypes.c_char.from_buffer(region))
        assert libc.mprotect(ctypes.c_void_p(start + size), page, 0) == 0
        held.append(region)
        addresses.append(start + size - len(data))
    scores = torch.zeros(1, 49, dtype=torch.float64)
    program = PairProgram.of(["k"], [q], [factors], rank=1, bits=bits)
    program.add(scores, np.array([(*addresses, 0)[:3]]))
    assert torch.equal(scores, added(row, q, bits))


@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-30, 1.0, 1e30, 3e38])
def test_queries_of_any_size(size):
    row, q = pairs("bfloat16", 20, 1, (18, 20)), asked(2, (18, 20))
    q[0] = (q[0] / q[0].abs().max() * size).float()
    expected = exact(row, q)
    # Numbers that float32 itself holds to few bits are good to as many.
    tolerance = 2e-6 * expected.square().mean(1, keepdim=True).sqrt() + 1e-40
    assert bool(((added(row, q, "bfloat16") - expected).abs() <= tolerance).all())
    assert torch.equal(added(row, torch.zeros(1, 360), "bfloat16"), torch.zeros(1, 20, dtype=torch.float64))


@pytest.mark.parametrize(("side", "lost"), [(32, [7]), (18, [6, 7])])
def test_a_row_that_is_not_finite_takes_at_most_the_one_before_it_along(side, lost):
    row, q = pairs("bfloat16", 60, 1, (side, side)), asked(1, (side, side))
    row.u[7, 0, 3] = torch.inf
    assert added(row, q, "bfloat16")[0].isfinite().logical_not().nonzero().flatten().tolist() == lost


def test_threads_add_in_inference_mode_and_take_any_queries(monkeypatch):
    row, q = pairs("int4", 200, 2, (18, 20)), asked(2, (18, 20))
    whole = added(row, q, "int4")
    monkeypatch.setattr(pairprograms, "LEAST", 20)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    with torch.inference_mode():
        assert torch.equal(added(row, q, "int4"), whole)
    assert torch.equal(added(row, q.double().requires_grad_(), "int4"), whole)
    assert torch.equal(added(row, q.T.contiguous().T, "int4"), whole)


def test_tiles_are_left_to_others_as_they_were():
    """PyTorch's own products with tiles, before, after and beside."""
    row, q = pairs("int8", 200, 1, (36, 36)), asked(2, (36, 36))
    a, b = torch.randn(64, 64).bfloat16(), torch.randn(64, 64).bfloat16()
    product, whole = a @ b, added(row, q, "int8")
    found: list[bool] = []

    def again() -> None:
        for _ in range(50):
            found.append(torch.equal(added(row, q, "int8"), whole) and torch.equal(a @ b, product))

    threads = [threading.Thread(target=again) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 100 and all(found)


def test_a_process_that_has_not_asked_for_tiles_does():
    script = """
import numpy as np, torch
from influent.pairprograms import PairProgram
u = torch.ones(4, 1, 8, dtype=torch.bfloat16)
scores = torch.zeros(1, 4, dtype=torch.float64)
program = PairProgram.of(["k"], [torch.ones(1, 64)], [(8, 8)], rank=1, bits="bfloat16")
program.add(scores, np.array([(u.data_ptr(), u.data_ptr(), 0)]))
assert scores.tolist() == [[64.0] * 4]
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

"""v^T X u of pairs in codes by the compiled loop is the float64 one of the decoded pairs."""

import pytest
import torch

from influent import compiled, kernels, pairproducts
from influent.codec import Codec
from influent.coding import decode, encode
from influent.gradients import PackedPairs
from influent.kernels import Sums, prepare
from influent.pairproducts import between

BITS = ["int8", "int4", "sign"]
SHAPES = [(9, 7), (16, 16), (18, 18), (36, 96), (96, 36), (20, 144), (130, 35), (40, 5)]
needs_loops = pytest.mark.skipif(not compiled.usable(), reason="llvmlite is not installed: pip install influent[fast]")


def packed(bits: str, n: int, rank: int, factors: tuple[int, int]) -> PackedPairs:
    a, b = factors
    x = torch.randn(n, a * b, generator=torch.Generator().manual_seed(n))
    codec = Codec(rank, bits)
    row = decode(codec, encode(codec, x, factors, key="k").tensors, "k", a * b, factors)
    assert isinstance(row, PackedPairs)
    return row


def asked(n: int, factors: tuple[int, int]) -> torch.Tensor:
    return torch.randn(n, *factors, generator=torch.Generator().manual_seed(7))


def exact(row: PackedPairs, q: torch.Tensor) -> torch.Tensor:
    pairs = row.to(torch.float64)
    return torch.einsum("nca,qab,ncb->qn", pairs.v, q.double(), pairs.u)


@needs_loops
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("factors", SHAPES)
@pytest.mark.parametrize("rank", [1, 3])
def test_products_are_those_of_the_decoded_pairs(bits, factors, rank):
    for n in (1, 2, 11):
        row, q = packed(bits, n, rank, factors), asked(3, factors)
        expected = exact(row, q)
        torch.testing.assert_close(
            between(row, q), expected, rtol=0, atol=2e-6 * float(expected.square().mean().sqrt())
        )


@needs_loops
@pytest.mark.parametrize("bits", BITS)
def test_the_error_is_within_what_the_module_promises(bits):
    """Numbers of one sign, whose rounding errors do not cancel."""
    a, b = 96, 40
    row = packed(bits, 5, 1, (a, b))
    pairs = row.to(torch.float64)
    q = 1 + asked(2, (a, b)).abs()
    sizes = torch.einsum("nca,qab,ncb->qn", pairs.v.abs(), q.double(), pairs.u.abs())
    assert bool(((between(row, q) - exact(row, q)).abs() <= (96 + 40 / 16 + 8) * 2**-24 * sizes).all())


@needs_loops
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("factors", [(36, 96), (18, 18), (9, 7)])
def test_a_row_scores_the_same_to_the_bit_in_any_company(bits, factors):
    row, q = packed(bits, 23, 2, factors), asked(2, factors)
    whole = between(row, q)
    assert torch.equal(torch.cat([between(row[i : i + 1], q) for i in range(23)], dim=1), whole)
    assert torch.equal(torch.cat([between(row[:6], q), between(row[6:], q)], dim=1), whole)
    assert torch.equal(between(row, q[1:]), whole[1:])


@needs_loops
@pytest.mark.parametrize("bits", BITS)
def test_bytes_behind_the_last_pair_are_not_read_for_numbers(bits):
    row, q = packed(bits, 6, 1, (9, 7)), asked(1, (9, 7))
    junk = PackedPairs(*(side.clone() for side in (row.u, row.v)), row.scale, bits, row.factors)
    junk.u[4:], junk.v[4:] = 85, 85
    assert torch.equal(between(junk[:4], q), between(row[:4], q))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("loops", [False, pytest.param(True, marks=needs_loops)])
@pytest.mark.parametrize("num_queries", [1, 40])
@pytest.mark.parametrize("query_rank", [None, 1])
def test_scores_are_the_same_without_llvmlite(bits, loops, num_queries, query_rank, monkeypatch):
    monkeypatch.setattr(compiled, "usable", lambda: loops)
    factors = (20, 18)
    row, q = packed(bits, 11, 2, factors), asked(num_queries, factors).flatten(1)
    asking, scores = prepare(q, factors, query_rank), torch.zeros(num_queries, 11, dtype=torch.float64)
    for chunk in (kernels.CHUNK_NUMBERS, 200):
        monkeypatch.setattr(kernels, "CHUNK_NUMBERS", chunk)
        sums = Sums(scores.zero_())
        asking.add(sums, row)
        sums.close()
        expected = exact(row, asking.whole.unflatten(1, factors))
        torch.testing.assert_close(scores, expected, rtol=0, atol=3e-6 * float(expected.square().mean().sqrt()))
    kernel, _ = kernels._cheapest(num_queries, query_rank, 2, *factors, loops=kernels._loops(factors))
    assert loops or kernel != "loop"
    assert kernel != "loop" or query_rank is None


@pytest.mark.parametrize("bits", BITS)
def test_pairs_in_codes_are_the_rows_that_they_stand_for(bits):
    row = packed(bits, 5, 2, (9, 7))
    flat = row.to(torch.float64).flat()
    assert torch.equal(row[1:3].flat(), row.flat()[1:3]) and len(row[1:3]) == 2
    torch.testing.assert_close(row.flat().double(), flat, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(row.columns(5, 40).double(), flat[:, 5:40], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(row.squares(), flat.square().sum(1), rtol=1e-5, atol=0)
    q = asked(2, (9, 7)).flatten(1).double()
    torch.testing.assert_close(row.dot(q), q @ flat.T, rtol=1e-5, atol=1e-4)


@needs_loops
def test_no_rows_and_large_matrices(monkeypatch):
    assert between(packed("int4", 3, 1, (9, 7))[:0], asked(2, (9, 7))).shape == (2, 0)
    assert pairproducts.fits((512, 512)) and not pairproducts.fits((512, 513))
    monkeypatch.setattr(pairproducts, "LARGEST", 10)
    assert not kernels._loops((9, 7))

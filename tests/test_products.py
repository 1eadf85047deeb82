"""Products by compiled loops are the float64 ones of the decoded rows, as are those of a machine without llvmlite."""

import logging
import sys

import pytest
import torch

from influent import compiled, digits, packing, products
from influent.gradients import Packed
from influent.kernels import Sums, prepare
from influent.packing import unpack
from influent.products import Products, fits
from tests.test_digits import asked, errors, packed

BITS = ["int8", "int4", "sign"]
needs_loops = pytest.mark.skipif(not compiled.usable(), reason="llvmlite is not installed: pip install influent[fast]")


def added(q: torch.Tensor, row: Packed) -> torch.Tensor:
    scores = torch.zeros(len(q), len(row), dtype=torch.float64)
    Products.of(q, row.bits).add(scores, row)
    return scores


@needs_loops
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("width", [16, 17, 32, 33, 47, 64, 1023, 9001])
@pytest.mark.parametrize("num_queries", [1, 2, 4, 7])
def test_products_are_those_of_the_decoded_rows(bits, width, num_queries):
    if not fits(width, bits):
        assert bits == "int4" and width < 32
        return
    for n in (1, 2, 11):
        row, q = packed(bits, n, width), asked(num_queries, width, tail=3.0)
        assert float(errors(q, row, added(q, row)).max()) < 3e-7


@needs_loops
@pytest.mark.parametrize("bits", BITS)
def test_the_error_is_within_what_the_module_promises(bits):
    """Numbers of one sign, whose rounding errors do not cancel."""
    row = packed(bits, 3, 1 << 16)
    codes = unpack(row.codes, bits, row.width).double()
    for num_queries in (1, 4):
        q = codes[:1].sign().float().expand(num_queries, -1) * (1 + asked(num_queries, row.width).abs())
        q = q.contiguous()
        exact, scale = q.double() @ codes.T, row.scale.double()
        sizes = q.double().abs() @ codes.abs().T
        bound = (products.LONGEST / 16 + 8) * 2**-24 * (2 if bits == "sign" else 1)
        assert bool(((added(q, row) - exact * scale).abs() <= bound * sizes * scale.abs()).all())


@needs_loops
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("num_queries", [1, 5])
def test_a_row_scores_the_same_to_the_bit_in_any_company(bits, num_queries, monkeypatch):
    row, q = packed(bits, 23, 200), asked(num_queries, 200)
    whole = added(q, row)
    monkeypatch.setattr(products, "BYTES", 600)
    assert torch.equal(added(q, row), whole)
    assert torch.equal(torch.cat([added(q, row[i : i + 1]) for i in range(23)], dim=1), whole)
    spaced = torch.zeros(23, 300, dtype=row.codes.dtype)
    spaced[:, : row.codes.shape[1]] = row.codes
    apart = Packed(spaced[:, : row.codes.shape[1]], row.scale, bits, row.width)
    assert torch.equal(added(q, apart), whole)


@needs_loops
@pytest.mark.parametrize("bits", BITS)
def test_pieces_of_queries_give_the_same_up_to_rounding(bits, monkeypatch):
    row, q = packed(bits, 5, 1001), asked(6, 1001)
    whole = added(q, row)
    for longest in (64, 200):
        monkeypatch.setattr(products, "LONGEST", longest)
        torch.testing.assert_close(added(q, row), whole, rtol=0, atol=3e-7 * float(q.norm(dim=1).max()) * 32)


@needs_loops
@pytest.mark.parametrize("bits", BITS)
def test_loops_unpack_the_same_numbers(bits, monkeypatch):
    for length in (*range(1, 70), 1001):
        numbers = torch.randint(-8, 8, (3, 2, length), generator=torch.Generator().manual_seed(length))
        codes = packing.pack((numbers.sign() * 2 + 1).sign().to(torch.int8) if bits == "sign" else numbers.char(), bits)
        by_loop = compiled.unpack(codes, bits, length)
        with monkeypatch.context() as patch:
            patch.setattr(compiled, "usable", lambda: False)
            assert torch.equal(by_loop, unpack(codes, bits, length))
        assert compiled.unpack(codes[:0], bits, length).shape == (0, 2, length)
        assert torch.equal(compiled.unpack(codes[:, 1], bits, length), by_loop[:, 1])


@needs_loops
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("num_queries", [1, 3])
def test_scores_are_the_same_without_llvmlite(bits, num_queries, monkeypatch):
    row, q = packed(bits, 11, 100), asked(num_queries, 100)
    found = {}
    for name in ("loops", "digits", "unpacked"):
        monkeypatch.setattr(compiled, "usable", lambda name=name: name == "loops")
        if name == "unpacked":
            monkeypatch.setattr(digits, "usable", lambda: False)
        asking, scores = prepare(q, None, None, bits=bits), torch.zeros(num_queries, 11, dtype=torch.float64)
        assert isinstance(asking.coded, Products) == (name == "loops")
        asking.add(Sums(scores), row)
        found[name] = scores
        assert float(errors(q, row, scores).max()) < 1e-6
    torch.testing.assert_close(found["loops"], found["digits"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", BITS)
def test_narrow_rows_and_no_rows(bits):
    for width, n in ((1, 4), (15, 4), (100, 0)):
        row, q = packed(bits, max(n, 1), width)[:n], asked(2, width)
        scores = torch.zeros(2, n, dtype=torch.float64)
        prepare(q, None, None, bits=bits).add(Sums(scores), row)
        assert n == 0 or float(errors(q, row, scores).max()) < 1e-6


def test_an_llvmlite_that_cannot_be_used_is_said_and_done_without(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "llvmlite", None)  # its import raises
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    compiled.usable.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert not compiled.usable()
    assert "llvmlite is installed but cannot be used" in caplog.text
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    compiled.usable.cache_clear()
    caplog.clear()
    assert not compiled.usable() and not caplog.text
    compiled.usable.cache_clear()

"""Products of packed rows on their codes are the float64 ones of the decoded rows, whatever the rows come with."""

import pytest
import torch

from influent import compiled, digits
from influent.codec import Codec
from influent.coding import decode, encode
from influent.digits import Digits, usable
from influent.gradients import Packed
from influent.kernels import Sums, prepare

needs_integers = pytest.mark.skipif(not usable(), reason="this machine has no fast products of 8-bit integers")


def packed(bits: str, n: int, width: int, *, seed: int = 0) -> Packed:
    x = torch.randn(n, width, generator=torch.Generator().manual_seed(seed))
    row = decode(Codec(None, bits), encode(Codec(None, bits), x, None, key="k").tensors, "k", width, None)
    assert isinstance(row, Packed)
    return row


def asked(n: int, width: int, *, tail: float = 0.0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(1)
    return torch.randn(n, width, generator=rng) * (tail * torch.randn(n, width, generator=rng)).exp()


def added(q: torch.Tensor, row: Packed) -> torch.Tensor:
    scores = torch.zeros(len(q), len(row), dtype=torch.float64)
    Digits.of(q, row.bits).add(scores, row)
    return scores


def errors(q: torch.Tensor, row: Packed, got: torch.Tensor) -> torch.Tensor:
    """As shares of |q| |row|."""
    numbers = row.flat().double()
    return (got - q.double() @ numbers.T).abs() / (q.double().norm(dim=1)[:, None] * numbers.norm(dim=1)).clamp(min=1)


@needs_integers
@pytest.mark.parametrize("bits", ["int8", "int4", "sign"])
@pytest.mark.parametrize("width", [16, 17, 31, 64, 1023])
@pytest.mark.parametrize("num_queries", [1, 5])
@pytest.mark.parametrize("tail", [0.0, 3.0])
def test_products_are_those_of_the_decoded_rows(bits, width, num_queries, tail):
    row, q = packed(bits, 11, width), asked(num_queries, width, tail=tail)
    assert float(errors(q, row, added(q, row)).max()) < 3e-7


@needs_integers
@pytest.mark.parametrize("bits", ["int8", "int4", "sign"])
def test_a_row_scores_the_same_to_the_bit_in_any_company(bits, monkeypatch):
    row, q = packed(bits, 23, 200), asked(3, 200)
    whole = added(q, row)
    monkeypatch.setattr(digits, "BYTES", 600)
    assert torch.equal(added(q, row), whole)
    assert torch.equal(torch.cat([added(q, row[i : i + 1]) for i in range(23)], dim=1), whole)


@needs_integers
@pytest.mark.parametrize("bits", ["int8", "int4", "sign"])
def test_long_sums_are_cut_before_they_overflow(bits, monkeypatch):
    monkeypatch.setattr(digits, "LONGEST", 24)
    row, q = packed(bits, 5, 1001), asked(2, 1001)
    assert float(errors(q, row, added(q, row)).max()) < 3e-7
    monkeypatch.undo()
    row = Packed(torch.full((1, 1 << 17), -128, dtype=torch.int8), torch.ones(1), "int8", 1 << 17)
    ones = torch.ones(1, 1 << 17)
    assert float(added(ones, row)) == -128.0 * (1 << 17)


@pytest.mark.parametrize("bits", ["int8", "int4", "sign"])
def test_rows_of_zeros_and_queries_of_zeros_score_zero(bits):
    row = packed(bits, 3, 40)[:2]
    zero = Packed(row.codes, row.scale * 0, bits, 40)
    for q, rows in ((asked(2, 40), zero), (asked(2, 40) * 0, row)):
        scores = torch.zeros(2, 2, dtype=torch.float64)
        sums = Sums(scores)
        prepare(q, None, None, bits=bits).add(sums, rows)
        sums.close()
        assert float(scores.abs().max()) < 1e-12


@pytest.mark.parametrize("bits", ["int8", "int4", "sign"])
def test_blocks_of_a_few_numbers_are_unpacked(bits, monkeypatch):
    monkeypatch.setattr(compiled, "usable", lambda: False)
    for width in (1, 2, 15):
        row, q = packed(bits, 4, width), asked(2, width)
        asking, scores = prepare(q, None, None, bits=bits), torch.zeros(2, 4, dtype=torch.float64)
        assert asking.coded is None
        asking.add(Sums(scores), row)
        assert float(errors(q, row, scores).max()) < 1e-6


@pytest.mark.parametrize("bits", ["int8", "int4", "sign"])
def test_a_machine_without_integer_products_unpacks(bits, monkeypatch):
    row, q = packed(bits, 11, 100), asked(3, 100)
    monkeypatch.setattr(compiled, "usable", lambda: False)
    monkeypatch.setattr(digits, "usable", lambda: False)
    asking = prepare(q, None, None, bits=bits)
    assert asking.coded is None
    scores = torch.zeros(3, 11, dtype=torch.float64)
    asking.add(Sums(scores), row)
    assert float(errors(q, row, scores).max()) < 1e-6


def test_what_is_usable_is_said_by_the_machine(monkeypatch):
    usable.cache_clear()
    monkeypatch.setattr(digits, "_product", None)
    assert not usable()
    monkeypatch.setattr(digits, "_product", lambda a, b: (a.long() @ b.long()) + 1)
    usable.cache_clear()
    assert not usable()
    usable.cache_clear()

"""Products on the processor's tiles are the float64 ones of the decoded rows, whatever the rows come with."""

import ctypes
import logging
import mmap
import threading
from copy import copy

import numpy as np
import pytest
import torch

from influent import compiled, tileproducts
from influent.codec import Codec
from influent.coding import decode, encode
from influent.tileproducts import DenseProgram
from tests.test_digits import asked

pytestmark = pytest.mark.skipif(not compiled.tiles_usable(), reason="this machine has no matrix tiles (AMX, llvmlite)")
BITS = ["bfloat16", "int8", "int4", "sign"]


class Stored:
    """Rows of one block as a shard holds them, and what they decode to."""

    def __init__(self, x: torch.Tensor, bits: str):
        codec = Codec(None, bits)
        tensors = encode(codec, x, None, key="k").tensors
        self.codes, self.scale, self.bits = tensors["k"], tensors.get("k.scale"), bits
        self.numbers = decode(codec, tensors, "k", x.shape[1], None).flat().double()
        self.unscaled = self.numbers / (1.0 if self.scale is None else self.scale.double()[:, None])

    @property
    def place(self) -> tuple[int, int]:
        return self.codes.data_ptr(), 0 if self.scale is None else self.scale.data_ptr()

    def part(self, lo: int, hi: int | None) -> "Stored":
        part = copy(self)
        part.codes, part.scale = self.codes[lo:hi], None if self.scale is None else self.scale[lo:hi]
        return part

    def exact(self, q: torch.Tensor) -> torch.Tensor:
        return q.double() @ self.numbers.T


def stored(bits: str, n: int, width: int, *, seed: int = 0) -> Stored:
    return Stored(torch.randn(n, width, generator=torch.Generator().manual_seed(seed)), bits)


def added(q: torch.Tensor, row: Stored, lo: int = 0, hi: int | None = None) -> torch.Tensor:
    part = row.part(lo, hi)
    scores = torch.zeros(len(q), len(part.codes), dtype=torch.float64)
    DenseProgram.of(("k",), [q], row.bits).add(scores, places(part))
    return scores


def places(*rows: Stored) -> np.ndarray:
    return np.array([row.place for row in rows])


def error(q: torch.Tensor, row: Stored, got: torch.Tensor) -> float:
    """The largest, as a share of |q| |row|."""
    return float(((got - row.exact(q)).abs() / (q.double().norm(dim=1)[:, None] * row.numbers.norm(dim=1))).max())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("width", [*range(1, 71, 3), 8, 32, 63, 64, 65, 127, 324, 1001, 4097, 9001])
def test_products_are_those_of_the_decoded_rows(bits, width):
    for n, num_queries in ((1, 1), (2, 5), (15, 6), (16, 2), (17, 16), (40, 17), (100, 33), (100, 3)):
        row, q = stored(bits, n, width, seed=n), asked(num_queries, width, tail=1.0)
        assert error(q, row, added(q, row)) < 3e-7


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("num_queries", [1, 7])
def test_the_error_is_within_what_the_module_promises(bits, num_queries):
    """Numbers of one sign, whose rounding errors do not cancel."""
    row = stored(bits, 19, 20_000)
    q = (row.numbers[:1].sign() * (1 + asked(num_queries, 20_000).abs())).float()
    q[:, 0] *= 1000
    if bits == "bfloat16":
        bound = (32 + 32 + 3) * 2**-24 * (q.double().abs() @ row.numbers.abs().T)
    else:
        least = 2**-23.9 * (2 if bits == "sign" else 1) * q.double().abs().amax(1)
        bound = least[:, None] * row.numbers.abs().sum(1) + 1e-13 * (q.double().abs() @ row.numbers.abs().T)
    assert bool(((added(q, row) - row.exact(q)).abs() <= bound).all())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("num_queries", [1, 6, 33])
@pytest.mark.parametrize("width", [9, 200, 9001])
def test_a_row_scores_the_same_to_the_bit_in_any_company(bits, num_queries, width, monkeypatch):
    row, q = stored(bits, 53, width), asked(num_queries, width)
    whole = added(q, row)
    for lo, hi in ((0, 1), (5, 22), (31, 53), (52, 53), (3, 52)):
        assert torch.equal(added(q, row, lo, hi), whole[:, lo:hi])
    monkeypatch.setattr(tileproducts, "WIDE", 1 << 12)
    monkeypatch.setattr(tileproducts, "GROUPS", 2)
    assert torch.equal(added(q, row), whole)


@pytest.mark.parametrize("bits", BITS)
def test_one_call_scores_all_blocks(bits):
    widths = [5, 324, 64, 324, 1, 324, 64]
    rows = [stored(bits, 41, width, seed=i) for i, width in enumerate(widths)]
    for num_queries in (2, 20):
        queries = [asked(num_queries, width) * 10.0 ** (i - 3) for i, width in enumerate(widths)]
        program = DenseProgram.of([str(i) for i in range(7)], queries, bits)
        assert program.keys == tuple("0123456")
        before = torch.randn(num_queries, 41, dtype=torch.float64)
        scores = before.clone()
        program.add(scores, places(*rows))
        exact = sum(row.exact(q) for row, q in zip(rows, queries, strict=True))
        torch.testing.assert_close(scores - before, exact, rtol=0, atol=1e-6 * float(exact.abs().max()))
        spread = torch.zeros(41, num_queries, dtype=torch.float64).T  # scores that lie otherwise, and no rows
        program.add(spread, places(*rows))
        torch.testing.assert_close(spread, scores - before, rtol=0, atol=1e-9 * float(exact.abs().max()))
        program.add(torch.zeros(num_queries, 0, dtype=torch.float64), places(*rows))


@pytest.mark.parametrize("bits", BITS)
def test_nothing_is_read_beyond_the_last_row(bits):
    """The rows end where the memory does: a byte more would end the process."""
    page, libc = mmap.PAGESIZE, ctypes.CDLL(None)
    held = mmap.mmap(-1, 64 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(held))
    assert libc.mprotect(ctypes.c_void_p(start + 63 * page), ctypes.c_size_t(page), 0) == 0
    for width in (1, 7, 8, 9, 31, 33, 64, 65, 127, 130, 700, 1001):
        for n in (1, 2, 15, 16, 17, 33, 50):
            row = stored(bits, n, width)
            size = row.codes.numel() * row.codes.element_size()
            end = start + 63 * page
            ctypes.memmove(end - size, row.codes.data_ptr(), size)
            for num_queries in (1, 6):
                q, scores = asked(num_queries, width), torch.zeros(num_queries, n, dtype=torch.float64)
                DenseProgram.of(("k",), [q], bits).add(scores, np.array([(end - size, row.place[1])]))
                assert torch.equal(scores, added(q, row))
    assert libc.mprotect(ctypes.c_void_p(start + 63 * page), ctypes.c_size_t(page), 3) == 0


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("size", [1e-40, 1e-38, 1e30, 3e38])
def test_tiny_and_huge_queries_and_queries_of_zeros(bits, size):
    row, q = stored(bits, 18, 500), asked(3, 500)
    q = q / q.abs().amax(1, keepdim=True) * size
    q[1] = 0
    got, exact = added(q, row), row.exact(q)
    assert bool((got[1] == 0).all())
    assert float((got - exact)[[0, 2]].abs().max() / exact.abs().max()) < 1e-6


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("num_queries", [2, 9])
def test_a_row_that_is_not_finite_scores_nan(bits, num_queries):
    row, q = stored(bits, 40, 100), asked(num_queries, 100)
    whole = added(q, row)
    (row.codes[20] if row.scale is None else row.scale[20:21]).fill_(float("nan"))
    got = added(q, row)
    assert bool(got[:, 20].isnan().all())
    others = [i for i in range(40) if i not in (19, 20)]  # 19: tiles.py says why
    assert torch.equal(got[:, others], whole[:, others])


@pytest.mark.parametrize("bits", BITS)
def test_others_use_the_tiles_in_between(bits):
    """The tiles' shape is a thread's, and PyTorch's products of bfloat16 and of bytes set their own."""
    row, q = stored(bits, 33, 300), asked(4, 300)
    a = torch.randn(64, 96, generator=torch.Generator().manual_seed(3)).bfloat16()
    c = torch.randint(-100, 100, (64, 96), generator=torch.Generator().manual_seed(4)).to(torch.int8)
    ours, theirs, bytes_ = added(q, row), a @ a.T, torch._int_mm(c, c.T.contiguous())
    assert torch.equal(bytes_.long(), c.long() @ c.long().T)
    for _ in range(3):
        assert torch.equal(added(q, row), ours)
        assert torch.equal(a @ a.T, theirs)
        assert torch.equal(added(q, row), ours)
        assert torch.equal(torch._int_mm(c, c.T.contiguous()), bytes_)


@pytest.mark.parametrize("bits", BITS)
def test_threads_have_their_own_tiles(bits):
    row = stored(bits, 200, 1001)
    program, q = DenseProgram.of(("k",), [asked(2, 1001)], bits), asked(2, 1001)
    want, found = added(q, row), {}

    def work(name: int) -> None:
        for _ in range(20):
            scores = torch.zeros(2, 200, dtype=torch.float64)
            program.add(scores, places(row))
            found.setdefault(name, []).append(torch.equal(scores, want))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0: [True] * 20, 1: [True] * 20}


@pytest.mark.parametrize("bits", BITS)
def test_rows_are_shared_among_threads_in_inference_mode_and_any_queries_taken(bits, monkeypatch):
    row, q = stored(bits, 200, 130), asked(3, 130)
    whole = added(q, row)
    monkeypatch.setattr(tileproducts, "LEAST", 20)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    with torch.inference_mode():
        assert torch.equal(added(q, row), whole)
    assert torch.equal(added(q.double().requires_grad_(), row), whole)
    assert torch.equal(added(q.T.contiguous().T, row), whole)


@pytest.mark.parametrize("bits", BITS)
def test_hundreds_of_queries(bits):
    row, q = stored(bits, 33, 70), asked(300, 70)
    assert error(q, row, added(q, row)) < 3e-7


def test_an_llvm_that_lacks_an_instruction_is_said_and_done_without(monkeypatch, caplog):
    monkeypatch.setattr(compiled, "_written", lambda *given: "call void @llvm.x86.nothing()")
    compiled.tiles_usable.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert not compiled.tiles_usable()
    assert "does not know the loops with matrix tiles" in caplog.text
    monkeypatch.undo()
    compiled.tiles_usable.cache_clear()
    assert compiled.tiles_usable()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("num_queries", [1, 5, 7])
def test_the_largest_sums_of_wide_rows_do_not_overflow(bits, num_queries):
    """Every code and every digit is the largest, in rows that are summed in several pieces."""
    row = Stored(torch.cat([torch.ones(20, 70_001), -torch.ones(20, 70_001)]), bits)
    q = torch.ones(num_queries, 70_001) * torch.arange(1, num_queries + 1)[:, None]
    assert float((added(q, row) / row.exact(q) - 1).abs().max()) < 1e-6


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("width", [16, 200])
def test_many_blocks_of_rows_and_groups_of_queries(bits, width):
    """What is staged runs ahead into the next block, or to the same one for the next group."""
    row = stored(bits, 300, width)
    for num_queries in (1, 2, 16, 40):
        q = asked(num_queries, width)
        whole = added(q, row)
        assert error(q, row, whole) < 3e-7
        for i in (0, 31, 32, 150, 299):
            assert torch.equal(added(q, row, i, i + 1), whole[:, i : i + 1])

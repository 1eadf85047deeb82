"""Decoded rows are within stated bounds of the rows, unbiased, and the same however they are cut; bytes are exact."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from influent.codec import Codec
from influent.coding import decode, encode, encode_blocks
from influent.errors import NumericsError
from influent.gradients import Flat, LowRank, Packed, PackedPairs
from influent.packing import pack, unpack

PACKED = ("int8", "int4", "sign")
CODECS = ("float32", "float16", "bfloat16", "int8", "int4", "sign")
CODECS += tuple(f"rank:{rank}:{bits}" for rank in (1, 3) for bits in CODECS)
FACTORS = (9, 7)


def rows(n: int, width: int, *, seed: int = 0, tail: float = 0.0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    weights = (tail * torch.randn(n, width, generator=rng)).exp()
    return torch.randn(n, width, generator=rng) * weights * torch.randn(n, 1, generator=rng).exp()


def round_trip(text: str, x: torch.Tensor, factors=None):
    codec = Codec.parse(text)
    coded = encode(codec, x, factors, key="k")
    return coded, decode(codec, coded.tensors, "k", x.shape[1], factors)


def relative_error(text: str, x: torch.Tensor, factors=None) -> torch.Tensor:
    decoded = round_trip(text, x, factors)[1].flat().double()
    return (decoded - x).norm(dim=1) / x.double().norm(dim=1)


@pytest.mark.parametrize("text", CODECS)
@pytest.mark.parametrize("factors", [None, FACTORS, (63, 1), (1, 63), (3, 21)])
def test_the_tensors_are_those_that_the_codec_names(text, factors):
    codec = Codec.parse(text)
    coded, row = round_trip(text, rows(5, 63), factors)
    got = {name: (str(x.dtype).removeprefix("torch."), tuple(x.shape)) for name, x in coded.tensors.items()}
    layout = codec.tensors("k", 63, factors)
    assert got == {name: (dtype, (5, *shape)) for name, (dtype, shape) in layout.items()}
    assert sum(x.numel() * x.element_size() for x in coded.tensors.values()) == 5 * codec.row_bytes(63, factors)
    assert coded.captured.shape == (5,) and coded.captured.dtype == torch.float32
    assert row.flat().shape == (5, 63)
    dense, pairs = (Packed, PackedPairs) if codec.packed else (Flat, LowRank)
    assert isinstance(row, dense if codec.stored_rank(factors) is None else pairs)
    assert row.flat().dtype == (torch.float32 if codec.packed else getattr(torch, codec.bits))


def test_floats_come_back_as_the_tensors_that_were_stored():
    for text, factors in (("bfloat16", None), ("rank:2:float16", FACTORS)):
        coded, row = round_trip(text, rows(5, 63), factors)
        sides = [row.g] if isinstance(row, Flat) else [row.u, row.v]
        assert all(side is x for side, x in zip(sides, coded.tensors.values(), strict=True))
    assert torch.equal(round_trip("float32", rows(5, 63))[1].flat(), rows(5, 63))


@pytest.mark.parametrize("width", [1, 2, 3, 7, 8, 9, 16, 63, 64])
@pytest.mark.parametrize("bits, low, high", [("int8", -128, 127), ("int4", -8, 7), ("sign", 0, 1)])
def test_codes_come_back_exactly_and_bytes_too(width, bits, low, high):
    rng = torch.Generator().manual_seed(width)
    codes = torch.randint(low, high + 1, (4, 3, width), dtype=torch.int8, generator=rng)
    codes = 1 - 2 * codes if bits == "sign" else codes
    packed = pack(codes, bits)
    assert torch.equal(unpack(packed, bits, width), codes.float())
    assert torch.equal(pack(unpack(packed, bits, width).to(torch.int8), bits), packed)
    assert torch.equal(unpack(packed[1:3, :2], bits, width), codes[1:3, :2].float())


def test_the_bytes_are_those_of_the_format():
    codes = torch.tensor([[-8, 7, -1, 1, 2]], dtype=torch.int8)
    assert pack(codes, "int8").tolist() == [[-8, 7, -1, 1, 2]]
    assert pack(codes, "int4").tolist() == [[0x18, 0x27, 0x0F]]
    signs = torch.tensor([[1, -1, 1, 1, -1, 1, 1, 1, -1, -1]], dtype=torch.int8)
    assert pack(signs, "sign").tolist() == [[0b00010010, 0b00000011]]


@pytest.mark.parametrize("text", CODECS)
def test_a_slice_of_the_tensors_is_a_slice_of_the_rows(text):
    codec, x = Codec.parse(text), rows(11, 63)
    coded, row = round_trip(text, x, FACTORS)
    part = decode(codec, {name: t[3:8] for name, t in coded.tensors.items()}, "k", 63, FACTORS)
    assert torch.equal(part.flat(), row[3:8].flat())


@pytest.mark.parametrize("text", CODECS)
def test_a_row_is_coded_alike_in_every_batch(text):
    x = rows(9, 63)
    together = round_trip(text, x, FACTORS)[1].flat()
    alone = torch.cat([round_trip(text, x[i : i + 1], FACTORS)[1].flat() for i in range(9)])
    torch.testing.assert_close(alone, together, rtol=1e-2, atol=2e-3 * float(x.abs().max()))
    if "rank" not in text:
        assert torch.equal(alone, together)


# What rounding to the nearest code can do: half a step for each number, a step being the largest number over the
# largest code, and the last code on the positive side missing; the search over clips only makes it smaller. The scale
# moves from the step by no more than the angle asks, and by 2^-8 in bfloat16. For signs, the angle between a vector and
# its signs is that of |x|_1 / (|x| sqrt(K)): error^2 = |x|^2 K / |x|_1^2 - 1.
@pytest.mark.parametrize("tail", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("width", [1, 5, 64, 1000])
def test_errors_are_within_the_bounds_of_rounding(width, tail):
    x = rows(50, width, tail=tail)
    x[0] = 0.3  # constant
    x[1, : width // 2] = 0
    length, largest = x.norm(dim=1), x.abs().amax(dim=1)
    for bits, most in (("int8", 128), ("int4", 8)):
        angle = math.sqrt(width) * largest / most / length  # numbers above the last code are off by a whole step
        worst = angle / (1 - angle).clamp(min=0.01) + 2**-7
        assert bool((relative_error(bits, x) <= worst).all())
    ones = x.abs().sum(1)
    exact = (length**2 * width / ones**2 - 1).clamp(min=0).sqrt()
    signs = relative_error("sign", x)
    assert bool((signs <= exact + 2**-7 * (1 + exact)).all())


@pytest.mark.parametrize("bits, width, most", [("int8", 4096, 0.01), ("int4", 4096, 0.115), ("int4", 64, 0.1)])
def test_gaussian_rows_lose_what_a_uniform_quantiser_must(bits, width, most):
    """The best uniform quantiser of 16 levels has a relative error of 0.107 for a normal distribution (Max, 1960)."""
    assert float(relative_error(bits, torch.randn(64, width)).mean()) < most


def test_signs_of_gaussian_rows_have_the_known_error():
    """E |x|^2 K / |x|_1^2 = pi / 2 for normal numbers."""
    error = float(relative_error("sign", torch.randn(64, 4096)).square().mean())
    assert error == pytest.approx(math.pi / 2 - 1, rel=0.02)


@pytest.mark.parametrize("bits", PACKED)
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e18, 1e30])
def test_a_row_has_its_own_length_along_itself(bits, scale):
    """<decoded, x> = <x, x> up to bfloat16's 2^-8, whatever the size of the numbers."""
    x = rows(40, 65, tail=1.0) * scale
    decoded = round_trip(bits, x)[1].flat().double()
    along = (decoded * x.double()).sum(1) / x.double().square().sum(1)
    assert float((along - 1).abs().max()) <= 2**-8 + 1e-5


@pytest.mark.parametrize("bits", PACKED)
def test_estimates_are_unbiased_over_rotations(bits):
    """The mean of <rotated x decoded, rotated y> over random rotations is <x, y>, y in every direction from x."""
    x = rows(1, 24, seed=3, tail=1.0).double()
    rng = torch.Generator().manual_seed(1)
    turns = torch.linalg.qr(torch.randn(6_000, 24, 24, generator=rng, dtype=torch.float64)).Q
    decoded = round_trip(bits, (x @ turns).flatten(0, 1).float())[1].flat().double()
    back = (turns @ decoded[:, :, None])[..., 0] / x.norm()  # [turns, 24], in the basis of x
    noise = back.std(0) / math.sqrt(len(turns))
    bias = back.mean(0) - x[0] / x.norm()
    assert bool((bias.abs() <= 4.5 * noise + 2**-11).all())  # rounding to bfloat16 goes up and down alike


@pytest.mark.parametrize("bits", PACKED)
def test_rank_rows_are_unbiased_over_rotations_of_both_sides(bits):
    x = rows(1, 63, seed=4).view(9, 7).double()
    rng = torch.Generator().manual_seed(2)
    left, right = (torch.linalg.qr(torch.randn(6_000, n, n, generator=rng, dtype=torch.float64)).Q for n in FACTORS)
    turned = (left @ x @ right.mT).float().flatten(1)
    row = round_trip(f"rank:2:{bits}", turned, FACTORS)[1]
    back = left.mT @ row.flat().double().unflatten(1, FACTORS) @ right
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    bias = (back.mean(0) - (u[:, :2] * s[:2]) @ v[:2]) / x.norm()
    noise = back.std(0) / math.sqrt(len(back)) / x.norm()
    assert bool((bias.abs() <= 4.5 * noise + 2**-11).all())


@pytest.mark.parametrize("text", CODECS)
def test_zeros_stay_zeros(text):
    x = rows(4, 63)
    x[1] = 0
    coded, row = round_trip(text, x, FACTORS)
    assert bool((row.flat()[1] == 0).all()) and bool(row.flat().isfinite().all())
    assert float(coded.captured[1]) == 1
    assert bool((round_trip(text, x[:0], FACTORS)[1].flat() == x[:0]).all())


@pytest.mark.parametrize("text", ["rank:1:float32", "rank:3:float32", "rank:3:bfloat16"])
def test_the_captured_share_is_that_of_the_stored_pairs(text):
    x = rows(20, 63)
    coded, row = round_trip(text, x, FACTORS)
    kept = row.to(torch.float64).squares() / x.double().square().sum(1)
    torch.testing.assert_close(coded.captured.double(), kept, rtol=5e-3, atol=1e-6)
    exact = torch.linalg.svdvals(x.view(-1, *FACTORS).double()).square()
    best = exact[:, : Codec.parse(text).rank].sum(1) / exact.sum(1)
    torch.testing.assert_close(coded.captured.double(), best, rtol=0, atol=5e-3)


@pytest.mark.parametrize("text", ["int8", "int4", "sign", "rank:1:int4", "rank:3:sign", "rank:1:float32"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_is_named(text, value):
    x = rows(4, 63)
    x[2, 5] = value
    with pytest.raises(NumericsError, match=r"block 'k', row 2 of its batch: .*look at that example"):
        round_trip(text, x, FACTORS)


@pytest.mark.parametrize(("text", "size"), [("int8", 3e38), ("int4", 3e37), ("sign", 3e37), ("rank:1:int4", 3e38)])
def test_numbers_beyond_the_scale_are_refused(text, size):
    x = rows(4, 63)
    x[3] *= size / x[3].abs().max()
    with pytest.raises(NumericsError, match=r"block 'k', row 3 of its batch: .*out of the range"):
        round_trip(text, x, FACTORS)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(CODECS),
    st.integers(1, 6),
    st.integers(1, 6),
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=36, max_size=36),
)
def test_any_numbers_come_back_finite_and_no_longer_than_they_were(text, a, b, numbers):
    x = torch.tensor(numbers)[: a * b][None]
    x = torch.where(x.abs() < 1e-3, 0.0, x) if "float16" in text else x
    coded, row = round_trip(text, x, (a, b))
    assert bool(row.flat().isfinite().all()) or "float16" in text  # whose range the writer checks
    assert bool(((coded.captured >= 0) & (coded.captured <= 1)).all())


@pytest.mark.parametrize("text", CODECS)
def test_blocks_of_one_shape_are_coded_together_as_alone(text):
    codec, blocks = Codec.parse(text), {name: rows(6, 63, seed=seed) for seed, name in enumerate("abc")}
    together = encode_blocks(codec, blocks, FACTORS)
    for (key, each), block in zip(blocks.items(), together, strict=True):
        alone = encode(codec, each, FACTORS, key=key)
        assert alone.tensors.keys() == block.tensors.keys()
        assert torch.allclose(block.captured, alone.captured, atol=1e-5)
        found, expected = (
            decode(codec, coded.tensors, key, 63, FACTORS).flat().float() for coded in (block, alone)
        )  # fmt: skip
        assert (found - expected).norm() < 1e-2 * expected.norm()


def test_an_error_in_blocks_coded_together_names_the_block_and_its_row():
    blocks = {name: rows(4, 63, seed=seed) for seed, name in enumerate("ab")}
    blocks["b"][2, 5] = torch.inf
    with pytest.raises(NumericsError, match="block 'b', row 2"):
        encode_blocks(Codec.parse("rank:1:int4"), blocks, FACTORS)

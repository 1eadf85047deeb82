"""The random streams are part of the index format: pinned by literals, and by Philox written out a second time."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from influent.rng import VERSION, Stream

# What version 1 draws, for ever: never edit these numbers. A new law of drawing is a new VERSION beside this one.
KEYS = [
    (0, "model.layers.0.mlp.up_proj", "sjlt-balanced", "in/0/0"),
    (7, "h.1.attn.c_attn", "gauss", "flat/1"),
    (0, "", "", ""),
]
WORDS = [
    [0x6BCBA7B3A5509BCE, 0x8B2439B1B26611BC, 0x14901E08EAF96DC6, 0x940755AE3772534D, 0x38BA74E47728403B],
    [0x079CEA2F25C70A5C, 0x4D1E383D1D07746E, 0x23E773016954B3FC, 0x9083A2B862E9A9CF, 0x4D913695E22152EF],
    [0xF31CDD1304B3561E, 0xAA391889CFEAE055, 0xA35FC224BCA17E7B, 0xB36306D7FA440F8C, 0xC49CC8DBA98E23EC],
]
WORDS_AT_1000003 = [
    [0xB1A712367EA4B23A, 0x6B7C4AF7D2C3D46E, 0x9CCA715906CB508A],
    [0xD09880B7B0F85893, 0x648BF17E6274AEAF, 0xF8EF56CFCEABE7C7],
    [0xD5992E874BF780FA, 0xCA404566089ECB61, 0x12EFB929230E03E1],
]
SIGNS = ["+---++----+--++-++++-+-+", "++---+-++-+-++++---+++--", "+----++++--+-+-+--++--+-"]
SIGNS_AT_62 = ["-+++-", "+++--", "---+-"]
BUCKETS_OF_10 = [
    [4, 5, 0, 5, 2, 3, 6, 8, 2, 7, 9, 2],
    [0, 3, 1, 5, 3, 8, 7, 8, 0, 4, 8, 1],
    [9, 6, 6, 7, 7, 9, 8, 8, 6, 4, 2, 9],
]
SUBSET_6_OF_20 = [[2, 4, 8, 11, 17, 18], [0, 1, 2, 8, 11, 18], [9, 10, 12, 14, 16, 19]]
PERMUTATION_OF_10 = [
    [2, 4, 8, 5, 0, 1, 3, 6, 9, 7],
    [0, 8, 2, 1, 4, 9, 3, 6, 7, 5],
    [9, 2, 1, 8, 3, 4, 7, 6, 0, 5],
]
NORMALS = [
    [-1.2663805484771729, -0.3551943004131317, -1.9798256158828735, -1.0600295066833496],
    [-0.8390300869941711, 2.515289783477783, -1.8214874267578125, -0.7815597653388977],
    [-0.1637260913848877, -0.2765827476978302, -0.28874117136001587, -0.9027173519134521],
]
NORMALS_AT_999 = [
    [1.3330702781677246, -0.18286868929862976, 0.2586461305618286],
    [-0.37165459990501404, -0.8746708631515503, 1.1356765031814575],
    [0.4154292643070221, -1.860107421875, 0.6729824542999268],
]
STREAM = Stream(3, "block", "kind", "in/0")
spots = st.integers(0, 2**40)
counts = st.integers(1, 300)


def as_text(signs: np.ndarray) -> str:
    return "".join("+" if s == 1 else "-" for s in signs.tolist())


@pytest.mark.parametrize("which", range(len(KEYS)))
def test_golden_vectors(which):
    stream = Stream(*KEYS[which])
    assert VERSION == 1
    assert stream.words(5).tolist() == WORDS[which]
    assert stream.words(3, at=1_000_003).tolist() == WORDS_AT_1000003[which]
    assert as_text(stream.signs(24)) == SIGNS[which]
    assert as_text(stream.signs(5, at=62)) == SIGNS_AT_62[which]
    assert stream.buckets(12, 10).tolist() == BUCKETS_OF_10[which]
    assert stream.subset(20, 6).tolist() == SUBSET_6_OF_20[which]
    assert stream.permutation(10).tolist() == PERMUTATION_OF_10[which]
    # Logarithm and cosine may differ in the last place between machines, before the rounding to float32.
    np.testing.assert_allclose(stream.normals(4), np.float32(NORMALS[which]), rtol=1.2e-7, atol=0)
    np.testing.assert_allclose(stream.normals(3, at=999), np.float32(NORMALS_AT_999[which]), rtol=1.2e-7, atol=0)


def philox(key: int, counter: int) -> list[int]:
    """Philox-4x64-10 of Salmon et al. (2011), section 3.3, in Python's integers."""
    low64 = 2**64 - 1
    k0, k1 = key & low64, key >> 64
    x = [(counter >> shift) & low64 for shift in (0, 64, 128, 192)]
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * x[0], 0xCA5A826395121157 * x[2]
        x = [(second >> 64) ^ x[1] ^ k0, second & low64, (first >> 64) ^ x[3] ^ k1, first & low64]
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & low64, (k1 + 0xBB67AE8584CAA73B) & low64
    return x


@pytest.mark.parametrize("key", KEYS)
def test_words_are_philox_keyed_by_a_hash_of_the_name(key):
    text = "influent rng 1\0" + "\0".join(map(str, key))
    number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")
    expected = [word for counter in range(1, 4) for word in philox(number, counter)]  # NumPy counts before it draws
    assert Stream(*key).words(12).tolist() == expected
    assert Stream(*key).words(4, at=4 * 10**12).tolist() == philox(number, 10**12 + 1)


def test_signs_buckets_and_normals_from_the_words_by_hand():
    words = STREAM.words(40).tolist()
    assert STREAM.signs(70).tolist() == [-1 if (words[i // 64] >> (i % 64)) & 1 else 1 for i in range(70)]
    assert STREAM.buckets(40, 7).tolist() == [((word >> 32) * 7) >> 32 for word in words]
    u, v = (words[0] >> 11) + 1, words[1] >> 11
    radius, angle = (-2 * np.log(u / 2**53)) ** 0.5, 2 * np.pi * v / 2**53
    np.testing.assert_allclose(STREAM.normals(2), [radius * np.cos(angle), radius * np.sin(angle)], rtol=1e-6)


@settings(deadline=None)
@given(n=counts, at=st.integers(0, 400))
@pytest.mark.parametrize("what", ["words", "signs", "normals"])
def test_any_place_is_what_a_sequence_from_the_start_has_there(what, n, at):
    draw = getattr(STREAM, what)
    np.testing.assert_array_equal(draw(n, at=at), draw(at + n)[at:])


@settings(deadline=None)
@given(n=counts, at=spots, cut=st.integers(0, 300))
@pytest.mark.parametrize("what", ["words", "signs", "normals"])
def test_two_pieces_are_the_whole_however_far_out(what, n, at, cut):
    draw, cut = getattr(STREAM, what), min(cut, n - 1)
    np.testing.assert_array_equal(np.concatenate([draw(cut, at=at), draw(n - cut, at=at + cut)]), draw(n, at=at))


def test_dtypes():
    drawn = [STREAM.words(3), STREAM.signs(3), STREAM.buckets(3, 9), STREAM.subset(9, 3), STREAM.normals(3)]
    assert [str(x.dtype) for x in drawn] == ["uint64", "int8", "int64", "int64", "float32"]


@pytest.mark.parametrize(
    "other",
    [
        Stream(4, "block", "kind", "in/0"), Stream(3, "blocks", "kind", "in/0"), Stream(3, "block", "kinds", "in/0"),
        Stream(3, "block", "kind", "out/0"), Stream(3, "block", "kind", "in/1"), Stream(33, "block", "kind", "in/0"),
        Stream(3, "blockkind", "", "in/0"),
    ],
)  # fmt: skip
def test_every_part_of_the_key_matters(other):
    assert not set(STREAM.words(500).tolist()) & set(other.words(500).tolist())
    assert abs(np.corrcoef(STREAM.normals(10_000), other.normals(10_000))[0, 1]) < 0.05


@pytest.mark.parametrize("k", [2, 7, 64, 1000])
def test_buckets_are_uniform(k):
    counted = np.bincount(STREAM.buckets(100 * k, k), minlength=k)
    assert len(counted) == k
    # Chi-square has mean k - 1 and standard deviation sqrt(2 (k - 1)).
    assert abs(((counted - 100) ** 2 / 100).sum() - (k - 1)) < 4 * (2 * (k - 1)) ** 0.5


def test_every_bit_of_the_words_is_a_fair_coin():
    ones = np.unpackbits(STREAM.words(20_000).view(np.uint8).reshape(-1, 8), axis=1, bitorder="little").mean(0)
    assert np.abs(ones - 0.5).max() < 4.5 * 0.5 / 20_000**0.5


def test_normals_have_normal_moments():
    x = STREAM.normals(200_000).astype(np.float64)
    # Standard errors of the first four moments of n normals: sqrt(1, 2, 15, 96) / sqrt(n).
    for power, moment, spread in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert abs((x**power).mean() - moment) < 4 * (spread / len(x)) ** 0.5
    assert abs(np.corrcoef(x[::2], x[1::2])[0, 1]) < 4 / 100_000**0.5
    assert abs((np.abs(x) < 1.0).mean() - 0.6827) < 0.005


@settings(deadline=None)
@given(n=st.integers(1, 400), k=st.integers(1, 400))
def test_subsets_are_ascending_and_without_replacement(n, k):
    kept = STREAM.subset(n, k)
    assert len(kept) == min(n, k)
    assert (np.diff(kept) > 0).all()
    assert kept[0] >= 0 and kept[-1] < n


@settings(deadline=None)
@given(n=st.integers(2, 400), k=st.integers(1, 400))
def test_subsets_are_nested(n, k):
    assert set(STREAM.subset(n, k).tolist()) <= set(STREAM.subset(n, k + 1).tolist())


@settings(deadline=None)
@given(n=st.integers(1, 500))
def test_a_permutation_has_every_number_once_and_is_led_by_the_subset(n):
    order = STREAM.permutation(n)
    assert sorted(order.tolist()) == list(range(n))
    assert sorted(order[: n // 2].tolist()) == STREAM.subset(n, n // 2).tolist()


def test_subsets_and_permutations_are_uniform_over_seeds():
    seeds, n, k = 3000, 12, 5
    kept = np.zeros(n)
    places = np.zeros((n, n))
    for seed in range(seeds):
        stream = Stream(seed, "block", "kind", "in/0")
        kept[stream.subset(n, k)] += 1
        places[np.arange(n), stream.permutation(n)] += 1
    p = k / n
    assert np.abs(kept / seeds - p).max() < 4 * (p * (1 - p) / seeds) ** 0.5
    assert np.abs(places / seeds - 1 / n).max() < 4.5 * (1 / n / seeds) ** 0.5

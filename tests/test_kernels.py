"""Every kernel gives the float64 inner products of what is stored, whatever is asked and however it is cut."""

import pytest
import torch

from influent import asking, kernels
from influent import score as score_module
from influent.codec import Codec
from influent.coding import encode
from influent.gradients import Flat, LowRank
from influent.kernels import Sums, prepare
from influent.reduce import Full
from influent.score import query_energy, score
from influent.storage import Store

FACTORS = (9, 7)


def pairs(n: int, rank: int, factors=FACTORS, *, seed: int = 0) -> LowRank:
    rng = torch.Generator().manual_seed(seed)
    a, b = factors
    return LowRank(torch.randn(n, rank, b, generator=rng), torch.randn(n, rank, a, generator=rng))


def queries(n: int, width: int = 63, *, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def products(row, q) -> torch.Tensor:
    return q.double() @ row.to(torch.float64).flat().T


def added(asked, row) -> torch.Tensor:
    scores = torch.zeros(len(asked), len(row), dtype=torch.float64)
    sums = Sums(scores)
    asked.add(sums, row)
    sums.close()
    return scores


def best_part(q: torch.Tensor, factors, rank: int) -> torch.Tensor:
    u, s, v = torch.linalg.svd(q.double().unflatten(1, factors), full_matrices=False)
    return ((u[..., :rank] * s[:, None, :rank]) @ v[:, :rank]).flatten(1)


def only(monkeypatch, kernel: str) -> None:
    """Make one kernel free, so that it is the one chosen."""
    for name in ("BETWEEN", "WHOLE", "CUT"):
        monkeypatch.setattr(kernels, name, 0.0 if name == kernel else 1.0)
    monkeypatch.setattr(kernels, "FORM", 0.0 if kernel == "WHOLE" else 1.0)


@pytest.mark.parametrize("kernel", ["BETWEEN", "WHOLE"])
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("num_queries", [1, 5])
@pytest.mark.parametrize("pieces", [None, 1, 4])
@pytest.mark.parametrize("factors", [(9, 7), (7, 9), (63, 1)])
def test_both_kernels_are_the_inner_products(monkeypatch, kernel, rank, num_queries, pieces, factors):
    only(monkeypatch, kernel)
    if pieces:
        monkeypatch.setattr(kernels, "CHUNK_NUMBERS", pieces)
        monkeypatch.setattr(kernels, "LONGEST_SUM", pieces)
    row, q = pairs(11, rank, factors), queries(num_queries)
    expected = products(row, q)
    torch.testing.assert_close(added(prepare(q, factors, None), row), expected, rtol=1e-5, atol=1e-5)
    half = row.to(torch.bfloat16)
    torch.testing.assert_close(added(prepare(q, factors, None), half), products(half, q), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", ["BETWEEN", "WHOLE", "CUT"])
@pytest.mark.parametrize("query_rank", [1, 2, 3])
@pytest.mark.parametrize("pieces", [None, 4])
def test_cut_queries_score_as_their_best_part_in_every_kernel(monkeypatch, kernel, query_rank, pieces):
    only(monkeypatch, kernel)
    if pieces:
        monkeypatch.setattr(kernels, "CHUNK_NUMBERS", pieces)
        monkeypatch.setattr(kernels, "LONGEST_SUM", pieces)
    row, q = pairs(11, 2), queries(4)
    asked = prepare(q, FACTORS, query_rank)
    part = best_part(q, FACTORS, query_rank)
    torch.testing.assert_close(added(asked, row), products(row, part), rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(
        asked.captured.double(), part.square().sum(1) / q.double().square().sum(1), rtol=1e-3, atol=0
    )


def test_queries_are_cut_only_where_pairs_are_smaller():
    for factors, rank in ((None, 1), (FACTORS, None), (FACTORS, 4), ((63, 1), 1)):
        asked = prepare(queries(3), factors, rank)
        assert asked.cut is None and torch.equal(asked.whole, queries(3))
    dense = Flat(queries(5, seed=9))
    assert torch.equal(added(prepare(queries(3), None, 2), dense), added(prepare(queries(3), None, None), dense))


def test_few_queries_do_not_form_the_rows_and_many_do():
    for num_queries, rank, kernel in ((1, None, "between"), (300, None, "whole"), (4, 1, "cut")):
        assert kernels._cheapest(num_queries, rank, 2, 36, 36)[0] == kernel


def test_long_sums_of_pairs_do_not_drift():
    """2^20 numbers of one sign along one side: float32 alone would be off by 1e-4 or so."""
    rng = torch.Generator().manual_seed(2)
    row = LowRank(torch.rand(1, 1, 2, generator=rng) + 1, torch.rand(1, 1, 1 << 20, generator=rng) + 1)
    q = torch.rand(1, 2 << 20, generator=rng) + 1
    torch.testing.assert_close(added(prepare(q, (1 << 20, 2), None), row), products(row, q), rtol=1e-6, atol=0)


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_low_rank_row_is_its_matrix(rank, dtype):
    row = LowRank(*(side.to(dtype) for side in (pairs(6, rank).u, pairs(6, rank).v)))
    flat = row.to(torch.float64).flat()
    assert flat.shape == (6, 63) and len(row) == 6
    exact = torch.einsum("bri,bro->bio", row.v.double(), row.u.double()).flatten(1)
    torch.testing.assert_close(flat, exact)
    torch.testing.assert_close(row.squares(), exact.square().sum(1))
    torch.testing.assert_close(Flat(exact.float()).squares(), exact.square().sum(1), rtol=1e-6, atol=0)
    q = queries(4).double()
    torch.testing.assert_close(row.dot(q), q @ exact.T)
    torch.testing.assert_close(Flat(exact).dot(q), q @ exact.T)
    for lo, hi in ((0, 63), (0, 1), (3, 20), (6, 7), (7, 14), (62, 63)):
        torch.testing.assert_close(row.to(torch.float64).columns(lo, hi), exact[:, lo:hi])
        assert torch.equal(Flat(exact).columns(lo, hi), exact[:, lo:hi])
    assert torch.equal(row[2:4].flat(), row.flat()[2:4])


@pytest.mark.parametrize("scale", [1e-18, 1e18])
def test_squares_of_extreme_rows_neither_vanish_nor_overflow(scale):
    row = LowRank(pairs(3, 2).u * scale, pairs(3, 2).v * scale)
    torch.testing.assert_close(row.squares(), pairs(3, 2).squares() * scale**4, rtol=1e-5, atol=0)


class Shard:
    """A range of coded rows in memory."""

    def __init__(self, codec, rows, lo, name):
        from influent.coding import decode

        self.lo, self.hi, self.name, self._codec = lo, lo + len(rows["a"]), name, codec
        self.ids = torch.arange(self.lo, self.hi)
        self._coded = {key: encode(codec, x, self.factors(key), key=key).tensors for key, x in rows.items()}
        self._widths, self._decode = {key: x.shape[1] for key, x in rows.items()}, decode

    @staticmethod
    def factors(key):
        return FACTORS if key == "a" else None

    def grads(self, key, lo=0, hi=None):
        part = {name: x[lo:hi] for name, x in self._coded[key].items()}
        return self._decode(self._codec, part, key, self._widths[key], self.factors(key))


class Source:
    """Coded rows in shards of `size`."""

    def __init__(self, codec, rows, size):
        self.n, self.widths = len(rows["a"]), {key: x.shape[1] for key, x in rows.items()}
        self.digest, self.history, self.store = "", [], Store("memory://nothing-is-stored")
        self.shards = [
            Shard(codec, {key: x[lo : lo + size] for key, x in rows.items()}, lo, str(lo))
            for lo in range(0, self.n, size)
        ]


ROWS = {"a": queries(23, seed=4), "b": queries(23, 17, seed=5)}
ASKED = {"a": queries(3, seed=6), "b": queries(3, 17, seed=7)}


def decoded(source) -> dict[str, torch.Tensor]:
    return {key: torch.cat([s.grads(key).to(torch.float64).flat() for s in source.shards]) for key in source.widths}


@pytest.mark.parametrize(
    "text", ["bfloat16", "int8", "int4", "sign", "rank:1", "rank:2:int8", "rank:2:int4", "rank:1:sign"]
)
@pytest.mark.parametrize("normalize", ["none", "cosine"])
def test_scores_are_those_of_the_decoded_rows_for_any_shard_and_window(monkeypatch, text, normalize):
    codec = Codec.parse(text)
    whole = Source(codec, ROWS, 23)
    dense = decoded(whole)
    expected = sum(ASKED[key].double() @ dense[key].T for key in dense)
    if normalize == "cosine":
        lengths = [sum(x[key].double().square().sum(1) for key in dense).sqrt() for x in (ASKED, dense)]
        expected = expected / (lengths[0][:, None] * lengths[1])
    for size, window, fetch in ((23, 1 << 22, 1 << 21), (7, 6, 200), (1, 1, 1)):
        monkeypatch.setattr(score_module, "WINDOW_SCORES", window)
        monkeypatch.setattr(asking, "FETCH_NUMBERS", fetch)
        got = score(Source(codec, ROWS, size), ASKED, {"all": Full()}, normalize=normalize)["all"]
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


def test_query_rank_scores_the_cut_queries_and_says_what_they_keep():
    source = Source(Codec.parse("rank:2:float32"), ROWS, 9)
    part = {"a": best_part(ASKED["a"], FACTORS, 2), "b": ASKED["b"].double()}
    expected = sum(part[key] @ x.T for key, x in decoded(source).items())
    got = score(source, ASKED, {"all": Full()}, query_rank=2)["all"]
    torch.testing.assert_close(got.double(), expected, rtol=2e-3, atol=5e-3)
    squares = [sum(x[key].double().square().sum(1) for key in part) for x in (part, ASKED)]
    energy = query_energy(source, ASKED, 2)
    torch.testing.assert_close(energy, squares[0] / squares[1], rtol=1e-3, atol=0)
    assert query_energy(source, {key: q * 0 for key, q in ASKED.items()}, 2).tolist() == [1.0] * 3
    full = score(source, ASKED, {"all": Full()}, query_rank=9)["all"]
    assert torch.equal(full, score(source, ASKED, {"all": Full()})["all"])


@pytest.mark.parametrize("longest", [1 << 16, 200, 1])
def test_small_blocks_of_one_shape_are_summed_together(monkeypatch, longest):
    """The sum over blocks is that of the blocks, whatever waits to be summed, and nothing is left behind."""
    monkeypatch.setattr(kernels, "LONGEST_SUM", longest)
    blocks = [(pairs(11, 2, seed=i), queries(3, seed=90 + i)) for i in range(5)]
    scores = torch.zeros(3, 11, dtype=torch.float64)
    sums = Sums(scores)
    for row, q in blocks:
        prepare(q, FACTORS, None).add(sums, row)
    sums.close()
    before = scores.clone()
    sums.close()
    assert torch.equal(scores, before)
    torch.testing.assert_close(scores, sum(products(row, q) for row, q in blocks), rtol=1e-5, atol=1e-5)

"""Low-rank curvature: exact at full rank, folded = split, the same for any shards, memory or order, and resumable."""

import json
import re
from pathlib import Path

import oracle
import pytest
import torch
from small_index import random_rows, write_index
from torch import Tensor

from influent import gram as gram_module
from influent import lowrank, score
from influent.curvature import find, fit, list_fitted
from influent.damping import DEFAULT, Damping, Published
from influent.errors import InfluentError, NumericsError, SpecError
from influent.gradients import Flat
from influent.gram import BlockRows
from influent.lowrank import (
    Sketch,
    Spectrum,
    Stored,
    Woodbury,
    leading_spectrum,
    spectrum_by_iteration,
    spectrum_exactly,
    spectrum_of,
    start,
)
from influent.rowstore import Index, Shard

RECORDED = json.loads((Path(__file__).parent / "golden" / "spectrum.json").read_text())
SHAPES = [(1, 6), (1, 1), (7, 7), (40, 7), (12, 30)]  # N, K
CODECS = ["float32", "bfloat16", "int8", "int4", "sign", "rank:2:float32", "rank:1:bfloat16", "rank:2:int4"]
FORMS = ["lowrank", "sketch"]


def stored(index: Index, key: str = "a") -> Tensor:
    return torch.cat([shard.grads(key).to(torch.float64).flat() for shard in index.shards])


def near(got: Tensor, expected: Tensor, tolerance: float) -> None:
    assert float((got - expected).norm()) <= tolerance * float(expected.norm()) + 1e-300


def q_of(width: int, count: int = 5) -> Tensor:
    return torch.randn(count, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def powered(num_rows: int, width: int, *, seed: int = 0, exponent: float = 1.0) -> Tensor:
    """Rows whose covariance has eigenvalues near j^-exponent."""
    rng = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(width, width, generator=rng))[0]
    return (torch.randn(num_rows, width, generator=rng) * torch.arange(1, width + 1) ** (-exponent / 2)) @ turn


def all_scores(index: Index, curvature, queries: Tensor) -> Tensor:
    return torch.stack([curvature.solver(key)(queries) @ stored(index, key).T for key in index.widths]).sum(0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("damping", ["relative:0.1", "absolute:0.01"])
@pytest.mark.parametrize(("num_rows", "width"), SHAPES)
def test_full_rank_is_the_exact_inverse(tmp_path, num_rows, width, damping, form):
    index = write_index(tmp_path / "index", random_rows(num_rows, {"a": width}), shard_rows=3)
    amount = Damping.parse(damping)
    exact, found = fit(index, damping=amount), fit(index, curvature=f"{form}:30", damping=amount)
    q = q_of(width)
    rows = stored(index)
    lam = exact.health()["a"]["lambda"]
    inverse = oracle.damped_inverse(rows, lam)
    # Eigenvectors in float32 are off by 1e-8 times (s / lambda), which is up to 1e4 with the absolute damping here.
    tolerance = 1e-6 if damping == "relative:0.1" else 5e-6
    near(found.solver("a")(q), q @ inverse, tolerance)
    near(found.solver("a")(q), exact.solver("a")(q), tolerance)
    near(found.solver("a")(q) @ rows.T, q @ inverse @ rows.T, tolerance)
    near(found.solver("a").self_influence(), oracle.self_influence({"a": rows}, {"a": inverse}), tolerance)
    health = found.health()["a"]
    assert health["lambda"] == pytest.approx(lam, rel=1e-12)
    assert health["d_eff"] == pytest.approx(exact.health()["a"]["d_eff"], rel=1e-6)
    assert (health["rank"], health["tail"]) == (min(num_rows, width), 0.0)
    assert health["captured"] == pytest.approx(1.0)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("num_rows", [9, 50])
def test_the_curvature_is_that_of_the_rows_as_stored(tmp_path, num_rows, codec):
    rows = random_rows(num_rows, {"a": 24})
    index = write_index(tmp_path / "index", rows, codec=codec, factors={"a": (4, 6)}, shard_rows=4)
    inverse = oracle.damped_inverse(stored(index), oracle.relative(stored(index), 0.1))
    q = q_of(24)
    near(fit(index, damping=DEFAULT).solver("a")(q), q @ inverse, 1e-9)
    found = fit(index, curvature="lowrank:24", damping=DEFAULT)
    near(found.solver("a")(q), q @ inverse, 1e-6)
    assert not torch.equal(stored(index).float(), rows["a"]) or codec in ("float32",)


def test_scores_of_several_blocks_are_the_oracle_s(tmp_path):
    rows = random_rows(20, {"a": 12, "b": 40})
    index = write_index(tmp_path / "index", rows, codec="rank:4:float32", factors={"a": (3, 4), "b": (5, 8)})
    found = fit(index, curvature="lowrank", damping=DEFAULT)
    dense = {key: stored(index, key) for key in rows}
    inverses = {key: oracle.damped_inverse(g, oracle.relative(g, 0.1)) for key, g in dense.items()}
    near(
        score.self_influence(index, found).double(), oracle.self_influence(dense, inverses), 1e-6
    )  # relatif divides by its root
    q = {key: q_of(width) for key, width in index.widths.items()}
    near(
        oracle.scores(dense, score.precondition(q, found)),
        oracle.scores(dense, {key: q[key] @ inverses[key] for key in q}),
        1e-6,
    )


def test_folded_is_the_dense_inverse_and_the_paper_s_split_form():
    g = powered(40, 30).double()
    values, vectors = torch.linalg.eigh(oracle.fisher(g))
    s, v, lam, tau, q = values.flip(0)[:8], vectors.flip(1)[:, :8], 0.02, 0.003, q_of(30)
    eye = torch.eye(30, dtype=torch.float64)
    dense = torch.linalg.inv(v @ torch.diag(s) @ v.T + tau * (eye - v @ v.T) + lam * eye)
    folded = Woodbury(v, torch.eye(8, dtype=torch.float64), s, lam, tau)
    near(folded(q), q @ dense, 1e-12)
    # The split form: the residual dot product, plus each projected coordinate weighed by the difference.
    base = lam + tau
    split = q @ g.T / base - ((q @ v) * (s - tau) / (base * (lam + s))) @ (g @ v).T
    near(folded(q) @ g.T, split, 1e-12)


@pytest.mark.parametrize(("num_rows", "width"), [(60, 40), (40, 60)])
@pytest.mark.parametrize("form", FORMS)
def test_the_solver_is_the_truncated_model_it_says_it_is(tmp_path, num_rows, width, form):
    index = write_index(tmp_path / "index", {"a": powered(num_rows, width)})
    found = fit(index, curvature=f"{form}:10", damping=DEFAULT)
    g, health = stored(index), found.health()["a"]
    values, vectors = (x.flip(-1) for x in torch.linalg.eigh(oracle.fisher(g)))
    if form == "lowrank":  # whose vectors are those of F
        v, s = vectors[:, :10], values[:10]
        assert health["tail"] == pytest.approx(float(values[10:].sum()) / (min(num_rows, width) - 10), rel=1e-2)
        tau, eye = health["tail"], torch.eye(width, dtype=torch.float64)
        inverse = torch.linalg.inv(v @ torch.diag(s - tau) @ v.T + (tau + health["lambda"]) * eye)
        near(found.solver("a")(q_of(width)), q_of(width) @ inverse, 2e-2)
    solver = found.solver("a")
    near(solver.self_influence(), (solver(g) * g).sum(1), 1e-3)
    assert 0.5 < health["captured"] <= float(values[:10].sum() / values.sum()) + 1e-9
    assert health["top"] == pytest.approx(values[:3].tolist(), rel=1e-2 if form == "lowrank" else 0.2)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("width", [20, 60])
def test_shards_sub_batches_memory_and_order_change_nothing_but_rounding(tmp_path, monkeypatch, width, form):
    rows = powered(31, width)
    order = torch.randperm(31, generator=torch.Generator().manual_seed(3))
    q = q_of(width)

    def scores(name: str, x: Tensor, shard_rows: int, memory: int = 256) -> Tensor:
        index = write_index(tmp_path / name, {"a": x}, shard_rows=shard_rows)
        return all_scores(index, fit(index, curvature=f"{form}:6", damping=DEFAULT, memory=memory), q)

    expected = scores("whole", rows, 31)
    near(scores("shards", rows, 4), expected, 1e-9)
    near(scores("memory", rows, 7, memory=1), expected, 1e-9)
    near(scores("order", rows[order], 5), expected[:, order], 1e-9)
    monkeypatch.setattr(gram_module, "SHARE", (256 << 20) // (8 * 3 * width))  # three rows at a time
    near(scores("pieces", rows, 9), expected, 1e-9)


@pytest.mark.parametrize("codec", ["float32", "sign", "rank:1:int4"])
def test_what_is_held_of_the_rows_is_bounded(tmp_path, monkeypatch, codec):
    rows = {"a": torch.randn(30, 4096)}
    index = write_index(tmp_path / "index", rows, codec=codec, factors={"a": (64, 64)}, shard_rows=15)
    decoded, read = [], Shard.grads

    def grads(self, key, lo=0, hi=None):
        decoded.append((hi if hi is not None else len(self)) - lo)
        return read(self, key, lo, hi)

    monkeypatch.setattr(Shard, "grads", grads)
    chunks = [g.numel() * 8 for _, _, g in BlockRows(index, "a", 1).chunks()]
    assert max(chunks) <= (1 << 20) // gram_module.SHARE
    assert max(decoded) * 4096 * 8 <= (1 << 20) // gram_module.SHARE
    decoded.clear()
    columns = [g.numel() * 8 for g in BlockRows(index, "a", 1).columns()]
    assert max(columns) <= (1 << 20) // gram_module.SHARE
    assert max(decoded) * 4096 * 8 <= (1 << 20) // gram_module.SHARE
    near(torch.cat([g.clone() for g in BlockRows(index, "a", 1).columns()], dim=1), stored(index), 1e-7)
    near(torch.cat([g.clone() for *_, g in BlockRows(index, "a", 1, 13).chunks()]), stored(index)[13:], 1e-7)


def recorded(num_queries: int = 30) -> tuple[Tensor, Tensor]:
    """Rows with the recorded spectrum in random directions, and queries of the same law."""
    n, width = RECORDED["num_rows"], RECORDED["width"]
    rng = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(n, n, generator=rng, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(width, n, generator=rng, dtype=torch.float64))[0]
    sizes = (torch.tensor(RECORDED["eigenvalues"], dtype=torch.float64) * n).sqrt()
    mixed = torch.randn(num_queries, n, generator=rng, dtype=torch.float64) / n**0.5
    return (left * sizes) @ right.T, (mixed * sizes) @ right.T


def ranks(x: Tensor) -> Tensor:
    return x.argsort(dim=1).argsort(dim=1).double()


def spearman(one: Tensor, other: Tensor) -> float:
    a, b = (ranks(x) - (x.shape[1] - 1) / 2 for x in (one, other))
    return float(((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).mean())


def test_the_tail_over_min_n_k_is_what_helps_on_a_recorded_spectrum(tmp_path):
    g, q = recorded()
    n, width = g.shape
    index = write_index(tmp_path / "index", {"a": g}, shard_rows=n)
    g = stored(index)
    exact = q @ oracle.damped_inverse(g, oracle.relative(g, 0.1)) @ g.T
    agreement = {}
    for rank in (64, 128):
        found = spectrum_by_iteration(BlockRows(index, "a"), rank)
        v, s, lam = found.vectors[:, :rank], found.values[:rank], 0.1 * found.trace / n
        for name, tail in (
            ("ours", found.tail(rank)), ("none", 0.0), ("paper", found.tail(rank) * (n - rank) / (width - rank)),
        ):  # fmt: skip
            agreement[rank, name] = spearman(Woodbury(v, torch.eye(rank).double(), s, lam, tail)(q) @ g.T, exact)
    for rank in (64, 128):
        assert agreement[rank, "ours"] > agreement[rank, "paper"] + 0.03, agreement
        assert agreement[rank, "paper"] > agreement[rank, "none"], agreement
    assert agreement[128, "ours"] > 0.97


@pytest.mark.parametrize(("num_rows", "width"), [(60, 40), (30, 40)])
def test_the_published_rules(tmp_path, num_rows, width):
    index = write_index(tmp_path / "index", {"a": powered(num_rows, width, exponent=3.0)})
    g = stored(index)
    squares = torch.linalg.svdvals(g).square()  # of G itself, as published
    paper = fit(index, curvature="lowrank:8", damping=Published("paper")).health()["a"]
    assert paper["lambda"] * num_rows == pytest.approx(0.1 * float(squares[:18].mean()), rel=1e-3)
    assert paper["tail"] * num_rows == pytest.approx(float(squares[8:].sum()) / (width - 8), rel=1e-3)
    release = fit(index, curvature="lowrank:8", damping=Published("release")).health()["a"]
    assert release["lambda"] * num_rows == pytest.approx(0.5 * float(squares.sum()) / width, rel=1e-9)
    assert release["tail"] == 0.0
    assert [find(index, f"lowrank:8:{rule}").name for rule in ("paper", "release")] == [
        "lowrank:8:paper", "lowrank:8:release"
    ]  # fmt: skip
    with pytest.raises(SpecError, match="parity is 'prose', expected one of paper, release"):
        Published("prose")
    with pytest.raises(SpecError, match="parity paper is for a low-rank curvature"):
        fit(index, damping=Published("paper"))


@pytest.mark.parametrize("form", FORMS)
def test_degenerate_blocks(tmp_path, form):
    rows = random_rows(9, {"live": 4, "dead": 5, "twice": 6})
    rows["dead"].zero_()
    rows["twice"][:] = rows["twice"][:1]
    index = write_index(tmp_path / "index", rows)
    q = torch.randn(2, 5)
    found = fit(index, curvature=f"{form}:3", damping=DEFAULT)
    assert found.solver("dead")(q).tolist() == torch.zeros(2, 5).tolist()
    assert found.solver("dead").self_influence().tolist() == [0.0] * 9
    health = found.health()["dead"]
    assert (health["form"], health["rank"], health["d_eff"], health["captured"]) == ("zero", 0, 0.0, 1.0)
    assert found.health()["twice"]["rank"] == 1
    inverse = oracle.damped_inverse(rows["twice"], found.health()["twice"]["lambda"])
    near(found.solver("twice")(q_of(6)), q_of(6) @ inverse, 1e-6)
    absolute = fit(index, curvature=f"{form}:3", damping=Damping("absolute", 0.5))
    torch.testing.assert_close(absolute.solver("dead")(q), q / 0.5)
    torch.testing.assert_close(absolute.solver("dead").self_influence(), torch.zeros(9, dtype=torch.float64))


def test_rows_that_are_not_finite_are_named(tmp_path, monkeypatch):
    index = write_index(tmp_path / "index", random_rows(9, {"a": 4}))
    monkeypatch.setattr(Shard, "grads", lambda self, key, lo, hi: Flat(torch.full((hi - lo, 4), float("inf"))))
    with pytest.raises(NumericsError, match="block 'a': its rows are not finite: run `influent verify`"):
        fit(index, curvature="lowrank:2", damping=DEFAULT)


def test_the_start_is_orthonormal_and_belongs_to_the_block():
    one, other = start("a", 50, 7), start("b", 50, 7)
    near(one.T @ one, torch.eye(7, dtype=torch.float64), 1e-14)
    assert not torch.allclose(one, other)
    assert torch.equal(one, start("a", 50, 7))
    assert torch.equal(start("a", 5, 9), torch.eye(5, dtype=torch.float64))


def test_sketches_add_up():
    g, basis = powered(40, 30).double(), start("a", 30, 12)

    def sums(x: Tensor) -> Sketch:
        return Sketch(x.T @ (x @ basis), float(x.square().sum()), len(x))

    whole, parts = spectrum_of(sums(g), basis), spectrum_of(sums(g[:7]) + sums(g[7:]), basis)
    near(parts.values, whole.values, 1e-12)
    assert isinstance(whole, Spectrum)
    near(
        parts.vectors @ torch.diag(parts.values) @ parts.vectors.T,
        whole.vectors @ torch.diag(whole.values) @ whole.vectors.T,
        1e-12,
    )


def test_precision_follows_the_eigenvalues(tmp_path):
    vectors = torch.linalg.qr(torch.randn(200, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    values = torch.tensor([1e4, 500, 101, 99, 5, 1], dtype=torch.float64)
    found = Stored.of(vectors, values, 1.0)
    assert (found.fine.shape, found.coarse.shape) == ((200, 3), (200, 3))
    assert found.least_base(values) == pytest.approx(0.99)
    assert Stored.of(vectors, values, 0.0).least_base(values) == pytest.approx(1e4 / lowrank.FLOAT32_REACH)
    rounded = found.vectors()
    straight = rounded @ found.correction()
    eye = torch.eye(6, dtype=torch.float64)
    assert float((straight.T @ straight - eye).norm()) < 0.05 * float((rounded.T @ rounded - eye).norm())
    lam = 1.0
    exact = Woodbury(vectors, eye, values, lam, 0.0)(vectors.T)
    plain, corrected = (Woodbury(rounded, turn, values, lam, 0.0)(vectors.T) for turn in (eye, found.correction()))
    inside = [float(((x - exact) @ vectors).norm()) for x in (plain, corrected)]  # what rows like the data's see
    assert inside[1] < 0.3 * inside[0]


@pytest.mark.parametrize("form", FORMS)
def test_too_little_damping_for_the_precision_is_refused_in_a_line(tmp_path, form):
    index = write_index(tmp_path / "index", {"a": powered(80, 60, exponent=2.0), "b": powered(80, 20)})
    fit(index, curvature=f"{form}:20", damping=Damping("relative", 1e-3))
    with pytest.raises(SpecError, match="block '.': .*:60 is stored for a damping of relative:.* --curvature fim") as e:
        fit(index, curvature=f"{form}:60", damping=Damping("absolute", 0.0))
    assert "\n" not in str(e.value)
    least = re.search(r"of (relative:\S+) or more", str(e.value))
    assert least is not None
    fit(index, curvature=f"{form}:60", damping=Damping.parse(least[1]))


def test_names(tmp_path):
    index = write_index(tmp_path / "index", random_rows(12, {"a": 8}))
    assert fit(index, curvature="lowrank", damping=DEFAULT).name == "lowrank:512:relative:0.1"
    assert list_fitted(index) == ["lowrank:512"]
    assert find(index, "lowrank").name == find(index, "lowrank:512").name == "lowrank:512:relative:1"
    assert find(index, "lowrank:512:absolute:2").name == "lowrank:512:absolute:2"
    assert find(index, "lowrank:relative:0.5").name == "lowrank:512:relative:0.5"
    fit(index, curvature="lowrank:4", damping=DEFAULT)
    with pytest.raises(SpecError, match="'lowrank': more than one is fitted: give .* of lowrank:4, lowrank:512, ident"):
        find(index, "lowrank")
    for wrong in ("lowrank:", "lowrank:x", "lowrank:0", "lowrank:-1", "lowrank:4@", "sketch:4@0", "lowrank:4:much"):
        with pytest.raises(InfluentError):
            find(index, wrong)
    with pytest.raises(SpecError, match="memory is 0, expected 1 MiB or more"):
        fit(index, curvature="lowrank:4", damping=DEFAULT, memory=0)
    with pytest.raises(SpecError, match="lowrank:4: all but identity need a damping"):
        fit(index, curvature="lowrank:4")


@pytest.mark.parametrize(("num_rows", "width"), [(30, 12), (12, 30), (20, 20)])
@pytest.mark.parametrize("rank", [3, 8, 30])
def test_the_exact_spectrum_is_that_of_the_matrix(tmp_path, num_rows, width, rank):
    g = powered(num_rows, width)
    index = write_index(tmp_path / "index", {"a": g}, shard_rows=7)
    rows = stored(index)
    found = spectrum_exactly(BlockRows(index, "a"), rank)
    values, vectors = torch.linalg.eigh(rows.T @ rows / num_rows)
    m = min(num_rows, width)
    count = min(rank + 10, m)
    near(found.values, values.flip(0)[:count], 1e-12)
    near(found.vectors @ found.vectors.T, vectors.flip(1)[:, :count] @ vectors.flip(1)[:, :count].T, 1e-9)
    near(found.vectors.T @ found.vectors, torch.eye(count, dtype=torch.float64), 1e-13)
    assert found.trace == pytest.approx(float(values.sum()), rel=1e-12)


def test_a_rank_that_is_no_small_part_is_found_exactly(tmp_path, monkeypatch):
    index = write_index(tmp_path / "index", random_rows(40, {"a": 24}), shard_rows=9)
    rows, asked = BlockRows(index, "a"), []
    monkeypatch.setattr(lowrank, "spectrum_by_iteration", lambda x, r: asked.append(r) or spectrum_by_iteration(x, r))
    exact = spectrum_exactly(rows, 8)
    assert len(leading_spectrum(rows, 9).values) == 19 and asked == []
    near(leading_spectrum(rows, 8).values[:3], exact.values[:3], 1e-9)
    assert asked == [8]


def test_the_exact_spectrum_of_rows_of_low_rank_has_no_noise_in_it(tmp_path):
    g = torch.randn(30, 2, generator=torch.Generator().manual_seed(3)) @ torch.ones(2, 20)
    for shape in (g, g.T.contiguous(), g * 0):
        found = spectrum_exactly(
            BlockRows(write_index(tmp_path / str(shape.shape) / str(float(shape.sum())), {"a": shape}), "a"), 5
        )
        assert len(found.values) == found.vectors.shape[1] == (1 if bool(shape.any()) else 0)


def test_the_paper_s_damping_is_of_r_and_ten_values_in_a_sketch_too(tmp_path):
    index = write_index(tmp_path / "index", {"a": powered(120, 60)}, shard_rows=50)
    found = fit(index, curvature="sketch:20", damping=Published("paper"))
    values = torch.linalg.eigvalsh(stored(index).T @ stored(index) / 120).flip(0)
    assert found.health()["a"]["lambda"] == pytest.approx(0.1 * float(values[:30].mean()), rel=0.1)

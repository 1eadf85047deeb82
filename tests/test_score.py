"""Scores equal their definitions, in one pass; influence equals what leaving examples out does."""

import subprocess
import sys

import oracle
import pytest
import torch
from small_index import random_rows, write_index

from influent import artifact as artifact_module
from influent import asking, gradients, kernels
from influent import score as score_module
from influent.curvature import Damping, fit
from influent.errors import CorruptError, DataError, MismatchError, NumericsError, SpecError
from influent.gradients import Flat
from influent.reduce import Full, Moments, SumBy, TopK
from influent.rowstore import Index, Shard
from influent.score import Member, contrast, precondition, score, score_members, self_influence

WIDTHS = {"a": 5, "b": 17, "c": 1}


def some_queries(widths: dict[str, int], num_queries: int, *, seed: int = 7) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {key: torch.randn(num_queries, width, generator=rng) for key, width in widths.items()}


def stored(index) -> dict[str, torch.Tensor]:
    return {key: torch.cat([shard.rows(key) for shard in index.shards]).double() for key in index.widths}


def all_scores(index, queries, **options) -> torch.Tensor:
    return score(index, queries, {"all": Full()}, **options)["all"]


def assert_near(got, expected, tolerance: float = 2e-6):
    assert got.shape == expected.shape
    assert float((got.double() - expected).abs().max()) <= tolerance * float(expected.abs().max())


def cut_small(monkeypatch, pieces: int) -> None:
    """Every bound on what is held or added up at once becomes `pieces`."""
    for module, name in (
        (asking, "FETCH_NUMBERS"), (kernels, "HELD_NUMBERS"), (score_module, "WINDOW_SCORES"),
        (kernels, "CHUNK_NUMBERS"), (kernels, "LONGEST_SUM"), (gradients, "_SHORT_SUM"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, pieces)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("num_queries", [1, 6])
@pytest.mark.parametrize("pieces", [None, 3])
def test_scores_are_inner_products_with_the_stored_rows(tmp_path, monkeypatch, dtype, num_queries, pieces):
    if pieces:
        cut_small(monkeypatch, pieces)
    index = write_index(tmp_path / "index", random_rows(23, WIDTHS), dtype=dtype, shard_rows=7)
    queries = some_queries(WIDTHS, num_queries)
    exact = oracle.scores(stored(index), queries)
    got = all_scores(index, queries)
    assert got.dtype == torch.float32
    assert_near(got, exact)
    lengths = oracle.norms(queries)[:, None] * oracle.norms(stored(index))
    assert_near(all_scores(index, queries, normalize="cosine"), exact / lengths)


def test_influence_from_end_to_end(tmp_path):
    index = write_index(tmp_path / "index", random_rows(12, WIDTHS), shard_rows=5)
    fitted = fit(index, damping=Damping("relative", 0.1))
    rows, queries = stored(index), some_queries(WIDTHS, 3)
    inverses = {key: oracle.damped_inverse(g, oracle.relative(g, 0.1)) for key, g in rows.items()}
    exact = oracle.scores(rows, {key: q.double() @ inverses[key] for key, q in queries.items()})
    prepared = precondition(queries, fitted)
    assert_near(all_scores(index, prepared), exact)

    h = self_influence(index, fitted)
    assert h.dtype == torch.float32
    assert_near(h, oracle.self_influence(rows, inverses), 1e-7)
    relatif = exact / oracle.self_influence(rows, inverses).sqrt()
    assert_near(all_scores(index, prepared, normalize="relatif", self_influence=h), relatif)


def test_self_influence_is_fitted_once_and_resumes(tmp_path, monkeypatch):
    index = write_index(tmp_path / "index", random_rows(9, WIDTHS))
    identity = fit(index, curvature="identity")

    def kill(stage, done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        self_influence(index, identity, progress=kill)
    real, read = Shard.grads, set()
    monkeypatch.setattr(Shard, "grads", lambda self, key, *where: read.add(key) or real(self, key, *where))
    first = self_influence(index, identity)
    assert read == {"c"}
    assert_near(first, oracle.norms(stored(index)).square(), 1e-7)
    read.clear()
    assert torch.equal(self_influence(index, identity), first)
    assert read == set()


def test_one_pass_for_all_queries_and_reducers(tmp_path, monkeypatch):
    index = write_index(tmp_path / "index", random_rows(23, WIDTHS), shard_rows=4)
    reads, real = [], Shard.grads
    monkeypatch.setattr(
        Shard, "grads",
        lambda self, key, lo, hi: reads.extend((key, self.lo + i) for i in range(lo, hi)) or real(self, key, lo, hi),
    )  # fmt: skip
    monkeypatch.setattr(score_module, "WINDOW_SCORES", 8)
    reducers = {"top": TopK(3), "bottom": TopK(3, largest=False), "all": Full(), "moments": Moments()}
    seen = []
    queries = some_queries(WIDTHS, 5)
    results = score(
        index, queries, {**reducers, "groups": SumBy(torch.arange(23) % 2)}, normalize="cosine",
        progress=lambda stage, done, total: seen.append((stage, done, total)),
    )  # fmt: skip
    assert sorted(reads) == sorted((key, row) for row in range(23) for key in WIDTHS)
    assert seen == [("score", done, 23) for done in (4, 8, 12, 16, 20, 23)]
    full = results["all"]
    assert (results["top"].rows.tolist(), results["top"].scores.tolist()) == oracle.ranked(full, 3, True)
    assert (results["bottom"].rows.tolist(), results["bottom"].scores.tolist()) == oracle.ranked(full, 3, False)
    torch.testing.assert_close(results["moments"].mean, full.double().mean(dim=1))
    torch.testing.assert_close(results["groups"][:, 1], full.double()[:, 1::2].sum(dim=1))


def test_results_do_not_depend_on_the_shards(tmp_path):
    rows, queries = random_rows(23, WIDTHS), some_queries(WIDTHS, 2)
    results = [all_scores(write_index(tmp_path / str(n), rows, shard_rows=n), queries) for n in (1, 6, 23)]
    assert_near(results[0], results[2].double(), 1e-6)
    assert_near(results[1], results[2].double(), 1e-6)


@pytest.mark.parametrize("normalize", ["none", "cosine", "relatif"])
def test_rows_and_queries_of_zeros_score_zero(tmp_path, normalize):
    rows = random_rows(6, WIDTHS)
    for g in rows.values():
        g[2] = 0
    index = write_index(tmp_path / "index", rows)
    queries = {key: torch.cat([q, torch.zeros_like(q)]) for key, q in some_queries(WIDTHS, 1).items()}
    h = self_influence(index, fit(index, curvature="identity")) if normalize == "relatif" else None
    got = all_scores(index, queries, normalize=normalize, self_influence=h)
    assert got[:, 2].tolist() == [0.0, 0.0] and got[1].tolist() == [0.0] * 6
    assert bool((got[0, [0, 1, 3, 4, 5]] != 0).all())


@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e12, 1e25])
def test_cosine_does_not_depend_on_the_scale_of_the_gradients(tmp_path, scale):
    rows, queries = random_rows(6, WIDTHS), some_queries(WIDTHS, 2)
    expected = all_scores(write_index(tmp_path / "one", rows), queries, normalize="cosine")
    scaled = write_index(tmp_path / "scaled", {key: g * scale for key, g in rows.items()})
    assert_near(all_scores(scaled, queries, normalize="cosine"), expected.double(), 2e-6)


def test_long_sums_do_not_drift(tmp_path):
    width = 1 << 22
    rows = {"a": torch.rand(2, width, generator=torch.Generator().manual_seed(3)) + 1}
    index = write_index(tmp_path / "index", rows)
    queries = {"a": rows["a"][:1]}
    exact = oracle.scores(rows, queries)
    assert_near(all_scores(index, queries), exact, 1e-6)
    cosine = exact / (oracle.norms(queries)[:, None] * oracle.norms(rows))
    assert_near(all_scores(index, queries, normalize="cosine"), cosine, 1e-6)


def test_a_fast_matmul_chosen_for_the_model_does_not_reach_the_scores(tmp_path):
    index = write_index(tmp_path / "index", random_rows(64, {"a": 256}), shard_rows=64)
    queries = some_queries({"a": 256}, 64)
    exact = all_scores(index, queries)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        fast = all_scores(index, queries)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(fast, exact)


def test_contrast_is_the_difference_of_means(tmp_path):
    index = write_index(tmp_path / "index", random_rows(9, WIDTHS))
    queries, controls = some_queries(WIDTHS, 3), some_queries(WIDTHS, 4, seed=8)
    rows = stored(index)
    expected = oracle.scores(rows, queries).mean(dim=0) - oracle.scores(rows, controls).mean(dim=0)
    assert_near(all_scores(index, contrast(queries, controls)), expected[None])
    with pytest.raises(MismatchError, match="only one has c"):
        contrast(queries, {key: controls[key] for key in "ab"})
    with pytest.raises(DataError, match="at least one of the controls"):
        contrast(queries, {key: q[:0] for key, q in controls.items()})


BAD = [
    (lambda q, h: (q, {"normalize": "l2"}), SpecError, "expected none, cosine or relatif"),
    (lambda q, h: (q, {"normalize": "relatif"}), SpecError, "relatif needs the rows' self-influence"),
    (lambda q, h: (q, {"self_influence": h}), SpecError, "the others take none"),
    (lambda q, h: (q, {"normalize": "relatif", "self_influence": h[:4]}), MismatchError, "each of 9 rows, got 4"),
    (lambda q, h: (q, {"normalize": "relatif", "self_influence": h - 2}), NumericsError, "of row 0.*got -1.0"),
    (lambda q, h: ({"a": q["a"]}, {}), MismatchError, "only one of the two has b, c"),
    (lambda q, h: (q | {"a": torch.zeros(2, 4)}, {}), MismatchError, r"block 'a': expected width 5, got \[4\]"),
    (lambda q, h: (q | {"a": torch.zeros(1, 5)}, {}), DataError, r"the same number.*got \[1, 2\]"),
    (lambda q, h: ({k: x[:0] for k, x in q.items()}, {}), DataError, "at least one"),
    (lambda q, h: (q | {"c": torch.tensor([[0.0], [float("nan")]])}, {}), NumericsError, "query 1, block 'c'"),
    (lambda q, h: ({k: x * 0 + 3e38 for k, x in q.items()}, {}), NumericsError, "score of query 0, row 0.*inf"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input(tmp_path, change, error, message):
    index = write_index(tmp_path / "index", {key: torch.full((9, width), 10.0) for key, width in WIDTHS.items()})
    queries, options = change(some_queries(WIDTHS, 2), torch.ones(9))
    with pytest.raises(error, match=message):
        all_scores(index, queries, **options)


def equal_leverage_regression(num_rows: int = 32, width: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """x [N, d], y [N] where the empirical Fisher of the residual gradients is exactly proportional to the Hessian:
    columns of a Hadamard matrix, mixed by an arbitrary invertible matrix, and residuals of +-1 orthogonal to them."""
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) < num_rows:
        hadamard = torch.cat([torch.cat([hadamard, hadamard]), torch.cat([hadamard, -hadamard])], dim=1)
    rng = torch.Generator().manual_seed(5)
    mix = torch.randn(width, width, dtype=torch.float64, generator=rng) + 2 * torch.eye(width)
    x = hadamard[:, 1 : width + 1] @ mix
    y = x @ torch.randn(width, dtype=torch.float64, generator=rng) + hadamard[:, width + 1]
    return x, y


def test_influence_is_leave_one_out_on_linear_regression(tmp_path):
    x, y = equal_leverage_regression()
    queries = torch.randn(4, x.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    truth = oracle.leave_one_out(x, y, queries)
    torch.testing.assert_close(truth, oracle.leave_one_out_by_hat_matrix(x, y, queries), rtol=1e-9, atol=1e-11)

    residuals = y - x @ oracle.least_squares(x, y)
    index = write_index(tmp_path / "index", {"w": residuals[:, None] * x})
    fitted = fit(index, damping=Damping("absolute", 0.0))
    got = all_scores(index, precondition({"w": queries.float()}, fitted)).double()
    for scores, moved in zip(got, truth, strict=True):
        correlation = float(torch.corrcoef(torch.stack([scores, moved]))[0, 1])
        assert correlation == pytest.approx(1, abs=1e-6)  # and not -1: positive = it raised the prediction
    # Not only in proportion: influence / N is the change, but for the leverage d / N, equal for all rows here.
    assert_near((got / len(x)).float(), truth * (1 - x.shape[1] / len(x)), 1e-5)


def test_influence_is_leave_one_out_on_any_regression_when_the_curvature_is_the_hessian(tmp_path):
    rng = torch.Generator().manual_seed(9)
    x = torch.randn(25, 4, dtype=torch.float64, generator=rng)
    y = x.sum(dim=1) + torch.randn(25, dtype=torch.float64, generator=rng)
    queries = torch.randn(3, 4, dtype=torch.float64, generator=rng)
    x, queries = x.float().double(), queries.float().double()
    residuals = y - x @ oracle.least_squares(x, y)
    leverages = (x @ torch.linalg.inv(x.T @ x) @ x.T).diagonal()
    hessian = fit(write_index(tmp_path / "inputs", {"w": x}), damping=Damping("absolute", 0.0))
    index = write_index(tmp_path / "index", {"w": residuals[:, None] * x})
    got = all_scores(index, precondition({"w": queries.float()}, hessian)).double()
    assert_near((got / len(x) / (1 - leverages)).float(), oracle.leave_one_out(x, y, queries), 1e-5)


MEASURE = """
import sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from small_index import write_index
from influent import gram
from influent.curvature import Damping, fit
from influent.rowstore import Index
from influent.reduce import TopK
from influent.score import precondition, score
torch.set_num_threads(1)
gram.SHARE = 256
index = Index.open(sys.argv[2])
fitted = fit(index, damping=Damping("relative", 0.1))
queries = precondition({key: torch.ones(2, width) for key, width in index.widths.items()}, fitted)
score(index, queries, {"top": TopK(5)}, normalize="cosine")
# Not getrusage's peak, which a new process inherits from the one that started it.
print(next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line))
"""


def test_memory_does_not_grow_with_the_rows(tmp_path, request):
    peaks = []
    for num_rows in (2_000, 32_000):
        path = tmp_path / str(num_rows)
        write_index(path, {"a": torch.randn(num_rows, 256), "b": torch.randn(num_rows, 128)}, shard_rows=1000)
        command = [sys.executable, "-c", MEASURE, str(request.path.parent), str(path)]
        peaks.append(int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) / 1024)
    assert peaks[1] - peaks[0] < 16, f"peak MiB {peaks}; the larger index is 47 MiB"


@pytest.mark.parametrize("remote", [False, True])
def test_a_damaged_shard_is_named_and_no_score_comes_of_it(tmp_path, remote):
    path = f"memory://{tmp_path.name}/index" if remote else tmp_path / "index"
    store = write_index(path, random_rows(9, WIDTHS)).store
    name = "shards/000001.safetensors"
    data = bytearray(store.get(name))
    data[-1] ^= 1
    store.put(name, bytes(data))
    message = r"index/shards/000001\.safetensors: its hash is not the committed one; delete .* `influent index`"
    with pytest.raises(CorruptError, match=message):
        all_scores(Index.open(path), some_queries(WIDTHS, 2))


def test_each_shard_is_hashed_once(tmp_path, monkeypatch):
    index = write_index(tmp_path / "index", random_rows(9, WIDTHS))
    hashed, real = [], artifact_module.hash_object
    monkeypatch.setattr(artifact_module, "hash_object", lambda store, name: hashed.append(name) or real(store, name))
    self_influence(index, fit(index, curvature="identity"))
    all_scores(index, some_queries(WIDTHS, 2))
    assert sorted(name for name in hashed if name.startswith("shards/0")) == [
        "shards/000000.safetensors", "shards/000001.safetensors"
    ]  # fmt: skip


class Unstored:
    """Rows that no file holds: a shard without a hash."""

    def __init__(self, shard: Shard, block: str, value: float):
        self.lo, self.hi, self.name, self.ids = shard.lo, shard.hi, shard.name, shard.ids
        self.read, self.block, self.value = shard.grads, block, value

    def grads(self, key: str, lo: int = 0, hi: int | None = None) -> Flat:
        rows = self.read(key).flat().clone()
        if key == self.block:
            rows[2, 0] = self.value
        return Flat(rows)[lo:hi]


@pytest.mark.parametrize("normalize", ["none", "cosine"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_row_that_is_not_finite_is_blamed_and_not_the_query(tmp_path, normalize, value):
    index = write_index(tmp_path / "index", random_rows(9, WIDTHS))
    index.shards = [Unstored(shard, "b" if shard.lo else "none", value) for shard in index.shards]
    message = "shard 000001, block 'b', row 7: the index's rows are not finite: run `influent verify`"
    with pytest.raises(NumericsError, match=message):
        all_scores(index, some_queries(WIDTHS, 2), normalize=normalize)


@pytest.mark.parametrize("normalize", ["none", "cosine", "relatif"])
def test_members_with_other_shards_and_widths_add_up_in_lockstep(tmp_path, monkeypatch, normalize):
    monkeypatch.setattr(score_module, "WINDOW_SCORES", 10)
    weights, members, expected = (0.5, 2.0, -1.0), [], []
    for number, (weight, shard_rows) in enumerate(zip(weights, (7, 4, 23), strict=True)):
        widths = {"a": 5 + number, f"b{number}": 3}
        index = write_index(tmp_path / str(number), random_rows(23, widths, seed=number), shard_rows=shard_rows)
        queries = some_queries(widths, 3, seed=number)
        h = self_influence(index, fit(index, curvature="identity")) if normalize == "relatif" else None
        members.append(Member(index, queries, weight, h))
        expected.append(weight * all_scores(index, queries, normalize=normalize, self_influence=h).double())
    assert_near(score_members(members, {"all": Full()}, normalize=normalize)["all"], torch.stack(expected).sum(0))
    scale = torch.rand(23)
    scaled = score_members(members, {"all": Full()}, normalize=normalize, scale=scale)["all"]
    assert_near(scaled, torch.stack(expected).sum(0) * scale)
    seen = []
    score_members(members, {"top": TopK(2)}, normalize=normalize, progress=lambda *now: seen.append(now))
    assert seen == [("score", done, 23) for done in (7, 14, 21, 23)]


def test_members_that_do_not_fit_each_other_are_refused(tmp_path):
    first = write_index(tmp_path / "1", random_rows(9, WIDTHS))
    second = write_index(tmp_path / "2", random_rows(8, WIDTHS))
    queries = some_queries(WIDTHS, 2)
    one = Member(first, queries)
    for members, error, message in [
        ([], DataError, "at least one member"),
        ([one, Member(second, queries)], MismatchError, "member 1: expected 9 rows and 2 queries .* got 8 and 2"),
        ([one, Member(first, some_queries(WIDTHS, 3))], MismatchError, "got 9 and 3"),
        ([one, Member(first, queries, float("nan"))], NumericsError, "member 1: expected a finite weight"),
    ]:
        with pytest.raises(error, match=message):
            score_members(members, {"all": Full()})
    with pytest.raises(MismatchError, match="scale: expected a finite number for each of 9 rows, got 8"):
        score_members([one], {"all": Full()}, scale=torch.ones(8))

"""Curvature: both routes equal the dense inverse; fits share the Gram matrix, resume, and give the same bits."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_index import random_rows, write_index

from influent import curvature as curvature_module
from influent import fisher
from influent import gram as gram_module
from influent.curvature import Damping, find, fit, list_fitted
from influent.errors import CorruptError, DataError, InfluentError, MismatchError, NumericsError, SpecError
from influent.gram import BlockRows, Dual, Primal, cholesky, gram, pack, trace_of_inverse, unpack
from influent.rowstore import Index, Shard

SHAPES = [(1, 6), (1, 1), (4, 7), (7, 7), (8, 7), (40, 7), (40, 1)]  # N, K
DAMPINGS = ["relative:0.1", "relative:1e-5", "absolute:0.01"]


def stored(index, key: str) -> torch.Tensor:
    return torch.cat([shard.rows(key) for shard in index.shards]).double()


def amount(damping: str, rows: torch.Tensor) -> float:
    unit, _, value = damping.partition(":")
    return oracle.relative(rows, float(value)) if unit == "relative" else float(value)


def tree(root: Path) -> dict[str, str]:
    files = (p for p in root.rglob("*") if p.is_file())
    return {p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def assert_near(got, expected, tolerance: float = 1e-9):
    assert float((got - expected).norm()) <= tolerance * float(expected.norm()) + 1e-300


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize(("num_rows", "width"), SHAPES)
def test_solver_is_the_dense_inverse_of_the_stored_rows(tmp_path, num_rows, width, damping, dtype):
    index = write_index(tmp_path / "index", random_rows(num_rows, {"a": width, "b": 3}), dtype=dtype, shard_rows=3)
    fitted = fit(index, damping=Damping.parse(damping))
    for key in index.widths:
        rows = stored(index, key)
        damped = amount(damping, rows)
        inverse = oracle.damped_inverse(rows, damped)
        eye = torch.eye(index.widths[key], dtype=torch.float64)
        got = fitted.solver(key)(eye)
        assert_near(got, inverse)
        assert_near(got, got.T)
        assert float(torch.linalg.eigvalsh((got + got.T) / 2).min()) > 0
        health = fitted.health()[key]
        assert health["form"] == ("primal" if num_rows >= index.widths[key] else "dual")
        assert health["lambda"] == pytest.approx(damped, rel=1e-12)
        assert health["trace"] == pytest.approx(float(oracle.fisher(rows).trace()), rel=1e-12)
        assert health["d_eff"] == pytest.approx(oracle.effective_dimension(rows, damped), rel=1e-8)


@pytest.mark.parametrize(("num_rows", "width"), SHAPES)
def test_primal_equals_dual(tmp_path, num_rows, width):
    index = write_index(tmp_path / "index", random_rows(num_rows, {"a": width}))
    rows, g, damping = BlockRows(index, "a"), stored(index, "a"), 0.03
    primal = Primal(cholesky(g.T @ g, num_rows * damping, block="a"), num_rows)
    kernel = g @ g.T
    dual = Dual(cholesky(kernel.clone(), num_rows * damping, block="a"), damping, rows, pack(kernel))
    q = torch.randn(5, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert_near(primal(q), dual(q), 1e-11)
    assert_near(primal.self_influence(rows), dual.self_influence(rows), 1e-11)


def test_float32_queries_get_float32_answers_computed_in_float64(tmp_path):
    index = write_index(tmp_path / "index", random_rows(30, {"a": 6}))
    solver = fit(index, damping=Damping("relative", 1e-4)).solver("a")
    q = torch.randn(4, 6)
    assert solver(q).dtype == torch.float32
    assert torch.equal(solver(q), solver(q.double()).float())


def test_another_damping_reads_no_row(tmp_path, monkeypatch):
    index = write_index(tmp_path / "index", random_rows(20, {"a": 6, "b": 30}))
    fit(index, damping=Damping("relative", 0.1))
    monkeypatch.setattr(Shard, "grads", lambda *_: pytest.fail("a row was read"))
    again = fit(index, damping=Damping("absolute", 1e-3))
    fit(index, damping=Damping("relative", 0.1))
    assert list_fitted(index) == ["fim:absolute:0.001", "fim:relative:0.1"]
    assert again.health()["a"]["lambda"] == 1e-3
    grams = [p for p in (tmp_path / "index/curvature").iterdir() if '"kind":"gram"' in (p / "spec.json").read_text()]
    assert len(grams) == 1


@pytest.mark.parametrize("num_rows", [3, 9])
def test_a_block_of_zeros(tmp_path, num_rows):
    rows = random_rows(num_rows, {"live": 4, "dead": 5})
    rows["dead"].zero_()
    index = write_index(tmp_path / "index", rows)
    q = torch.randn(2, 5)
    relative = fit(index, damping=Damping("relative", 0.1))
    assert relative.solver("dead")(q).tolist() == torch.zeros(2, 5).tolist()
    assert relative.solver("dead").self_influence().tolist() == [0.0] * num_rows
    zero = {"lambda": 0.0, "trace": 0.0, "d_eff": 0.0, "form": "zero"}
    assert relative.health()["dead"] == zero
    assert relative.health()["live"]["form"] in ("primal", "dual")
    absolute = fit(index, damping=Damping("absolute", 0.5))
    torch.testing.assert_close(absolute.solver("dead")(q), q / 0.5)
    assert absolute.health()["dead"] | {"form": ""} == zero | {"lambda": 0.5, "form": ""}


def test_no_damping_is_the_plain_inverse_or_an_error_that_names_the_block(tmp_path):
    rows = random_rows(30, {"good": 5})
    index = write_index(tmp_path / "good", rows)
    solver = fit(index, damping=Damping("absolute", 0.0)).solver("good")
    assert_near(solver(torch.eye(5, dtype=torch.float64)), oracle.damped_inverse(rows["good"], 0.0), 1e-8)

    repeated = torch.cat([rows["good"], rows["good"][:, :1] * 3], dim=1)
    index = write_index(tmp_path / "singular", {"good": rows["good"], "bad one": repeated})
    with pytest.raises(NumericsError, match="'bad one'.*singular.*raise the damping"):
        fit(index, damping=Damping("relative", 0.0))
    assert list_fitted(index) == []
    fit(index, damping=Damping("relative", 1e-3))
    assert list_fitted(index) == ["fim:relative:0.001"]

    index = write_index(tmp_path / "few", {"wide": rows["good"][:3]})
    with pytest.raises(NumericsError, match="'wide'.*3 rows of width 5.*damping above 0"):
        fit(index, damping=Damping("absolute", 0.0))


class Killed(BaseException):
    pass


def test_a_killed_fit_resumes_block_by_block_and_gives_the_same_bytes(tmp_path, monkeypatch):
    rows = random_rows(9, {"a": 6, "b": 12, "c/d": 4})
    damping = Damping("relative", 0.1)
    seen = []
    whole = write_index(tmp_path / "whole", rows)
    fit(whole, damping=damping, progress=lambda stage, done, total: seen.append((stage, done, total)))
    assert seen == [("gram", 1, 3), ("gram", 2, 3), ("gram", 3, 3)] + [("cholesky", i, 3) for i in (1, 2, 3)]

    measured = []
    monkeypatch.setattr(curvature_module, "gram", lambda rows: measured.append(rows.key) or gram(rows))
    index = write_index(tmp_path / "killed", rows)
    for stage, block in [("gram", 1), ("gram", 2), ("gram", 3), ("cholesky", 1), ("cholesky", 3)]:

        def kill(*now, at=(stage, block)):
            if now[:2] == at:
                raise Killed

        with pytest.raises(Killed):
            fit(index, damping=damping, progress=kill)
        assert list_fitted(index) == []
    fit(index, damping=damping)
    assert measured == ["a", "b", "c/d"]
    assert tree(tmp_path / "killed" / "curvature") == tree(tmp_path / "whole" / "curvature")


def test_the_bits_do_not_depend_on_the_shards(tmp_path):
    rows = random_rows(23, {"a": 6, "b": 40})
    trees = []
    for shard_rows in (1, 4, 23):
        index = write_index(tmp_path / str(shard_rows), rows, shard_rows=shard_rows)
        fit(index, damping=Damping("relative", 0.1))
        trees.append(tree(tmp_path / str(shard_rows) / "curvature"))
    assert trees[0] == trees[1] == trees[2]


@pytest.mark.parametrize("width", [5, 60])
def test_small_pieces_change_nothing_but_rounding(tmp_path, monkeypatch, width):
    rows = random_rows(31, {"a": width})
    q = torch.eye(width, dtype=torch.float64)
    expected = fit(write_index(tmp_path / "whole", rows), damping=Damping("relative", 0.1))
    monkeypatch.setattr(gram_module, "SHARE", (gram_module.MEMORY << 20) // (8 * 70))
    monkeypatch.setattr(gram_module, "PANEL", 3)
    pieces = fit(write_index(tmp_path / "pieces", rows), damping=Damping("relative", 0.1))
    assert_near(pieces.solver("a")(q), expected.solver("a")(q), 1e-11)
    assert_near(pieces.solver("a").self_influence(), expected.solver("a").self_influence(), 1e-11)
    assert pieces.health()["a"]["d_eff"] == pytest.approx(expected.health()["a"]["d_eff"], rel=1e-11)


@given(st.integers(1, 12))
def test_packing_round_trips(m):
    lower = torch.randn(m, m, dtype=torch.float64).tril()
    assert pack(lower).shape == (m * (m + 1) // 2,)
    assert torch.equal(unpack(pack(lower)), lower)
    assert torch.equal(unpack(pack(lower.T.contiguous().T + torch.ones(m, m).triu(1))), lower)


def test_the_trace_of_the_inverse_over_several_panels(monkeypatch):
    x = torch.randn(20, 11, dtype=torch.float64)
    factor = torch.linalg.cholesky(x.T @ x)
    monkeypatch.setattr(gram_module, "PANEL", 4)
    assert trace_of_inverse(factor) == pytest.approx(float(torch.linalg.inv(x.T @ x).trace()), rel=1e-10)


def test_curvatures_are_found_by_name(tmp_path):
    index = write_index(tmp_path / "index", random_rows(12, {"a": 4}))
    with pytest.raises(SpecError, match="'fim': not fitted: give --curvature with one of identity"):
        find(index, "fim")
    fit(index, damping=Damping("relative", 0.1))
    q = torch.randn(2, 4)
    found = find(index, "fim")
    assert found.name == "fim:relative:0.1"
    assert torch.equal(found.solver("a")(q), find(index, "fim:relative:0.1").solver("a")(q))
    fit(index, damping=Damping("relative", 0.5))
    with pytest.raises(SpecError, match="more than one is fitted: give .* of fim:relative:0.1, fim:relative:0.5"):
        find(index, "fim")
    assert find(index, "fim:relative:0.5").health()["a"]["lambda"] == pytest.approx(5 * found.health()["a"]["lambda"])
    identity = fit(index, curvature="identity")
    assert (identity.name, find(index, "identity").name, identity.health()) == ("identity", "identity", {})
    assert torch.equal(identity.solver("a")(q), q)


def test_a_remote_store(tmp_path):
    rows = random_rows(6, {"a": 4, "b": 9})
    remote = write_index(f"memory://{tmp_path.name}/index", rows)
    local = write_index(tmp_path / "index", rows)
    fit(remote, damping=Damping("relative", 0.1))
    expected = fit(local, damping=Damping("relative", 0.1))
    for key, width in remote.widths.items():
        q = torch.randn(3, width)
        assert torch.equal(find(remote, "fim").solver(key)(q), expected.solver(key)(q))
        got = find(remote, "fim").solver(key).self_influence()
        assert torch.equal(got, expected.solver(key).self_influence())


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"kind":"cholesky"}'])
def test_a_damaged_spec_is_named(tmp_path, text):
    index = write_index(tmp_path / "index", random_rows(12, {"a": 4}))
    fitted = fit(index, damping=Damping("relative", 0.1))
    folder = "curvature/" + fitted.digest.partition(":")[2][:16]
    (tmp_path / "index" / folder / "spec.json").write_text(text)
    with pytest.raises(InfluentError, match=f"{folder}/spec.json"):
        find(index, "fim")


def test_bad_input(tmp_path):
    index = write_index(tmp_path / "index", random_rows(12, {"a": 4}))
    with pytest.raises(SpecError, match="expected fim, lowrank:R, sketch:R, datainf or identity, got 'newton'"):
        fit(index, curvature="newton", damping=Damping("relative", 0.1))
    with pytest.raises(
        SpecError, match="'kfac': not fitted: `influent fit INDEX --curvature kfac` does it, through the"
    ):
        fit(index, curvature="kfac", damping=Damping("relative", 0.1))
    with pytest.raises(SpecError, match="fim: all but identity need a damping"):
        fit(index)
    with pytest.raises(SpecError, match="such as relative:0.1, identity none"):
        fit(index, curvature="identity", damping=Damping("relative", 0.1))
    solver = fit(index, damping=Damping("relative", 0.1)).solver("a")
    with pytest.raises(MismatchError, match="block 'a': expected queries of width 4, got 5"):
        solver(torch.zeros(1, 5))
    with pytest.raises(NumericsError, match="block 'a': a query's gradient is not finite"):
        solver(torch.tensor([[0.0, float("nan"), 0, 0]]))
    tiny = fit(index, damping=Damping("absolute", 1e-3)).solver("a")
    with pytest.raises(NumericsError, match="block 'a': the preconditioned query is not finite: raise the damping"):
        tiny(torch.full((1, 4), 3e38))
    with pytest.raises(MismatchError, match="block 'b': not in this index, whose blocks are a"):
        find(index, "fim:relative:0.1").solver("b")
    with pytest.raises(DataError, match="no rows"):
        fit(write_index(tmp_path / "empty", {"a": torch.zeros(0, 4)}), damping=Damping("relative", 0.1))


@given(st.sampled_from(["relative", "absolute"]), st.floats(0, 1e300))
def test_damping_prints_what_it_parses(unit, value):
    damping = Damping(unit, value)
    assert Damping.parse(str(damping)) == damping
    assert str(Damping.parse(str(damping))) == str(damping)


@pytest.mark.parametrize(
    "text", ["", "0.1", "relative", "relative:", "relative:x", "mean:0.1", "relative:-1", "absolute:nan"]
)
def test_bad_dampings(text):
    with pytest.raises(SpecError, match="^damping: expected"):
        Damping.parse(text)


def flip(path: Path) -> None:
    """One bit of the last byte: in a row, whose shape and offsets stay right."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_nothing_is_kept_of_a_damaged_shard(tmp_path):
    write_index(tmp_path / "index", random_rows(12, {"a": 4}))
    flip(tmp_path / "index" / "shards" / "000001.safetensors")
    for _ in range(2):
        message = r"index/shards/000001\.safetensors: its hash is not the committed one; delete .* `influent index`"
        with pytest.raises(CorruptError, match=message):
            fit(Index.open(tmp_path / "index"), damping=Damping("relative", 0.1))
    assert not list(tmp_path.glob("index/curvature/*/shards/*"))


def test_a_finished_fit_is_reopened_without_reading_the_rows(tmp_path, monkeypatch):
    index = write_index(tmp_path / "index", random_rows(12, {"a": 4}))
    fit(index, damping=Damping("relative", 0.1))
    flip(tmp_path / "index" / "shards" / "000001.safetensors")
    monkeypatch.setattr(Shard, "check", None)
    fit(Index.open(tmp_path / "index"), damping=Damping("relative", 0.1))
    fit(Index.open(tmp_path / "index"), damping=Damping("relative", 0.2))  # needs the Gram matrix alone


@pytest.mark.parametrize(("kind", "again"), [("cholesky", 0.1), ("gram", 0.2)])
def test_a_damaged_fit_is_named(tmp_path, kind, again):
    index = write_index(tmp_path / "index", random_rows(12, {"a": 4}))
    fit(index, damping=Damping("relative", 0.1))
    damaged = next(p for p in tmp_path.glob("index/curvature/*") if f'"kind":"{kind}"' in (p / "spec.json").read_text())
    flip(damaged / "shards" / "a.safetensors")
    with pytest.raises(CorruptError, match=rf"{damaged.name}/shards/a\.safetensors: its hash is not the committed one"):
        fit(index, damping=Damping("relative", again)).solver("a")


def test_rows_that_are_not_finite_are_not_blamed_on_the_damping(tmp_path):
    index = write_index(tmp_path / "index", random_rows(3, {"a": 4}))
    solver = fit(index, damping=Damping("relative", 0.1)).solver("a")
    solver.inverse.packed_gram.mul_(float("nan"))
    solver.inverse.factor.mul_(float("nan"))
    with pytest.raises(NumericsError, match="block 'a': the index's rows are not finite: run `influent verify`"):
        solver(torch.ones(1, 4))


def test_all_blocks_are_solved_with_one_reading_of_what_was_fitted(tmp_path, monkeypatch):
    """Each manifest has a record of every block: read for each of them, it would cost the square of their number."""
    widths = {name: 9 for name in "abcde"}
    fitted = fit(write_index(tmp_path / "index", random_rows(4, widths)), damping=Damping.parse("relative:1"))
    opened, real = [], curvature_module.Artifact.open
    monkeypatch.setattr(curvature_module.Artifact, "open", lambda *given: opened.append(given) or real(*given))
    for key in widths:
        fitted.solver(key)(torch.ones(1, 9))
    assert len(opened) == 1


def test_fits_are_listed_without_torch(tmp_path):
    """Which takes seconds to import: their records say all that is told of them."""
    index = write_index(tmp_path / "index", random_rows(4, {"a": 9, "b": 2}))
    fitted = [fit(index, damping=Damping.parse(damping)) for damping in ("relative:1", "absolute:2")]
    script = (
        "import json, sys; from influent import fisher; from influent.rowstore import Index; "
        f"print(json.dumps(fisher.describe(Index.open({str(tmp_path / 'index')!r})))); "
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    told = {entry["name"]: entry["health"] for entry in json.loads(done.stdout)}
    assert told == {curvature.name: curvature.health() for curvature in fitted}
    assert sorted(told) == list_fitted(index)
    fit(index, curvature="datainf", damping=Damping.parse("relative:1"))
    assert fisher.describe(index) is None

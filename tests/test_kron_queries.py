"""K-FAC and EK-FAC behind the verbs: before the compressor, without stored rows, and of compressed sides."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kron_fits import dense
from oracle_gradients import compressed, weight_gradients
from tiny_model import QUERIES, make_data, make_model
from torch import Tensor, nn

import influent
from influent import solving
from influent.artifact import ArtifactWriter
from influent.compress import Compress
from influent.curvature import list_fitted
from influent.errors import MismatchError, SpecError
from influent.kron import fits
from influent.layers import Block
from influent.loading import load
from influent.rowstore import Index
from influent.task import CausalLM, Classification

LAYERS = "layers.1.(mlp.down_proj|self_attn.k_proj|input_layernorm)"


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and its data; indexes with whole rows (whole), without rows (live), and with compressed ones (small)."""
    folder = tmp_path_factory.mktemp("kron")
    make_model(folder / "model")
    make_data(folder / "data.jsonl")
    index(folder, "whole", compress="id", method="graddot")
    index(folder, "live", method="ekfac")
    index(folder, "small", compress="gauss:6x5", method="logra")
    return folder


def index(here: Path, out: str, **options: Any) -> dict[str, Any]:
    settings = {"layers": LAYERS, "token_budget": 64, "device": "cpu", "max_length": 8, "shard_rows": 5} | options
    return influent.index(str(here / "model"), str(here / "data.jsonl"), str(here / out), **settings)


def scores_of(here: Path, out: str, queries: Any = QUERIES, **options: Any) -> np.ndarray:
    influent.query(str(here / out), queries=queries, scores=str(here / "scores.npy"), **options)
    return np.load(here / "scores.npy")


def close(found: np.ndarray, expected: np.ndarray, tolerance: float = 2e-4) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def query_gradients(here: Path) -> dict[str, Tensor]:
    model, tokenizer = load(str(here / "model"), dtype="float32", device="cpu")
    task = CausalLM(tokenizer, max_length=8)

    def loss(i: int) -> Tensor | None:
        if i == len(QUERIES):
            return None
        return sum(task.loss(model, task.collate([part])).sum() for part in task.parts(QUERIES[i]))

    return weight_gradients(model, influent.layers.plan(model, LAYERS), loss)


def inverses(here: Path, out: str, name: str, relative: float = 0.1) -> dict[str, Tensor]:
    fitted = fits(Index.open(here / out))[name]
    found = {}
    for key in fitted.facts:
        matrix = dense(fitted, key)
        shift = relative * float(matrix.trace()) / len(matrix)
        found[key] = torch.linalg.inv(matrix + shift * torch.eye(len(matrix)).double())
    return found


def rows_of(here: Path, out: str) -> dict[str, Tensor]:
    opened = Index.open(here / out)
    return {key: torch.cat([shard.rows(key) for shard in opened.shards]).double() for key in opened.keys}


# -- at full size


@pytest.mark.parametrize("name", ["ekfac", "kfac", "ekfac:empirical"])
def test_with_whole_rows_the_score_is_exact(here, name):
    found = scores_of(here, "whole", curvature=name)
    relative = 0.1 if name == "kfac" else 0.01  # the defaults
    inverse, rows, asked = inverses(here, "whole", name, relative), rows_of(here, "whole"), query_gradients(here)
    expected = sum(asked[key].double() @ inverse[key] @ rows[key].T for key in rows)
    close(found, expected.numpy())


def test_before_a_sketch_the_solved_gradient_is_what_is_compressed(here):
    found = scores_of(here, "small", curvature="ekfac:relative:0.5")
    inverse, rows, asked = inverses(here, "small", "ekfac", 0.5), rows_of(here, "small"), query_gradients(here)
    model, _ = load(str(here / "model"), dtype="float32", device="cpu")
    expected = torch.zeros(len(QUERIES), 16).double()
    for block in influent.layers.plan(model, LAYERS).blocks:
        solved = asked[block.name].double() @ inverse[block.name]
        bound = Compress.parse("gauss:6x5").bind(block, 0)
        expected += compressed(bound, solved) @ rows[block.name].T
    close(found, expected.numpy())


@pytest.mark.parametrize("text", ["whiten:99x99", "pca:99x99", "whiten:99x99,kfac,p=0.25", "whiten:99x99 | rotate"])
def test_weights_of_a_basis_are_no_second_curvature(here, tmp_path, text):
    """Rows in a basis of all directions lose nothing: the score is that of whole rows, however they are weighted."""
    index(here, str(tmp_path / "turned"), compress=text, method="logra")
    found = scores_of(here, str(tmp_path / "turned"), curvature="ekfac")
    close(found, scores_of(here, "whole", curvature="ekfac"), 1e-3)


@pytest.mark.parametrize("text", ["id", "gauss:3x2", "mask:4x3 | sjlt:8", "mask:16 | sjlt:8", "fjlt:8", "sjlt:4x3,s=2"])
@pytest.mark.parametrize(
    "block",
    [Block("b", "linear", 7, 5), Block("n", "norm", 9, 1), Block("e", "embedding", 4, 11)],
    ids=lambda b: b.kind,
)
def test_a_whole_gradient_is_compressed_as_its_sides_are(text, block):
    bound = Compress.parse(text).bind(block, 3)
    g = torch.randn(4, block.width, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(bound.apply(g), compressed(bound, g), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("run", [{"token_budget": 1}, {"memory": 1}, {"token_budget": 9, "memory": 3}])
def test_how_it_is_run_does_not_change_a_score(here, tmp_path, run, monkeypatch):
    expected = scores_of(here, "small", curvature="ekfac")
    monkeypatch.setattr(solving, "COPIES", 10**5)  # one query at a time
    shutil.copytree(here / "small", tmp_path / "small", ignore=shutil.ignore_patterns("curvature"))
    influent.query(str(tmp_path / "small"), queries=QUERIES, curvature="ekfac", scores=str(tmp_path / "s.npy"), **run)
    close(np.load(tmp_path / "s.npy"), expected, 1e-3)


def test_a_contrast_is_the_difference_of_the_means(here):
    found = scores_of(here, "small", QUERIES[:2], control=QUERIES[2:], curvature="ekfac")
    each = scores_of(here, "small", curvature="ekfac")
    close(found[0], each[:2].mean(0) - each[2])


# -- without stored rows


@pytest.mark.parametrize("options", [{}, {"normalize": "cosine"}, {"normalize": "relatif"}, {"damping": "relative:2"}])
@pytest.mark.parametrize("name", ["ekfac", "identity", "kfac"])
def test_live_scores_are_those_of_whole_rows(here, name, options):
    if name == "identity" and "damping" in options:
        return
    close(scores_of(here, "live", curvature=name, **options), scores_of(here, "whole", curvature=name, **options), 1e-3)


def test_an_index_without_rows_holds_losses_and_says_so(here):
    facts, whole = influent.info(str(here / "live")), influent.info(str(here / "whole"))
    assert facts["codec"] == facts["dtype"] == "none" and facts["rows"] == whole["rows"] == 16
    assert facts["bytes"] < whole["bytes"] / 20
    assert influent.verify(str(here / "live")) == {"ok": True, "errors": []}
    one, other = Index.open(here / "live"), Index.open(here / "whole")
    torch.testing.assert_close(one.stat("loss"), other.stat("loss"), rtol=1e-5, atol=1e-5)
    assert one.stat("tokens").tolist() == other.stat("tokens").tolist()
    head = json.loads((here / "live" / "spec.json").read_bytes())
    assert head["requires"] == ["live"] and head["spec"]["rows"] == "none"


def test_the_methods_own_curvature_is_fitted_by_the_first_query(here, tmp_path):
    influent.index(str(here / "model"), str(here / "data.jsonl"), str(tmp_path / "i"), method="kfac", layers="1.mlp.up")
    document = influent.query(str(tmp_path / "i"), **QUERIES[0])
    assert document["method"]["curvature"] == "kfac:relative:0.1"
    assert list_fitted(Index.open(tmp_path / "i")) == ["kfac"]
    (described,) = influent.info(str(tmp_path / "i"))["curvatures"]
    assert described["name"] == "kfac"
    assert all(block["trace"] > 0 and block["d_eff"] > 0 for block in described["health"].values())


def test_what_needs_stored_rows_says_what_to_do(here):
    with pytest.raises(SpecError, match="stores no rows .*--curvature kfac, ekfac or identity"):
        influent.query(str(here / "live"), **QUERIES[0], curvature="fim")
    with pytest.raises(SpecError, match="rows none: nothing is stored"):
        index(here, "bad", method="ekfac", compress="gauss:4x4")
    for verb, more in (
        (influent.select, {"out": str(here / "s.jsonl"), "budget": "2"}),
        (influent.value, {"budget": "10", "costs": str(here / "costs.csv"), "diversity": 1.0}),
    ):
        (here / "costs.csv").write_text("provider,cost\nnone,1\n")
        with pytest.raises(SpecError, match="stores no rows .* reads them: index again with --rows float32"):
            verb(str(here / "live"), target=QUERIES[:1], **more)


def test_queries_cut_to_a_rank(here):
    cut = scores_of(here, "live", query_rank=4)
    whole = scores_of(here, "live")
    assert np.corrcoef(cut.ravel(), whole.ravel())[0, 1] > 0.95 and not np.allclose(cut, whole)
    close(scores_of(here, "live", query_rank=100), whole)


def test_a_curvature_of_whole_gradients_takes_no_mix(here):
    with pytest.raises(SpecError, match="mix is for fim, lowrank, .*, not for ekfac: leave it out"):
        influent.query(str(here / "live"), queries=QUERIES, mix=0.5)


def test_rows_are_appended_to_an_index_without_rows(here, tmp_path):
    shutil.copytree(here / "live", tmp_path / "live")
    (tmp_path / "more.jsonl").write_text('{"id": "x", "text": "The money of Chad is called franc."}\n')
    influent.append(str(tmp_path / "live"), str(tmp_path / "more.jsonl"))
    influent.query(str(tmp_path / "live"), queries=QUERIES, curvature="identity", scores=str(tmp_path / "s.npy"))
    grown = np.load(tmp_path / "s.npy")
    assert grown.shape == (3, 17)
    close(grown[:, :16], scores_of(here, "live", curvature="identity"))
    assert influent.verify(str(tmp_path / "live"))["ok"]


def test_a_killed_self_influence_resumes(here, tmp_path, monkeypatch):
    from influent import recompute

    shutil.copytree(here / "live", tmp_path / "live", ignore=shutil.ignore_patterns("curvature"))
    expected = influent.self_influence(str(here / "live"), k=16)
    monkeypatch.setattr(recompute, "SELF_ROWS", 6)
    put, count = ArtifactWriter.put, []

    def dying(self, name, *arguments, **options):
        if self.kind == recompute.SELF:
            count.append(name)
            if len(count) == 2:
                raise KeyboardInterrupt
        return put(self, name, *arguments, **options)

    monkeypatch.setattr(ArtifactWriter, "put", dying)
    with pytest.raises(KeyboardInterrupt):
        influent.self_influence(str(tmp_path / "live"))
    found = influent.self_influence(str(tmp_path / "live"), k=16)
    assert count == ["000000000000", "000000000006", "000000000006", "000000000012"]
    assert [row["id"] for row in found["rows"]] == [row["id"] for row in expected["rows"]]


# -- of compressed sides


def test_compressed_sides_solve_compressed_rows(here):
    found = scores_of(here, "small", curvature="ekfac:compressed")
    inverse, rows = inverses(here, "small", "ekfac:compressed"), rows_of(here, "small")
    plain = scores_of(here, "small", curvature="identity")
    model, _ = load(str(here / "model"), dtype="float32", device="cpu")
    asked, expected, dots = query_gradients(here), 0, 0
    for block in influent.layers.plan(model, LAYERS).blocks:
        q = compressed(Compress.parse("gauss:6x5").bind(block, 0), asked[block.name].double())
        expected = expected + q @ inverse[block.name] @ rows[block.name].T
        dots = dots + q @ rows[block.name].T
    close(plain, dots.numpy())
    close(found, expected.numpy())
    document = influent.self_influence(str(here / "small"), curvature="ekfac:compressed", k=16)
    h = sum(((rows[key] @ inverse[key]) * rows[key]).sum(1) for key in rows)
    best = [row["row"] for row in document["rows"]]
    assert best == h.argsort(descending=True).tolist()


# -- any module


class Images(Classification):
    pass


def classes(n: int = 12) -> tuple[nn.Module, list]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4))
    return model, [(torch.randn(1, 6, 6, generator=torch.Generator().manual_seed(i)), i % 4) for i in range(n)]


def test_a_task_without_texts_is_given_its_data_again(tmp_path):
    model, data = classes()
    task, out = Classification(), str(tmp_path / "live")
    influent.index(model, data, out, task=task, method="ekfac")
    influent.index(model, data, str(tmp_path / "whole"), task=task, compress="id")
    ask: dict[str, Any] = {"model": model, "task": task, "queries": data[:2]}
    with pytest.raises(SpecError, match="pass `data`, the training data"):
        influent.query(out, **ask)
    with pytest.raises(MismatchError, match="0 to 11 are not those that were indexed"):
        influent.query(out, **ask, data=data[::-1])
    influent.query(out, **ask, data=data, scores=str(tmp_path / "a.npy"))
    influent.fit(str(tmp_path / "whole"), curvature="ekfac", model=model, task=task, data=data)
    influent.query(str(tmp_path / "whole"), **ask, data=data, curvature="ekfac", scores=str(tmp_path / "b.npy"))
    close(np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy"), 1e-3)


# -- the command line


def test_fit_and_query_from_the_command_line(here, tmp_path, capsys):
    from influent.cli import run

    shutil.copytree(here / "small", tmp_path / "i", ignore=shutil.ignore_patterns("curvature"))
    assert run(["fit", str(tmp_path / "i"), "--curvature", "ekfac", "--labels", "empirical", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["name"] == "ekfac:empirical:relative:0.01" and document["damping"] == "relative:0.01"
    ask = ["--prompt", "The capital of Peru is", "--completion", " Lima."]
    assert run(["query", str(tmp_path / "i"), *ask, "--curvature", "ekfac:empirical"]) == 0
    assert "ekfac:empirical:relative:0.01" in capsys.readouterr().out
    assert run(["info", str(tmp_path / "i")]) == 0
    assert "ekfac:empirical" in capsys.readouterr().out
    for wrong, line in (
        (["--curvature", "ekfac:5"], "expected kfac, ekfac or cg"),
        (["--labels", "true"], "--labels: expected sampled or empirical"),
        (["--curvature", "fim", "--labels", "empirical"], "labels 'empirical' are for kfac, ekfac and cg"),
    ):
        assert run(["fit", str(tmp_path / "i"), *wrong]) == 2
        assert line in capsys.readouterr().err

"""The verbs, from a model and texts to scores: against dense float64 influence, and whatever a run's options are."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import oracle
import pytest
import torch
from oracle_gradients import weight_gradients
from test_task import make_tokenizer
from tiny_model import FACTS, QUERIES, make_data, make_model
from torch import Tensor, nn

import influent
from influent.errors import DataError, MismatchError, SpecError
from influent.layers import plan
from influent.task import CausalLM, Classification

SCHEMA = json.loads((Path(__file__).parent.parent / "docs" / "schemas" / "query.json").read_text())
COMPRESS = "mask:8x8 | sjlt:32"
ROWS = 2 * len(FACTS)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, another model, data, and an index of them made in one go."""
    folder = tmp_path_factory.mktemp("methods")
    make_model(folder / "model")
    make_model(folder / "other", seed=1)
    make_data(folder / "data.jsonl")
    index(folder, "clean")
    return folder


def index(here: Path, out: str, **options: Any) -> dict[str, Any]:
    settings = {"compress": COMPRESS, "shard_rows": 4, "token_budget": 64, "device": "cpu"} | options
    model = settings.pop("model", str(here / "model"))
    return influent.index(model, settings.pop("data", str(here / "data.jsonl")), str(here / out), **settings)


def rows_of(path: Path) -> dict[str, Tensor]:
    opened = influent.Index.open(str(path))
    rows = {key: torch.cat([shard.rows(key) for shard in opened.shards]) for key in opened.keys}
    return rows | {name: opened.stat(name) for name in ("loss", "norm", "tokens")}


def files_of(path: Path) -> dict[str, bytes]:
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def scores_of(here: Path, out: str, queries: Any = QUERIES, **options: Any) -> np.ndarray:
    influent.query(str(here / out), queries=queries, scores=str(here / "scores.npy"), **options)
    return np.load(here / "scores.npy")


# Every option of a run, the unit of work and the machine's threads: none may change a row.
RUNS = [
    {"token_budget": 1}, {"token_budget": 4096}, {"shard_rows": 1}, {"shard_rows": None}, {"device": None},
    {"skip_nonfinite": True}, {"catalog": "reference"},
    {"progress": lambda stage, done, total: None}, {"threads": 2},
]  # fmt: skip


@pytest.mark.parametrize("run", RUNS, ids=lambda run: "-".join(f"{k}={v}" for k, v in run.items())[:30])
def test_how_it_is_run_does_not_change_what_is_indexed(here, tmp_path, run):
    threads = torch.get_num_threads()
    torch.set_num_threads(run.get("threads", threads))
    try:
        made = index(here, str(tmp_path / "index"), **{k: v for k, v in run.items() if k != "threads"})
    finally:
        torch.set_num_threads(threads)
    expected = rows_of(here / "clean")
    for key, rows in rows_of(tmp_path / "index").items():
        torch.testing.assert_close(rows, expected[key], rtol=1e-4, atol=1e-5)
    assert made["digest"] == influent.info(str(here / "clean"))["digest"]
    assert made["skipped"] == {"empty": 1} and made["rows"] == ROWS
    scores = scores_of(here, str(tmp_path / "index"))
    np.testing.assert_allclose(scores, scores_of(here, "clean"), rtol=1e-3, atol=1e-3 * np.abs(scores).max())


@pytest.mark.parametrize("run", [{"token_budget": 1}, {"device": None}])
def test_how_it_is_run_does_not_change_a_query(here, run):
    scores = scores_of(here, "clean")
    np.testing.assert_allclose(scores_of(here, "clean", **run), scores, rtol=1e-3, atol=1e-4 * np.abs(scores).max())


def killer(at: int) -> tuple[Any, list[int]]:
    """A progress callback that interrupts at its call number `at`, and the list of its calls."""
    calls: list[int] = []

    def progress(stage: str, done: int, total: int) -> None:
        calls.append(done)
        if len(calls) == at:
            raise KeyboardInterrupt

    return progress, calls


def test_a_run_killed_at_any_point_resumes_to_the_same_bytes_and_redoes_no_shard(here, tmp_path, monkeypatch):
    small = {"token_budget": 20}  # a few batches a shard, and a call of `progress` after each
    progress, calls = killer(-1)
    index(here, str(tmp_path / "clean"), progress=progress, **small)
    expected, total = files_of(tmp_path / "clean"), len(calls)
    assert total > 10
    forwards: list[int] = []
    original = CausalLM.loss
    monkeypatch.setattr(CausalLM, "loss", lambda *a: forwards.append(1) or original(*a))
    spent = {0: 0}  # forward passes by the rows that they have done

    def count(stage: str, done: int, total: int) -> None:
        spent[done if stage == "index" else 0] = len(forwards)

    index(here, str(tmp_path / "counted"), progress=count, **small)
    seen = set()
    for at in range(1, total + 1):
        out = tmp_path / f"killed-{at}"
        with pytest.raises(KeyboardInterrupt):
            index(here, str(out), progress=killer(at)[0], **small)
        done = {path: path.stat().st_mtime_ns for path in out.glob("shards/*")}
        kept = 4 * len(done) // 2  # a payload and a record for every four rows
        seen.add(kept)
        forwards.clear()
        made = index(here, str(out), **small)
        assert made["rows"] == ROWS
        assert files_of(out) == expected, at
        assert {path: path.stat().st_mtime_ns for path in done} == done
        assert len(forwards) == spent[ROWS] - spent[kept]
    forwards.clear()
    index(here, str(tmp_path / "counted"), **small)
    assert not forwards
    assert seen >= {0, 4, 8, 12}


def test_another_model_in_the_same_place_is_refused(here):
    before = files_of(here / "clean")
    with pytest.raises(MismatchError, match="fingerprint"):
        index(here, "clean", model=str(here / "other"))
    assert files_of(here / "clean") == before


@pytest.mark.parametrize(
    "options, field",
    [
        ({"compress": "gauss:4x4"}, "compress"), ({"seed": 1}, "seed"), ({"rows": "bfloat16"}, "rows"),
        ({"layers": "q_proj"}, "layout"), ({"max_length": 20}, "max_length"), ({"matmul": "medium"}, "matmul"),
        ({"dtype": "bfloat16"}, "dtype|fingerprint"), ({"limit": 3}, "data|rows"),
    ],
    ids=str,
)  # fmt: skip
def test_another_spec_in_the_same_place_is_refused_and_named(here, options, field):
    before = files_of(here / "clean")
    with pytest.raises(MismatchError, match=field):
        index(here, "clean", **options)
    assert files_of(here / "clean") == before
    assert influent.verify(str(here / "clean")) == {"ok": True, "errors": []}


def test_a_query_needs_the_model_that_was_indexed(here):
    with pytest.raises(
        MismatchError, match=r"another model: expected weights blake2b-256:\w+, got blake2b-256:\w+; .*--model"
    ):
        influent.query(str(here / "clean"), queries=QUERIES, model=str(here / "other"))
    scores = scores_of(here, "clean")
    np.testing.assert_array_equal(scores_of(here, "clean", model=str(here / "model")), scores)


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "needs prompt and completion"), ({"prompt": "a"}, "needs prompt and completion"),
        ({"prompt": "a", "completion": "b", "queries": QUERIES}, "not both"),
        ({"queries": QUERIES, "normalize": "max"}, "normalize"),
        ({"queries": QUERIES, "curvature": "nothing"}, "nothing"),
        ({"queries": QUERIES, "curvature": "identity", "damping": "relative:1"}, "takes no damping"),
        ({"queries": QUERIES, "damping": "0.1"}, "relative:NUMBER"),
    ],
    ids=str,
)  # fmt: skip
def test_queries_without_a_meaning_are_refused(here, options, message):
    with pytest.raises(SpecError, match=message):
        influent.query(str(here / "clean"), **options)


def test_queries_without_a_target_are_refused(here):
    for queries, message in [
        ([{"text": ""}], "empty"),
        ([], "no queries"),
        ([{"prompt": "a", "completion": ""}], "empty"),
    ]:
        with pytest.raises(DataError, match=message):
            influent.query(str(here / "clean"), queries=queries)


def test_methods_without_a_meaning_are_refused(here, tmp_path):
    with pytest.raises(SpecError, match="method 'magic' is not known; expected one of factgrass"):
        index(here, str(tmp_path / "x"), method="magic")
    with pytest.raises(SpecError, match="needs its task"):
        index(here, str(tmp_path / "y"), model=nn.Linear(2, 2))


@pytest.mark.parametrize("normalize", ["none", "cosine", "relatif"])
def test_the_document_of_a_query_is_complete(here, normalize):
    document = influent.query(
        str(here / "clean"), queries=QUERIES, k=5, normalize=normalize, scores=str(here / "scores.npy")
    )
    jsonschema.validate(document, SCHEMA)
    matrix = np.load(here / "scores.npy")
    assert matrix.shape == (3, ROWS) and matrix.dtype == np.float32
    names = [row["id"] for row in influent.Index.open(str(here / "clean")).catalog.describe(list(range(ROWS)))]
    for i, (query, asked) in enumerate(zip(document["queries"], QUERIES, strict=True)):
        assert query["query"] == i and asked.items() <= query.items()
        order = np.argsort(-matrix[i], kind="stable")
        assert [row["row"] for row in query["top"]] == order[:5].tolist()
        assert [row["row"] for row in query["bottom"]] == order[::-1][:5].tolist()
        for place, row in enumerate(query["top"] + query["bottom"]):
            assert row["score"] == matrix[i, row["row"]] and row["id"] == names[row["row"]] and row["text"]
            assert row["percentile"] == pytest.approx(100 * (matrix[i] < row["score"]).sum() / ROWS), place
        chance = document["baselines"]["random"][i]
        assert len({row["row"] for row in chance}) == 5
        assert all(row["score"] == matrix[i, row["row"]] for row in chance)
        words = document["baselines"]["bm25"][i]
        assert [row["score"] for row in words] == sorted((row["score"] for row in words), reverse=True)
    assert document["baselines"]["bm25"][0][0]["id"] == "peru"
    method = document["method"]
    assert (method["name"], method["compress"], method["normalize"]) == ("factgrass", COMPRESS, normalize)
    assert method["curvature"] == "fim:relative:0.1" and method["rows"] == ROWS
    health = method["health"]
    assert set(health) == set(influent.Index.open(str(here / "clean")).keys) and len(health) == method["layers"]
    assert all(block["lambda"] > 0 and 0 < block["d_eff"] <= ROWS for block in health.values())
    assert document["skipped"] == {"empty": 1} and "positive" in document["sign"]


def test_one_prompt_is_a_file_of_one_query(here):
    one = influent.query(str(here / "clean"), **QUERIES[0], bottom=False)
    several = influent.query(str(here / "clean"), queries=QUERIES)
    assert one["queries"][0]["bottom"] == []
    assert [row["row"] for row in one["queries"][0]["top"]] == [row["row"] for row in several["queries"][0]["top"]]


def test_a_contrast_is_the_difference_of_the_means(here):
    each = scores_of(here, "clean")
    against = scores_of(here, "clean", QUERIES[:1], control=QUERIES[1:])
    expected = each[0] - each[1:].mean(0)
    np.testing.assert_allclose(against[0], expected, rtol=1e-4, atol=1e-4 * np.abs(each).max())
    document = influent.query(str(here / "clean"), queries=QUERIES[:1], control=QUERIES[1:])
    assert [query["text"] for query in document["queries"]] == ["mean of 1 queries minus mean of 2 controls"]
    jsonschema.validate(document, SCHEMA)


@pytest.mark.parametrize("rows, tolerance", [("float16", 2e-3), ("bfloat16", 2e-2)])
def test_16_bit_rows_give_nearly_the_same_scores(here, rows, tolerance):
    index(here, rows, rows=rows)
    exact, got = scores_of(here, "clean"), scores_of(here, rows)
    assert np.abs(got - exact).max() < tolerance * np.abs(exact).max()
    assert [np.argmax(got[i]) for i in range(3)] == [np.argmax(exact[i]) for i in range(3)]
    assert influent.info(str(here / rows))["bytes"] < 0.6 * influent.info(str(here / "clean"))["bytes"]


def test_graddot_is_a_plain_inner_product(here):
    index(here, "graddot", method="graddot")
    query = influent.query(str(here / "graddot"), queries=QUERIES, curvature=None)
    assert query["method"]["curvature"] == "identity" and query["method"]["health"] == {}
    np.testing.assert_array_equal(scores_of(here, "graddot"), scores_of(here, "clean", curvature="identity"))


def influence(train: dict[str, Tensor], asked: dict[str, Tensor], relative: float) -> tuple[Tensor, Tensor]:
    """Dense float64 influence [Q, N] and self-influence [N]."""
    inverses = {key: oracle.damped_inverse(rows, oracle.relative(rows, relative)) for key, rows in train.items()}
    solved = {key: rows @ inverses[key] for key, rows in asked.items()}
    return oracle.scores(train, solved), oracle.self_influence(train, inverses)


def nearly(got: Any, expected: Tensor) -> None:
    """Equal up to float32 rows: relative to the largest number."""
    np.testing.assert_allclose(np.asarray(got), expected.numpy(), rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


RECORDS = [{"text": f"{prompt} {answer}."} for _, prompt, answer in FACTS] + [
    {"prompt": prompt, "completion": f" {answer}"} for _, prompt, answer in FACTS[:4]
]


def test_a_language_models_scores_are_dense_influence(tmp_path):
    from test_task import make_model as random_model

    model, task, out = random_model("llama").double(), CausalLM(make_tokenizer(), max_length=64), str(tmp_path / "id")
    influent.index(model, RECORDS, out, compress="id", task=task, shard_rows=5)
    influent.fit(out, damping="relative:0.3")

    def losses(records):
        return lambda i: task.loss(model, task.collate(task.parts(records[i])))[0] if i < len(records) else None

    train = weight_gradients(model, plan(model), losses(RECORDS))
    asked = weight_gradients(model, plan(model), losses(QUERIES))
    model.zero_grad(set_to_none=True)
    expected, own = influence(train, asked, 0.3)
    path = str(tmp_path / "scores.npy")
    influent.query(out, queries=QUERIES, model=model, task=task, scores=path)
    nearly(np.load(path), expected)
    found = influent.self_influence(out, k=len(RECORDS))["rows"]
    nearly([row["score"] for row in sorted(found, key=lambda row: row["row"])], own)
    influent.query(out, queries=QUERIES, model=model, task=task, scores=path, normalize="relatif")
    nearly(np.load(path), expected / own.sqrt())
    influent.query(out, queries=QUERIES, model=model, task=task, scores=path, curvature="identity")
    nearly(np.load(path), oracle.scores(train, asked))


def test_a_plain_modules_scores_are_dense_influence(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, labels = torch.randn(90, 5).double(), torch.randint(0, 3, (90,))
    data, asked = (
        list(zip(x[:80], labels[:80].tolist(), strict=True)),
        list(zip(x[80:], labels[80:].tolist(), strict=True)),
    )
    out, path = str(tmp_path / "id"), str(tmp_path / "scores.npy")
    influent.index(model, data, out, compress="id", task=Classification(), shard_rows=32)
    document = influent.query(
        out, queries=asked, model=model, task=Classification(), scores=path, damping="absolute:0.01"
    )
    assert document["method"]["curvature"] == "fim:absolute:0.01"
    jsonschema.validate(document, SCHEMA)

    def losses(pairs):
        def loss(i: int) -> Tensor | None:
            return (
                nn.functional.cross_entropy(model(pairs[i][0]), torch.tensor(pairs[i][1])) if i < len(pairs) else None
            )

        return weight_gradients(model, plan(model), loss)

    train, queries = losses(data), losses(asked)
    solved = {key: rows @ oracle.damped_inverse(train[key], 0.01) for key, rows in queries.items()}
    nearly(np.load(path), oracle.scores(train, solved))
    own = oracle.self_influence(train, {key: oracle.damped_inverse(rows, 0.01) for key, rows in train.items()})
    found = influent.self_influence(out, k=3, damping="absolute:0.01")
    assert [row["row"] for row in found["rows"]] == torch.argsort(own, descending=True)[:3].tolist()
    nearly([row["score"] for row in found["rows"]], own.sort(descending=True).values[:3])


def test_dampings_are_fitted_side_by_side_and_found_again(here):
    index(here, "dampings")
    path = str(here / "dampings")
    names = [influent.fit(path, damping=damping)["name"] for damping in ("relative:0.1", "absolute:0.5")]
    assert names == ["fim:relative:0.1", "fim:absolute:0.5"]
    assert influent.fit(path)["name"] == names[0]
    assert influent.fit(path, curvature="identity")["name"] == "identity"
    by_name = scores_of(here, "dampings", curvature=names[1])
    np.testing.assert_array_equal(by_name, scores_of(here, "dampings", damping="absolute:0.5"))
    assert np.abs(by_name - scores_of(here, "dampings", curvature=names[0])).max() > 0
    assert influent.query(path, queries=QUERIES)["method"]["curvature"] == "fim:relative:0.1"  # the default of the two
    assert influent.verify(path)["ok"]


def test_a_module_is_left_as_it_was(tmp_path):
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2)).train()
    model[2].bias.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data = [(torch.randn(3), i % 2) for i in range(6)]
    influent.index(model, data, str(tmp_path / "index"), compress="id", task=Classification())
    influent.query(str(tmp_path / "index"), queries=data[:1], model=model, task=Classification())
    assert model.training and model[1].training
    assert [p.requires_grad for p in model.parameters()] == [True, True, True, False]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())

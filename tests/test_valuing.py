"""LinFiK against its definition, the closed-form laws, and the report of a tiny model's index."""

import json
from itertools import permutations
from math import factorial
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import oracle
import pytest
import torch
from small_index import random_rows, write_index
from tiny_model import FACTS, make_model

import influent
from influent import rowsums, score
from influent.baselines import words
from influent.bootstrap import Means
from influent.cli import run
from influent.errors import DataError, MismatchError, SpecError
from influent.maps import draw
from influent.providers import Groups
from influent.rng import Stream
from influent.rowstore import Index
from influent.target import direction
from influent.value_page import html_page, value_records
from influent.valuing import _beside, row_values

SCHEMA = json.loads((Path(__file__).parent.parent / "docs" / "schemas" / "value.json").read_text())
WIDTHS = {"a": 6, "b": 4}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, an offer of three providers (one of which resells another's rows), its index, and a target."""
    folder = tmp_path_factory.mktemp("valuing")
    make_model(folder / "model")
    rows = []
    for name, prompt, answer in FACTS:
        rows.append({"id": name, "provider": "facts", "prompt": prompt, "completion": f" {answer}."})
        rows.append({"id": f"{name}/text", "provider": "essays", "text": f"{prompt} {answer}, as everyone knows."})
        rows.append({"id": f"{name}/copy", "provider": "resale", "prompt": prompt, "completion": f" {answer}."})
    rows.append({"id": "again", "provider": "resale", "text": f"{FACTS[0][1]} {FACTS[0][2]}, as everyone knows."})
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    target = [{"prompt": f"Everyone knows that {p[0].lower()}{p[1:]}", "completion": f" {a}."} for _, p, a in FACTS]
    target += [{"text": f"{p} {a}."} for _, p, a in FACTS[:4]]
    (folder / "target.jsonl").write_text("".join(json.dumps(row) + "\n" for row in target))
    influent.index(
        str(folder / "model"), str(folder / "data.jsonl"), str(folder / "index"), method="linfik",
        compress="mask:8x8 | sjlt:32", shard_rows=7,
    )  # fmt: skip
    return folder


def value_of(here: Path, **options: Any) -> dict[str, Any]:
    document = influent.value(str(here / "index"), **({"target": str(here / "target.jsonl"), "draws": 200} | options))
    jsonschema.validate(document, SCHEMA)
    return document


def queries_of(here: Path) -> dict[str, torch.Tensor]:
    from influent import target
    from influent.attach import Run

    opened = Index.open(str(here / "index"))
    return target.gradients(opened, target.read(str(here / "target.jsonl")), run=Run())


@pytest.mark.parametrize("normalize", ["cosine", "none"])
def test_values_are_the_definitions(here, normalize, tmp_path):
    document = value_of(here, normalize=normalize, values=str(tmp_path / "values.npy"), rows=3)
    values = np.load(tmp_path / "values.npy")
    opened, queries = Index.open(str(here / "index")), queries_of(here)
    rows = {key: torch.cat([shard.rows(key) for shard in opened.shards]) for key in opened.keys}
    scores = oracle.scores(rows, queries)
    if normalize == "cosine":
        scores /= oracle.norms(queries)[:, None] * oracle.norms(rows)
    assert np.allclose(values, scores.mean(0), rtol=1e-4, atol=1e-6 * float(scores.abs().max()))
    names = [row["provider"] for row in opened.catalog.fields("provider")]
    for p in document["providers"]:
        own = [v for v, name in zip(scores.mean(0).tolist(), names, strict=True) if name == p["provider"]]
        assert p["rows"] == len(own)
        assert p["value"] == pytest.approx(np.mean(own), rel=1e-4)
        assert p["total"] == pytest.approx(np.sum(own), rel=1e-4)
        assert p["positive"] == np.mean(np.array(own) > 0)
        assert p["low"] <= p["value"] <= p["high"]
        assert p["per_token"] == pytest.approx(p["total"] / p["tokens"])
        assert [row["value"] for row in p["best"]] == pytest.approx(sorted(own, reverse=True)[:3], rel=1e-4)
        assert [row["value"] for row in p["worst"]] == pytest.approx(sorted(own)[:3], rel=1e-4)
    assert [p["rank"] for p in document["providers"]] == [1, 2, 3]
    assert document["rows"]["best"][0]["value"] == pytest.approx(values.max())


def test_copies_and_leaks_are_counted(here):
    found = {p["provider"]: p for p in value_of(here, rows=8)["providers"]}
    assert found["resale"]["duplicates"]["exact_within"] == 0
    assert found["resale"]["duplicates"]["exact_across"] == len(FACTS) + 1
    assert found["facts"]["duplicates"]["exact_across"] == len(FACTS)
    assert found["essays"]["duplicates"]["exact_across"] == 1
    texts = [str(row["text"]) for row in found["facts"]["best"]]
    assert found["facts"]["leaks"]["rows"] == sum(any(contains(text, q) for q in queries(here)) for text in texts)
    assert found["facts"]["leaks"]["queries"] >= 4  # the texts of four rows, word for word


def queries(here: Path) -> list[str]:
    records = map(json.loads, (here / "target.jsonl").read_text().splitlines())
    return [r.get("text") or r["prompt"] + r["completion"] for r in records]


def contains(text: str, query: str) -> bool:
    """Half of the query's runs of five words are in the text."""
    row, asked = ([tuple(w[i : i + 5]) for i in range(len(w) - 4)] for w in (words(text), words(query)))
    return 2 * sum(run in row for run in asked) >= len(asked)


def test_intervals_by_name_and_the_one_asked_for_first(here):
    by_queries, by_delivery = value_of(here), value_of(here, interval="delivery")
    for one, other in zip(by_queries["providers"], by_delivery["providers"], strict=True):
        assert one["intervals"] == other["intervals"]
        assert [one["low"], one["high"]] == one["intervals"]["queries"]
        assert [other["low"], other["high"]] == one["intervals"]["delivery"]
    assert value_of(here, by="source")["providers"][0]["provider"] == "data.jsonl"


def test_payments_sum_to_the_cent_and_copies_cost_with_diversity(here, tmp_path):
    (tmp_path / "costs.csv").write_text("provider,cost\nfacts,5\nessays,5\nresale,5.00\n")
    document = value_of(here, budget="99.99")
    paid = sum(round(100 * float(p["payment"])) for p in document["providers"])
    assert paid == 9999
    assert document["payments"]["rule"] == "lower_bound"
    bought = {}
    for mu in (0.0, 1.0, 1e6):
        money = value_of(here, budget="10", costs=str(tmp_path / "costs.csv"), diversity=mu)["payments"]
        bought[mu] = list(money["purchase"]["payments"])
        assert len(money["mechanism"]["payments"]) <= 3
    assert len(bought[0.0]) == 2
    assert len(bought[1.0]) <= 2
    assert bought[1e6] == []  # whatever is like what was taken, of one's own too, is then worth less than nothing


def test_no_price_without_enough_queries(here, tmp_path, capsys):
    (tmp_path / "few.jsonl").write_text('{"text": "The capital of Peru is Lima."}\n')
    document = value_of(here, target=str(tmp_path / "few.jsonl"), budget="10")
    assert "prices need 10" in document["payments"]["refused"]
    assert all(p["payment"] is None for p in document["providers"])
    arguments = ["value", str(here / "index"), "--target", str(tmp_path / "few.jsonl"), "--budget", "10"]
    assert run(arguments) == 2
    assert "no payment of 10.00: the target has 1 queries" in " ".join(capsys.readouterr().out.split())


def test_the_command_writes_tables_and_a_page(here, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    arguments = ["value", str(here / "index"), "--target", str(here / "target.jsonl"), "--budget", "50"]
    arguments += ["-o", str(tmp_path / "p.csv"), "--html", str(tmp_path / "p.html")]
    assert run([*arguments, "--values", str(tmp_path / "v.parquet"), "--rows", "2"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "paid: 50.00 by lower bound" in out
    assert all(len(line) <= 100 for line in out.splitlines() if "lower bound:" not in line and "token:" not in line)
    assert (tmp_path / "p.csv").read_text().count("\n") == 4
    page = (tmp_path / "p.html").read_text()
    assert page.count("<details>") == 3
    assert "http" not in page and "<script" not in page
    import pyarrow.parquet as pq

    table = pq.read_table(tmp_path / "v.parquet")
    assert table.num_rows == 3 * len(FACTS) + 1
    assert str(table.schema.field("value").type) == "double"


def test_texts_in_a_page_are_escaped(here):
    document = value_of(here)
    document["providers"][0]["provider"] = "<b>&"
    assert "<b>" not in html_page(document)
    assert "&lt;b&gt;&amp;" in html_page(document)
    assert next(iter(value_records(document)))["queries_low"] <= document["providers"][0]["value"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalize": "l2"}, "normalize"),
        ({"interval": "both"}, "interval"),
        ({"by": "colour"}, "provider or source"),
        ({"budget": "-3"}, "positive amount"),
        ({"costs": "x.csv"}, "give --budget"),
        ({"diversity": 1.0, "budget": "3"}, "give --costs"),
        ({"target": [{"text": " "}]}, "needs a text"),
        ({"target": []}, "no queries"),
    ],
)
def test_mistakes_are_named(here, options, message):
    with pytest.raises((SpecError, DataError), match=message):
        value_of(here, **options)


def test_another_model_is_refused(here, tmp_path):
    make_model(tmp_path / "other", seed=1)
    with pytest.raises(MismatchError, match="another model"):
        value_of(here, model=str(tmp_path / "other"))


def test_rows_of_margins_are_refused(here, tmp_path):
    influent.index(str(here / "model"), str(here / "data.jsonl"), str(tmp_path / "i"), method="trak", limit=4,
                   compress="sjlt:32")  # fmt: skip
    with pytest.raises(SpecError, match="gradients of the margin"):
        influent.value(str(tmp_path / "i"), target=str(here / "target.jsonl"))


# The closed-form laws.


def test_linfik_is_the_shapley_value_of_the_linear_game(tmp_path):
    """Every order of six rows: the mean marginal gain of v(S) = sum of <g_Q, g_z> is LinFiK to the last digit."""
    rows, queries = random_rows(6, WIDTHS), random_rows(3, WIDTHS, seed=1)
    index = write_index(tmp_path, rows)
    linfik = row_values(index, queries, normalize="none")
    own = oracle.scores(rows, queries).mean(0)

    def game(members: tuple[int, ...]) -> float:
        return float(sum((own[i] for i in members), torch.tensor(0.0)))

    shapley = np.zeros(6)
    for order in permutations(range(6)):
        for place, row in enumerate(order):
            shapley[row] += game(order[: place + 1]) - game(order[:place])
    assert np.allclose(linfik, shapley / factorial(6), rtol=1e-5)


def test_linfik_is_the_drop_of_the_loss_after_a_small_step():
    """Logistic regression: eta LinFiK against the loss itself, whose error falls with the square of eta."""
    rng = torch.Generator().manual_seed(0)
    w = torch.randn(5, dtype=torch.float64, generator=rng)
    x, q = (torch.randn(n, 5, dtype=torch.float64, generator=rng) for n in (1, 9))

    def loss(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.softplus(-(x @ w)).mean()

    g_z = torch.func.grad(loss)(w, x)
    linfik = torch.func.grad(loss)(w, q) @ g_z
    errors = [abs(float(loss(w, q) - loss(w - eta * g_z, q) - eta * linfik)) for eta in (0.2, 0.02, 0.002)]
    assert errors[0] < 0.2 * abs(float(linfik)) * 0.5
    assert errors[1] < errors[0] / 50 and errors[2] < errors[1] / 50


@pytest.mark.parametrize("kind", ["sjlt", "gauss", "mask"])
def test_sketched_linfik_is_unbiased(kind):
    """Over 400 seeds the mean of sketched values is the exact one, within four standard errors."""
    rows, queries = random_rows(4, {"a": 24})["a"], random_rows(2, {"a": 24}, seed=1)["a"]
    exact = (rows @ queries.mean(0)).numpy()
    maps = [draw(kind, 24, 6, stream=Stream(seed, "a", kind, "flat/0")) for seed in range(400)]
    sketched = np.stack([(m(rows) @ m(queries).mean(0)).numpy() for m in maps])
    assert np.all(np.abs(sketched.mean(0) - exact) < 4 * sketched.std(0) / 20)


@pytest.mark.parametrize("normalize", ["none", "cosine"])
def test_a_provider_beside_others_is_worth_its_rows_one_after_another(tmp_path, normalize):
    """Six rows of two providers, one of which repeats a row: <g_Q - mu s, g_z> summed, s all that was taken before."""
    rows, queries = random_rows(6, WIDTHS), random_rows(3, WIDTHS, seed=1)
    rows = {key: x[[0, 1, 2, 3, 3, 3]] for key, x in rows.items()}
    index, groups = write_index(tmp_path, rows), Groups("provider", ["a", "b"], np.array([0, 0, 0, 1, 1, 1]))
    asked = direction(queries, normalize)
    flat = torch.cat([rows[key] for key in asked], 1).double()
    wanted = torch.cat([q[0] for q in asked.values()]).double()
    flat = flat / flat.norm(dim=1, keepdim=True) if normalize == "cosine" else flat
    marginal = _beside(index, groups, asked, normalize, 3.0, None)
    for name, before, own in (("a", [], [0, 1, 2]), ("b", [], [3, 4, 5]), ("b", ["a"], [3, 4, 5])):
        taken = flat[[0, 1, 2]].sum(0) if before else torch.zeros_like(flat[0])
        total = 0.0
        for row in own:
            total += float((wanted - 3.0 / 6 * taken) @ flat[row])
            taken = taken + flat[row]
        assert marginal(name, before) == pytest.approx(total, rel=1e-4)


def test_sums_and_lengths_are_the_oracles(tmp_path):
    rows = random_rows(11, WIDTHS)
    for codec, factors in (("float32", None), ("rank:1:float32", {"a": (2, 3), "b": (2, 2)})):
        index = write_index(tmp_path / codec, rows, codec=codec, factors=factors, shard_rows=4)
        decoded = {key: torch.cat([shard.rows(key) for shard in index.shards]) for key in index.keys}
        weights = torch.randn(2, 11)
        weights[:, 4:9] = 0
        got = rowsums.weighted(index, weights)
        for key in index.keys:
            assert torch.allclose(got[key], weights @ decoded[key], atol=1e-4)
        assert torch.allclose(rowsums.lengths(index).double(), oracle.norms(decoded), rtol=1e-5)


def test_the_mean_over_queries_is_one_query(tmp_path):
    rows, queries = random_rows(7, WIDTHS), random_rows(3, WIDTHS, seed=1)
    index = write_index(tmp_path, rows)
    one = {key: q.mean(0, keepdim=True) for key, q in queries.items()}
    got = score.score(index, one, {"values": Means()})["values"]
    assert np.allclose(got, row_values(index, queries, normalize="none"), rtol=1e-4)

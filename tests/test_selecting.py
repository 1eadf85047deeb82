"""Selection: the best rows by value, without copies, as a data set that loads; greedy rounds against the definition."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_valuing import here, queries_of  # noqa: F401
from tiny_model import FACTS

import influent
from influent.cli import run
from influent.errors import SpecError
from influent.records import read_examples
from influent.rowstore import Index

COPIES = len(FACTS) + 1


def select(here: Path, out: Path, **options: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:  # noqa: F811
    import datasets

    card = influent.select(str(here / "index"), target=str(here / "target.jsonl"), out=str(out), **options)
    kind = "json" if out.suffix == ".jsonl" else "parquet"
    loaded = datasets.load_dataset(kind, data_files=str(out), split="train", cache_dir=str(out.parent / "cache"))
    return card, [dict(row) for row in loaded]  # pyright: ignore


def unit_rows(here: Path) -> tuple[np.ndarray, np.ndarray]:  # noqa: F811
    """Rows and the mean query, all of unit length before the mean, over all blocks, in float64."""
    opened, queries = Index.open(str(here / "index")), queries_of(here)
    rows = torch.cat([torch.cat([s.rows(key) for s in opened.shards]).double() for key in opened.keys], 1).numpy()
    asked = torch.cat([queries[key].double() for key in opened.keys], 1).numpy()
    rows, asked = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (rows, asked))
    return rows, asked.mean(0)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_the_best_rows_without_copies(here, tmp_path, suffix):  # noqa: F811
    card, rows = select(here, tmp_path / f"best{suffix}", budget="6")
    values, asked = unit_rows(here)
    values = values @ asked
    opened = Index.open(str(here / "index"))
    hashes = [row["hash"] for row in opened.catalog.fields("hash")]
    order = [i for i in np.argsort(-values, kind="stable").tolist() if hashes[i] not in hashes[:i]][:6]
    ids = [row["id"] for row in opened.catalog.fields("id")]
    assert sorted(row["id"] for row in rows) == sorted(ids[i] for i in order)
    assert {row["id"]: row["rank"] for row in rows} == {ids[i]: rank for rank, i in enumerate(order, 1)}
    assert card["value"] == pytest.approx(values[order].mean(), rel=1e-4)
    assert (card["rows"], card["copies_left_out"]) == (6, COPIES)
    again = list(read_examples(str(tmp_path / f"best{suffix}")))
    assert [e.id for e in again] == [row["id"] for row in rows]
    saved = json.loads((tmp_path / f"best{suffix}.card.json").read_text())
    assert saved == card
    assert "6 of 25 rows" in (tmp_path / f"best{suffix}.card.md").read_text()


def test_one_row_a_round_is_greedy_herding(here, tmp_path):  # noqa: F811
    card, rows = select(here, tmp_path / "spread.jsonl", budget="5", diversity=2.0, rounds=5)
    unit, asked = unit_rows(here)
    opened = Index.open(str(here / "index"))
    hashes = [row["hash"] for row in opened.catalog.fields("hash")]
    ids = [row["id"] for row in opened.catalog.fields("id")]
    taken: list[int] = []
    for _ in range(5):
        marginal = unit @ (asked - 2.0 / 5 * unit[taken].sum(0))
        order = [i for i in np.argsort(-marginal, kind="stable").tolist() if hashes[i] not in hashes[:i]]
        taken.append(next(i for i in order if i not in taken))
    assert {row["id"]: row["rank"] for row in rows} == {ids[i]: rank for rank, i in enumerate(taken, 1)}
    assert card["rounds"] == 5
    plain, _ = select(here, tmp_path / "plain.jsonl", budget="5")
    assert plain["value"] > card["value"]


def test_tokens_and_shares_are_kept(here, tmp_path):  # noqa: F811
    card, rows = select(here, tmp_path / "t.jsonl", tokens=60)
    assert 40 < card["tokens"] <= 60
    assert select(here, tmp_path / "s.jsonl", budget="10%")[0]["rows"] == round(0.1 * (3 * len(FACTS) + 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": "0"}, "budget"),
        ({"budget": "200%"}, "budget"),
        ({"budget": "ten"}, "budget"),
        ({}, "one of them"),
        ({"budget": "3", "tokens": 5}, "one of them"),
        ({"budget": "3", "diversity": -1.0}, "diversity"),
        ({"budget": "3", "out": "x.csv"}, "out"),
    ],
)
def test_mistakes_are_named(here, tmp_path, options, message):  # noqa: F811
    with pytest.raises(SpecError, match=message):
        influent.select(
            str(here / "index"), target=str(here / "target.jsonl"), **({"out": str(tmp_path / "x.jsonl")} | options)
        )


def test_the_command(here, tmp_path, capsys):  # noqa: F811
    arguments = ["select", str(here / "index"), "--target", str(here / "target.jsonl"), "--budget", "20%"]
    assert run([*arguments, "-o", str(tmp_path / "x.parquet")]) == 0
    assert "5 of 25 rows" in capsys.readouterr().out
    assert run([*arguments, "--tokens", "5", "-o", str(tmp_path / "x.parquet")]) == 2

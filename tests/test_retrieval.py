"""`influent evaluate` with relevance judgements, and killed for good half-way through a ground truth."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_evaluate import N, here, made, printed  # noqa: F401  (fixtures)

import influent
from influent import judging, relevance
from influent.cli import run
from influent.errors import DataError, MismatchError, SpecError

FACTS_ABOUT = {0: ["japan", "japan/text"], 1: ["peru"], 2: ["iraq", "iraq/text"], 3: ["cuba"]}  # by query


def by_hand(scores, relevant, k):
    both = zip(scores, relevant, strict=True)
    ranks = [1 + min(int((row > row[i]).sum()) for i in np.flatnonzero(good)) for row, good in both]
    return [1 / rank for rank in ranks], [float(rank <= k) for rank in ranks]


def test_ranks_of_relevant_rows_are_those_by_hand():
    rng = np.random.default_rng(0)
    scores, relevant = rng.normal(size=(6, 20)), rng.random((6, 20)) < 0.2
    relevant[:, 3] |= ~relevant.any(1)
    found = judging.retrieval({"a": scores}, relevant, np.arange(1, 6), k=3)["methods"]["a"]
    ranks, hits = by_hand(scores[1:], relevant[1:], 3)
    assert found["each"] == pytest.approx(ranks)
    assert found["mean"] == pytest.approx(np.mean(ranks)) and found["hit"]["mean"] == pytest.approx(np.mean(hits))
    with pytest.raises(DataError, match="query 2 has no relevant row"):
        judging.retrieval({"a": scores}, relevant & (np.arange(6) != 2)[:, None], np.arange(6), k=3)


def test_an_index_is_judged_by_pairs(here, capsys):  # noqa: F811
    pairs = [{"query": query, "id": name} for query, names in FACTS_ABOUT.items() for name in names]
    Path("relevant.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    options = ["--queries", "queries.jsonl", "--metric", "retrieval", "--relevant", "relevant.jsonl", "-k", "3"]
    part = printed(capsys, "index", *options, "--scores", "right.npy")["retrieval"]
    assert list(part["methods"]) == ["factgrass", "right", "bm25", "random"]
    assert part["methods"]["bm25"]["mean"] > part["methods"]["random"]["mean"]
    wanted = relevance.read("relevant.jsonl", influent_ids(), (4, N))
    assert part["methods"]["right"]["each"] == pytest.approx(by_hand(np.load("right.npy"), wanted, 3)[0])
    np.save("relevant.npy", wanted)
    alone = printed(
        capsys, "--scores", "right.npy", "--metric", "retrieval", "--relevant", "relevant.npy", "-k", "3"
    )["retrieval"]  # fmt: skip
    assert alone["methods"]["right"] == part["methods"]["right"]
    assert run(["evaluate", "index", *options]) == 0
    assert "hit@3" in capsys.readouterr().out


def influent_ids() -> list[str | None]:
    from influent.rowstore import Index

    return [row["id"] for row in Index.open("index").catalog.fields("id")]


def test_judgements_that_do_not_fit_are_named(here, tmp_path):  # noqa: F811
    (tmp_path / "numbers.jsonl").write_text('{"query": 0, "id": 12}\n{"query": 1, "id": null, "row": 0}\n')
    found = relevance.read(str(tmp_path / "numbers.jsonl"), ["11", "12"], (2, 2))  # ids that are written as numbers
    assert found.tolist() == [[False, True], [True, False]]
    (tmp_path / "half.jsonl").write_text('{"query": 0.7, "row": 1}\n')
    with pytest.raises(DataError, match="`query`, 0 to 1"):
        relevance.read(str(tmp_path / "half.jsonl"), ["11", "12"], (2, 2))
    (tmp_path / "odd.csv").write_text("query,row\n0,1\n9,1\n")
    with pytest.raises(DataError, match=r"odd.csv.*`query`, 0 to 3"):
        relevance.read(str(tmp_path / "odd.csv"), None, (4, N))
    with pytest.raises(MismatchError, match="expected queries x rows"):
        relevance.read(np.ones((3, N)), None, (4, N))
    with pytest.raises(SpecError, match="--relevant"):
        influent.evaluate(scores={"a": np.zeros((4, N))}, metric="retrieval")


def test_killed_for_good_it_goes_on_to_the_same_bytes(here, capsys):  # noqa: F811
    """kill -9 during the third training: the two that were done stay as they are, and the end is that of one run."""
    Path("deadly.py").write_text(
        "import os, signal, sys\n"
        "sys.path.insert(0, '.')\n"
        "from training import train as learn\n"
        "def train(rows, seed):\n"
        "    if os.environ.get('DEADLY') and sum(1 for _ in open('calls')) == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return learn(rows, seed)\n"
    )
    Path("calls").write_text("")
    arguments = ["--scores", "right.npy", "--truth", "truth", "--train", "deadly.py:train", "--subsets", "5"]
    done = subprocess.run(
        [sys.executable, "-c", f"from influent.cli import run; run(['evaluate', *{arguments!r}])"],
        env={**os.environ, "DEADLY": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    first = {path: path.read_bytes() for path in Path("truth").rglob("*.safetensors")}
    assert len(first) == 2
    document = printed(capsys, *arguments)
    assert Path("calls").read_text().count("\n") == 5  # none of the two again
    whole = printed(capsys, *(text if text != "truth" else "whole" for text in arguments))
    assert document["lds"] == whole["lds"]
    kept, clean = ({p.name: p.read_bytes() for p in Path(d).rglob("*.safetensors")} for d in ("truth", "whole"))
    assert kept == clean
    assert all(path.read_bytes() == content for path, content in first.items())

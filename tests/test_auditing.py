"""Third-party valuation: what was committed is what is audited, and every kind of tampering is found."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_student import appraise, here  # noqa: F401

import influent
from influent.cli import run
from influent.commitments import TABLE, commit, positions
from influent.errors import DataError, SpecError
from influent.records import content_hash

SEED, COUNT = "draw of 22 November", 30


@pytest.fixture(scope="module")
def home(here: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A provider's folder with committed scores, and what it handed over and revealed."""
    folder = tmp_path_factory.mktemp("home")
    document = appraise(here, out=str(folder / "scores"), commit=True)
    assert document["commitment"]["rows"] == 180
    influent.reveal(str(folder / "scores"), seed=SEED, count=COUNT, out=str(folder / "revealed.jsonl"))
    (folder / "handed").mkdir()
    for name in ("commitment.json", "commitment.parquet"):
        shutil.copy(folder / "scores" / name, folder / "handed" / name)
    return folder


def audit(folder: Path, **options: Any) -> dict[str, Any]:
    settings = {"seed": SEED, "count": COUNT} | options
    return influent.audit(str(folder / "handed"), str(folder / "revealed.jsonl"), **settings)


def test_an_honest_provider_passes_and_its_rows_are_estimated(home, here, tmp_path):  # noqa: F811
    found = audit(home, student=str(here / "student"))
    assert found["errors"] == []
    assert len(found["revealed"]) == COUNT
    labels = "".join(f"{line['hash']},{line['score'] + 0.25}\n" for line in found["revealed"])
    (tmp_path / "labels.csv").write_text("hash,value\n" + labels)
    providers = audit(home, labels=str(tmp_path / "labels.csv"))["providers"]
    scored = {p["provider"]: p for p in appraise(here)["providers"]}
    import pyarrow.parquet as pq

    table = pq.read_table(home / "handed" / TABLE).to_pydict()
    for p in providers:
        own = [s for s, name in zip(table["score"], table["name"], strict=True) if name == p["provider"]]
        assert p["rows"] == scored[p["provider"]]["rows"] == 60
        assert p["value"] == pytest.approx(np.mean(own) + 0.25, abs=1e-5)  # every label is 0.25 above its score
    with pytest.raises(DataError, match="needs the labels of all"):
        (tmp_path / "few.csv").write_text("hash,value\n" + labels.splitlines()[0] + "\n")
        audit(home, labels=str(tmp_path / "few.csv"))


def edit_lines(change: Callable[[list[dict[str, Any]]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        lines = [json.loads(line) for line in (folder / "revealed.jsonl").read_text().splitlines()]
        change(lines)
        (folder / "revealed.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    return apply


def edit_table(change: Callable[[dict[str, list]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = folder / "handed" / TABLE
        table = pq.read_table(path)
        columns = table.to_pydict()
        change(columns)
        pq.write_table(pa.table(columns, schema=table.schema), path)

    return apply


def edit_root(folder: Path) -> None:
    path = folder / "handed" / "commitment.json"
    statement = json.loads(path.read_text())
    path.write_text(json.dumps({**statement, "root": "0" * 64}))


TAMPERING: dict[str, tuple[Callable[[Path], None], str]] = {
    "a revealed score": (edit_lines(lambda x: x[3].update(score=x[3]["score"] + 1e-3)), "not what was committed"),
    "a revealed text": (edit_lines(lambda x: x[0].update(content={"text": "a better row"})), "not what was committed"),
    "a salt": (edit_lines(lambda x: x[0].update(salt="00" * 16)), "not what was committed"),
    "a proof": (edit_lines(lambda x: x[1]["proof"].reverse()), "not what was committed"),
    "a provider's name": (edit_lines(lambda x: x[1].update(name="other")), "not what was committed"),
    "a row left out": (edit_lines(lambda x: x.pop()), "not those that the seed draws"),
    "another row shown": (edit_lines(lambda x: x.__setitem__(0, x[1])), "not those that the seed draws"),
    "a score of the table": (edit_table(lambda c: c["score"].__setitem__(7, 9.0)), "not to the committed one"),
    "a hash of the table": (edit_table(lambda c: c["hash"].__setitem__(7, "ab" * 32)), "not to the committed one"),
    "rows of the table": (edit_table(lambda c: [column.pop() for column in c.values()]), "has 179 rows"),
    "the root": (edit_root, "not to the committed one"),
}


@pytest.mark.parametrize("name", TAMPERING)
def test_tampering_is_found(home, tmp_path, name):
    change, message = TAMPERING[name]
    shutil.copytree(home / "handed", tmp_path / "handed")
    shutil.copy(home / "revealed.jsonl", tmp_path / "revealed.jsonl")
    change(tmp_path)
    found = audit(tmp_path)
    assert not found["ok"]
    assert any(message in error for error in found["errors"]), found["errors"]


def test_scores_that_the_student_does_not_give_are_found(home, here, tmp_path):  # noqa: F811
    """A provider that commits to invented scores has a proper tree, and is caught on the rows that are drawn."""
    import torch

    from influent.artifact import ArtifactWriter
    from influent.storage import Store

    shutil.copytree(home / "scores", tmp_path / "scores")
    store = Store(str(tmp_path / "scores"))
    for name in ("manifest.json", *(n for n in store.names() if n.startswith(("commitment", "shards/")))):
        store.delete(name)
    spec = json.loads(store.get("spec.json"))["spec"]
    writer = ArtifactWriter.open(store, "scores", spec)
    writer.put("000000", {"score": torch.ones(180), "tokens": torch.ones(180)}, rows=(0, 180))
    writer.commit({}, files=("catalog.json", "catalog.parquet"))
    commit(store)
    shutil.copytree(tmp_path / "scores", tmp_path / "handed")
    influent.reveal(str(tmp_path / "scores"), seed=SEED, count=COUNT, out=str(tmp_path / "revealed.jsonl"))
    assert audit(tmp_path)["ok"]
    errors = audit(tmp_path, student=str(here / "student"))["errors"]
    assert len(errors) == COUNT
    assert "the student gives" in errors[0]


def test_positions_follow_root_and_seed_and_nothing_else():
    draws = [positions("ab", 1000, 20, "x"), positions("ab", 1000, 20, "y"), positions("ac", 1000, 20, "x")]
    assert draws[0] == positions("ab", 1000, 20, "x")
    assert draws[0] != draws[1] and draws[0] != draws[2]
    assert len(set(draws[0])) == 20
    counts = np.bincount([row for i in range(400) for row in positions("ab", 10, 3, str(i))], minlength=10)
    assert counts.min() > 80 and counts.max() < 160
    for count in (0, 11):
        with pytest.raises(SpecError):
            positions("ab", 10, count, "x")


def test_hidden_rows_cannot_be_guessed_from_what_is_handed_over(home, here):  # noqa: F811
    rows = [json.loads(line) for line in (here / "offer.jsonl").read_text().splitlines()]
    table = (home / "handed" / "commitment.parquet").read_bytes()
    assert not any(content_hash({"text": row["text"]}).encode() in table for row in rows)
    assert not (home / "handed" / "commitment.secret").exists()


def test_the_commands(home, here, tmp_path, capsys):  # noqa: F811
    arguments = ["--seed", SEED, "--count", "5"]
    assert run(["reveal", str(home / "scores"), *arguments, "-o", str(tmp_path / "r.jsonl")]) == 0
    assert "5 rows" in capsys.readouterr().out
    line = ["audit", str(home / "handed"), str(tmp_path / "r.jsonl")]
    assert run([*line, *arguments, "--student", str(here / "student")]) == 0
    assert "ok" in capsys.readouterr().out
    assert run([*line, "--seed", "another", "--count", "5"]) == 2
    assert "not those that the seed draws" in " ".join(capsys.readouterr().out.split())
    assert run(["reveal", str(here / "index"), *arguments, "-o", str(tmp_path / "r.jsonl")]) == 2

"""The demo: its passages, its page, and (slow) the whole of it on the real model."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from influent import demo, fetch
from influent.cli import run

ROOT = Path(__file__).parent.parent


def test_passages_are_short_and_hard_to_tell_apart(tmp_path: Path) -> None:
    rows = [
        {"id": f"{country.lower()}/{field}", "text": text, "source": country, "provider": "x"}
        for country in ("Kenya", "Japan", "France")
        for field, text in {
            "government/capital": "Capital",
            "geography/climate": "c" * 400,
            "energy/coal": "Coal",
        }.items()
    ]
    path = tmp_path / "factbook.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert [row["id"] for row in demo.passages(path)] == ["japan/government/capital", "kenya/government/capital"]


def test_the_numbers_on_the_page_are_those_measured() -> None:
    document = json.loads((ROOT / "benchmarks" / "results" / "fact_tracing.json").read_text())
    found = {
        row["method"]: row["hit@1"]
        for row in document["results"]
        if row["completion"] == "fact"
        and (
            row["method"] == "bm25"
            or (row["compress"], row["damping"], row["normalize"]) == (demo.COMPRESS, demo.DAMPING, "none")
        )
    }
    expected = {"questions": document["questions"], "influence": found["factgrass"], "bm25": found["bm25"]}
    assert expected == pytest.approx(demo.MEASURED, abs=0.005)


def test_readme_goes_on_with_the_demos_own_commands() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for command in demo.next_commands("demo-index", "MODEL")[:2]:
        assert command in readme


def listed(name: str) -> dict[str, object]:
    return {"row": 0, "id": name, "score": 1.5, "percentile": 99.6, "text": "Capital of Kenya", "source": "Kenya"}


def test_the_page_says_what_the_numbers_mean() -> None:
    names = [name for _, name in demo.QUESTIONS]
    queries = [
        {"query": i, "prompt": prompt, "completion": " x", "top": [listed(name)], "bottom": []}
        for i, (prompt, name) in enumerate(demo.QUESTIONS)
    ]
    baselines = {"bm25": [[listed("other"), listed(name)] for name in names], "random": [[] for _ in names]}
    document = {"queries": queries, "baselines": baselines, "method": {"name": "factgrass"}, "skipped": {}}
    info = {"rows": 250, "bytes": 1e8, "bytes_per_row": 4e5, "summary": {"coverage": 0.789}}
    more = {"info": info, "seconds": {"index": 60.0, "query": 5.0}, "next": demo.next_commands("demo-index", "/m" * 80)}
    sink = io.StringIO()
    demo.page({**document, "facts": demo._facts(document), **more}, Console(file=sink, width=80, highlight=False))
    text = " ".join(sink.getvalue().split())
    assert "positive = the answer's loss falls" in text
    assert "not necessarily trained on these very passages" in text
    assert "number 1 by influence, number 2 by bm25, not in the first 10 by random" in text
    assert "65 s in all" in text and "78.9% of the model's parameters" in text
    assert f"influent index {'/m' * 80} YOUR.jsonl" in sink.getvalue(), "a command is never cut into lines"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_demo_finds_the_facts_and_leaves_a_usable_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On two countries, so that it takes seconds; `make demo` runs the whole."""
    monkeypatch.setattr(demo, "COUNTRIES", ("Japan", "Kenya"))
    fetch.smollm2()
    out = str(tmp_path / "demo-index")
    assert run(["demo", "-o", out, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["queries"][0]["completion"].strip() == "Mount Fuji"
    assert [fact["influence"] for fact in document["facts"]] == [1, 1, 1]
    assert run(["verify", out]) == 0
    before = (tmp_path / "demo-index" / "manifest.json").stat().st_mtime_ns
    assert run(["demo", "-o", out]) == 0
    assert (tmp_path / "demo-index" / "manifest.json").stat().st_mtime_ns == before, "the index is used again"

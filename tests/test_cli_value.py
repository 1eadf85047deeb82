"""The verbs of valuation on the command line: mistakes are one line, and a verb is the function of the same name."""

import inspect
from pathlib import Path

import pytest
from test_cli import here, llama  # noqa: F401

import influent
from influent import cli_value
from influent.cli import run

VALUE = ["value", "index", "--model", "model", "--target", "queries.jsonl"]
MISTAKES: list[tuple[list[str], str]] = [
    (["value", "index"], "Missing option '--target'"),
    (["value", "nowhere", "--target", "queries.jsonl"], "nowhere: no such index"),
    (["value", "index", "--model", "model", "--target", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
    (["value", "index", "--model", "model", "--target", "blank.jsonl"], "blank.jsonl:1: --target: expected a text"),
    ([*VALUE, "--by", "colour"], "--by: expected provider or source, got 'colour'"),
    ([*VALUE, "--normalize", "relatif"], "--normalize: expected cosine or none"),
    ([*VALUE, "--interval", "both"], "--interval: expected queries or delivery"),
    ([*VALUE, "--budget", "1.005"], "--budget: expected a positive amount with at most two decimals"),
    ([*VALUE, "--out", "x.txt"], "--out: expected a file name ending in .parquet or .csv"),
    ([*VALUE, "--html", "x.txt"], "--html: expected a file name ending in .html"),
    ([*VALUE, "--values", "x.txt"], "--values: expected a file name ending in .npy"),
    (["select", *VALUE[1:], "-o", "x.jsonl"], "give --budget (rows, or a share such as 10%) or --tokens"),
    (["distill", *VALUE[1:], "--student", "empty", "-o", "s"], "empty: config.json is missing"),
    (["distill", *VALUE[1:], "--student", "model", "-o", "s", "--rung", "gpt"], "--rung: expected auto, bm25"),
    (["appraise", "index", "data.jsonl", "--commit"], "--commit is to scores that are kept"),
    (
        ["reveal", "nowhere", "--seed", "x", "--count", "3", "-o", "r.jsonl"],
        "nowhere: no such folder of scores; make it",
    ),
    (["reveal", "index", "--seed", "x", "--count", "3", "-o", "r.jsonl"], "index: nothing is committed there"),
    (["audit", "nowhere", "r.jsonl", "--seed", "x", "--count", "3"], "nowhere: no such commitment; make it with"),
    (["appraise", "nowhere", "data.jsonl"], "nowhere: no such student; make it with `influent distill INDEX"),
    (["appraise", "index", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
    (["appraise", "index", "data.jsonl"], "expected a directory of kind 'student', got 'index'"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=lambda value: " ".join(value)[-40:])
def test_a_mistake_is_one_line(
    here: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    before = sorted(str(path) for path in here.rglob("*"))
    assert run(arguments) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err
    assert sorted(str(path) for path in here.rglob("*")) == before


@pytest.mark.parametrize("verb", [verb.__name__ for verb in cli_value.VERBS])
def test_a_verb_is_the_function_of_the_same_name(verb: str) -> None:
    options = inspect.signature(getattr(cli_value, verb)).parameters
    parameters = inspect.signature(getattr(influent, verb)).parameters
    printed = {"json", "html", "table"} | ({"out"} if "out" not in parameters else set())
    ours = {name: p.default for name, p in options.items() if name not in printed}
    theirs = {name: p.default for name, p in parameters.items() if name not in ("task", "progress")}
    assert ours == theirs

"""The whole command on a tiny model folder: index, fit, query, self, info, verify, and what goes wrong on the way."""

import inspect
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from rich.cells import cell_len
from tiny_model import FACTS, make_data, make_model

from influent import cli
from influent.cli import run

SCHEMAS = Path(__file__).parent.parent / "docs" / "schemas"
OPTIONS = ["--compress", "mask:8x8 | sjlt:32", "--shard-rows", "5", "--token-budget", "64"]
ROWS = 2 * len(FACTS)
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "80"}
FIM = ["--damping", "relative:0.1"]  # several tests fit to the one index, so each says which it means
NAMES = [name for name, _, _ in FACTS] + [f"{name}/text" for name, _, _ in FACTS]


def command(*arguments: str, code: int = 0, **options: Any) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "influent.cli", *arguments]
    done = subprocess.run(line, capture_output=True, text=True, env=ENVIRONMENT, **options)
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    return done


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, data and an index of them, made by the command in a process of its own."""
    here = tmp_path_factory.mktemp("made")
    make_model(here / "model")
    make_data(here / "data.jsonl")
    done = command("index", "model", "data.jsonl", "-o", "index", *OPTIONS, "--json", cwd=here)
    assert done.stderr == ""
    (here / "indexed.json").write_text(done.stdout)
    return here


@pytest.fixture
def here(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(made)
    return made


Ask = Callable[..., dict[str, Any]]


@pytest.fixture
def ask(here: Path, capsys: pytest.CaptureFixture[str]) -> Ask:
    """Run a verb with --json in this process and return its document, checked against its schema."""

    def call(verb: str, *arguments: str, code: int = 0) -> dict[str, Any]:
        assert run([verb, *arguments, "--json"]) == code
        out, err = capsys.readouterr()
        assert err == ""
        assert out.count("\n") == 1
        document = json.loads(out)
        if (SCHEMAS / f"{verb}.json").exists():
            jsonschema.validate(document, json.loads((SCHEMAS / f"{verb}.json").read_text()))
        return document

    return call


@pytest.fixture
def refuse(here: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Run a verb that must fail with one line that holds every one of `parts`."""

    def call(arguments: list[str], *parts: str) -> None:
        assert run(arguments) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        assert err.startswith("influent: ")
        assert not [part for part in parts if part not in err], err

    return call


def test_index_prints_the_info_document(here: Path, ask: Ask) -> None:
    text = (here / "indexed.json").read_text()
    assert text.count("\n") == 1
    document = json.loads(text)
    jsonschema.validate(document, json.loads((SCHEMAS / "info.json").read_text()))
    assert document["rows"] == ROWS
    assert document["skipped"] == {"empty": 1}
    assert document["compress"] == "mask:8x8 | sjlt:32"
    assert document["layers"] == 14
    now = ask("info", "index")
    assert {k: now[k] for k in ("rows", "digest", "bytes")} == {k: document[k] for k in ("rows", "digest", "bytes")}


def test_the_same_command_again_redoes_nothing(here: Path, ask: Ask) -> None:
    before = {path: path.stat().st_mtime_ns for path in (here / "index").rglob("*") if path.is_file()}
    ask("index", "model", "data.jsonl", "-o", "index", *OPTIONS)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_query_finds_its_own_row(here: Path, tmp_path: Path, ask: Ask) -> None:
    import pyarrow.parquet as pq

    index = str(tmp_path / "index")
    shutil.copytree("index", index, ignore=shutil.ignore_patterns("curvature"))
    name, prompt, answer = FACTS[2]
    document = ask(
        "query", index, "--prompt", prompt, "--completion", f" {answer}.", "--normalize", "cosine", "-k", "4",
        "--scores", "scores.npy", "-o", "rows.parquet",
    )  # fmt: skip
    (asked,) = document["queries"]
    assert asked["prompt"] == prompt
    assert [row["id"] for row in asked["top"]][0] == name
    assert asked["top"][0]["provider"] == "facts"
    assert asked["top"][0]["source"] == "data.jsonl"
    assert asked["top"][0]["text"] == f"{prompt} {answer}."
    assert len(asked["top"]) == len(asked["bottom"]) == 4
    assert document["baselines"]["bm25"][0][0]["id"] in (name, f"{name}/text")
    assert len(document["baselines"]["random"][0]) == 4
    assert document["skipped"] == {"empty": 1}
    scores = np.load("scores.npy")
    assert scores.shape == (1, ROWS)
    assert scores.dtype == np.float32
    order = np.argsort(-scores[0], kind="stable")
    assert [row["row"] for row in asked["top"]] == order[:4].tolist()
    assert [row["row"] for row in asked["bottom"]] == order[::-1][:4].tolist()
    for row in [*asked["top"], *asked["bottom"], *document["baselines"]["random"][0]]:
        assert row["score"] == pytest.approx(scores[0, row["row"]], rel=1e-5)
        if row not in document["baselines"]["random"][0]:
            assert row["percentile"] == pytest.approx(100 * np.mean(scores[0] < scores[0, row["row"]]), abs=0.01)
        assert row["id"] == NAMES[row["row"]]
    table = pq.read_table("rows.parquet").to_pylist()
    assert [row["row"] for row in table if row["list"] == "top"] == [row["row"] for row in asked["top"]]


@pytest.mark.parametrize(
    "options", [FIM, ["--curvature", "identity"], ["--normalize", "relatif", *FIM], ["--damping", "absolute:0.01"]]
)
def test_queries_from_a_file_are_the_queries_one_by_one(here: Path, ask: Ask, options: list[str]) -> None:
    records = [{"prompt": prompt, "completion": f" {answer}."} for _, prompt, answer in FACTS[:3]]
    Path("queries.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    many = ask("query", "index", "--queries", "queries.jsonl", "-k", "3", *options)["queries"]
    assert [query["query"] for query in many] == [0, 1, 2]
    for record, query in zip(records, many, strict=True):
        pair = ["--prompt", record["prompt"], "--completion", record["completion"]]
        (single,) = ask("query", "index", *pair, "-k", "3", *options)["queries"]
        assert [row["row"] for row in single["top"]] == [row["row"] for row in query["top"]]
        assert [row["score"] for row in single["top"]] == pytest.approx([r["score"] for r in query["top"]], rel=1e-3)


def test_a_contrast_is_one_query(here: Path, ask: Ask) -> None:
    for name, part in (("asked.jsonl", FACTS[:2]), ("control.jsonl", FACTS[4:6])):
        lines = [json.dumps({"prompt": prompt, "completion": answer}) + "\n" for _, prompt, answer in part]
        Path(name).write_text("".join(lines))
    ask("query", "index", "--queries", "asked.jsonl", "--control", "control.jsonl", "--scores", "contrast.npy", *FIM)
    ask("query", "index", "--queries", "asked.jsonl", "--scores", "asked.npy", *FIM)
    ask("query", "index", "--queries", "control.jsonl", "--scores", "control.npy", *FIM)
    expected = np.load("asked.npy").mean(axis=0) - np.load("control.npy").mean(axis=0)
    assert np.load("contrast.npy")[0] == pytest.approx(expected, rel=1e-3, abs=1e-3 * float(np.abs(expected).max()))


def test_fits_are_listed_and_chosen_by_name(here: Path, ask: Ask) -> None:
    ask("fit", "index")
    ask("fit", "index", "--damping", "relative:10")
    listed = json.dumps(ask("info", "index")["curvatures"])
    assert "relative:0.1" in listed
    assert "relative:10" in listed
    pair = ["--prompt", FACTS[0][1], "--completion", FACTS[0][2]]
    strong = ask("query", "index", *pair, "--curvature", "fim:relative:10", "--scores", "a.npy")
    assert "relative:10" in json.dumps(strong["method"])
    ask("query", "index", *pair, "--damping", "relative:10", "--scores", "b.npy")
    assert np.array_equal(np.load("a.npy"), np.load("b.npy"))


def test_self_influence_is_ranked(here: Path, ask: Ask) -> None:
    rows = ask("self", "index", "-k", "5", "-o", "self.csv", *FIM)["rows"]
    assert len(rows) == 5
    scores = [row["score"] for row in rows]
    assert scores == sorted(scores, reverse=True)
    assert min(scores) > 0
    assert Path("self.csv").read_text().count("\n") >= 6


@pytest.mark.parametrize("columns", [80, 120])
def test_pages_fit_the_terminal_without_colour_codes(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    pair = ["--prompt", FACTS[0][1], "--completion", FACTS[0][2]]
    for arguments, part in (
        (["query", "index", *pair, *FIM], "Pushed the model towards it"),
        (["self", "index", *FIM], "self-influence"),
        (["info", "index"], "compressor"),
        (["verify", "index"], "ok"),
        (["fit", "index"], "fim:relative:0.1"),
        (["index", "model", "data.jsonl", "-o", "index", *OPTIONS], "rows"),
    ):
        assert run(arguments) == 0
        out, err = capsys.readouterr()
        assert part in out
        assert err == ""
        assert "\x1b" not in out
        assert all(cell_len(line) <= columns for line in out.splitlines())


def test_a_corrupted_shard_is_named(here: Path, tmp_path: Path, ask: Ask) -> None:
    assert ask("verify", "index") == {"ok": True, "errors": []}
    shutil.copytree("index", tmp_path / "index")
    shard = tmp_path / "index" / "shards" / "000001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    document = ask("verify", str(tmp_path / "index"), code=2)
    assert any("000001.safetensors" in error for error in document["errors"])
    shard.write_bytes(data[:-10])
    pair = ["--prompt", FACTS[0][1], "--completion", FACTS[0][2], "--curvature", "identity"]
    done = command("query", str(tmp_path / "index"), *pair, code=2)
    assert "000001.safetensors" in done.stderr
    assert done.stderr.count("\n") == 1


def test_advice_on_damage_restores_the_index(here: Path, tmp_path: Path, refuse: Any, ask: Ask) -> None:
    index = tmp_path / "index"
    shutil.copytree("index", index)
    shard = index / "shards" / "000000.safetensors"
    arguments = ["index", "model", "data.jsonl", "-o", str(index), *OPTIONS]
    for harm in (shard.unlink, lambda: shard.write_bytes(shard.read_bytes()[:-1])):
        harm()
        refuse(arguments, "shards/000000.safetensors: ", "delete manifest.json there, then run the same command again")
        (index / "manifest.json").unlink()
        ask(*arguments)
        assert_same_files(Path("index"), index)
    (index / "spec.json").write_text("{")
    refuse(arguments, "delete spec.json and manifest.json there")
    for name in ("spec.json", "manifest.json"):
        (index / name).unlink()
    before = shard.stat().st_mtime_ns
    ask(*arguments)
    assert shard.stat().st_mtime_ns == before
    assert_same_files(Path("index"), index)


def test_another_model_is_refused(here: Path, refuse: Callable[..., None]) -> None:
    make_model(here / "wider", width=32)
    make_model(here / "other", seed=1)
    pair = ["--prompt", FACTS[0][1], "--completion", FACTS[0][2]]
    refuse(["query", "index", *pair, "--model", "wider"], "wider: ", "was built with 16", "has 32")
    refuse(["query", "index", *pair, "--model", "other"], "another model", "give --model")


BAD_DATA = [
    (b'{"text": "a", "id": "x"}\n{"text": "b", "id": "x"}\n', ["bad.jsonl:2", 'id "x"', "bad.jsonl:1"]),
    (b'{"text": "a"}\n{"text": "\xff"}\n', ["bad.jsonl:2: not UTF-8"]),
    (b'{"text": "a"}\n{"text"\n', ["bad.jsonl:2: not JSON"]),
    (b'{"body": "a"}\n', ["bad.jsonl:1: expected", '"body"']),
    (b'{"text": ""}\n', ["empty"]),
]


@pytest.mark.parametrize(("content", "parts"), BAD_DATA)
def test_bad_data_leaves_nothing_behind(here: Path, refuse: Any, content: bytes, parts: list[str]) -> None:
    Path("bad.jsonl").write_bytes(content)
    refuse(["index", "model", "bad.jsonl", "-o", "never"], *parts)
    assert not Path("never").exists()


def test_layers_that_only_the_loaded_model_can_judge(here: Path, refuse: Any, ask: Ask) -> None:
    make_model(here / "gpt2", kind="gpt2")
    refuse(["index", "gpt2", "data.jsonl", "-o", "gpt2-index", "--layers", "nosuchlayer"], "'nosuchlayer'", "no layer")
    document = ask(
        "index", "gpt2", "data.jsonl", "-o", "gpt2-index", "--layers", r"attn\.c_proj", "--rows", "dense:bf16"
    )
    assert document["layers"] == 2
    assert document["dtype"] == "bfloat16"
    refuse(["index", "gpt2", "data.jsonl", "-o", "gpt2-index", "--layers", "mlp", "--rows", "bf16"], "gpt2-index")


def test_a_loss_that_is_not_a_number_names_its_row(here: Path, refuse: Any, ask: Ask) -> None:
    """The embedding of one byte that only one row holds is not a number."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    shutil.copytree("model", "sick")
    (token,) = AutoTokenizer.from_pretrained("sick").encode("~", add_special_tokens=False)
    weights = load_file("sick/model.safetensors")
    weights["model.embed_tokens.weight"][token] = torch.nan
    save_file(weights, "sick/model.safetensors", metadata={"format": "pt"})
    Path("sick.jsonl").write_text(
        '{"text": "fine words"}\n{"id": "tilde", "text": "the ~ sign"}\n{"text": "more words"}\n'
    )
    refuse(["index", "sick", "sick.jsonl", "-o", "sick-index", *OPTIONS], "row 1")
    document = ask("index", "sick", "sick.jsonl", "-o", "sick-index", *OPTIONS, "--skip-nonfinite")
    assert sum(document["skipped"].values()) == 1


def test_a_full_disk_is_one_line_and_the_same_command_finishes_later(
    here: Path, capsys: pytest.CaptureFixture[str], refuse: Callable[..., None]
) -> None:
    arguments = ["index", "model", "data.jsonl", "-o", "later", *OPTIONS]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, before[1]))  # the catalog fits, a shard does not
    try:
        refuse(arguments, "later/shards/000000.safetensors: cannot be written")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not Path("later/manifest.json").exists()
    assert run(arguments) == 0
    assert_same_files(Path("index"), Path("later"))


def test_an_interrupted_index_resumes_to_the_same_bytes(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("long.jsonl").write_text("".join(json.dumps({"text": f"row {i}: " + "word " * 30}) + "\n" for i in range(100)))
    arguments = ["index", "model", "long.jsonl", "-o", "stopped", "--compress", "mask:8x8", "--shard-rows", "4"]
    arguments += ["--token-budget", "64"]
    line = [sys.executable, "-m", "influent.cli", *arguments]
    process = subprocess.Popen(
        line,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=ENVIRONMENT,
        # a shell starts background jobs with SIGINT ignored, and a suite run as one hands that down
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 300
    while not Path("stopped/shards/000001.json").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    assert err == "influent: interrupted; what was finished is kept: the same command again resumes\n"
    assert not Path("stopped/manifest.json").exists()
    done = {path: path.stat().st_mtime_ns for path in Path("stopped/shards").glob("*.json")}
    assert done
    assert run(["info", "stopped"]) == 2
    assert "run the same command again" in capsys.readouterr().err
    assert run(arguments) == 0
    assert {path: path.stat().st_mtime_ns for path in done} == done
    arguments[arguments.index("stopped")] = "straight"
    assert run(arguments) == 0
    assert_same_files(Path("straight"), Path("stopped"))


def assert_same_files(one: Path, other: Path) -> None:
    def files(root: Path) -> dict[str, bytes]:
        found = (path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
        return {name: (root / name).read_bytes() for name in found if not name.startswith("curvature/")}

    expected, got = files(one), files(other)
    assert sorted(got) == sorted(expected)
    assert [name for name in expected if got[name] != expected[name]] == []


def test_a_verb_is_the_function_of_the_same_name() -> None:
    import influent

    callbacks = (command.callback for command in cli.app.registered_commands)
    verbs = {callback.__name__: callback for callback in callbacks if callback is not None}
    for verb in ("index", "fit", "query", "self_influence", "info", "verify", "evaluate", "mask"):
        options = inspect.signature(verbs[verb]).parameters
        parameters = inspect.signature(getattr(influent, verb)).parameters
        ours = {
            name: p.default
            for name, p in options.items()
            if name != "json" and (name != "out" or verb in ("index", "mask"))
        }
        theirs = {
            name: p.default
            for name, p in parameters.items()
            if name not in ("task", "progress") and (name != "data" or verb not in ("fit", "query", "self_influence"))
        }
        assert ours.keys() == theirs.keys(), verb
        required = inspect.Parameter.empty
        assert {n: d for n, d in ours.items() if d is not required} == {
            n: theirs[n] for n in ours if ours[n] is not required
        }

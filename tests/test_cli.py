"""Mistakes on the command line: one line on stderr, exit code 2, at once, and nothing written."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from indexes import make_index
from tiny_model import make_data, make_model

from influent import preflight
from influent.artifact import canonical_json
from influent.cli import run
from influent.curvature import Damping
from influent.errors import InfluentError, SpecError
from influent.storage import Store

HEAVY = ("torch", "transformers", "datasets", "pandas", "pyarrow")


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def here(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a model, data, a finished index of another model, and things that are none of these."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(llama)
    make_data(tmp_path / "data.jsonl")
    make_index(Store("index"))
    make_index(Store("unfinished"))
    Path("unfinished/manifest.json").unlink()
    for name in ("empty", "nofile", "pickled", "noconfig", "badconfig", "notokens", "halved", "foreign", "artifact"):
        (tmp_path / name).mkdir()
    for name in ("pickled", "badconfig", "notokens", "halved"):
        shutil.copy(llama / "config.json", name)
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"")
    (tmp_path / "badconfig" / "config.json").write_text("{")
    shutil.copy(llama / "model.safetensors", "notokens")
    Path("halved/model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    Path("foreign/thesis.tex").write_text("x")
    Path("artifact/spec.json").write_bytes(
        canonical_json({"format": [1, 0], "requires": [], "kind": "gram", "spec": {}})
    )
    Path("torn").mkdir()
    Path("torn/spec.json").write_text('{"format": [1,')
    Path("others/shards").mkdir(parents=True)
    Path("junk.bin").write_text("x")
    Path("bad.jsonl").write_text('{"text": "a"}\n{"prompt": "b"}\n')
    Path("blank.jsonl").write_text('{"text": " "}\n')
    Path("queries.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    return tmp_path


ASK = ["--prompt", "a", "--completion", "b"]
INDEX = ["index", "model", "data.jsonl", "-o", "new"]
QUERY = ["query", "index", *ASK, "--model", "model"]
MISTAKES: list[tuple[list[str], str]] = [
    (["--bogus"], "No such option: --bogus"),
    (["bogus"], "No such command 'bogus'"),
    (["index", "model", "-o", "new"], "Missing argument 'DATA'"),
    (["index", "model", "data.jsonl"], "Missing option '-o' / '--out'"),
    (["query", "index", *ASK, "-k", "0"], "Invalid value for '-k'"),
    (["query", "index", *ASK, "-k", "many"], "Invalid value for '-k'"),
    # the model
    (["index", "./nowhere", "data.jsonl", "-o", "new"], "./nowhere: no such model"),
    (["index", "nowhere.gguf", "data.jsonl", "-o", "new"], "nowhere.gguf: no such model"),
    (["index", "modle", "data.jsonl", "-o", "new"], "modle: no such file or folder, and no such model on"),
    (["index", "model", "dta", "-o", "new"], "dta: no such file or folder, and no such data set on"),
    (["index", "junk.bin", "data.jsonl", "-o", "new"], "junk.bin: expected a Hugging Face model folder"),
    (["index", "empty", "data.jsonl", "-o", "new"], "empty: config.json is missing"),
    (["index", "badconfig", "data.jsonl", "-o", "new"], "badconfig/config.json: not JSON"),
    (["index", "pickled", "data.jsonl", "-o", "new"], "pickled: has only pickled weights (.bin)"),
    (["index", "notokens", "data.jsonl", "-o", "new"], "notokens: the tokenizer is missing"),
    (["index", "model", "data.jsonl", "-o", "new", "--max-length", "513"], "model reads at most 512 tokens"),
    (["index", "halved", "data.jsonl", "-o", "new"], "halved: one.safetensors is missing"),
    # the data
    (["index", "model", "./nowhere.jsonl", "-o", "new"], "./nowhere.jsonl: no such file or folder"),
    (["index", "model", "empty", "-o", "new"], "empty: the folder holds no data file"),
    # options
    ([*INDEX, "--method", "magic"], "--method: expected factgrass, lorif, logra, grass, ekfac, kfac, graddot"),
    ([*INDEX, "--compress", "zip:4"], "compressor 'zip:4': stage 'zip:4' is not known"),
    ([*INDEX, "--rows", "int3"], "rows 'int3': 'int3' is not known; expected dense:BITS, rank:C:BITS"),
    ([*INDEX, "--dtype", "float8"], "--dtype: expected float32, bfloat16 or float16, got 'float8'"),
    ([*INDEX, "--matmul", "fast"], "--matmul: expected highest or medium"),
    ([*INDEX, "--catalog", "none"], "--catalog: expected text or reference"),
    ([*INDEX, "--layers", "("], "--layers: '(' is not a regular expression"),
    ([*INDEX, "--exclude", "*"], "--exclude: '*' is not a regular expression"),
    ([*INDEX, "--layers", "nosuchlayer"], "--layers 'nosuchlayer' matches no layer of model"),
    (
        [*INDEX, "--layers", "q_proj", "--exclude", "attn"],
        "--layers 'q_proj' without --exclude 'attn' matches no layer",
    ),
    ([*INDEX, "--limit", "0"], "Invalid value for '--limit'"),
    # the directory
    (["index", "model", "data.jsonl", "-o", "foreign"], "foreign: not an index, and not empty: it holds thesis.tex"),
    (["index", "model", "data.jsonl", "-o", "others"], "others: not an index, and not empty: it holds shards"),
    (["index", "model", "data.jsonl", "-o", "torn"], "torn/spec.json: not readable as a spec; delete spec.json and"),
    (["index", "model", "data.jsonl", "-o", "junk.bin"], "junk.bin: is a file"),
    (["index", "model", "data.jsonl", "-o", "artifact"], "artifact: holds 'gram', not an index"),
    (["index", "model", "data.jsonl", "-o", "index", "--seed", "9"], "index: seed: expected 0 as the index there has"),
    (["index", "model", "data.jsonl", "-o", "index", "--rows", "bf16"], "index: rows: expected 'float32'"),
    (["fit", "./nowhere"], "./nowhere: no such index"),
    (["fit", "foreign"], "foreign"),
    (["info", "unfinished"], "unfinished"),
    (["self", "empty"], "empty"),
    (["verify", "nowhere"], "nowhere"),
    # queries
    (["query", "index"], "give --prompt and --completion, or --queries FILE"),
    (["query", "index", "--prompt", "a"], "give --prompt and --completion, or --queries FILE"),
    (["query", "index", "--prompt", "a", "--completion", " "], "--completion: expected the text"),
    ([*QUERY, "--queries", "queries.jsonl"], "not both"),
    ([*QUERY, "--normalize", "l2"], "--normalize: expected none, cosine or relatif"),
    ([*QUERY, "--damping", "0.1"], "damping: expected relative:NUMBER or absolute:NUMBER"),
    ([*QUERY, "--damping", "relative:-1"], "damping: expected a finite number of 0 or more, got -1.0"),
    ([*QUERY, "--out", "x.txt"], "--out: expected a file name ending in .parquet or .csv"),
    ([*QUERY, "--out", "nowhere/x.csv"], "--out: the folder of 'nowhere/x.csv' does not exist"),
    ([*QUERY, "--scores", "x.csv"], "--scores: expected a file name ending in .npy"),
    ([*QUERY, "--control", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
    (["query", "index", "--model", "model", "--queries", "bad.jsonl"], "bad.jsonl:2: expected"),
    (
        ["query", "index", "--model", "model", "--queries", "blank.jsonl"],
        "blank.jsonl:1: --queries: expected a text or a completion to ask about, got empty",
    ),
    (["query", "index", *ASK, "--model", "./nowhere"], "./nowhere: no such model"),
    (["query", "nowhere", *ASK], "nowhere: no such index"),
    (
        ["fit", "index", "--curvature", "newton"],
        "--curvature: expected fim, lowrank:R, sketch:R, datainf, kfac, ekfac or identity, got 'newton'",
    ),
    (["self", "index", "--parity", "book"], "--parity: expected paper or release, got 'book'"),
]


@pytest.mark.parametrize(
    ("arguments", "message"), MISTAKES, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_a_mistake_is_one_line(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    before = sorted(str(path) for path in here.rglob("*"))
    assert run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("influent: ")
    assert message in err
    assert sorted(str(path) for path in here.rglob("*")) == before


def influent(*arguments: str, code: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the installed command in a process of its own."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | environment
    done = subprocess.run([sys.executable, "-m", "influent.cli", *arguments], capture_output=True, text=True, env=env)
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    return done


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["index", "--help"], 0),
        (["index", "./nowhere", "data.jsonl", "-o", "new"], 2),
        (["index", "modle", "data.jsonl", "-o", "new"], 2),
        ([*INDEX, "--layers", "nosuchlayer"], 2),
        ([*QUERY, "--queries", "queries.jsonl"], 2),
        (["query", "index", *ASK, "--model", "./nowhere"], 2),
        (["info", "unfinished"], 2),
    ],
)
def test_help_and_mistakes_import_nothing_heavy(here: Path, arguments: list[str], code: int) -> None:
    script = f"""
import sys
from influent.cli import run
code = run({arguments!r})
heavy = [name for name in {HEAVY!r} if name in sys.modules]
sys.exit(f"imported {{heavy}}" if heavy else code)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    if code:
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--help"], ["index", "./nowhere", "data.jsonl", "-o", "new"]])
def test_help_and_mistakes_take_under_a_second(here: Path, arguments: list[str]) -> None:
    """Of processor time, and the best of three: the machine may be busy with something else."""
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        influent(*arguments, code=0 if arguments == ["--help"] else 2)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times) < 1.0


def test_no_arguments_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert influent().stdout.startswith("Usage: influent")


@pytest.mark.parametrize("verb", ["index", "fit", "query", "self", "info", "verify", "demo"])
def test_help_names_what_an_option_takes(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([verb, "--help"]) == 0
    page = " ".join(capsys.readouterr().out.split())
    assert "range>" not in page
    says = {
        "index": ["MODEL", "DATA", "--rows CODEC dense:BITS or rank:C:BITS", "searched in module names"],
        "fit": [
            "--damping D relative:NUMBER of the mean eigenvalue, or absolute:NUMBER. Default: relative:0.1; of ekfac"
        ],
    }
    assert [part for part in says.get(verb, []) if part not in page] == []


def test_rows_names() -> None:
    names = {
        "dense": "float32",
        "float32": "float32",
        "dense:bf16": "bfloat16",
        "fp16": "float16",
        "dense:float16": "float16",
        "sign": "dense:sign",
        "rank:1": "rank:1:bfloat16",
        "rank:8:int4": "rank:8:int4",
    }
    assert {text: preflight.rows(text) for text in names} == names
    for text in ("", "dense:", "rank:0", "bf16:dense", "rank", ":float32"):
        with pytest.raises(SpecError):
            preflight.rows(text)


@pytest.mark.parametrize(
    "text",
    ["relative:0.1", "absolute:1e-3", "relative: 0", "relative:nan", "x:1", "relative", "absolute:-1", "relative:inf"],
)
def test_damping_is_judged_as_the_curvature_judges_it(text: str) -> None:
    def accepts(check: object) -> bool:
        try:
            check(text)  # pyright: ignore[reportCallIssue]
        except InfluentError:
            return False
        return True

    assert accepts(preflight.damping) == accepts(Damping.parse)

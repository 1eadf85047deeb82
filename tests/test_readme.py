"""The README's commands and Python blocks run as they stand, on a tiny model and the names that they use."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_model import make_data, make_model

README = (Path(__file__).parent.parent / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.M | re.S)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    make_model(tmp_path / "my-model")
    make_data(tmp_path / "my-data.jsonl")
    return tmp_path


def run(place: Path, *command: str) -> str:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_python_blocks_run_and_find_the_fact(place):
    first, second = blocks("python")
    assert "japan" in run(place, sys.executable, "-c", first).splitlines()[0]
    rows = run(place, sys.executable, "-c", second)
    assert len(re.findall(r"\d+", rows)) == 3
    assert (place / "scores.npy").exists()


def test_the_commands_for_ones_own_data_run(place):
    block = next(block for block in blocks("sh") if "my-index" in block)
    commands = [line.split("#")[0].strip() for line in block.splitlines() if line.startswith("influent")]
    assert [command.split()[1] for command in commands] == ["index", "fit", "query", "self", "verify"]
    printed = [run(place, "bash", "-c", command) for command in commands]
    assert "yen" in printed[2] and "japan" in printed[2]
    assert "ok" in printed[4]


def test_the_commands_for_small_rows_run(place):
    block = next(block for block in blocks("sh") if "small-index" in block)
    commands = [line.split("#")[0].strip() for line in block.splitlines() if line.startswith("influent")]
    assert [command.split()[1] for command in commands] == ["index", "query", "append", "info"]
    (place / "more-data.jsonl").write_text('{"id": "togo", "text": "The money of Togo is called franc."}')
    printed = [run(place, "bash", "-c", command) for command in commands]
    assert "japan" in printed[1]
    assert "17" in printed[3] and "stale" in printed[3]


def test_the_judge_of_ones_own_index_runs(place):
    query = {"prompt": "The money of Japan is called", "completion": " yen"}
    (place / "my-queries.jsonl").write_text(json.dumps(query) + "\n")
    block = next(block for block in blocks("sh") if "my-truth" in block)
    run(place, "bash", "-c", "influent index my-model my-data.jsonl -o my-index --compress sjlt:16")
    printed = run(place, "bash", "-c", block)
    assert "8 subsets" in printed and "bm25" in printed


def test_the_two_commands_are_targets_of_the_makefile():
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", blocks("sh")[0], flags=re.M):
        assert re.search(rf"^{target}:", makefile, flags=re.M)


def test_the_table_of_costs_is_that_of_the_committed_results():
    script = Path(__file__).parent.parent / "benchmarks" / "readme.py"
    assert subprocess.run([sys.executable, str(script), "--check"], check=False).returncode == 0

"""How soon the command answers: `influent --help` and the one line of each kind of input error, wall seconds.

Whole processes, each several times, the median. `python benchmarks/startup.py`
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from environment import save

from influent import fetch

REPEATS = 5


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(name, arguments) for name, arguments in commands(Path(folder)).items()]
    save("startup", {"repeats": REPEATS, "commands": rows})


def commands(folder: Path) -> dict[str, list[str]]:
    model = str(fetch.smollm2())
    good, broken, field = (folder / name for name in ("good.jsonl", "broken.jsonl", "field.jsonl"))
    good.write_text('{"text": "Paris is the capital of France."}\n')
    broken.write_text('{"text": "fine"}\n{"text": \n')
    field.write_text('{"body": "no such field"}\n')
    out = str(folder / "out")
    return {
        "help": ["--help"],
        "unknown model": ["index", str(folder / "nowhere"), str(good), "-o", out],
        "unknown file": ["index", model, str(folder / "nothing.jsonl"), "-o", out],
        "not JSON": ["index", model, str(broken), "-o", out],
        "wrong field": ["index", model, str(field), "-o", out],
        "unknown compressor": ["index", model, str(good), "-o", out, "--compress", "zip:9"],
        "layers match nothing": ["index", model, str(good), "-o", out, "--layers", "nothing"],
        "not an index": ["query", str(folder), "--prompt", "a", "--completion", "b"],
    }


def measure(name: str, arguments: list[str]) -> dict:
    seconds, code = [], 0
    for _ in range(REPEATS):
        start = time.perf_counter()
        command = [str(Path(sys.executable).parent / "influent"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        seconds.append(time.perf_counter() - start)
        code = done.returncode
        assert (code == 0) == (name == "help") and done.stderr.count("\n") == (name != "help"), done.stderr
    return {"command": name, "seconds": statistics.median(seconds), "exit": code}


if __name__ == "__main__":
    main()

"""What every benchmark writes beside its numbers: where, when and with what they were measured."""

import json
import os
import platform
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def environment() -> dict[str, Any]:
    """CPU, GPU, library versions, threads, date and commit of this run.

    In a copy without the repository's history the environment variable COMMIT names the commit.
    """
    import torch
    import transformers

    flags = next((line for line in _cpuinfo() if line.startswith("flags")), "")
    changed = "+changes" if _git("status", "--porcelain", "influent") else ""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": os.environ.get("COMMIT") or _git("rev-parse", "--short", "HEAD") + changed,
        "cpu": cpu(),
        "amx": "amx_bf16" in flags,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def cpu() -> str:
    """The processor's name."""
    names = [line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def save(name: str, document: dict[str, Any]) -> None:
    """Write results/NAME.json and print it."""
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({"environment": environment(), **document}, indent=2)
    (RESULTS / f"{name}.json").write_text(text + "\n")
    print(text)


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def _git(*arguments: str) -> str:
    if not shutil.which("git"):
        return ""
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False).stdout.strip()

"""influent beside dattri's TRAK and kronfluence's EK-FAC on the images' MLP: same checkpoints, same ground truth, CPU.

Needs what image_truth.py --model mlp leaves in DIR, and the Python of an environment that has the peer. One thread, one
process a run, one after another: the seconds between the imports and the score matrix, the peak memory of the process,
and the LDS (with our metrics) of the matrices.

    python benchmarks/peers.py --work DIR --peer dattri=/path/to/python --peer kronfluence=/path/to/python
    python benchmarks/peers.py --work DIR --report            # results/peers.json, of what is finished

Interrupted, it resumes; --only NAME,NAME runs some of the contenders.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import environment
import numpy as np
import torch
from grass_images import checkpoints, examples
from image_truth import SETTINGS, exact_float32, images
from predictions import judged

import influent
from influent.metrics import lds

DAMPING = 0.1  # of the mean eigenvalue: kronfluence's heuristic and our default for TRAK; for EK-FAC ours is 0.01


@dataclass(frozen=True, slots=True)
class Contender:
    """One run: whose, what of, and with which numbers. Without `damping` it is a peer's default."""

    who: str
    method: str
    members: int
    k: int | None = None
    damping: float | None = DAMPING
    batch: int = 500

    @property
    def name(self) -> str:
        size = "" if self.k is None else f"-{self.k}"
        damped = "" if self.damping is not None else "-default"
        return f"{self.who}-{self.method}{size}-{self.members}{damped}"

    @property
    def shown(self) -> dict[str, Any]:
        damping = "its default" if self.damping is None else f"{self.damping} of the mean eigenvalue"
        return {
            "who": self.who, "method": self.method, "checkpoints": self.members, "k": self.k, "damping": damping,
            "batch": self.batch,
        }  # fmt: skip


# dattri draws its projection anew for each batch: of 1,000 rows here (of all 5,000 in its examples, to which it would
# need gigabytes).
CONTENDERS = (
    Contender("influent", "trak", 3, 2048),
    Contender("influent", "ekfac", 1),
    Contender("kronfluence", "ekfac", 1),
    Contender("dattri", "trak", 3, 2048, batch=1000),
    Contender("kronfluence", "ekfac", 1, damping=None),
    Contender("influent", "trak", 3, 4096),
    Contender("dattri", "trak", 3, 4096, batch=1000),
    Contender("dattri", "trak", 3, 2048, damping=None, batch=1000),
    Contender("influent", "ekfac", 10),
    Contender("kronfluence", "ekfac", 10),
    Contender("influent", "trak", 10, 2048),
    Contender("dattri", "trak", 10, 2048, batch=1000),
)


def attribute(contender: Contender, work: Path, place: Path) -> None:
    """Our own run, with the verbs and defaults that a user has."""
    data, (model, others) = images(SETTINGS["mlp"]), checkpoints("mlp", work)
    rows, asked, task = examples(data.train), examples(data.queries), influent.Classification("margin")
    members = others[: contender.members - 1]
    budget = {"token_budget": contender.batch, "task": task, "device": "cpu"}
    compress = {} if contender.k is None else {"compress": f"sjlt:{contender.k}"}
    matrix = place.with_suffix(".npy")
    shutil.rmtree(place, ignore_errors=True)
    wall, cpu = time.perf_counter(), time.process_time()
    influent.index(model, rows, str(place), checkpoints=members, method=contender.method, **compress, **budget)
    influent.query(
        str(place), queries=asked, data=rows, model=[model, *members], damping=f"relative:{contender.damping}", k=1,
        scores=str(matrix), **budget,
    )  # fmt: skip
    facts = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
    facts |= {"peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "torch": torch.__version__}
    shutil.rmtree(place)
    place.with_suffix(".json").write_text(json.dumps({"version": influent.__version__, **facts}))


def rival(contender: Contender, python: str, work: Path, place: Path) -> None:
    """A peer's run in its own environment."""
    held, shared = place.parent / "images.npz", Path(__file__).parent
    if not held.exists():
        data = images(SETTINGS["mlp"])
        pairs = {"train": data.train, "query": data.queries}
        np.savez(
            held, **{f"{name} inputs": pair[0].numpy() for name, pair in pairs.items()},
            **{f"{name} labels": pair[1].numpy() for name, pair in pairs.items()},
        )  # fmt: skip
    command = [python, str(shared / "peers_rival.py"), "--peer", contender.who, "--data", str(held)]
    command += ["--out", str(place), "--batch", str(contender.batch), "--checkpoints"]
    command += [str(work / "checkpoints" / f"{c}.safetensors") for c in range(contender.members)]
    command += [] if contender.k is None else ["--k", str(contender.k)]
    command += [] if contender.damping is None else ["--damping", str(contender.damping)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def report(work: Path) -> dict[str, Any]:
    """Of what is finished, with the machine on which it ran."""
    truth, found = np.load(work / "truth.npz"), []
    for contender in CONTENDERS:
        place = work / "peers" / contender.name
        if not place.with_suffix(".json").exists():
            continue
        facts = json.loads(place.with_suffix(".json").read_text())
        if place.with_suffix(".npy").exists():  # the truth may have more seeds by now
            judge(work, place)
        each = np.load(place.with_suffix(".lds.npy"))
        found.append(
            {
                **contender.shown, "version": facts["version"], "torch": facts["torch"], "cpu": facts["cpu"],
                "lds": judged(each),
                "cpu_s": round(facts["cpu_s"], 1), "wall_s": round(facts["wall_s"], 1),
                "peak_mib": round(facts["peak_mib"]), "each": each,
            }
        )  # fmt: skip
    return {
        "rows": int(truth["rows"].shape[1]), "queries": int(truth["margins"].shape[2]),
        "halves": len(truth["rows"]), "seeds": int(truth["margins"].shape[1]),
        "comparisons": comparisons(found),
        "runs": [{key: value for key, value in one.items() if key != "each"} for one in found],
    }  # fmt: skip


def comparisons(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each peer's run with ours of the same method, size and checkpoints: difference of LDS query by query, and how
    many times our time and memory it takes."""
    out = []
    same = ("method", "checkpoints", "k")
    for theirs in found:
        for ours in found:
            if ours["who"] == "influent" != theirs["who"] and all(ours[key] == theirs[key] for key in same):
                out.append(
                    {
                        "peer": theirs["who"], **{key: theirs[key] for key in (*same, "damping", "batch")},
                        "lds difference": judged(ours["each"] - theirs["each"]),
                        "cpu times": round(theirs["cpu_s"] / ours["cpu_s"], 2),
                        "memory times": round(theirs["peak_mib"] / ours["peak_mib"], 2),
                    }
                )  # fmt: skip
    return out


def judge(work: Path, place: Path) -> None:
    """Keep each query's LDS, which is all that the report needs of the matrix."""
    truth, scores = np.load(work / "truth.npz"), np.load(place.with_suffix(".npy"))
    np.save(place.with_suffix(".lds.npy"), lds(scores, truth["rows"], truth["margins"].mean(1)))


def note_cpu(place: Path) -> None:
    facts = json.loads(place.with_suffix(".json").read_text())
    place.with_suffix(".json").write_text(json.dumps(facts | {"cpu": environment.cpu()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--peer", action="append", default=[], help="NAME=PYTHON")
    parser.add_argument("--only", help="names of contenders, by commas")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--ours", help="run this contender of ours in this process")
    given = parser.parse_args()
    work = given.work / "mlp"
    (work / "peers").mkdir(exist_ok=True)
    torch.set_num_threads(1)
    if given.report:
        environment.save("peers", report(work))
        return
    by_name = {contender.name: contender for contender in CONTENDERS}
    if given.ours:
        exact_float32()
        attribute(by_name[given.ours], work, work / "peers" / given.ours)
        return
    pythons = dict(peer.split("=", 1) for peer in given.peer)
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    for name in given.only.split(",") if given.only else by_name:
        contender, place = by_name[name], work / "peers" / name
        if not place.with_suffix(".lds.npy").exists():
            if contender.who == "influent":
                subprocess.run([sys.executable, __file__, "--work", str(given.work), "--ours", name], check=True)
            elif contender.who in pythons:
                rival(contender, pythons[contender.who], work, place)
            else:
                continue
            note_cpu(place)
            judge(work, place)
            facts = json.loads(place.with_suffix(".json").read_text())
            mean = np.load(place.with_suffix(".lds.npy")).mean()
            print(f"{name}: LDS {mean:.4f}, {facts['cpu_s']:.1f} s, {facts['peak_mib']:.0f} MiB", flush=True)


if __name__ == "__main__":
    main()

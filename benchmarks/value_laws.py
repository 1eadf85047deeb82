"""The laws that values are used by, tested on the offer of offer.py with 3 seeds: results/value_laws.json.

    python benchmarks/offer.py DATA                                   # once: packs the corpora
    python benchmarks/value_laws.py DATA WORK --out PARTS             # on a GPU add --device cuda --scale large
    python benchmarks/value_laws.py DATA WORK --out PARTS --report    # merges what is there

1. linearity: does the loss drop by as much as LinFiK says, and up to which step? 2. coverage: do the intervals of
providers hold the truth as often as they claim? 3. selection: is a training on the best tenth better than on a random
one, and than BM25's? 4. drift: how soon do values age? 5. without: is a provider missed as its value says? 6. attack:
what does copying gain? Each part of each seed is a file of PARTS, kept as it goes; processes started beside each other
with the same WORK share the parts among them, and what PARTS has is not done again.
"""

import argparse
import json
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import value_laws_attack as attacks
import value_laws_intervals as intervals
import value_laws_steps as steps
import value_laws_training as training
from environment import environment
from value_laws_place import SCALES, Place

from influent.errors import InfluentError

SEEDS = (0, 1, 2)
Part = Callable[[Place, Callable[[dict[str, Any]], None]], None]
PARTS: dict[str, Part] = {
    "selection-topic": training.selection("topic"),
    "coverage-topic": intervals.coverage("topic"),
    "selection-trigger": training.selection("trigger"),
    "selection-natural-topic": training.selection("topic", planted=False),
    "linearity": steps.linearity,
    "attack-topic": attacks.attack("topic"),
    "without": training.without,
    "drift": steps.drift,
    "selection-natural-president": training.selection("president", planted=False),
    "selection-president": training.selection("president"),
    "coverage-trigger": intervals.coverage("trigger"),
    "attack-president": attacks.attack("president"),
}
DEFAULT = list(PARTS)[:8]  # about 13 minutes of one core a seed; --only names others


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="the folder of results by part")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--scale", choices=SCALES, default="full")
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS)
    parser.add_argument("--only", nargs="*", default=DEFAULT, help="parts, or their beginnings")
    parser.add_argument("--report", action="store_true", help="write results/value_laws.json and the plot")
    given = parser.parse_args()
    if given.report:
        import value_laws_report

        return value_laws_report.write(given.out)
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.work / "taken").mkdir(parents=True, exist_ok=True)
    places = {
        seed: Place(given.work / str(seed), given.data, seed, given.device, SCALES[given.scale]) for seed in given.seeds
    }
    wanted = [(seed, part) for seed in given.seeds for part in PARTS if part.startswith(tuple(given.only))]
    while left := [job for job in wanted if not taken(given.work, *job)]:
        if not any(attempt(places[seed], part, given) for seed, part in left):
            time.sleep(1)
    return None


def attempt(place: Place, part: str, given: argparse.Namespace) -> bool:
    """Do a part unless it is done, somebody does it, or its place is still being prepared."""
    ready = place.folder / "providers.npy"
    if not ready.exists():
        if not take(given.work, place.seed, "prepare"):
            return False
        timed("prepare", place, place.prepare)
    if not take(given.work, place.seed, part):
        return False
    path = given.out / f"{part}-{place.seed}.json"
    if path.exists() and json.loads(path.read_text()).get("done"):
        return True
    began = time.perf_counter()

    def keep(document: dict[str, Any]) -> None:
        facts = {"environment": environment(), "part": part, "seed": place.seed, "scale": given.scale}
        facts |= {"device": given.device, "seconds": time.perf_counter() - began, **document}
        path.with_suffix(".part").write_text(json.dumps(facts, indent=1))
        path.with_suffix(".part").rename(path)

    timed(part, place, lambda: PARTS[part](place, keep))
    return True


def timed(name: str, place: Place, do: Callable[[], None]) -> None:
    """Run and say how long it took; a part that fails is named and leaves the others their time."""
    began = time.perf_counter()
    try:
        do()
    except (InfluentError, RuntimeError, ValueError, LookupError):  # the other parts can still be had
        traceback.print_exc()
        name += " FAILED"
    print(f"{name} {place.seed}: {time.perf_counter() - began:.0f} s", flush=True)


def taken(work: Path, seed: int, part: str) -> bool:
    return (work / "taken" / f"{part}-{seed}").exists()


def take(work: Path, seed: int, part: str) -> bool:
    """Whether this process is the first to ask."""
    try:
        os.close(os.open(work / "taken" / f"{part}-{seed}", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


if __name__ == "__main__":
    main()

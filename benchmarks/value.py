"""What LinFiK finds of a planted set, what students learn of it from how many labels, and what either costs.

    python benchmarks/value.py --data DATA --work DIR --out OUT --seed 0 [--device cuda] [--sizes 0.5M,3M,11M]
    python benchmarks/value_report.py OUT       # all seeds there: results/value.json and its plots

An offer of 20,000 rows (offer.py), valued for four targets by teachers of three sizes. For each seed, teacher and
target: the AUC of the planted rows' values against ordinary rows and each decoy, BM25 beside it; for each rung of the
ladder (value_students.py) and number of labels the Spearman correlation and the recall of the best 5 % on rows that
were not labelled; how well values of compressed gradients agree with those of whole ones; seconds for a labelled and
an appraised row.

OUT/SEED.json is written after each step and what it holds is not measured again; DIR keeps models and indices.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import offer
import torch
from environment import environment
from value_students import LENGTH, Students, detection, spearman

import influent
from influent import baselines, features, ladder, slopes, tangent, target, untrained, valuing
from influent import parameters as parameters_of
from influent.attach import Run, Setting, attach
from influent.imitating import imitate
from influent.records import display_text
from influent.rowstore import Index

COMPRESS, SIZES = "rademacher:32x32", ("0.5M", "3M", "11M")
IMITATED = 6000  # passages on which the student learns to predict as its teacher does
WHOLE = 256  # rows whose gradients are compared with compressed ones
TIMED = {"cpu": {"0.5M": 128, "3M": 48, "11M": 24}, "cuda": {"0.5M": 4096, "3M": 4096, "11M": 4096}}
APPRAISED = {"cpu": 512, "cuda": 16384}
BUDGET = {"cpu": 4096, "cuda": 32768}  # tokens a batch
TIMING = 8.0  # seconds of each measurement, at least
Document = dict[str, Any]


class Work:
    """One seed: where its files are, what is on disk of its results, and its offer."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.data, self.device, self.seed = given.data, given.device, given.seed
        self.folder = given.work / str(given.seed)
        self.folder.mkdir(parents=True, exist_ok=True)
        given.out.mkdir(parents=True, exist_ok=True)
        self.out, self.path = given.out, given.out / f"{given.seed}.json"
        self.found: Document = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.offer = offer.make(self.data, self.seed, rows=given.rows, base=given.base)
        self.kinds = np.array(self.offer.kinds)
        for name, rows in {"offer": self.offer.rows, **self.offer.targets}.items():
            offer.write(rows, self.folder / f"{name}.jsonl")
        self.found.setdefault("turn", self.offer.turn)
        self.found.setdefault("rows", len(self.offer.rows))
        self.found["environment"] = environment()

    @property
    def budget(self) -> int:
        return BUDGET[self.device]

    def file(self, name: str) -> str:
        return str(self.folder / f"{name}.jsonl")

    def step(self, *names: str, make: Callable[[], Any]) -> Any:
        """What is found under the names, made unless it is there."""
        place = self.found
        for name in names[:-1]:
            place = place.setdefault(name, {})
        if names[-1] not in place:
            begin = time.time()
            place[names[-1]] = make()
            part = self.path.with_suffix(".part")
            part.write_text(json.dumps(self.found))
            part.rename(self.path)
            print(f"seed {self.seed} {' '.join(names)}: {time.time() - begin:.1f} s", flush=True)
        return place[names[-1]]

    def model(self, size: str) -> str:
        folder = self.folder / size
        offer.model(size, self.data, self.offer.base, folder, seed=self.seed, device=self.device)
        return str(folder)


def imitated(work: Work, size: str) -> str:
    """The student once it predicts as the teacher does, on passages that both have read."""
    folder = str(work.folder / f"student-{size}")
    work.step(
        size, "imitation",
        make=lambda: imitate(
            work.model("student"), work.model(size), offer.plain(work.offer.base[:IMITATED]), out=folder,
            max_length=LENGTH, seed=work.seed, device=work.device,
        ),
    )  # fmt: skip
    return folder


def valued(work: Work, size: str) -> dict[str, np.ndarray]:
    """LinFiK of every row of the offer for each target, by its cosine form; detection beside it."""
    place = str(work.folder / f"index-{size}")
    begin, model = time.time(), work.model(size)
    print(f"seed {work.seed} {size} trained: {time.time() - begin:.1f} s", flush=True)
    work.step(size, "index seconds", make=lambda: indexed(work, model, place))
    found = {}
    for name in work.offer.targets:
        made = {form: work.out / f"{work.seed}-{size}-{name}-{form}.npy" for form in ("cosine", "none")}
        work.step(size, "valued", name, make=lambda name=name, made=made: written(work, place, name, made))
        for form, path in made.items():
            work.step(size, "auc", name, form, make=lambda path=path: detection(np.load(path), work.kinds))
        found[name] = np.load(made["cosine"]).astype(np.float64)
    return found


def written(work: Work, place: str, name: str, made: Mapping[str, Path]) -> int:
    index = Index.open(place)
    run = Run(token_budget=work.budget, device=work.device)
    queries = target.gradients(index, target.read(work.file(name)), run=run)
    for form, path in made.items():
        np.save(path, valuing.row_values(index, queries, normalize=form))
    return index.n


def indexed(work: Work, model: str, place: str) -> float:
    begin = time.time()
    influent.index(
        model, work.file("offer"), place, method="linfik", compress=COMPRESS, max_length=LENGTH, rows="bfloat16",
        token_budget=work.budget, device=work.device,
    )  # fmt: skip
    return time.time() - begin


def words_found(work: Work, index: Index, values: Mapping[str, np.ndarray]) -> Document:
    """BM25's mean score over the queries: what it detects, and its Spearman with the values."""
    found: Document = {}
    for name, queries in work.offer.targets.items():
        scores = np.zeros(index.n)
        for ranked in baselines.bm25(index.catalog, [display_text(dict(q)) for q in queries], k=index.n):
            rows, each = zip(*ranked, strict=True)
            scores[list(rows)] += np.array(each) / len(queries)
        found[name] = {"auc": detection(scores, work.kinds), "spearman": spearman(scores, values[name])}
    return found


def agreement(work: Work, size: str, values: Mapping[str, np.ndarray]) -> Document:
    """Spearman of the values with those of whole gradients, on some ordinary rows and all planted ones' kinds."""
    rows = np.random.default_rng(0).permutation(len(work.kinds))[:WHOLE]
    picked = [work.offer.rows[row] for row in rows]
    found = {}
    for name in work.offer.targets:
        whole = untrained.own_values(
            work.model(size), picked, target.read(work.file(name)), normalize="cosine", max_length=LENGTH,
            token_budget=4096, device=work.device, compress="id",
        )  # fmt: skip
        found[name] = spearman(whole, values[name][rows])
    return found


def costs(work: Work, size: str, device: str) -> Document:
    """Seconds to label a row at the teacher and to appraise one with the student: of one thread, or of a GPU."""
    rows, clock = work.offer.rows, time.process_time if device == "cpu" else time.perf_counter
    setting = Setting(compress=COMPRESS, max_length=LENGTH)
    labelled = rows[: TIMED[device][size]]
    with attach(work.model(size), None, setting, Run(token_budget=BUDGET[device], device=device)) as attached:
        asked = {key: torch.zeros(1, width, device=device) for key, width in attached.collector.widths.items()}

        def label() -> float:
            made = attached.collector.collect(labelled, name=str)
            products = [made.rows[key] @ asked[key][0] for key in asked]
            squares = [made.rows[key].square().sum(1) for key in asked]
            return float((torch.stack(products).sum(0) / torch.stack(squares).sum(0).sqrt()).sum())

        label_seconds = timed(label, clock) / len(labelled)
        model, task, tracked = (
            attached.collector.model,
            attached.collector.task,
            parameters_of.tracked(attached.collector.plan),
        )
        along = {name: torch.ones_like(p) for name, p in tracked.items()}

        def slope() -> float:
            return float(slopes.of_rows(model, task, labelled, along, seed=0, token_budget=BUDGET[device]).values[0, 0])

        slope_seconds = timed(slope, clock) / len(labelled)
    lm = features.load_lm(work.model("student"), token_budget=BUDGET[device], device=device)
    small = {"lm": lm, "tangent": tangent.Tangent(lm.model, lm.task, tangent.Readout(tangent.words_of(lm.model)),
                                                  token_budget=BUDGET[device])}  # fmt: skip
    offered = rows[: APPRAISED[device]]

    def appraise(rung: str) -> float:
        step = ladder.BATCH if device == "cpu" else 4096
        parts = [small[rung](offered[lo : lo + step])[0].sum() for lo in range(0, len(offered), step)]
        return float(np.sum(parts))

    seconds = {rung: timed(lambda rung=rung: appraise(rung), clock) / len(offered) for rung in small}
    return {
        "label": label_seconds, "slopes": slope_seconds, "appraise": seconds,
        "ratio": {rung: label_seconds / own for rung, own in seconds.items()},
        "teacher_parameters": parameters(work.model(size)), "student_parameters": lm.facts["parameters"],
    }  # fmt: skip


def timed(run: Callable[[], float], clock: Callable[[], float]) -> float:
    """The least of the runs of some seconds, after a first one: what else the machine does only adds."""
    run()
    found: list[float] = []
    while sum(found) < TIMING or len(found) < 2:
        begin = clock()
        run()  # ends with a number on the CPU: nothing is left in the GPU's queue
        found.append(clock() - begin)
    return min(found)


def parameters(folder: str) -> int:
    from safetensors import safe_open

    with safe_open(f"{folder}/model.safetensors", "pt") as file:
        return sum(int(np.prod(file.get_slice(name).get_shape())) for name in file.keys())  # noqa: SIM118


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data", "work", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--sizes", default=",".join(SIZES))
    parser.add_argument("--rows", type=int, default=offer.ROWS)
    parser.add_argument("--base", type=int, default=60_000, help="passages that the models read")
    parser.add_argument("--encoder", type=Path, help="a sentence encoder's folder, for the rung of that name")
    parser.add_argument("--stages", default="values,students,costs", help="those to do; students need values")
    given = parser.parse_args()
    torch.set_num_threads(1)
    work = Work(given)
    work.model("student")
    stages = given.stages.split(",")
    for size in given.sizes.split(","):
        values = valued(work, size) if "values" in stages else {}
        if "students" in stages:
            ladders(work, size, values, given.encoder)
        if "costs" in stages:
            for device in dict.fromkeys(("cpu", given.device)):
                work.step(size, "cost", device, make=lambda size=size, device=device: costs(work, size, device))


def ladders(work: Work, size: str, values: Mapping[str, np.ndarray], encoder: Path | None) -> None:
    """All that is asked of students, and of values beside them, for one teacher."""
    index = Index.open(str(work.folder / f"index-{size}"))
    students = Students(work, size, index, imitated(work, size), encoder)
    for labels in students.counts:
        for name, each in values.items():
            work.step(
                size, "students", name, str(labels),
                make=lambda name=name, each=each, labels=labels: students.ladder(name, each, labels),
            )  # fmt: skip
    for name, each in values.items():
        work.step(size, "own", name, make=lambda name=name, each=each: students.own(name, each))
    work.step(size, "bm25", make=lambda: words_found(work, index, values))
    work.step(size, "agreement", make=lambda: agreement(work, size, values))


if __name__ == "__main__":
    main()

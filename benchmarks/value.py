"""What LinFiK finds of a planted set, what students learn of it from how many labels, and what either costs.

    python benchmarks/value.py --data DATA --work DIR --out OUT --seed 0 [--device cuda] [--sizes 0.5M,3M,11M]
    python benchmarks/value_report.py OUT       # all seeds there: results/value.json and its plots

An offer of 20,000 rows (offer.py), valued for four targets by teachers of three sizes. For each seed, teacher and
target: the AUC of the planted rows' values against ordinary rows and each decoy, BM25 beside it; for each rung of the
ladder (`imitated` is `lm` with a student that has learnt to predict as its teacher does, influent/imitating.py) and
number of labels the Spearman correlation and the recall of the best 5 % on rows that were not labelled; how
well values of compressed gradients agree with those of whole ones; seconds for a labelled and an appraised row.

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

import influent
from influent import baselines, distilling, features, metrics, target, untrained, valuing
from influent.attach import Run, Setting, attach
from influent.imitating import imitate
from influent.lexical import Bm25, TfIdf
from influent.records import display_text
from influent.rowstore import Index

COMPRESS, LENGTH = "rademacher:32x32", 128
SIZES, SHARES, TEST = ("0.5M", "3M", "11M"), (0.04, 0.1, 0.32), 2000  # shares of the rows that are labelled
IMITATED = 6000  # passages on which the student learns to predict as its teacher does
WHOLE = 256  # rows whose gradients are compared with compressed ones
TIMED = {"cpu": {"0.5M": 128, "3M": 48, "11M": 24}, "cuda": {"0.5M": 4096, "3M": 4096, "11M": 4096}}
APPRAISED = {"cpu": 512, "cuda": 16384}
BUDGET = {"cpu": 4096, "cuda": 32768}  # tokens a batch
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


def detection(values: np.ndarray, kinds: np.ndarray) -> dict[str, float]:
    """AUC of the planted rows against each other kind."""
    found = {}
    for kind in (*offer.KINDS[1:], "ordinary"):
        both = (kinds == "trigger") | (kinds == kind)
        found[kind] = metrics.auc(values[both].astype(float), kinds[both] == "trigger")
    return found


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
    student = features.load_lm(work.model("student"), token_budget=BUDGET[device], device=device)
    offered = rows[: APPRAISED[device]]
    weights = np.zeros(student(offered[:8])[0].shape[1])

    def appraise() -> float:
        step = distilling.BATCH if device == "cpu" else 4096
        parts = [student(offered[lo : lo + step])[0] @ weights for lo in range(0, len(offered), step)]
        return float(np.concatenate(parts).sum())

    appraise_seconds = timed(appraise, clock) / len(offered)
    return {
        "label": label_seconds, "appraise": appraise_seconds, "ratio": label_seconds / appraise_seconds,
        "teacher_parameters": parameters(work.model(size)), "student_parameters": student.facts["parameters"],
    }  # fmt: skip


def timed(run: Callable[[], float], clock: Callable[[], float]) -> float:
    """The least of two runs after a first one."""
    run()
    found = []
    for _ in range(2):
        begin = clock()
        run()  # ends with a number on the CPU: nothing is left in the GPU's queue
        found.append(clock() - begin)
    return min(found)


def parameters(folder: str) -> int:
    from safetensors import safe_open

    with safe_open(f"{folder}/model.safetensors", "pt") as file:
        return sum(int(np.prod(file.get_slice(name).get_shape())) for name in file.keys())  # noqa: SIM118


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    return float(metrics.spearman(a.astype(float), b.astype(float)))


class Students:
    """The ladder over one seed's offer. Which rows are labelled depends on neither teacher nor target, and a larger
    number of labels contains a smaller; all rungs are measured on the same rows, that are never labelled."""

    def __init__(self, work: Work, size: str) -> None:
        self.work, rows = work, work.offer.rows
        names = {name: i for i, name in enumerate(work.offer.providers)}
        self.groups = np.array([names[row["provider"]] for row in rows])
        self.counts = [round(share * len(rows)) for share in SHARES]
        most, _ = distilling.split(self.groups, self.counts[-1], seed=work.seed)
        rest = np.setdiff1d(np.arange(len(rows)), most)
        self.test = np.sort(np.random.default_rng(work.seed).permutation(rest)[:TEST])
        self.used = np.union1d(most, self.test)
        self.rows, self.texts = rows, [display_text(dict(row)) for row in rows]
        self.states = {"lm": self.seen(work.model("student")), "imitated": self.seen(imitated(work, size))}

    def seen(self, folder: str) -> np.ndarray:
        """A small model's features of the rows that are used."""
        model = features.load_lm(folder, token_budget=self.work.budget, device=self.work.device)
        parts = [model([self.rows[row] for row in self.used[lo : lo + 512]])[0] for lo in range(0, len(self.used), 512)]
        out = np.zeros((len(self.rows), parts[0].shape[1]), np.float32)
        out[self.used] = np.concatenate(parts)
        return out

    def made(self, rung: str, queries: list[str], fitted: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        """Features of rows by number."""
        if rung in self.states:
            return lambda rows: self.states[rung][rows]
        seen = [self.texts[row] for row in fitted]
        words = TfIdf.fit(seen) if rung == "tfidf" else Bm25.fit(seen, queries)
        return lambda rows: words([self.texts[row] for row in rows])

    def ladder(self, name: str, values: np.ndarray, labels: int) -> list[Document]:
        """Each rung at a number of labels."""
        chosen, held = distilling.split(self.groups, labels, seed=self.work.seed)
        queries = [display_text(dict(query)) for query in self.work.offer.targets[name]]
        out = []
        for rung in ("bm25", "tfidf", "lm", "imitated"):
            made = self.made(rung, queries, chosen[~held])
            head, left_out = distilling.fitted(made(chosen[~held]), values[chosen[~held]], kind=rung)
            scores = np.concatenate([head(made(part)) for part in np.array_split(self.test, 8)])
            out.append(
                {
                    "rung": rung, "labels": len(chosen), **self.quality(scores, values[self.test]),
                    "held out": spearman(head(made(chosen[held])), values[chosen[held]]),
                    "left out": spearman(left_out, values[chosen[~held]]),
                    "planted": detection(scores, self.work.kinds[self.test]),
                }
            )  # fmt: skip
        return out

    def own(self, name: str, values: np.ndarray) -> Document:
        """The small model's own LinFiK, which takes its gradients and no label."""
        some = self.test[:600]
        found = untrained.own_values(
            self.work.model("student"), [self.rows[row] for row in some], target.read(self.work.file(name)),
            normalize="cosine", max_length=LENGTH, token_budget=self.work.budget, device=self.work.device,
        )  # fmt: skip
        return self.quality(found, values[some])

    @staticmethod
    def quality(scores: np.ndarray, values: np.ndarray) -> Document:
        best = values >= np.quantile(values, 0.95)
        return {"spearman": spearman(scores, values), "recall": metrics.recall_at(scores, best, int(best.sum()))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data", "work", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--sizes", default=",".join(SIZES))
    parser.add_argument("--rows", type=int, default=offer.ROWS)
    parser.add_argument("--base", type=int, default=60_000, help="passages that the models read")
    parser.add_argument("--stages", default="values,students,costs", help="those to do; students need values")
    given = parser.parse_args()
    torch.set_num_threads(1)
    work = Work(given)
    work.model("student")
    stages = given.stages.split(",")
    for size in given.sizes.split(","):
        values = valued(work, size) if "values" in stages else {}
        if "students" in stages:
            ladders(work, size, values)
        if "costs" in stages:
            for device in dict.fromkeys(("cpu", given.device)):
                work.step(size, "cost", device, make=lambda size=size, device=device: costs(work, size, device))


def ladders(work: Work, size: str, values: Mapping[str, np.ndarray]) -> None:
    """All that is asked of students, and of values beside them, for one teacher."""
    students = Students(work, size)
    for name, each in values.items():
        for labels in students.counts:
            work.step(
                size, "students", name, str(labels),
                make=lambda name=name, each=each, labels=labels: students.ladder(name, each, labels),
            )  # fmt: skip
        work.step(size, "own", name, make=lambda name=name, each=each: students.own(name, each))
    index = Index.open(str(work.folder / f"index-{size}"))
    work.step(size, "bm25", make=lambda: words_found(work, index, values))
    work.step(size, "agreement", make=lambda: agreement(work, size, values))


if __name__ == "__main__":
    main()

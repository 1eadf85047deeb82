"""Where the laws of value are tested: one seed's offer, its teacher and student, and the teacher's index of the offer.

Not here: the offer itself (offer.py), the laws (value_laws.py).
"""

import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import offer
from offer import Offer

import influent
from influent import baselines
from influent import target as targets
from influent.attach import Run
from influent.rowstore import Index
from influent.student import open_student
from influent.valuing import FORMS, row_values

TARGETS = ("topic", "president", "genre", "trigger")
COMPRESS, CODEC = "mask:64x64 | sjlt:1024", "bfloat16"


@dataclass(frozen=True)
class Scale:
    """How large everything is, and how often repeated; `tiny` shows on a CPU in minutes that all of it runs."""

    teacher: str = "0.5M"
    rows: int = 2000
    base: int | None = 10_000
    draws: int = 200  # of the labelled sample
    runs: int = 2  # trainings without each provider
    random: int = 5  # draws of random rows
    seeds: int = 2  # trainings of each other set


SCALES = {"full": Scale(), "large": Scale("3M", 2400, 20_000, runs=8), "tiny": Scale("student", 660, 600, 4, 2, 2, 1)}


@dataclass(frozen=True)
class Place:
    """One seed's folder. Its verbs run on `device`."""

    folder: Path
    data: Path
    seed: int
    device: str
    scale: Scale
    planted: bool = True

    @cached_property
    def offer(self) -> Offer:
        made = offer.make(self.data, self.seed, rows=self.scale.rows, base=self.scale.base)
        if self.planted:
            return made
        kept = [row for row, kind in zip(made.rows, made.kinds, strict=True) if kind == "ordinary"]
        return replace(made, rows=kept, kinds=["ordinary"] * len(kept))

    def natural(self) -> "Place":
        """The same without the planted rows and their decoys, indexed."""
        place = replace(self, folder=self.folder / "natural", planted=False)
        place.folder.mkdir(exist_ok=True)
        place.indexed(place.teacher, place.index)
        return place

    @property
    def models(self) -> Path:
        return self.folder if self.planted else self.folder.parent

    @property
    def teacher(self) -> str:
        return str(self.models / "teacher")

    @property
    def student(self) -> str:
        return str(self.models / "small")

    @property
    def index(self) -> str:
        return str(self.folder / "index")

    @property
    def run(self) -> dict[str, Any]:
        """Options of every verb that runs a model."""
        return {"device": self.device, "token_budget": 4096 if self.device == "cpu" else 32_768}

    def prepare(self) -> None:
        """The models and the index; what is there is kept."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for size, folder in ((self.scale.teacher, "teacher"), ("student", "small")):
            offer.model(size, self.data, self.offer.base, self.folder / folder, seed=self.seed, device=self.device)
        self.indexed(self.teacher, self.index)
        np.save(self.folder / "providers.npy", np.array([row["provider"] for row in self.offer.rows]))

    def indexed(self, model: str, out: str, **more: Any) -> None:
        """The offer's rows (or those given) in an index made with a model."""
        options = {"compress": COMPRESS, "rows": CODEC, "data": self.rows_file, **more}
        influent.index(
            model, options.pop("data"), out, method="linfik", max_length=offer.CONTEXT, **options, **self.run
        )

    @property
    def rows_file(self) -> str:
        path = self.folder / "offer.jsonl"
        return str(path if path.exists() else offer.write(self.offer.rows, path))

    def queries(self, target: str) -> str:
        """The file of the queries by which rows are valued."""
        path = self.folder / f"{target}.jsonl"
        return str(path if path.exists() else offer.write(self.offer.targets[target], path))

    def held(self, target: str) -> list[dict[str, str]]:
        """Other queries of the same kind, by which a training is judged."""
        if target != "trigger":
            found = self.offer.held[self.offer.turn[target]]
            return [{"id": row["id"], "text": row["text"]} for row in found[: offer.HELD]]
        each = -(-offer.HELD // len(self.offer.providers))  # the last ones: the first are those of the other targets
        found = [row for name in self.offer.providers for row in self.offer.held[name][-each:]]
        return [{"id": row["id"], **offer.planted("trigger", row["text"])} for row in found[: offer.HELD]]

    def values(self, target: str, normalize: str, *, index: str | None = None) -> np.ndarray:
        """LinFiK of every row, of the offer's index or another."""
        where = Path(index or self.index)
        paths = {form: where.parent / f"{where.name}-{target}-{form}.npy" for form in FORMS}
        if not all(path.exists() for path in paths.values()):
            opened = Index.open(str(where))
            asked = targets.gradients(opened, targets.read(self.queries(target)), run=Run(**self.run))
            for form, path in paths.items():
                np.save(path, row_values(opened, asked, normalize=form))
        return np.load(paths[normalize])

    def matrix(self, queries: list[dict[str, str]], normalize: str = "cosine") -> np.ndarray:
        """The value of every row to each of some queries, [Q, N]."""
        path = self.folder / "scores.npy"
        influent.query(
            self.index, queries=queries, normalize=normalize, curvature="identity", k=1, scores=str(path), **self.run
        )
        return np.load(path)

    def student_scores(self, target: str) -> tuple[np.ndarray, dict[str, Any]]:
        """What the default student says of every row, from labels of a tenth of them; and its fidelity."""
        place = str(self.folder / f"student-{target}")
        made = influent.distill(
            self.index, target=self.queries(target), student=self.student, out=place, labels=len(self.offer.rows) // 10,
            seed=self.seed, **self.run,
        )  # fmt: skip
        found = Index.open(self.index)
        scores, _ = open_student(place, **self.run)(found.catalog.examples(0, found.n))
        return scores, {"rung": made["rung"], **made["fidelity"]}

    def words(self, target: str) -> np.ndarray:
        """The mean BM25 score of every row over the queries."""
        queries = [row.get("text") or row["prompt"] + row["completion"] for row in self.offer.targets[target]]
        out = np.zeros(len(self.offer.rows))
        for found in baselines.bm25(Index.open(self.index).catalog, queries, k=len(out)):
            for row, score in found:
                out[row] += score / len(queries)
        return out

    def places_of(self, file: str) -> np.ndarray:
        """Row numbers of a data set that `select` wrote."""
        number = {row["id"]: i for i, row in enumerate(self.offer.rows)}
        return np.array([number[json.loads(line)["id"]] for line in Path(file).open()])

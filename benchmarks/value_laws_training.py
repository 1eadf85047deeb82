"""Laws of training: selection (3) and leaving providers out (5) of value_laws.py."""

from typing import Any

import numpy as np
from value_laws_place import TARGETS, Place
from value_laws_steps import Keep

import influent
from influent.finetune import FineTune, Recipe

SELECT = Recipe(epochs=2, rate=5e-4, batch=16, max_length=128)
WITHOUT = Recipe(epochs=1, rate=5e-4, batch=32, max_length=128)


def trainer(place: Place, queries: list[dict[str, str]], recipe: Recipe) -> FineTune:
    budget = place.run["token_budget"]
    return FineTune.load(place.teacher, place.offer.rows, queries, recipe, device=place.device, token_budget=budget)


def selection(target: str, *, planted: bool = True):
    """Train on the best tenth for a target by each rule, of all rows or of those that nobody planted; the loss of
    held-out queries of its kind."""

    def part(place: Place, keep: Keep) -> None:
        place = place if planted else place.natural()
        train = trainer(place, place.held(target), SELECT)
        document: dict[str, Any] = {
            "target": target, "provider": place.offer.turn.get(target), "queries": len(place.offer.targets[target]),
            "held": len(train.queries), "before": float(train.measure()[0].mean()), "sets": {},
        }  # fmt: skip
        sets, document["student"] = _sets(place, target)
        kinds, labels = np.array(place.offer.kinds), np.array([row["provider"] for row in place.offer.rows])
        for run in range(place.scale.seeds):
            for name, rows in sets.items():
                if run and name.startswith(("random", "all")):
                    continue  # each draw once
                entry = document["sets"].setdefault(
                    name,
                    {
                        "rows": len(rows), "losses": [], "planted": float((kinds[rows] == "trigger").mean()),
                        "own": float((labels[rows] == place.offer.turn.get(target)).mean()),
                    },
                )  # fmt: skip
                losses, _ = train(np.sort(rows), run)
                entry["losses"].append(float(losses.mean()))
            keep(document)
        document["done"] = True
        keep(document)

    return part


def _sets(place: Place, target: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Row numbers by rule. Those of LinFiK by the verb `select`."""
    n = len(place.offer.rows)
    count, sets = n // 10, {}
    for name, options in (
        ("LinFiK", {}), ("LinFiK, diversity 1", {"diversity": 1.0})
    ):  # fmt: skip
        out = str(place.folder / f"best-{target}-{len(sets)}.jsonl")
        influent.select(place.index, target=place.queries(target), out=out, budget=str(count), **options, **place.run)
        sets[name] = place.places_of(out)
    scores, fidelity = place.student_scores(target)
    sets["student"] = np.argsort(-scores, kind="stable")[:count]
    sets["BM25"] = np.argsort(-place.words(target), kind="stable")[:count]
    sets["bottom"] = np.argsort(place.values(target, "cosine"), kind="stable")[:count]
    rng = np.random.default_rng(place.seed)
    sets |= {f"random {i}": rng.choice(n, count, replace=False) for i in range(place.scale.random)}
    sets["all"] = np.arange(n)
    return sets, fidelity


def without(place: Place, keep: Keep) -> None:
    """Train on half of the rows, and on those of them of all providers but one; the change of each query loss."""
    asked = {name: [*place.offer.targets[name], *place.held(name)] for name in TARGETS}
    train = trainer(place, [row for rows in asked.values() for row in rows], WITHOUT)
    names, labels = place.offer.providers, np.array([row["provider"] for row in place.offer.rows])
    rng = np.random.default_rng(place.seed)
    labels[rng.permutation(len(labels)) % 2 == 1] = "not used"
    ends = np.cumsum([0, *(len(rows) for rows in asked.values())])
    document: dict[str, Any] = {
        "providers": names, "rows": [int((labels == name).sum()) for name in names],
        "values": {
            target: {
                form: [float(place.values(target, form)[labels == name].mean()) for name in names]
                for form in ("cosine", "none")
            }
            for target in TARGETS
        },
        "losses": [],
    }  # fmt: skip
    for run in range(place.scale.runs):
        found = []
        for left in (None, *names):
            losses, _ = train(np.flatnonzero((labels != left) & (labels != "not used")), run)
            by_target = {}
            for number, target in enumerate(TARGETS):
                own, num = losses[ends[number] : ends[number + 1]], len(place.offer.targets[target])
                by_target[target] = {"valued": float(own[:num].mean()), "held": float(own[num:].mean())}
            found.append({"without": left, **by_target})
        document["losses"].append(found)  # a run counts once all of its trainings are there
        document["done"] = run + 1 == place.scale.runs
        keep(document)

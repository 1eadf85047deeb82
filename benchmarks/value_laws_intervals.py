"""Coverage of the provider intervals (2 of value_laws.py): how often they hold the truth, which is known here.

The value of every row to a pool of queries is known. A draw takes 32 queries of the pool, with replacement, and distils
a student from a labelled sample as `distill` does (split, ridge, calibration) on features made once; `appraise`'s own
estimate then says each provider's value and its intervals. `labels` is to hold the value of the provider's rows to
these queries, `labels and queries` that to the whole pool. The intervals of `value` itself, for 10 and 32 queries:
`queries` is to hold the value of the provider's rows to the pool, `delivery`, whose rows are drawn with replacement
too, that of all its rows. Needs no model once features and values are there.
"""

from collections import defaultdict
from typing import Any

import numpy as np
import torch
from value_laws_place import Place
from value_laws_steps import Keep

from influent import distilling, providers, ridge
from influent.appraising import Labelled, estimate
from influent.bootstrap import TwoWay
from influent.features import load_lm
from influent.providers import Groups
from influent.student import Head

FRACTIONS = (0.1, 0.3, 1.0)
COUNTS = (10, 32)
BOOTSTRAP = 400
Hits = dict[str, list[tuple[bool, float]]]  # provider -> (holds the truth, length of the interval)


def coverage(target: str):
    def part(place: Place, keep: Keep) -> None:
        arrays = measure(place, target)
        keep({"target": target} | over_draws(arrays, place.scale.draws) | {"done": True})

    return part


def measure(place: Place, target: str) -> dict[str, np.ndarray]:
    """Values [Q, N] of every row to the pool, the student's features [N, D], and providers [N]; kept for later."""
    path = place.folder / f"coverage-{target}.npz"
    if not path.exists():
        queries = [*place.offer.targets[target], *place.held(target)]
        features = load_lm(place.student, **place.run)
        found, _ = features(place.offer.rows)
        labels = np.array([row["provider"] for row in place.offer.rows])
        np.savez_compressed(
            path, values=place.matrix(queries).astype(np.float16), features=found.astype(np.float32), labels=labels
        )
    return dict(np.load(path))


def over_draws(arrays: dict[str, np.ndarray], draws: int) -> dict[str, Any]:
    values = arrays["values"].astype(np.float64)
    groups = providers.groups_of([{"provider": str(name)} for name in arrays["labels"]], "provider")
    sampled: dict[float, dict[str, Hits]] = {}
    for fraction in FRACTIONS:
        found = sampled[fraction] = defaultdict(lambda: defaultdict(list))
        for draw in range(draws):
            _labelled(values, arrays["features"], groups, fraction, draw, found)
    asked: dict[int, dict[str, Hits]] = {}
    for count in COUNTS:
        whole = asked[count] = defaultdict(lambda: defaultdict(list))
        for draw in range(draws):
            _asked(values, groups, count, draw, whole)
    return {
        "draws": draws, "rows": len(groups.labels), "pool": len(values),
        "by labels": {str(key): _summary(hits) for key, hits in sampled.items()},
        "by queries": {str(key): _summary(hits) for key, hits in asked.items()},
    }  # fmt: skip


def _labelled(
    values: np.ndarray, features: np.ndarray, groups: Groups, fraction: float, draw: int, out: dict[str, Hits]
) -> None:
    rng = np.random.default_rng([draw, 1])
    picked = rng.choice(len(values), 32)
    chosen, held = distilling.split(groups.labels, round(fraction * len(groups.labels)), seed=draw)
    y = values[picked].mean(axis=0)
    fitted, left_out = ridge.fit(features[chosen[~held]], y[chosen[~held]])
    scores = Head(fitted, ridge.linear(left_out, y[chosen[~held]]))(features).astype(np.float32)
    known = Labelled(chosen[held], values[picked][:, chosen[held]].T)
    estimates, _ = estimate(groups, scores, known, draws=BOOTSTRAP, seed=draw)
    for g, (name, found) in enumerate(zip(groups.names, estimates, strict=True)):
        own = groups.labels == g
        truth = {"labels": y[own].mean(), "labels and queries": values[:, own].mean()}
        for kind, interval in found.intervals.items():
            out[kind][name].append((bool(interval.low <= truth[kind] <= interval.high), interval.high - interval.low))


def _asked(values: np.ndarray, groups: Groups, count: int, draw: int, out: dict[str, Hits]) -> None:
    rng = np.random.default_rng([draw, 2])
    picked = rng.choice(len(values), count)
    same, again = np.arange(len(groups.labels)), np.arange(len(groups.labels))
    for g in range(len(groups.names)):
        rows = np.flatnonzero(groups.labels == g)
        again[rows] = rng.choice(rows, len(rows))
    for kind, rows in (("queries", same), ("delivery", again)):
        scores = torch.from_numpy(values[np.ix_(picked, rows)])
        reducer = TwoWay(torch.from_numpy(groups.labels), len(groups.names), BOOTSTRAP, draw)
        drawn = reducer.result(reducer.push(reducer.empty(count), torch.arange(len(rows)), scores))
        each = scores.numpy().mean(axis=0)
        means = np.bincount(groups.labels, weights=each) / groups.counts
        estimates = providers.from_draws(means.tolist(), drawn, queries=count, rows=groups.counts.tolist(), shown=kind)
        for g, found in enumerate(estimates):
            truth, interval = values[:, groups.labels == g].mean(), found.shown
            out[kind][groups.names[g]].append(
                (bool(interval.low <= truth <= interval.high), interval.high - interval.low)
            )


def _summary(hits: dict[str, Hits]) -> dict[str, Any]:
    return {
        kind: {
            "coverage": float(np.mean([hit for each in found.values() for hit, _ in each])),
            "length": float(np.mean([length for each in found.values() for _, length in each])),
            "by provider": {name: float(np.mean([hit for hit, _ in each])) for name, each in found.items()},
        }
        for kind, found in hits.items()
    }

"""What scores predict of each random half of the rows, kept as ranks, and its linear datamodelling score (LDS).

The LDS of a query is a rank correlation over the halves. So all it needs of a matrix of scores is the rank of each half
by the sum of its rows' scores: a byte a query and half, which can be judged against a truth that is still being made.
The damping of an entry is the best on a tenth of the queries; what is reported is of the others. Not here: scores
(grass_images.py, grass_music.py, grass_text.py), trainings (image_truth.py, music.py, ground_truth.py).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import rankdata

from influent.metrics import bootstrap, spearman

DEFAULT = "default"  # the name of the method's own damping
Ranks = np.ndarray  # [Q, halves], 1 is the least
COLUMNS = {"cpu": "compress_s", "cuda": "compress_gpu_s"}  # of a result, seconds of compression by device


def judged(each: np.ndarray) -> dict[str, float]:
    """The mean over queries with its interval."""
    interval = bootstrap(each)
    return {"mean": round(interval.value, 4), "low": round(interval.low, 4), "high": round(interval.high, 4)}


def whiskers(judged: list[dict[str, float]]) -> list[list[float]]:
    """How far the intervals reach below and above their means, [2][n]: `yerr` of matplotlib."""
    return [[one["mean"] - one["low"] for one in judged], [one["high"] - one["mean"] for one in judged]]


def tuning(num_queries: int) -> np.ndarray:
    """The tenth of the queries on which the damping is chosen."""
    chosen = np.zeros(num_queries, bool)
    chosen[np.random.default_rng(2).permutation(num_queries)[: num_queries // 10]] = True
    return chosen


def ranks(scores: np.ndarray, used: np.ndarray) -> Ranks:
    """Of scores [Q, N] and halves [halves, N]. Ties are as good as impossible but for scores that are all alike."""
    return rankdata(scores.astype(np.float64) @ used.T.astype(np.float64), axis=1, method="min").astype(np.uint8)


def keep(path: Path, found: dict[str, Ranks], facts: dict[str, Any]) -> None:
    """`found` has the ranks by damping; whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".part").open("wb") as file:
        np.savez_compressed(file, facts=json.dumps(facts), **found)
    path.with_suffix(".part").rename(path)
    print(json.dumps(facts), flush=True)


@dataclass(frozen=True, eq=False)
class Judged:
    """An entry at the damping that was chosen: LDS by query [Q], of the truth's mean and of each of its seeds."""

    facts: dict[str, Any]
    damping: str
    each: np.ndarray
    default: np.ndarray
    by_seed: np.ndarray  # [seeds, Q]
    grid: dict[str, float]

    def document(self) -> dict[str, Any]:
        return {
            **self.facts, "damping": self.damping, "lds": judged(self.each), "default": judged(self.default),
            "by seed": self.by_seed.mean(1).round(4).tolist(), "grid": self.grid,
        }  # fmt: skip


def judge(path: Path, outcomes: np.ndarray) -> Judged:
    """Of what `keep` wrote, by outcomes [halves, seeds, Q] of which larger ones are better."""
    with np.load(path) as held:
        facts = json.loads(str(held["facts"]))
        kept = {name: held[name].astype(np.float64) for name in held.files if name != "facts"}
    tune = tuning(outcomes.shape[2])
    mean = {name: spearman(each, outcomes.mean(1).T) for name, each in kept.items()}
    tried = {name: value for name, value in mean.items() if name != DEFAULT} or mean
    best = max(tried, key=lambda name: tried[name][tune].mean())
    by_seed = np.stack([spearman(kept[best], outcomes[:, seed].T)[~tune] for seed in range(outcomes.shape[1])])
    grid = {name: round(float(value[~tune].mean()), 4) for name, value in tried.items()}
    default = mean.get(DEFAULT, mean[best])[~tune]
    return Judged(facts, best, mean[best][~tune], default, by_seed, grid)


def difference(one: Judged, other: Judged) -> dict[str, Any]:
    """Of two entries' LDS, query by query; its mean by each seed alone; and that at the default damping of both, which
    has no part in the luck of the choice."""
    by_seed = (one.by_seed - other.by_seed).mean(1).round(4).tolist()
    return {**judged(one.each - other.each), "by seed": by_seed, "at default": judged(one.default - other.default)}


def ceiling(outcomes: np.ndarray) -> dict[str, float] | None:
    """The rank correlation of one seed's outcomes [halves, seeds, Q] with another's, mean over pairs and queries; and
    the root of that of the mean of all seeds with another such mean (Spearman and Brown): what a perfect score would
    reach. None of a single seed."""
    count = outcomes.shape[1]
    if count < 2:
        return None
    pairs = [(a, b) for a in range(count) for b in range(a)]
    one = max(0.0, float(np.mean([spearman(outcomes[:, a].T, outcomes[:, b].T).mean() for a, b in pairs])))
    return {"one seed": round(one, 4), "reachable": round((count * one / (1 + (count - 1) * one)) ** 0.5, 4)}


@dataclass(frozen=True, slots=True)
class Claim:
    """One ordering of the paper: `first` loses to `second` by no more than `slack` of LDS, at `times` its speed."""

    text: str
    first: str
    second: str
    slack: float = 0.0
    times: float | None = None


def orderings(
    claims: Sequence[Claim],
    sizes: Sequence[int],
    found: Mapping[tuple[str, int | None], Judged],
    seconds: Mapping[str, Mapping[str, float]],
) -> list[dict[str, Any]]:
    """Each claim at each size: the difference of LDS, the ratio of seconds by device, and whether either holds.

    `certain` means that the interval, every seed of the trainings and the interval at the default damping say the same
    of the LDS as the mean does; `holds` is None of what is not measured yet.
    """
    out = []
    for claim in claims:
        for k in sizes:
            row: dict[str, Any] = {"claim": claim.text, "k": k, "holds": None}
            if (claim.first, k) in found and (claim.second, k) in found:
                gap = difference(found[claim.first, k], found[claim.second, k])
                holds = gap["mean"] >= -claim.slack
                side = "low" if holds else "high"
                others = [gap[side], *gap["by seed"], gap["at default"][side]]
                row |= {"difference": gap, "holds": holds}
                row["certain"] = all((value >= -claim.slack) == holds for value in others)
            if claim.times is not None:
                one, other = f"{claim.first}-{k}", f"{claim.second}-{k}"
                ratios = {
                    on: round(each[other] / each[one], 1) for on, each in seconds.items() if {one, other} <= each.keys()
                }
                row |= {"times": ratios, "fast": {on: ratio >= claim.times for on, ratio in ratios.items()}}
            out.append(row)
    return out

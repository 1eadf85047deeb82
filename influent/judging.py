"""What each metric says of scores, given retrainings: LDS, leave-one-out, brittleness, selection, removal, detection,
retrieval.

Every function takes score matrices by name, [Q, N] float64, larger = the row pushes the query's loss further down, and
returns the metric's part of the document of `influent evaluate`: `{"methods": {name: {"mean", "low", "high", ...}}}`,
the interval being the bootstrap over the queries. `queries` are the numbers of those that are reported; scores have a
row for each of all. Not here: numbers from arrays (metrics.py), trainings (rerun.py), tail patches (tailpatch.py).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from influent import metrics
from influent.errors import DataError, FormatError
from influent.intervals import Interval
from influent.metrics import bootstrap
from influent.rerun import Plan, Reruns, best, everything, halves, only, without
from influent.rng import Stream
from influent.truth import Retraining

Named = Mapping[str, np.ndarray]
Doc = dict[str, Any]
SUBSETS, DRAWS = 50, 3  # random halves; random sets of rows beside the chosen ones
RANDOM = "random"


@dataclass(frozen=True, slots=True, eq=False)
class Halves:
    """Outcomes of the random subsets: `used` [S, N], and `gain` [seeds, S, Q], minus the loss."""

    used: np.ndarray
    gain: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        """The gain averaged over the seeds, [S, Q]."""
        return self.gain.mean(0)

    def lds(self, scores: np.ndarray, queries: np.ndarray) -> np.ndarray:
        """The LDS of each of the queries, [len(queries)]."""
        return metrics.lds(scores[queries], self.used, self.mean[:, queries])


def subset_outcomes(reruns: Reruns, num_subsets: int | None, *, seed: int = 0) -> Halves:
    """The first `num_subsets` subsets with all seeds; those that are missing are trained. By default what is stored,
    or 50, if there are fewer and there is a trainer.

    Raises FormatError when too few are stored and there is no trainer.
    """
    stored = [each for each in reruns.truth.of_role("subset") if each.seed in reruns.seeds]
    if reruns.trainer is not None:
        have = 1 + max((each.number for each in stored), default=-1)
        count = max(SUBSETS, have) if num_subsets is None else num_subsets
        drawn = halves(reruns.truth.num_rows, count, seed=seed)
        foreign = {each.number: each.rows for each in stored}  # of another share or law of drawing: used as they are
        plans = [Plan("subset", j, foreign.get(j, plan.rows)) for j, plan in enumerate(drawn)]
        outcomes = reruns.run(plans)
        used = np.stack([plan.rows for plan in plans])
        return Halves(used, -np.array([[outcome.loss for outcome in row] for row in outcomes]))
    numbers = sorted({each.number for each in stored})[:num_subsets]
    if len(numbers) < 2 or (num_subsets is not None and len(numbers) < num_subsets):
        raise FormatError(
            f"{reruns.truth.store}: holds {len(numbers)} retrained subsets, expected "
            f"{max(2, num_subsets or 2)} or more: give --train or --base to train them"
        )
    return _complete([each for each in stored if each.number in set(numbers)], numbers)


def _complete(stored: Sequence[Retraining], numbers: Sequence[int]) -> Halves:
    """The seeds that every subset was trained with; a single subset more or less must not bias a seed's share."""
    found = {(each.seed, each.number): each for each in stored}
    seeds = sorted({seed for seed, _ in found})
    whole = [seed for seed in seeds if all((seed, number) in found for number in numbers)]
    if not whole:
        most = max(seeds, key=lambda seed: sum((seed, number) in found for number in numbers))
        return _complete(stored, [number for number in numbers if (most, number) in found])
    gain = -np.array([[found[seed, number].outcome.loss for number in numbers] for seed in whole])
    return Halves(np.stack([found[whole[0], number].rows for number in numbers]), gain)


def lds(named: Named, outcomes: Halves, queries: np.ndarray) -> Doc:
    """The linear datamodelling score, against the outcomes averaged over seeds; with several seeds also against those
    of one training (`one_training`, an interval over seeds and queries), how well one seed foretells another
    (`reliability`, r), and the `ceiling`: what a perfect forecast of the expected outcome would have with the average
    of S seeds, sqrt(S r / (1 + (S - 1) r)) after Spearman and Brown (exact for linear correlations)."""
    methods = {}
    for name, scores in named.items():
        each = outcomes.lds(scores, queries)
        methods[name] = _by_query(each, methods)
        if len(outcomes.gain) > 1:
            single = [metrics.lds(scores[queries], outcomes.used, gain[:, queries]) for gain in outcomes.gain]
            methods[name]["one_training"] = bootstrap(np.array(single)).to_json()
    reliability, seeds = _reliability(outcomes, queries), len(outcomes.gain)
    ceiling = None
    if reliability is not None:
        ceiling = float(np.sqrt(max(0.0, seeds * reliability / (1 + (seeds - 1) * reliability))))
    return {
        "subsets": len(outcomes.used), "seeds": seeds, "reliability": reliability, "ceiling": ceiling,
        "methods": methods,
    }  # fmt: skip


def _by_query(each: np.ndarray, methods: Mapping[str, Doc]) -> Doc:
    """The mean over the queries, and by how much it is ahead of the method judged first: both have the same queries,
    so the interval of the difference is narrower than those of the two suggest."""
    first = next(iter(methods.values()), None)
    lead = None if first is None else bootstrap(each - np.array(first["each"])).to_json()
    return {**bootstrap(each).to_json(), "ahead": lead, "each": each.tolist()}


def _reliability(outcomes: Halves, queries: np.ndarray) -> float | None:
    gain = outcomes.gain[:, :, queries].swapaxes(1, 2)  # [seeds, Q, S]
    pairs = [(i, j) for i in range(len(gain)) for j in range(i)]
    return float(np.mean([metrics.spearman(gain[i], gain[j]).mean() for i, j in pairs])) if pairs else None


def leave_out(named: Named, reruns: Reruns, queries: np.ndarray, groups: Sequence[np.ndarray], unit: str) -> Doc:
    """How well (summed) scores order the rows, or groups of rows, by what leaving each out costs each query."""
    num_rows = reruns.truth.num_rows
    plans = without("without", groups, num_rows)
    losses = reruns.losses([everything(num_rows), *plans])
    cost = (losses[1:] - losses[0]).T[queries]  # [Q, groups]
    methods = {}
    for name, scores in named.items():
        summed = np.stack([scores[queries][:, rows].sum(1) for rows in groups], axis=1)
        each = metrics.spearman(summed, cost)
        linear = float(metrics.pearson(summed, cost).mean())
        methods[name] = _by_query(each, methods) | {"pearson": linear}
    return {"unit": unit, "left_out": len(groups), "methods": methods}


def brittleness(named: Named, reruns: Reruns, queries: np.ndarray, counts: Sequence[int], *, seed: int = 0) -> Doc:
    """By how much each query's loss rises, and how often its answer changes, when its own top rows are removed."""
    num_rows = reruns.truth.num_rows
    if max(counts) >= num_rows:
        raise DataError(f"brittleness: removing {max(counts)} of {num_rows} rows leaves none: give a smaller --top")
    methods = {}
    for name, scores in named.items():
        if name != RANDOM:
            tops = [best(scores[q], k) for k in counts for q in queries]
            own = np.tile(queries, len(counts))
            rise, flips = _removed(reruns, without(f"brittle {name}", tops, num_rows), own[:, None])
            methods[name] = _brittle(rise.reshape(len(counts), -1), flips, counts)
    # Rows drawn without regard to the query serve all queries at once.
    tops = [drawn(num_rows, k, draw, seed) for k in counts for draw in range(DRAWS)]
    every = np.tile(queries, (len(tops), 1))
    rise, flips = _removed(reruns, without("brittle random", tops, num_rows), every)
    by_query = rise.reshape(len(counts), DRAWS, -1).mean(1)
    methods[RANDOM] = _brittle(by_query, flips, counts)
    return {"removed": list(counts), "queries": queries.tolist(), "methods": methods}


def _removed(reruns: Reruns, plans: Sequence[Plan], asked: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """For each plan, of the queries `asked` [plans, m]: the rise of the loss, and the share of seeds in which the
    answer changes, if the trainer tells answers."""
    outcomes = reruns.run([everything(reruns.truth.num_rows), *plans])
    loss = np.array([[outcome.loss for outcome in row] for row in outcomes])  # [seeds, 1 + plans, Q]
    at = np.arange(len(plans))[:, None]
    rise = (loss[:, 1:] - loss[:, :1]).mean(0)[at, asked]
    said = [[outcome.said for outcome in row] for row in outcomes]
    if any(answer is None for row in said for answer in row):
        return rise, None
    answers = np.array(said)
    return rise, (answers[:, 1:] != answers[:, :1]).mean(0)[at, asked]


def _brittle(rise: np.ndarray, flips: np.ndarray | None, counts: Sequence[int]) -> Doc:
    """The headline is the rise at the largest number of rows removed."""
    shown = {**bootstrap(rise[-1]).to_json(), "rise": rise.mean(1).tolist()}
    return shown | {"flips": None if flips is None else flips.reshape(len(counts), -1).mean(1).tolist()}


def drawn(num_rows: int, k: int, draw: int, seed: int) -> np.ndarray:
    """`k` random rows; a larger k of the same draw adds to them."""
    return Stream(seed, "", "random rows", str(draw)).permutation(num_rows)[:k]


def curve(named: Named, reruns: Reruns, queries: np.ndarray, shares: Sequence[float], *, keep: bool, seed: int) -> Doc:
    """The measured loss after training on the best share of the rows (`keep`), or on all but it, by share.

    Rows are ordered by their mean score over half of the queries, drawn at random; the other half is measured.
    The headline is the area between random rows' curve and the method's, positive if the method does better, which is
    a lower loss for rows that are kept and a higher one for rows that are removed.
    """
    num_rows = reruns.truth.num_rows
    if len(queries) < 2:
        raise DataError("selection and removal: expected 2 or more queries: one half chooses, the other is measured")
    aim = Stream(seed, "", "curve", "aim").subset(len(queries), len(queries) // 2)
    chosen, measured = queries[aim], np.delete(queries, aim)
    sizes = [max(1, round(share * num_rows)) for share in shares]
    if not keep and max(sizes) >= num_rows:
        raise DataError(f"removal: removing {max(shares):.0%} of {num_rows} rows leaves none: give smaller --shares")
    role = "keep" if keep else "remove"

    def losses(name: str, order: np.ndarray) -> np.ndarray:  # [sizes, measured]
        masks = [only(order[:size], num_rows) for size in sizes]
        plans = [Plan(f"{role} {name}", i, mask if keep else ~mask) for i, mask in enumerate(masks)]
        return reruns.losses(plans)[:, measured]

    chance = np.mean([losses(RANDOM, drawn(num_rows, num_rows, draw, seed)) for draw in range(DRAWS)], axis=0)
    methods: dict[str, Doc] = {}
    for name, scores in named.items():
        if name == RANDOM:
            found = bottom = chance
        else:
            order = best(scores[chosen].mean(0), num_rows)
            found, bottom = losses(name, order), losses(f"{name}, bottom", order[::-1])
        better = (chance - found) if keep else (found - chance)
        methods[name] = {
            **bootstrap(_areas(shares, better)).to_json(),
            "loss": found.mean(1).tolist(), "bottom": bottom.mean(1).tolist(),
            "area": float(_areas(shares, found).mean()),
        }  # fmt: skip
    return {"shares": list(shares), "chosen_by": chosen.tolist(), "measured": measured.tolist(), "methods": methods}


def _areas(shares: Sequence[float], curves: np.ndarray) -> np.ndarray:
    """The area under each query's curve, [sizes, Q] -> [Q]; of a single point, its height."""
    if len(shares) == 1:
        return curves[0]
    return np.array([metrics.area(np.array(shares), column) for column in curves.T])


def detection(suspicion: Named, flags: np.ndarray, k: int | None = None) -> Doc:
    """How well scores [N], larger = more suspicious, find the flagged rows; `k` for recall is their number.

    The headline is the AUC; its interval resamples rows.
    """
    k = int(flags.sum()) if k is None else k
    kinds: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
        "auc": metrics.auc,
        "average_precision": metrics.average_precision,
        "recall": lambda scores, flags: metrics.recall_at(scores, flags, k),
    }
    methods: dict[str, Doc] = {}
    for name, scores in suspicion.items():
        found: dict[str, Interval] = {
            kind: metrics.bootstrap_rows(metric, scores, flags) for kind, metric in kinds.items()
        }
        methods[name] = found["auc"].to_json() | {kind: each.to_json() for kind, each in found.items()}
    return {"flagged": int(flags.sum()), "rows": len(flags), "k": k, "methods": methods}


def retrieval(named: Named, relevant: np.ndarray, queries: np.ndarray, *, k: int) -> Doc:
    """How high the best of a query's relevant rows [Q, N] stands: its reciprocal rank (MRR), the headline, and whether
    it is among the top `k`.

    Raises DataError for a reported query without a relevant row.
    """
    empty = queries[~relevant[queries].any(axis=1)]
    if len(empty):
        raise DataError(f"retrieval: query {int(empty[0])} has no relevant row: give one, or leave the query out")
    methods: dict[str, Doc] = {}
    for name, scores in named.items():
        ranked = metrics.reciprocal_rank(scores[queries], relevant[queries])
        hits = metrics.hit_at(scores[queries], relevant[queries], k)
        methods[name] = {
            **bootstrap(ranked).to_json(), "each": ranked.tolist(), "hit": bootstrap(hits).to_json(),
        }  # fmt: skip
    return {"k": k, "methods": methods}

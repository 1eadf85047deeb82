"""How good scores are: correlations, the linear datamodelling score, detection, retrieval, areas, intervals.

Arrays in, numbers out; float64 throughout. Equal values share their mean rank, and where a metric depends on the order
of equal scores it is the expectation over all their orders, so that a constant score is worth what chance is, and no
number depends on the order of rows. Not here: retraining (rerun.py), or where scores come from.
"""

from collections.abc import Callable

import numpy as np

from influent.errors import DataError, NumericsError
from influent.intervals import LEVEL, Interval
from influent.rng import Stream

RESAMPLES = 2000


def ranks(x: np.ndarray) -> np.ndarray:
    """Ranks from 1 along the last axis; equal values share the mean of their ranks. [..., n] -> float64 [..., n]."""
    x = _finite(x, "values")
    n = x.shape[-1]
    order = np.argsort(x, axis=-1, kind="stable")
    ordered = np.take_along_axis(x, order, axis=-1)
    new = np.ones(x.shape, bool)  # where a run of equal values begins
    new[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
    place = np.broadcast_to(np.arange(n), x.shape)
    first = np.maximum.accumulate(np.where(new, place, 0), axis=-1)
    ends = np.ones(x.shape, bool)
    ends[..., :-1] = new[..., 1:]
    last = np.minimum.accumulate(np.where(ends, place, n)[..., ::-1], axis=-1)[..., ::-1]
    out = np.empty(x.shape)
    np.put_along_axis(out, order, (first + last) / 2 + 1.0, axis=-1)
    return out


def pearson(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Linear correlation along the last axis, [..., n] -> [...]; 0 where either side is constant: it tells nothing."""
    a, b = _finite(a, "values"), _finite(b, "values")
    if a.shape[-1] != b.shape[-1] or a.shape[-1] < 2:
        raise DataError(f"correlation: expected two equal lengths of 2 or more, got {a.shape[-1]} and {b.shape[-1]}")
    constant = (a == a[..., :1]).all(-1) | (b == b[..., :1]).all(-1)
    a, b = (x - x.mean(-1, keepdims=True) for x in (a, b))
    # Divided by the largest first, or squares of tiny scores would vanish.
    a, b = (x / np.where((top := np.abs(x).max(-1, keepdims=True)) > 0, top, 1.0) for x in (a, b))
    length = np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    out = (a * b).sum(-1) / np.where(constant | (length == 0), 1.0, length)
    return np.asarray(np.where(constant, 0.0, out).clip(-1.0, 1.0))


def spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Rank correlation along the last axis, ties by mean rank; 0 where either side is constant."""
    return pearson(ranks(a), ranks(b))


def lds(scores: np.ndarray, used: np.ndarray, gain: np.ndarray) -> np.ndarray:
    """The linear datamodelling score of each query (Park et al., TRAK, 2023), [Q].

    Spearman over the subsets of the sum of a subset's scores with what training on it gained.

    Args:
        scores: [Q, N], larger = the row pushes the query's loss further down.
        used: booleans [S, N], the rows of each subset.
        gain: [S, Q], minus the loss of each query after training on each subset.
    """
    if used.shape[1:] != scores.shape[1:] or gain.shape != (len(used), len(scores)):
        raise DataError(
            f"LDS: scores {list(scores.shape)}, subsets {list(used.shape)} and gain {list(gain.shape)} do not fit: "
            "expected [queries, rows], [subsets, rows] and [subsets, queries]"
        )
    predicted = _finite(scores, "scores") @ used.T.astype(np.float64)
    return spearman(predicted, np.ascontiguousarray(gain.T))


def auc(scores: np.ndarray, flags: np.ndarray) -> float:
    """Area under the ROC curve: the chance that a flagged row scores above another one, equal scores counting half."""
    flags = _two_classes(scores, flags)
    bad = int(flags.sum())
    return float((ranks(scores)[flags].sum() - bad * (bad + 1) / 2) / (bad * (len(flags) - bad)))


def average_precision(scores: np.ndarray, flags: np.ndarray) -> float:
    """Mean precision at the flagged rows, scores descending; rows of equal score are retrieved together."""
    flags = _two_classes(scores, flags)
    hits, places = _steps(scores, flags)
    gained = np.diff(hits, prepend=0)
    return float((gained * hits / places).sum() / hits[-1])


def recall_at(scores: np.ndarray, flags: np.ndarray, k: int) -> float:
    """The share of the flagged rows among the `k` largest scores."""
    if k < 1:
        raise DataError(f"recall at k: expected k of 1 or more, got {k}")
    flags = _two_classes(scores, flags)
    hits, places = _steps(scores, flags)
    return float(np.interp(min(k, len(flags)), np.concatenate([[0], places]), np.concatenate([[0], hits])) / hits[-1])


def reciprocal_rank(scores: np.ndarray, relevant: np.ndarray) -> np.ndarray:
    """One over the rank of each query's best relevant row, [Q]; their mean is the MRR. Both [Q, N]."""
    return _first_relevant(scores, relevant, lambda rank: 1.0 / rank)


def hit_at(scores: np.ndarray, relevant: np.ndarray, k: int) -> np.ndarray:
    """Whether a relevant row is among each query's `k` largest scores: 1, 0, or between where the k-th is tied, [Q]."""
    return _first_relevant(scores, relevant, lambda rank: (rank <= k).astype(float))


def area(x: np.ndarray, y: np.ndarray) -> float:
    """The area under the curve y(x) by the trapezoid rule, divided by the range of x: a mean height."""
    x, y = _finite(x, "x"), _finite(y, "y")
    if x.shape != y.shape or len(x) < 2 or (np.diff(x) <= 0).any():
        raise DataError(f"area: expected two or more points with x ascending, got x = {x.tolist()}")
    return float(((y[1:] + y[:-1]) / 2 * np.diff(x)).sum() / (x[-1] - x[0]))


def bootstrap(values: np.ndarray, *, seed: int = 0, resamples: int = RESAMPLES, level: float = LEVEL) -> Interval:
    """The mean and its percentile interval, resampling every axis of `values` with replacement, each independently.

    [n] resamples n values; [S, Q] both seeds and queries, so that the interval covers other seeds and other queries.
    """
    values = _finite(values, "values")
    if values.size == 0:
        raise DataError("bootstrap: expected at least one value, got none")
    first, *others = (_shares(n, axis, seed, resamples) for axis, n in enumerate(values.shape))
    means = np.tensordot(first, values, axes=1)
    for share in others:
        means = np.einsum("rn,rn...->r...", share, means)
    return Interval(float(values.mean()), *_quantiles(means, level))


def bootstrap_rows(
    metric: Callable[[np.ndarray, np.ndarray], float],
    scores: np.ndarray,
    flags: np.ndarray,
    *,
    seed: int = 0,
    resamples: int = 200,
    level: float = LEVEL,
) -> Interval:
    """A detection metric and its interval: flagged and other rows are resampled apart, so that each class stays."""
    flags = _two_classes(scores, flags)
    bad, good = flags.nonzero()[0], (~flags).nonzero()[0]
    found = []
    for i in range(resamples):
        ours = Stream(seed, "bootstrap", "flagged", str(i)).buckets(len(bad), len(bad))
        others = Stream(seed, "bootstrap", "others", str(i)).buckets(len(good), len(good))
        picked = np.concatenate([bad[ours], good[others]])
        found.append(metric(scores[picked], flags[picked]))
    return Interval(metric(scores, flags), *_quantiles(np.array(found), level))


def _shares(n: int, axis: int, seed: int, resamples: int) -> np.ndarray:
    """How often each of n values is drawn in each resample, over n: [resamples, n]."""
    drawn = Stream(seed, "bootstrap", "axis", str(axis)).buckets(resamples * n, n).reshape(resamples, n)
    each = drawn + n * np.arange(resamples)[:, None]
    return np.bincount(each.ravel(), minlength=resamples * n).reshape(resamples, n) / n


def _quantiles(values: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _steps(scores: np.ndarray, flags: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores descending, after each run of equal ones: flagged rows so far, and rows so far."""
    order = np.argsort(-_finite(scores, "scores"), kind="stable")
    ordered = scores[order]
    ends = np.append(ordered[1:] != ordered[:-1], True).nonzero()[0]
    return np.cumsum(flags[order])[ends], ends + 1


def _first_relevant(scores: np.ndarray, relevant: np.ndarray, worth: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """The expectation, over the orders of equal scores, of what the rank of the best relevant row is worth, [Q]."""
    if scores.shape != relevant.shape or not relevant.any(axis=1).all():
        raise DataError("retrieval: expected scores and relevance [Q, N] alike, with a relevant row for every query")
    scores, out = _finite(scores, "scores"), np.empty(len(scores))
    for i, (row, good) in enumerate(zip(scores, relevant.astype(bool), strict=True)):
        best = row[good].max()
        above, tied = int((row > best).sum()), row == best
        others, size = int((tied & ~good).sum()), int(tied.sum())
        j = np.arange(others + 1)  # so many of the tied others come first
        none_yet = np.concatenate([[1.0], np.cumprod((others - j[:-1]) / (size - j[:-1]))])
        chance = none_yet * (size - others) / (size - j)
        out[i] = (chance * worth(above + 1.0 + j)).sum()
    return out


def _two_classes(scores: np.ndarray, flags: np.ndarray) -> np.ndarray:
    flags = np.asarray(flags)
    if flags.shape != np.shape(scores) or flags.ndim != 1:
        raise DataError(f"flags: expected one for each of {np.shape(scores)} scores, got {flags.shape}")
    flags = flags.astype(bool)
    if flags.all() or not flags.any():
        which = "every row is" if flags.all() else "no row is"
        raise DataError(f"flags: {which} flagged; detection needs rows of both kinds")
    return flags


def _finite(x: np.ndarray, what: str) -> np.ndarray:
    x = np.asarray(x, np.float64)
    if not np.isfinite(x).all():
        raise NumericsError(f"{what}: expected finite numbers, got {x[~np.isfinite(x)].flat[0]}")
    return x

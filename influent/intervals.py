"""Means with intervals: Student's t quantile, the difference estimator of a partly labelled group, percentiles.

Pure functions of numbers. Not here: the bootstrap over queries and rows (bootstrap.py), what is being averaged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist, pvariance

from influent.errors import DataError, SpecError

LEVEL = 0.95
TINY = 1e-300


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and the two ends of its interval."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        """Of a mean, as an evaluation reports it."""
        return {"mean": self.value, "low": self.low, "high": self.high}


def difference(predicted_mean: float, residuals: Sequence[float], population: int, *, level: float = LEVEL) -> Interval:
    """The mean of y over a group of `population` rows of which a random few are labelled.

    V = mean of f over all rows + mean of (y - f) over the n labelled ones, with the standard error of sampling without
    replacement, SE^2 = (1 - n/N) s^2 / n, and a t interval of n - 1 degrees of freedom (Cochran, Sampling Techniques,
    1977, section 7). Valid whatever the quality of f, provided that f was not fitted to these labels. With every row
    labelled nothing is left to chance and the interval is a point.

    Raises:
        DataError: fewer than two labels (unless they are all), or more labels than rows.
    """
    n = len(residuals)
    if n > population:
        raise DataError(f"{n} labels for a group of {population} rows: a row is labelled once at most")
    if n < min(2, population):
        raise DataError(f"{n} labelled of {population} rows: an interval needs two at least; label more rows")
    mean = math.fsum(residuals) / n
    value = predicted_mean + mean
    if n == population:
        return Interval(value, value, value)
    variance = math.fsum((r - mean) ** 2 for r in residuals) / (n - 1)
    reach = t_quantile((1 + level) / 2, n - 1) * math.sqrt((1 - n / population) * variance / n)
    return Interval(value, value - reach, value + reach)


def percentiles(
    value: float, draws: Sequence[float], *, level: float = LEVEL, of: Sequence[tuple[float, int]] = ()
) -> Interval:
    """The percentile interval of bootstrap `draws` around an estimate (Efron, 1979), widened to hold the estimate.

    A percentile interval of few units is too short: a resample of n has the variance (n - 1) / n of theirs, and its
    quantiles are a normal's where a mean of n needs Student's. Its ends are therefore moved outwards by the factor that
    this is in the normal case (Hesterberg, The American Statistician 69, 2015).

    Args:
        of: what the estimate's variance is made of: each part, and its degrees of freedom, n - 1 for a mean of n. The
            sum is taken to have those of Satterthwaite (1946). A part without any is left out: of a single unit
            nothing can be said.
    """
    if not len(draws):
        raise DataError("an interval needs at least one draw")
    ordered = sorted(float(draw) for draw in draws)
    tail = (1 - level) / 2
    low, high = _between(ordered, tail), _between(ordered, 1 - tail)
    factor = _widening(ordered, of, level)
    return Interval(value, min(value - factor * (value - low), value), max(value + factor * (high - value), value))


def _widening(draws: Sequence[float], of: Sequence[tuple[float, int]], level: float) -> float:
    parts = [(variance, freedom) for variance, freedom in of if variance > 0 and freedom > 0]
    spread = pvariance(draws) if parts else 0.0
    if spread <= 0:
        return 1.0
    total = math.fsum(variance for variance, _ in parts)
    freedom = total**2 / math.fsum(variance**2 / df for variance, df in parts)
    quantile = t_quantile((1 + level) / 2, round(freedom, 1))
    return math.sqrt(total / spread) * quantile / NormalDist().inv_cdf((1 + level) / 2)


def _between(ordered: Sequence[float], share: float) -> float:
    at = share * (len(ordered) - 1)
    lo = math.floor(at)
    hi = min(lo + 1, len(ordered) - 1)
    return ordered[lo] + (at - lo) * (ordered[hi] - ordered[lo])


@lru_cache(maxsize=1024)  # every provider with as many labels asks for the same one
def t_quantile(p: float, df: int | float) -> float:
    """The p-quantile of Student's t distribution: bisection of its distribution function, to 1e-12 relative.

    >>> round(t_quantile(0.975, 4), 6)
    2.776445
    """
    if not 0 < p < 1 or df <= 0:
        raise SpecError(f"t quantile: expected 0 < p < 1 and positive degrees of freedom, got p {p} and {df}")
    if p < 0.5:
        return -t_quantile(1 - p, df)
    low, high = 0.0, 1.0
    while _t_upper(high, df) > 1 - p:
        low, high = high, 2 * high
    while high - low > 1e-13 * high:
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if _t_upper(middle, df) > 1 - p else (low, middle)
    return (low + high) / 2


def _t_upper(t: float, df: int | float) -> float:
    """P(T > t) for t >= 0: half the incomplete beta function I_x(df/2, 1/2) at x = df / (df + t^2)."""
    x = df / (df + t * t)
    return 0.5 * _incomplete_beta(df / 2, 0.5, x, t * t / (df + t * t))


def _incomplete_beta(a: int | float, b: int | float, x: float, rest: float) -> float:
    """I_x(a, b), with `rest` = 1 - x given apart so that none of its digits is lost (DLMF 8.17.22, 8.17.4)."""
    if x <= 0:
        return 0.0
    if rest <= 0:
        return 1.0
    logs = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log(rest)
    if x < (a + 1) / (a + b + 2):
        return math.exp(logs) * _fraction(a, b, x) / a
    return 1 - math.exp(logs) * _fraction(b, a, rest) / b


def _fraction(a: int | float, b: int | float, x: float) -> float:
    """The continued fraction of DLMF 8.17.22, evaluated by Lentz's method."""
    c, d = 1.0, 1 / _away(1 - (a + b) * x / (a + 1))
    total = d
    for m in range(1, 10_000):
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / _away(1 + term * d)
            c = _away(1 + term / c)
            total *= c * d
        if abs(c * d - 1) < 1e-15:
            return total
    raise ArithmeticError(f"the incomplete beta function did not converge at a={a}, b={b}, x={x}")


def _away(x: float) -> float:
    return x if abs(x) > TINY else TINY

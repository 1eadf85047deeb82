"""Intervals against scipy's t distribution, the textbook's formula, and their coverage over many draws."""

import math

import numpy as np
import pytest
from scipy import special, stats

from influent.errors import DataError, SpecError
from influent.intervals import Interval, difference, percentiles, t_quantile


@pytest.mark.parametrize("df", [0.5, 1, 2, 3, 4.5, 9, 30, 200, 1e4, 1e6])
def test_t_quantile_is_scipys(df):
    for p in (1e-6, 0.01, 0.2, 0.5, 0.6, 0.9, 0.975, 0.999, 1 - 1e-9):
        assert t_quantile(p, df) == pytest.approx(stats.t.ppf(p, df), rel=1e-7, abs=1e-10), p


def test_t_quantile_refuses_what_is_no_probability():
    for p, df in ((0.0, 3), (1.0, 3), (0.5, 0), (-1.0, 2)):
        with pytest.raises(SpecError):
            t_quantile(p, df)


def test_the_incomplete_beta_function_is_scipys():
    from influent.intervals import _incomplete_beta

    for a, b, x in ((0.5, 0.5, 0.3), (2, 0.5, 0.999), (50, 0.5, 0.9), (3, 4, 0.01), (3, 4, 0.0), (3, 4, 1.0)):
        assert _incomplete_beta(a, b, x, 1 - x) == pytest.approx(special.betainc(a, b, x), rel=1e-10)


def test_difference_is_the_textbooks_formula():
    residuals = [0.3, -0.1, 0.5, 0.2]
    got = difference(2.0, residuals, 10)
    r = np.array(residuals)
    reach = stats.t.ppf(0.975, 3) * math.sqrt((1 - 0.4) * r.var(ddof=1) / 4)
    assert got.value == pytest.approx(2.0 + r.mean())
    assert (got.low, got.high) == pytest.approx((got.value - reach, got.value + reach))


def test_all_labelled_is_a_point_and_too_few_are_refused():
    assert difference(1.0, [1.0, 2.0], 2) == Interval(2.5, 2.5, 2.5)
    assert difference(1.0, [3.0], 1) == Interval(4.0, 4.0, 4.0)
    for residuals, population in (([], 3), ([1.0], 3), ([1.0, 2.0], 1)):
        with pytest.raises(DataError):
            difference(0.0, residuals, population)


@pytest.mark.parametrize("quality", [0.0, 0.6, 1.0])
def test_coverage_is_nominal_whatever_the_predictions_are_worth(quality):
    """4,000 samples of 25 of 200 rows: the .95 interval holds the population's mean .93 to .97 of the time."""
    rng = np.random.default_rng(0)
    y = rng.normal(size=200) + 0.3
    f = quality * y + (1 - quality) * rng.normal(size=200) + rng.normal(size=200) * 0.2
    hits = 0
    for _ in range(4000):
        chosen = rng.choice(200, 25, replace=False)
        got = difference(float(f.mean()), (y - f)[chosen].tolist(), 200)
        hits += got.low <= y.mean() <= got.high
    assert 0.93 <= hits / 4000 <= 0.97


def test_percentiles_are_numpys_and_hold_the_estimate():
    draws = np.random.default_rng(1).normal(size=501)
    got = percentiles(0.0, draws.tolist())
    assert (got.low, got.high) == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])))
    assert percentiles(9.0, draws.tolist()).high == 9.0
    with pytest.raises(DataError):
        percentiles(0.0, [])


@pytest.mark.parametrize("count", [5, 10, 40])
def test_widened_percentiles_of_a_mean_hold_it_as_often_as_they_say(count):
    """The plain percentile interval of 5 values holds their mean four times in five."""
    rng = np.random.default_rng(count)
    hits = plain = 0
    for _ in range(1500):
        x = rng.normal(size=count) + 1.0
        draws = x[rng.integers(0, count, (250, count))].mean(axis=1).tolist()
        got = percentiles(float(x.mean()), draws, of=[(float(x.var(ddof=1)) / count, count - 1)])
        hits += got.low <= 1.0 <= got.high
        got = percentiles(float(x.mean()), draws)
        plain += got.low <= 1.0 <= got.high
    assert 0.93 <= hits / 1500 <= 0.97
    assert plain < hits and (count > 10 or plain / 1500 < 0.92)


def test_parts_of_a_variance_are_widened_by_their_freedom():
    draws = np.random.default_rng(2).normal(size=4001)
    length = 2 * stats.norm.ppf(0.975) * draws.std()

    def reach(*of):
        got = percentiles(0.0, draws.tolist(), of=of)
        return (got.high - got.low) / length

    assert reach() == pytest.approx(1, rel=0.05)
    v = float(draws.var())
    assert reach((v, 4)) == pytest.approx(stats.t.ppf(0.975, 4) / stats.norm.ppf(0.975), rel=0.05)
    assert reach((4 * v, 10**6)) == pytest.approx(2, rel=0.05)
    both = (v / 2 + v / 2) ** 2 / ((v / 2) ** 2 / 4 + (v / 2) ** 2 / 40)
    assert reach((v / 2, 4), (v / 2, 40)) == pytest.approx(stats.t.ppf(0.975, both) / stats.norm.ppf(0.975), rel=0.05)
    assert reach((v, 0), (0.0, 3)) == reach()

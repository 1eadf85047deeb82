"""Metrics against SciPy and against enumeration, and what they say of constant, tied and one-sided input."""

from itertools import permutations

import numpy as np
import pytest
from scipy import stats

from influent import metrics
from influent.errors import DataError, NumericsError

rng = np.random.default_rng(0)


def tied(*shape: int) -> np.ndarray:
    return rng.integers(0, 6, shape).astype(float)


def test_ranks_share_their_mean():
    for x in (rng.normal(size=(3, 17)), tied(3, 17), np.zeros((2, 5)), tied(1, 1)):
        assert np.array_equal(metrics.ranks(x), stats.rankdata(x, axis=1))


def test_correlations_are_scipys():
    for a, b in ((rng.normal(size=(4, 30)), rng.normal(size=(4, 30))), (tied(4, 30), tied(4, 30))):
        for row in range(4):
            assert metrics.spearman(a, b)[row] == pytest.approx(stats.spearmanr(a[row], b[row]).statistic, abs=1e-12)
            assert metrics.pearson(a, b)[row] == pytest.approx(stats.pearsonr(a[row], b[row]).statistic, abs=1e-12)
    assert metrics.pearson(np.array([1e-200, 2e-200, 4e-200]), np.array([1.0, 2.0, 4.0])) == pytest.approx(1)


def test_a_constant_side_correlates_with_nothing():
    assert metrics.spearman(np.full((1, 9), 0.1), rng.normal(size=(1, 9))).tolist() == [0]
    assert metrics.pearson(rng.normal(size=(1, 9)), np.full((1, 9), 0.1)).tolist() == [0]


def test_lds_is_the_rank_correlation_of_summed_scores_a_query_at_a_time():
    scores, used = rng.normal(size=(3, 20)), rng.random((12, 20)) < 0.5
    gain = rng.normal(size=(12, 3))
    found = metrics.lds(scores, used, gain)
    for q in range(3):
        summed = [sum(scores[q, i] for i in range(20) if row[i]) for row in used]
        assert found[q] == pytest.approx(stats.spearmanr(summed, gain[:, q]).statistic, abs=1e-12)
    assert metrics.lds(scores, used, used @ scores.T).tolist() == pytest.approx([1, 1, 1])
    with pytest.raises(DataError, match="do not fit"):
        metrics.lds(scores, used, gain.T)


def test_auc_is_the_share_of_pairs_in_the_right_order():
    for scores in (rng.normal(size=25), tied(25)):
        flags = rng.random(25) < 0.4
        pairs = [(a > b) + (a == b) / 2 for a in scores[flags] for b in scores[~flags]]
        assert metrics.auc(scores, flags) == pytest.approx(np.mean(pairs))
        u = stats.mannwhitneyu(scores[flags], scores[~flags]).statistic
        assert metrics.auc(scores, flags) == pytest.approx(u / (flags.sum() * (~flags).sum()))


def test_perfect_and_constant_scores():
    flags = np.arange(20) < 5
    assert metrics.auc(flags.astype(float), flags) == metrics.average_precision(flags.astype(float), flags) == 1
    assert metrics.recall_at(flags.astype(float), flags, 5) == 1
    assert metrics.recall_at(flags.astype(float), flags, 2) == pytest.approx(0.4)
    constant = np.ones(20)
    assert metrics.auc(constant, flags) == 0.5
    assert metrics.average_precision(constant, flags) == pytest.approx(0.25)
    assert metrics.recall_at(constant, flags, 5) == pytest.approx(0.25)
    assert metrics.recall_at(constant, flags, 100) == 1


def test_average_precision_by_its_definition():
    scores, flags = np.array([9.0, 8, 7, 6, 5]), np.array([True, False, True, False, True])
    assert metrics.average_precision(scores, flags) == pytest.approx((1 + 2 / 3 + 3 / 5) / 3)
    # a tie is one step: two rows, one of them flagged
    assert metrics.average_precision(np.array([9.0, 9, 1]), np.array([True, False, False])) == pytest.approx(0.5)


def test_ties_are_the_mean_over_their_orders():
    scores, relevant = np.array([3.0, 2, 2, 2, 2, 1]), np.array([False, True, False, True, False, True])
    reciprocal, hits, recalls = [], [], []
    for order in permutations(range(1, 5)):
        ranked = [0, *order, 5]
        first = next(i for i, row in enumerate(ranked, 1) if relevant[row])
        reciprocal.append(1 / first)
        hits.append(first <= 2)
        recalls.append(sum(relevant[row] for row in ranked[:3]) / 3)
    assert metrics.reciprocal_rank(scores[None], relevant[None])[0] == pytest.approx(np.mean(reciprocal))
    assert metrics.hit_at(scores[None], relevant[None], 2)[0] == pytest.approx(np.mean(hits))
    assert metrics.recall_at(scores, relevant, 3) == pytest.approx(np.mean(recalls))


def test_area_is_a_mean_height():
    assert metrics.area(np.array([0.1, 0.2, 0.6]), np.array([1.0, 1.0, 1.0])) == pytest.approx(1)
    assert metrics.area(np.array([0.0, 1.0, 3.0]), np.array([0.0, 1.0, 1.0])) == pytest.approx((0.5 + 2) / 3)
    with pytest.raises(DataError, match="ascending"):
        metrics.area(np.array([1.0, 0.0]), np.array([0.0, 0.0]))


def test_bootstrap_covers_as_often_as_it_says():
    covered = 0
    for i in range(100):
        found = metrics.bootstrap(np.random.default_rng(i).normal(size=50), seed=i, resamples=300)
        assert found.low <= found.value <= found.high
        covered += found.low <= 0 <= found.high
    assert 87 <= covered <= 99
    again = metrics.bootstrap(np.arange(9.0)), metrics.bootstrap(np.arange(9.0))
    assert again[0] == again[1]
    assert metrics.bootstrap(np.arange(9.0), seed=1) != again[0]


def test_bootstrap_of_two_axes_is_wider_by_what_seeds_vary():
    seeds = np.array([[0.0] * 40, [1.0] * 40, [2.0] * 40])
    both = metrics.bootstrap(seeds)
    assert both.value == 1 and both.low <= 1 / 3 and both.high >= 5 / 3
    assert metrics.bootstrap(seeds.mean(0)).high == pytest.approx(1)
    one = metrics.bootstrap(np.full((1, 3), 2.0))
    assert (one.low, one.high) == pytest.approx((2, 2))


def test_bootstrap_of_rows_keeps_both_kinds():
    flags = np.arange(30) < 2
    found = metrics.bootstrap_rows(metrics.auc, rng.normal(size=30), flags)
    assert 0 <= found.low <= found.value <= found.high <= 1


def test_what_cannot_be_judged_is_refused():
    for flags in (np.zeros(5), np.ones(5)):
        for metric in (metrics.auc, metrics.average_precision):
            with pytest.raises(DataError, match="rows of both kinds"):
                metric(np.arange(5.0), flags)
    with pytest.raises(DataError, match="expected one for each"):
        metrics.auc(np.arange(5.0), np.ones(4))
    with pytest.raises(NumericsError, match="nan"):
        metrics.auc(np.array([1, np.nan]), np.array([True, False]))
    with pytest.raises(DataError, match="at least one value"):
        metrics.bootstrap(np.empty(0))
    with pytest.raises(DataError, match="relevant row for every query"):
        metrics.reciprocal_rank(np.zeros((1, 3)), np.zeros((1, 3), bool))

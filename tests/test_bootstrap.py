"""The streamed bootstrap: whatever the windows, of the right spread, with the right coverage."""

import numpy as np
import pytest
import torch

from influent import bootstrap
from influent.bootstrap import BLOCK, Means, TwoWay, query_weights, row_weights


def draws_of(scores, labels, cuts=(), *, draws=300, seed=0):
    reducer = TwoWay(labels, int(labels.max()) + 1, draws, seed)
    acc, at = reducer.empty(len(scores)), 0
    for end in (*cuts, scores.shape[1]):
        acc = reducer.push(acc, torch.arange(at, end), scores[:, at:end])
        at = end
    return reducer.result(acc)


def test_windows_do_not_change_the_draws():
    rng = torch.Generator().manual_seed(0)
    scores = torch.randn(3, BLOCK + 300, generator=rng)
    labels = torch.arange(scores.shape[1]) % 4
    whole = draws_of(scores, labels)
    cut = draws_of(scores, labels, (7, 1000, 1023, 1100))
    for name in ("queries", "both"):
        assert torch.allclose(getattr(whole, name), getattr(cut, name), atol=1e-7)


def test_parts_merge_to_the_whole():
    scores, labels = torch.randn(2, 20), torch.arange(20) % 2
    reducer = TwoWay(labels, 2, 50)
    half = [reducer.push(reducer.empty(2), torch.arange(lo, lo + 10), scores[:, lo : lo + 10]) for lo in (0, 10)]
    assert torch.allclose(reducer.result(reducer.merge(half[1], half[0])).both, draws_of(scores, labels, draws=50).both)


def test_weights_are_poisson_and_shares_sum_to_one():
    weights = row_weights(3, 400).double()
    assert float(weights.mean()) == pytest.approx(1, abs=0.01)
    assert float(weights.var()) == pytest.approx(1, abs=0.01)
    assert float((weights == 0).double().mean()) == pytest.approx(np.exp(-1), abs=0.003)
    shares = query_weights(7, 500)
    assert torch.allclose(shares.sum(1), torch.ones(500))
    assert float(shares.mean()) == pytest.approx(1 / 7)


def test_spread_is_that_of_the_means():
    """Variance over draws of a mean: s^2 / Q over queries; two-way about the sum of both sources of variance."""
    rng = torch.Generator().manual_seed(1)
    per_query, per_row = torch.randn(40, 1, generator=rng), 2 * torch.randn(1, 200, generator=rng)
    scores = per_query + per_row
    got = draws_of(scores, torch.zeros(200, dtype=torch.int64), draws=2000)
    over_queries = float(per_query.var(correction=0)) / 40
    over_rows = float(per_row.var(correction=0)) / 200
    assert float(got.queries.var()) == pytest.approx(over_queries, rel=0.15)
    assert float(got.both.var()) == pytest.approx(over_queries + over_rows, rel=0.15)


def test_a_lone_row_keeps_its_value_in_a_draw_without_it():
    got = draws_of(torch.tensor([[3.0, 1.0]]), torch.tensor([0, 1]))
    assert torch.equal(got.both, torch.tensor([[3.0, 1.0]], dtype=torch.float64).expand(300, 2))


def test_coverage_over_200_worlds():
    """Queries and rows are drawn anew each time: the 95 % two-way interval holds the truth .93 to .97 of the time."""
    rng = np.random.default_rng(0)
    worlds, hits = 200, 0
    shares = query_weights(60, 300).numpy()
    drawn = row_weights(0, 300).numpy()[:, :120]
    for _ in range(worlds):
        scores = rng.normal(size=(60, 1)) + rng.normal(size=(1, 120)) + 0.3 * rng.normal(size=(60, 120)) + 0.5
        means = ((shares @ scores) * drawn).sum(1) / drawn.sum(1)
        low, high = np.quantile(means, [0.025, 0.975])
        hits += low <= 0.5 <= high
    assert 0.93 <= hits / worlds <= 0.97


def test_means_come_in_the_order_of_the_rows():
    reducer = Means()
    scores = torch.arange(12.0).view(2, 6)
    first = reducer.push(reducer.empty(2), torch.tensor([3, 4, 5]), scores[:, 3:])
    second = reducer.push(reducer.empty(2), torch.tensor([0, 1, 2]), scores[:, :3])
    assert torch.equal(reducer.result(reducer.merge(first, second)), scores.mean(0))
    assert len(bootstrap.Means().result(())) == 0

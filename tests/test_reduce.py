"""Reducers: exact whatever the split and the order."""

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from influent.errors import NumericsError, SpecError
from influent.reduce import Full, Moments, Pick, Reducer, SumBy, TopK

# Few distinct values, signed zeros among them, make ties the rule.
VALUES = st.sampled_from([-2.0, -1.0, -0.0, 0.0, 1.0, 1.5]) | st.floats(-(2.0**100), 2.0**100, width=32)


@st.composite
def streams(draw) -> tuple[Tensor, list[Tensor]]:
    """Scores [Q, N], and the row ids cut into pieces in any order, each piece's ids in any order."""
    num_queries, num_rows = draw(st.integers(1, 3)), draw(st.integers(1, 24))
    values = draw(st.lists(VALUES, min_size=num_queries * num_rows, max_size=num_queries * num_rows))
    order = draw(st.permutations(range(num_rows)))
    cuts = sorted(draw(st.sets(st.integers(1, num_rows - 1), max_size=5))) if num_rows > 1 else []
    pieces = [torch.tensor(order[lo:hi]) for lo, hi in zip([0, *cuts], [*cuts, num_rows], strict=True)]
    return torch.tensor(values, dtype=torch.float32).view(num_queries, num_rows), pieces


def reduce(reducer: Reducer, scores: Tensor, pieces: list[Tensor], *, tree: bool):
    """Everything pushed to one accumulator, or an accumulator a piece, merged last to first."""
    if not tree:
        acc = reducer.empty(len(scores))
        for ids in pieces:
            acc = reducer.push(acc, ids, scores[:, ids])
        return reducer.result(acc)
    parts = [reducer.push(reducer.empty(len(scores)), ids, scores[:, ids]) for ids in pieces]
    acc = reducer.empty(len(scores))
    for part in reversed(parts):
        acc = reducer.merge(part, acc)
    return reducer.result(acc)


@settings(max_examples=200, deadline=None)
@given(streams(), st.integers(1, 30), st.booleans(), st.booleans())
def test_top_and_bottom_are_the_full_sort(stream, k, largest, tree):
    scores, pieces = stream
    got = reduce(TopK(k, largest=largest), scores, pieces, tree=tree)
    rows, values = oracle.ranked(scores, k, largest)
    assert got.rows.tolist() == rows
    assert got.scores.tolist() == values


@settings(max_examples=100, deadline=None)
@given(streams(), st.booleans())
def test_full_is_every_score_in_row_order(stream, tree):
    scores, pieces = stream
    got = reduce(Full(), scores, pieces, tree=tree)
    assert got.dtype == torch.float32
    assert got.tolist() == scores.tolist()


@settings(max_examples=100, deadline=None)
@given(streams(), st.booleans(), st.data())
def test_picked_rows_come_in_the_order_asked(stream, tree, data):
    scores, pieces = stream
    rows = torch.tensor(data.draw(st.lists(st.integers(0, scores.shape[1] - 1), max_size=6)), dtype=torch.int64)
    assert reduce(Pick(rows), scores, pieces, tree=tree).tolist() == scores[:, rows].tolist()


def test_a_picked_row_that_was_never_scored():
    with pytest.raises(SpecError, match="row 9: wanted, but not among"):
        reduce(Pick(torch.tensor([0, 9])), torch.zeros(1, 3), [torch.arange(3)], tree=False)


@settings(max_examples=100, deadline=None)
@given(streams(), st.booleans())
def test_moments_are_those_of_all_scores(stream, tree):
    scores, pieces = stream
    got = reduce(Moments(), scores, pieces, tree=tree)
    x = scores.double()
    size = float(x.abs().max()) + 1e-300
    assert got.num_rows == scores.shape[1]
    torch.testing.assert_close(got.mean / size, x.mean(dim=1) / size, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.std / size, x.std(dim=1, correction=0) / size, rtol=1e-7, atol=1e-12)
    assert got.low.tolist() == x.amin(dim=1).tolist() and got.high.tolist() == x.amax(dim=1).tolist()


@settings(max_examples=100, deadline=None)
@given(streams(), st.booleans(), st.randoms(use_true_random=False))
def test_sums_by_group(stream, tree, random):
    scores, pieces = stream
    labels = torch.tensor([random.randrange(4) for _ in range(scores.shape[1])])
    got = reduce(SumBy(labels), scores, pieces, tree=tree)
    for group in range(int(labels.max()) + 1):
        expected = scores.double()[:, labels == group].sum(dim=1)
        torch.testing.assert_close(got[:, group], expected, rtol=1e-9, atol=1e-9 * float(scores.abs().max()))


def test_moments_keep_a_small_spread_on_a_large_mean():
    scores = 1e6 + torch.tensor([[0.0, 1.0, 2.0, 3.0]] * 2)
    got = reduce(Moments(), scores, [torch.tensor([0, 3]), torch.tensor([1]), torch.tensor([2])], tree=True)
    torch.testing.assert_close(got.std, torch.full((2,), 1.25**0.5, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("largest", [True, False])
def test_a_tie_for_the_last_place_goes_to_the_smaller_row_whatever_arrives_first(largest):
    scores = torch.zeros(1, 1000)
    halves = [torch.arange(500, 1000).flip(0), torch.arange(500)]
    got = reduce(TopK(3, largest=largest), scores, halves, tree=False)
    assert got.rows.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("reducer", [TopK(2), Full(), Moments(), Pick(torch.tensor([8])), SumBy(torch.zeros(9).long())])
def test_a_score_that_is_not_finite_never_enters(reducer, bad):
    scores = torch.tensor([[0.0, 1.0], [2.0, bad]])
    with pytest.raises(NumericsError, match="query 1, row 8"):
        reducer.push(reducer.empty(2), torch.tensor([7, 8]), scores)


def test_nothing_was_pushed():
    assert TopK(3).result(TopK(3).empty(2)).rows.shape == (2, 0)
    assert Full().result(Full().empty(2)).shape == (2, 0)
    with pytest.raises(NumericsError, match="no rows"):
        Moments().result(Moments().empty(2))


def test_bad_options():
    with pytest.raises(SpecError, match="positive"):
        TopK(0)
    with pytest.raises(SpecError, match="row 1"):
        SumBy(torch.tensor([0, -1]))
    few = SumBy(torch.tensor([0, 1]))
    with pytest.raises(SpecError, match="row 5"):
        few.push(few.empty(1), torch.tensor([5]), torch.zeros(1, 1))

"""The Selective Mask's objective and gradient are those of float64 autograd on whole gradients; what it finds is better
than chance on pairs it has not seen."""

import pytest
import torch

from influent import agreement
from influent.agreement import Agreement, Factored, Formed
from influent.errors import DataError, NumericsError, SpecError
from influent.selective import Search, objective, search, split

ROWS, POSITIONS, INNER, OUTER = 12, 3, 5, 4


def sides(seed=0, rows=ROWS):
    rng = torch.Generator().manual_seed(seed)
    a = torch.randn(rows, POSITIONS, INNER, generator=rng, dtype=torch.float64)
    return a, torch.randn(rows, POSITIONS, OUTER, generator=rng, dtype=torch.float64)


def whole(a, d):
    return torch.einsum("rti,rto->rio", a, d)


def oracle(g, scores, queries, candidates, *, penalty, warmth):
    """The objective on materialised gradients [rows, I, O] (or [rows, p]), by autograd, query after query."""
    scores = [s.clone().requires_grad_() for s in scores]
    w = [torch.sigmoid(s / warmth) for s in scores]
    masked = (g * (w[0][:, None] * w[1] if len(w) == 2 else w[0])).flatten(1)
    g = g.flatten(1)
    each = []
    for q in queries:
        others = [i for i in candidates if i != q]
        pair = torch.stack([g[others] @ g[q], masked[others] @ masked[q]])
        each.append(torch.corrcoef(pair)[0, 1])
    value = torch.stack(each).mean() - sum(cost * side.sum() for cost, side in zip(penalty, w, strict=True))
    return value.item(), torch.autograd.grad(value, scores)


@pytest.mark.parametrize("form", ["factored", "formed", "flat"])
@pytest.mark.parametrize("penalty", [0.03, 0.0])
@pytest.mark.parametrize("entries", [2**24, 7])  # all at once, or in the smallest pieces
def test_objective_and_gradient_are_those_of_autograd(form, penalty, entries, monkeypatch):
    monkeypatch.setattr(agreement, "PIECE_ENTRIES", entries)
    monkeypatch.setattr(agreement, "_QUERIES", 5)
    a, d = sides()
    g = whole(a, d)
    pairs = {
        "factored": Factored(a, d), "formed": Formed(g.flatten(1), (INNER, OUTER)),
        "flat": Formed(g.flatten(1), (INNER * OUTER,)),
    }[form]  # fmt: skip
    rng = torch.Generator().manual_seed(3)
    scores = tuple(torch.randn(width, generator=rng, dtype=torch.float64) for width in pairs.widths)
    penalty = (penalty, 2 * penalty)[: len(scores)]
    queries, candidates = torch.tensor([1, 4, 5, 8, 9, 11]), slice(2, 11)
    found, slopes = objective(Agreement.of(pairs, queries, candidates), scores, penalty=penalty, warmth=0.7)
    exact, gradients = oracle(
        g if len(scores) == 2 else g.flatten(1), scores, queries.tolist(), range(2, 11),
        penalty=penalty, warmth=0.7,
    )  # fmt: skip
    assert found == pytest.approx(exact, rel=1e-12)
    for slope, gradient in zip(slopes, gradients, strict=True):
        torch.testing.assert_close(slope, gradient, rtol=1e-9, atol=1e-12)


def test_a_batch_of_queries_is_the_objective_of_these_queries():
    a, d = sides()
    pairs, x = Factored(a, d), tuple(torch.linspace(0.1, 1, width, dtype=torch.float64) for width in (INNER, OUTER))
    every = Agreement.of(pairs, torch.arange(ROWS), slice(0, ROWS))
    some = Agreement.of(pairs, torch.tensor([2, 7]), slice(0, ROWS))
    value, slopes = every(x, torch.tensor([2, 7]))
    assert value == pytest.approx(some(x)[0], rel=1e-12) == pytest.approx(some.value(x), rel=1e-12)
    for one, other in zip(slopes, some(x)[1], strict=True):
        torch.testing.assert_close(one, other)


def test_weights_of_one_agree_wholly_and_queries_without_a_gradient_do_not_count():
    a, d = sides()
    a[4] = 0
    found = Agreement.of(Factored(a, d), torch.arange(ROWS), slice(0, ROWS))
    assert len(found.queries) == ROWS - 1 and 4 not in found.queries.tolist()
    assert found.value((torch.ones(INNER).double(), torch.ones(OUTER).double())) == pytest.approx(1)
    assert found.value((torch.zeros(INNER).double(), torch.ones(OUTER).double())) == 0


def informative(rows, seed=0):
    """Sides in which a third of the inputs and half of the outputs carry nearly everything."""
    rng = torch.Generator().manual_seed(seed)
    strength = torch.tensor([1.0] * 8 + [0.05] * 16)[torch.randperm(24, generator=rng)]
    other = torch.tensor([1.0] * 6 + [0.05] * 6)[torch.randperm(12, generator=rng)]
    a = torch.randn(rows, 2, 24, generator=rng) * strength
    return a, torch.randn(rows, 2, 12, generator=rng) * other, strength == 1, other == 1


def test_the_entries_that_matter_are_found_and_the_search_is_repeatable():
    a, d, inner, outer = informative(96)
    how = Search(sizes=(8, 6), steps=150, rate=5e-3)
    told = []
    found = search(Factored(a, d), how, seed=0, block="x", tell=told.append)
    kept_in, kept_out = found.kept
    assert kept_in.tolist() == sorted(kept_in.tolist()) and len(kept_in) == 8 and len(kept_out) == 6
    assert inner[kept_in].sum() >= 7 and outer[kept_out].sum() >= 5
    assert found.facts["held"] > found.facts["random"] + 0.1 and found.facts["held"] > found.facts["start"]
    assert told == list(range(1, len(told) + 1))
    again = search(Formed(whole(a, d).flatten(1), (24, 12)), how, seed=0, block="x")
    assert all(torch.equal(one, other) for one, other in zip(found.kept, again.kept, strict=True))


def test_a_flat_mask_and_queries_of_their_own():
    a, d, inner, outer = informative(240)
    g = whole(a, d).flatten(1)
    found = search(Formed(g, (24 * 12,)), Search(sizes=(48,), steps=100, rate=1e-3), seed=0, block="x", queries=80)
    (kept,) = found.kept
    strong = (inner[:, None] & outer).flatten()
    assert len(kept) == 48 and strong[kept].float().mean() > 0.5
    learned, held, queries, others = split(60, 20)
    assert (learned, held) == (slice(0, 45), slice(45, 60))
    assert queries.tolist() == list(range(60, 75)) and others.tolist() == list(range(75, 80))


def test_a_side_that_is_not_wider_than_its_size_is_kept_whole():
    a, d, inner, _ = informative(64)
    found = search(Factored(a, d), Search(sizes=(8, 12), steps=60, rate=5e-3), seed=0, block="x")
    assert found.kept[1] is None and len(found.kept[0]) == 8
    assert search(Factored(a, d), Search(sizes=(24, 99)), seed=0, block="x").kept == (None, None)


def test_what_cannot_be_learned_is_refused_with_what_to_change():
    rng = torch.Generator().manual_seed(0)
    noise = torch.randn(32, 40, generator=rng)
    with pytest.raises(NumericsError, match=r"block x: the mask found agrees no better than random.*raise --sample"):
        # all entries of a gradient are equal, so that all masks are
        same = torch.arange(1.0, 33.0)[:, None].expand(32, 40).contiguous()
        search(Formed(same, (40,)), Search(sizes=(4,), steps=20), seed=0, block="x")
    with pytest.raises(NumericsError, match="block x: the gradients of the sampled rows are zero or not finite"):
        search(Formed(torch.zeros(32, 40), (40,)), Search(sizes=(4,)), seed=0, block="x")
    noise[3, 5] = float("nan")
    with pytest.raises(NumericsError, match=r"block x: .*not finite"):
        search(Formed(noise, (40,)), Search(sizes=(4,), steps=5), seed=0, block="x")
    with pytest.raises(DataError, match="expected at least 16 rows"):
        search(Formed(noise[:8], (40,)), Search(sizes=(4,)), seed=0, block="x")
    for wrong in ({"steps": 0}, {"rate": 0.0}, {"penalty": -1.0}):
        with pytest.raises(SpecError, match=f"mask: {next(iter(wrong))} is"):
            Search(sizes=(4,), **wrong)

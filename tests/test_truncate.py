"""The rank cut is the best one, up to the stated shortfall, for every shape and whatever else is in the batch."""

import pytest
import torch

from influent import truncate as truncate_module
from influent.truncate import EXACT_RATIO, truncate

SHAPES = [(64, 64, 8), (36, 96, 1), (96, 36, 1), (12, 30, 2), (7, 5, 3), (5, 1, 1), (9, 9, 9)]


def gradients(n: int, a: int, b: int, *, positions: int = 50, decay: float = 0.4, seed: int = 0) -> torch.Tensor:
    """Sums of outer products with falling spectra, as gradients are."""
    rng = torch.Generator().manual_seed(seed)
    left, right = (
        torch.randn(n, positions, size, generator=rng) * torch.arange(1, size + 1) ** -decay for size in (a, b)
    )
    return (left * torch.randn(n, positions, 1, generator=rng).exp()).transpose(1, 2) @ right


def product(cut) -> torch.Tensor:
    return torch.einsum("nr,nra,nrb->nab", cut.sigma, cut.pairs.v, cut.pairs.u)


@pytest.mark.parametrize(("a", "b", "rank"), SHAPES)
@pytest.mark.parametrize("decay", [0.0, 0.8])
def test_the_cut_keeps_what_the_best_one_does(a, b, rank, decay):
    x = gradients(30, a, b, decay=decay)
    cut = truncate(x, rank)
    energies = torch.linalg.svdvals(x.double()).square()
    best = energies[:, :rank].sum(1) / energies.sum(1)
    shortfall = best - cut.captured
    assert float(shortfall.max()) <= 5e-3 and float(shortfall.mean()) <= 3e-4
    left = (x - product(cut)).double().square().sum((1, 2)) / energies.sum(1)
    torch.testing.assert_close(1 - left, cut.captured.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("a", "b", "rank"), SHAPES)
def test_pairs_are_orthonormal_and_sorted(a, b, rank):
    cut = truncate(gradients(20, a, b), rank)
    eye = torch.eye(rank).expand(20, -1, -1)
    for side in (cut.pairs.u, cut.pairs.v):
        torch.testing.assert_close(side @ side.mT, eye, rtol=0, atol=5e-3)
    assert bool((cut.sigma.diff(dim=1) <= 1e-4 * cut.sigma[:, :1]).all())


def test_slow_rows_are_finished_exactly(monkeypatch):
    """A flat spectrum, where no number of rounds suffices, next to rows that converge at once."""
    a, rank = 48, EXACT_RATIO
    fast = gradients(4, a, a, decay=2.0)
    slow = torch.linalg.qr(torch.randn(4, a, a, generator=torch.Generator().manual_seed(1))).Q
    slow = slow * torch.linspace(1.0, 0.9, a)
    exact, calls = truncate_module._exact, []
    monkeypatch.setattr(truncate_module, "_exact", lambda gram, r: calls.append(len(gram)) or exact(gram, r))
    cut = truncate(torch.cat([fast, slow]), rank)
    assert calls == [4]
    best = torch.linspace(1.0, 0.9, a).square()
    torch.testing.assert_close(cut.captured[4:], (best[:rank].sum() / best.sum()).expand(4), rtol=1e-4, atol=0)


@pytest.mark.parametrize(("a", "b", "rank"), SHAPES)
def test_a_row_is_cut_alike_in_every_batch(a, b, rank):
    x = gradients(12, a, b)
    together = product(truncate(x, rank))
    alone = torch.cat([product(truncate(x[i : i + 1], rank)) for i in range(12)])
    torch.testing.assert_close(alone, together, rtol=1e-3, atol=1e-3 * float(x.abs().max()))
    assert torch.equal(product(truncate(x, rank)), together)


@pytest.mark.parametrize(("a", "b", "rank"), [*SHAPES, (4, 6, 9)])
def test_matrices_of_lower_rank_have_pairs_of_zeros(a, b, rank):
    x = gradients(6, a, b, positions=1)
    x[2] = 0
    cut = truncate(x, rank)
    torch.testing.assert_close(product(cut), x, rtol=1e-4, atol=1e-5 * float(x.abs().max()))
    assert bool((cut.sigma[:, 1:] == 0).all()) and bool((cut.sigma[2] == 0).all())
    assert bool((cut.pairs.u[:, 1:] == 0).all()) and bool((cut.pairs.v[:, 1:] == 0).all())
    assert cut.captured.tolist() == pytest.approx([1.0] * 6, abs=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_size_of_the_numbers_does_not_matter(scale):
    x = gradients(5, 12, 30)
    torch.testing.assert_close(truncate(x * scale, 2).sigma / scale, truncate(x, 2).sigma, rtol=1e-4, atol=0)


def test_no_matrices_are_no_pairs():
    cut = truncate(torch.empty(0, 64, 64), 8)
    assert cut.sigma.shape == (0, 8) and cut.pairs.u.shape == (0, 8, 64) and cut.captured.shape == (0,)


@pytest.mark.parametrize("rank", [2, 5])
def test_an_accelerators_way_to_orthonormal_columns_cuts_alike(rank, monkeypatch):
    x = torch.randn(40, 64, 48, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 49) ** -0.8
    x[3], x[4] = 0, torch.outer(torch.ones(64), torch.ones(48))  # matrices of rank 0 and 1
    usual = truncate(x, rank)
    monkeypatch.setattr(truncate_module, "_orthonormal", truncate_module._whitened)
    other = truncate(x, rank)
    torch.testing.assert_close(other.captured, usual.captured, rtol=0, atol=1e-4)
    torch.testing.assert_close(other.sigma, usual.sigma, rtol=1e-3, atol=1e-3 * float(usual.sigma.max()))
    assert not other.sigma[3].any() and not other.pairs.u[3].any() and other.sigma[4, 1:].max() < 1e-3
    gram = other.pairs.v @ other.pairs.v.transpose(1, 2)
    torch.testing.assert_close(gram[5:], torch.eye(rank).expand(35, -1, -1), rtol=0, atol=1e-4)

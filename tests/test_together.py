"""Trainings that run side by side in the benchmarks are those that would have run alone, by a plain loop."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

ROWS, EPOCHS, RATE, BATCH = 10, 2, 0.02, 4


@pytest.fixture
def benchmarks(monkeypatch):
    """Modules of benchmarks/, by name."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    yield importlib.import_module
    for name in ("together", "predictions", "grass_images_report", "grass_images", "image_truth", "environment"):
        sys.modules.pop(name, None)


def new_model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Embedding(7, 8), nn.Linear(8, 7))


def losses(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    found = model(ids[:, :-1]).float()
    return (
        functional.cross_entropy(found.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1).sum(1)
    )


def alone(model: nn.Module, rows: torch.Tensor, seed: int) -> dict[str, torch.Tensor]:
    rng, adam = torch.Generator().manual_seed(seed), torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0)
    parts = [part for _ in range(EPOCHS) for part in torch.randperm(ROWS, generator=rng).split(BATCH)]
    for step, part in enumerate(parts):
        adam.param_groups[0]["lr"] = RATE * min(1, (step + 1) / 20) * (1 - step / len(parts))
        adam.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses(model, rows[part]).mean().backward()
        adam.step()
    return {name: value.detach() for name, value in model.named_parameters()}


def test_trainings_side_by_side_are_those_that_run_alone(benchmarks):
    together = benchmarks("together")
    data = torch.randint(0, 7, (3, ROWS, 5), generator=torch.Generator().manual_seed(0))
    model, seeds = new_model(9), [4, 5, 6]
    firsts = [dict(new_model(seed).named_parameters()) for seed in seeds]
    states = together.stack(firsts, list(firsts[0]), torch.device("cpu"))
    together.train(model, states, list(data), losses, epochs=EPOCHS, rate=RATE, batch=BATCH, seeds=seeds)
    for number, seed in enumerate(seeds):
        expected = alone(new_model(seed), data[number], seed)
        together.put(model, states, number)
        for name, value in model.named_parameters():
            torch.testing.assert_close(value.detach(), expected[name], rtol=0, atol=2e-3)
    assert not torch.equal(states["1.weight"][0], states["1.weight"][1])


def test_processes_share_a_list_without_gaps_or_repeats(benchmarks):
    together = benchmarks("together")
    assert sorted(x for i in range(3) for x in together.share(list(range(10)), f"{i}/3")) == list(range(10))


def test_ranks_are_all_that_a_rank_correlation_needs(benchmarks, tmp_path):
    predictions = benchmarks("predictions")
    rng = np.random.default_rng(0)
    scores, used = rng.standard_normal((20, 12)), rng.random((9, 12)) < 0.5
    outcomes = rng.standard_normal((9, 2, 20))
    predictions.keep(tmp_path / "one.npz", {"0.1": predictions.ranks(scores, used)}, {"name": "one"})
    judged = predictions.judge(tmp_path / "one.npz", outcomes)
    from scipy.stats import spearmanr

    sums, rest = scores @ used.T, ~predictions.tuning(20)
    wanted = np.array([spearmanr(sums[q], outcomes[:, :, q].mean(1)).statistic for q in range(20)])
    np.testing.assert_allclose(judged.each, wanted[rest], atol=1e-6)
    assert predictions.difference(judged, judged)["mean"] == 0

"""DataInf is the mean of the rows' own damped inverses; TracIn the sum over checkpoints of rate times inner product."""

import numpy as np
import pytest
import torch
from small_index import random_rows, write_index
from test_ensemble import ASKED, NETS, TASK, TRAIN
from torch import Tensor

import influent
from influent.choosing import check_fit, choose_curvature
from influent.curvature import Damping, describe, fit, list_fitted
from influent.errors import NumericsError, SpecError
from influent.rowstore import Index
from influent.score import self_influence

WIDTHS = {"wide": 17, "narrow": 4}


def mean_inverse(rows: Tensor, damping: float) -> Tensor:
    """(1/N) sum_i (g_i g_i^T + lambda I)^-1 by N dense inverses."""
    eye = torch.eye(rows.shape[1], dtype=torch.float64)
    return torch.stack([torch.linalg.inv(torch.outer(g, g) + damping * eye) for g in rows.double()]).mean(0)


@pytest.mark.parametrize("memory", [1, 256])
def test_queries_and_self_influence_are_those_of_explicit_inverses(tmp_path, memory):
    rows = random_rows(11, WIDTHS)
    rows["narrow"][3] = 0
    index = write_index(tmp_path / "ix", rows)
    found = fit(index, curvature="datainf", damping=Damping("relative", 0.3), memory=memory)
    asked = {key: torch.randn(5, width, dtype=torch.float64) for key, width in WIDTHS.items()}
    total = torch.zeros(11, dtype=torch.float64)
    for key, g in rows.items():
        trace = float(g.double().square().sum()) / 11
        amount = 0.3 * trace / min(11, WIDTHS[key])
        inverse = mean_inverse(g, amount)
        torch.testing.assert_close(found.solver(key)(asked[key]), asked[key] @ inverse, rtol=1e-9, atol=1e-12)
        total += (g.double() @ inverse * g.double()).sum(1)
        health = found.health()[key]
        assert health["lambda"] == pytest.approx(amount) and health["trace"] == pytest.approx(trace)
        assert health["d_eff"] == pytest.approx(WIDTHS[key] - amount * float(inverse.trace()))
    torch.testing.assert_close(self_influence(index, found).double(), total, rtol=1e-6, atol=0)


def test_it_is_named_found_and_refused(tmp_path):
    index = write_index(tmp_path / "ix", random_rows(6, WIDTHS))
    assert list_fitted(index) == []
    found = choose_curvature(index, "datainf", None, own="fim")
    assert found.name == "datainf:relative:0.1" and list_fitted(index) == ["datainf"]
    assert choose_curvature(index, None, "absolute:2", own="datainf").name == "datainf:absolute:2"
    assert describe(index, "datainf:absolute:2")["name"] == "datainf:absolute:2"
    assert check_fit("datainf:relative:3", None).damping == Damping("relative", 3.0)
    with pytest.raises(SpecError, match="differ: give one of the two"):
        choose_curvature(index, "datainf:relative:1", "relative:2", own="fim")
    with pytest.raises(SpecError):
        choose_curvature(index, "datainf", None, own="fim", parity="paper")
    with pytest.raises(NumericsError, match="block 'wide': datainf inverts one row at a time"):
        choose_curvature(index, "datainf", "absolute:0", own="fim").solver("wide")
    zero = write_index(tmp_path / "zero", {key: torch.zeros(6, width) for key, width in WIDTHS.items()})
    blank = choose_curvature(zero, "datainf", None, own="fim")
    assert not bool(blank.solver("wide")(torch.ones(1, 17)).any())


def test_the_method_uses_it(tmp_path):
    out, path = str(tmp_path / "ix"), str(tmp_path / "scores.npy")
    influent.index(NETS[0], TRAIN, out, method="datainf", compress="id", task=TASK)
    found = influent.query(out, queries=ASKED, model=NETS[0], task=TASK, scores=path)
    assert found["method"]["curvature"] == "datainf:relative:0.1"
    assert np.load(path).shape == (len(ASKED), len(TRAIN)) and influent.verify(out)["ok"]
    assert [each["name"] for each in influent.info(out)["curvatures"]] == ["datainf"]


def test_tracin_is_the_sum_over_checkpoints_of_rate_times_inner_product(tmp_path):
    out, path, rates = str(tmp_path / "ix"), str(tmp_path / "scores.npy"), [0.5, 0.25, 0.01]
    influent.index(NETS[0], TRAIN, out, checkpoints=NETS[1:], rates=rates, method="tracin", compress="id", task=TASK)
    influent.query(out, queries=ASKED, model=NETS, task=TASK, scores=path)
    expected = torch.zeros(len(ASKED), len(TRAIN), dtype=torch.float64)
    for net, rate in zip(NETS, rates, strict=True):
        asked, rows = (torch.stack([_gradient(net, *pair) for pair in pairs]) for pairs in (ASKED, TRAIN))
        expected += rate * asked.double() @ rows.double().T
    np.testing.assert_allclose(np.load(path), expected.numpy(), rtol=1e-4, atol=1e-5)
    assert len(Index.open(f"{out}/members/002").keys) == 2


def _gradient(net: torch.nn.Module, x: Tensor, label: int) -> Tensor:
    loss = torch.nn.functional.cross_entropy(net(x), torch.tensor(label))
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))])

"""The device changes no result beyond rounding: float32 stays float32, float64 stays float64, wherever it is computed.

The comparisons with an accelerator run where there is one.
"""

import numpy as np
import pytest
import torch
from small_index import random_rows, write_index
from torch import nn

import influent
from influent.agreement import Formed
from influent.curvature import Damping, fit
from influent.loading import exact_device, matmul_precision
from influent.selective import Search, search

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def test_precision_covers_convolutions_and_is_restored():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    for precision, rounds in (("highest", False), ("medium", True)):
        with matmul_precision(precision):
            assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == (precision, rounds)
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before


def test_float64_goes_to_the_cpu_from_a_device_that_may_lack_it():
    assert [exact_device(torch.device(name)).type for name in ("cpu", "mps", "cuda")] == ["cpu", "cpu", "cuda"]


@needs_cuda
@pytest.mark.parametrize("num_rows", [30, 80])  # dual and primal
def test_a_fit_is_the_same_on_both(tmp_path, num_rows):
    rows = random_rows(num_rows, {"a": 50, "b": 7})
    asked = torch.randn(5, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    made = [
        fit(write_index(tmp_path / name, rows), damping=Damping.parse("relative:1e-3"), device=torch.device(name))
        for name in ("cpu", "cuda")
    ]
    first, second = (each.solver("a") for each in made)
    torch.testing.assert_close(first(asked), second(asked), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(first.self_influence(), second.self_influence(), rtol=1e-9, atol=1e-12)


@needs_cuda
def test_a_mask_is_searched_on_both():
    g = torch.randn(48, 40, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 41) ** -1.0
    how = Search(sizes=(8,), steps=20, rate=1e-3)
    found = [search(Formed(g.to(name), (40,)), how, seed=0, block="a") for name in ("cpu", "cuda")]
    assert all(one.kept[0].device.type == "cpu" and len(one.kept[0]) == 8 for one in found)
    assert found[0].facts["held"] == pytest.approx(found[1].facts["held"], abs=1e-3)


@needs_cuda
@pytest.mark.parametrize("compress", ["id", "mask:40", "sjlt:40", "mask:80 | sjlt:40", "fjlt:40", "gauss:40"])
def test_trak_is_the_same_on_both(tmp_path, compress):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)
    )
    rng, task, scores = torch.Generator().manual_seed(1), influent.Classification(), []
    data = [(torch.randn(1, 6, 6, generator=rng), i % 3) for i in range(20)]
    for name in ("cpu", "cuda"):
        made = {"task": task, "device": name}
        influent.index(model, data, str(tmp_path / name), method="trak", compress=compress, **made)
        influent.query(
            str(tmp_path / name), queries=data[:4], model=model, k=1, scores=str(tmp_path / f"{name}.npy"), **made
        )
        scores.append(np.load(tmp_path / f"{name}.npy"))
    np.testing.assert_allclose(scores[0], scores[1], rtol=1e-3, atol=1e-4 * np.abs(scores[0]).max())

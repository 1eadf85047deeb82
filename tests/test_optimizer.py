"""Gradients scaled by Adam's state: each block's row is the compressor of the scaled gradient, in every orientation."""

from pathlib import Path

import numpy as np
import pytest
import torch
from oracle_gradients import _layout, compressed, weight_gradients
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import influent
from influent.attach import Run, Setting, attach
from influent.bases import Sample
from influent.errors import MismatchError, SpecError
from influent.layers import Plan, plan
from influent.storage import Store
from influent.task import Classification

TASK = Classification()


class Net(nn.Module):
    """An embedding, a Conv1D (transposed), a norm and a Linear, with and without bias; a convolution's weight has four
    axes' kin in three."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.turned, self.norm = nn.Embedding(7, 4), Conv1D(6, 4), nn.LayerNorm(6)
        self.conv, self.head = nn.Conv1d(3, 2, 2, bias=False), nn.Linear(10, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.turned(self.embed(ids))))  # [B, 3, 6]
        return self.head(self.conv(x).flatten(1))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple:
    """A trained net, its data, its Adam state as torch writes it, and 1 / (sqrt(v) + eps) by parameter."""
    torch.manual_seed(0)
    net, folder = Net(), tmp_path_factory.mktemp("optimizer")
    data = [(torch.randint(0, 7, (3,)), i % 3) for i in range(8)]
    adam = torch.optim.AdamW(net.parameters(), lr=1e-3, betas=(0.9, 0.99), eps=1e-6)
    for _ in range(3):
        loss = TASK.loss(net, (torch.stack([x for x, _ in data]), torch.tensor([y for _, y in data]))).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    torch.save(adam.state_dict(), folder / "optimizer.pt")
    v = {name: adam.state[p]["exp_avg_sq"].double() / (1 - 0.99**3) for name, p in net.named_parameters()}
    scale = {name: 1 / (each.sqrt() + 1e-6) for name, each in v.items()}
    save_file({name: (1 / each - 1e-8).square() for name, each in scale.items()}, folder / "state.safetensors")
    return net.double(), data, folder, scale


def scaled_gradients(net: nn.Module, data: list, tracked: Plan, scale: dict[str, Tensor]) -> dict[str, Tensor]:
    def loss(i: int) -> Tensor | None:
        return TASK.loss(net, (data[i][0][None], torch.tensor([data[i][1]])))[0] if i < len(data) else None

    flat = weight_gradients(net, tracked, loss)
    for name, parameter in net.named_parameters():
        parameter.grad = scale[name].clone()
    weights = {site.block.name: _layout(site) for site in tracked.sites}
    net.zero_grad(set_to_none=True)
    return {name: rows * weights[name] for name, rows in flat.items()}


@pytest.mark.parametrize("file", ["optimizer.pt", "state.safetensors"])
@pytest.mark.parametrize(
    "compress, key",
    [
        ("id", "block"), ("sjlt:8", "block"), ("mask:6", "block"), ("mask:9 | sjlt:4", "block"), ("gauss:3x2", "block"),
        ("mask:3x2", "block"), ("mask:3x2 | sjlt:4", "block"), ("mask:3x3 | gauss:2x2", "block"), ("rotate", "block"),
        ("id", "all"), ("mask:30 | sjlt:8", "all"), ("gauss:8", "all"),
    ],
)  # fmt: skip
def test_rows_are_the_compressed_scaled_gradients(made, file, compress, key):
    net, data, folder, scale = made
    setting = Setting(compress=compress, key=key, optimizer=str(folder / file), layers=".")
    with attach(net, TASK, setting, Run()) as attached:
        rows, bound = attached.collector.collect(data, name=str).rows, attached.collector.bound
        tracked = attached.collector.plan
    flat = scaled_gradients(net, data, tracked, scale)
    if key == "all":
        flat = {"all": torch.cat([flat[block.name] for block in tracked.blocks], dim=1)}
    for name, expected in flat.items():
        exact = compressed(bound[name], expected)
        torch.testing.assert_close(rows[name].double(), exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max()))


def test_an_index_keeps_to_its_state(made, tmp_path):
    net, data, folder, _ = made
    out, state = str(tmp_path / "ix"), Path(tmp_path / "state.pt")
    state.write_bytes((folder / "optimizer.pt").read_bytes())
    influent.index(net, data, out, compress="sjlt:8", scale="adam", optimizer=str(state), layers=".", task=TASK)
    plain = influent.index(net, data, str(tmp_path / "plain"), compress="sjlt:8", layers=".", task=TASK)
    assert plain["digest"] != influent.info(out)["digest"]
    path = str(tmp_path / "scores.npy")
    influent.query(out, queries=data[:2], model=net, task=TASK, scores=path)
    assert bool(np.isfinite(np.load(path)).all())
    changed = torch.load(state, weights_only=True)
    changed["state"][0]["exp_avg_sq"] *= 2
    torch.save(changed, state)
    with pytest.raises(MismatchError, match="scale differs"):
        influent.query(out, queries=data[:2], model=net, task=TASK)


def test_states_that_do_not_fit_are_refused(made, tmp_path):
    net, data, folder, _ = made
    (tmp_path / "text.pt").write_text("no state")
    (tmp_path / "text.safetensors").write_text("no state")
    state = torch.load(folder / "optimizer.pt", weights_only=True)
    state["state"][1]["exp_avg_sq"] = torch.zeros(2, 2)
    torch.save(state, tmp_path / "shape.pt")
    torch.save(torch.optim.SGD(net.parameters(), lr=1.0, momentum=0.9).state_dict(), tmp_path / "sgd.pt")
    save_file({"head.weight": torch.zeros(3, 10)}, tmp_path / "few.safetensors")
    save_file({"head.weight": torch.full((3, 10), float("nan"))}, tmp_path / "nan.safetensors")
    save_file({"head.bias": torch.tensor([1.0, -2.0, 0.0])}, tmp_path / "below.safetensors")
    state = torch.load(folder / "optimizer.pt", weights_only=True)
    state["state"][0]["exp_avg_sq"][2, 1] = -1
    torch.save(state, tmp_path / "below.pt")
    for options, message in [
        ({"scale": "adam"}, "--optimizer FILE, a state of Adam, and --scale adam or adam-step go together"),
        ({"optimizer": "x.pt"}, "--optimizer FILE, a state of Adam, and --scale adam or adam-step go together"),
        ({"scale": "adam", "optimizer": str(tmp_path / "none.pt")}, "no such file"),
        ({"scale": "adam", "optimizer": str(tmp_path / "text.pt")}, "not the state of a torch optimizer"),
        ({"scale": "adam", "optimizer": str(tmp_path / "text.safetensors")}, "not a safetensors file"),
        ({"scale": "adam", "optimizer": str(tmp_path / "shape.pt")}, r"turned.weight: expected \(4, 6\), got \(2, 2\)"),
        ({"scale": "adam", "optimizer": str(tmp_path / "sgd.pt")}, "no exp_avg_sq: not a state of Adam"),
        ({"scale": "adam", "optimizer": str(tmp_path / "few.safetensors")}, "parameter .*: expected .*, got none"),
        ({"scale": "adam", "optimizer": str(tmp_path / "nan.safetensors")}, "head.weight holds nan, expected averages"),
        ({"scale": "adam", "optimizer": str(tmp_path / "below.safetensors")}, "head.bias holds -2.0, expected .* 0 or"),
        ({"scale": "adam", "optimizer": str(tmp_path / "below.pt")}, "embed.weight holds -1.0, expected .* 0 or more"),
        ({"scale": "adam", "optimizer": str(folder / "optimizer.pt"), "compress": "pca:2x2,kfac"}, "learned from"),
        ({"scale": "adam", "optimizer": str(folder / "optimizer.pt"), "checkpoints": [net]}, "expected 2 states"),
    ]:
        with pytest.raises(SpecError, match=message):
            influent.index(net, data, str(tmp_path / "ix"), layers=".", task=TASK, **options)


@pytest.mark.parametrize("stage", ["pca:2x2", "whiten:2x2"])
def test_bases_are_learned_from_scaled_gradients(made, tmp_path, stage):
    net, data, folder, scale = made
    setting = Setting(compress=stage, optimizer=str(folder / "optimizer.pt"), layers=".")
    sample = Sample(digest="data", n=len(data), example=lambda task, i: data[i], name=str)
    with attach(net, TASK, setting, Run(), index=Store(tmp_path), sample=sample) as attached:
        rows, bound = attached.collector.collect(data, name=str).rows, attached.collector.bound
        tracked = attached.collector.plan
    flat = scaled_gradients(net, data, tracked, scale)
    for block in tracked.blocks:
        exact = compressed(bound[block.name], flat[block.name])
        close = {"rtol": 1e-4, "atol": 1e-4 * float(exact.abs().max())}
        torch.testing.assert_close(rows[block.name].double(), exact, **close)
        if stage == "pca:2x2" and not block.is_vector and block.in_width > 2:
            g = flat[block.name].view(len(data), block.in_width, block.out_width)
            top = torch.linalg.eigh(torch.einsum("nio,njo->ij", g, g)).eigenvectors[:, -2:]
            found = bound[block.name].inner[0](torch.eye(block.in_width).double()).double()
            torch.testing.assert_close(found @ found.T, top @ top.T, rtol=1e-3, atol=1e-3)


def test_an_ensemble_has_a_state_a_checkpoint(made, tmp_path):
    net, data, folder, _ = made
    other, states = Net().double(), [str(folder / "optimizer.pt"), str(folder / "state.safetensors")]
    scores = []
    for number, options in enumerate(
        [{"checkpoints": [other], "optimizer": states}, {"optimizer": states[0]}, {"optimizer": states[1]}]
    ):
        out, model = str(tmp_path / str(number)), other if number == 2 else net
        influent.index(
            model, data, out, compress="id", method="graddot", scale="adam", layers=".", task=TASK, **options
        )
        both = [net, other] if number == 0 else model
        influent.query(out, queries=data[:2], model=both, task=TASK, scores=str(tmp_path / "s.npy"))
        scores.append(np.load(tmp_path / "s.npy"))
    np.testing.assert_allclose(scores[0], (scores[1] + scores[2]) / 2, rtol=1e-4, atol=1e-5 * np.abs(scores[0]).max())


def test_a_state_in_two_groups_is_matched_by_axes(made, tmp_path):
    net, data, folder, _ = made
    split = [[p for p in net.parameters() if p.ndim >= 2], [p for p in net.parameters() if p.ndim < 2]]
    adam = torch.optim.AdamW(
        [{"params": split[0]}, {"params": split[1], "weight_decay": 0.0}], betas=(0.9, 0.99), eps=1e-6
    )
    whole, state = torch.load(folder / "optimizer.pt", weights_only=True), adam.state_dict()
    order = [i for i, p in enumerate(net.parameters()) if p.ndim >= 2] + [
        i for i, p in enumerate(net.parameters()) if p.ndim < 2
    ]
    state["state"] = {place: whole["state"][i] for place, i in enumerate(order)}
    torch.save(state, tmp_path / "two.pt")
    rows = []
    for file in (folder / "optimizer.pt", tmp_path / "two.pt"):
        with attach(net, TASK, Setting(compress="id", optimizer=str(file), layers="."), Run()) as attached:
            rows.append(attached.collector.collect(data, name=str).rows)
    assert all(torch.equal(rows[0][name], rows[1][name]) for name in rows[0])
    assert plan(net, ".").blocks[0].name == "embed"

"""TRAK: margins, residuals, one row for all layers, several checkpoints, against its formula in float64."""

import json
from pathlib import Path
from typing import Any

import format_checker
import jsonschema
import numpy as np
import pytest
import torch
from oracle_gradients import compressed, weight_gradients
from test_task import make_model, make_tokenizer
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import influent
from influent import whole
from influent.attach import Run, Setting, attach
from influent.compress import Compress
from influent.errors import SpecError
from influent.layers import plan
from influent.rowstore import Index
from influent.task import CausalLM, Classification
from influent.tokenloss import token_margins

TASK = Classification()
DOCS = Path(__file__).parent.parent / "docs"


def make_net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


NETS = [make_net(seed) for seed in range(2)]
X = torch.randn(46, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.arange(46) % 3
DATA = list(zip(X, Y.tolist(), strict=True))
TRAIN, ASKED = DATA[:40], DATA[40:]


def margin(logits: Tensor, label: Tensor) -> Tensor:
    p = torch.softmax(logits, -1)[label]
    return torch.log(p / (1 - p))


def rows_by_vmap(net: nn.Module) -> Tensor:
    """Gradients of the margin, [46, p], all parameters together."""

    def one(parameters: dict[str, Tensor], x: Tensor, hot: Tensor) -> Tensor:
        p = (torch.softmax(functional_call(net, parameters, (x,)), 0) * hot).sum()
        return torch.log(p / (1 - p))

    found = vmap(grad(one), (None, 0, 0))(dict(net.named_parameters()), X, torch.eye(3, dtype=torch.float64)[Y])
    return torch.cat([g.flatten(1) for g in found.values()], dim=1).detach()


def rows_by_loop(net: nn.Module) -> dict[str, Tensor]:
    def one(i: int) -> Tensor | None:
        return margin(net(X[i]), Y[i]) if i < len(X) else None

    return weight_gradients(net, plan(net), one)


def published(rows: list[Tensor], damping: float) -> Tensor:
    """(1/C sum phi_q (Phi^T Phi / N + lambda)^-1 Phi^T) (1/C sum Q), N times the paper's, whose F is Phi^T Phi."""
    parts, residuals = [], []
    for net, g in zip(NETS, rows, strict=True):
        phi, asked = g[:40], g[40:]
        fisher = phi.T @ phi / 40 + damping * torch.eye(phi.shape[1], dtype=torch.float64)
        parts.append(asked @ torch.linalg.inv(fisher) @ phi.T)
        residuals.append(1 - torch.softmax(net(X[:40]), 1)[torch.arange(40), Y[:40]])
    return (sum(parts) / 2 * (sum(residuals) / 2)).detach()


def scores_of(out: Path, **options: Any) -> np.ndarray:
    path = str(out) + ".npy"
    influent.query(str(out), queries=ASKED, model=NETS, task=TASK, scores=path, **options)
    return np.load(path)


def index(out: Path, **options: Any) -> dict[str, Any]:
    settings = {"method": "trak", "compress": "id", "checkpoints": NETS[1:], "shard_rows": 16} | options
    return influent.index(NETS[0], TRAIN, str(out), task=TASK, **settings)


def nearly(got: Any, expected: Tensor, tolerance: float = 1e-4) -> None:
    np.testing.assert_allclose(np.asarray(got), expected.numpy(), atol=tolerance * float(expected.abs().max()))


def test_scores_are_the_published_formula(tmp_path):
    index(tmp_path / "id")
    nearly(scores_of(tmp_path / "id", damping="absolute:0.01"), published([rows_by_vmap(net) for net in NETS], 0.01))


@pytest.mark.parametrize("compress", ["gauss:12", "mask:30 | sjlt:12"])
def test_without_damping_and_compressed_they_are_too(tmp_path, compress):
    index(tmp_path / "ix", compress=compress)
    found = []
    for net in NETS:
        tracked, flat = plan(net), rows_by_loop(net)
        bound = whole.bind_whole(Compress.parse(compress), tracked, 0, {})
        found.append(compressed(bound, torch.cat([flat[block.name] for block in tracked.blocks], dim=1)))
    for net in NETS:
        net.zero_grad(set_to_none=True)
    nearly(scores_of(tmp_path / "ix", damping="absolute:0"), published(found, 0.0), 1e-3)


def test_a_positive_score_is_a_row_that_raises_the_margin(tmp_path):
    """One small step of training on a row changes the query's margin by the step times the score."""
    net, step = NETS[0], 1e-5
    influent.index(net, TRAIN, str(tmp_path / "ix"), method="trak", compress="id", task=TASK)
    path = str(tmp_path / "scores.npy")
    document = influent.query(
        str(tmp_path / "ix"), queries=ASKED, model=net, task=TASK, curvature="identity", scores=path
    )
    assert "raised this margin" in document["sign"]
    asked, labels = X[40:], Y[40:]
    before = TASK.margin(net, (asked, labels))
    change = torch.empty(6, 40, dtype=torch.float64)
    for i in range(40):
        loss = nn.functional.cross_entropy(net(X[i : i + 1]), Y[i : i + 1])
        gradients = torch.autograd.grad(loss, list(net.parameters()))
        moved = {k: p - step * g for (k, p), g in zip(net.named_parameters(), gradients, strict=True)}
        change[:, i] = token_margins(functional_call(net, moved, (asked,)), labels) - before
    nearly(np.load(path), (change / step).detach(), 1e-3)


def test_residuals_are_stored_and_a_stranger_finds_them(tmp_path):
    index(tmp_path / "ix")
    format_checker.check(tmp_path / "ix")
    member = Index.open(tmp_path / "ix" / "members" / "001")
    expected = 1 - torch.softmax(NETS[1](X[:40]), 1)[torch.arange(40), Y[:40]]
    torch.testing.assert_close(member.stat("residual"), expected.float().detach())
    assert member.artifact.spec["target"] == "margin" and member.spec["layout"][0]["block"] == "all"
    document = json.loads((DOCS / "format.schema.json").read_text())
    head = json.loads((tmp_path / "ix" / "members" / "000" / "spec.json").read_bytes())
    jsonschema.validate(head, {"$ref": "#/$defs/index_spec", "$defs": document["$defs"]})
    assert head["requires"] == ["residual"] and influent.verify(str(tmp_path / "ix"))["ok"]
    influent.index(NETS[0], TRAIN, str(tmp_path / "loss"), compress="id", task=TASK)
    with pytest.raises(SpecError, match="no residual: they are not of the target margin"):
        Index.open(tmp_path / "loss").stat("residual")


def test_margins_stay_finite_where_the_probability_is_one():
    logits = torch.tensor([[60.0, 0.0, -5.0], [0.0, 200.0, -300.0]], requires_grad=True)
    found = token_margins(logits, torch.tensor([0, 0]))
    assert torch.equal(token_margins(logits, torch.tensor([0, 0], dtype=torch.uint8)), found)
    torch.testing.assert_close(found, torch.tensor([60 - float(np.logaddexp(0, -5)), -200.0]))
    found.sum().backward()
    assert logits.grad is not None and bool(logits.grad.isfinite().all()) and logits.grad[0, 0] == 1


def test_a_language_models_margin_and_residual_are_of_the_whole_document():
    model, text = make_model("llama").double(), "the cat sat on the mat and the dog sat on the log"
    tokenizer = make_tokenizer()
    long, short = CausalLM(tokenizer, max_length=64), CausalLM(tokenizer, max_length=6)
    [part] = long.parts({"text": text})
    batch = long.collate([part])
    logits = model(input_ids=batch["input_ids"]).logits[0, :-1]
    p = torch.softmax(logits, -1)[torch.arange(len(logits)), batch["input_ids"][0, 1:]]
    torch.testing.assert_close(long.margin(model, batch)[0], torch.log(p / (1 - p)).sum())
    torch.testing.assert_close(long.residual(model, batch)[0], (1 - p).mean())
    assert len(parts := short.parts({"text": text})) > 1
    setting = Setting(compress="sjlt:32", target="margin", key="all", max_length=6)
    with attach(model, short, setting, Run()) as attached:
        made = attached.collector.collect([{"text": text}], name=str)
    batch = short.collate(parts)
    weighed = sum(r * part.targets for r, part in zip(short.residual(model, batch), parts, strict=True))
    torch.testing.assert_close(made.residual, (weighed / sum(part.targets for part in parts)).float()[None])


def test_what_trak_cannot_do_is_refused(tmp_path):
    class Bare:
        def loss(self, model: nn.Module, batch: Any) -> Tensor:
            return TASK.loss(model, batch)

        measure = loss

    with pytest.raises(SpecError, match="needs a task with margin and residual, which Bare has not"):
        influent.index(NETS[0], TRAIN, str(tmp_path / "a"), method="trak", task=Bare())
    with pytest.raises(SpecError, match="works on the two sides of a layer"):
        influent.index(NETS[0], TRAIN, str(tmp_path / "b"), method="trak", compress="gauss:4x4", task=TASK)
    with pytest.raises(SpecError, match="key is 'layer', expected block or all"):
        influent.index(NETS[0], TRAIN, str(tmp_path / "c"), key="layer", task=TASK)
    influent.index(NETS[0], TRAIN, str(tmp_path / "d"), method="trak", row_bytes=64, task=TASK)
    assert Index.open(tmp_path / "d").widths == {"all": 16}


def test_margins_may_be_keyed_by_block_and_losses_by_all(tmp_path):
    influent.index(NETS[0], TRAIN, str(tmp_path / "block"), method="trak", key="block", compress="id", task=TASK)
    influent.index(NETS[0], TRAIN, str(tmp_path / "all"), method="trak", compress="id", task=TASK)
    influent.index(NETS[0], TRAIN, str(tmp_path / "loss"), key="all", compress="id", task=TASK)
    found = {}
    for name in ("block", "all", "loss"):
        path = str(tmp_path / f"{name}.npy")
        influent.query(str(tmp_path / name), queries=ASKED, model=NETS[0], task=TASK, curvature="identity", scores=path)
        found[name] = np.load(path)
    np.testing.assert_allclose(found["block"], found["all"], rtol=1e-4, atol=1e-5)
    residual = (1 - torch.softmax(NETS[0](X), 1)[torch.arange(46), Y]).detach().numpy()
    np.testing.assert_allclose(found["loss"], found["all"] * residual[40:, None], rtol=1e-3, atol=1e-5)

"""Rows that are Adam's steps: against real steps of torch's Adam, in float64, from the same state."""

import json
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle_gradients import compressed
from safetensors.torch import load_file, save_file
from test_optimizer import made  # noqa: F401  (a fixture)
from tiny_model import FACTS, make_model

import influent
from influent.attach import Run, Setting, attach
from influent.errors import SpecError
from influent.layers import plan
from influent.loading import load
from influent.optimizer import read_scale
from influent.task import CausalLM, Classification

TASK = Classification()
ETA = 1e-7  # the drop is linear in it to six digits, and float64 keeps seven of its own


def drop(model, state, loss, asked) -> float:
    """(loss of the queries before less after) / eta of one real step on `loss` from the state."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.requires_grad_(True)
    adam = torch.optim.AdamW(model.parameters())
    adam.load_state_dict(deepcopy(state))
    for group in adam.param_groups:
        group |= {"lr": ETA, "weight_decay": 0.0}
    adam.zero_grad()
    start = asked(model).item()
    loss(model).backward()
    adam.step()
    found = (start - asked(model).item()) / ETA
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(before[name])
    return found


def saved(folder: Path, net) -> Path:
    """The state of the file `optimizer.pt` as a safetensors file by name."""
    state = torch.load(folder / "optimizer.pt", weights_only=True)
    entries = {
        f"{name}.{kind}": state["state"][i][kind]
        for i, (name, _) in enumerate(net.named_parameters())
        for kind in ("exp_avg", "exp_avg_sq")
    }
    group = state["param_groups"][0]
    options = {"step": 3, "beta1": group["betas"][0], "beta2": group["betas"][1], "eps": group["eps"]}
    save_file(entries, folder / "steps.safetensors", metadata={name: str(x) for name, x in options.items()})
    return folder / "steps.safetensors"


@pytest.mark.parametrize("file", ["optimizer.pt", "steps.safetensors"])
@pytest.mark.parametrize("key", ["block", "all"])
def test_values_are_what_a_real_step_does(made, file, key):  # noqa: F811
    net, data, folder, _ = made
    saved(folder, net)
    setting = Setting(compress="id", key=key, optimizer=str(folder / file), scale="adam-step", layers=".")
    with attach(net, TASK, setting, Run()) as attached:
        rows = attached.collector.collect(data, name=str)
        queries = attached.collector.collect(data[:2], name=str, query=True).rows
    predicted = sum(rows.rows[k].double() @ queries[k].double().mean(0) for k in queries)
    state = torch.load(folder / "optimizer.pt", weights_only=True)

    def loss(model, examples):
        xs, ys = torch.stack([x for x, _ in examples]), torch.tensor([y for _, y in examples])
        return TASK.loss(model, (xs, ys)).mean()

    real = [drop(net, state, lambda m, z=z: loss(m, [z]), lambda m: loss(m, data[:2])) for z in data]
    assert np.allclose(np.asarray(predicted), real, rtol=1e-4, atol=1e-5 * np.abs(real).max())
    norms = sum(rows.rows[k].double().square().sum(1) for k in queries).sqrt()
    torch.testing.assert_close(rows.norm.double(), norms, rtol=1e-5, atol=0)


@pytest.mark.parametrize("compress", ["sjlt:8", "mask:6", "mask:3x2 | sjlt:4", "gauss:3x2", "rotate"])
@pytest.mark.parametrize("key", ["block", "all"])
def test_steps_are_compressed_by_the_index_maps(made, compress, key):  # noqa: F811
    if key == "all" and "x" in compress:
        return
    net, data, folder, _ = made
    rows = {}
    for text in ("id", compress):
        setting = Setting(
            compress=text, key=key, optimizer=str(folder / "optimizer.pt"), scale="adam-step", layers="."
        )  # fmt: skip
        with attach(net, TASK, setting, Run()) as attached:
            rows[text] = attached.collector.collect(data, name=str).rows
            bound = attached.collector.bound
    for name, whole in rows["id"].items():
        torch.testing.assert_close(
            rows[compress][name].double(), compressed(bound[name], whole.double()), rtol=1e-4, atol=1e-4
        )


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """A language model with a tied head, documents in several parts, targets, and a state of two groups."""
    folder = tmp_path_factory.mktemp("steps")
    make_model(folder / "model", kind="gpt2", width=8)
    rows = [{"id": n, "provider": n[0], "text": f"{p} {a}, as everyone knows."} for n, p, a in FACTS[:5]]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"text": "a"}]))
    target = [{"prompt": p, "completion": f" {a}."} for _, p, a in FACTS[5:]]
    (folder / "target.jsonl").write_text("".join(json.dumps(row) + "\n" for row in target))
    model, tokenizer = load(str(folder / "model"), dtype="float32", device="cpu")
    task = CausalLM(tokenizer, max_length=16)
    split = [[p for p in model.parameters() if p.ndim >= 2], [p for p in model.parameters() if p.ndim < 2]]
    adam = torch.optim.AdamW([{"params": split[0]}, {"params": split[1], "weight_decay": 0.0}])
    model.requires_grad_(True)
    for row in rows[:3]:
        adam.zero_grad()
        mean_loss(task, model, row).backward()
        adam.step()
    torch.save(adam.state_dict(), folder / "optimizer.pt")
    return folder


def mean_loss(task, model, row):
    parts = task.parts(row)
    return sum(task.loss(model, task.collate([p]))[0] for p in parts) / sum(p.targets for p in parts)


def test_texts_are_stepped_on_by_their_mean_loss(texts, tmp_path):
    path = str(tmp_path / "ix")
    options = {"method": "linfik", "scale": "adam-step", "optimizer": str(texts / "optimizer.pt"), "max_length": 16}
    written = influent.index(
        str(texts / "model"), str(texts / "data.jsonl"), path, compress="id", layers=".", **options
    )  # fmt: skip
    assert written["skipped"] == {"no target tokens": 1}
    target = str(texts / "target.jsonl")
    document = influent.value(path, target=target, normalize="none", values=str(tmp_path / "v.npy"), draws=10)
    assert document["method"]["unit"].endswith("after one Adam step on the row")
    model, tokenizer = load(str(texts / "model"), dtype="float32", device="cpu")
    model, task = model.double().eval(), CausalLM(tokenizer, max_length=16)
    asked = [json.loads(line) for line in (texts / "target.jsonl").read_text().splitlines()]
    rows = [json.loads(line) for line in (texts / "data.jsonl").read_text().splitlines()[:5]]
    assert max(len(task.parts(row)) for row in rows) > 1
    split = sorted(model.named_parameters(), key=lambda pair: pair[1].ndim < 2)
    state = torch.load(texts / "optimizer.pt", weights_only=True)
    places = {name: i for i, (name, _) in enumerate(split)}
    ordered = {i: state["state"][places[name]] for i, (name, _) in enumerate(model.named_parameters())}
    state = {"state": ordered, "param_groups": [{**state["param_groups"][0], "params": list(ordered)}]}

    def queries(m):
        return sum(task.measure(m, task.collate(task.parts(q)))[0] for q in asked) / len(asked)

    real = [drop(model, state, lambda m, z=z: mean_loss(task, m, z), queries) for z in rows]
    values = np.load(tmp_path / "v.npy")
    assert np.allclose(values[:5], real, rtol=2e-4, atol=2e-4 * np.abs(real).max())
    assert values[5] == 0  # nothing to learn from: no step


def test_steps_are_not_taken_for_gradients(texts, tmp_path):
    path, state = str(tmp_path / "ix"), str(texts / "optimizer.pt")
    data, model = str(texts / "data.jsonl"), str(texts / "model")
    with pytest.raises(SpecError, match="use --method linfik"):
        influent.index(model, data, path, scale="adam-step", optimizer=state)
    with pytest.raises(SpecError, match="rows none"):
        influent.index(model, data, path, method="linfik", scale="adam", optimizer=state, compress="id", rows="none")
    influent.index(
        model, data, path, method="linfik", scale="adam-step", optimizer=state, rows="bfloat16", max_length=64
    )  # fmt: skip
    asked = {"queries": str(texts / "target.jsonl")}
    for call in (
        lambda: influent.query(path, curvature="fim", **asked),
        lambda: influent.query(path, damping="relative:0.1", **asked),
        lambda: influent.query(path, normalize="relatif", **asked),
        lambda: influent.query(path, curvature="ekfac", **asked),
        lambda: influent.fit(path),
        lambda: influent.self_influence(path),
    ):
        with pytest.raises(SpecError, match="its rows are steps of Adam"):
            call()
    assert influent.query(path, normalize="cosine", **asked)["queries"][0]["top"]


def test_states_of_another_optimizer_are_refused(made, tmp_path):  # noqa: F811
    net, data, folder, scale = made
    state = torch.load(folder / "optimizer.pt", weights_only=True)
    group = state["param_groups"][0]
    for change, message in [
        ({"amsgrad": True}, "got one with amsgrad"),
        ({"weight_decay": 0.1, "decoupled_weight_decay": False}, "weight_decay inside the gradient"),
    ]:
        torch.save({**state, "param_groups": [{**group, **change}]}, tmp_path / "odd.pt")
        refused(net, data, tmp_path / "odd.pt", message)
    nadam = {key: value for key, value in group.items() if key != "amsgrad"}
    torch.save({**state, "param_groups": [nadam]}, tmp_path / "odd.pt")
    refused(net, data, tmp_path / "odd.pt", "another rule than Adam's")
    state["state"][0]["step"] = torch.tensor(9.0)
    torch.save(state, tmp_path / "steps.pt")
    refused(net, data, tmp_path / "steps.pt", "differ between the tracked parameters")
    save_file({name: v.contiguous() for name, v in scale.items()}, tmp_path / "v.safetensors")
    refused(net, data, tmp_path / "v.safetensors", "second moments by name, which are for --scale adam; adam-step")
    tensors = load_file(saved(folder, net))
    save_file(tensors, tmp_path / "bare.safetensors", metadata={"step": "3"})
    refused(net, data, tmp_path / "bare.safetensors", "expected step, beta1, beta2 and eps")
    options = {"step": "3", "beta1": "0.9", "beta2": "0.99", "eps": "1e-8"}
    save_file(tensors, tmp_path / "odd.safetensors", metadata=options | {"beta2": "1"})
    refused(net, data, tmp_path / "odd.safetensors", "expected step >= 1, 0 <= beta < 1")
    tensors["head.bias.exp_avg"][1] = float("inf")
    save_file(tensors, tmp_path / "inf.safetensors", metadata=options)
    refused(net, data, tmp_path / "inf.safetensors", "head.bias.exp_avg holds inf, expected averages that are finite")


def test_the_file_of_a_step_scales_too(made):  # noqa: F811
    net, _, folder, scale = made
    read = read_scale(str(saved(folder, net)), net, plan(net, "."))
    again = read_scale(str(folder / "optimizer.pt"), net, plan(net, "."))
    for block, weights in again.weights.items():
        torch.testing.assert_close(read.weights[block], weights)


def refused(net, data, file, message):
    with pytest.raises(SpecError, match=message):
        influent.index(
            net, data, str(file.parent / "ix"), method="linfik", scale="adam-step", optimizer=str(file), layers=".",
            task=TASK,
        )  # fmt: skip

"""Slopes of log-probabilities along a target: against gradients in float64, one token at a time."""

import numpy as np
import pytest
import torch
from test_student import ROWS, here  # noqa: F401  (a fixture)

from influent import slopes as made_of
from influent import solving, target
from influent.attach import Run, Setting, attach
from influent.parameters import held
from influent.solving import Asked
from influent.task import CausalLM

SETTING = Setting(compress="mask:8x8", max_length=20)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def owner(request, tmp_path_factory):
    """A model in float64 with the tracked parameters' names, and a direction."""
    from tiny_model import make_model

    folder = make_model(tmp_path_factory.mktemp("owner"), kind=request.param)
    with attach(str(folder), None, SETTING, Run(device="cpu")) as attached:
        model = attached.collector.model.double()
        draw = torch.Generator().manual_seed(1)
        along = {
            name: torch.randn(p.shape, dtype=torch.float64, generator=draw)
            for name, p in held(attached.collector.plan).items()
        }
        yield model, attached.collector.task, along


def by_gradient(model, ids, place, token, along):
    """d log p(token | ids up to place) along a direction."""
    named = {name: dict(model.named_parameters(remove_duplicate=False))[name].requires_grad_() for name in along}
    said = model(input_ids=torch.tensor([ids])).logits[0, place].log_softmax(-1)[token]
    found = torch.autograd.grad(said, list(named.values()))
    for p in named.values():
        p.requires_grad_(False)
    return float(sum((g * along[name]).sum() for g, name in zip(found, named, strict=True)))


def test_they_are_gradients_times_the_direction(owner):
    model, task, along = owner
    parts = [part for row in ROWS[:2] for part in task.parts(row)]
    uniforms = np.random.default_rng(0).random((sum(part.targets for part in parts), 2))
    tokens, values = made_of.of_parts(model, task, parts, along, uniforms)
    # A Llama's norms are of float32, whatever its weights are.
    near = {"rel": 1e-4, "abs": 1e-4} if model.config.model_type == "llama" else {"rel": 1e-9, "abs": 1e-11}
    at = 0
    for part in parts:
        ids, wanted, _ = part.inputs
        for place in [t - 1 for t in range(1, len(ids)) if wanted[t]]:
            assert tokens[at, 0] == ids[place + 1]
            for token, value in zip(tokens[at].tolist(), values[at].tolist(), strict=True):
                assert value == pytest.approx(by_gradient(model, ids, place, token, along), **near)
            at += 1
    assert at == len(tokens)


def test_their_sum_is_the_value_of_the_row(here):  # noqa: F811
    """<u, g_z> of whole gradients, for the cosine form's u too, however few queries are held at once."""
    wanted = target.read(str(here / "target.jsonl"))
    setting = Setting(compress="id", max_length=20)
    with attach(str(here / "large"), None, setting, Run(device="cpu")) as attached:
        queries = solving.gradients(attached, Asked(wanted.examples))
        rows = attached.collector.collect(ROWS, name=str).rows
        for normalize in ("none", "cosine"):
            u = target.direction(queries, normalize)
            expected = sum(rows[key].double() @ u[key][0].double() for key in u)
            for size in (1, made_of.HELD):
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(made_of, "HELD", size)
                    along = made_of.whole_direction(attached, wanted, normalize)
                task = attached.collector.task
                assert isinstance(task, CausalLM)
                found = made_of.of_rows(attached.collector.model, task, ROWS, along, seed=0, token_budget=4096)
                sums = [-x.sum() for x in np.split(found.values[:, 0].astype(float), np.cumsum(found.counts)[:-1])]
                assert np.allclose(sums, expected.numpy(), rtol=1e-3, atol=1e-5)


def test_batches_change_nothing_and_a_row_draws_for_itself(owner, monkeypatch):
    model, task, along = owner
    monkeypatch.setattr(made_of, "DRAWN", 5)
    whole = made_of.of_rows(model, task, ROWS, along, seed=0, token_budget=4096)
    few = made_of.of_rows(model, task, ROWS, along, seed=0, token_budget=8)
    alone = made_of.of_rows(model, task, ROWS[1:], along, seed=0, token_budget=4096)
    first = whole.counts[0]
    assert [sum(part.targets for part in task.parts(row)) for row in ROWS] == whole.counts.tolist()
    assert len(task.parts(ROWS[2])) > 1
    for tokens, values in ((few.tokens, few.values), (alone.tokens, alone.values)):
        start = first if len(tokens) < len(whole.tokens) else 0
        assert np.array_equal(tokens, whole.tokens[start:])
        assert np.allclose(values, whole.values[start:], rtol=1e-5, atol=1e-6)
    other = made_of.of_rows(model, task, ROWS, along, seed=1, token_budget=4096)
    assert np.array_equal(other.tokens[:, 0], whole.tokens[:, 0])
    assert not np.array_equal(other.tokens[:, 1:], whole.tokens[:, 1:])

"""Second moments of gradients, and of inputs and output gradients, are those of a float64 oracle."""

import pytest
import torch
from oracle_gradients import weight_gradients
from test_extract import MODELS, build, losses_of
from torch import nn
from torch.utils.checkpoint import checkpoint

from influent import moments, sides
from influent.errors import LayerError, NumericsError
from influent.extract import frozen, visit
from influent.layers import plan
from influent.moments import Moments

CPU = torch.device("cpu")


def collect(model, x, kind, *, layers="", batch=None):
    """The moments of a model over all of x."""
    tracked = plan(model, layers)
    found = Moments(tracked.blocks, kind, CPU)
    with frozen(model):
        for part in x.split(batch or len(x)):
            shape = sides.Batch(len(part), x.shape[1])
            visit(model, tracked, found, batch=shape, loss=lambda part=part: losses_of(model, part))
            found.finish(len(part))
    return tracked, found


# -- moments


@pytest.mark.parametrize("name", sorted(MODELS))
def test_gradient_moments_are_those_of_the_materialised_gradients(name):
    model, x = build(name)
    tracked, found = collect(model, x, "grads")
    exact = weight_gradients(model, tracked, lambda i: losses_of(model, x[i : i + 1])[0] if i < len(x) else None)
    for block in tracked.blocks:
        sums, g = found.sums[block.name], exact[block.name].double()
        if block.is_vector:
            torch.testing.assert_close(sums["flat"], g.T @ g)
            continue
        g = g.view(len(x), block.in_width, block.out_width)
        torch.testing.assert_close(sums["in"], torch.einsum("bio,bjo->ij", g, g))
        torch.testing.assert_close(sums["out"], torch.einsum("bio,bip->op", g, g))


def test_position_moments_are_those_of_inputs_and_output_gradients():
    model, x = build("linear-sequence")
    _, found = collect(model, x, "kfac")
    hidden = model[0](x).detach().requires_grad_()
    out = model[2](torch.tanh(hidden))
    out.retain_grad()
    weights = torch.linspace(0.5, 1.5, out.shape[1] * out.shape[2], dtype=out.dtype)
    (torch.sin(out.flatten(1)) * weights).sum().backward()
    ones = torch.ones(*x.shape[:2], 1, dtype=x.dtype)
    first = torch.cat([x, ones], -1).flatten(0, 1)
    inputs = {"0": first, "2": torch.tanh(hidden).detach().flatten(0, 1)}
    for block, d in (("0", hidden.grad), ("2", out.grad)):
        a, d = inputs[block], d.flatten(0, 1)
        scaled = found.scaled(block)
        torch.testing.assert_close(scaled["in"], a.T @ a / len(a))  # of a position
        torch.testing.assert_close(scaled["out"], d.T @ d / len(x))  # of an example


@pytest.mark.parametrize("name", ["embedding", "tied-bias", "positions"])
def test_position_moments_of_an_embedding_count_its_tokens(name):
    """A table looked up by one-hot products gives the same moments as one looked up by ids."""
    model, x = build(name)
    tracked, found = collect(model, x, "kfac", layers="embed|0$|head|place")
    for block in tracked.blocks:
        moment = found.sums[block.name]["out"]
        assert moment.shape == ((block.out_width,) * (1 if block.kind == "embedding" else 2))
        if moment.ndim == 2:
            torch.testing.assert_close(moment, moment.T)
    embedding = next(site for site in tracked.sites if site.kind == "embedding")
    if name == "embedding":
        counts = torch.bincount(x.flatten(), minlength=11).double()
        counts[2] = 0  # the padding row has no gradient
        torch.testing.assert_close(found.sums[embedding.block.name]["out"], counts)
        assert found.num_positions[embedding.block.name] == counts.sum()


@pytest.mark.parametrize("kind", ["kfac", "grads"])
def test_padding_does_not_change_the_moments(kind):
    model, x = build("linear-sequence")
    short = x[:, :4]

    def loss(part):
        return torch.sin(model(part)[:, :4]).flatten(1).sum(1)

    tracked = plan(model, "")
    found = []
    for part in (short, torch.cat([short, torch.full_like(x[:, :3], 100.0)], dim=1)):
        sums = Moments(tracked.blocks, kind, CPU)
        with frozen(model):
            visit(model, tracked, sums, batch=sides.Batch(*part.shape[:2]), loss=lambda part=part: loss(part))
        sums.finish(len(part))
        found.append(sums)
    for block in tracked.blocks:
        for side in ("in", "out"):
            torch.testing.assert_close(found[0].scaled(block.name)[side], found[1].scaled(block.name)[side])


@pytest.mark.parametrize("kind", ["kfac", "grads"])
@pytest.mark.parametrize("name", ["linear-sequence", "conv2d-grouped", "tied-bias", "called-twice", "layernorm"])
def test_batches_do_not_change_the_moments(kind, name, monkeypatch):
    model, x = build(name)
    tracked, whole = collect(model, x, kind)
    monkeypatch.setattr(moments, "GRADIENT_ENTRIES", 50)
    _, parts = collect(model, x, kind, batch=3)
    for block in tracked.blocks:
        for side, moment in whole.scaled(block.name).items():
            torch.testing.assert_close(parts.scaled(block.name)[side], moment)


def test_a_shared_layer_under_checkpointing_has_no_gradient_moments():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x):
            x = x.clone().requires_grad_()
            for _ in range(2):
                x = checkpoint(self.layer, x, use_reentrant=True)
            return x

    model, x = Shared().double(), torch.randn(4, 7, 6).double()
    with pytest.raises(LayerError, match="layer layer is used again after its backward pass"):
        collect(model, x, "grads")
    collect(model, x, "kfac")


def test_moments_that_are_not_finite_are_named():
    model, x = build("linear-sequence")
    _, found = collect(model, x, "kfac")
    found.sums["2"]["in"][0, 0] = float("inf")
    found.scaled("0")
    with pytest.raises(NumericsError, match="block 2: the second moments of its in side are not finite"):
        found.scaled("2")

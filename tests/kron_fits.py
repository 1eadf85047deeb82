"""K-FAC fits of small models without an index's rows, and what they are compared with: dense float64 matrices."""

from types import SimpleNamespace

import torch
from oracle_gradients import weight_gradients
from torch import Tensor, nn
from torch.nn import functional

from influent.bases import Sample
from influent.extract import frozen
from influent.kron import Fitted, Fitting
from influent.kronname import parse
from influent.layers import plan
from influent.passes import Passes
from influent.storage import Store


class Squares:
    """Squared error of a regression; `sampled_loss` takes the one label that the data names, so that the mean over
    the data is the exact mean over labels."""

    def loss(self, model: nn.Module, batch) -> Tensor:
        x, y, _ = batch
        return 0.5 * (model(x) - y).square().flatten(1).sum(1)

    def measure(self, model: nn.Module, batch) -> Tensor:
        return self.loss(model, batch)

    def sampled_loss(self, model: nn.Module, batch, streams) -> Tensor:
        x, y, which = batch
        noise = functional.one_hot(which, y.shape[1]).to(y.dtype) * y.shape[1] ** 0.5  # of unit covariance over all
        return (model(x) * noise).sum(1)


def passes_of(model: nn.Module, task, data, *, layers: str | None = "", token_budget: int = 4096) -> Passes:
    return Passes(
        model=model, plan=plan(model, layers), task=task, token_budget=token_budget, rows=range(len(data)),
        sample=Sample(digest="data", n=len(data), example=lambda _, row: data[row], name=lambda row: f"row {row}"),
    )  # fmt: skip


def source(path, passes: Passes) -> SimpleNamespace:
    """What a fit needs of an index."""
    widths = {block.name: block.width for block in passes.plan.blocks}
    return SimpleNamespace(n=len(passes.rows), widths=widths, digest="blake2b-256:0", store=Store(path), shards=[],
                           history=[])  # fmt: skip


def fit(path, passes: Passes, name: str, **options) -> Fitted:
    """The fit of that name in the folder `path`."""
    wanted = parse(name)
    assert wanted is not None
    with frozen(passes.model):
        return Fitting(index=source(path, passes), passes=passes, name=wanted, **options).fit()


def dense(fitted: Fitted, key: str) -> Tensor:
    """The whole matrix [K, K] that a fit stands for, by a Kronecker product."""
    held, values = fitted.factors.tensors(key), fitted.values(key).double()
    inner = held["in"].double() if "in" in held else torch.eye(values.shape[0]).double()
    outer = held["out"].double() if "out" in held else torch.eye(values.shape[1]).double()
    vectors = torch.kron(inner, outer)
    return vectors @ torch.diag(values.flatten()) @ vectors.T


def fisher(gradients: Tensor, n: int) -> Tensor:
    g = gradients.double()
    return g.T @ g / n


def exact(passes: Passes, losses) -> dict[str, Tensor]:
    """Per-example gradients by autograd; `losses(i)` is the loss of example i alone, or None after the last."""
    found = weight_gradients(passes.model, passes.plan, losses)
    for p in passes.model.parameters():
        p.grad = None
    return found

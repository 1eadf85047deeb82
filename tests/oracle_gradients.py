"""Slow, float64, obviously right: per-example weight gradients by one backward pass an example, and dense maps."""

import torch
from torch import Tensor, nn

from influent import sides
from influent.layers import Plan


def weight_gradients(model: nn.Module, plan: Plan, losses) -> dict[str, Tensor]:
    """Flat gradients [B, p] by block in our layout, from autograd's own weight gradients.

    `losses` is called once an example i and returns that example's scalar loss, computed without its batch mates.
    """
    out: dict[str, list[Tensor]] = {block.name: [] for block in plan.blocks}
    owners = {}
    for site in plan.sites:
        if site.block.name not in owners or site.kind != "embedding":
            owners[site.block.name] = site
    for p in model.parameters():
        p.requires_grad_(True)
    i = 0
    while (loss := losses(i)) is not None:
        model.zero_grad(set_to_none=True)
        loss.backward()
        for name, site in owners.items():
            out[name].append(_layout(site))
        i += 1
    return {name: torch.stack(rows) for name, rows in out.items()}


def _layout(site) -> Tensor:
    """A module's weight (and bias) gradient as our flat vector: input-major, bias as the last input."""
    module = site.module
    grad = module.weight.grad
    grad = torch.zeros_like(module.weight) if grad is None else grad
    bias = getattr(module, "bias", None)
    if site.kind == "norm":
        return torch.cat([grad.flatten()] + ([bias.grad.flatten()] if bias is not None else []))
    grad = grad.flatten(1) if not sides.is_conv1d(module) else grad.T  # [O, I]
    if bias is not None:
        grad = torch.cat([grad, bias.grad.unsqueeze(1)], dim=1)
    if grad.shape[1] < site.block.in_width:
        grad = torch.nn.functional.pad(grad, (0, site.block.in_width - grad.shape[1]))
    return grad.T.flatten()


def dense(m) -> Tensor:
    """The matrix [p, k] of a map, one unit vector at a time."""
    return torch.cat([m(torch.eye(m.p, dtype=torch.float64)[i : i + 1]) for i in range(m.p)])


def compressed(bound, flat: Tensor) -> Tensor:
    """The bound compressor applied to materialised gradients [B, p], through its dense matrices."""
    block = bound.block
    if bound.inner:
        left, right = torch.eye(block.in_width).double(), torch.eye(block.out_width).double()
        for m in bound.inner:
            left = left @ dense(m)
        for m in bound.outer:
            right = right @ dense(m)
        flat = flat @ torch.kron(left, right)
    for m in bound.flat:
        flat = flat @ dense(m)
    return flat

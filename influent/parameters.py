"""Gradients in the flat order of blocks as tensors of the model's parameters, and back.

A block's entry (i, o) is that of output o and input i; a bias is the last input. Tied modules have one parameter, which
is named after the first that is no lookup table. Not here: what a block is (layers.py).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from influent.layers import Block, Plan, Site
from influent.sides import is_conv1d

Named = dict[str, Tensor]  # parameter -> a tensor of its shape, or some of them stacked


def held(plan: Plan) -> dict[str, nn.Parameter]:
    """The parameters of the tracked layers by their modules' names."""
    found: dict[str, nn.Parameter] = {}
    for site in _owners(plan).values():
        module: Any = site.module
        found[_named(site, "weight")] = module.weight
        if getattr(module, "bias", None) is not None:
            found[_named(site, "bias")] = module.bias
    return found


def tracked(plan: Plan) -> Named:
    """Their values."""
    return {name: parameter.detach() for name, parameter in held(plan).items()}


def to_parameters(plan: Plan, vectors: Mapping[str, Tensor]) -> Named:
    """Vectors [n, I * O] by block as [n, ...] by parameter."""
    out: Named = {}
    for name, site in _owners(plan).items():
        weight, bias = _split(site, vectors[name])
        out[_named(site, "weight")] = weight
        if bias is not None:
            out[_named(site, "bias")] = bias
    return out


def from_parameters(plan: Plan, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_parameters`; an input that no module has (the bias of a tied head) is zero."""
    out = {}
    for name, site in _owners(plan).items():
        weight, bias = tensors[_named(site, "weight")], tensors.get(_named(site, "bias"))
        if site.kind == "norm":
            out[name] = torch.cat([weight.flatten(1)] + ([] if bias is None else [bias.flatten(1)]), dim=1)
            continue
        matrix = weight if is_conv1d(site.module) else weight.flatten(2).transpose(1, 2)  # [n, I, O]
        if bias is not None:
            matrix = torch.cat([matrix, bias.unsqueeze(1)], dim=1)
        out[name] = matrix.flatten(1)
    return out


def _named(site: Site, kind: str) -> str:
    return f"{site.name}.{kind}" if site.name else kind  # the model may be the layer


def _split(site: Site, vector: Tensor) -> tuple[Tensor, Tensor | None]:
    module: Any = site.module
    block: Block = site.block
    bias = getattr(module, "bias", None)
    size = len(vector)
    if site.kind == "norm":
        weight = vector[:, : module.weight.numel()].reshape(size, *module.weight.shape)
        return weight, None if bias is None else vector[:, module.weight.numel() :].reshape(size, *bias.shape)
    matrix = vector.unflatten(1, (block.in_width, block.out_width))
    last = None if bias is None else matrix[:, -1]
    matrix = matrix if bias is None else matrix[:, :-1]
    if not is_conv1d(module):
        matrix = matrix.transpose(1, 2)
    return matrix.reshape(size, *module.weight.shape), last


def _owners(plan: Plan) -> dict[str, Site]:
    """The site of each block whose module has all of its parameters."""
    owners: dict[str, Site] = {}
    for site in plan.sites:
        held = owners.get(site.block.name)
        if held is None or (held.kind == "embedding" and site.kind != "embedding") or (site.bias and not held.bias):
            owners[site.block.name] = site
    return owners

"""From modules to named blocks: which layers are tracked, and their two sides in one normal form.

A *block* is one weight (with its bias as a ones column of the input side); a *site* is one module that uses it. Tied
weights are one block with several sites, whose contributions add up. Every input and every output gradient is brought
to [batch, positions, features]: sequences, unfolded convolutions, plain vectors with one position.
An Embedding's weight [V, h] is oriented as the weight of a Linear from h to V features, so that an output head tied to
it lies in the same block: its hot positions are then the output side. Not here: the hooks (extract.py).
"""

import re
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from influent import sides
from influent.errors import LayerError
from influent.gradients import Side


@dataclass(frozen=True, slots=True)
class Block:
    """One tracked weight. A vector block (a norm's, or all blocks') has `out_width` 1 and its gradient is a vector of
    `in_width`."""

    name: str
    kind: str  # linear, conv, embedding, norm; all: see whole.py
    in_width: int
    out_width: int

    @property
    def width(self) -> int:
        return self.in_width * self.out_width

    @property
    def is_vector(self) -> bool:
        return self.kind in ("norm", "all")


@dataclass(frozen=True, eq=False)
class Site:
    """One module of a block."""

    block: Block
    kind: str
    name: str
    module: nn.Module

    @property
    def bias(self) -> bool:
        """Whether the module's input is extended by a ones column."""
        return self.kind in ("linear", "conv") and getattr(self.module, "bias", None) is not None

    def entering(self, x: Tensor, batch: sides.Batch) -> Side:
        """The module's input in normal form: [B, T, I], or the ids [B, T] of an embedding."""
        return sides.entering(self.kind, self.module, x, batch, self.name)

    def leaving(self, d: Tensor, batch: sides.Batch) -> Float[Tensor, "B T O"]:
        """The gradient of the module's output in normal form."""
        return sides.leaving(self.kind, self.module, d, batch, self.name)


@dataclass(frozen=True, eq=False)
class Plan:
    """What is tracked in a model: blocks in the model's order, their sites, and the share of parameters covered."""

    blocks: tuple[Block, ...]
    sites: tuple[Site, ...]
    covered: int
    total: int

    @property
    def coverage(self) -> float:
        return self.covered / self.total


def plan(model: nn.Module, layers: str | None = None, exclude: str | None = None) -> Plan:
    """Choose the layers to track.

    Args:
        layers: a regular expression searched in module names. By default every Linear (and Hugging Face Conv1D) of
            the transformer's blocks, or, in a model without a list of blocks, every Linear and convolution.
        exclude: a regular expression of module names to leave out.

    Raises:
        LayerError: the patterns match no layer, or a matched layer cannot be handled; names the layer.
    """
    owners = {name: module for name, module in model.named_modules(remove_duplicate=False) if _owns(module)}
    chosen = {name: module for name, module in owners.items() if _matches(name, module, model, layers)}
    if exclude is not None:
        chosen = {name: module for name, module in chosen.items() if not re.search(exclude, name)}
    if not chosen:
        pattern = "the default (Linear layers of the blocks)" if layers is None else f"--layers {layers!r}"
        shown = ", ".join(list(owners)[:4])
        raise LayerError(
            f"{pattern} matches no layer of {type(model).__name__}; its layers are {shown}, … ({len(owners)})"
        )
    sites = _sites(model, chosen)
    blocks = tuple(dict.fromkeys(site.block for site in sites))
    tracked = {id(p): p.numel() for site in sites for p in site.module.parameters(recurse=False)}
    every = {id(p): p.numel() for p in model.parameters()}
    return Plan(blocks, sites, sum(tracked.values()), sum(every.values()))


def _owns(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False))


def _matches(name: str, module: nn.Module, model: nn.Module, layers: str | None) -> bool:
    if layers is not None:
        return re.search(layers, name) is not None
    kind = sides.kind_of(module)
    if not any(isinstance(m, nn.ModuleList) for m in model.modules()):
        return kind in ("linear", "conv")
    inside = any(isinstance(model.get_submodule(parent), nn.ModuleList) for parent in _ancestors(name))
    return inside and (kind == "linear" or isinstance(module, nn.Linear))  # one with its own forward is refused


def _ancestors(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _sites(model: nn.Module, chosen: dict[str, nn.Module]) -> tuple[Site, ...]:
    """Sites in the model's order; modules that share a weight share a block, named after the first of them."""
    by_weight: dict[int, list[tuple[str, nn.Module]]] = {}
    seen: set[int] = set()
    for name, module in chosen.items():
        _check(name, module, model)
        if id(module) not in seen:  # one module under two names is one site
            seen.add(id(module))
            by_weight.setdefault(id(module.weight), []).append((name, module))
    return tuple(site for group in by_weight.values() for site in _group(group))


def _group(group: list[tuple[str, nn.Module]]) -> list[Site]:
    names = " and ".join(name for name, _ in group)
    biases = {id(module.bias) for _, module in group if getattr(module, "bias", None) is not None}
    if len(biases) > 1:
        raise LayerError(f"layers {names} share a weight but have biases of their own; --exclude all but one of them")
    kinds = {sides.kind_of(module) or "" for _, module in group}
    shapes = {sides.widths(module) for _, module in group}
    if len(kinds - {"embedding"}) > 1 or len(shapes) > 1:
        raise LayerError(f"layers {names} share a weight in different shapes; --exclude all but one of them")
    in_width, out_width = shapes.pop()
    kind = min(kinds, key=lambda k: k == "embedding")  # a tied output head names the kind of the block
    width = in_width * (1 + bool(biases)) if kind == "norm" else in_width + bool(biases)
    block = Block(group[0][0], kind, width, out_width)
    return [Site(block, sides.kind_of(module) or "", name, module) for name, module in group]


def _check(name: str, module: nn.Module, model: nn.Module) -> None:
    """Refuse, by name, what the hooks would get wrong."""
    kind = sides.kind_of(module)
    advice = "--exclude it, or choose other --layers"
    if kind is None:
        raise LayerError(f"layer {name} is a {type(module).__name__}, which cannot be attributed to; {advice}")
    for parent in _ancestors(name):
        above = model.get_submodule(parent)
        if isinstance(above, nn.MultiheadAttention):
            raise LayerError(f"layer {name} is used by {parent} (MultiheadAttention) without being called; {advice}")
        if any(isinstance(child, nn.MultiheadAttention) and not child.batch_first for child in above.children()):
            raise LayerError(
                f"layer {name} is inside {parent}, which has batch_first=False: the batch must come first; {advice}"
            )
    sides.check(name, module, advice)


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter."""
    return next(model.parameters()).device

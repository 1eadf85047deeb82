"""One row for all blocks: the compressor acts on the concatenated gradient of the tracked blocks, in their order.

A first mask gathers its entries from each block as soon as that block's gradient exists, without forming it; other
compressors form the concatenated gradient of a few examples at a time once the backward pass has reached every block.
Not here: rows keyed by block (extract.py), the maps (maps.py).
"""

from collections.abc import Mapping
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from influent import sides
from influent.bind import GATHER_RATIO, Bound
from influent.compress import ROTATE, Compress
from influent.errors import SpecError
from influent.extract import sided, visit
from influent.gradients import Flat, Grad, Outer, Side
from influent.layers import Block, Plan, Site
from influent.maps import DENSE_LIMIT, Mask

ALL = "all"  # the name and the kind of the one block that rows then have


def whole_block(plan: Plan) -> Block:
    """The concatenation of a plan's blocks as one vector block."""
    return Block(ALL, ALL, sum(block.width for block in plan.blocks), 1)


def bind_whole(compress: Compress, plan: Plan, seed: int, kept: Mapping[str, Mapping[str, Tensor]]) -> Bound:
    """Draw the maps of `compress` for the concatenated gradient.

    Args:
        kept: block -> "flat" -> entries [k] of a learned mask, as it was learned block by block; else nothing.

    Raises:
        SpecError: see `check_flat`.
    """
    check_flat(compress)
    firsts = zip(plan.blocks, _firsts(plan), strict=True)
    entries = [kept[block.name]["flat"] + first for block, first in firsts] if kept else []
    return compress.bind(whole_block(plan), seed, {"flat": torch.cat(entries)} if entries else None)


def check_flat(compress: Compress) -> None:
    """SpecError when a stage works on the two sides of a layer, which the concatenation does not have."""
    sided_stages = [stage for stage in compress.stages if not stage.is_flat and stage.kind != ROTATE]
    if sided_stages:
        raise SpecError(
            f"compressor '{compress}': stage '{sided_stages[0]}' works on the two sides of a layer, and --key all has "
            "one row for all layers together: use flat stages, such as 'sjlt:4096' or 'mask:16384 | sjlt:4096'"
        )


def _firsts(plan: Plan) -> list[int]:
    """Where each block begins in the concatenation."""
    return [0, *accumulate(block.width for block in plan.blocks)][:-1]


def is_whole(bound: dict[str, Bound]) -> bool:
    """Whether these maps are those of `bind_whole`."""
    return [each.block.kind for each in bound.values()] == [ALL]


def gradients(
    model: nn.Module, plan: Plan, *, bound: dict[str, Bound], batch: sides.Batch, loss
) -> tuple[dict[str, Float[Tensor, "B K"]], Float[Tensor, " B"]]:
    """`extract.gradients` with one row for all blocks."""
    visitor = WholeRows(plan, bound[ALL])
    losses = visit(model, plan, visitor, batch=batch, loss=loss)
    return {ALL: visitor.rows(losses)}, losses


class WholeRows:
    """The visitor that compresses the concatenated gradient; contributions of tied layers and repeated calls add up."""

    def __init__(self, plan: Plan, bound: Bound) -> None:
        self.bound = bound
        self.parts = {block.name: Bound(block, (), (), ()) for block in plan.blocks}
        self.first = {block.name: first for block, first in zip(plan.blocks, _firsts(plan), strict=True)}
        self.span = _spans(self.first, plan, bound)
        self.held: dict[str, list[Grad]] = {}
        self.picked: Tensor | None = None  # [B, k] of a first mask, as far as blocks have come

    def enter(self, site: Site, side: Side) -> Any:
        return side if site.kind == "embedding" else self.parts[site.block.name].map_in(side, bias=site.bias)

    def leave(self, site: Site, kept: Any, d: Float[Tensor, "B T O"]) -> None:
        self._take(site.block, sided(self.parts[site.block.name], site, kept, d))

    def vector(self, site: Site, gradient: Float[Tensor, "B K"]) -> None:
        self._take(site.block, Flat(gradient))

    def rows(self, losses: Float[Tensor, " B"]) -> Float[Tensor, "B K"]:
        """The compressed rows, once every block has come; blocks that the loss does not depend on are 0."""
        maps = self.bound.flat
        if maps and isinstance(maps[0], Mask):
            row = losses.new_zeros(len(losses), maps[0].k).float() if self.picked is None else self.picked
            return self._through(row, 1)
        step = max(1, DENSE_LIMIT // self.bound.block.width)
        pieces = [slice(at, at + step) for at in range(0, len(losses), step)]
        return torch.cat([self._through(self._formed(piece, losses[piece]), 0) for piece in pieces])

    def _take(self, block: Block, grad: Grad) -> None:
        if self.bound.flat and isinstance(mask := self.bound.flat[0], Mask):
            self._gather(mask, block, grad)
        else:
            self.held.setdefault(block.name, []).append(grad)

    def _gather(self, mask: Mask, block: Block, grad: Grad) -> None:
        first = self.first[block.name]
        lo, hi = self.span[block.name]
        local = mask.kept[lo:hi] - first
        if lo == hi:
            return
        if isinstance(grad, Outer) and block.width >= GATHER_RATIO * len(local):
            values = grad.at(local // block.out_width, local % block.out_width)
        else:
            values = grad.flat().index_select(1, local)
        if self.bound.weight is not None:
            values = values * self.bound.weight[mask.kept[lo:hi]]
        if self.picked is None:
            self.picked = values.new_zeros(len(values), mask.k)
        self.picked[:, lo:hi] += values

    def _formed(self, piece: slice, losses: Float[Tensor, " b"]) -> Float[Tensor, "b p"]:
        """The concatenated gradient of some examples."""
        out: Tensor | None = None
        for name, grads in self.held.items():
            first, width = self.first[name], self.parts[name].block.width
            for grad in grads:
                flat = _part(grad, piece).flat()
                if out is None:
                    out = flat.new_zeros(len(flat), self.bound.block.width)
                out[:, first : first + width] += flat
        if out is None:
            return losses.new_zeros(len(losses), self.bound.block.width).float()
        return out if self.bound.weight is None else out * self.bound.weight

    def _through(self, row: Tensor, done: int) -> Tensor:
        for m in self.bound.flat[done:]:
            row = m.raw(row)
        return row * self.bound.scale


def _spans(first: Mapping[str, int], plan: Plan, bound: Bound) -> dict[str, tuple[int, int]]:
    """Block -> [lo, hi) of the entries that a first mask keeps of it; nothing without one."""
    if not bound.flat or not isinstance(mask := bound.flat[0], Mask):
        return {}
    edges = torch.tensor([[first[block.name], first[block.name] + block.width] for block in plan.blocks])
    found = torch.searchsorted(mask.kept.cpu(), edges).tolist()
    return {block.name: (lo, hi) for block, (lo, hi) in zip(plan.blocks, found, strict=True)}


def _part(grad: Grad, piece: slice) -> Grad:
    if isinstance(grad, Flat):
        return Flat(grad.g[piece])
    return Outer(grad.a[piece], grad.d[piece], grad.in_width, grad.out_width)

"""The visitor that puts a block's two sides together: all calls of a batch joined, handed on once they are complete.

A gradient is the sum over the positions of all calls of a layer (tied weights, a layer used twice), so whatever is not
linear in it (squares, per-example moments) needs them together. With `bound` the sides are the compressed ones, the
compressor's constant on the input side. Not here: what is done with them (a `Receiver`), the hooks (extract.py).
"""

from collections import Counter
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from influent.bind import Bound
from influent.errors import LayerError
from influent.gradients import Flat, Side
from influent.layers import Block, Site
from influent.maps import wide, with_one


@runtime_checkable
class Receiver(Protocol):
    """What becomes of a block's sides: `a` [B, T, I] with the bias' ones column; `d` [B, T, O], or the ids [B, T] of
    an embedding's output side; the gradient g [B, K] of a vector block."""

    def add(self, block: Block, a: Float[Tensor, "B T I"], d: Side) -> None: ...
    def add_vector(self, block: Block, g: Float[Tensor, "B K"]) -> None: ...


class Pairs:
    """A visitor (extract.py) that hands sides to `receiver`; call `finish` after every batch.

    Args:
        bound: compress the sides with these maps, which must be factorised.
        whole: join a block's calls. Otherwise each call is handed on at once, which is enough for sums over positions.
    """

    def __init__(self, receiver: Receiver, *, bound: Mapping[str, Bound] | None = None, whole: bool = True) -> None:
        self.receiver, self.bound, self.whole = receiver, bound, whole
        self._open: Counter[str] = Counter()  # calls of a block whose backward pass has not come
        self._calls: dict[str, tuple[Block, list[tuple[Tensor, Side]]]] = {}
        self._vectors: dict[str, tuple[Block, Tensor]] = {}
        self._done: set[str] = set()

    def enter(self, site: Site, side: Side) -> Side:
        self._open[site.block.name] += 1
        if self.bound is None:
            return side
        bound = self.bound[site.block.name]
        return bound.map_out(side) if site.kind == "embedding" else bound.map_in(side, bias=site.bias)

    def leave(self, site: Site, kept: Side, d: Float[Tensor, "B T O"]) -> None:
        block, bound = site.block, None if self.bound is None else self.bound[site.block.name]
        if site.kind == "embedding":  # the ids are the output side: see layers.py
            a = nn.functional.pad(wide(d), (0, block.in_width - d.shape[-1]))  # a tied head's bias column
            if bound is not None:
                kept = _only(kept, a) if kept.is_floating_point() else kept
                a = bound.map_in(a)
            d = kept
        else:
            ones = site.bias and bound is None
            a, d = (with_one(wide(kept)) if ones else wide(kept)), wide(d)
            d = d if bound is None else bound.map_out(d)
        self._open[block.name] -= 1
        a = a if bound is None else a * bound.scale
        if not self.whole:
            self.receiver.add(block, a, d)
            return
        if block.name in self._done:
            raise LayerError(
                f"layer {block.name} is used again after its backward pass (gradient checkpointing of a shared layer): "
                "learn from kfac moments if that is what you do, or --exclude it"
            )
        self._calls.setdefault(block.name, (block, []))[1].append((a, d))
        if self._open[block.name] == 0:
            self._close(block.name)

    def vector(self, site: Site, gradient: Float[Tensor, "B K"]) -> None:
        name, g = site.block.name, wide(gradient)
        self._vectors[name] = (site.block, self._vectors[name][1] + g if name in self._vectors else g)

    def finish(self) -> None:
        """End a batch."""
        for block, g in self._vectors.values():
            self.receiver.add_vector(block, g if self.bound is None else self.bound[block.name].join(Flat(g)))
        for name in list(self._calls):  # checkpointing enters a layer twice and leaves it once
            self._close(name)
        self.drop()

    def drop(self) -> None:
        """Forget a batch whose loss was not finite: there was no backward pass."""
        for held in (self._open, self._calls, self._vectors, self._done):
            held.clear()

    def _close(self, name: str) -> None:
        block, calls = self._calls.pop(name)
        self._done.add(name)
        a = torch.cat([a for a, _ in calls], dim=1)
        if len({d.is_floating_point() for _, d in calls}) > 1:  # a tied head beside its embedding
            calls = [(a, _dense(d, block.out_width, a)) for a, d in calls]
        self.receiver.add(block, a, torch.cat([d for _, d in calls], dim=1))


def _dense(d: Side, width: int, like: Tensor) -> Tensor:
    return d if d.is_floating_point() else nn.functional.one_hot(d.long(), width).to(like.dtype)


def _only(d: Tensor, a: Tensor) -> Tensor:
    """Mapped one-hot vectors, zero where no gradient comes back: padding is not to be counted."""
    return d * (a != 0).any(dim=-1, keepdim=True)

"""A compressor bound to one block: which map stands on which side, and how the two sides are joined.

`enter` and `leave` map the two sides as the hooks see them; `join` forms the compressed row. Nothing of the size of
the layer's weight is formed unless a stage on the flat gradient needs it. Not here: the grammar (compress.py), the
maps (maps.py), the hooks (extract.py).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from influent.compress import LEARNED, SELECT, Compress, Stage
from influent.errors import SpecError
from influent.gradients import Flat, Grad, Outer, Side
from influent.layers import Block
from influent.maps import DENSE_LIMIT, SJLT, Basis, Identity, Map, Mask, draw, wide, with_one
from influent.rng import Stream

# Gathering k entries position by position beats forming the p-entry gradient by a matrix product from about here on:
# a gathered product costs some 64 times a product inside a matrix multiplication.
GATHER_RATIO = 64


@dataclass(frozen=True, eq=False)
class Bound:
    """The maps of one block. `inner` acts on the input side, `outer` on the output side, `flat` on what they leave."""

    block: Block
    inner: tuple[Map, ...]
    outer: tuple[Map, ...]
    flat: tuple[Map, ...]
    weight: Float[Tensor, " p"] | None = None  # scales the gradient's entries before any map (optimizer.py)

    @property
    def early(self) -> tuple[tuple[Map, ...], tuple[Map, ...]]:
        """The maps that act on the sides before they are joined: all of them; of a gradient whose entries are scaled
        only masks that come first, which take their entries' scales along."""
        if self.weight is None:
            return self.inner, self.outer
        masks = bool(self.inner) and isinstance(self.inner[0], Mask) and isinstance(self.outer[0], Mask)
        return (self.inner[:1], self.outer[:1]) if masks else ((), ())

    @property
    def in_width(self) -> int:
        return self.early[0][-1].k if self.early[0] else self.block.in_width

    @property
    def out_width(self) -> int:
        return self.early[1][-1].k if self.early[1] else self.block.out_width

    @property
    def factors(self) -> tuple[int, int]:
        """The widths of the two sides once they are mapped."""
        inner = self.inner[-1].k if self.inner else self.block.in_width
        return inner, self.outer[-1].k if self.outer else self.block.out_width

    @property
    def width(self) -> int:
        """K, the width of the block's rows."""
        return self.flat[-1].k if self.flat else self.factors[0] * self.factors[1]

    @property
    def scale(self) -> float:
        """The constant that makes the whole chain unbiased; `join` applies it once."""
        return math.prod((m.scale for m in (*self.inner, *self.outer, *self.flat)), start=1.0)

    def map_in(self, x: Side, *, bias: bool = False) -> Side:
        """The input side through its maps; `bias` appends the ones column first."""
        return _through(self.early[0], x, bias)

    def map_out(self, x: Side) -> Side:
        """The output side through its maps."""
        return _through(self.early[1], x, False)

    def join(self, grad: Grad) -> Float[Tensor, "B K"]:
        """Rows from mapped sides (`Outer`) or from a vector block's gradient (`Flat`), scaled."""
        if isinstance(grad, Flat):
            row = wide(grad.g) if self.weight is None else wide(grad.g) * self.weight
            rest = self.flat
        elif self.weight is not None:
            return self._join_scaled(Outer(wide(grad.a), wide(grad.d), grad.in_width, grad.out_width), self.weight)
        else:
            row, rest = self._first(grad)
        for m in rest:
            row = m.raw(row)
        return row * self.scale

    def _join_scaled(self, grad: Outer, weight: Float[Tensor, " p"]) -> Float[Tensor, "B K"]:
        """Rows of the gradient with its entries scaled, which must be formed, but for what a first mask leaves out."""
        (inner, outer), rest = self.early, self.flat
        if inner and isinstance(rows := inner[0], Mask) and isinstance(columns := outer[0], Mask):
            weight = weight.view(rows.p, columns.p)[rows.kept][:, columns.kept].flatten()
        if rest and isinstance(mask := rest[0], Mask) and not self.inner:
            row = grad.at(mask.kept // grad.out_width, mask.kept % grad.out_width) * weight[mask.kept]
            rest = rest[1:]
        else:
            formed = (grad.flat() * weight).unflatten(1, (grad.in_width, grad.out_width))
            row = _both_sides(formed, self.inner[len(inner) :], self.outer[len(outer) :])
        for m in rest:
            row = m.raw(row)
        return row * self.scale

    def apply(self, gradients: Float[Tensor, "B p"]) -> Float[Tensor, "B K"]:
        """Rows of materialised gradients, p = I * O: those that their sides would have given."""
        if not (self.inner or self.outer or self.flat) and self.weight is None:
            return gradients
        if self.block.is_vector or not (self.inner or self.outer):
            return self.join(Flat(gradients))
        step = max(1, DENSE_LIMIT // gradients.shape[1])  # p can be large
        return torch.cat([self._apply(gradients[at : at + step]) for at in range(0, len(gradients), step)])

    def _apply(self, gradients: Float[Tensor, "B p"]) -> Float[Tensor, "B K"]:
        row = wide(gradients) if self.weight is None else wide(gradients) * self.weight
        row = _both_sides(row.unflatten(1, (self.block.in_width, self.block.out_width)), self.inner, self.outer)
        for m in self.flat:
            row = m.raw(row)
        return row * self.scale

    def _first(self, grad: Outer) -> tuple[Tensor, tuple[Map, ...]]:
        """The flat vector after the stages that can be had without forming the gradient, and the other stages."""
        size = grad.in_width * grad.out_width
        match self.flat[:1]:
            case (Mask() as mask,) if size >= GATHER_RATIO * mask.k:
                rows, columns = mask.kept // grad.out_width, mask.kept % grad.out_width
                return grad.at(rows, columns), self.flat[1:]
            case (SJLT() as sjlt,) if not grad.d.is_floating_point():
                index = torch.arange(grad.in_width, device=grad.d.device) * grad.out_width + grad.d.long().unsqueeze(-1)
                return sjlt.sparse(index.flatten(1), wide(grad.a).flatten(1)), self.flat[1:]
            case (first,) if len(grad.a) > 1 and len(grad.a) * size > DENSE_LIMIT:
                each = [
                    Outer(grad.a[i : i + 1], grad.d[i : i + 1], grad.in_width, grad.out_width)
                    for i in range(len(grad.a))
                ]
                return torch.cat([first.raw(one.flat()) for one in each]), self.flat[1:]
        return grad.flat(), self.flat

    def dual(self) -> "Bound":
        """The maps for a vector whose inner products with rows are to be those with the gradients: where a basis is
        weighted, as a whitened one is, its dual; all others are unbiased as they are."""
        sides = (
            tuple(m.dual() if isinstance(m, Basis) else m for m in maps) for maps in (self.inner, self.outer, self.flat)
        )
        return Bound(self.block, *sides, weight=self.weight)

    def to(self, device: torch.device) -> "Bound":
        """The same maps with their tables on `device`."""
        sides = (tuple(m.to(device) for m in maps) for maps in (self.inner, self.outer, self.flat))
        return Bound(self.block, *sides, weight=None if self.weight is None else self.weight.to(device))


def bind(compress: Compress, block: Block, seed: int, bases: Mapping[str, Tensor] | None = None) -> Bound:
    """Draw the maps of `compress` for `block`: a pure function of its arguments.

    Args:
        bases: the matrices [p, k] of a learned stage, or the kept entries [k] of a mask, for the sides "in" and "out",
            or "flat" of a vector block or flat mask; a side without one is left as it is.

    Raises:
        SpecError: a learned stage without bases, or more hashes than a side is wide.
    """
    if (learned := compress.learned or compress.selects) is not None and bases is None:
        raise SpecError(f"compressor '{compress}': '{learned}' must be learned from data before it is bound")
    maps: dict[str, list[Map]] = {"in": [], "out": [], "flat": []}
    inner, outer, p, flat = block.in_width, block.out_width, block.width, block.is_vector
    for number, stage in enumerate(compress.stages):
        flat = flat or stage.is_flat
        if flat and stage.kind == SELECT:  # a mask learned over all blocks keeps more of one than of another
            todo = [("flat", p, p := len((bases or {})["flat"]))]
        elif flat:
            todo = [("flat", p, p := _length(stage, p, (bases or {}).get("flat")))]
        else:
            a, b = _sides(stage, inner, outer, bases or {})
            todo = [("in", inner, a), ("out", outer, b)]
            inner, outer, p = a, b, a * b
        for side, before, after in todo:
            if stage.kind == SELECT:
                maps[side].append(_selected(before, (bases or {})[side]))
            elif stage.kind in LEARNED:
                maps[side].append(_learned(before, (bases or {}).get(side)))
            else:
                maps[side].append(_draw(stage, before, after, seed, block, f"{side}/{number}"))
    return Bound(block, tuple(maps["in"]), tuple(maps["out"]), tuple(maps["flat"]))


def _length(stage: Stage, p: int, matrix: Tensor | None) -> int:
    """The width that a stage leaves of a flat vector; a learned one may have sizes of its own for every block."""
    if stage.kind in LEARNED:
        return p if matrix is None else matrix.shape[1]
    return stage.length(p)


def _sides(stage: Stage, inner: int, outer: int, bases: Mapping[str, Tensor]) -> tuple[int, int]:
    """The widths that a stage leaves of two sides."""
    if stage.kind in LEARNED:
        a, b = (_length(stage, p, bases.get(side)) for side, p in (("in", inner), ("out", outer)))
        return a, b
    return stage.sides(inner, outer)


def _learned(p: int, matrix: Tensor | None) -> Map:
    return Identity(p) if matrix is None else Basis(p, matrix.shape[1], matrix)


def _selected(p: int, kept: Tensor) -> Map:
    return Identity(p) if len(kept) == p else Mask(p, kept.long(), uniform=False)


def _draw(stage: Stage, p: int, k: int, seed: int, block: Block, side: str) -> Map:
    if k < p and stage.nonzeros > k:  # the grammar cannot see it where the size follows from the block's
        raise SpecError(f"block {block.name}: stage '{stage}' leaves {k} entries, fewer than s={stage.nonzeros}")
    stream = Stream(seed, block.name, stage.kind, side)
    return draw(stage.kind, p, k, stream=stream, nonzeros=stage.nonzeros, law=stage.law)


def _both_sides(formed: Float[Tensor, "B I O"], inner: tuple[Map, ...], outer: tuple[Map, ...]) -> Float[Tensor, "B K"]:
    """Formed gradients through the maps of both sides, flat."""
    for m in outer:
        formed = m.raw(formed)
    formed = formed.transpose(1, 2).contiguous()
    for m in inner:
        formed = m.raw(formed)
    return formed.transpose(1, 2).flatten(1)


def _through(maps: tuple[Map, ...], x: Side, bias: bool) -> Side:
    if not maps:
        return with_one(x) if bias else x
    first, rest = maps[0], maps[1:]
    if not x.is_floating_point():
        x = first.onehot(x)
    elif isinstance(first, Mask):  # a mask only copies: it keeps a 16-bit side in 16 bits until the join
        x = first.affine(x) if bias else first.raw(x)
    else:
        x = first.affine(wide(x)) if bias else first.raw(wide(x))
    for m in rest:
        x = m.raw(x if isinstance(m, Mask) else wide(x))
    return x

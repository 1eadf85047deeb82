"""What hooks emit and rows hold: the per-example gradient of one block, factored (`Outer`) or flat (`Flat`).

A gradient's flat order is input-major: entry (i, o) of sum_t a_t (x) d_t stands at i * O + o, so that a factorised
map A (x) B acts on the flat vector as their Kronecker product.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

Side = Float[Tensor, "B T _"] | Int[Tensor, "B T"]  # the features' axis is free: it changes under a map


@dataclass(frozen=True, slots=True)
class Outer:
    """sum_t a[b, t] (x) d[b, t]; an integer side holds the hot positions of one-hot vectors (an embedding's)."""

    a: Side
    d: Side
    in_width: int
    out_width: int

    def flat(self) -> Float[Tensor, "B K"]:
        """The materialised gradient, K = in_width * out_width, input-major."""
        a, d = _dense(self.a, self.in_width), _dense(self.d, self.out_width)
        return torch.bmm(a.transpose(1, 2), d.to(a.dtype)).flatten(1)

    def dot(self, q: Float[Tensor, "Q K"]) -> Float[Tensor, "Q B"]:
        """Inner products with flat query vectors."""
        return q @ self.flat().T

    def at(self, rows: Int[Tensor, " k"], columns: Int[Tensor, " k"]) -> Float[Tensor, "B k"]:
        """The k entries (rows[j], columns[j]) of the gradient, without forming it: T * k products an example."""
        step = max(1, _GATHER_ENTRIES // (len(self.a) * len(rows)))
        out = torch.zeros(len(self.a), len(rows), device=self.a.device)
        for t in range(0, self.a.shape[1], step):
            left = _pick(self.a[:, t : t + step], rows)
            out = out.to(left.dtype) + left.mul_(_pick(self.d[:, t : t + step], columns)).sum(1)
        return out


_GATHER_ENTRIES = 2**22


@dataclass(frozen=True, slots=True)
class Flat:
    """A gradient that is a vector already: a norm layer's, or a stored row."""

    g: Float[Tensor, "B K"]

    def flat(self) -> Float[Tensor, "B K"]:
        return self.g

    def dot(self, q: Float[Tensor, "Q K"]) -> Float[Tensor, "Q B"]:
        return q @ self.g.T


Grad = Outer | Flat


def _pick(side: Side, index: Int[Tensor, " k"]) -> Float[Tensor, "B T k"]:
    if not side.is_floating_point():
        return (side.unsqueeze(-1) == index).float()
    picked = side.reshape(-1, side.shape[-1]).index_select(1, index)
    return picked.view(*side.shape[:2], len(index))


def _dense(side: Side, width: int) -> Float[Tensor, "B T W"]:
    if side.is_floating_point():
        return side
    return torch.nn.functional.one_hot(side.long(), width).float()

"""The algebra of a Kronecker-factored Fisher matrix, on tensors: turning into its eigenbasis, and its inverse.

K-FAC (Martens and Grosse, ICML 2015) takes a block's Fisher matrix to be A (x) S, with A the second moment of the
layer's inputs and S that of its output gradients. With A = Q_A diag(s_A) Q_A^T and S likewise, a gradient G [I, O] has
the coordinates Q_A^T G Q_S, in which the matrix is diagonal: s_A s_S^T, or, for EK-FAC (George et al., NeurIPS 2018),
the mean over examples of (Q_A^T G Q_S)^2. Flat gradients are input-major, as everywhere. Nothing here reads or writes.

Legend: I, O a block's widths; Q_A [I, I] and Q_S [O, O] eigenvectors as columns, None where they are unit vectors (the
side of an embedding's one-hot vectors; the one output of a vector block).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from influent.errors import NumericsError
from influent.gram import BlockRows, per_row

Vectors = Float[Tensor, "_ _"] | None  # square; the width is the side's


def eigen(moment: Tensor) -> tuple[Vectors, Float[Tensor, " p"]]:
    """Eigenvectors as columns and eigenvalues, 0 or more, of a moment [p, p], or of the diagonal [p] of one."""
    if moment.ndim == 1:
        return None, moment.clamp(min=0)
    values, vectors = torch.linalg.eigh(moment)
    return vectors, values.clamp(min=0)


def turn(g: Float[Tensor, "n I O"], inner: Vectors, outer: Vectors) -> Float[Tensor, "n I O"]:
    """Q_A^T G Q_S: gradients as coordinates along the eigenvectors."""
    g = g if inner is None else inner.T @ g
    return g if outer is None else g @ outer


def turn_back(x: Float[Tensor, "n I O"], inner: Vectors, outer: Vectors) -> Float[Tensor, "n I O"]:
    """Q_A X Q_S^T: the inverse of `turn`."""
    x = x if inner is None else inner @ x
    return x if outer is None else x @ outer.T


@dataclass(frozen=True, slots=True, eq=False)
class Kronecker:
    """(Q (values + damping) Q^T)^-1 of one block, `values` [I, O] in the eigenbasis. An `Inverse` (gram.py)."""

    inner: Vectors
    outer: Vectors
    values: Float[Tensor, "I O"]
    damping: float

    def __call__(self, q: Float[Tensor, "Q K"]) -> Float[Tensor, "Q K"]:
        """In the dtype and on the device of q."""
        inner, outer = self._like(q)
        x = turn(q.unflatten(1, tuple(self.values.shape)), inner, outer)
        return turn_back(x / self._spread(q), inner, outer).flatten(1)

    def squares(self, g: Float[Tensor, "n K"]) -> Float[Tensor, " n"]:
        """g^T (F + lambda I)^-1 g of each gradient."""
        x = turn(g.unflatten(1, tuple(self.values.shape)), *self._like(g))
        return (x.square() / self._spread(g)).sum((1, 2))

    def self_influence(self, rows: BlockRows) -> Float[Tensor, " N"]:
        return per_row(rows, self.squares)

    def _like(self, x: Tensor) -> tuple[Vectors, Vectors]:
        inner, outer = (None if v is None else v.to(x.device, x.dtype) for v in (self.inner, self.outer))
        return inner, outer

    def _spread(self, x: Tensor) -> Float[Tensor, "I O"]:
        return (self.values.double() + self.damping).to(x.device, x.dtype)


def check_regular(values: Float[Tensor, "I O"], damping: float, *, block: str) -> None:
    """NumericsError, naming the block, when the damped eigenvalues are not finite and above 0."""
    least = float(values.min()) + damping
    if not (bool(torch.isfinite(values).all()) and least > 0):
        raise NumericsError(
            f"block {block!r}: its smallest damped eigenvalue is {least:.3g}: expected one above 0: raise the damping"
        )

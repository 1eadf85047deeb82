"""Matrix products whose sums are float32 or wider, whatever the factors are.

Products of two bfloat16 (or float16) numbers are exact in float32, so that a device which adds them up in float32 by
itself need not be given copies: on an accelerator 16-bit factors are multiplied as they are, which takes a quarter of
the memory traffic. Elsewhere they are widened first. Not here: what is multiplied.
"""

import torch
from jaxtyping import Float
from torch import Tensor

NARROW = (torch.bfloat16, torch.float16)
_FUSED = "dtype" in torch.ops.aten.bmm.overloads()  # a product with its own type of sums: PyTorch 2.8


def wide(x: Tensor) -> Tensor:
    """Never narrower than float32."""
    return x.float() if x.dtype in NARROW else x


def is_fused(*factors: Tensor) -> bool:
    """Whether products of these are added up in float32 without a copy of them."""
    kinds = {factor.dtype for factor in factors}
    return _FUSED and len(kinds) == 1 and kinds <= set(NARROW) and all(factor.is_cuda for factor in factors)


def batched(x: Float[Tensor, "n m p"], y: Float[Tensor, "n p k"]) -> Float[Tensor, "n m k"]:
    """x[i] @ y[i], in the wider of float32 and their types."""
    if is_fused(x, y):
        return torch.bmm(x, y, torch.float32)
    x = wide(x)
    return torch.bmm(x, y.to(x.dtype))


class Fixed:
    """A matrix [p, k] that many batches are multiplied with, `x @ matrix` in the wider of float32 and x's type.

    For 16-bit batches it is kept as a sum of two 16-bit matrices, which has 16 of a float32's 24 bits: the first eight
    alone would make entries wrong by 2^-9.
    """

    def __init__(self, matrix: Float[Tensor, "p k"]) -> None:
        self.matrix = matrix
        self._halves: dict[torch.dtype, Tensor] = {}

    def __call__(self, x: Float[Tensor, "*n q"], rows: slice = slice(None)) -> Float[Tensor, "*n k"]:
        """With these rows of the matrix, all by default."""
        if x.is_cuda and x.dtype in NARROW and is_fused(x, halves := self._split(x.dtype)):
            both = torch.mm(x.reshape(-1, x.shape[-1]), halves[rows], torch.float32)
            k = self.matrix.shape[1]
            return both[:, :k].add(both[:, k:]).view(*x.shape[:-1], k)
        x = wide(x)
        return x @ self.matrix[rows].to(x.dtype)

    def _split(self, dtype: torch.dtype) -> Float[Tensor, "p twice"]:
        if dtype not in self._halves:
            high = self.matrix.to(dtype)
            self._halves[dtype] = torch.cat([high, (self.matrix - high.to(self.matrix.dtype)).to(dtype)], dim=1)
        return self._halves[dtype]

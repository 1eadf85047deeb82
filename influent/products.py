"""Inner products of packed rows with queries by compiled loops: a row's bytes are read once for several queries.

Codes become float32 in registers and are multiplied by the queries as they are. A sum of products of a row and a
query has sixteen lanes of at most LONGEST / 16 terms; lanes are added in float32 and pieces of LONGEST numbers in
float64: it is off by at most (LONGEST / 16 + 8) 2^-24 = 1.6e-5 of sum_j |q_j x_j| (Higham, Accuracy and Stability of
Numerical Algorithms, section 4.2), and by 2e-7 of |q| |x| as measured; of signs, whose sum over the set bits is taken
twice from the query's, by twice as much. The order of the sums depends on nothing but the number of queries, so that a
row scores the same to the bit in any company.

Not here: the loops (loops.py), when they are chosen (kernels.py).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .codec import PER_BYTE
from .compiled import LANES, PLANES, STEP, loop
from .gradients import Packed

LONGEST = 1 << 12  # numbers of all queries of a tile together that a loop goes over: 16 KiB, which stay in cache
TILE = 4  # queries at a time, unless there is one
UNROLL = {1: 4, TILE: 2}  # steps of a row that are under way at a time, for tiles of so many queries
BYTES = 1 << 19  # of rows that are read for one tile after the other


def fits(width: int, bits: str) -> bool:
    """Whether rows so wide have bytes enough for a loop."""
    return width >= STEP[bits] * PER_BYTE[bits]


@dataclass(frozen=True, slots=True, eq=False)
class Products:
    """The queries [Q, K] of a block whose rows are packed with these bits, as the loops read them."""

    bits: str
    num_queries: int
    asked: Float[Tensor, "tiles steps planes tile 16"]
    constant: Float[Tensor, "Qt 1"]  # of signs: the queries' sums, from which those over the set bits are taken twice

    @staticmethod
    def of(q: Float[Tensor, "Q K"], bits: str) -> "Products":
        q = q.detach().float()
        asked = _laid_out(q if bits != "sign" else -2 * q, bits, TILE if len(q) > 1 else 1)
        constant = torch.zeros(asked.shape[0] * asked.shape[3], 1, dtype=torch.float64)
        if bits == "sign":
            constant[: len(q)] = q.double().sum(1, keepdim=True)
        return Products(bits, len(q), asked, constant)

    def add(self, scores: Float[Tensor, "Q n"], row: Packed) -> None:
        """scores += <query, row>."""
        (n, size), codes = row.codes.shape, row.codes
        assert row.bits == self.bits and -(-size // STEP[self.bits]) == self.asked.shape[1]
        assert codes.device.type == "cpu" and codes.stride(1) == 1
        step = max(1, n if len(self.asked) == 1 else BYTES // size)  # a single tile reads each byte once anyway
        for lo in range(0, n, step):
            hi = min(lo + step, n)
            sums = self._sums(codes.data_ptr() + lo * codes.stride(0), codes.stride(0), size, hi - lo)
            scores[:, lo:hi].addcmul_(sums[: self.num_queries], row.scale[lo:hi].double())

    def _sums(self, codes: int, stride: int, size: int, n: int) -> Float[Tensor, "Qt n"]:
        """The sums of n rows of `size` bytes at an address; of what only fills the last tile, too."""
        tiles, steps, planes, tile, _ = self.asked.shape
        step, unroll = STEP[self.bits], UNROLL[tile]
        run = loop("product", self.bits, tile, unroll)
        out = self.constant.repeat(1, n)
        asked, into = self.asked.data_ptr(), out.data_ptr()
        whole, held = size // step, planes * tile * LANES  # whole steps, and numbers of the queries in one
        most = max(1, LONGEST // held)
        for first in range(0, whole, most):
            count = min(most, whole - first)
            tail = size - step - first * step if first + count == whole < steps else -1
            for i in range(tiles):
                run(
                    codes + first * step, stride, n, count // unroll, count % unroll, tail,
                    asked + 4 * held * (i * steps + first), into + 8 * i * tile * n, n,
                )  # fmt: skip
        return out


def _laid_out(q: Float[Tensor, "Q K"], bits: str, tile: int) -> Float[Tensor, "tiles steps planes tile 16"]:
    """The queries in the order of the rows' bytes. The last step of a row ends with it and may begin within the step
    before it: the numbers that were there already are zeros here."""
    planes, step = PLANES[bits], STEP[bits]
    size = -(-q.shape[1] // PER_BYTE[bits])
    q = torch.nn.functional.pad(q, (0, size * PER_BYTE[bits] - q.shape[1])).unflatten(1, (planes, -1))
    full = size // step * LANES
    laid = q.new_zeros(-(-len(q) // tile) * tile, planes, -(-size // step), LANES)
    laid[: len(q), :, : size // step] = q[:, :, :full].unflatten(2, (-1, LANES))
    if rest := q.shape[2] - full:
        laid[: len(q), :, -1, LANES - rest :] = q[:, :, full:]
    return laid.unflatten(0, (-1, tile)).permute(0, 3, 2, 1, 4).contiguous()

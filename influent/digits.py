"""Inner products of packed rows with queries, on their integer codes: nothing is unpacked to floats.

A query becomes digits of base 254, three a number, with one scale a query: q = s (d1 + d2 / 254 + d3 / 254^2) up to
|q|max 2^-24, what float32 keeps of the largest number; four for signs, whose numbers then differ by up to 2^7. Products
of codes with digits are sums of integers, hence exact whatever the rows come with. It takes a third to three fifths of
the time of unpacking to float32 (one core with AMX: benchmarks/results/kernels.json).

`torch._int_mm` is the only product of 8-bit integers that PyTorch has on a CPU. It is not public, and without vector
instructions for it oneDNN's reference is slow: `usable` says where it is taken. Compiled loops (products.py) are faster
for few queries; where there is neither, kernels.py unpacks the rows. The scores are the same up to rounding. A CUDA
query is scored on the CPU too, as all rows are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from .gradients import Packed

BASE = 254
NUM_DIGITS = {"int8": 3, "int4": 3, "sign": 4}
LONGEST = 1 << 16  # 128 * 127 * 2^16 is within int32
NARROWEST = 16  # `torch._int_mm` is wrong for sums of one product (torch 2.13); so narrow a block gains nothing anyway
BYTES = 1 << 19  # of codes, unpacked to bytes, that are multiplied at once

_product: Callable[[Tensor, Tensor], Tensor] | None = getattr(torch, "_int_mm", None)


@lru_cache(maxsize=1)
def usable() -> bool:
    """Whether this machine has fast products of 8-bit integers, and this PyTorch lets us at them."""
    if _product is None or not torch.backends.mkldnn.is_available():
        return False
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    a, b = torch.arange(-60, 60).view(5, 24), torch.arange(-36, 36).view(24, 3)
    try:
        got = _product(a.to(torch.int8), b.to(torch.int8))
    except (RuntimeError, TypeError):
        return False
    return torch.equal(got.long(), a @ b)


@dataclass(frozen=True, slots=True, eq=False)
class Digits:
    """The queries [Q, K] of a block whose rows are packed with these bits: for each plane of codes that `_planes` makes
    the digits [k, dQ] of what it is multiplied with, and what is added at last."""

    bits: str
    planes: Sequence[Int8[Tensor, "_ dQ"]]
    scales: Sequence[Float[Tensor, " Q"]]
    constant: Float[Tensor, " Q"]

    @staticmethod
    def of(q: Float[Tensor, "Q K"], bits: str) -> "Digits":
        weights, constant = _weights(q.double(), bits)
        digits, scales = zip(*(_digits(plane, NUM_DIGITS[bits]) for plane in weights), strict=True)
        return Digits(bits, digits, scales, constant)

    def add(self, scores: Float[Tensor, "Q n"], row: Packed) -> None:
        """scores += <query, row>."""
        step = max(1, BYTES // max(1, row.width))
        for lo in range(0, len(row), step):
            part = row[lo : lo + step]
            total = self.constant[:, None].expand(-1, len(part)).clone()
            for codes, digits, scale in zip(_planes(part.codes, self.bits), self.planes, self.scales, strict=True):
                total += scale[:, None] * _multiply(codes, digits, NUM_DIGITS[self.bits])
            scores[:, lo : lo + step] += total * part.scale.double()


def _multiply(codes: Int8[Tensor, "n k"], digits: Int8[Tensor, "k dQ"], num_digits: int) -> Float[Tensor, "Q n"]:
    """The exact sums, with the digits put together, in float64."""
    assert _product is not None
    total = torch.zeros(digits.shape[1] // num_digits, len(codes), dtype=torch.float64)
    width = codes.shape[1]
    size = -(-width // -(-width // LONGEST))  # pieces of nearly one size: none of a single column
    for left in range(0, width, size):
        right = left + size
        sums = _product(codes[:, left:right], digits[left:right]).T.unflatten(0, (num_digits, -1)).double()
        for place, of_digit in enumerate(sums):
            total += of_digit / BASE**place
    return total


def _digits(weights: Float[Tensor, "Q k"], num_digits: int) -> tuple[Int8[Tensor, "k dQ"], Float[Tensor, " Q"]]:
    """Digits of all queries, all first ones and then all second ones, and the scale of each query."""
    largest = torch.linalg.vector_norm(weights, ord=torch.inf, dim=1)
    scale = torch.where(largest > 0, largest / (BASE // 2), 1.0)
    rest, found = weights / scale[:, None], []
    for _ in range(num_digits):
        found.append(rest.round())
        rest = (rest - found[-1]) * BASE
    return torch.cat(found).T.to(torch.int8).contiguous(), scale


def _planes(packed: Tensor, bits: str) -> list[Int8[Tensor, "n _"]]:
    """Codes as bytes, times powers of two that leave one operation a byte; `_weights` undoes them."""
    if bits == "int8":
        return [packed]
    if bits == "int4":
        both = packed.view(torch.int8)
        return [both * 16, both & -16]  # the low four bits, whose high ones overflow, and the high four
    masks = torch.tensor([1, 2, 4, 8, 16, 32, 64, -128], dtype=torch.int8)
    return [(packed.view(torch.int8)[:, None] & masks[:, None]).flatten(1)]  # bit k of every byte, then bit k + 1


def _weights(q: Float[Tensor, "Q K"], bits: str) -> tuple[list[Float[Tensor, "Q _"]], Float[Tensor, " Q"]]:
    """What each plane is multiplied with, and a constant, so that their sum is <codes, q>."""
    length = q.shape[1]
    if bits == "int8":
        return [q], q.new_zeros(len(q))
    if bits == "int4":
        half = -(-length // 2)
        low, high = q[:, :half], torch.nn.functional.pad(q[:, half:], (0, 2 * half - length))
        return [low / 16, high / 16], q.new_zeros(len(q))
    size = -(-length // 8)
    bytewise = torch.nn.functional.pad(q, (0, 8 * size - length)).unflatten(1, (size, 8))
    values = torch.tensor([1, 2, 4, 8, 16, 32, 64, -128], dtype=q.dtype)
    return [(-2 * bytewise.transpose(1, 2) / values[:, None]).flatten(1)], q.sum(1)  # a set bit is -1, a clear one +1

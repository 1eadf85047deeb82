"""v^T X u of pairs in integer codes, by a compiled loop: four pairs at a time become float32 in the nearest cache.

Each number of X v is a float32 sum of a products, and v^T X u one of b of those in sixteen lanes and `WIDEST` parts:
with the rounding of each product it is off by at most (a + b / 16 + 8) 2^-24 of the sum of the products' sizes, and by
5e-7 of its root mean square as measured. Parts and pairs are added up in float64. The order of the sums depends on the
factors alone, so that a row scores the same to the bit in any company.

Not here: the loop (loops.py), when it is chosen (kernels.py).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from .compiled import LANES, PAIRS, STEP, loop
from .gradients import PackedPairs

WIDEST = 4  # vectors of sixteen columns of X that are gone through at once
LARGEST = 1 << 18  # numbers of X, which is read again for every four pairs: 1 MiB


def fits(factors: tuple[int, int]) -> bool:
    """Whether a query's matrix stays in cache."""
    a, b = factors
    return a * b <= LARGEST


def between(row: PackedPairs, matrices: Float[Tensor, "Q a b"]) -> Float[Tensor, "Q n"]:
    """sum_r scale_r v_r^T X u_r of every row and query, float64."""
    v, u, (a, b) = row.v, row.u, row.factors
    assert matrices.shape[1:] == (a, b) and v.device.type == u.device.type == "cpu"
    if a * _rounded(b) > b * _rounded(a):  # the side that fills vectors better goes along the rows of X
        v, u, a, b, matrices = u, v, b, a, matrices.transpose(1, 2)
    n, c = row.scale.shape
    x = torch.nn.functional.pad(matrices.float(), (0, _rounded(b) - b)).contiguous()
    v, u = v.flatten(0, 1).contiguous(), u.flatten(0, 1).contiguous()
    # The loop reads whole steps: the last pairs, whose steps would end beyond their tensor, are read from a copy.
    late = min(n * c, max(-(-_steps(side, row.bits) // side.shape[1]) - 1 for side in (v, u)))
    out = torch.empty(len(x), n * c, dtype=torch.float64)
    early = n * c - late
    _run(row.bits, v, u, x, a, b, out[:, :early])
    _run(row.bits, _apart(v[early:]), _apart(u[early:]), x, a, b, out[:, early:])
    return out.unflatten(1, (n, c)).mul_(row.scale.double()).sum(2)


def _run(bits: str, v: Tensor, u: Tensor, x: Tensor, a: int, b: int, out: Float[Tensor, "Q p"]) -> None:
    """Writes `out` for its number of pairs."""
    if out.shape[1] == 0:
        return
    pad = 8 * LANES + 2 * max(_steps(side, bits) * (8 if bits == "sign" else 1) for side in (v, u))
    space = torch.zeros(2 * PAIRS * pad)
    vectors = _rounded(b) // LANES
    parts = -(-vectors // WIDEST)
    cuts = [vectors * i // parts for i in range(parts + 1)]
    found = torch.empty(parts, out.shape[1], dtype=torch.float64)
    for query, matrix in enumerate(x):
        for i, (lo, hi) in enumerate(zip(cuts, cuts[1:], strict=False)):
            loop("between", bits, hi - lo)(
                v.data_ptr(), v.shape[1], u.data_ptr(), u.shape[1], out.shape[1], matrix.data_ptr(), a,
                matrix.shape[1], lo * LANES, space.data_ptr(), pad, found[i].data_ptr(),
            )  # fmt: skip
        out[query] = found[0] if parts == 1 else found.sum(0)


def _apart(side: Tensor) -> Tensor:
    """The same bytes, with room behind them."""
    room = side.new_zeros(side.numel() + LANES)
    room[: side.numel()] = side.flatten()
    return room[: side.numel()].view_as(side)


def _steps(side: Tensor, bits: str) -> int:
    """Bytes of whole steps of a side."""
    return -(-side.shape[1] // STEP[bits]) * STEP[bits]


def _rounded(numbers: int) -> int:
    return -(-numbers // LANES) * LANES

"""Indexes made of given rows, without a model, for the tests of what reads them."""

import torch
from torch import Tensor

from influent.rowstore import Index
from influent.rowwriter import write_rows


def write_index(
    path,
    rows: dict[str, Tensor],
    *,
    dtype: str = "float32",
    shard_rows: int = 5,
    codec: str | None = None,
    factors: dict[str, tuple[int, int]] | None = None,
) -> Index:
    """A finished index with these rows [N, K] by block, cut into shards of `shard_rows`; `codec` overrides `dtype`."""
    num_rows = len(next(iter(rows.values())))
    write_rows(
        path, lambda lo, hi: {key: x[lo:hi] for key, x in rows.items()},
        num_rows=num_rows, codec=codec or dtype, factors=factors, shard_rows=shard_rows,
    )  # fmt: skip
    return Index.open(path)


def random_rows(num_rows: int, widths: dict[str, int], *, seed: int = 0) -> dict[str, Tensor]:
    """Float32 rows with correlated columns and lengths that vary by orders of magnitude, as gradients do."""
    rng = torch.Generator().manual_seed(seed)
    rows = {}
    for key, width in widths.items():
        mix = torch.randn(width, width, generator=rng) * torch.arange(1, width + 1) ** -0.7
        lengths = torch.randn(num_rows, 1, generator=rng).exp()
        rows[key] = (torch.randn(num_rows, width, generator=rng) @ mix) * lengths
    return rows

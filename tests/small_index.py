"""Indexes made of given rows, without a model, for the tests of what reads them."""

import torch
from torch import Tensor

from influent.rowstore import Index, IndexWriter


def write_index(path, rows: dict[str, Tensor], *, dtype: str = "float32", shard_rows: int = 5) -> Index:
    """A finished index with these rows [N, K] by block, cut into shards of `shard_rows`."""
    num_rows = len(next(iter(rows.values())))
    layout = [
        {"block": key, "kind": "linear", "in": 1, "out": x.shape[1], "width": x.shape[1]} for key, x in rows.items()
    ]
    spec = {
        "model": {"fingerprint": "none"}, "data": "none", "task": {}, "layout": layout, "compress": "id", "seed": 0,
        "rng": 1, "rows": dtype, "numerics": {"dtype": "float32", "matmul": "highest"},
    }  # fmt: skip
    writer = IndexWriter.open(path, spec, notes={"shard_rows": shard_rows})
    for chunk in writer.pending(num_rows):
        part = {key: x[chunk.lo : chunk.hi].float() for key, x in rows.items()}
        ones = torch.ones(chunk.hi - chunk.lo)
        writer.write(chunk, part, loss=ones, norm=ones, tokens=ones, dtype=dtype, skipped={})
    writer.commit({})
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

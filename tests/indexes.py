"""Small indexes for tests, made from arithmetic alone: row i has the same values in all of them."""

import hashlib

import torch

from influent import catalog
from influent.codec import Codec
from influent.coding import encode
from influent.layout import with_factors
from influent.rowwriter import Chunk, IndexWriter
from influent.storage import Store

LAYOUT = [
    {"block": "h.0", "kind": "linear", "in": 2, "out": 3, "width": 6},
    {"block": "h.1", "kind": "linear", "in": 2, "out": 2, "width": 4},
    {"block": "loss", "kind": "norm", "in": 3, "out": 3, "width": 3},
]


def write_catalog(store: Store, n: int) -> str:
    """A catalog of n rows; its digest."""
    ids = [f"row-{i}" for i in range(n)]
    hashes = [hashlib.blake2b(i.encode(), digest_size=16).hexdigest() for i in ids]
    return catalog.build_from_ids(ids, hashes, store, texts=ids).digest


def layout_of(rows: str) -> list[dict]:
    """LAYOUT with the factors of its matrices, where the codec asks for them."""
    codec = Codec.parse(rows)
    return [with_factors(b, codec, None if b["kind"] == "norm" else (b["in"], b["out"])) for b in LAYOUT]


def spec(data: str, *, rows: str = "float32", seed: int = 0) -> dict:
    return {
        "model": {"fingerprint": "blake2b-256:" + "ab" * 32},
        "data": data,
        "task": {"name": "causal-lm", "max_length": 512},
        "layout": layout_of(rows),
        "compress": "id",
        "seed": seed,
        "rng": 1,
        "rows": rows,
        "numerics": {"dtype": "float32", "matmul": "highest"},
    }


def rows_of(key: str, width: int, lo: int, hi: int) -> torch.Tensor:
    """[hi - lo, width] float32: the rows that the block has in every index made here."""
    ids = torch.arange(lo, hi, dtype=torch.float64)[:, None]
    return torch.sin(ids * 1.3 + torch.arange(width) * 0.7 + len(key)).float()


def write_chunk(writer: IndexWriter, chunk: Chunk) -> None:
    ids = torch.arange(chunk.lo, chunk.hi, dtype=torch.float32)
    rows = {key: rows_of(key, width, chunk.lo, chunk.hi) for key, width in writer.widths.items()}
    skipped = {"no target tokens": [chunk.lo]} if chunk.lo else {}
    dtype = writer.spec["rows"]
    captured = None
    if not writer.layout.is_plain:
        coded = [encode(writer.layout.codec, x, writer.layout.factors[key], key=key) for key, x in rows.items()]
        rows = {name: tensor for one in coded for name, tensor in one.tensors.items()}
        captured = torch.stack([one.captured for one in coded], 1) if writer.layout.has_captured else None
    writer.write(
        chunk, rows, loss=ids / 7, norm=ids + 1, tokens=ids + 5, dtype=dtype, skipped=skipped, captured=captured
    )


def make_index(store: Store, n: int = 10, *, shard_rows: int = 4, rows: str = "float32", seed: int = 0) -> IndexWriter:
    """Index n rows, or go on with what an interrupted call of the same arguments left."""
    writer = IndexWriter.open(
        store, spec(write_catalog(store, n), rows=rows, seed=seed), notes={"shard_rows": shard_rows}
    )
    for chunk in writer.pending(n):
        write_chunk(writer, chunk)
    writer.commit({"skipped": {"empty": 2}})
    return writer

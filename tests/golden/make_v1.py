"""Makes tests/golden/v1, the index of format 1.0 that every later release must read and, byte for byte, go on with.

    python tests/golden/make_v1.py FOLDER

The catalog is copied from tests/golden/v1 when it is there: Parquet's bytes depend on the library's version, so only
its digest is part of the format. So are the spec.json files, which say the version: whoever goes on with an index that
an older release began writes as that one did. Never regenerate the golden folder: a new format version gets its own.
"""

import shutil
import sys
from pathlib import Path

import torch

from influent import catalog
from influent.artifact import ArtifactWriter
from influent.layout import CATALOG
from influent.rowwriter import Chunk, IndexWriter
from influent.storage import Store

GOLDEN = Path(__file__).parent / "v1"
DATA = [
    {"id": "a", "text": "Water boils at 100 °C.", "source": "facts", "provider": "p1"},
    {"id": "b", "prompt": "Capital of Chad?", "completion": "N'Djamena", "source": "facts", "provider": "p2"},
    {"id": "c", "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
    {"id": "empty", "text": ""},
    {"id": "d", "text": "量子 😀"},
    {"id": "e", "text": "the fifth row"},
]
ROWS = 5
LAYOUT = [
    {"block": "h.0.fc", "kind": "linear", "in": 4, "out": 3, "width": 3},
    {"block": "h.1.fc", "kind": "linear", "in": 3, "out": 4, "width": 5},
    {"block": "norm", "kind": "norm", "in": 2, "out": 2, "width": 2},
]


def spec(data: str) -> dict:
    return {
        "model": {"fingerprint": "blake2b-256:" + "0" * 64},
        "data": data,
        "task": {"name": "causal-lm", "max_length": 512},
        "layout": LAYOUT,
        "compress": "mask:4x4 | sjlt:5",
        "seed": 0,
        "rng": 1,
        "rows": "bfloat16",
        "numerics": {"dtype": "float32", "matmul": "highest"},
    }


def write(writer: IndexWriter, chunk: Chunk) -> None:
    """Rows that bfloat16 holds exactly: element j of row i of a block is i + j/8, the first block's negative."""
    ids = torch.arange(chunk.lo, chunk.hi, dtype=torch.float32)
    rows = {key: ids[:, None] + torch.arange(width) / 8 for key, width in writer.widths.items()}
    rows["h.0.fc"] = -rows["h.0.fc"]
    skipped = {"no target tokens": [2]} if chunk.lo <= 2 < chunk.hi else {}
    writer.write(chunk, rows, loss=ids / 4, norm=ids + 1, tokens=ids + 7, dtype="bfloat16", skipped=skipped)


def make(folder: Path, *, golden_catalog: bool) -> None:
    store = Store(folder)
    if golden_catalog:
        for name in (*CATALOG, "spec.json", "curvature/fim/spec.json"):
            store.put_file(name, GOLDEN / name)
    else:
        catalog.build(DATA, store)
    rows = catalog.Catalog.open(store)
    writer = IndexWriter.open(store, spec(rows.digest), notes={"shard_rows": 2, "model": "somewhere"})
    for chunk in writer.pending(ROWS):
        write(writer, chunk)
    writer.commit({"skipped": rows.skipped, "covered": 0.5})
    gram = {"index": writer.digest, "curvature": "fim"}
    fitted = ArtifactWriter.open(store.child("curvature/fim"), "gram", gram, notes={})
    for key, width in writer.widths.items():
        fitted.put(key, {"gram": torch.eye(width, dtype=torch.float64)}, {"rank": width})
    fitted.put("a/b é", {"empty": torch.zeros(0, 3), "scalar": torch.tensor(7, dtype=torch.int64)}, {})
    fitted.commit({"rows": ROWS})


if __name__ == "__main__":
    target = Path(sys.argv[1])
    if target.exists():
        shutil.rmtree(target)
    make(target, golden_catalog=(GOLDEN / CATALOG[0]).exists())

"""Makes tests/golden/v1.1-live, an index without rows that every later release must read and go on with.

    python tests/golden/make_v1_1_live.py FOLDER

The catalog and spec.json are copied, as in make_v1.py. Never regenerate the golden folder.
"""

import shutil
import sys
from pathlib import Path

import make_v1
import torch

from influent import catalog
from influent.rowwriter import IndexWriter
from influent.storage import Store

GOLDEN = Path(__file__).parent / "v1.1-live"
DATA = [
    {"id": "a", "text": "Water boils at 100 °C.", "provider": "kettle"},
    {"id": "b", "prompt": "1 + 1 =", "completion": " 2"},
    {"text": "量子"},
]


def make(folder: Path, *, golden_catalog: bool) -> None:
    store = Store(folder)
    if golden_catalog:
        for name in ("catalog.json", "catalog.parquet", "spec.json"):
            store.put_file(name, GOLDEN / name)
        listed = catalog.Catalog.open(store, 1)
    else:
        listed = catalog.build(DATA, store)
    spec = make_v1.spec(listed.digest) | {"compress": "id", "rows": "none"}
    writer = IndexWriter.open(store, spec, notes={"shard_rows": 2})
    for chunk in writer.pending(listed.n):
        ids = torch.arange(chunk.lo, chunk.hi)
        writer.write(chunk, {}, loss=ids / 4, norm=ids + 1, tokens=ids + 7, dtype="none", skipped={})
    writer.commit({"skipped": listed.skipped})


if __name__ == "__main__":
    target = Path(sys.argv[1])
    if target.exists():
        shutil.rmtree(target)
    make(target, golden_catalog=GOLDEN.exists())

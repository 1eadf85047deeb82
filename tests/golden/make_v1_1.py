"""Makes tests/golden/v1.1, an index of format 1.1 that every later release must read and, byte for byte, go on with.

    python tests/golden/make_v1_1.py FOLDER

Rows of codec rank:2:int4 in a first generation, and more of them appended in a second. The codes come from arithmetic:
those of real rows would depend on the library that cuts them. The catalog and spec.json are copied, as in make_v1.py.
Never regenerate the golden folder: a new format version gets a folder of its own.
"""

import shutil
import sys
from pathlib import Path

import make_v1
import torch

from influent import catalog
from influent.rowwriter import Chunk, IndexWriter
from influent.storage import Store

GOLDEN = Path(__file__).parent / "v1.1"
OLD = [
    {"id": "a", "text": "Water boils at 100 °C."},
    {"id": "b", "prompt": "1 + 1 =", "completion": " 2"},
    {"text": "量子"},
]
NEW = [{"id": "d", "text": "It freezes at 0 °C."}, {"id": "blank", "text": ""}, {"text": "the fifth row"}]
LAYOUT = [
    {"block": "h.0.fc", "kind": "linear", "in": 4, "out": 6, "width": 24, "factors": [4, 6]},
    {"block": "h.1.fc", "kind": "linear", "in": 3, "out": 3, "width": 9, "factors": [3, 3]},
    {"block": "norm", "kind": "norm", "in": 5, "out": 5, "width": 5},
]  # cut to rank 2; too small for that; a vector


def spec(data: str) -> dict:
    return make_v1.spec(data) | {"layout": LAYOUT, "compress": "gauss:4x6", "rows": "rank:2:int4"}


def write(writer: IndexWriter, chunk: Chunk) -> None:
    """Byte j of row i's codes is 37 i + 11 j, with the padding of odd lengths left 0; scales are powers of two."""
    ids = torch.arange(chunk.lo, chunk.hi)
    tensors = {}
    for name, (dtype, shape) in writer.layout.rows(len(ids)).items():
        inner = torch.arange(torch.Size(shape[1:]).numel())
        values = (37 * ids[:, None] + 11 * inner).reshape(shape)
        tensors[name] = (2.0 ** (values % 5 - 2)).bfloat16() if dtype == "bfloat16" else (values % 256).to(torch.uint8)
    for name in ("h.1.fc", "norm"):  # 9 and 5 numbers
        tensors[name][:, -1] &= 15
    captured = (ids[:, None] + torch.arange(3)) / 8
    writer.write(
        chunk, tensors, loss=ids / 4, norm=ids + 1, tokens=ids + 7, dtype="rank:2:int4", skipped={}, captured=captured
    )


def make(folder: Path, *, golden: Path | None) -> None:
    """`golden` has the catalog; the version is that of the spec.json in `folder`, if there is one."""
    store = Store(folder)
    listed = copied(store, golden, 1) if golden else catalog.build(OLD, store)
    writer = IndexWriter.open(store, spec(listed.digest), notes={"shard_rows": 2})
    for chunk in writer.pending(listed.n):
        write(writer, chunk)
    writer.commit({"skipped": listed.skipped})
    listed = copied(store, golden, 2) if golden else catalog.extend(NEW, store, parts=1)
    part = listed.parts[-1]
    writer = IndexWriter.extend(store, part.digest)
    for chunk in writer.pending(listed.n):
        write(writer, chunk)
    writer.commit({"skipped": listed.skipped}, files=[part.record_name, part.name])


def copied(store: Store, golden: Path, parts: int) -> catalog.Catalog:
    for generation in range(parts):
        for suffix in ("json", "parquet"):
            name = f"{catalog.stem(generation)}.{suffix}"
            store.put_file(name, golden / name)
    return catalog.Catalog.open(store, parts)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    if target.exists():
        shutil.rmtree(target)
    Store(target).put_file("spec.json", GOLDEN / "spec.json")
    make(target, golden=GOLDEN)

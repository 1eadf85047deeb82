"""Verifies an index by docs/format.md alone: json, hashlib, struct, and Parquet for the catalog. No code of influent.

Written from the page, as a stranger would, so that the page is tested: where the two disagree, one of them is wrong.
"""

import hashlib
import json
import struct
from pathlib import Path
from urllib.parse import quote

SIZES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I8": 1, "U8": 1}
ROWS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def text_hash(data: bytes) -> str:
    return "blake2b-256:" + hashlib.blake2b(data, digest_size=32).hexdigest()


def json_digest(value: object) -> str:
    return text_hash(json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode())


def check(folder: Path) -> None:
    """AssertionError (or KeyError, FileNotFoundError) at the first thing that the page forbids."""
    spec, manifest = check_artifact(folder)
    assert manifest["kind"] == "index"
    check_shards(folder, spec, manifest)
    check_catalog(folder, spec, manifest)
    for fitted in sorted(folder.glob("curvature/*/manifest.json")):
        check_artifact(fitted.parent)


def check_artifact(folder: Path) -> tuple[dict, dict]:
    manifest = json.loads((folder / "manifest.json").read_bytes())
    head = json.loads((folder / "spec.json").read_bytes())
    for document in (manifest, head):
        assert document["format"][0] == 1 and document["requires"] == [] and document["kind"] == manifest["kind"]
    assert manifest["digest"] == json_digest({k: v for k, v in manifest.items() if k != "digest"})
    assert manifest["spec_hash"] == text_hash((folder / "spec.json").read_bytes())
    assert manifest["spec"] == head["digest"] == json_digest(head["spec"])
    assert manifest["generation"] >= 0
    for name, file in manifest["files"].items():
        check_bytes(folder / name, file)
    for record in manifest["records"]:
        stem = quote(record["name"], safe="")
        check_bytes(folder / "shards" / f"{stem}.safetensors", record)
        assert json.loads((folder / "shards" / f"{stem}.json").read_bytes()) == record
        assert record["spec"] == head["digest"]
        read_header((folder / "shards" / f"{stem}.safetensors").read_bytes())
    return head["spec"], manifest


def check_bytes(path: Path, expected: dict) -> None:
    data = path.read_bytes()
    assert len(data) == expected["bytes"] and text_hash(data) == expected["hash"], path


def read_header(data: bytes) -> tuple[int, dict]:
    (length,) = struct.unpack("<Q", data[:8])
    pairs = json.loads(data[8 : 8 + length], object_pairs_hook=lambda p: p if any(k == "dtype" for k, _ in p) else [p])
    entries = {name: dict(entry) for name, entry in pairs[0]}
    assert len(entries) == len(pairs[0])
    end = 0
    for entry in sorted(entries.values(), key=lambda e: e["data_offsets"]):
        lo, hi = entry["data_offsets"]
        count = 1
        for n in entry["shape"]:
            count *= n
        assert lo == end and hi == lo + count * SIZES[entry["dtype"]]
        assert (8 + length + lo) % SIZES[entry["dtype"]] == 0
        end = hi
    assert 8 + length + end == len(data)
    return 8 + length, entries


def check_shards(folder: Path, spec: dict, manifest: dict) -> None:
    end = 0
    for record in manifest["records"]:
        lo, hi = record["rows"]
        assert lo == end < hi
        end = hi
        n = hi - lo
        data = (folder / "shards" / f"{record['name']}.safetensors").read_bytes()
        start, entries = read_header(data)
        got = {name: (entry["dtype"], entry["shape"]) for name, entry in entries.items()}
        wanted = {block["block"]: (ROWS[spec["rows"]], [n, block["width"]]) for block in spec["layout"]}
        wanted |= {".id": ("I64", [n])} | {name: ("F32", [n]) for name in (".loss", ".norm", ".tokens")}
        assert got == wanted
        a, b = entries[".id"]["data_offsets"]
        assert struct.unpack(f"<{n}q", data[start + a : start + b]) == tuple(range(lo, hi))
    assert manifest["summary"]["rows"] == end


def check_catalog(folder: Path, spec: dict, manifest: dict) -> None:
    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(folder / "catalog.parquet", columns=["id", "hash"]).to_pylist()
    assert len(rows) == manifest["summary"]["rows"]
    h = hashlib.blake2b(digest_size=32)
    for row in rows:
        name = row["id"].encode()
        h.update(bytes.fromhex(row["hash"]) + struct.pack("<I", len(name)) + name)
    assert spec["data"] == f"blake2b-256:{h.hexdigest()}"

"""Verifies an index by docs/format.md alone: json, hashlib, struct, and Parquet for the catalog. No code of influent.

Written from the page, as a stranger would, so that the page is tested: where the two disagree, one of them is wrong.
"""

import hashlib
import json
import struct
from pathlib import Path
from urllib.parse import quote

SIZES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I8": 1, "U8": 1}
ROWS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int8": "I8", "int4": "U8", "sign": "U8"}
FEATURES = {"codec", "append", "ensemble", "residual", "live"}


def text_hash(data: bytes) -> str:
    return "blake2b-256:" + hashlib.blake2b(data, digest_size=32).hexdigest()


def json_digest(value: object) -> str:
    return text_hash(json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode())


def check(folder: Path) -> None:
    """AssertionError (or KeyError, FileNotFoundError) at the first thing that the page forbids."""
    spec, manifest = check_artifact(folder)
    if manifest["kind"] == "ensemble":
        check_ensemble(folder, spec, manifest)
        return
    assert manifest["kind"] == "index"
    check_shards(folder, spec, manifest)
    check_catalog(folder, spec, manifest)
    for fitted in sorted([*folder.glob("curvature/*/manifest.json"), *folder.glob("bases/manifest.json")]):
        check_artifact(fitted.parent)


def check_ensemble(folder: Path, spec: dict, manifest: dict) -> None:
    assert manifest["requires"] == ["ensemble"] and manifest["records"] == []
    assert set(manifest["files"]) == {f"{member['place']}/manifest.json" for member in spec["members"]}
    for member in spec["members"]:
        check(folder / member["place"])
        inner, listed = (
            json.loads((folder / member["place"] / name).read_bytes()) for name in ("spec.json", "manifest.json")
        )
        identity = listed["history"][-1]["digest"] if "history" in listed else inner["digest"]
        assert (member["digest"], spec["data"]) == (identity, inner["spec"]["data"])


def check_artifact(folder: Path) -> tuple[dict, dict]:
    manifest = json.loads((folder / "manifest.json").read_bytes())
    head = json.loads((folder / "spec.json").read_bytes())
    sealed = head["format"][1] >= 2
    for document in (manifest, head):
        major, minor = document["format"]
        assert major == 1 and minor == (2 if sealed else 1 if document["requires"] else 0)
        assert document["kind"] == manifest["kind"]
        assert set(document["requires"]) <= FEATURES
    assert ("append" in manifest["requires"]) == ("history" in manifest)
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
        assert record["spec"] == owner(head, manifest, record)
        assert ("digest" in record) == sealed
        if sealed:
            assert record["digest"] == json_digest({k: v for k, v in record.items() if k != "digest"})
        read_header((folder / "shards" / f"{stem}.safetensors").read_bytes())
    return head["spec"], manifest


def owner(head: dict, manifest: dict, record: dict) -> str:
    """The identity of the generation that wrote a record."""
    if "history" not in manifest:
        return head["digest"]
    data = []
    found = ""
    for number, entry in enumerate(manifest["history"]):
        data.append(entry["data"])
        identity = head["digest"] if number == 0 else json_digest({"spec": head["digest"], "data": data})
        assert (entry["generation"], entry["digest"]) == (number, identity)
        if record["rows"][1] <= entry["rows"] and not found:
            found = identity
    assert data[0] == head["spec"]["data"] and manifest["generation"] == len(data) - 1
    return found


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
        wanted = {}
        for block in spec["layout"]:
            tensors = coded(spec["rows"], block)
            assert not tensors.keys() & wanted.keys()
            wanted |= {name: (dtype, [n, *tail]) for name, (dtype, tail) in tensors.items()}
        if spec["rows"].startswith("rank:"):
            assert "codec" in manifest["requires"]
            wanted |= {".captured": ("U8", [n, len(spec["layout"])])}
        if "target" in spec:
            assert spec["target"] == "margin" and "residual" in manifest["requires"]
            wanted |= {".residual": ("F32", [n])}
        if spec["layout"][0]["kind"] == "all":
            (only,) = spec["layout"]
            assert only["in"] == sum(part["in"] * part["out"] for part in only["parts"])
        assert ("live" in manifest["requires"]) == (spec["rows"] == "none")
        stats = (".loss", ".tokens") if spec["rows"] == "none" else (".loss", ".norm", ".tokens")
        wanted |= {".id": ("I64", [n])} | {name: ("F32", [n]) for name in stats}
        assert got == wanted
        a, b = entries[".id"]["data_offsets"]
        assert struct.unpack(f"<{n}q", data[start + a : start + b]) == tuple(range(lo, hi))
    assert manifest["summary"]["rows"] == end


def bits_of(rows: str) -> str:
    return rows.rpartition(":")[2]


def rank_of(rows: str, block: dict) -> int:
    """The pairs kept of a block; 0 for a dense one."""
    if not rows.startswith("rank:") or "factors" not in block:
        return 0
    a, b = block["factors"]
    assert a * b == block["width"]
    c = min(int(rows.split(":")[1]), a, b)
    return c if c * (a + b) < a * b else 0


def packed(bits: str, count: int) -> int:
    return {"int4": -(-count // 2), "sign": -(-count // 8)}.get(bits, count)


def coded(rows: str, block: dict) -> dict:
    """The tensors of a block: name -> (dtype, shape of a row)."""
    if rows == "none":
        return {}
    bits, c, name = bits_of(rows), rank_of(rows, block), block["block"]
    scaled = bits in ("int8", "int4", "sign")
    if not c:
        found = {name: (ROWS[bits], [packed(bits, block["width"])])}
        return found | ({f"{name}.scale": ("BF16", [])} if scaled else {})
    a, b = block["factors"]
    found = {f"{name}.u": (ROWS[bits], [c, packed(bits, b)]), f"{name}.v": (ROWS[bits], [c, packed(bits, a)])}
    return found | ({f"{name}.scale": ("BF16", [c])} if scaled else {})


def numbers(data: bytes, dtype: str) -> list[float]:
    if dtype == "BF16":  # the upper half of a float32
        halves = struct.unpack(f"<{len(data) // 2}H", data)
        return [struct.unpack("<f", struct.pack("<I", half << 16))[0] for half in halves]
    return list(struct.unpack(f"<{len(data) // SIZES[dtype]}{dict(F32='f', F16='e', I8='b', U8='B')[dtype]}", data))


def unpacked(stored: list[float], bits: str, count: int) -> list[float]:
    """The `count` numbers of packed bytes; padding must be 0."""
    if bits == "int4":
        nibbles = [int(byte) & 15 for byte in stored] + [int(byte) >> 4 for byte in stored]
        assert not any(nibbles[count:])
        return [nibble - 16 if nibble > 7 else nibble for nibble in nibbles[:count]]
    if bits == "sign":
        flags = [int(byte) >> k & 1 for byte in stored for k in range(8)]
        assert not any(flags[count:])
        return [-1 if flag else 1 for flag in flags[:count]]
    return stored


def decode(folder: Path, shard: str, block: dict, rows: str) -> list[list[float]]:
    """The rows of a block in a shard, dense, as the page says."""
    data = (folder / "shards" / f"{shard}.safetensors").read_bytes()
    start, entries = read_header(data)
    bits, c, name = bits_of(rows), rank_of(rows, block), block["block"]

    def split(tensor: str, parts: int) -> list[list[float]]:
        lo, hi = entries[tensor]["data_offsets"]
        found = numbers(data[start + lo : start + hi], entries[tensor]["dtype"])
        size = len(found) // parts
        return [found[i * size : (i + 1) * size] for i in range(parts)]

    n = entries[".id"]["shape"][0]
    scaled = f"{name}.scale" in entries
    if not c:
        scales = split(f"{name}.scale", n) if scaled else [[1.0]] * n
        rest = [unpacked(row, bits, block["width"]) for row in split(name, n)]
        return [[scale * x for x in row] for (scale,), row in zip(scales, rest, strict=True)]
    a, b = block["factors"]
    us = [unpacked(row, bits, b) for row in split(f"{name}.u", n * c)]
    vs = [unpacked(row, bits, a) for row in split(f"{name}.v", n * c)]
    scales = [x for (x,) in split(f"{name}.scale", n * c)] if scaled else [1.0] * (n * c)
    found = []
    for row in range(n):
        pairs = range(row * c, (row + 1) * c)
        found.append([sum(scales[p] * vs[p][i] * us[p][j] for p in pairs) for i in range(a) for j in range(b)])
    return found


def check_catalog(folder: Path, spec: dict, manifest: dict) -> None:
    """Each part, its digest, and that no id stands in two places."""
    history = manifest.get("history", [{"data": spec["data"], "rows": manifest["summary"]["rows"]}])
    ids: list[str] = []
    for generation, entry in enumerate(history):
        stem = "catalog" if generation == 0 else f"catalog-{generation:06d}"
        assert {f"{stem}.json", f"{stem}.parquet"} <= manifest["files"].keys()
        assert json.loads((folder / f"{stem}.json").read_bytes()).get("first", 0) == len(ids)
        ids += check_part(folder / f"{stem}.parquet", entry["data"])
        assert len(ids) == entry["rows"]
    assert len(set(ids)) == len(ids) == manifest["summary"]["rows"]


def check_part(path: Path, digest: str) -> list[str]:
    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(path, columns=["id", "hash"]).to_pylist()
    h = hashlib.blake2b(digest_size=32)
    for row in rows:
        name = row["id"].encode()
        h.update(bytes.fromhex(row["hash"]) + struct.pack("<I", len(name)) + name)
    assert digest == f"blake2b-256:{h.hexdigest()}"
    return [row["id"] for row in rows]

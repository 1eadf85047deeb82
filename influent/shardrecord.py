"""What is written of a shard beside its payload, and repeated by the manifest: docs/format.md, "Records".

Not here: when a record is written and believed (artifact.py), what is in a payload (payload.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from urllib.parse import quote

from .digests import digest

SINCE = 2  # the minor version from which on a record has a digest of itself


@dataclass(frozen=True, slots=True)
class Record:
    """One committed shard: its row range [lo, hi) if it holds rows, its payload's size and hash, and the digest of
    the spec or of the generation that it belongs to. `sealed` ones carry their own digest."""

    name: str
    rows: tuple[int, int] | None
    bytes: int
    hash: str
    meta: dict[str, Any]
    spec: str
    sealed: bool = True

    @property
    def payload(self) -> str:
        return f"{stem(self.name)}.safetensors"

    def to_json(self) -> dict[str, Any]:
        rows = list(self.rows) if self.rows else None
        document = {
            "name": self.name, "rows": rows, "bytes": self.bytes, "hash": self.hash, "spec": self.spec,
            "meta": self.meta,
        }  # fmt: skip
        return document | {"digest": digest(document)} if self.sealed else document

    @classmethod
    def from_json(cls, obj: Any) -> Record:
        """The record; ValueError when a field is absent or of the wrong kind, or its digest is not that of the rest."""
        if not isinstance(obj, dict):
            raise ValueError(f"a record must be an object, got {type(obj).__name__}")
        for field, kind in (("name", str), ("bytes", int), ("hash", str), ("spec", str), ("meta", dict)):
            if not isinstance(obj.get(field), kind):
                raise ValueError(f"the record's {field} must be {kind.__name__}, got {obj.get(field)!r}")
        rows = obj.get("rows")
        if rows is not None:
            if not (isinstance(rows, list) and len(rows) == 2 and all(type(r) is int for r in rows)):
                raise ValueError(f"the record's rows must be [lo, hi] or null, got {rows!r}")
            rows = (rows[0], rows[1])
        sealed = "digest" in obj
        if sealed and obj["digest"] != digest({key: value for key, value in obj.items() if key != "digest"}):
            raise ValueError(f"the record of {obj['name']} does not match its own digest")
        return cls(obj["name"], rows, obj["bytes"], obj["hash"], obj["meta"], obj["spec"], sealed)


@lru_cache(maxsize=64)  # a query asks for the same shard's hundreds of times
def stem(name: str) -> str:
    return f"shards/{quote(name, safe='')}"  # a block's name may hold any character

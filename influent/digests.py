"""The identity of JSON values and objects: one canonical text, its hash, and where two values first differ."""

from __future__ import annotations

import json
from collections.abc import Iterable
from hashlib import blake2b
from typing import Any

from .errors import SpecError
from .storage import Buffer, Store

CHUNK = 1 << 24  # bytes hashed at a time


def canonical_json(obj: object) -> bytes:
    """The one text of a JSON value: keys sorted, no spaces, UTF-8; SpecError for what JSON cannot hold."""
    try:
        return json.dumps(obj, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
    except ValueError as e:  # NaN, infinity or half a surrogate pair
        raise SpecError(f"a value that JSON cannot hold: {e}") from e


def digest(obj: object) -> str:
    """The BLAKE2b-256 of a value's canonical JSON, as "blake2b-256:<hex>"."""
    return hash_bytes([canonical_json(obj)])


def hash_bytes(parts: Iterable[Buffer]) -> str:
    """The BLAKE2b-256 of the parts' bytes one after another, as "blake2b-256:<hex>"."""
    h = blake2b(digest_size=32)
    for part in parts:
        h.update(part)
    return f"blake2b-256:{h.hexdigest()}"


def hash_object(store: Store, name: str) -> str:
    """The BLAKE2b-256 of a stored object, read in pieces."""
    size = store.size(name)
    return hash_bytes(store.get_range(name, lo, min(lo + CHUNK, size)) for lo in range(0, size, CHUNK))


def difference(where: Store, old: Any, new: Any) -> str:
    """The message for the first field, in sorted order, in which two specs differ."""
    path, stored, asked = _first_difference("", old, new)
    return (
        f"{where}: in use by another spec: {path} is {_short(stored)} there and {_short(asked)} in this run; "
        "choose another directory, or delete that one"
    )


def _first_difference(path: str, old: Any, new: Any) -> tuple[str, Any, Any]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            a, b = old.get(key, ABSENT), new.get(key, ABSENT)
            if not _same(a, b):
                return _first_difference(f"{path}.{key}" if path else key, a, b)
    if isinstance(old, list) and isinstance(new, list):
        for i, (a, b) in enumerate(zip(old, new, strict=False)):
            if not _same(a, b):
                return _first_difference(f"{path}[{i}]", a, b)
        return f"the length of {path}", len(old), len(new)
    return path, old, new


ABSENT = object()


def _same(a: Any, b: Any) -> bool:
    # By text, as the digest is: to Python 1, 1.0 and True are equal.
    return a is not ABSENT and b is not ABSENT and canonical_json(a) == canonical_json(b)


def _short(value: Any) -> str:
    text = "absent" if value is ABSENT else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else f"{text[:117]}..."

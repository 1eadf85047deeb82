"""A stored object read piece by piece: as a seekable file, and to its hash. A remote one is never downloaded whole."""

from __future__ import annotations

import hashlib
import io
from typing import Any

from influent.storage import Store

CHUNK = 8 << 20  # bytes hashed at a time


def hash_object(store: Store, name: str) -> str:
    """BLAKE2b-256 of the object, as `blake2b-256:<hex>`. Raises CorruptError when it is missing."""
    hasher, size = hashlib.blake2b(digest_size=32), store.size(name)
    for lo in range(0, size, CHUNK):
        hasher.update(store.get_range(name, lo, min(size, lo + CHUNK)))
    return f"blake2b-256:{hasher.hexdigest()}"


class Ranged(io.RawIOBase):
    """A stored object as a seekable file, so that Parquet reads only the ranges it needs of a remote catalog."""

    def __init__(self, store: Store, name: str) -> None:
        self._store, self._name, self._size, self._at = store, name, store.size(name), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        part = self._store.get_range(self._name, self._at, min(self._size, self._at + len(buffer)))
        buffer[: len(part)] = part
        self._at += len(part)
        return len(part)

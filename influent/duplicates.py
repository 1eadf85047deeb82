"""Copies among texts, and queries contained in them: MinHash over shingles of words, in one pass.

Two rows are near copies when the Jaccard similarity of their sets of 5-word shingles, as 64 MinHash values estimate it,
is 0.8 or more (Broder, 1997); bands of 4 values find the candidates. A query is found in a row when half of its
shingles or more are in the row. Memory is 128 bytes a row and the queries' shingles. Not here: exact copies, which the
catalog's content hashes tell.
"""

from __future__ import annotations

import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from influent.baselines import words
from influent.rng import Stream

SHINGLE = 5  # words
HASHES, BAND = 64, 4
NEAR = 0.8
LEAK = 0.5  # share of a query's shingles that makes a row contain it
SHORTEST = 3  # words of a query that can be looked for at all
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / the golden ratio: an odd number that mixes well


class Sketches:
    """MinHash signatures of texts, added one by one, [rows, 64] of 16 bits."""

    def __init__(self) -> None:
        stream = Stream(0, "duplicates", "minhash", "flat/0")
        self._mult = stream.words(HASHES) | np.uint64(1)
        self._add = stream.words(HASHES, at=HASHES)
        self._parts: list[np.ndarray] = []

    def add(self, text: str) -> None:
        """Append one row. A text of fewer than 5 words is one shingle; one without a word is like no other."""
        parts = shingles(codes(text), SHINGLE)
        if not len(parts):
            parts = np.array([zlib.crc32(f"empty {len(self._parts)}".encode())], dtype=np.uint64)
        # multiply-shift: the high bits of a x + b are 2-universal (Dietzfelbinger et al., 1997)
        values = (parts[:, None] * self._mult + self._add) >> np.uint64(32)  # [shingles, 64]
        self._parts.append(values.min(axis=0).astype(np.uint16))

    def clusters(self) -> np.ndarray:
        """For each row the smallest row that it is linked to by near copies, itself if none, int64 [rows]."""
        n = len(self._parts)
        if n == 0:
            return np.zeros(0, dtype=np.int64)
        signatures = np.stack(self._parts)
        parent = np.arange(n)
        for first in range(0, HASHES, BAND):
            keys = np.ascontiguousarray(signatures[:, first : first + BAND]).view(np.uint64)[:, 0]
            order = np.argsort(keys, kind="stable")
            starts = np.flatnonzero(np.diff(keys[order], prepend=keys[order[0]] ^ np.uint64(1)))
            for bucket in np.split(order, starts[1:]):
                if len(bucket) > 1:
                    _link(parent, signatures, bucket)
        return np.array([_top(parent, row) for row in range(n)])


def _link(parent: np.ndarray, signatures: np.ndarray, bucket: np.ndarray) -> None:
    """Join the rows of a bucket that are near copies; each one found takes its own copies out of the comparison."""
    while len(bucket) > 1:
        first, rest = bucket[0], bucket[1:]
        near = (signatures[rest] == signatures[first]).mean(axis=1) >= NEAR
        for row in rest[near]:
            a, b = _top(parent, int(first)), _top(parent, int(row))
            parent[max(a, b)] = min(a, b)
        bucket = rest[~near]


def _top(parent: np.ndarray, row: int) -> int:
    while parent[row] != row:
        parent[row] = parent[parent[row]]
        row = int(parent[row])
    return row


class Leaks:
    """Which of the queries a text contains."""

    def __init__(self, queries: Sequence[str]) -> None:
        self._owners: dict[int, dict[int, list[int]]] = {}  # shingle size -> shingle -> queries
        self._counts: dict[int, int] = {}
        for number, query in enumerate(queries):
            word_codes = codes(query)
            if len(word_codes) < SHORTEST:
                continue
            size = min(SHINGLE, len(word_codes))
            parts = set(shingles(word_codes, size).tolist())
            self._counts[number] = len(parts)
            owners = self._owners.setdefault(size, defaultdict(list))
            for part in parts:
                owners[part].append(number)

    def find(self, text: str) -> list[int]:
        """The queries at least half of whose shingles are in the text."""
        found: Counter[int] = Counter()
        word_codes = codes(text)
        for size, owners in self._owners.items():
            for part in set(shingles(word_codes, size).tolist()) if len(word_codes) >= size else ():
                found.update(owners.get(part, ()))
        return sorted(number for number, hits in found.items() if hits >= LEAK * self._counts[number])


def codes(text: str) -> np.ndarray:
    """Each word's checksum, lower-cased, uint64 [words]."""
    return np.array([zlib.crc32(word.encode()) for word in words(text)], dtype=np.uint64)


def shingles(word_codes: np.ndarray, size: int) -> np.ndarray:
    """A hash of every run of `size` words, uint64; of all words if there are fewer; none if there is no word."""
    size = min(size, len(word_codes))
    if size == 0:
        return np.zeros(0, dtype=np.uint64)
    total = np.zeros(len(word_codes) - size + 1, dtype=np.uint64)
    for offset in range(size):
        mixed = (total ^ word_codes[offset : offset + len(total)]) * _FACTOR
        total = mixed ^ (mixed >> np.uint64(29))
    return total


def jaccard(one: Iterable[int], other: Iterable[int]) -> float:
    """The share of two sets' union that is in both; 0 for two empty ones."""
    a, b = set(one), set(other)
    return len(a & b) / len(a | b) if a | b else 0.0

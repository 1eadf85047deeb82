"""Features of words alone: the floor that any student must beat.

`tfidf`: signed feature hashing (Weinberger et al., 2009) of words and pairs of words into 8,192 numbers, weighted by
inverse document frequency, rows of unit length. `bm25`: what a search engine would say, the best and the mean BM25
score (baselines.py has its constants) against the target's queries, and the row's length. Both are fitted to texts,
and saved as tensors. Not here: regression (ridge.py), features of models (features.py).
"""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from influent.baselines import K1, B, words

SIZE = 1 << 13


@dataclass(frozen=True, slots=True, eq=False)
class TfIdf:
    """Hashed TF-IDF; `idf` [SIZE] is of the buckets."""

    idf: np.ndarray

    @staticmethod
    def fit(texts: Sequence[str]) -> TfIdf:
        found = np.zeros(SIZE)
        for text in texts:
            found[list({bucket for bucket, _ in _hashed(text)})] += 1
        return TfIdf(np.log((1 + len(texts)) / (1 + found)) + 1)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """[n, SIZE] float32, rows of length 1 (0 for a text without a word)."""
        out = np.zeros((len(texts), SIZE), dtype=np.float32)
        for row, text in zip(out, texts, strict=True):
            counts: dict[int, float] = {}
            for bucket, sign in _hashed(text):
                counts[bucket] = counts.get(bucket, 0.0) + sign
            if counts:
                places, values = np.array(list(counts)), np.array(list(counts.values()))
                row[places] = np.sign(values) * np.log1p(np.abs(values)) * self.idf[places]
                row /= np.linalg.norm(row) or 1.0
        return out


def _hashed(text: str) -> list[tuple[int, float]]:
    """(bucket, sign) of every word and pair of neighbouring words."""
    found = words(text)
    parts = [*found, *(f"{a} {b}" for a, b in zip(found, found[1:], strict=False))]
    codes = [zlib.crc32(part.encode()) for part in parts]
    return [(code % SIZE, 1.0 if code >> 31 else -1.0) for code in codes]


@dataclass(frozen=True, slots=True, eq=False)
class Bm25:
    """BM25 against fixed queries, words by their checksum: `weights` [W, Q] is idf times the query's count."""

    codes: np.ndarray  # [W] int64, rising
    weights: np.ndarray  # [W, Q]
    mean_length: float

    @staticmethod
    def fit(texts: Sequence[str], queries: Sequence[str]) -> Bm25:
        asked = [Counter(map(_code, words(query))) for query in queries]
        codes = np.array(sorted(set().union(*asked)), dtype=np.int64)
        place = {code: i for i, code in enumerate(codes.tolist())}
        frequency, total = np.zeros(len(codes)), 0
        for text in texts:
            found = [_code(word) for word in words(text)]
            total += len(found)
            frequency[[place[code] for code in set(found) if code in place]] += 1
        idf = np.log(1 + (len(texts) - frequency + 0.5) / (frequency + 0.5))
        weights = np.zeros((len(codes), len(queries)))
        for q, counts in enumerate(asked):
            for code, count in counts.items():
                weights[place[code], q] = idf[place[code]] * count
        return Bm25(codes, weights, max(1.0, total / max(1, len(texts))))

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """[n, 3] float32: the best and the mean score over queries, and the logarithm of the length."""
        out = np.zeros((len(texts), 3), dtype=np.float32)
        for row, text in zip(out, texts, strict=True):
            found = [_code(word) for word in words(text)]
            counts = Counter(found)
            norm = K1 * (1 - B + B * len(found) / self.mean_length)
            places = np.searchsorted(self.codes, list(counts)) if len(self.codes) else np.zeros(0, dtype=np.int64)
            scores = np.zeros(self.weights.shape[1])
            for at, (code, n) in zip(places.tolist(), counts.items(), strict=False):
                if at < len(self.codes) and self.codes[at] == code:
                    scores += self.weights[at] * (n * (K1 + 1) / (n + norm))
            row[:] = scores.max(initial=0.0), scores.mean() if len(scores) else 0.0, math.log1p(len(found))
        return out


def _code(word: str) -> int:
    return zlib.crc32(word.encode())

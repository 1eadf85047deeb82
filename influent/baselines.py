"""The two rankings that every attribution is printed beside: shared words (BM25), and chance.

Not here: gradients, or any other retriever. BM25 is Robertson and Zaragoza's (The Probabilistic Relevance Framework,
2009) with k1 = 1.2 and b = 0.75, over lower-cased runs of word characters, and the idf ln(1 + (N - n + .5)/(n + .5)),
which unlike the original is never negative.
"""

from __future__ import annotations

import heapq
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, runtime_checkable

from influent.rng import Stream

K1, B = 1.2, 0.75
_WORD = re.compile(r"\w+")


@runtime_checkable
class Texts(Protocol):
    """What BM25 reads, twice: every row's text in row order. A Catalog is one."""

    def texts(self) -> Iterable[str]: ...


def words(text: str) -> list[str]:
    """Lower-cased runs of word characters."""
    return _WORD.findall(text.lower())


def bm25(catalog: Texts, queries: Sequence[str], *, k: int) -> list[list[tuple[int, float]]]:
    """The `k` best (row, score) of each query, best first; equal scores by row; rows sharing no word are left out.

    Two passes over the texts; memory holds the queries' words and the k best, whatever the number of rows.
    """
    asked = [Counter(words(query)) for query in queries]
    vocabulary = set().union(*asked)
    rows, total, frequency = 0, 0, Counter[str]()
    for counts, length in _counted(catalog, vocabulary):
        rows += 1
        total += length
        frequency.update(counts.keys())
    idf = {word: math.log(1 + (rows - n + 0.5) / (n + 0.5)) for word, n in frequency.items()}
    best: list[list[tuple[float, int]]] = [[] for _ in asked]  # min-heaps of (score, -row)
    for row, (counts, length) in enumerate(_counted(catalog, vocabulary)):
        if not counts:
            continue
        norm = K1 * (1 - B + B * length * rows / total)
        weight = {word: idf[word] * n * (K1 + 1) / (n + norm) for word, n in counts.items()}
        for query, heap in zip(asked, best, strict=True):
            score = sum(n * weight[word] for word, n in query.items() if word in weight)
            if score > 0:
                _keep(heap, (score, -row), k)
    return [[(-negative, score) for score, negative in sorted(heap, reverse=True)] for heap in best]


def random_rows(n: int, queries: int, *, k: int, seed: int) -> list[list[int]]:
    """For each of `queries`, `min(k, n)` different rows of `n`, drawn uniformly; the same for the same seed."""
    return [_draw(Stream(seed, "baseline", "random", f"query/{query}"), n, min(k, n)) for query in range(queries)]


def _draw(stream: Stream, n: int, k: int) -> list[int]:
    if 2 * k >= n:
        return stream.permutation(n)[:k].tolist()
    rows: dict[int, None] = {}  # rejection keeps memory at k, where a permutation would take n
    at = 0
    while len(rows) < k:
        rows.update(dict.fromkeys((stream.words(2 * k, at=at) % n).tolist()))
        at += 2 * k
    return list(rows)[:k]


def _counted(catalog: Texts, vocabulary: set[str]) -> Iterator[tuple[Counter[str], int]]:
    for text in catalog.texts():
        found = words(text)
        yield Counter(word for word in found if word in vocabulary), len(found)


def _keep(heap: list[tuple[float, int]], entry: tuple[float, int], k: int) -> None:
    if len(heap) < k:
        heapq.heappush(heap, entry)
    elif heap and entry > heap[0]:
        heapq.heapreplace(heap, entry)

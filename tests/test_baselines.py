"""BM25 against a plain restatement of the formula, ties, and the random baseline's draws."""

import math
import random
from collections.abc import Iterator

import pytest

from influent.baselines import bm25, random_rows, words


class Rows:
    def __init__(self, texts: list[str]) -> None:
        self._texts = texts
        self.passes = 0

    def texts(self) -> Iterator[str]:
        self.passes += 1
        yield from self._texts


def oracle(texts: list[str], query: str) -> list[float]:
    docs = [words(text) for text in texts]
    mean = sum(map(len, docs)) / len(docs)
    scores = []
    for doc in docs:
        score = 0.0
        for word in words(query):
            n = sum(word in other for other in docs)
            idf = math.log(1 + (len(docs) - n + 0.5) / (n + 0.5))
            tf = doc.count(word)
            score += idf * tf * 2.2 / (tf + 1.2 * (0.25 + 0.75 * len(doc) / mean))
        scores.append(score)
    return scores


def test_bm25_is_the_formula() -> None:
    draw = random.Random(0)
    texts = [" ".join(draw.choices("abcdefgh", k=draw.randint(1, 12))) for _ in range(60)]
    queries = ["a b", "a A a c", "zebra", "h"]
    rows = Rows(texts)
    got = bm25(rows, queries, k=7)
    assert rows.passes == 2
    for query, best in zip(queries, got, strict=True):
        scores = oracle(texts, query)
        expected = sorted((i for i in range(60) if scores[i] > 0), key=lambda i: (-scores[i], i))[:7]
        assert [row for row, _ in best] == expected
        assert [score for _, score in best] == pytest.approx([scores[i] for i in expected], rel=1e-12)


def test_equal_scores_go_by_row_and_sharing_no_word_is_no_match() -> None:
    assert [row for row, _ in bm25(Rows(["x y", "x y", "z", "x y"]), ["X!"], k=2)[0]] == [0, 1]
    assert bm25(Rows(["x", ""]), ["q", ""], k=3) == [[], []]
    assert bm25(Rows(["x"]), ["x"], k=0) == [[]]


@pytest.mark.parametrize(("n", "k"), [(1, 5), (5, 5), (9, 5), (10**12, 5)])
def test_random_rows_are_distinct_in_range_and_keyed(n: int, k: int) -> None:
    draws = random_rows(n, 3, k=k, seed=1)
    assert all(len(set(rows)) == min(n, k) and all(0 <= row < n for row in rows) for rows in draws)
    assert draws == random_rows(n, 3, k=k, seed=1)
    if n > 5:
        assert draws[0] != draws[1]
        assert draws != random_rows(n, 3, k=k, seed=2)


def test_random_rows_are_uniform() -> None:
    counts = [0] * 20
    for rows in random_rows(20, 4000, k=3, seed=0):
        for row in rows:
            counts[row] += 1
    assert all(abs(count - 600) < 5 * math.sqrt(600) for count in counts)

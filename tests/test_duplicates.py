"""Near copies and contained queries against exact set similarities."""

import numpy as np
import pytest

from influent.duplicates import NEAR, Leaks, Sketches, codes, jaccard, shingles

WORDS = [f"word{i}" for i in range(3000)]


def similarity(a: str, b: str) -> float:
    return jaccard(shingles(codes(a), 5).tolist(), shingles(codes(b), 5).tolist())


def edited(text: str, changes: int, rng: np.random.Generator) -> str:
    parts = text.split()
    for place in rng.choice(len(parts), changes, replace=False):
        parts[place] = "changed"
    return " ".join(parts)


def test_near_copies_are_found_and_others_are_not():
    """Of edited copies, 95 % of those with similarity .9 or more are linked, and none below .6."""
    rng = np.random.default_rng(0)
    texts, pairs = [], []
    for changes in np.repeat([0, 1, 2, 4, 8, 15], 34)[:200]:
        first = " ".join(rng.choice(WORDS, 200))
        texts += [first, edited(first, int(changes), rng)]
        pairs.append((len(texts) - 2, len(texts) - 1))
    sketches = Sketches()
    for text in texts:
        sketches.add(text)
    linked = sketches.clusters()
    close = np.array([similarity(texts[a], texts[b]) for a, b in pairs])
    found = np.array([linked[b] == a for a, b in pairs])
    assert all(linked[a] == a for a, _ in pairs)
    assert found[close >= NEAR + 0.1].mean() >= 0.95
    assert found[close == 1].all()
    assert not found[close <= NEAR - 0.2].any()
    assert (close >= NEAR + 0.1).sum() > 60


def test_copies_of_copies_are_one_cluster_and_empty_texts_are_none():
    sketches = Sketches()
    for text in ("one two three four five six", "", "ONE two three, four five six!", "", "seven eight", "seven eight"):
        sketches.add(text)
    assert sketches.clusters().tolist() == [0, 1, 0, 3, 4, 4]
    assert Sketches().clusters().tolist() == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("They say the capital of Peru is Lima, which is so.", [0]),
        ("the capital of Peru is", [0]),
        ("the capital of Chad", []),
        ("yes indeed sir", [1]),
        ("", []),
        ("x y", []),
    ],
)
def test_contained_queries(text, found):
    queries = ["The capital of Peru is Lima", "Yes, indeed, sir", "x"]
    assert Leaks(queries).find(text) == found

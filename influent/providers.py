"""The provider report: what a group of rows is worth, how sure that is, and what is wrong with it.

Takes arrays of one value a row, whoever made them (LinFiK from gradients, or a student), and estimates with their
intervals; gives one plain document a provider. Not here: making values (valuing.py, appraise.py), money (settling.py).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from influent.bootstrap import Draws
from influent.duplicates import Leaks, Sketches
from influent.errors import DataError, SpecError
from influent.intervals import Interval, percentiles
from influent.progress import Progress

BY = ("provider", "source")
UNNAMED = "(none)"
LEVEL = 0.95


@dataclass(frozen=True, slots=True, eq=False)
class Groups:
    """Which provider each row belongs to: `labels` [N] int64 are places in `names`, in order of first appearance."""

    by: str
    names: list[str]
    labels: np.ndarray

    @property
    def counts(self) -> np.ndarray:
        return np.bincount(self.labels, minlength=len(self.names))


def groups_of(labels: Iterable[dict[str, str | None]], by: str) -> Groups:
    """Groups from each row's `provider` or `source`; rows that name none are a group of their own.

    Raises DataError when no row names one.
    """
    if by not in BY:
        raise SpecError(f"by is {by!r}, expected {' or '.join(BY)}")
    numbers: dict[str, int] = {}
    found = [numbers.setdefault(row[by] or UNNAMED, len(numbers)) for row in labels]
    if list(numbers) == [UNNAMED]:
        raise DataError(f"no row has a {by!r}: give it in the data, or use --by source")
    return Groups(by, list(numbers), np.array(found, dtype=np.int64))


@dataclass(frozen=True, slots=True, eq=False)
class Overlap:
    """Copies among rows, by exact content and by near similarity, and queries found in rows.

    `exact` and `near` give each row's first copy (itself if none), [N] int64; `leaks` the queries of each row that
    contains any, None when the queries are not known.
    """

    exact: np.ndarray
    near: np.ndarray
    leaks: dict[int, list[int]] | None


def overlap(
    hashes: Sequence[str], texts: Iterable[str], queries: Sequence[str], *, progress: Progress | None = None
) -> Overlap:
    """Look for copies and leaks in one pass over the texts."""
    first: dict[bytes, int] = {}
    exact = np.array([first.setdefault(bytes.fromhex(h), row) for row, h in enumerate(hashes)], dtype=np.int64)
    sketches, leaks, found = Sketches(), Leaks(queries), {}
    for row, text in enumerate(texts):
        sketches.add(text)
        if inside := leaks.find(text):
            found[row] = inside
        if progress is not None and row % 256 == 0:
            progress("copies", row, len(hashes))
    return Overlap(exact, np.minimum(exact, sketches.clusters()), found if queries else None)


def count_copies(first: np.ndarray, groups: Groups) -> tuple[np.ndarray, np.ndarray]:
    """For each group: rows beyond the first of their copies within it, and rows with a copy in another group."""
    num = len(groups.names)
    pairs = np.unique(np.stack([first, groups.labels], axis=1), axis=0)  # (cluster, group) once each
    within = groups.counts - np.bincount(pairs[:, 1], minlength=num)
    spread = np.bincount(pairs[:, 0], minlength=int(first.max(initial=0)) + 1)  # groups that a cluster is in
    across = np.bincount(groups.labels[spread[first] > 1], minlength=num)
    return within, across


@dataclass(frozen=True, slots=True, eq=False)
class Estimate:
    """A group's mean value with its intervals by name; the first is the one shown and paid by."""

    value: float
    intervals: dict[str, Interval]

    @property
    def shown(self) -> Interval:
        return next(iter(self.intervals.values()))


def from_draws(
    values: Sequence[float], draws: Draws, *, queries: int, rows: Sequence[int], shown: str
) -> list[Estimate]:
    """Estimates of each group from its bootstrap draws, over `queries` queries and each group's `rows` rows.

    The intervals are `queries` and `delivery`; `shown` is the name of the one that comes first.
    """
    by_name = {"queries": draws.queries.numpy(), "delivery": draws.both.numpy()}
    out = []
    for g, value in enumerate(values):
        both = float(by_name["delivery"][:, g].var())
        alone = float(by_name["queries"][:, g].var())
        over_queries = (alone * queries / max(1, queries - 1), queries - 1)
        over_rows = (max(0.0, both - alone) * rows[g] / max(1, rows[g] - 1), rows[g] - 1)
        parts = {"queries": [over_queries], "delivery": [over_queries, over_rows]}
        names = sorted(by_name, key=lambda name: name != shown)
        found = {n: percentiles(value, by_name[n][:, g].tolist(), level=LEVEL, of=parts[n]) for n in names}
        out.append(Estimate(value, found))
    return out


def report(
    groups: Groups,
    values: np.ndarray,
    tokens: np.ndarray,
    estimates: Sequence[Estimate],
    *,
    draws: np.ndarray,
    found: Overlap | None,
    describe: Callable[[Sequence[int]], list[dict[str, Any]]],
    shown: int,
) -> list[dict[str, Any]]:
    """One document a provider, the most valuable first.

    Args:
        values, tokens: of each row, [N].
        draws: bootstrap draws of the groups' values, [B, G], by which the ranks' stability is judged.
        found: None when the rows have no texts.
        describe: `row, id, source, provider, text` of rows, for the best and worst `shown` of each provider.
    """
    order = sorted(range(len(groups.names)), key=lambda g: (-estimates[g].value, groups.names[g]))
    ranks = (-draws).argsort(axis=1, kind="stable").argsort(axis=1, kind="stable") + 1  # [B, G]
    copies = None if found is None else {"exact": found.exact, "near": found.near}
    counted = {name: count_copies(first, groups) for name, first in (copies or {}).items()}
    out = []
    for rank, g in enumerate(order, 1):
        rows = np.flatnonzero(groups.labels == g)
        own, count = tokens[rows].sum(), len(rows)
        shown_interval = estimates[g].shown
        out.append(
            {
                "provider": groups.names[g],
                "rows": count,
                "tokens": int(own),
                "value": estimates[g].value,
                "low": shown_interval.low,
                "high": shown_interval.high,
                "intervals": {name: [interval.low, interval.high] for name, interval in estimates[g].intervals.items()},
                "total": count * estimates[g].value,
                "per_token": count * estimates[g].value / own if own else None,
                "positive": float((values[rows] > 0).mean()),
                "rank": rank,
                "rank_low": int(np.quantile(ranks[:, g], (1 - LEVEL) / 2, method="lower")),
                "rank_high": int(np.quantile(ranks[:, g], (1 + LEVEL) / 2, method="higher")),
                "rank_kept": float((ranks[:, g] == rank).mean()),
                "duplicates": {
                    f"{name}_{where}": int(counts[g])
                    for name, both in counted.items()
                    for where, counts in zip(("within", "across"), both, strict=True)
                },
                "leaks": _leaks(found, rows),
                **_extremes(rows, values, describe, shown),
                "payment": None,
            }
        )
    return out


def _leaks(found: Overlap | None, rows: np.ndarray) -> dict[str, int] | None:
    if found is None or found.leaks is None:
        return None
    inside = [found.leaks[row] for row in rows.tolist() if row in found.leaks]
    return {"rows": len(inside), "queries": len({query for queries in inside for query in queries})}


def _extremes(
    rows: np.ndarray, values: np.ndarray, describe: Callable[[Sequence[int]], list[dict[str, Any]]], shown: int
) -> dict[str, list[dict[str, Any]]]:
    falling = rows[np.argsort(-values[rows], kind="stable")]
    lists = {"best": falling[:shown], "worst": falling[::-1][:shown]}
    return {
        name: [
            {**row, "value": float(values[row["row"]])} for row in (describe(picked.tolist()) if len(picked) else [])
        ]
        for name, picked in lists.items()
    }

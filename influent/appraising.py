"""The verb `appraise`: what an offer is worth, by a student, with neither the large model nor a gradient.

One forward pass of the student a row, kept shard by shard as an artifact (kind `scores`): killed, it resumes. Where
labels of offered rows exist, of those that were held out of the student's fit or of an audit, each provider's value is
the difference estimate, which is unbiased and whose interval is valid whatever the student is worth. Not here: the
student (student.py), scores on disk (offers.py), commitments to them and their audit (commitments.py, auditing.py).
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from influent import catalog as catalogs
from influent import commitments, providers, settling
from influent import student as students
from influent.bootstrap import DRAWS, query_weights
from influent.catalog import Catalog
from influent.errors import DataError, SpecError
from influent.intervals import Interval, difference, percentiles, t_quantile
from influent.offers import score_rows
from influent.payments import money, refuse
from influent.progress import Progress
from influent.providers import Estimate, Groups
from influent.records import read_records
from influent.rng import Stream
from influent.storage import Store
from influent.student import Student
from influent.valuing import UNITS


def appraise(
    student: str,
    data: Any,
    *,
    out: str | None = None,
    by: str = "provider",
    budget: str | None = None,
    costs: str | None = None,
    labels: str | None = None,
    commit: bool = False,
    rows: int = 5,
    draws: int = DRAWS,
    seed: int = 0,
    limit: int | None = None,
    model: str | None = None,
    token_budget: int = 4096,
    device: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Score an offer with a student and report what each provider's rows are worth.

    Args:
        student: the directory that `distill` wrote.
        data: a file, folder, hub name or sequence of records: the offer.
        out: a directory for the scores; called again with it, an interrupted run resumes. By default none is kept.
        budget, costs: as for `value`.
        labels: a CSV or JSONL file of `hash` and `value`, rows labelled since: an audit.
        commit: commit to the scores in `out`, for an audit (auditing.py).
        model: where the student's small model is, if not where it was.

    Returns:
        The document of docs/schemas/value.json; with `commit`, also the `commitment`.

    Raises:
        FormatError, CorruptError, MismatchError: the student or the directory is not what it should be.
        DataError, SpecError: as their classes say.
    """
    if commit and out is None:
        raise SpecError("a commitment is to scores that are kept: give --out as well")
    purse, asked = None if budget is None else money(budget), settling.read_costs(costs)
    made = students.open_student(student, model=model, token_budget=token_budget, device=device)
    audited = read_labels(labels)
    with _place(out) as store:
        listed = catalogs.build(data, store, limit=limit, progress=progress)
        values, tokens = score_rows(made, listed, store, progress)
        groups = providers.groups_of(listed.fields("provider", "source"), by)
        hashes = [row["hash"] or "" for row in listed.fields("hash")]
        known = students.read_labels(Store(student), made.digest)
        labelled = _match(hashes, known, audited)
        estimates, drawn = estimate(groups, values, labelled, draws=draws, seed=seed)
        document = providers.report(
            groups, values, tokens, estimates, draws=drawn,
            found=providers.overlap(hashes, listed.texts(), [], progress=progress), describe=listed.describe,
            shown=rows,
        )  # fmt: skip
        best = _best(listed, values, rows)
        statement = {"commitment": commitments.commit(store, by=by)} if commit else {}
    fidelity = made.summary["fidelity"]
    found = np.bincount(groups.labels[labelled.rows], minlength=len(groups.names)).tolist()
    counts = dict(zip(groups.names, found, strict=True))
    why = refuse(queries=made.spec["queries"], fidelity=fidelity["spearman"], labels=counts)
    payments = settling.settle(document, budget=purse, costs=asked, refused=why)
    return {
        "target": {**made.summary["target"], "queries": made.spec["queries"], "digest": made.spec["target"]},
        "by": by, "providers": document, "payments": payments, "rows": best, "method": _facts(made, estimates),
        "fidelity": {**fidelity, "labels_offered": counts}, **statement,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Labelled:
    """Offered rows whose value is known: `rows` [m], and `values` [m, Q] of each query, or [m, 1] of all at once."""

    rows: np.ndarray
    values: np.ndarray


def estimate(
    groups: Groups, values: np.ndarray, labelled: Labelled, *, draws: int, seed: int
) -> tuple[list[Estimate], np.ndarray]:
    """Each group's mean value with its intervals, and bootstrap draws of it [B, G].

    With two labels or more among a group's rows: the difference estimator with its t interval (`labels`), and a
    two-way bootstrap over labelled rows and queries (`labels and queries`) where values are known by query. A group
    with fewer has the mean of its scores, and a rough interval of the pooled error of one score: `unlabelled`.
    """
    shares = query_weights(labelled.values.shape[1], draws, seed=seed).double().numpy()  # [B, Q]
    residuals = labelled.values.mean(axis=1) - values[labelled.rows]
    pooled = float(residuals.std(ddof=1)) if len(residuals) > 1 else float(values.std())
    estimates, drawn = [], np.zeros((draws, len(groups.names)))
    for g, name in enumerate(groups.names):
        own, mine = groups.labels == g, groups.labels[labelled.rows] == g
        mean, size, n = float(values[own].mean(dtype=np.float64)), int(own.sum()), int(mine.sum())
        if n < min(2, size):
            reach = t_quantile(0.975, max(1, len(residuals) - 1)) * pooled
            estimates.append(Estimate(mean, {"unlabelled": Interval(mean, mean - reach, mean + reach)}))
            drawn[:, g] = mean + pooled * Stream(seed, "appraise", "normals", name).normals(draws)
            continue
        found = difference(mean, residuals[mine].tolist(), size)
        scores = values[labelled.rows[mine]]
        drawn[:, g], parts = _draws(mean, labelled.values[mine], scores, size, shares, seed, name)
        both = percentiles(found.value, drawn[:, g].tolist(), of=parts)
        by_query = {"labels and queries": both} if labelled.values.shape[1] > 1 else {}
        estimates.append(Estimate(found.value, {"labels": found, **by_query}))
    return estimates, drawn


def _draws(
    mean: float, y: np.ndarray, scores: np.ndarray, size: int, shares: np.ndarray, seed: int, name: str
) -> tuple[np.ndarray, list[tuple[float, int]]]:
    """Draws [B] of mean + mean(y - f): queries resampled, and labelled rows, whose spread is that of n of N rows; and
    the variance of each part with its degrees of freedom.

    What is peculiar to a row and a query is counted once, with the rows: these are resampled by their means over all
    queries, and the queries' part is freed of what their means over the n labelled rows have of it (`_freed`).
    """
    (n, num_queries), draws = y.shape, len(shares)
    picks = Stream(seed, "appraise", "labels", name).buckets(draws * n, n).reshape(draws, n)
    residual = y.mean(axis=1) - scores
    resampled = residual[picks].mean(axis=1) - residual.mean()
    # resampling n rows has the variance of (n - 1) / n^2 of s^2, sampling n of N without replacement (1 - n/N) / n
    over_rows = np.sqrt((1 - n / size) * n / max(1, n - 1)) * resampled
    own = y.mean(axis=0)  # of each query, over the labelled rows
    over_queries = _freed(y, size) * np.sqrt(num_queries / max(1, num_queries - 1)) * (shares @ own - own.mean())
    drawn = mean + float(residual.mean()) + over_queries + over_rows
    return drawn, [(float(over_queries.var()), num_queries - 1), (float(over_rows.var()), n - 1)]


def _freed(y: np.ndarray, size: int) -> float:
    """The root of the share of the variance of queries' means over n rows that is left in those over `size` rows."""
    n, num_queries = y.shape
    if n < 2 or num_queries < 2:
        return 1.0
    own = y.mean(axis=0)
    apart = y - y.mean(axis=1, keepdims=True) - own + y.mean()
    peculiar = float((apart**2).sum()) / ((n - 1) * (num_queries - 1)) * (1 / n - 1 / size)
    found = float(own.var(ddof=1))
    return float(np.sqrt(max(0.0, 1 - peculiar / found))) if found > 0 else 1.0


def _match(hashes: Sequence[str], known: students.Labels | None, audited: dict[str, float]) -> Labelled:
    """The labels of offered rows: an audit's, or else those that were held out of the student's fit. A content that is
    offered twice is labelled once."""
    place: dict[str, int] = {}
    for row, content in enumerate(hashes):
        place.setdefault(content, row)
    if audited:
        if missing := next((content for content in audited if content not in place), None):
            raise DataError(f"the label of {missing} is of no row of this offer")
        rows = [place[content] for content in audited]
        return Labelled(np.array(rows, dtype=np.int64), np.array(list(audited.values()), dtype=np.float64)[:, None])
    if known is None:
        return Labelled(np.zeros(0, dtype=np.int64), np.zeros((0, 1)))
    found = [i for i, content in enumerate(known.hashes) if known.held[i] and content in place]
    rows = np.array([place[known.hashes[i]] for i in found], dtype=np.int64)
    return Labelled(rows, known.values[found].astype(np.float64))


def read_labels(path: str | None) -> dict[str, float]:
    """Labels of an audit by content hash; DataError, with file and line, for a record without `hash` and `value`."""
    if path is None:
        return {}
    found: dict[str, float] = {}
    for record in read_records(path):
        content, value = record.fields.get("hash"), record.fields.get("value")
        try:
            number = float(value)  # pyright: ignore[reportArgumentType]
        except (TypeError, ValueError):
            number = float("nan")
        if not isinstance(content, str) or not np.isfinite(number):
            raise DataError(f"{record.where}: expected the fields hash and value, a number")
        if content in found:
            raise DataError(f"{record.where}: {content} has a label already")
        found[content] = number
    if not found:
        raise DataError(f"{path}: there are no labels in it")
    return found


def _best(listed: Catalog, values: np.ndarray, shown: int) -> dict[str, Any]:
    falling = np.argsort(-values, kind="stable")
    lists = {"best": falling[:shown], "worst": falling[::-1][:shown]}
    return {
        name: [{**row, "value": float(values[row["row"]])} for row in listed.describe(picked.tolist())]
        for name, picked in lists.items()
    }


def _facts(student: Student, estimates: Sequence[Estimate]) -> dict[str, Any]:
    names = [next(iter(estimate.intervals)) for estimate in estimates]
    return {
        "method": "alinfik", "rung": student.spec["rung"], "normalize": student.spec["normalize"],
        "unit": student.spec.get("unit") or UNITS[student.spec["normalize"]],
        "interval": "unlabelled" if "unlabelled" in names else "labels",
        "model": student.spec["model"], "student": student.digest, "distilled": student.summary["date"],
    }  # fmt: skip


@contextmanager
def _place(out: str | None) -> Iterator[Store]:
    if out is not None:
        yield Store(out)
        return
    with tempfile.TemporaryDirectory(prefix="influent-") as folder:
        yield Store(folder)

"""Relevance judgements: which training rows are right answers to which query, as booleans [Q, N].

From an array or .npy file, or a table (JSONL, CSV, Parquet) of pairs: `query`, its number from 0, and the row's `id`
or its number `row`. Not here: what is made of them (judging.py).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from influent.contenders import load_array
from influent.errors import DataError, MismatchError
from influent.records import read_records


def read(given: Any, ids: Sequence[str | None] | None, shape: tuple[int, int]) -> np.ndarray:
    """The judgements for queries and rows of this `shape` (Q, N), bool.

    Args:
        ids: those of the rows, if they have any.

    Raises:
        MismatchError: an array is of another shape.
        DataError: a pair names no query or row; names where it stands.
    """
    if isinstance(given, str) and not given.endswith(".npy"):
        return _pairs(given, ids, shape)
    array = load_array("relevant", given) if isinstance(given, str) else np.asarray(given)
    if array.shape != shape:
        raise MismatchError(f"--relevant: expected queries x rows, {list(shape)}, got {list(array.shape)}")
    return array.astype(bool)


def _pairs(path: str, ids: Sequence[str | None] | None, shape: tuple[int, int]) -> np.ndarray:
    found, places = np.zeros(shape, dtype=bool), {name: row for row, name in enumerate(ids or ()) if name is not None}
    for record in read_records(path):
        query = _number(record.fields, "query", shape[0])
        name = record.fields.get("id")
        row = _number(record.fields, "row", shape[1]) if name is None else places.get(str(name))
        if query is None or row is None:
            raise DataError(
                f"{record.where}: expected `query`, 0 to {shape[0] - 1}, and the `id` of a row (or `row`, 0 to "
                f"{shape[1] - 1}), got {dict(record.fields)}"
            )
        found[query, row] = True
    return found


def _number(fields: Mapping[str, Any], name: str, below: int) -> int | None:
    try:
        given, number = float(fields[name]), int(fields[name])
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    return number if given == number and 0 <= number < below else None

"""Flat tables as files: records of numbers and text to Parquet or CSV, whole or not at all.

Not here: which records (report.py, value_page.py, valuing.py).
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from influent.storage import Store

Records = Sequence[Mapping[str, Any]]
KINDS = {"score": float, "percentile": float, "value": float}  # whatever the first rows hold


def write_table(records: Records, path: str, *, columns: Sequence[str] = ()) -> None:
    """Write records to a `.parquet` or `.csv` file; CorruptError when it cannot be written.

    `columns` are what a table of no records has; otherwise they are those of the first record.
    """
    names = list(records[0]) if records else list(columns)
    data = _parquet(records, names) if path.endswith(".parquet") else _csv(records, names)
    write_file(path, data)


def write_file(path: str, data: bytes) -> None:
    """One file at a local or fsspec path, whole or not at all."""
    folder, separator, name = path.rpartition("/")
    Store((folder or "/") if separator else ".").put(name, data)


def write_array(array: Any, path: str) -> None:
    """A NumPy array as a `.npy` file, whole or not at all."""
    import numpy as np

    sink = io.BytesIO()
    np.save(sink, array)
    write_file(path, sink.getvalue())


def _parquet(records: Records, names: Sequence[str]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
    kinds = {name: KINDS.get(name) or _kind(record.get(name) for record in records) for name in names}
    schema = pa.schema([(name, types.get(kind, pa.string())) for name, kind in kinds.items()])
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([dict(record) for record in records], schema=schema), sink)
    return sink.getvalue()


def _kind(values: Iterable[Any]) -> type:
    """The type of the values that are there: a float if any is."""
    found = {type(value) for value in values if value is not None}
    return float if found == {int, float} else next(iter(found)) if len(found) == 1 else str


def _csv(records: Records, names: Sequence[str]) -> bytes:
    import csv

    sink = io.StringIO(newline="")
    writer = csv.DictWriter(sink, names)
    writer.writeheader()
    writer.writerows(records)
    return sink.getvalue().encode()

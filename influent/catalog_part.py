"""One part of a catalog: a Parquet file of rows and its record, written in one streaming pass and read by row.

Not here: which parts make a catalog and what may replace them (catalog.py).
"""

from __future__ import annotations

import hashlib
import json
import struct
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from influent.errors import CorruptError, DataError, FormatError, SpecError
from influent.progress import Progress
from influent.ranged import Ranged, hash_object
from influent.records import content_hash, display_text, read_ref
from influent.storage import Store

GROUP_ROWS, GROUP_CHARS = 4096, 8 << 20  # a row group is closed at whichever comes first
SHOWN_SKIPS = 5


class Part:
    """One written part of a catalog, read by row. Its rows are numbered first..first+n-1, as in the index."""

    def __init__(self, store: Store, stem: str, record: dict[str, Any]) -> None:
        self.store = store
        self.name, self.record_name = f"{stem}.parquet", f"{stem}.json"
        self.first: int = record.get("first", 0)
        self.content: str | None = record.get("content")  # of the contents and the ids given, without the default ids
        self.keep: Literal["text", "reference"] = record.get("keep", "text")
        self.n: int = record["rows"]
        self.digest: str = record["digest"]
        self.skipped: dict[str, int] = record["skipped"]
        self.skipped_at: dict[str, list[str]] = record["skipped_at"]  # the first few "file:line" of each reason
        self.bytes: int = record["bytes"]  # of the Parquet file
        self.hash: str = record["hash"]
        self._opened: tuple[Any, list[int]] | None = None

    @classmethod
    def open(cls, store: Store, stem: str) -> Part:
        """Raises FormatError when there is no such part, CorruptError when it cannot be read."""
        name, verb = f"{stem}.json", "index" if stem == "catalog" else "append"
        if not store.exists(name):
            raise FormatError(f"{store}: holds no {name}; the catalog was not finished: run `influent {verb}` again")
        try:
            return cls(store, stem, json.loads(store.get(name)))
        except (ValueError, KeyError, TypeError) as e:
            raise CorruptError(
                f"{store}/{name}: not a catalog record ({e}); delete the directory and build the index again"
            ) from e

    def examples(self, lo: int, hi: int) -> list[dict[str, Any]]:
        """The contents of rows lo..hi-1. Raises DataError when a referenced file has changed."""
        return [self._content(part) for part in self._read(range(lo, hi), ("row", "text", "example", "ref", "hash"))]

    def describe(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """For each row its `row, id, source, provider, text`: what a result shows."""
        names = ("row", "id", "source", "provider", "text", "example", "ref", "hash")
        shown = []
        for part in self._read(rows, names):
            text = part["text"] if part["ref"] is None else display_text(self._content(part))
            shown.append({**{name: part[name] for name in names[:4]}, "text": text or ""})
        return shown

    def places(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """`id` and `where` ("file:line") of each row, for messages."""
        return self._read(rows, ("id", "where"))

    def ids(self) -> Iterator[str]:
        """Every id in order."""
        for group in self._groups(["id"]):
            yield from (part["id"] for part in group)

    def labels(self) -> Iterator[dict[str, str | None]]:
        """`source` and `provider` of every row in order."""
        return self.fields("source", "provider")

    def fields(self, *names: str) -> Iterator[dict[str, str | None]]:
        """Some columns of every row in order: `id`, `source`, `provider`, `hash`, …"""
        for group in self._groups(list(names)):
            yield from group

    def _groups(self, columns: list[str]) -> Iterator[list[dict[str, Any]]]:
        file, starts = self._file()
        for group in range(len(starts) - 1):
            yield self._group(file, group, columns).to_pylist()

    def _group(self, file: Any, group: int, columns: Sequence[str]) -> Any:
        import pyarrow as pa

        try:
            return file.read_row_group(group, columns=list(columns))
        except (pa.ArrowException, OSError) as e:
            raise CorruptError(
                f"{self.store}/{self.name}: cannot be read: {' '.join(str(e).split())}; "
                "`influent verify` lists all damage"
            ) from e

    def texts(self) -> Iterator[str]:
        """Every row's readable text in order, one row group in memory at a time."""
        for group in self._groups(["row", "text", "example", "ref", "hash"]):
            for part in group:
                yield (part["text"] if part["ref"] is None else display_text(self._content(part))) or ""

    def verify(self) -> list[str]:
        """Every problem of the stored catalog, one line each: bytes, digest, and content against its hash."""
        if not self.store.exists(self.name):
            return [f"{self.store}/{self.name}: missing"]
        if self.store.size(self.name) != self.bytes:
            return [f"{self.store}/{self.name}: expected {self.bytes} bytes, got {self.store.size(self.name)}"]
        got = hash_object(self.store, self.name)
        if got != self.hash:
            return [f"{self.store}/{self.name}: expected {self.hash}, got {got}"]
        problems = []
        digest = Digest()
        file, starts = self._file()
        for group in range(len(starts) - 1):
            for part in file.read_row_group(group).to_pylist():
                digest.add(part["hash"], part["id"])
                try:
                    self._content(part)
                except (DataError, CorruptError, SpecError) as e:
                    # rows of a plain data set carry no content, and that is no fault
                    problems += [] if isinstance(e, SpecError) else [str(e)]
        if (digest.rows, digest.text()) != (self.n, self.digest):
            problems.append(f"{self.store}/{self.name}: expected {self.n} rows and {self.digest}, got {digest.rows}")
        return problems

    def _content(self, part: dict[str, Any]) -> dict[str, Any]:
        if part["ref"] is not None:
            content = read_ref(part["ref"])
            if content_hash(content) != part["hash"]:
                raise DataError(f"{part['ref']}: row {part['row']} has changed since it was indexed; restore the file")
            return content
        if part["example"] == "":
            raise SpecError(f"row {part['row']}: the catalog holds no example, only its id; pass the data set again")
        return json.loads(part["example"]) if part["example"] is not None else {"text": part["text"]}

    def _file(self) -> tuple[Any, list[int]]:
        if self._opened is None:
            import pyarrow as pa
            import pyarrow.parquet as pq

            local = self.store.local(self.name)
            try:
                file = (
                    pq.ParquetFile(str(local), memory_map=True)
                    if local
                    else pq.ParquetFile(Ranged(self.store, self.name))
                )
            except (pa.ArrowException, OSError) as e:
                raise CorruptError(f"{self.store}/{self.name}: not readable ({str(e).splitlines()[0]})") from e
            starts = [0]
            for group in range(file.num_row_groups):
                starts.append(starts[-1] + file.metadata.row_group(group).num_rows)
            if starts[-1] != self.n:
                raise CorruptError(f"{self.store}/{self.name}: expected {self.n} rows, got {starts[-1]}")
            self._opened = file, starts
        return self._opened

    def _read(self, rows: Sequence[int], columns: Sequence[str]) -> list[dict[str, Any]]:
        file, starts = self._file()
        wanted: dict[int, list[int]] = {}  # row group -> places in `rows`
        for place, row in enumerate(rows):
            if not 0 <= row - self.first < self.n:
                raise IndexError(f"row {row} of {self.first} to {self.first + self.n - 1}")
            wanted.setdefault(bisect_right(starts, row - self.first) - 1, []).append(place)
        out: list[dict[str, Any]] = [{}] * len(rows)
        for group, places in sorted(wanted.items()):
            table = self._group(file, group, columns)
            picked = table.take(_numbers([rows[place] - self.first - starts[group] for place in places])).to_pylist()
            for place, part in zip(places, picked, strict=True):
                out[place] = part
        return out


def _numbers(values: Sequence[int]) -> Any:
    """As an Arrow array, from bytes: given a list, PyArrow imports pandas to look whether it is one of its own, which
    is half a second of a first query."""
    import pyarrow as pa

    return pa.Array.from_buffers(pa.int64(), len(values), [None, pa.py_buffer(array("q", values))])


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the Parquet file. `example` is null when `text` is all of it, "" when the caller keeps the example."""

    id: str
    source: str
    provider: str | None
    text: str | None
    example: str | None
    ref: str | None
    hash: str
    where: str


@dataclass
class Skips:
    counts: dict[str, int] = field(default_factory=dict)
    places: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, where: str) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1
        places = self.places.setdefault(reason, [])
        if len(places) < SHOWN_SKIPS:
            places.append(where)


class Digest:
    """The data's fingerprint, row by row; the rule is in catalog.py's header."""

    def __init__(self) -> None:
        self.rows = 0
        self._hash = hashlib.blake2b(digest_size=32)

    def add(self, content: str, row_id: str) -> None:
        name = row_id.encode()
        self._hash.update(bytes.fromhex(content) + struct.pack("<I", len(name)) + name)
        self.rows += 1

    def text(self) -> str:
        return f"blake2b-256:{self._hash.hexdigest()}"


@dataclass
class Written:
    """What a written Parquet file holds: its digest, the digest of contents and given ids, and every id's hash."""

    digest: Digest = field(default_factory=Digest)
    content: Digest = field(default_factory=Digest)
    id_hashes: bytearray = field(default_factory=bytearray)


def hash_id(name: str) -> bytes:
    return hashlib.blake2b(name.encode(), digest_size=16).digest()


def write_rows(rows: Iterator[Row], path: Path, *, first: int = 0, progress: Progress | None = None) -> Written:
    """Write `rows`, numbered from `first`, into a Parquet file; memory is one row group plus 16 bytes a row."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    strings = ("id", "source", "provider", "text", "example", "ref", "hash", "where")
    schema = pa.schema([("row", pa.int64()), *((name, pa.string()) for name in strings)])
    done, group, chars = Written(), [], 0
    try:
        with pq.ParquetWriter(path, schema, compression="zstd") as writer:
            for row in rows:
                fields = {name: getattr(row, name) for name in strings} | {
                    "row": first + done.digest.rows,
                    "id": row.id or str(first + done.digest.rows),
                }
                done.digest.add(row.hash, fields["id"])
                done.content.add(row.hash, row.id)
                done.id_hashes += hash_id(fields["id"])
                group.append(fields)
                chars += len(row.text or "") + len(row.example or "")
                if len(group) == GROUP_ROWS or chars >= GROUP_CHARS:
                    writer.write_table(pa.Table.from_pylist(group, schema=schema))
                    group, chars = [], 0
                    if progress is not None:
                        progress("catalog", done.digest.rows, 0)
            if group:
                writer.write_table(pa.Table.from_pylist(group, schema=schema))
    except OSError as e:
        raise CorruptError(
            f"{path}: the catalog could not be written ({e.strerror or e}); free some space there"
        ) from e
    return done


def refuse_repeated_ids(id_hashes: bytearray, places: Callable[[list[int]], list[dict[str, Any]]]) -> None:
    """DataError, naming both places, when two of the hashed ids are equal; `places` gives `id` and `where` of rows."""
    import numpy as np

    words = np.frombuffer(id_hashes, dtype="<u8").reshape(-1, 2)
    order = np.lexsort((words[:, 1], words[:, 0]))  # stable, so equal ids stay in row order
    equal = np.flatnonzero((words[order[1:]] == words[order[:-1]]).all(axis=1))
    if len(equal) == 0:
        return
    at = equal[np.argmin(order[equal + 1])]
    first, second = places(sorted((int(order[at]), int(order[at + 1]))))
    raise DataError(f'{second["where"]}: id "{second["id"]}" repeats that of {first["where"]}; ids must be unique')

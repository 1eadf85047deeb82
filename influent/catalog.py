"""The catalog: which example each row of an index is. Row id -> id, source, provider, text or where to read it, hash.

Does: one streaming pass over the data that checks everything, and reads back by row. Its digest is the data's
fingerprint. Does not: tokenise, or know about gradients. Memory while building is one row group plus 16 bytes a row.

    catalog.parquet   the rows, in the data's order
    catalog.json      written after it: rows, digest, skipped records, and the Parquet file's size and hash

Content hash: blake2b-128 of the example as canonical JSON (sorted keys, no spaces, UTF-8). Digest: blake2b-256 over
every row in order of its 16-byte content hash, the id's length in UTF-8 bytes as uint32 little-endian, and the id.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import struct
import tempfile
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any, Literal

from influent.errors import CorruptError, DataError, FormatError, MismatchError, SpecError
from influent.progress import Progress
from influent.ranged import Ranged, hash_object
from influent.records import Example, content_hash, display_text, read_examples, read_ref
from influent.storage import Store

ROWS, RECORD, SPEC, MANIFEST = "catalog.parquet", "catalog.json", "spec.json", "manifest.json"
GROUP_ROWS, GROUP_CHARS = 4096, 8 << 20  # a row group is closed at whichever comes first
SHOWN_SKIPS = 5

log = logging.getLogger(__name__)


def build(
    data: object,
    store: Store,
    *,
    limit: int | None = None,
    keep: Literal["text", "reference"] = "text",
    progress: Progress | None = None,
) -> Catalog:
    """Check every record of `data` and write its catalog into `store`; `limit` counts rows, not skipped records.

    `keep="reference"` stores "path:offset" instead of the text (JSONL and text files only). A catalog of the same data
    that is already there is kept; one that an index uses is never replaced by another.
    Raises DataError (file and line), SpecError, MismatchError (the directory holds an index of other data).
    """

    def rows(skips: _Skips) -> Iterator[_Row]:
        for example in read_examples(data, limit=limit):
            if example.skip is not None:
                skips.add(example.skip, example.where)
            else:
                yield _row(example, keep)

    skips = _Skips()
    return _write(rows(skips), store, skips, keep, progress)


def build_from_ids(
    ids: Iterable[str | int], hashes: Iterable[str], store: Store, *, texts: Iterable[str] | None = None
) -> Catalog:
    """Catalog of a plain PyTorch data set: its ids and content hashes (32 hex digits each), with texts to show if any.

    The examples stay with the caller; `examples` refuses. Raises DataError on a repeated id or a malformed hash.
    """
    shown: Iterable[str | None] = texts if texts is not None else repeat(None)
    triples = zip(ids, hashes, shown, strict=texts is not None)

    def row(number: int, name: str | int, digest: str, text: str | None) -> _Row:
        if re.fullmatch("[0-9a-f]{32}", digest) is None:
            raise DataError(f"item {number}: expected a content hash of 32 hexadecimal digits, got {digest!r}")
        return _Row(str(name), "memory", None, text, "", None, digest, f"item {number}")

    rows = (row(number, *triple) for number, triple in enumerate(triples))
    return _write(rows, store, _Skips(), "text", None)


class Catalog:
    """A committed catalog, read by row. Rows are numbered 0..n-1 as in the index."""

    def __init__(self, store: Store, record: dict[str, Any]) -> None:
        self.store = store
        self.n: int = record["rows"]
        self.digest: str = record["digest"]
        self.skipped: dict[str, int] = record["skipped"]
        self.skipped_at: dict[str, list[str]] = record["skipped_at"]  # the first few "file:line" of each reason
        self.bytes: int = record["bytes"]  # of catalog.parquet
        self.hash: str = record["hash"]
        self._opened: tuple[Any, list[int]] | None = None

    @classmethod
    def open(cls, store: Store) -> Catalog:
        """Raises FormatError when there is no catalog, CorruptError when it cannot be read."""
        if not store.exists(RECORD):
            raise FormatError(f"{store}: holds no {RECORD}; the catalog was not finished: run `influent index` again")
        try:
            record = json.loads(store.get(RECORD))
            return cls(store, record)
        except (ValueError, KeyError, TypeError) as e:
            raise CorruptError(
                f"{store}/{RECORD}: not a catalog record ({e}); delete the directory and build the index again"
            ) from e

    def example(self, row: int) -> dict[str, Any]:
        """The content of one row: the keys of one of text | prompt, completion | messages."""
        return self.examples(row, row + 1)[0]

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

    def where(self, row: int) -> str:
        """ "file:line" of a row, for messages."""
        return self._read([row], ("row", "where"))[0]["where"]

    def texts(self) -> Iterator[str]:
        """Every row's readable text in order, one row group in memory at a time."""
        file, starts = self._file()
        for group in range(len(starts) - 1):
            for part in file.read_row_group(group, columns=["row", "text", "example", "ref", "hash"]).to_pylist():
                yield (part["text"] if part["ref"] is None else display_text(self._content(part))) or ""

    def verify(self) -> list[str]:
        """Every problem of the stored catalog, one line each: bytes, digest, and content against its hash."""
        if not self.store.exists(ROWS):
            return [f"{self.store}/{ROWS}: missing"]
        if self.store.size(ROWS) != self.bytes:
            return [f"{self.store}/{ROWS}: expected {self.bytes} bytes, got {self.store.size(ROWS)}"]
        got = hash_object(self.store, ROWS)
        if got != self.hash:
            return [f"{self.store}/{ROWS}: expected {self.hash}, got {got}"]
        problems = []
        digest = _Digest()
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
            problems.append(f"{self.store}/{ROWS}: expected {self.n} rows and {self.digest}, got {digest.rows}")
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

            local = self.store.local(ROWS)
            try:
                file = (
                    pq.ParquetFile(str(local), memory_map=True) if local else pq.ParquetFile(Ranged(self.store, ROWS))
                )
            except (pa.ArrowException, OSError) as e:
                raise CorruptError(f"{self.store}/{ROWS}: not readable ({str(e).splitlines()[0]})") from e
            starts = [0]
            for group in range(file.num_row_groups):
                starts.append(starts[-1] + file.metadata.row_group(group).num_rows)
            if starts[-1] != self.n:
                raise CorruptError(f"{self.store}/{ROWS}: expected {self.n} rows, got {starts[-1]}")
            self._opened = file, starts
        return self._opened

    def _read(self, rows: Sequence[int], columns: Sequence[str]) -> list[dict[str, Any]]:
        file, starts = self._file()
        wanted: dict[int, list[int]] = {}  # row group -> places in `rows`
        for place, row in enumerate(rows):
            if not 0 <= row < self.n:
                raise IndexError(f"row {row} of {self.n}")
            wanted.setdefault(bisect_right(starts, row) - 1, []).append(place)
        out: list[dict[str, Any]] = [{}] * len(rows)
        for group, places in sorted(wanted.items()):
            table = file.read_row_group(group, columns=list(columns))
            picked = table.take([rows[place] - starts[group] for place in places]).to_pylist()
            for place, part in zip(places, picked, strict=True):
                out[place] = part
        return out


@dataclass(frozen=True, slots=True)
class _Row:
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
class _Skips:
    counts: dict[str, int] = field(default_factory=dict)
    places: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, where: str) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1
        places = self.places.setdefault(reason, [])
        if len(places) < SHOWN_SKIPS:
            places.append(where)


class _Digest:
    """The data's fingerprint, row by row; the rule is in this file's header."""

    def __init__(self) -> None:
        self.rows = 0
        self._hash = hashlib.blake2b(digest_size=32)

    def add(self, content: str, row_id: str) -> None:
        name = row_id.encode()
        self._hash.update(bytes.fromhex(content) + struct.pack("<I", len(name)) + name)
        self.rows += 1

    def text(self) -> str:
        return f"blake2b-256:{self._hash.hexdigest()}"


def _row(example: Example, keep: str) -> _Row:
    if keep == "reference" and example.ref is None:
        raise SpecError(f"{example.where}: --catalog reference needs a JSONL or text file; use --catalog text")
    text = stored = None
    if keep == "text":
        text = display_text(example.content)
        stored = None if "text" in example.content else json.dumps(example.content, ensure_ascii=False)
    return _Row(
        id="" if example.id is None else example.id,
        source=example.source,
        provider=example.provider,
        text=text,
        example=stored,
        ref=example.ref if keep == "reference" else None,
        hash=content_hash(example.content),
        where=example.where,
    )


def _write(rows: Iterator[_Row], store: Store, skips: _Skips, keep: str, progress: Progress | None) -> Catalog:
    with tempfile.TemporaryDirectory(prefix="influent-") as folder:
        path = Path(folder, ROWS)
        digest, id_hashes = _write_rows(rows, path, progress)
        if digest.rows == 0:
            skipped = ", ".join(f"{count} {reason}" for reason, count in skips.counts.items())
            raise DataError(f"the data set is empty: no record can be a row ({skipped or 'there is no record'})")
        _refuse_repeated_ids(id_hashes, path)
        record = {
            "rows": digest.rows,
            "digest": digest.text(),
            "keep": keep,
            "skipped": skips.counts,
            "skipped_at": skips.places,
            "bytes": path.stat().st_size,
            "hash": hash_object(Store(folder), ROWS),
        }
        kept = _existing(store, record, path)
        if kept is not None:
            return kept
        store.put_file(ROWS, path)
    store.put(RECORD, json.dumps(record, indent=1, sort_keys=True, ensure_ascii=False).encode())
    return Catalog.open(store)


def _existing(store: Store, record: dict[str, Any], fresh: Path) -> Catalog | None:
    """The sound catalog of the same rows that is already there, else None: `fresh` is to be stored.

    An index's catalog is replaced only by one of the same data: a damaged one, or other labels before the commit.
    """
    old, sound = None, False
    if store.exists(RECORD):
        try:
            old = Catalog.open(store)
            sound = hash_object(store, ROWS) == old.hash
        except CorruptError:
            log.warning("%s: its catalog is damaged; written again", store)
    expected = _indexed(store) or (old.digest if old and store.exists(SPEC) else record["digest"])
    if expected != record["digest"]:
        raise MismatchError(
            f"{store}: the data differs from what this index was built from: expected {expected[:28]}, "
            f"got {record['digest'][:28]} ({record['rows']} rows); restore the data or give another --out"
        )
    if old is None or not sound or old.digest != record["digest"]:
        return None
    change = None if old.hash == record["hash"] else _relabelled(old, fresh)
    if change is not None and store.exists(MANIFEST):
        raise MismatchError(
            f"{store}: {change}; restore the data, give another --out, or delete {MANIFEST} there and run the same "
            "command again to keep the rows and take the new labels"
        )
    return old if change is None else None


def _indexed(store: Store) -> str | None:
    """The digest of the data that the index here is of; None without a readable spec, which its writer refuses."""
    try:
        return str(json.loads(store.get(SPEC))["spec"]["data"]) if store.exists(SPEC) else None
    except (ValueError, KeyError, TypeError):
        return None


def _relabelled(old: Catalog, fresh: Path) -> str | None:
    """The first row whose source or provider differs, as a message. By value: Parquet's bytes vary with its writer."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(fresh) as file:
        for row, (was, now) in enumerate(zip(_labels(old._file()[0]), _labels(file), strict=True)):
            if name := next((name for name in was if was[name] != now[name]), None):
                return f"row {row}: {name}: expected {was[name]!r} as the index has, got {now[name]!r}"
    return None


def _labels(file: Any) -> Iterator[dict[str, str | None]]:
    for group in range(file.num_row_groups):
        yield from file.read_row_group(group, columns=["source", "provider"]).to_pylist()


def _write_rows(rows: Iterator[_Row], path: Path, progress: Progress | None) -> tuple[_Digest, bytearray]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    strings = ("id", "source", "provider", "text", "example", "ref", "hash", "where")
    schema = pa.schema([("row", pa.int64()), *((name, pa.string()) for name in strings)])
    digest, id_hashes, group, chars = _Digest(), bytearray(), [], 0
    try:
        with pq.ParquetWriter(path, schema, compression="zstd") as writer:
            for row in rows:
                fields = {name: getattr(row, name) for name in strings} | {
                    "row": digest.rows,
                    "id": row.id or str(digest.rows),
                }
                digest.add(row.hash, fields["id"])
                id_hashes += hashlib.blake2b(fields["id"].encode(), digest_size=16).digest()
                group.append(fields)
                chars += len(row.text or "") + len(row.example or "")
                if len(group) == GROUP_ROWS or chars >= GROUP_CHARS:
                    writer.write_table(pa.Table.from_pylist(group, schema=schema))
                    group, chars = [], 0
                    if progress is not None:
                        progress("catalog", digest.rows, 0)
            if group:
                writer.write_table(pa.Table.from_pylist(group, schema=schema))
    except OSError as e:
        raise CorruptError(
            f"{path}: the catalog could not be written ({e.strerror or e}); free some space there"
        ) from e
    return digest, id_hashes


def _refuse_repeated_ids(id_hashes: bytearray, path: Path) -> None:
    import numpy as np
    import pyarrow.parquet as pq

    words = np.frombuffer(id_hashes, dtype="<u8").reshape(-1, 2)
    order = np.lexsort((words[:, 1], words[:, 0]))  # stable, so equal ids stay in row order
    equal = np.flatnonzero((words[order[1:]] == words[order[:-1]]).all(axis=1))
    if len(equal) == 0:
        return
    at = equal[np.argmin(order[equal + 1])]
    pair, start = {}, 0
    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=["id", "where"])
            for row in (int(order[at]), int(order[at + 1])):
                if start <= row < start + table.num_rows:
                    pair[row] = table.slice(row - start, 1).to_pylist()[0]
            start += table.num_rows
    first, second = (pair[row] for row in sorted(pair))
    raise DataError(f'{second["where"]}: id "{second["id"]}" repeats that of {first["where"]}; ids must be unique')

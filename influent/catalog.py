"""The catalog: which example each row of an index is. Row id -> id, source, provider, text or where to read it, hash.

Does: one streaming pass over the data that checks everything, and reads back by row. Its digest is the data's
fingerprint. Does not: tokenise, or know about gradients. Memory while building is one row group plus 16 bytes a row.

    catalog.parquet   the rows, in the data's order
    catalog.json      written after it: rows, digest, skipped records, and the Parquet file's size and hash
    catalog-000001.*  the same of the rows that generation 1 appended, and so on

Content hash: blake2b-128 of the example as canonical JSON (sorted keys, no spaces, UTF-8). Digest: blake2b-256 over
every row in order of its 16-byte content hash, the id's length in UTF-8 bytes as uint32 little-endian, and the id.
"""

from __future__ import annotations

import json
import logging
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any, Literal

from influent.catalog_part import Part, Row, Skips, Written, hash_id, refuse_repeated_ids, write_rows
from influent.errors import CorruptError, DataError, FormatError, MismatchError, SpecError
from influent.progress import Progress
from influent.ranged import hash_object
from influent.records import Example, content_hash, display_text, read_examples
from influent.storage import Store

FIRST = "catalog"  # the stem of the first part
SPEC, MANIFEST = "spec.json", "manifest.json"

log = logging.getLogger(__name__)


def stem(generation: int) -> str:
    """The name, without suffix, of the part that a generation added."""
    return FIRST if generation == 0 else f"{FIRST}-{generation:06d}"


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

    skips = Skips()
    return _write(_rows(data, limit, keep, skips), store, skips, keep, progress)


def build_from_ids(
    ids: Iterable[str | int], hashes: Iterable[str], store: Store, *, texts: Iterable[str] | None = None
) -> Catalog:
    """Catalog of a plain PyTorch data set: its ids and content hashes (32 hex digits each), with texts to show if any.

    The examples stay with the caller; `examples` refuses. Raises DataError on a repeated id or a malformed hash.
    """
    shown: Iterable[str | None] = texts if texts is not None else repeat(None)
    triples = zip(ids, hashes, shown, strict=texts is not None)

    def row(number: int, name: str | int, digest: str, text: str | None) -> Row:
        if re.fullmatch("[0-9a-f]{32}", digest) is None:
            raise DataError(f"item {number}: expected a content hash of 32 hexadecimal digits, got {digest!r}")
        return Row(str(name), "memory", None, text, "", None, digest, f"item {number}")

    rows = (row(number, *triple) for number, triple in enumerate(triples))
    return _write(rows, store, Skips(), "text", None)


def extend(
    data: object,
    store: Store,
    *,
    parts: int,
    hashes: Iterable[str] | None = None,
    progress: Progress | None = None,
) -> Catalog:
    """The catalog with a part more: the records of `data`, checked like the others, or examples with the content
    `hashes`. A part of the same data that an interrupted call left is kept; if `data` is what the last of the
    `parts` was made of, the catalog is returned as it is.

    Raises DataError (both places) for an id that is repeated or is in an earlier part, SpecError.
    """
    old, skips = Catalog.open(store, parts), Skips()
    if hashes is None:
        rows = _rows(data, None, old.parts[0].keep, skips)
    else:
        rows = (Row("", "memory", None, None, "", None, digest, f"item {i}") for i, digest in enumerate(hashes))
    with tempfile.TemporaryDirectory(prefix="influent-") as folder:
        path = Path(folder, f"{stem(parts)}.parquet")
        done = write_rows(rows, path, first=old.n, progress=progress)
        _refuse_empty(done, skips)
        content = done.content.text()
        if parts > 1 and content == old.parts[-1].content:
            record = _record(done, skips, old.parts[0].keep, path)
            _refuse_other_labels(old.parts[-1], Part(Store(folder), stem(parts), record))
            return old
        earlier = bytearray().join(hash_id(name) for part in old.parts for name in part.ids())
        added = {"first": old.n, "content": content}
        record = {**_record(done, skips, old.parts[0].keep, path), **added}
        fresh = Part(Store(folder), stem(parts), record)
        refuse_repeated_ids(earlier + done.id_hashes, Catalog(Store(folder), [*old.parts, fresh]).places)
        if not _is_sound(store, stem(parts), record, fresh):
            _put(store, stem(parts), path, record)
    return Catalog.open(store, parts + 1)


def _refuse_other_labels(known: Part, offered: Part) -> None:
    """DataError when the examples that were appended last come again with another source or provider."""
    pairs = zip(known.labels(), offered.labels(), strict=True)
    if (row := next((i for i, (a, b) in enumerate(pairs) if a != b), None)) is not None:
        raise DataError(
            f"{known.store}/{known.name}: these examples are the ones appended last, but the source or provider of "
            f"number {row} is another: what is appended cannot be changed; give new examples, or index all of them anew"
        )


class Catalog:
    """A committed catalog, read by row: its parts, one after another. Rows are numbered 0..n-1 as in the index."""

    def __init__(self, store: Store, parts: Sequence[Part]) -> None:
        self.store, self.parts = store, list(parts)
        self.n: int = sum(part.n for part in parts)
        self.digest: str = self.parts[0].digest  # of the first part: the data of the index's spec
        self.skipped: dict[str, int] = {}
        self.skipped_at: dict[str, list[str]] = {}  # the first few "file:line" of each reason
        for part in parts:
            for reason, count in part.skipped.items():
                self.skipped[reason] = self.skipped.get(reason, 0) + count
            for reason, places in part.skipped_at.items():
                self.skipped_at.setdefault(reason, []).extend(places)

    @classmethod
    def open(cls, store: Store, parts: int = 1) -> Catalog:
        """Raises FormatError when there is no catalog, CorruptError when it cannot be read."""
        found = [Part.open(store, stem(i)) for i in range(parts)]
        n = 0
        for part in found:
            if part.first != n:
                raise CorruptError(f"{store}/{part.record_name}: expected its rows to begin at {n}, got {part.first}")
            n += part.n
        return cls(store, found)

    def example(self, row: int) -> dict[str, Any]:
        """The content of one row: the keys of one of text | prompt, completion | messages."""
        return self.examples(row, row + 1)[0]

    def examples(self, lo: int, hi: int) -> list[dict[str, Any]]:
        """The contents of rows lo..hi-1. Raises DataError when a referenced file has changed."""
        found = []
        for part in self.parts:
            first, end = max(lo, part.first), min(hi, part.first + part.n)
            found += part.examples(first, end) if first < end else []
        if len(found) != hi - lo:
            raise IndexError(f"rows {lo} to {hi} of {self.n}")
        return found

    def describe(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """For each row its `row, id, source, provider, text`: what a result shows."""
        return self._each(rows, lambda part, chosen: part.describe(chosen))

    def places(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """`id` and `where` ("file:line") of each row, for messages."""
        return self._each(rows, lambda part, chosen: part.places(chosen))

    def where(self, row: int) -> str:
        """ "file:line" of a row, for messages."""
        return self.places([row])[0]["where"]

    def texts(self) -> Iterator[str]:
        """Every row's readable text in order, one row group in memory at a time."""
        for part in self.parts:
            yield from part.texts()

    def fields(self, *names: str) -> Iterator[dict[str, str | None]]:
        """Some columns of every row in order (`id`, `source`, `provider`, `hash`), a row group in memory at a time."""
        for part in self.parts:
            yield from part.fields(*names)

    def verify(self) -> list[str]:
        """Every problem of the stored catalog, one line each: bytes, digest, and content against its hash."""
        return [problem for part in self.parts for problem in part.verify()]

    def _each(
        self, rows: Sequence[int], read: Callable[[Part, list[int]], list[dict[str, Any]]]
    ) -> list[dict[str, Any]]:
        if wrong := [row for row in rows if not 0 <= row < self.n]:
            raise IndexError(f"row {wrong[0]} of {self.n}")
        found: dict[int, dict[str, Any]] = {}
        for part in self.parts:
            chosen = [row for row in rows if part.first <= row < part.first + part.n]
            found.update(zip(chosen, read(part, chosen) if chosen else [], strict=True))
        return [found[row] for row in rows]


def _rows(data: object, limit: int | None, keep: str, skips: Skips) -> Iterator[Row]:
    for example in read_examples(data, limit=limit):
        if example.skip is not None:
            skips.add(example.skip, example.where)
        else:
            yield _row(example, keep)


def _row(example: Example, keep: str) -> Row:
    if keep == "reference" and example.ref is None:
        raise SpecError(f"{example.where}: --catalog reference needs a JSONL or text file; use --catalog text")
    text = stored = None
    if keep == "text":
        text = display_text(example.content)
        stored = None if "text" in example.content else json.dumps(example.content, ensure_ascii=False)
    return Row(
        id="" if example.id is None else example.id,
        source=example.source,
        provider=example.provider,
        text=text,
        example=stored,
        ref=example.ref if keep == "reference" else None,
        hash=content_hash(example.content),
        where=example.where,
    )


def _write(rows: Iterator[Row], store: Store, skips: Skips, keep: str, progress: Progress | None) -> Catalog:
    with tempfile.TemporaryDirectory(prefix="influent-") as folder:
        path = Path(folder, f"{FIRST}.parquet")
        done = write_rows(rows, path, progress=progress)
        _refuse_empty(done, skips)
        record = _record(done, skips, keep, path)
        fresh = Part(Store(folder), FIRST, record)
        refuse_repeated_ids(done.id_hashes, fresh.places)
        kept = _existing(store, record, fresh)
        if kept is not None:
            return kept
        _put(store, FIRST, path, record)
    return Catalog.open(store)


def _refuse_empty(done: Written, skips: Skips) -> None:
    if done.digest.rows == 0:
        skipped = ", ".join(f"{count} {reason}" for reason, count in skips.counts.items())
        raise DataError(f"the data set is empty: no record can be a row ({skipped or 'there is no record'})")


def _record(done: Written, skips: Skips, keep: str, path: Path) -> dict[str, Any]:
    return {
        "rows": done.digest.rows,
        "digest": done.digest.text(),
        "keep": keep,
        "skipped": skips.counts,
        "skipped_at": skips.places,
        "bytes": path.stat().st_size,
        "hash": hash_object(Store(path.parent), path.name),
    }


def _put(store: Store, name: str, path: Path, record: dict[str, Any]) -> None:
    store.put_file(f"{name}.parquet", path)
    store.put(f"{name}.json", json.dumps(record, indent=1, sort_keys=True, ensure_ascii=False).encode())


def _is_sound(store: Store, name: str, record: dict[str, Any], fresh: Part) -> bool:
    """Whether an interrupted call left this very part: Parquet's bytes may vary with its writer, its rows may not."""
    try:
        old = Part.open(store, name)
        same = (old.digest, old.first, old.content) == (record["digest"], record["first"], record["content"])
        return same and hash_object(store, old.name) == old.hash and _relabelled(old, fresh) is None
    except (CorruptError, FormatError):
        return False


def _existing(store: Store, record: dict[str, Any], fresh: Part) -> Catalog | None:
    """The sound catalog of the same rows that is already there, else None: `fresh` is to be stored.

    An index's catalog is replaced only by one of the same data: a damaged one, or other labels before the commit.
    """
    old, sound = None, False
    if store.exists(f"{FIRST}.json"):
        try:
            old = Part.open(store, FIRST)
            sound = hash_object(store, old.name) == old.hash
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
    return Catalog(store, [old]) if change is None else None


def _indexed(store: Store) -> str | None:
    """The digest of the data that the index here is of; None without a readable spec, which its writer refuses."""
    try:
        return str(json.loads(store.get(SPEC))["spec"]["data"]) if store.exists(SPEC) else None
    except (ValueError, KeyError, TypeError):
        return None


def _relabelled(old: Part, fresh: Part) -> str | None:
    """The first row whose source or provider differs, as a message. By value: Parquet's bytes vary with its writer."""
    for row, (was, now) in enumerate(zip(old.labels(), fresh.labels(), strict=True)):
        if name := next((name for name in was if was[name] != now[name]), None):
            return f"row {row}: {name}: expected {was[name]!r} as the index has, got {now[name]!r}"
    return None

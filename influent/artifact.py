"""Immutable directories that describe and check themselves: spec.json first, shards, manifest.json last.

An artifact is one computation's result: an index, a Gram matrix, a factorisation. Its identity is the digest of its
spec: everything that may change the numbers in it. What the tensors mean is not known here; `docs/format.md` is
normative.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from .errors import CorruptError, FormatError, MismatchError, SpecError
from .payload import Payload, encode
from .storage import Buffer, Store

if TYPE_CHECKING:
    import torch

FORMAT = [1, 0]
READER = "influent 0.1"  # the first release that reads this format; a reader that cannot says so
KNOWN: frozenset[str] = frozenset()  # features beyond format 1.0 that this release reads
CHUNK = 1 << 24  # bytes hashed at a time


def canonical_json(obj: object) -> bytes:
    """The one text of a JSON value: keys sorted, no spaces, UTF-8; SpecError for what JSON cannot hold."""
    try:
        return json.dumps(obj, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
    except ValueError as e:  # NaN, infinity or half a surrogate pair
        raise SpecError(f"a value that JSON cannot hold: {e}") from e


def digest(obj: object) -> str:
    """The BLAKE2b-256 of a value's canonical JSON, as "blake2b-256:<hex>"."""
    return hash_bytes([canonical_json(obj)])


def hash_bytes(parts: Iterable[Buffer]) -> str:
    """The BLAKE2b-256 of the parts' bytes one after another, as "blake2b-256:<hex>"."""
    h = blake2b(digest_size=32)
    for part in parts:
        h.update(part)
    return f"blake2b-256:{h.hexdigest()}"


def hash_object(store: Store, name: str) -> str:
    """The BLAKE2b-256 of a stored object, read in pieces."""
    size = store.size(name)
    return hash_bytes(store.get_range(name, lo, min(lo + CHUNK, size)) for lo in range(0, size, CHUNK))


@dataclass(frozen=True, slots=True)
class Record:
    """One committed shard: its row range [lo, hi) if it holds rows, and its payload's size and hash."""

    name: str
    rows: tuple[int, int] | None
    bytes: int
    hash: str
    meta: dict[str, Any]

    @property
    def payload(self) -> str:
        return f"{_stem(self.name)}.safetensors"

    def to_json(self, spec: str) -> dict[str, Any]:
        rows = list(self.rows) if self.rows else None
        return {
            "name": self.name, "rows": rows, "bytes": self.bytes, "hash": self.hash, "spec": spec, "meta": self.meta
        }  # fmt: skip

    @classmethod
    def from_json(cls, obj: Any) -> Record:
        """The record; ValueError when a field is absent or of the wrong kind."""
        if not isinstance(obj, dict):
            raise ValueError(f"a record must be an object, got {type(obj).__name__}")
        for field, kind in (("name", str), ("bytes", int), ("hash", str), ("spec", str), ("meta", dict)):
            if not isinstance(obj.get(field), kind):
                raise ValueError(f"the record's {field} must be {kind.__name__}, got {obj.get(field)!r}")
        rows = obj.get("rows")
        if rows is not None:
            if not (isinstance(rows, list) and len(rows) == 2 and all(type(r) is int for r in rows)):
                raise ValueError(f"the record's rows must be [lo, hi] or null, got {rows!r}")
            rows = (rows[0], rows[1])
        return cls(obj["name"], rows, obj["bytes"], obj["hash"], obj["meta"])


class ArtifactWriter:
    """Writes one artifact, shard by shard; what is finished survives any interruption and is not redone."""

    def __init__(self, store: Store, spec: dict[str, Any], notes: dict[str, Any], *, kind: str):
        self.store, self.kind, self.spec, self.notes = store, kind, spec, notes
        self.digest = digest(spec)
        self.committed = store.exists("manifest.json")
        done = Artifact.open(store, kind).records if self.committed else self._intact()
        self.records: dict[str, Record] = {record.name: record for record in done}

    @classmethod
    def open(
        cls, store: Store, kind: str, spec: dict[str, Any], *, notes: dict[str, Any] | None = None
    ) -> ArtifactWriter:
        """Begin an artifact, or go on with one of the same spec: its stored notes and intact shards are kept.

        `notes` are undigested facts that do not change the numbers (shard_rows, where the model was).
        Raises MismatchError, naming the first field that differs, when another spec is there already.
        """
        if store.exists("spec.json"):
            head = _read_spec(store, kind)
            if head["digest"] != digest(spec):
                raise MismatchError(_difference(store, head["spec"], json.loads(canonical_json(spec))))
            return cls(store, spec, head["notes"], kind=kind)
        if store.exists("manifest.json"):
            raise CorruptError(f"{store}/spec.json: missing, but there is a manifest.json; {_redo('spec.json')}")
        notes = notes or {}
        head = {**_version(kind), "spec": spec, "digest": digest(spec), "notes": notes}
        store.put("spec.json", canonical_json(head))
        return cls(store, spec, notes, kind=kind)

    def put(
        self,
        name: str,
        tensors: Mapping[str, torch.Tensor],
        meta: dict[str, Any] | None = None,
        *,
        rows: tuple[int, int] | None = None,
    ) -> Record:
        """Write one shard, payload first and record after it; the record is what makes the shard count."""
        parts = encode(tensors)
        size = sum(len(part) for part in parts)
        record = Record(name, rows, size, hash_bytes(parts), meta or {})
        self.store.put(record.payload, parts)
        self.store.put(f"{_stem(name)}.json", canonical_json(record.to_json(self.digest)))
        self.records[name] = record
        return record

    def commit(self, summary: dict[str, Any], *, files: Iterable[str] = ()) -> None:
        """Write manifest.json: from now on, and not before, the artifact exists for readers.

        `files` are other objects of the directory (catalog.parquet) that the manifest shall vouch for.
        """
        self.store.sweep()
        manifest = {
            **_version(self.kind),
            "generation": 0,
            "spec": self.digest,
            "spec_hash": hash_object(self.store, "spec.json"),
            "records": [record.to_json(self.digest) for record in _ordered(self.records.values())],
            "files": {n: {"bytes": self.store.size(n), "hash": hash_object(self.store, n)} for n in sorted(files)},
            "summary": summary,
        }
        self.store.put("manifest.json", canonical_json({**manifest, "digest": digest(manifest)}))
        self.committed = True

    def _intact(self) -> list[Record]:
        """Shards whose record, spec digest and payload hash are all right; the others are as if never written."""
        found = []
        for name in self.store.names("shards/"):
            if not name.endswith(".json"):
                continue
            try:
                obj = json.loads(self.store.get(name))
                record = Record.from_json(obj)
            except ValueError:  # torn or foreign: not a record, so its shard is done again
                continue
            whole = f"{_stem(record.name)}.json" == name and obj["spec"] == self.digest
            if whole and self.store.exists(record.payload) and hash_object(self.store, record.payload) == record.hash:
                found.append(record)
        return found


class Artifact:
    """A finished artifact, read only. Opening reads manifest.json and spec.json and no shard."""

    def __init__(self, store: Store, head: dict[str, Any], manifest: dict[str, Any]):
        self.store = store
        self.kind: str = head["kind"]
        self.spec: dict[str, Any] = head["spec"]
        self.digest: str = head["digest"]
        self.notes: dict[str, Any] = head["notes"]
        self.generation: int = manifest["generation"]
        self.summary: dict[str, Any] = manifest["summary"]
        self.files: dict[str, dict[str, Any]] = manifest["files"]
        self.records: list[Record] = [Record.from_json(obj) for obj in manifest["records"]]
        self._by_name = {record.name: record for record in self.records}
        self._spec_hash: str = manifest["spec_hash"]
        self._last: Payload | None = None
        self._sound: set[str] = set()

    @classmethod
    def open(cls, store: Store, kind: str) -> Artifact:
        """Raises FormatError for what is not a finished artifact of this kind or needs a newer release, CorruptError
        for a manifest or spec that is not what was committed."""
        if not store.exists("manifest.json"):
            if store.exists("spec.json"):
                raise FormatError(f"{store}: this {kind} is not finished: run the same command again to resume")
            raise FormatError(f"{store}: not an influent {kind}: there is no manifest.json in it")
        manifest = _read_json(store, "manifest.json")
        _check_version(store, "manifest.json", manifest, kind)
        if manifest.get("digest") != digest({key: value for key, value in manifest.items() if key != "digest"}):
            raise CorruptError(
                f"{store}/manifest.json: its digest does not match its content; {_redo('manifest.json')}"
            )
        head = _read_spec(store, kind)
        if head["digest"] != manifest.get("spec"):
            raise CorruptError(f"{store}/spec.json: its digest is not the manifest's: the two do not belong together")
        try:
            return cls(store, head, manifest)
        except (KeyError, TypeError, ValueError) as e:
            raise CorruptError(f"{store}/manifest.json: {type(e).__name__}: {e}; {_redo('manifest.json')}") from e

    def tensors(self, name: str) -> Payload:
        """The tensors of one shard: views of one memory mapping from a local store, fetched one by one from a remote
        one. Sizes and offsets are checked here, hashes by `check` and `verify`."""
        record = self._by_name[name]
        if self._last is None or self._last.name != record.payload:
            # One shard stays open; more, and a scan's resident memory would grow with the index.
            self._last = Payload(self.store, record.payload, record.bytes)
        return self._last

    def check(self, name: str, *, mend: str = "") -> None:
        """Raises CorruptError, naming the shard and what mends it, unless its bytes are those that were committed.

        Reads the whole payload, and remembers the answer: a later check of this shard costs nothing.
        """
        if name not in self._sound:
            record = self._by_name[name]
            if problem := self._compare(record.payload, record.bytes, record.hash, mend=mend):
                raise CorruptError(problem)
            self._sound.add(name)

    def verify(self) -> list[str]:
        """Every difference between the directory and what was committed, one line each; empty when it is sound."""
        problems = [self._compare("spec.json", None, self._spec_hash)]
        for name, file in self.files.items():
            # They are made together, so they are mended together.
            problems.append(self._compare(name, file["bytes"], file["hash"], mend=_redo(*self.files)))
        for record in self.records:
            problems.append(self._compare(record.payload, record.bytes, record.hash))
            problems.append(self._check_record(record))
        return [problem for problem in problems if problem]

    def _compare(self, name: str, size: int | None, expected: str, *, mend: str = "") -> str | None:
        mend = mend or _redo(name)
        try:
            if size is not None and (got := self.store.size(name)) != size:
                return f"{self.store}/{name}: expected {size} bytes, got {got}; {mend}"
            if hash_object(self.store, name) != expected:
                return f"{self.store}/{name}: its hash is not the committed one; {mend}"
            if size is not None and name.endswith(".safetensors"):
                Payload(self.store, name, size)
        except CorruptError as e:
            return f"{e}; {mend}"
        return None

    def _check_record(self, record: Record) -> str | None:
        name = f"{_stem(record.name)}.json"
        try:
            if self.store.get(name) == canonical_json(record.to_json(self.digest)):
                return None
        except CorruptError as e:
            return f"{e}; {_redo(name)}"
        return f"{self.store}/{name}: differs from the manifest's record; {_redo(name)}"


def kind_of(store: Store) -> str:
    """The kind of a finished artifact, as its manifest says; FormatError when there is none."""
    if not store.exists("manifest.json"):
        raise FormatError(f"{store}: not a finished artifact: there is no manifest.json in it")
    return str(_read_json(store, "manifest.json").get("kind"))


def _redo(*names: str) -> str:
    """What mends any damage: intact shards are kept, because each carries its spec's digest and its own hash."""
    every = " and ".join(dict.fromkeys([*names, "manifest.json"]))
    return f"delete {every} there, then run the same command again to restore it"


def _stem(name: str) -> str:
    return f"shards/{quote(name, safe='')}"  # a block's name may hold any character


def _ordered(records: Iterable[Record]) -> list[Record]:
    return sorted(records, key=lambda r: (r.rows or (0, 0), r.name))


def _version(kind: str) -> dict[str, Any]:
    return {"format": FORMAT, "requires": [], "reader": READER, "kind": kind}


def _read_json(store: Store, name: str) -> dict[str, Any]:
    if not store.exists(name):
        raise CorruptError(f"{store}/{name}: missing; {_redo(name)}")
    try:
        obj = json.loads(store.get(name))
        canonical_json(obj)  # NaN and broken text have no digest
    except (ValueError, RecursionError) as e:
        raise CorruptError(f"{store}/{name}: not readable as JSON: {e}; {_redo(name)}") from e
    if not isinstance(obj, dict):
        raise CorruptError(f"{store}/{name}: expected a JSON object, got {type(obj).__name__}; {_redo(name)}")
    return obj


def _read_spec(store: Store, kind: str) -> dict[str, Any]:
    """spec.json, checked against its own digest."""
    head = _read_json(store, "spec.json")
    _check_version(store, "spec.json", head, kind)
    for field in ("spec", "notes"):
        if not isinstance(head.get(field), dict):
            got = type(head.get(field)).__name__
            raise CorruptError(f"{store}/spec.json: expected an object {field!r}, got {got}; {_redo('spec.json')}")
    if head.get("digest") != digest(head["spec"]):
        raise CorruptError(f"{store}/spec.json: its digest does not match its spec; {_redo('spec.json')}")
    return head


def _check_version(store: Store, name: str, obj: dict[str, Any], kind: str) -> None:
    """FormatError unless this release reads the object and it is of the kind wanted."""
    version, reader = obj.get("format"), obj.get("reader")
    if not (isinstance(version, list) and len(version) == 2 and all(type(n) is int for n in version)):
        raise FormatError(f"{store}/{name}: expected a format version [major, minor], got {version!r}")
    if version[0] != FORMAT[0]:
        raise FormatError(
            f"{store}/{name}: format {version[0]}.{version[1]}, this release reads {FORMAT[0]}.x; use {reader}"
        )
    requires = obj.get("requires")
    if not isinstance(requires, list):
        raise FormatError(f"{store}/{name}: expected a list 'requires', got {requires!r}")
    for feature in requires:
        if feature not in KNOWN:
            raise FormatError(f"{store}/{name}: requires {feature!r}, which this release does not know; use {reader}")
    if obj.get("kind") != kind:
        raise FormatError(f"{store}/{name}: expected a directory of kind {kind!r}, got {obj.get('kind')!r}")


def _difference(where: Store, old: Any, new: Any) -> str:
    """The message for the first field, in sorted order, in which two specs differ."""
    path, stored, asked = _first_difference("", old, new)
    return (
        f"{where}: in use by another spec: {path} is {_short(stored)} there and {_short(asked)} in this run; "
        "choose another directory, or delete that one"
    )


def _first_difference(path: str, old: Any, new: Any) -> tuple[str, Any, Any]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            a, b = old.get(key, ABSENT), new.get(key, ABSENT)
            if not _same(a, b):
                return _first_difference(f"{path}.{key}" if path else key, a, b)
    if isinstance(old, list) and isinstance(new, list):
        for i, (a, b) in enumerate(zip(old, new, strict=False)):
            if not _same(a, b):
                return _first_difference(f"{path}[{i}]", a, b)
        return f"the length of {path}", len(old), len(new)
    return path, old, new


ABSENT = object()


def _same(a: Any, b: Any) -> bool:
    # By text, as the digest is: to Python 1, 1.0 and True are equal.
    return a is not ABSENT and b is not ABSENT and canonical_json(a) == canonical_json(b)


def _short(value: Any) -> str:
    text = "absent" if value is ABSENT else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else f"{text[:117]}..."

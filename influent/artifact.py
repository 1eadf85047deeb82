"""Immutable directories that describe and check themselves: spec.json first, shards, manifest.json last.

An artifact is one computation's result: an index, a Gram matrix, a factorisation. Its identity is the digest of its
spec: everything that may change the numbers in it. What the tensors mean is not known here; `docs/format.md` is
normative.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .digests import canonical_json, difference, digest, hash_bytes, hash_object
from .errors import CorruptError, FormatError, MismatchError
from .payload import Payload, encode
from .shardrecord import SINCE, Record, stem
from .storage import Store

if TYPE_CHECKING:
    import torch

FORMAT = [1, 2]
READER = "influent 0.1"  # the first release that reads this format; a reader that cannot says so
KNOWN = frozenset({"codec", "append", "ensemble", "residual", "live"})  # features beyond 1.0 that this release reads


class ArtifactWriter:
    """Writes one artifact, shard by shard; what is finished survives any interruption and is not redone."""

    def __init__(self, store: Store, head: dict[str, Any], *, base: Artifact | None = None, data: str = ""):
        self.store, self.kind, self.spec, self.notes = store, head["kind"], head["spec"], head["notes"]
        self.digest: str = head["digest"]
        self.requires: list[str] = head["requires"]
        self.minor: int = head["format"][1]  # that of the release which began: its bytes are gone on with
        self.base = base  # the generation that rows are added to
        self._added = [*base.data, data] if base else []
        self.owner = generation_digest(self.digest, self._added) if base else self.digest
        self.committed = base is None and store.exists("manifest.json")
        if base is not None:
            done = [*base.records, *self._intact()]
        else:
            done = Artifact.open(store, self.kind).records if self.committed else self._intact()
        self.records: dict[str, Record] = {record.name: record for record in done}

    @classmethod
    def open(
        cls,
        store: Store,
        kind: str,
        spec: dict[str, Any],
        *,
        notes: dict[str, Any] | None = None,
        requires: Sequence[str] = (),
    ) -> ArtifactWriter:
        """Begin an artifact, or go on with one of the same spec: its stored notes and intact shards are kept.

        `notes` are undigested facts that do not change the numbers (shard_rows, where the model was); `requires` names
        what a reader must know beyond format 1.0.
        Raises MismatchError, naming the first field that differs, when another spec is there already.
        """
        if store.exists("spec.json"):
            head = _read_spec(store, kind)
            if head["digest"] != digest(spec):
                raise MismatchError(difference(store, head["spec"], json.loads(canonical_json(spec))))
            return cls(store, head)
        if store.exists("manifest.json"):
            raise CorruptError(f"{store}/spec.json: missing, but there is a manifest.json; {_redo('spec.json')}")
        head = {**_version(kind, requires, FORMAT[1]), "spec": spec, "digest": digest(spec), "notes": notes or {}}
        store.put("spec.json", canonical_json(head))
        return cls(store, head)

    @classmethod
    def extend(cls, store: Store, kind: str, data: str) -> ArtifactWriter:
        """Begin the next generation of a finished artifact, with rows of the data of digest `data` added, or go on
        with it. The records so far stay; their shards are not read. Readers see the old generation until `commit`."""
        return cls(store, _read_spec(store, kind), base=Artifact.open(store, kind), data=data)

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
        record = Record(name, rows, size, hash_bytes(parts), meta or {}, self.owner, sealed=self.minor >= SINCE)
        self.store.put(record.payload, parts)
        self.store.put(f"{stem(name)}.json", canonical_json(record.to_json()))
        self.records[name] = record
        return record

    def commit(self, summary: dict[str, Any], *, files: Iterable[str] = ()) -> None:
        """Write manifest.json: from now on, and not before, the artifact exists for readers.

        `files` are other objects of the directory (catalog.parquet) that the manifest shall vouch for.
        """
        self.store.sweep()
        records = _ordered(self.records.values())
        history = self._history(records[-1].rows[1] if records and records[-1].rows else 0)
        beside = {n: {"bytes": self.store.size(n), "hash": hash_object(self.store, n)} for n in sorted(files)}
        manifest = {
            **_version(self.kind, [*self.requires, "append"] if history else self.requires, self.minor),
            "generation": max(0, len(history) - 1),
            "spec": self.digest,
            "spec_hash": hash_object(self.store, "spec.json"),
            "records": [record.to_json() for record in records],
            # What was committed before is vouched for as it was then: it may have been damaged since.
            "files": beside | (self.base.files if self.base else {}),
            "summary": summary,
        }
        manifest |= {"history": history} if history else {}
        self.store.put("manifest.json", canonical_json({**manifest, "digest": digest(manifest)}))
        self.committed = True

    def _history(self, num_rows: int) -> list[dict[str, Any]]:
        """An entry for every generation, this one last; none for an artifact that nothing was ever added to."""
        if self.base is None:
            return []
        now = {"generation": self.base.generation + 1, "rows": num_rows, "data": self._added[-1], "digest": self.owner}
        return [*self.base.history, now]

    def _intact(self) -> list[Record]:
        """Shards whose record, spec digest and payload hash are all right; the others are as if never written."""
        found = []
        for name in self.store.names("shards/"):
            if not name.endswith(".json"):
                continue
            try:
                text = self.store.get(name)
                record = Record.from_json(json.loads(text))
            except ValueError:  # torn, damaged or foreign: not a record, so its shard is done again
                continue
            whole = text == canonical_json(record.to_json()) and record.sealed == (self.minor >= SINCE)
            whole = whole and f"{stem(record.name)}.json" == name and record.spec == self.owner
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
        self.history: list[dict[str, Any]] = _history(manifest, self.digest, self.spec, self.records)
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

    @property
    def data(self) -> list[str]:
        """The digest of what each generation added."""
        return [entry["data"] for entry in self.history]

    @property
    def identity(self) -> str:
        """The digest of the spec and of all that was added since."""
        return self.history[-1]["digest"]

    def tensors(self, name: str) -> Payload:
        """The tensors of one shard: views of one memory mapping from a local store, fetched one by one from a remote
        one. Sizes and offsets are checked here, hashes by `check` and `verify`."""
        record = self._by_name[name]
        last = self._last  # read once: another thread may open another shard meanwhile
        if last is None or last.name != record.payload:
            # One shard stays open; more, and a scan's resident memory would grow with the index.
            self._last = last = Payload(self.store, record.payload, record.bytes)
        return last

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
            problems.append(self._compare(name, file["bytes"], file["hash"], mend=self._redo(*self.files)))
        for record in self.records:
            problems.append(self._compare(record.payload, record.bytes, record.hash))
            problems.append(self._check_record(record))
        return [problem for problem in problems if problem]

    def _compare(self, name: str, size: int | None, expected: str, *, mend: str = "") -> str | None:
        mend = mend or self._redo(name)
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

    def _redo(self, *names: str) -> str:
        return _redo(*names) + (", and then each `influent append`" if len(self.history) > 1 else "")

    def _check_record(self, record: Record) -> str | None:
        name = f"{stem(record.name)}.json"
        try:
            if self.store.get(name) == canonical_json(record.to_json()):
                return None
        except CorruptError as e:
            return f"{e}; {self._redo(name)}"
        return f"{self.store}/{name}: differs from the manifest's record; {self._redo(name)}"


def content(records: Iterable[Record]) -> str:
    """The digest of the payloads' hashes by name: what one artifact says in its spec of another that it depends on."""
    return digest(sorted([record.name, record.hash] for record in records))


def kind_of(store: Store) -> str:
    """The kind of a finished artifact, as its manifest says; FormatError when there is none."""
    if not store.exists("manifest.json"):
        raise FormatError(f"{store}: not a finished artifact: there is no manifest.json in it")
    return str(_read_json(store, "manifest.json").get("kind"))


def finished(store: Store, under: str) -> Iterator[tuple[Store, str]]:
    """The folders of finished artifacts under a name such as `curvature/`, and the kind of each."""
    for name in store.names(under):
        path, _, file = name.rpartition("/")
        if file == "manifest.json":
            folder = store.child(path)
            yield folder, kind_of(folder)


def _redo(*names: str) -> str:
    """What mends any damage: intact shards are kept, because each carries its spec's digest and its own hash."""
    every = " and ".join(dict.fromkeys([*names, "manifest.json"]))
    return f"delete {every} there, then run the same command again to restore it"


def _ordered(records: Iterable[Record]) -> list[Record]:
    return sorted(records, key=lambda r: (r.rows or (0, 0), r.name))


def _version(kind: str, requires: Sequence[str], minor: int) -> dict[str, Any]:
    # Before 1.2 the minor version said whether there are features; what was begun so goes on so, byte for byte.
    minor = minor if minor >= SINCE else int(bool(requires))
    return {"format": [FORMAT[0], minor], "requires": list(requires), "reader": READER, "kind": kind}


def generation_digest(spec: str, data: Sequence[str]) -> str:
    """The identity of an artifact with rows added: of its spec's digest and of each generation's data."""
    return spec if len(data) == 1 else digest({"spec": spec, "data": list(data)})


def _history(
    manifest: dict[str, Any], spec_digest: str, spec: dict[str, Any], records: Sequence[Record]
) -> list[dict[str, Any]]:
    """The generations, oldest first, the last one is this; ValueError unless they and the records fit together."""
    end = records[-1].rows[1] if records and records[-1].rows else 0
    first = {"generation": 0, "rows": end, "data": spec.get("data"), "digest": spec_digest}
    if (history := manifest.get("history")) is None:
        return [first]
    data = [entry["data"] for entry in history]
    for number, entry in enumerate(history):
        wanted = number, generation_digest(spec_digest, data[: number + 1])
        if (got := (entry["generation"], entry["digest"])) != wanted:
            raise ValueError(f"history[{number}]: expected {wanted}, got {got}")
    if data[0] != spec.get("data") or len(history) != manifest["generation"] + 1 or history[-1]["rows"] != end:
        raise ValueError("its history does not fit its generation, rows or data")
    for record in records:
        owners = (entry["digest"] for entry in history if record.rows is None or record.rows[1] <= entry["rows"])
        owner = next(owners, None)
        if record.spec != owner:
            raise ValueError(f"record {record.name}: spec is {record.spec}, expected {owner}")
    return history


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

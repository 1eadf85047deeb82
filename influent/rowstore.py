"""The index: one row per training example and block, in shards, with a catalog beside them.

Rows are in the data's order and shards cut it into ranges. Reading is by memory mapping; no shard's rows are ever held
here. Not here: making rows (extract), scoring them (score), appending to or deleting from an index.
"""

from __future__ import annotations

import os
import struct
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from .artifact import Artifact, ArtifactWriter, Record, kind_of
from .errors import CorruptError, FormatError, InfluentError, MismatchError, NumericsError
from .payload import Payload
from .storage import Store

if TYPE_CHECKING:
    import torch

    from .catalog import Catalog

CATALOG = ("catalog.json", "catalog.parquet")
ROWS = ("float32", "float16", "bfloat16")
IDS = ".id"  # a block may be called id, loss, norm or tokens, but no module path begins with a dot
STATS = {"loss": ".loss", "norm": ".norm", "tokens": ".tokens"}


@dataclass(frozen=True, slots=True)
class Chunk:
    """The rows [lo, hi) that make shard `number`."""

    number: int
    lo: int
    hi: int

    @property
    def name(self) -> str:
        return f"{self.number:06d}"


class IndexWriter:
    """Writes an index shard by shard, in any order; a killed run resumes at the first shard it had not committed."""

    def __init__(self, writer: ArtifactWriter):
        self.artifact = writer
        self.store, self.spec, self.digest, self.notes = writer.store, writer.spec, writer.digest, writer.notes
        self.widths: dict[str, int] = {block["block"]: block["width"] for block in writer.spec["layout"]}
        self._planned = 0

    @classmethod
    def open(cls, path: str | os.PathLike[str] | Store, spec: dict[str, Any], *, notes: dict[str, Any]) -> IndexWriter:
        """Begin an index, or go on with one of the same spec. `notes["shard_rows"]` is the rows per shard; a stored
        one wins, so that a resumed run cuts the data as the first did.

        Raises MismatchError, naming the first field that differs, when another spec's index is there.
        """
        return cls(ArtifactWriter.open(_store(path), "index", spec, notes=notes))

    @property
    def committed(self) -> bool:
        return self.artifact.committed

    def plan(self, n_rows: int) -> list[Chunk]:
        """All chunks of an index of `n_rows` rows."""
        size = self.notes["shard_rows"]
        return [Chunk(i, lo, min(lo + size, n_rows)) for i, lo in enumerate(range(0, n_rows, size))]

    def pending(self, n_rows: int) -> list[Chunk]:
        """The chunks not yet committed, in row order. Shards that are not of this plan will not be committed."""
        plan = self.plan(n_rows)
        ranges = {chunk.name: (chunk.lo, chunk.hi) for chunk in plan}
        done = {name: r for name, r in self.artifact.records.items() if ranges.get(name) == r.rows}
        self.artifact.records, self._planned = done, n_rows
        return [chunk for chunk in plan if chunk.name not in done]

    def write(
        self,
        chunk: Chunk,
        rows: Mapping[str, torch.Tensor],
        *,
        loss: torch.Tensor,
        norm: torch.Tensor,
        tokens: torch.Tensor,
        dtype: str,
        skipped: Mapping[str, list[int]],
        split: int = 0,
    ) -> Record:
        """Commit one chunk: block -> rows [n, K] float32 (stored as `dtype`), loss, norm and tokens [n], and the row
        ids that were skipped and why (their rows are zero). `split` counts documents longer than the context.

        Raises NumericsError, naming block and row, if a value is not finite once stored, and commits nothing then.
        """
        import torch

        if dtype != self.spec["rows"]:
            raise MismatchError(f"{self.store}: rows of {dtype} offered to an index of {self.spec['rows']} rows")
        ids = torch.arange(chunk.lo, chunk.hi, dtype=torch.int64)
        tensors: dict[str, torch.Tensor] = {IDS: ids}
        for name, values in (("loss", loss), ("norm", norm), ("tokens", tokens)):
            tensors[STATS[name]] = _checked(name, values, (len(ids),), torch.float32, chunk.lo)
        if rows.keys() != self.widths.keys():
            raise MismatchError(
                f"{self.store}: blocks {sorted(rows.keys() ^ self.widths.keys())} do not fit the layout"
            )
        for key, width in self.widths.items():
            tensors[key] = _checked(key, rows[key], (len(ids), width), getattr(torch, dtype), chunk.lo)
        meta = {"skipped": {reason: sorted(ids) for reason, ids in sorted(skipped.items()) if ids}, "split": split}
        return self.artifact.put(chunk.name, tensors, meta, rows=(chunk.lo, chunk.hi))

    def commit(self, summary: dict[str, Any]) -> None:
        """Write the manifest. `summary` is anything the report needs; `rows`, `bytes` and `skipped` are set here, the
        last as the counts of `summary["skipped"]` (what never became a row) plus those of the shards.

        Raises FormatError when the shards do not cover the rows without gap or overlap.
        """
        records = sorted(self.artifact.records.values(), key=lambda record: record.rows or (0, 0))
        gap = _first_gap(records)
        if gap is None and _num_rows(records) < self._planned:
            gap = f"{_num_rows(records)} of {self._planned} rows are written"
        if gap:
            raise FormatError(f"{self.store}: cannot commit: {gap}; write the pending chunks first")
        skipped = Counter(summary.get("skipped", {}))
        for record in records:
            skipped.update({reason: len(ids) for reason, ids in record.meta["skipped"].items()})
        totals = {"rows": _num_rows(records), "bytes": sum(r.bytes for r in records), "skipped": dict(skipped)}
        totals["split"] = sum(record.meta.get("split", 0) for record in records)
        self.artifact.commit({**summary, **totals}, files=[name for name in CATALOG if self.store.exists(name)])


class Shard:
    """The rows [lo, hi) of an index; tensors are views of the file, without a copy."""

    def __init__(self, index: Index, record: Record):
        if record.rows is None:
            raise CorruptError(f"{index.store}/{record.payload}: its record has no row range")
        self._index, self._record = index, record
        self.lo, self.hi = record.rows
        self.name = record.name

    def __len__(self) -> int:
        return self.hi - self.lo

    def rows(self, key: str) -> torch.Tensor:
        """The rows of one block, [n, K] in the index's dtype."""
        return self._read(key, self._index.dtype, (len(self), self._index.widths[key]))

    @property
    def ids(self) -> torch.Tensor:
        """Row numbers, [n] int64."""
        return self._read(IDS, "int64", (len(self),))

    def stat(self, name: str) -> torch.Tensor:
        """ "loss", "norm" or "tokens" of each row, [n] float32."""
        return self._read(STATS[name], "float32", (len(self),))

    def check(self) -> None:
        """Raises CorruptError, naming the shard, unless every byte is as committed; once per opened index.

        Costs a read of the payload and its hash, 1 to 3 ms per MB; from a remote store a second transfer of it.
        """
        mend = (
            f"delete {self._record.payload} and manifest.json there, then run the `influent index` command that made "
            "the index again: it redoes this shard alone (`influent verify` lists all damage)"
        )
        self._index.artifact.check(self.name, mend=mend)

    def verify(self) -> list[str]:
        """What is wrong with the payload, which must hold the layout's tensors, no others, and the ids lo..hi-1.

        Raises CorruptError when the payload cannot be read at all.
        """
        payload = self._index.artifact.tensors(self.name)
        expected = {key: (self._index.dtype, (len(self), width)) for key, width in self._index.widths.items()}
        expected |= {IDS: ("int64", (len(self),))} | {name: ("float32", (len(self),)) for name in STATS.values()}
        names = sorted(expected.keys() | payload.keys())
        problems = [self._difference(payload, name, expected.get(name)) for name in names]
        if payload.describe(IDS) == expected[IDS]:
            ids = struct.unpack(f"<{len(self)}q", payload.read(IDS))
            if ids != tuple(range(self.lo, self.hi)):
                problems.append(f"{self.where}: its ids are not the rows {self.lo} to {self.hi - 1} in order")
        return [problem for problem in problems if problem]

    @property
    def where(self) -> str:
        return f"{self._index.store}/{self._record.payload}"

    def _read(self, key: str, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
        payload = self._index.artifact.tensors(self.name)
        if problem := self._difference(payload, key, (dtype, shape)):
            raise CorruptError(f"{problem}; `influent verify` lists all damage")
        return payload[key]

    def _difference(self, payload: Payload, key: str, expected: tuple[str, tuple[int, ...]] | None) -> str | None:
        if (got := payload.describe(key)) == expected:
            return None
        return f"{self.where}: tensor {key!r}: expected {_words(expected)}, got {_words(got)}"


class Index:
    """A finished index, read only."""

    def __init__(self, path: str, artifact: Artifact):
        self.path, self.artifact, self.store = path, artifact, artifact.store
        self.spec, self.digest, self.notes, self.summary = (
            artifact.spec, artifact.digest, artifact.notes, artifact.summary
        )  # fmt: skip
        self.widths: dict[str, int] = {block["block"]: block["width"] for block in self.spec["layout"]}
        self.keys: list[str] = list(self.widths)
        self.dtype: str = self.spec["rows"]
        if len(self.keys) != len(self.spec["layout"]) or self.dtype not in ROWS:
            raise CorruptError(f"{self.store}/spec.json: a block's name occurs twice, or rows are not one of {ROWS}")
        if gap := _first_gap(artifact.records):
            raise CorruptError(f"{self.store}/manifest.json: {gap}")
        self.n: int = _num_rows(artifact.records)
        self.bytes: int = sum(record.bytes for record in artifact.records)
        self.shards: list[Shard] = [Shard(self, record) for record in artifact.records]

    @classmethod
    def open(cls, path: str | os.PathLike[str] | Store) -> Index:
        """Raises FormatError for what is not a finished index that this release reads, CorruptError for damage to the
        manifest; shards are not opened."""
        store = _store(path)
        artifact = Artifact.open(store, "index")
        try:
            return cls(str(store), artifact)
        except (KeyError, TypeError) as e:
            raise CorruptError(f"{store}/spec.json: not the spec of an index: {type(e).__name__}: {e}") from e

    @cached_property
    def catalog(self) -> Catalog:
        from .catalog import Catalog

        return Catalog.open(self.store)

    def stat(self, name: str) -> torch.Tensor:
        """ "loss", "norm" or "tokens" of every row, [N] float32."""
        import torch

        return torch.cat([torch.empty(0), *(shard.stat(name) for shard in self.shards)])


def info(index: Index) -> dict[str, Any]:
    """What an index holds and costs: the document of `influent info --json` but for the curvatures."""
    return {
        "path": index.path,
        "rows": index.n,
        "bytes": index.bytes,
        "bytes_per_row": index.bytes / index.n if index.n else 0.0,
        "layers": len(index.keys),
        "compress": index.spec["compress"],
        "codec": "dense",
        "dtype": index.dtype,
        "skipped": index.summary["skipped"],
        "split": index.summary.get("split", 0),
        "digest": index.digest,
        "generation": index.artifact.generation,
        "shards": len(index.shards),
        "catalog_bytes": sum(file["bytes"] for file in index.artifact.files.values()),
        "summary": index.summary,
        "notes": index.notes,
    }


def verify(path: str | os.PathLike[str] | Store) -> dict[str, Any]:
    """Check every committed byte of an index and of what was fitted to it: {"ok": bool, "errors": [one line each]}.

    Raises FormatError for what is not a finished index, or is one that only a newer release reads.
    """
    store = _store(path)
    try:
        index = Index.open(store)
    except CorruptError as e:
        return {"ok": False, "errors": [str(e)]}
    errors = index.artifact.verify()
    damaged = "\n".join(errors)  # what is already reported is not looked into: it would be reported twice
    for shard in index.shards:
        if shard.where not in damaged:
            errors += _problems(shard.verify)
    if f"{store}/{CATALOG[0]}" not in damaged and f"{store}/{CATALOG[1]}" not in damaged:
        errors += _problems(lambda: _check_catalog(index))
    for folder in _fitted(store):
        errors += _problems(lambda folder=folder: Artifact.open(folder, kind_of(folder)).verify())
    return {"ok": not errors, "errors": errors}


def _check_catalog(index: Index) -> list[str]:
    catalog, where = index.catalog, f"{index.store}/{CATALOG[0]}"
    problems = catalog.verify()
    if catalog.n != index.n:
        problems.append(f"{where}: {catalog.n} rows, but the index has {index.n}")
    if catalog.digest != index.spec["data"]:
        problems.append(f"{where}: its digest is {catalog.digest}, but the spec has {index.spec['data']}")
    return problems


def _problems(check: Callable[[], list[str]]) -> list[str]:
    try:
        return check()
    except InfluentError as e:
        return [str(e)]


def _fitted(store: Store) -> list[Store]:
    """The finished artifacts under curvature/, by name."""
    names = store.names("curvature/")
    return [store.child(name.removesuffix("/manifest.json")) for name in names if name.endswith("/manifest.json")]


def _checked(name: str, values: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, lo: int) -> torch.Tensor:
    """The values as they will be stored; MismatchError for another shape, NumericsError for what is not finite."""
    import torch

    if tuple(values.shape) != shape:
        raise MismatchError(f"block {name!r}: expected rows of shape {shape}, got {tuple(values.shape)}")
    stored = values.detach().to("cpu", dtype)
    finite = torch.isfinite(stored).reshape(len(stored), -1).all(dim=1)
    if not finite.all():
        row = int(finite.logical_not().nonzero()[0])
        got = values[row][torch.isfinite(stored[row].to(values.device)).logical_not()].reshape(-1)[0].item()
        raise NumericsError(
            f"block {name!r}, row {lo + row}: {got:.6g} is not finite as {dtype}: "
            "look at that example, or store wider rows (float32)"
        )
    return stored


def _first_gap(records: list[Record]) -> str | None:
    """What is wrong with the row ranges, which must be contiguous from 0; None when they are."""
    end = 0
    for record in records:
        if record.rows is None or record.rows[0] != end or record.rows[1] <= end:
            return f"shard {record.name} has rows {record.rows}, expected them to begin at {end}"
        end = record.rows[1]
    return None


def _num_rows(records: list[Record]) -> int:
    return records[-1].rows[1] if records and records[-1].rows else 0


def _words(what: tuple[str, tuple[int, ...]] | None) -> str:
    return "none" if what is None else f"{what[0]} {list(what[1])}"


def _store(path: str | os.PathLike[str] | Store) -> Store:
    return path if isinstance(path, Store) else Store(path)

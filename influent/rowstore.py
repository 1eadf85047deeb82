"""The index: one row per training example and block, in shards, with a catalog beside them.

Rows are in the data's order and shards cut it into ranges. Reading is by memory mapping; no shard's rows are ever held
here. Not here: writing (rowwriter.py), making rows (collect.py), scoring them (score.py).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

from .artifact import Artifact, content, kind_of
from .codec import Codec, Factors, Form
from .errors import CorruptError, InfluentError, LayerError, SpecError
from .layout import CAPTURED, IDS, RESIDUAL, Layout, Tensors, first_gap, num_rows
from .payload import Header, Payload, Places
from .shardrecord import Record
from .storage import Store

if TYPE_CHECKING:
    import numpy as np
    import torch

    from .catalog import Catalog
    from .gradients import Row


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

    def grads(self, key: str, lo: int = 0, hi: int | None = None) -> Row:
        """Rows lo to hi of this shard, of one block, decoded: views of the file for float codecs, else float32."""
        from .coding import decode

        layout, payload = self._index.layout, self._index.artifact.tensors(self.name)
        if not layout.codec.stored:
            raise SpecError(
                f"{self._index.path}: stores no rows (rows none); ask it with --curvature kfac, ekfac or identity, or "
                "index again with --rows float32"
            )
        size = self.hi - self.lo
        end = size if hi is None else hi
        tensors = {
            name: self._part(payload, name, (dtype, (size, *tail)), lo, end)
            for name, (dtype, tail) in layout.blocks[key].items()
        }
        return decode(layout.codec, tensors, key, layout.widths[key], layout.factors[key])

    @property
    def is_mapped(self) -> bool:
        """Whether rows are read from a local file, so that `places` knows them."""
        return self._index.store.is_local

    def places(self, keys: tuple[str, ...], lo: int) -> Places:
        """Where the rows from `lo` on of blocks of one kind lie: the tensors of each, as `Form.tensors` has them, and 0
        for the scales of floats. They are of the layout's dtypes and shapes, and go on to the shard's last row."""
        payload = self._index.artifact.tensors(self.name)
        (begin, row), mapped = self._located(payload, keys), payload.mapped()
        addresses = begin + row * lo
        addresses += mapped.data_ptr() + payload.start
        if not self._index.codec.packed:
            addresses[:, -1] = 0
        return Places(addresses, mapped)

    def _located(self, payload: Payload, keys: tuple[str, ...]) -> np.ndarray:
        """Of each block where its tensors begin, and the bytes of a row of each, [2, blocks, tensors]; checked once for
        all shards that have as many rows, whose headers are equal."""
        import numpy as np

        index, size = self._index, len(self)
        header, num_rows, located = index.located.get(keys, (None, 0, None))
        if located is not None and header is payload.header and num_rows == size:
            return located
        absent, found = [] if index.codec.packed else [(0, 0)], []
        for key in keys:
            tensors = index.layout.blocks[key]
            for name, (dtype, tail) in tensors.items():
                self._demand(payload, name, (dtype, (size, *tail)))
            entries = [payload.header.entries[name] for name in tensors]
            found.append([*((entry.lo, entry.row) for entry in entries), *absent])
        located = np.array(found, np.int64).transpose(2, 0, 1)
        index.located[keys] = payload.header, size, located
        return located

    def rows(self, key: str) -> torch.Tensor:
        """The rows of one block, [n, K]: as stored in a plain float index, else decoded, in float32."""
        layout = self._index.layout
        if layout.is_plain:
            return self._read(key, layout.codec.bits, (len(self), layout.widths[key]))
        import torch

        return self.grads(key).to(torch.float32).flat()

    @property
    def skipped(self) -> list[int]:
        """The rows of this shard that were skipped and are zero, whatever the reason."""
        return sorted(row for rows in self._record.meta.get("skipped", {}).values() for row in rows)

    @property
    def captured(self) -> torch.Tensor | None:
        """The share of each row's energy that its rank cut kept, [n, blocks] float32; None when rows are not cut."""
        layout = self._index.layout
        if not layout.has_captured:
            return None
        return self._read(CAPTURED, "uint8", (len(self), len(layout.widths))).float() / 255

    @property
    def ids(self) -> torch.Tensor:
        """Row numbers, [n] int64."""
        return self._read(IDS, "int64", (len(self),))

    def stat(self, name: str) -> torch.Tensor:
        """ "loss", "norm" or "tokens" of each row, and of rows of margins "residual": [n] float32; an index without
        rows has no norms (KeyError)."""
        if name == "residual":
            if not self._index.layout.has_residual:
                raise SpecError(f"{self._index.path}: its rows have no residual: they are not of the target margin")
            return self._read(RESIDUAL, "float32", (len(self),))
        return self._read(self._index.layout.stats[name], "float32", (len(self),))

    def check(self) -> None:
        """Raises CorruptError, naming the shard, unless every byte is as committed; once per opened index.

        Costs a read of the payload and its hash, 1 to 3 ms per MB; from a remote store a second transfer of it.
        """
        again = ", and then each `influent append`" if self._index.history else ""
        mend = (
            f"delete {self._record.payload} and manifest.json there, then run the `influent index` command that made "
            f"the index again{again}: it redoes this shard alone (`influent verify` lists all damage)"
        )
        self._index.artifact.check(self.name, mend=mend)

    def verify(self) -> list[str]:
        """What is wrong with the payload, which must hold the layout's tensors, no others, and the ids lo..hi-1.

        Raises CorruptError when the payload cannot be read at all.
        """
        payload = self._index.artifact.tensors(self.name)
        expected = self._index.layout.shard(len(self))
        names = sorted(expected.keys() | payload.keys())
        problems = [self._difference(payload, name, expected.get(name)) for name in names]
        if payload.describe(IDS) == expected[IDS]:
            ids = struct.unpack(f"<{len(self)}q", payload.read(IDS))
            if ids != tuple(range(self.lo, self.hi)):
                problems.append(f"{self.where}: its ids are not the rows {self.lo} to {self.hi - 1} in order")
        problems += [self._unbounded(payload, name) for name in self._scales(payload, expected)]
        return [problem for problem in problems if problem]

    def _scales(self, payload: Payload, expected: Tensors) -> list[str]:
        if not self._index.codec.packed:
            return []
        return [name for name, what in expected.items() if what[0] == "bfloat16" and payload.describe(name) == what]

    def _unbounded(self, payload: Payload, name: str) -> str | None:
        """Whether a scale is infinite or not a number: all eight bits of its exponent are ones."""
        import numpy as np

        exponents = np.frombuffer(payload.read(name), dtype="<u2") & 0x7F80
        return f"{self.where}: tensor {name!r}: a scale is not finite" if (exponents == 0x7F80).any() else None

    @property
    def where(self) -> str:
        return f"{self._index.store}/{self._record.payload}"

    def _read(self, key: str, dtype: str, shape: tuple[int, ...], lo: int = 0, hi: int | None = None) -> torch.Tensor:
        payload = self._index.artifact.tensors(self.name)
        return self._part(payload, key, (dtype, shape), lo, len(self) if hi is None else hi)

    def _part(self, payload: Payload, key: str, what: tuple[str, tuple[int, ...]], lo: int, hi: int) -> torch.Tensor:
        self._demand(payload, key, what)
        return payload.part(key, lo, hi)

    def _demand(self, payload: Payload, key: str, what: tuple[str, tuple[int, ...]]) -> None:
        if problem := self._difference(payload, key, what):
            raise CorruptError(f"{problem}; `influent verify` lists all damage")

    def _difference(self, payload: Payload, key: str, expected: tuple[str, tuple[int, ...]] | None) -> str | None:
        if (got := payload.describe(key)) == expected:
            return None
        return f"{self.where}: tensor {key!r}: expected {_words(expected)}, got {_words(got)}"


SAMPLED = 64  # shards that `info` opens at most


class Index:
    """A finished index, read only."""

    def __init__(self, path: str, artifact: Artifact):
        self.path, self.artifact, self.store = path, artifact, artifact.store
        self.spec, self.notes, self.summary = artifact.spec, artifact.notes, artifact.summary
        self.digest: str = artifact.identity  # of these rows: the spec's, until rows are appended
        self.layout = Layout.of(self.spec)
        self.codec: Codec = self.layout.codec
        self.widths: dict[str, int] = self.layout.widths
        self.factors: dict[str, Factors | None] = self.layout.factors
        self.forms: dict[str, Form] = self.layout.forms
        self.located: dict[tuple[str, ...], tuple[Header, int, np.ndarray]] = {}  # see Shard.places
        self.keys: list[str] = list(self.widths)
        self.dtype: str = self.codec.bits
        if gap := first_gap(artifact.records):
            raise CorruptError(f"{self.store}/manifest.json: {gap}")
        self.n: int = num_rows(artifact.records)
        self.bytes: int = sum(record.bytes for record in artifact.records)
        self.shards: list[Shard] = [Shard(self, record) for record in artifact.records]

    @classmethod
    def open(cls, path: str | os.PathLike[str] | Store) -> Index:
        """Raises FormatError for what is not a finished index that this release reads, CorruptError for damage to the
        manifest; shards are not opened."""
        store = Store.at(path)
        artifact = Artifact.open(store, "index")
        try:
            return cls(str(store), artifact)
        except (KeyError, TypeError, LayerError, SpecError) as e:
            raise CorruptError(f"{store}/spec.json: not the spec of an index: {type(e).__name__}: {e}") from e

    @property
    def history(self) -> list[dict[str, Any]]:
        """The earlier generations, oldest first: `generation`, `rows` (how many there were), `digest` (the index's,
        then). Empty for an index that nothing was appended to."""
        return [
            {name: entry[name] for name in ("generation", "rows", "digest")} for entry in self.artifact.history[:-1]
        ]

    @cached_property
    def catalog(self) -> Catalog:
        from .catalog import Catalog

        return Catalog.open(self.store, len(self.artifact.history))

    def stat(self, name: str) -> torch.Tensor:
        """ "loss", "norm" or "tokens" of every row, and of rows of margins "residual": [N] float32."""
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
        "codec": "dense" if index.layout.is_plain else str(index.codec),
        "dtype": index.dtype,
        "captured": _captured(index),
        "skipped": index.summary["skipped"],
        "split": index.summary.get("split", 0),
        "digest": index.digest,
        "generation": index.artifact.generation,
        "shards": len(index.shards),
        "catalog_bytes": sum(file["bytes"] for file in index.artifact.files.values()),
        "summary": index.summary,
        "notes": index.notes,
    }


def _captured(index: Index) -> dict[str, Any] | None:
    """The mean share of the rows' energy that the rank cut kept, overall, and of each block its mean and least, of so
    many `rows`: those of at most SAMPLED shards, evenly spaced. Rows that were skipped have none."""
    if not index.layout.has_captured or not index.n:
        return None
    import torch

    total, least, count = torch.zeros(len(index.keys), dtype=torch.float64), torch.ones(len(index.keys)), 0
    step = max(1, len(index.shards) / SAMPLED)
    for number in range(min(SAMPLED, len(index.shards))):
        shard = index.shards[int(number * step)]
        kept = shard.captured
        assert kept is not None
        made = torch.ones(len(shard), dtype=torch.bool)
        made[[row - shard.lo for row in shard.skipped]] = False
        total += kept[made].sum(dim=0, dtype=torch.float64)
        least = torch.minimum(least, torch.cat([kept[made], torch.ones(1, len(index.keys))]).amin(dim=0))
        count += int(made.sum())
    if count == 0:
        return None
    means = (total / count).tolist()
    blocks = {key: {"mean": a, "min": b} for key, a, b in zip(index.keys, means, least.tolist(), strict=True)}
    return {"mean": sum(means) / len(means), "blocks": blocks, "rows": count}


def verify(path: str | os.PathLike[str] | Store) -> dict[str, Any]:
    """Check every committed byte of an index and of what was fitted to it: {"ok": bool, "errors": [one line each]}.

    Raises FormatError for what is not a finished index, or is one that only a newer release reads.
    """
    store = Store.at(path)
    try:
        index = Index.open(store)
    except CorruptError as e:
        return {"ok": False, "errors": [str(e)]}
    errors = index.artifact.verify()
    damaged = "\n".join(errors)  # what is already reported is not looked into: it would be reported twice
    for shard in index.shards:
        if shard.where not in damaged:
            errors += _problems(shard.verify)
    if not any(f"{store}/{name}" in damaged for name in index.artifact.files):
        errors += _problems(lambda: _check_catalog(index))
    for folder in _fitted(store):
        errors += _problems(lambda folder=folder: Artifact.open(folder, kind_of(folder)).verify())
    if "bases" in index.spec:
        errors += _problems(lambda: _check_bases(index))
    return {"ok": not errors, "errors": errors}


def _check_catalog(index: Index) -> list[str]:
    problems = index.catalog.verify()
    begun = 0
    for part, entry in zip(index.catalog.parts, index.artifact.history, strict=True):
        where, rows = f"{index.store}/{part.record_name}", entry["rows"] - begun
        begun = entry["rows"]
        if part.n != rows:
            problems.append(f"{where}: {part.n} rows, but the index has {rows}")
        if part.digest != entry["data"]:
            problems.append(f"{where}: its digest is {part.digest}, but the spec has {entry['data']}")
    return problems


def _check_bases(index: Index) -> list[str]:
    """The learned bases must be there, and those that the rows were made with: without them nothing can be asked."""
    bases = index.store.child("bases")
    if not bases.exists("manifest.json"):
        return [f"{bases}: missing or unfinished, but the rows were compressed with it; restore it, or index again"]
    if (got := content(Artifact.open(bases, kind_of(bases)).records)) != index.spec["bases"]:
        return [f"{bases}: its content is {got}, but the index was made with {index.spec['bases']}; restore it"]
    return []


def _problems(check: Callable[[], list[str]]) -> list[str]:
    try:
        return check()
    except InfluentError as e:
        return [str(e)]


def _fitted(store: Store) -> list[Store]:
    """The finished artifacts under bases/ and curvature/, by name."""
    names = [*store.names("bases/"), *store.names("curvature/")]
    return [store.child(name.removesuffix("/manifest.json")) for name in names if name.endswith("/manifest.json")]


def _words(what: tuple[str, tuple[int, ...]] | None) -> str:
    return "none" if what is None else f"{what[0]} {list(what[1])}"

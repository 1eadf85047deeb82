"""Writing an index: rows come in chunks, one chunk is one shard, and the manifest makes the index exist.

Rows arrive as gradients in float32 or already coded (coding.py); what is not finite once stored is never committed.
Not here: making rows (collect.py), reading them (rowstore.py).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .artifact import ArtifactWriter
from .codec import Codec, Factors
from .errors import FormatError, MismatchError, NumericsError
from .layout import CAPTURED, CATALOG, IDS, RESIDUAL, Layout, first_gap, num_rows, with_factors
from .shardrecord import Record
from .storage import Store

if TYPE_CHECKING:
    import torch


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
        self.layout = Layout.of(writer.spec)
        self.widths = self.layout.widths
        self._before = writer.base.records if writer.base else []  # shards of earlier generations
        self._planned = 0

    @classmethod
    def open(cls, path: str | os.PathLike[str] | Store, spec: dict[str, Any], *, notes: dict[str, Any]) -> IndexWriter:
        """Begin an index, or go on with one of the same spec. `notes["shard_rows"]` is the rows per shard; a stored
        one wins, so that a resumed run cuts the data as the first did.

        Raises MismatchError, naming the first field that differs, when another spec's index is there; LayerError when
        two blocks would store tensors of one name.
        """
        layout = Layout.of(spec)  # what cannot be written must not be begun
        requires = [] if layout.is_plain else ["codec"] if layout.codec.stored else ["live"]
        requires += ["residual"] if layout.has_residual else []
        return cls(ArtifactWriter.open(Store.at(path), "index", spec, notes=notes, requires=requires))

    @classmethod
    def extend(cls, path: str | os.PathLike[str] | Store, data: str) -> IndexWriter:
        """Begin to append rows, of the catalog part of digest `data`, to a finished index, or go on with it. The
        shards it has are neither read nor written; readers see the index without the new rows until `commit`."""
        return cls(ArtifactWriter.extend(Store.at(path), "index", data))

    @property
    def committed(self) -> bool:
        return self.artifact.committed

    def plan(self, n_rows: int) -> list[Chunk]:
        """All chunks of an index of `n_rows` rows that this generation writes."""
        size, number, first = self.notes["shard_rows"], len(self._before), num_rows(self._before)
        return [Chunk(i, lo, min(lo + size, n_rows)) for i, lo in enumerate(range(first, n_rows, size), number)]

    def pending(self, n_rows: int) -> list[Chunk]:
        """The chunks not yet committed, in row order. Shards that are not of this plan will not be committed."""
        plan = self.plan(n_rows)
        ranges = {chunk.name: (chunk.lo, chunk.hi) for chunk in plan}
        done = {name: r for name, r in self.artifact.records.items() if ranges.get(name) == r.rows}
        done |= {record.name: record for record in self._before}
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
        captured: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
    ) -> Record:
        """Commit one chunk: its rows, loss, norm and tokens [n], and the row ids that were skipped and why (their rows
        are zero).

        Args:
            rows: block -> [n, K] float32, stored as `dtype`; of a codec that is no float dtype, the coded tensors by
                name, as `coding.encode` makes them.
            dtype: the codec's text, which must be the index's.
            split: how many documents were longer than the context.
            residual: [n], for rows of the target margin.
            captured: [n, blocks], for a codec with a rank: the share of each row's energy that was kept, 0 to 1.

        Raises:
            NumericsError: a value is not finite once stored; names block and row. Nothing is committed then.
            MismatchError: the tensors are not those of the layout.
        """
        import torch

        if dtype != self.spec["rows"]:
            raise MismatchError(f"{self.store}: rows of {dtype} offered to an index of {self.spec['rows']} rows")
        n = chunk.hi - chunk.lo
        tensors: dict[str, torch.Tensor] = {IDS: torch.arange(chunk.lo, chunk.hi, dtype=torch.int64)}
        given = {"loss": loss, "norm": norm, "tokens": tokens}
        for name, tensor in self.layout.stats.items():
            tensors[tensor] = _checked(name, given[name], (n,), "float32", chunk.lo)
        if (residual is not None) != self.layout.has_residual:
            raise MismatchError(f"{self.store}: `residual` goes with rows of the target margin")
        if residual is not None:
            tensors[RESIDUAL] = _checked("residual", residual, (n,), "float32", chunk.lo)
        expected = self.layout.rows(n)
        if rows.keys() != expected.keys():
            raise MismatchError(f"{self.store}: blocks {sorted(rows.keys() ^ expected.keys())} do not fit the layout")
        for name, (kind, shape) in expected.items():
            tensors[name] = _checked(name, rows[name], shape, kind, chunk.lo, cast=self.layout.is_plain)
        if (captured is not None) != self.layout.has_captured:
            raise MismatchError(f"{self.store}: `captured` goes with rows cut to a rank, got rows of {dtype}")
        if captured is not None:
            shares = _checked(CAPTURED, captured, (n, len(self.widths)), "float32", chunk.lo)
            tensors[CAPTURED] = shares.clamp(0, 1).mul(255).round().to(torch.uint8)
        meta = {"skipped": {reason: sorted(ids) for reason, ids in sorted(skipped.items()) if ids}, "split": split}
        return self.artifact.put(chunk.name, tensors, meta, rows=(chunk.lo, chunk.hi))

    def commit(self, summary: dict[str, Any], *, files: Sequence[str] = CATALOG) -> None:
        """Write the manifest. `summary` is anything the report needs; `rows`, `bytes` and `skipped` are set here, the
        last as the counts of `summary["skipped"]` (what never became a row) plus those of the shards. `files` are the
        catalog's, as far as they are there.

        Raises FormatError when the shards do not cover the rows without gap or overlap.
        """
        records = sorted(self.artifact.records.values(), key=lambda record: record.rows or (0, 0))
        gap = first_gap(records)
        if gap is None and num_rows(records) < self._planned:
            gap = f"{num_rows(records)} of {self._planned} rows are written"
        if gap:
            raise FormatError(f"{self.store}: cannot commit: {gap}; write the pending chunks first")
        skipped = Counter(summary.get("skipped", {}))
        for record in records:
            skipped.update({reason: len(ids) for reason, ids in record.meta["skipped"].items()})
        totals = {"rows": num_rows(records), "bytes": sum(r.bytes for r in records), "skipped": dict(skipped)}
        totals["split"] = sum(record.meta.get("split", 0) for record in records)
        self.artifact.commit({**summary, **totals}, files=[name for name in files if self.store.exists(name)])


def write_rows(
    path: str | os.PathLike[str] | Store,
    rows: Callable[[int, int], Mapping[str, torch.Tensor]],
    *,
    num_rows: int,
    codec: str = "float32",
    factors: Mapping[str, Factors] | None = None,
    shard_rows: int = 4096,
) -> None:
    """Write an index of rows that were made elsewhere; it has no catalog, and loss and tokens of 0.

    Args:
        rows: (lo, hi) -> block -> rows lo to hi [hi - lo, K] float32; called once a shard, all that is held,
            and once for the widths.
        codec: how rows are stored, such as `bfloat16` or `rank:4:int8`.
        factors: block -> (a, b), of those whose rows are a x b matrices, flat with the a side first. Others have none.

    Raises SpecError for an unknown codec or factors that do not fit, NumericsError for rows that are not finite.
    """
    import torch

    from .coding import encode

    chosen = Codec.parse(codec)
    layout = [_entry(key, part.shape[1], chosen, (factors or {}).get(key)) for key, part in rows(0, 1).items()]
    spec = {
        "model": {"fingerprint": "none"}, "data": "none", "task": {}, "layout": layout, "compress": "id", "seed": 0,
        "rng": 1, "rows": str(chosen), "numerics": {"dtype": "float32", "matmul": "highest"},
    }  # fmt: skip
    writer = IndexWriter.open(path, spec, notes={"shard_rows": shard_rows})
    for chunk in writer.pending(num_rows):
        dense = {key: part.float() for key, part in rows(chunk.lo, chunk.hi).items()}
        lengths = torch.stack([torch.linalg.vector_norm(p, dim=1, dtype=torch.float64) for p in dense.values()])
        none = torch.zeros(chunk.hi - chunk.lo)
        stored, captured = dense, None
        if not writer.layout.is_plain:
            coded = [encode(chosen, part, writer.layout.factors[key], key=key) for key, part in dense.items()]
            stored = {name: tensor for one in coded for name, tensor in one.tensors.items()}
            captured = torch.stack([one.captured for one in coded], dim=1) if writer.layout.has_captured else None
        writer.write(
            chunk, stored, loss=none, norm=torch.linalg.vector_norm(lengths, dim=0).float(), tokens=none,
            dtype=str(chosen), skipped={}, captured=captured,
        )  # fmt: skip
    writer.commit({})


def _entry(key: str, width: int, codec: Codec, factors: Factors | None) -> dict[str, Any]:
    a, b = factors or (1, width)
    return with_factors({"block": key, "kind": "linear", "in": a, "out": b, "width": width}, codec, factors)


def _checked(
    name: str, values: torch.Tensor, shape: tuple[int, ...], dtype: str, lo: int, *, cast: bool = True
) -> torch.Tensor:
    """The values as they will be stored; MismatchError for another shape, NumericsError for what is not finite."""
    import torch

    kind = getattr(torch, dtype)
    if tuple(values.shape) != shape:
        raise MismatchError(f"block {name!r}: expected rows of shape {shape}, got {tuple(values.shape)}")
    if not cast and values.dtype != kind:
        raise MismatchError(f"block {name!r}: expected coded rows of {kind}, got {values.dtype}")
    stored = values.detach().to("cpu", kind)
    finite = torch.isfinite(stored).reshape(len(stored), -1).all(dim=1)
    if not finite.all():
        row = int(finite.logical_not().nonzero()[0])
        got = values[row][torch.isfinite(stored[row].to(values.device)).logical_not()].reshape(-1)[0].item()
        raise NumericsError(
            f"block {name!r}, row {lo + row}: {got:.6g} is not finite as {kind}: "
            "look at that example, or store wider rows (float32)"
        )
    return stored

"""Learned bases: `pca` and `whiten` stages, calibrated on a sample of the training rows and kept with the index.

The sample is drawn by the seed, its moments are added up in passes whose memory is bounded, and the matrices become an
artifact of kind "bases" under INDEX/bases/, one payload a block, so that a killed calibration resumes; a query reads
them from there. Of a stage that shares its size among the blocks their eigenvalues come first, from which all sizes
follow. Not here: the moments (moments.py), the maps (maps.py), the sizes (sharing.py), what an index is (rowstore.py).
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from influent.artifact import Artifact, ArtifactWriter, content
from influent.collect import inputs_of, pack
from influent.compress import Stage
from influent.errors import CorruptError, DataError, MismatchError, NumericsError
from influent.extract import NonFinite, visit
from influent.layers import Block, Plan, device_of
from influent.moments import Moments, Sided, basis, check_widths, eigenvalues, in_groups, num_bytes
from influent.optimizer import Scale
from influent.payload import Payload
from influent.progress import Progress
from influent.rng import Stream
from influent.shardrecord import Record
from influent.sharing import Sizes, Spectrum, share
from influent.storage import Store
from influent.task import Part, Task, parts_of

KIND = "bases"
FOLDER = "bases"  # of an index
SPECTRUM = "spectrum/"  # before a block's name, of the record with its eigenvalues by side
DAMPING = 0.1  # of whiten, relative to a moment's mean eigenvalue
MEMORY = 2 * 2**30  # bytes of moments held at a time

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """The training rows that a calibration may draw from."""

    digest: str  # of the data
    n: int
    example: Callable[[Task, int], Any]
    name: Callable[[int], str]  # how to call a row in an error


@dataclass(frozen=True, eq=False)
class Bases:
    """The matrices [p, k] of every block, by side, and the digest of their bytes, which an index's spec holds."""

    matrices: dict[str, Sided]
    digest: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Calibration:
    """What learning needs to know of a model that was made ready: see attach.py.

    Args:
        facts: the digested facts of an index that its bases share (model, task, seed, ...).
        scale: what multiplies the entries of gradients before they are compressed.
        size: rows to draw, or all if there are fewer.
        memory: bytes of moments held at a time; less means more passes over the sample.
    """

    stage: Stage
    model: nn.Module
    plan: Plan
    task: Task
    facts: dict[str, Any]
    scale: Scale | None = None
    size: int = 512
    token_budget: int = 4096
    skip_nonfinite: bool = False
    memory: int = MEMORY
    damping: float = DAMPING

    def learn(self, store: Store, sample: Sample, progress: Progress | None = None) -> Bases:
        """Make what is missing of the bases in `store`, and read them.

        Raises:
            LayerError: a block is too wide; names the layer.
            NumericsError: a loss or moment is not finite; names the row or block.
            MismatchError: there are other bases already; names the first field that differs.
            DataError: no row of the sample has anything to learn from.
        """
        check_widths(self.plan, str(self.stage))
        size = min(sample.n, self.size)
        writer = ArtifactWriter.open(store, KIND, self._spec(sample, size))
        if not writer.committed:
            parts = self._parts(sample, size)
            if self.stage.shared:
                self._visit_all(writer, SPECTRUM, parts, sample, progress, self._put_spectrum)
            shared = self._shares(writer.store, writer.records)
            self._visit_all(
                writer,
                "",
                parts,
                sample,
                progress,
                lambda writer, block, moment: self._put(writer, block, moment, shared),
            )
            writer.commit({"rows": size})
        return self.load(store)

    def _visit_all(
        self,
        writer: ArtifactWriter,
        prefix: str,
        parts: list[tuple[int, Part]],
        sample: Sample,
        progress: Progress | None,
        put: Callable[[ArtifactWriter, Block, Sided], None],
    ) -> None:
        """Make the record `prefix` NAME of every block that has none, from its moments."""
        left = [block for block in self.plan.blocks if prefix + block.name not in writer.records]
        groups = list(in_groups(left, lambda block: num_bytes(block, self.stage.moments), self.memory))
        for number, group in enumerate(groups):
            log.info("learning %s: %d blocks, pass %d of %d", self.stage, len(group), number + 1, len(groups))
            moments = self._moments(group, parts, sample, _within(progress, number, len(groups), len(parts)))
            for block in group:
                put(writer, block, moments.scaled(block.name))
            del moments  # before the next are made

    def load(self, store: Store) -> Bases:
        """The bases in `store`, every byte checked.

        Raises:
            FormatError: there are no finished bases.
            CorruptError: they are damaged; names the object.
            MismatchError: they were learned with another model or for other layers.
        """
        found = Artifact.open(store, KIND)
        shared = self._shared()
        if found.spec.get("model") != shared["model"]:
            got, expected = (model.get("fingerprint") for model in (shared["model"], found.spec.get("model") or {}))
            raise MismatchError(
                f"{store}: was learned with another model: expected weights {expected}, got {got}; give --model with "
                "the one that was indexed"
            )
        for field in ("layout", "stage"):
            if found.spec.get(field) != shared[field]:
                raise MismatchError(f"{store}: was learned with another {field}; use the layers that were indexed")
        records = {record.name: record for record in found.records}
        names = [block.name for block in self.plan.blocks]
        for name in [*names, *(SPECTRUM + name for name in names if self.stage.shared)]:
            if name not in records:
                raise CorruptError(f"{found.store}/manifest.json: block {name} is missing; {_mend(found)}")
            found.check(name, mend=_mend(found))
        shared = self._shares(found.store, records)
        return Bases({b.name: self._read(found, b, shared) for b in self.plan.blocks}, content(found.records))

    def _read(self, found: Artifact, block: Block, shared: Mapping[str, Sizes]) -> Sided:
        device, held = device_of(self.model), found.tensors(block.name)
        matrices = {side: held[side].to(device) for side in held}
        for side, (p, k) in self._sizes(block, shared).items():
            if side not in matrices or tuple(matrices[side].shape) != (p, k):
                got = list(matrices[side].shape) if side in matrices else "none"
                raise CorruptError(
                    f"{found.store}: block {block.name}, {side} side: expected [{p}, {k}], got {got}; {_mend(found)}"
                )
        return matrices

    def _shares(self, store: Store, records: Mapping[str, Record]) -> dict[str, Sizes]:
        """The sizes of all blocks' sides, from their stored eigenvalues; none if the size is not shared."""
        if not self.stage.shared:
            return {}
        spectra: dict[str, Spectrum] = {}
        for block in self.plan.blocks:
            record = records[SPECTRUM + block.name]
            payload = Payload(store, record.payload, record.bytes)
            spectra[block.name] = {side: payload[side].double().numpy() for side in sorted(payload)}
        return share(spectra, self.stage.size or 0, damping=self.damping)

    def _sizes(self, block: Block, shared: Mapping[str, Sizes]) -> dict[str, tuple[int, int]]:
        """(p, k) of the sides that get a matrix: pca leaves a side that it would only turn."""
        widths = {"flat": block.width} if block.is_vector else {"in": block.in_width, "out": block.out_width}
        if self.stage.shared:
            sizes = {side: (p, shared[block.name][side]) for side, p in widths.items()}
        elif block.is_vector:
            sizes = {"flat": (block.width, self.stage.length(block.width))}
        else:
            kept = self.stage.sides(block.in_width, block.out_width)
            sizes = {side: (p, k) for (side, p), k in zip(widths.items(), kept, strict=True)}
        return {side: (p, k) for side, (p, k) in sizes.items() if self.stage.power or k < p}

    def _shared(self) -> dict[str, Any]:
        layout = [{"block": b.name, "kind": b.kind, "in": b.in_width, "out": b.out_width} for b in self.plan.blocks]
        scaled = {} if self.scale is None else {"scale": self.scale.digest}
        return {**self.facts, "layout": layout, "stage": str(self.stage), **scaled}

    def _spec(self, sample: Sample, size: int) -> dict[str, Any]:
        return {**self._shared(), "data": sample.digest, "rows": size, "damping": self.damping}

    def _parts(self, sample: Sample, size: int) -> list[tuple[int, Part]]:
        """The sample's parts; a long document's parts count as examples of their own."""
        rows = Stream(self.facts["seed"], "", "calibration", "rows").subset(sample.n, size).tolist()
        parts: list[tuple[int, Part]] = []
        for row in rows:
            example = sample.example(self.task, row)
            try:
                made = parts_of(self.task, example)
            except DataError as error:
                raise DataError(f"{sample.name(row)}: {error}") from error
            parts += [(row, part) for part in made]
        if not parts:
            raise DataError(f"none of the {size} rows drawn to learn '{self.stage}' has target tokens; draw more rows")
        return parts

    def _moments(
        self, group: list[Block], parts: list[tuple[int, Part]], sample: Sample, tell: Callable[[int], None]
    ) -> Moments:
        """One pass over the sample, for a group of blocks."""
        weights = None if self.scale is None else {block.name: self.scale.weights[block.name] for block in group}
        moments = Moments(group, self.stage.moments, device_of(self.model), weights=weights)
        names = {block.name for block in group}
        tracked = Plan(tuple(group), tuple(s for s in self.plan.sites if s.block.name in names), 0, 1)
        done = 0
        for batch in pack(parts, self.token_budget):
            self._visit(moments, tracked, batch, sample)
            done += len(batch)
            tell(done)
        if moments.num_examples == 0:
            raise NumericsError(f"the loss of every row drawn to learn '{self.stage}' is not finite")
        return moments

    def _put_spectrum(self, writer: ArtifactWriter, block: Block, scaled: Sided) -> None:
        writer.put(SPECTRUM + block.name, {side: eigenvalues(moment).cpu() for side, moment in scaled.items()})

    def _put(self, writer: ArtifactWriter, block: Block, scaled: Sided, shared: Mapping[str, Sizes]) -> None:
        made = {
            side: basis(scaled[side], k, power=self.stage.power, damping=self.damping)
            for side, (_, k) in self._sizes(block, shared).items()
        }
        captured = {side: kept for side, (_, kept) in made.items()}
        writer.put(block.name, {side: m.float() for side, (m, _) in made.items()}, {"captured": captured})

    def _visit(self, moments: Moments, tracked: Plan, batch: list[tuple[int, Part]], sample: Sample) -> None:
        inputs, shape = inputs_of(self.task, [part for _, part in batch], device_of(self.model))
        try:
            visit(self.model, tracked, moments, batch=shape, loss=lambda: self.task.loss(self.model, inputs))
        except NonFinite as error:
            moments.drop()
            bad = set(error.places)
            if not self.skip_nonfinite:
                worst = sample.name(min(batch[place][0] for place in bad))
                raise NumericsError(
                    f"the loss of {worst} is not finite; mend or remove it, use --dtype float32, or pass "
                    "--skip-nonfinite to leave it out"
                ) from None
            rest = [item for place, item in enumerate(batch) if place not in bad]
            if rest:
                self._visit(moments, tracked, rest, sample)
            return
        moments.finish(len(batch))


def _mend(found: Artifact) -> str:
    return f"delete {found.store} and index again: the same sample gives the same bases"


def _within(progress: Progress | None, number: int, passes: int, size: int) -> Callable[[int], None]:
    def tell(done: int) -> None:
        if progress is not None:
            progress("calibrate", number * size + done, passes * size)

    return tell

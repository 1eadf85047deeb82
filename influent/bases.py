"""Learned bases: `pca` and `whiten` stages, calibrated on a sample of the training rows and kept with the index.

The sample is drawn by the seed, its moments are added up in passes whose memory is bounded, and the matrices become an
artifact of kind "bases" under INDEX/bases/, one payload a block, so that a killed calibration resumes; a query reads
them from there. Not here: the moments (moments.py), the maps (maps.py), what an index is (rowstore.py).
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from influent.artifact import Artifact, ArtifactWriter, content
from influent.collect import inputs_of, pack
from influent.compress import Stage
from influent.errors import CorruptError, DataError, MismatchError, NumericsError
from influent.extract import NonFinite, visit
from influent.layers import Block, Plan, device_of
from influent.moments import Moments, Sided, basis, check_widths, in_groups, num_bytes
from influent.optimizer import Scale
from influent.progress import Progress
from influent.rng import Stream
from influent.storage import Store
from influent.task import Part, Task, parts_of

KIND = "bases"
FOLDER = "bases"  # of an index
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
            left = [block for block in self.plan.blocks if block.name not in writer.records]
            groups = list(in_groups(left, lambda block: num_bytes(block, self.stage.moments), self.memory))
            parts = self._parts(sample, size) if groups else []
            for number, group in enumerate(groups):
                log.info("learning %s: %d blocks, pass %d of %d", self.stage, len(group), number + 1, len(groups))
                self._learn(writer, group, parts, sample, _within(progress, number, len(groups), len(parts)))
            writer.commit({"rows": size})
        return self.load(store)

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
        matrices: dict[str, Sided] = {}
        for block in self.plan.blocks:
            matrices[block.name] = self._read(found, block)
        return Bases(matrices, content(found.records))

    def _read(self, found: Artifact, block: Block) -> Sided:
        if block.name not in {record.name for record in found.records}:
            raise CorruptError(f"{found.store}/manifest.json: block {block.name} is missing; {_mend(found)}")
        found.check(block.name, mend=_mend(found))
        device, held = device_of(self.model), found.tensors(block.name)
        matrices = {side: held[side].to(device) for side in held}
        for side, (p, k) in self._sizes(block).items():
            if side not in matrices or tuple(matrices[side].shape) != (p, k):
                got = list(matrices[side].shape) if side in matrices else "none"
                raise CorruptError(
                    f"{found.store}: block {block.name}, {side} side: expected [{p}, {k}], got {got}; {_mend(found)}"
                )
        return matrices

    def _sizes(self, block: Block) -> dict[str, tuple[int, int]]:
        """(p, k) of the sides that get a matrix: pca leaves a side that it would only turn."""
        if block.is_vector:
            sizes = {"flat": (block.width, self.stage.length(block.width))}
        else:
            a, b = self.stage.sides(block.in_width, block.out_width)
            sizes = {"in": (block.in_width, a), "out": (block.out_width, b)}
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

    def _learn(
        self,
        writer: ArtifactWriter,
        group: list[Block],
        parts: list[tuple[int, Part]],
        sample: Sample,
        tell: Callable[[int], None],
    ) -> None:
        """One pass over the sample, and the bases of a group of blocks."""
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
        for block in group:
            scaled = moments.scaled(block.name)
            made = {
                side: basis(scaled[side], k, power=self.stage.power, damping=self.damping)
                for side, (_, k) in self._sizes(block).items()
            }
            captured = {side: share for side, (_, share) in made.items()}
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

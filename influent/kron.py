"""K-FAC and EK-FAC fitted to a model's layers by passes over the training rows, as artifacts under `curvature/`.

A first pass sums the two factors of each block (kind "kron": their eigenvectors and eigenvalues); EK-FAC's second pass,
with labels drawn anew, takes the mean square of the gradients along them (kind "kron-corrected"). Both hold so many
blocks at a time as the memory allows and resume block by block. No damping is stored. An embedding's one-hot side is
diagonal, exactly; a vector block (a norm's) has the plain Fisher matrix of its gradient. Parts of a long document count
as examples that add up: the terms between them vanish in the true Fisher matrix. The algebra is kronecker.py's.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from influent.artifact import Artifact, ArtifactWriter, digest, finished
from influent.bind import Bound
from influent.damping import DEFAULT, Damping
from influent.errors import LayerError, NumericsError, SpecError
from influent.fitting import Health, Solver, block_rows, place
from influent.gradients import Outer, Side
from influent.gram import MEMORY, Inverse, RowSource, Vanishing
from influent.kronecker import Kronecker, Vectors, check_regular, eigen
from influent.kronname import KronName
from influent.layers import Block, device_of
from influent.moments import GRADIENT_ENTRIES, WIDEST, Moments, in_groups, num_bytes, shapes
from influent.pairs import Pairs
from influent.passes import Loss, Passes
from influent.progress import Progress
from influent.rng import Stream

FACTORS, CORRECTED = "kron", "kron-corrected"
FIT_MEMORY = 2048  # MiB

Maps = Mapping[str, Bound]

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class Fitting:
    """One fit: what it is of, the model that makes it, and how much it may hold.

    Args:
        bound: the index's own maps, used for a `compressed` name.
        memory: MiB for what is kept of the blocks; less means more passes over the rows, and the same result.
    """

    index: RowSource
    passes: Passes
    name: KronName
    bound: Maps | None = None
    memory: int = FIT_MEMORY
    progress: Progress | None = None

    def fit(self) -> "Fitted":
        """Find what an earlier fit left, or make it; killed and called again, it goes on with the next blocks.

        Raises:
            LayerError: a side is too wide for its moments; names the layer.
            SpecError: the task cannot draw labels, or a compressor that is not factorised has no compressed sides.
            NumericsError: a loss or moment is not finite; names the row or block.
        """
        self._check()
        factors = self._factors()
        corrected = self._corrected(factors) if self.name.form == "ekfac" else None
        return Fitted(factors, corrected)

    @property
    def maps(self) -> Maps | None:
        """The maps through which the sides are seen, if they are."""
        return self.bound if self.name.compressed else None

    def _bound(self, block: Block) -> Bound | None:
        return None if self.maps is None else self.maps[block.name]

    def _check(self) -> None:
        if self.memory < 1:
            raise SpecError(f"memory is {self.memory}, expected 1 MiB or more")
        for block in self.passes.plan.blocks:
            bound = self._bound(block)
            if bound is not None and bound.flat and not block.is_vector:
                raise SpecError(
                    f"curvature {str(self.name)!r} needs a compressor of two sides, such as gauss:64x64, whose row is "
                    "their product; for this one use the name without :compressed"
                )
            for side, shape in shapes(block, "kfac", bound).items():
                if len(shape) == 2 and shape[0] > WIDEST:
                    raise LayerError(
                        f"layer {block.name} has a side ({side}) {shape[0]} wide, but K-FAC holds a square matrix of "
                        f"it and takes at most {WIDEST}; --exclude it when indexing"
                    )

    def _walked(self) -> Passes:
        """The passes, over a sample of the rows if the name has a number."""
        rows, wanted = self.passes.rows, self.name.rows
        if wanted is None or wanted >= len(rows):
            return self.passes
        drawn = Stream(self.passes.seed, "", "kron", "rows").subset(len(rows), wanted).tolist()
        return replace(self.passes, rows=[rows[i] for i in drawn])

    def _loss(self, passes: Passes, purpose: str) -> Loss:
        return passes.loss if self.name.labels == "empirical" else passes.sampled(purpose)

    def _factors(self) -> Artifact:
        passes = self._walked()
        spec = {
            "statistic": FACTORS, "index": self.index.digest, "labels": self.name.labels, "rows": self.name.rows,
            "space": "compressed" if self.name.compressed else "full",
        }  # fmt: skip
        writer = ArtifactWriter.open(place(self.index, digest(spec)), FACTORS, spec)
        if writer.committed:
            return Artifact.open(writer.store, FACTORS)
        loss = self._loss(passes, "factors")
        for group, stage in self._groups(writer, lambda block: num_bytes(block, "kfac", self._bound(block)), "factors"):
            moments = Moments(group, "kfac", device_of(passes.model), bound=self.maps, masked=True)
            count = 0
            for items in passes.walk(
                moments, loss, blocks=group, before=moments.only, stage=stage, progress=self.progress
            ):
                moments.finish(0)
                count += sum(item.number == 0 for item in items)
            moments.num_examples = max(1, count)
            for block in group:
                writer.put(block.name, *_decomposed(block, moments, self._dtype))
        writer.commit({"blocks": len(writer.records), "rows": len(passes.rows)})
        return Artifact.open(writer.store, FACTORS)

    def _corrected(self, factors: Artifact) -> Artifact:
        passes = self._walked()
        spec = {"statistic": CORRECTED, "index": self.index.digest, "factors": factors.digest}
        writer = ArtifactWriter.open(place(self.index, digest(spec)), CORRECTED, spec)
        if writer.committed:
            return Artifact.open(writer.store, CORRECTED)
        loss = self._loss(passes, "eigenvalues")  # other draws than the factors', or their noise would count twice
        held = {record.name: record.bytes for record in factors.records}

        def size(block: Block) -> int:
            inner, outer = widths(block, self._bound(block))
            return held[block.name] + 8 * inner * outer

        for group, stage in self._groups(writer, size, "eigenvalues"):
            found = Eigenvalues({b.name: _sides(factors, b.name) for b in group}, group, self.maps, passes.model)
            pairs, count = Pairs(found, bound=self.maps), 0
            for items in passes.walk(pairs, loss, blocks=group, stage=stage, progress=self.progress):
                pairs.finish()
                count += sum(item.number == 0 for item in items)
            for block in group:
                values = (found.sums[block.name] / max(1, count)).cpu()
                if not bool(values.isfinite().all()):
                    raise NumericsError(f"block {block.name}: its gradients' squares are not finite; use float32")
                values = values.to(self._dtype)
                writer.put(block.name, {"values": values}, facts(values))
        writer.commit({"blocks": len(writer.records), "rows": len(passes.rows)})
        return Artifact.open(writer.store, CORRECTED)

    @property
    def _dtype(self) -> torch.dtype:
        exact = next(self.passes.model.parameters()).dtype == torch.float64
        return torch.float64 if exact else torch.float32

    def _groups(self, writer: ArtifactWriter, size: Any, what: str) -> Iterator[tuple[list[Block], str]]:
        left = [block for block in self.passes.plan.blocks if block.name not in writer.records]
        groups = list(in_groups(left, size, self.memory << 20))
        for number, group in enumerate(groups, start=1):
            log.info("%s: %s of %d blocks, pass %d of %d", self.name.basis, what, len(group), number, len(groups))
            yield group, what if len(groups) == 1 else f"{what} {number}/{len(groups)}"


def widths(block: Block, bound: Bound | None) -> tuple[int, int]:
    """[I, O] of a block's gradient, as it is or as the maps compress it."""
    if bound is None:
        return block.in_width, block.out_width
    return (bound.width, 1) if block.is_vector else (bound.in_width, bound.out_width)


def _decomposed(block: Block, moments: Moments, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The payload and facts of a block's factors."""
    tensors: dict[str, Tensor] = {}
    for side, moment in moments.scaled(block.name).items():
        vectors, values = eigen(moment)
        name = "in" if side == "flat" else side
        tensors[f"{name}.values"] = values.cpu()
        if vectors is not None:
            tensors[name] = vectors.to("cpu", dtype).contiguous()
    return tensors, facts(_product(tensors)) | {"positions": moments.num_positions[block.name]}


def facts(values: Float[Tensor, "I O"]) -> dict[str, Any]:
    """What is told of a block's eigenvalues without reading them again; `d_eff` at relative:0.1."""
    values = values.double()
    trace = float(values.sum())
    top = values.flatten().topk(min(3, values.numel())).values.tolist()
    return {"trace": trace, "size": values.numel(), "top": top, "d_eff": _alive(values, DEFAULT)}


def _alive(values: Tensor, damping: Damping) -> float:
    """sum of s / (s + lambda): how many directions the damping leaves alive."""
    amount = damping.amount(float(values.sum()), values.numel())
    return float((values / (values + amount)).nan_to_num(1.0 if amount == 0 else 0.0).sum()) if values.any() else 0.0


def _product(tensors: Mapping[str, Tensor]) -> Float[Tensor, "I O"]:
    inner = tensors["in.values"]
    outer = tensors["out.values"] if "out.values" in tensors else inner.new_ones(1)
    return inner[:, None] * outer


def _sides(factors: Artifact, key: str) -> tuple[Vectors, Vectors]:
    factors.check(key)
    held = factors.tensors(key)
    inner, outer = (held.get(side) for side in ("in", "out"))
    return inner, outer


class Eigenvalues:
    """The receiver (pairs.py) that sums (Q_A^T G Q_S)^2 over the examples, [I, O] float64 a block."""

    def __init__(
        self,
        sides: Mapping[str, tuple[Vectors, Vectors]],
        blocks: list[Block],
        bound: Maps | None,
        model: nn.Module,
    ) -> None:
        device = device_of(model)
        self.sides = {
            key: tuple(None if v is None else v.to(device) for v in both) for key, both in sides.items()
        }  # fmt: skip
        self.sums = {
            block.name: torch.zeros(
                widths(block, None if bound is None else bound[block.name]), dtype=torch.float64, device=device
            )
            for block in blocks
        }

    def add(self, block: Block, a: Float[Tensor, "B T I"], d: Side) -> None:
        inner, outer = self.sides[block.name]
        total = self.sums[block.name]
        a = a if inner is None else a @ inner.to(a.dtype)
        if not d.is_floating_point() and outer is not None:
            d = nn.functional.one_hot(d.long(), total.shape[1]).to(a.dtype)
        if not d.is_floating_point():
            _add_sparse(total, a, d)
            return
        d = d if outer is None else d @ outer.to(d.dtype)
        step = max(1, GRADIENT_ENTRIES // total.numel())
        for lo in range(0, len(a), step):
            g = Outer(a[lo : lo + step], d[lo : lo + step], *total.shape).flat()
            total += g.square_().sum(0).view_as(total)

    def add_vector(self, block: Block, g: Float[Tensor, "B K"]) -> None:
        inner, _ = self.sides[block.name]
        turned = g if inner is None else g @ inner.to(g.dtype)
        self.sums[block.name] += turned.square().sum(0)[:, None]


def _add_sparse(total: Float[Tensor, "I V"], a: Float[Tensor, "B T I"], ids: Tensor) -> None:
    """The squares of the columns that an example's ids hit; an id that comes twice is one column."""
    places = torch.arange(len(ids), device=ids.device)[:, None] * total.shape[1] + ids.long()
    unique, which = torch.unique(places, return_inverse=True)
    columns = a.new_zeros(len(unique), a.shape[2]).index_add_(0, which.flatten(), a.flatten(0, 1))
    total.index_add_(1, unique % total.shape[1], columns.square_().T.to(total.dtype))


@dataclass(frozen=True, eq=False)
class Fitted:
    """What a fit left: the factors, and for EK-FAC the corrected eigenvalues."""

    factors: Artifact
    corrected: Artifact | None

    @property
    def name(self) -> KronName:
        spec = self.factors.spec
        form = "kfac" if self.corrected is None else "ekfac"
        return KronName(form, None, spec["space"] == "compressed", spec["labels"], spec["rows"])

    @property
    def facts(self) -> dict[str, dict[str, Any]]:
        return {record.name: record.meta for record in (self.corrected or self.factors).records}

    def values(self, key: str) -> Float[Tensor, "I O"]:
        """The eigenvalues in use, without damping."""
        if self.corrected is not None:
            self.corrected.check(key)
            return self.corrected.tensors(key)["values"]
        return _product(self.factors.tensors(key))

    def inverse(self, key: str, damping: Damping) -> Inverse:
        """One block's inverse, damped.

        Raises:
            CorruptError: its payload is damaged. NumericsError: it is singular at this damping.
        """
        values = self.values(key)
        trace = self.facts[key]["trace"]
        amount = damping.amount(trace, values.numel())
        if trace == 0 and amount == 0:
            return Vanishing()
        check_regular(values, amount, block=key)
        return Kronecker(*_sides(self.factors, key), values, amount)

    def health(self, damping: Damping) -> Health:
        """Per block: `lambda`, `trace`, `d_eff`, `top` eigenvalues, and `form`, kron or zero."""
        return {key: self._health(key, damping) for key in self.facts}

    def _health(self, key: str, damping: Damping) -> dict[str, Any]:
        known = self.facts[key]
        alive = known["d_eff"] if damping == DEFAULT else _alive(self.values(key).double(), damping)
        amount = damping.amount(known["trace"], known["size"])
        form = "kron" if known["trace"] > 0 else "zero"
        return {"lambda": amount, "trace": known["trace"], "d_eff": alive, "form": form, "top": known["top"]}


class KronRows:
    """K-FAC or EK-FAC of the compressed sides: a curvature of the stored rows."""

    def __init__(self, index: RowSource, fitted: Fitted, damping: Damping, *, memory: int = MEMORY) -> None:
        self.index, self.fitted, self.damping, self.memory = index, fitted, damping, memory
        self.name = str(fitted.name.damped(damping))
        self.digest = _identity(fitted, damping)

    def solver(self, key: str) -> Solver:
        return Solver(block_rows(self.index, key, self.memory), self.fitted.inverse(key, self.damping))

    def health(self) -> Health:
        return self.fitted.health(self.damping)


class KronFull:
    """K-FAC or EK-FAC at full size: it preconditions a query's gradient before the compressor."""

    def __init__(self, fitted: Fitted, damping: Damping) -> None:
        self.fitted, self.damping = fitted, damping
        self.name = str(fitted.name.damped(damping))
        self.digest = _identity(fitted, damping)

    def inverse(self, key: str) -> Inverse:
        return self.fitted.inverse(key, self.damping)

    def precondition(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """(F + lambda I)^-1 g by block, [Q, I * O]; takes the gradients out of the dictionary as it goes.

        Raises:
            NumericsError: an answer is not finite; names the block.
        """
        solved = {}
        for key in list(gradients):
            solved[key] = self.inverse(key)(gradients.pop(key))
            if not bool(solved[key].isfinite().all()):
                raise NumericsError(f"block {key!r}: the preconditioned query is not finite: raise the damping")
        return solved

    def health(self) -> Health:
        return self.fitted.health(self.damping)

    def facts(self) -> dict[str, Any]:
        return {}


def _identity(fitted: Fitted, damping: Damping) -> str:
    corrected = None if fitted.corrected is None else fitted.corrected.digest
    return digest({"factors": fitted.factors.digest, "corrected": corrected, "damping": str(damping)})


def fits(index: RowSource) -> dict[str, Fitted]:
    """The finished fits to the present rows, by name."""
    found: dict[str, Artifact] = {}
    corrections: dict[str, Artifact] = {}
    for folder, kind in finished(index.store, "curvature/"):
        if kind in (FACTORS, CORRECTED):
            artifact = Artifact.open(folder, kind)
            if artifact.spec["index"] == index.digest:
                (found if kind == FACTORS else corrections)[artifact.spec.get("factors", artifact.digest)] = artifact
    both = [Fitted(factors, None) for factors in found.values()]
    both += [Fitted(found[key], corrected) for key, corrected in corrections.items() if key in found]
    return {str(fitted.name): fitted for fitted in both}

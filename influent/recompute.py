"""What needs the model and the training rows once more: fits of K-FAC, self-influence and scores at full size.

An index says which rows it has, its catalog holds their texts, and an attached model recomputes their gradients. Not
here: the fits themselves (kron.py, ggn.py), the passes (passes.py), what a query's gradient is (solving.py).
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from influent import curvature as curvatures
from influent import score
from influent.artifact import Artifact, ArtifactWriter, digest
from influent.attach import Attached, Run, attach, check_same
from influent.bases import Sample
from influent.catalog_part import Digest
from influent.checkpoints import instances
from influent.choosing import Choice
from influent.ensemble import Ensemble
from influent.errors import MismatchError, NumericsError, SpecError
from influent.examples import ids_and_hashes
from influent.fitting import AnyCurvature, Curvature, place
from influent.ggn import ConjugateGradients
from influent.kron import FIT_MEMORY, Fitting, KronFull, KronRows
from influent.kronecker import Kronecker
from influent.kronname import KronName
from influent.layers import device_of
from influent.live import LiveScorer, prepared, quadratics
from influent.loading import exact_device
from influent.passes import CHUNK, Passes
from influent.progress import Progress
from influent.rowstore import Index
from influent.task import Encodes, Task

SELF_ROWS = 4096  # whose self-influence is kept at a time
SELF = "self-influence-rows"


@dataclass(frozen=True, eq=False)
class Recomputed:
    """An index with its model attached, and, for a task that encodes no records, its training data."""

    index: Index
    attached: Attached
    data: Any = None

    @property
    def passes(self) -> Passes:
        """Passes over the rows that have a gradient.

        Raises:
            SpecError: the task's data is needed. MismatchError: it is not what was indexed.
        """
        collector = self.attached.collector
        if not isinstance(collector.task, Encodes):
            _check_data(self.index, self.data)
        without = {
            row
            for record in self.index.artifact.records
            for rows in record.meta["skipped"].values()
            for row in rows
        }  # fmt: skip
        return Passes(
            model=collector.model, plan=collector.plan, task=collector.task, sample=_sample(self.index, self.data),
            rows=[row for row in range(self.index.n) if row not in without], seed=self.index.spec["seed"],
            token_budget=collector.token_budget,
        )  # fmt: skip

    def settle(self, choice: Choice, *, memory: int | None = None, progress: Progress | None = None) -> AnyCurvature:
        """The curvature chosen, fitted now if it was not: from the stored rows, or through the model."""
        if choice.kron is not None:
            return self.fit(choice.kron, memory=memory, progress=progress)
        return curvatures.fit(
            self.index, curvature=choice.curvature, damping=choice.damping,
            memory=curvatures.MEMORY if memory is None else memory,
            device=exact_device(device_of(self.attached.collector.model)), progress=progress,
        )  # fmt: skip

    def fit(self, name: KronName, *, memory: int | None = None, progress: Progress | None = None) -> AnyCurvature:
        """The curvature of that name, fitted now if it was not.

        Raises:
            LayerError, SpecError, NumericsError: see `kron.Fitting.fit`.
        """
        bound, passes = self.attached.collector.bound, self.passes
        if any(each.weight is not None for each in bound.values()):
            raise SpecError(
                f"curvature {str(name)!r} is of plain gradients, and the rows of {self.index.path} are scaled by an "
                "optimizer's state: use --curvature fim, or index again without it"
            )
        if bound.keys() != {block.name for block in self.attached.collector.plan.blocks}:
            raise SpecError(
                f"curvature {str(name)!r} is fitted layer by layer, and rows of {self.index.path} are of all layers at "
                "once: use --curvature fim, or index again with a method whose rows are kept by layer"
            )
        fitted = Fitting(
            index=self.index, passes=passes, name=name.preconditioner if name.iterations else name.basis, bound=bound,
            memory=FIT_MEMORY if memory is None else memory, progress=progress,
        ).fit()  # fmt: skip
        damping = name.damping or name.default
        if name.iterations is not None:
            return ConjugateGradients(name, passes, KronFull(fitted, damping), damping, progress)
        return KronRows(self.index, fitted, damping) if name.compressed else KronFull(fitted, damping)

    def self_influence(self, curvature: AnyCurvature, *, progress: Progress | None = None) -> Float[Tensor, " N"]:
        """h_i = g_i (F + lambda I)^-1 g_i of every row's whole gradient, [N] float32.

        Of a curvature of stored rows from those (score.py). Otherwise kept some thousand rows at a time under
        `curvature/`: asked again, it is only read; killed, it resumes.

        Raises:
            SpecError: this curvature has no closed form for it. NumericsError: names the row.
        """
        if isinstance(curvature, Curvature) and self.index.codec.stored:
            return score.self_influence(self.index, curvature, progress=progress)
        measure = _measure(curvature)
        spec = {"statistic": SELF, "index": self.index.digest, "curvature": curvature.digest}
        writer = ArtifactWriter.open(place(self.index, digest(spec)), SELF, spec)
        if not writer.committed:
            passes = self.passes
            for lo in range(0, self.index.n, SELF_ROWS):
                hi, name = min(lo + SELF_ROWS, self.index.n), f"{lo:012d}"
                if name not in writer.records:
                    h = quadratics(passes, measure, lo, hi, progress)
                    _check_finite(h, lo)
                    writer.put(name, {"self_influence": h}, rows=(lo, hi))
            writer.commit({"rows": self.index.n})
        kept = Artifact.open(writer.store, SELF)
        for record in kept.records:
            kept.check(record.name)
        return torch.cat([kept.tensors(record.name)["self_influence"].clone() for record in kept.records]).float()

    def scorer(
        self,
        queries: Mapping[str, Tensor],
        *,
        normalize: str = "none",
        self_influence: Float[Tensor, " N"] | None = None,
        query_rank: int | None = None,
        rows: Collection[int] | None = None,
        progress: Progress | None = None,
    ) -> LiveScorer:
        """What scores preconditioned queries [Q, I * O] against windows of the training rows, made anew.

        `normalize` and `self_influence` as for `score.score_members`. Of `rows` other than those given no gradient is
        taken, and the score is 0.
        """
        lengths = None
        if normalize == "cosine":
            lengths = sum((q.double().square().sum(1) for q in queries.values()), torch.zeros(())).sqrt().cpu()
        passes = self.passes
        if rows is not None:
            passes = replace(passes, rows=[row for row in passes.rows if row in rows])
        return LiveScorer(
            passes, prepared(queries, self.attached.collector.plan.blocks, query_rank), lengths=lengths,
            spread=None if self_influence is None else self_influence.double().sqrt(), progress=progress,
        )  # fmt: skip


@contextmanager
def answering(
    index: Index,
    queries: Mapping[str, Tensor],
    *,
    normalize: str,
    model: str | nn.Module | None,
    task: Task | None,
    run: Run,
    progress: Progress | None = None,
) -> Iterator[score.Member]:
    """The member (score.py) of an index with these queries: its stored rows, or with its model those made anew."""
    from influent.querying import model_of

    if index.codec.stored:
        yield score.Member(index, queries)
        return
    with reattached(index, model_of(model, index), task, run) as again:
        live = again.scorer(queries, normalize=normalize, progress=progress)
        yield score.Member(index, {}, scores=live)


@contextmanager
def reattached(
    index: Index,
    model: str | nn.Module,
    task: Task | None,
    run: Run,
    data: Any = None,
) -> Iterator[Recomputed]:
    """An index with the model that it was made with.

    Raises:
        MismatchError: another model, task, or other layers; names the first thing that differs.
    """
    from influent.querying import setting_of

    with attach(model, task, setting_of(index), run, index=index.store) as attached:
        check_same(index, attached)
        yield Recomputed(index, attached, data)


def remodelled(
    opened: Ensemble, model: Any, task: Task | None, data: Any, *, token_budget: int, device: str | None
) -> Iterator[Recomputed]:
    """Each member with its model, one at a time; `model` is that of `query`."""
    from influent.querying import models_of

    run = Run(token_budget=token_budget, device=device)
    for member, each in zip(opened.members, instances(models_of(model, opened)), strict=True):
        with reattached(member, each, task, run, data) as again:
            yield again


def _sample(index: Index, data: Any) -> Sample:
    listed = index.catalog

    @lru_cache(maxsize=2)  # neighbours are asked for one after another, and a read decodes many
    def window(number: int) -> list[dict[str, Any]]:
        return listed.examples(number * CHUNK, min((number + 1) * CHUNK, listed.n))

    def example(task: Task, row: int) -> Any:
        return window(row // CHUNK)[row % CHUNK] if isinstance(task, Encodes) else data[row]

    return Sample(digest=listed.digest, n=index.n, example=example, name=lambda row: f"row {row} ({listed.where(row)})")


def _check_data(index: Index, data: Any) -> None:
    """The examples of a task without records, which the index does not keep, must be those that were indexed."""
    if data is None:
        raise SpecError(
            f"{index.path}: keeps no examples of this task: pass `data`, the training data that was indexed"
        )
    if len(data) < index.n:
        raise MismatchError(f"{index.path}: expected {index.n} training examples, got {len(data)}")
    hashes = ids_and_hashes(data, limit=index.n)
    for part in index.catalog.parts:
        found = Digest()
        for name in part.ids():
            found.add(next(hashes)[1], name)
        if found.text() != part.digest:
            last = part.first + part.n - 1
            raise MismatchError(
                f"{index.path}: the training examples {part.first} to {last} are not those that were indexed; pass the "
                "same data in the same order"
            )


def _measure(curvature: AnyCurvature) -> Callable[[str, Tensor], Tensor]:
    """g -> g (F + lambda I)^-1 g by block, every block's inverse held."""
    if isinstance(curvature, curvatures.Identity):
        return lambda key, g: g.double().square().sum(1)
    if not isinstance(curvature, KronFull):
        raise SpecError(f"curvature {curvature.name!r}: has no self-influence; use kfac or ekfac")
    inverses = {key: curvature.inverse(key) for key in curvature.fitted.facts}

    def measure(key: str, g: Tensor) -> Tensor:
        inverse = inverses[key]
        return inverse.squares(g).double() if isinstance(inverse, Kronecker) else g.new_zeros(len(g))

    return measure


def _check_finite(h: Tensor, lo: int) -> None:
    if not bool(h.isfinite().all()):
        row = lo + int((~h.isfinite()).nonzero()[0])
        raise NumericsError(f"row {row}: self-influence is not finite: raise the damping")

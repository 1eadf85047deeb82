"""The verb `mask`: gradients of a sample of training rows, and a Selective Mask learned from them block by block.

The rows are candidates and queries at once, unless there are queries of their own. A block's sample is held as formed
gradients where these are cheaper to multiply and fit, else as its two sides; as many blocks at a time as the memory
allows, in a pass over the sample each. What is finished survives an interruption. Not here: the search (selective.py),
reading a saved mask (selection.py).
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from influent.agreement import Factored, Formed, Sampled
from influent.artifact import Artifact, ArtifactWriter, content, digest
from influent.attach import Attached, Run, Setting, attach
from influent.bases import Sample
from influent.catalog import Catalog
from influent.errors import DataError, SpecError
from influent.examples import ids_and_hashes
from influent.filling import sample_of
from influent.gradients import Outer, Side
from influent.indexing import DEFAULT_LENGTH, catalogue
from influent.layers import Block, device_of
from influent.moments import check_widths, in_groups
from influent.pairs import Pairs
from influent.passes import Item, Passes
from influent.progress import Progress
from influent.querying import read_queries
from influent.rng import Stream
from influent.selection import KIND, parse_size
from influent.selective import Found, Search, search
from influent.storage import Store
from influent.task import Margins, Task

MEMORY = 2048  # MiB of sampled gradients held at a time
SCOPES = ("block", "all")
ALL = "all blocks"  # how errors and streams call a mask learned over all of them

log = logging.getLogger(__name__)


def mask(
    model: str | nn.Module,
    data: Any,
    out: str,
    *,
    size: str = "128x128",
    scope: str = "block",
    target: str = "loss",
    queries: Any = None,
    sample: int = 256,
    limit: int | None = None,
    steps: int = 200,
    rate: float = 2e-4,
    penalty: float = 0.0,
    layers: str | None = None,
    exclude: str | None = None,
    max_length: int = DEFAULT_LENGTH,
    token_budget: int = 4096,
    dtype: str = "float32",
    matmul: str = "highest",
    seed: int = 0,
    memory: int = MEMORY,
    device: str | None = None,
    task: Task | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Learn which entries of the gradients to keep (Hu et al., GraSS, NeurIPS 2025), into the directory `out`; called
    again, it resumes. The compressor `select:OUT` uses the mask.

    Args:
        size: `AxB` entries of the two sides of each layer, or `K` of its flat gradient.
        scope: `block`, a mask for each layer; or `all`, one of K entries for all layers together.
        target: whose gradients: of the `loss`, or for TRAK of the `margin`.
        queries: what to agree on, examples like the data's; by default the sampled rows themselves.
        sample: training rows, drawn by the seed. A quarter of them only judge.
        penalty: lambda, the weight of the number of entries; 0 tunes it to leave as many as are asked for.
        memory: MiB for sampled gradients; it decides nothing else.

    Returns:
        `{"path", "size", "scope", "rows", "digest", "blocks": [{"block", "kept", "held", "random", "fit", "start",
        "step"}]}`: entries kept by side; the agreement of the mask, of random ones, and of the first guess on the pairs
        held out; on those learned from; the step that was best. A block that is kept whole has none of these.

    Raises:
        SpecError, DataError, LayerError, MismatchError: see each class.
        NumericsError: a loss is not finite, or no mask was found that agrees better than random ones; names the block.
    """
    sizes = parse_size(size)
    if scope not in SCOPES:
        raise SpecError(f"scope is {scope!r}, expected {' or '.join(SCOPES)}")
    if scope == "all" and len(sizes) == 2:
        raise SpecError(f"--size {size}: a mask over all layers together is flat; give one number")
    if sample < 1 or memory < 1:
        raise SpecError(f"sample and memory are {sample} and {memory}, expected 1 or more")
    if task is not None and max_length != DEFAULT_LENGTH:
        raise SpecError("max_length belongs to the task that was passed: CausalLM(tokenizer, max_length=…)")
    how = Search(sizes=sizes, penalty=penalty, steps=steps, rate=rate)
    setting = Setting(
        compress="id", layers=layers, exclude=exclude, max_length=max_length, dtype=dtype, matmul=matmul, seed=seed,
        target=target,
    )  # fmt: skip
    asked = [] if queries is None else read_queries(queries, task)[0]
    with tempfile.TemporaryDirectory() as folder:
        listed = catalogue(data, Store(folder), task=task, limit=limit, keep="text", progress=progress)
        with attach(model, task, setting, Run(token_budget=token_budget, device=device)) as attached:
            learning = _Learning.of(attached, data, listed, asked, how, scope, sample, memory << 20)
            _learn(learning, Store(out), _spec(attached, listed, learning, asked), progress)
    return describe(Store(out))


def describe(store: Store) -> dict[str, Any]:
    """The document of a finished mask."""
    found = Artifact.open(store, KIND)
    summary, spec = found.summary, found.spec
    return {
        "path": str(store), "size": spec["size"], "scope": spec["scope"], "rows": summary["rows"],
        "digest": content(found.records), "blocks": [{"block": r.name, **r.meta} for r in found.records],
    }  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Learning:
    """The sampled items, candidates first, and how their gradients are had and used."""

    attached: Attached
    how: Search
    scope: str
    passes: Passes
    asked: Passes | None
    candidates: list[Item]
    queries: list[Item]
    memory: int

    @staticmethod
    def of(
        attached: Attached,
        data: Any,
        listed: Catalog,
        asked: Sequence[Any],
        how: Search,
        scope: str,
        sample: int,
        memory: int,
    ) -> _Learning:
        collector, seed = attached.collector, attached.identity["seed"]
        # In a random order: what is held out must be like what is learned from.
        rows = Stream(seed, "", "select", "rows").permutation(listed.n)[:sample].tolist()
        made = {"model": collector.model, "plan": collector.plan, "task": collector.task}
        first = Passes(
            **made, sample=sample_of(data, listed), rows=rows, seed=seed, token_budget=collector.token_budget
        )
        source = Sample(
            digest="", n=len(asked), example=lambda _, row: asked[row], name=lambda row: f"query {row}"
        )  # fmt: skip
        order = Stream(seed, "", "select", "queries").permutation(len(asked)).tolist()
        second = Passes(**made, sample=source, rows=order, seed=seed, token_budget=collector.token_budget)
        candidates = [item for row in rows for item in first.items(row)]
        queries = [item for row in order for item in second.items(row)]
        if not candidates:
            raise DataError(f"none of the {len(rows)} rows drawn has target tokens; raise --sample")
        return _Learning(attached, how, scope, first, second if asked else None, candidates, queries, memory)

    @property
    def blocks(self) -> tuple[Block, ...]:
        return self.attached.collector.plan.blocks

    def gather(self, blocks: Sequence[Block], positions: dict[str, int]) -> dict[str, Sampled]:
        """The sampled gradients of some blocks, candidates first, in one pass."""
        keeper = _Keeper({block.name: self._empty(block, positions[block.name]) for block in blocks})
        visitor = Pairs(keeper)
        places = {}
        for passes, items, loss in self._passes():
            for item in items:
                places[passes, item.row, item.number] = len(places)
            for batch in passes.walk(visitor, loss, blocks=blocks):
                visitor.finish()
                keeper.place(torch.tensor([places[passes, item.row, item.number] for item in batch]))
        return keeper.held

    def positions(self) -> dict[str, int]:
        """By block the positions of the longest item, found by one pass of it; 0 of a block without sides."""
        keeper = _Keeper({})
        visitor = Pairs(keeper)
        passes, items, loss = max(self._passes(), key=lambda one: max(item.part.length for item in one[1]))
        longest = max(items, key=lambda item: item.part.length)
        passes.visit(visitor, loss, [longest], passes.plan)
        visitor.finish()
        return {name: 0 if d is None else a.shape[1] for name, (a, d) in keeper.batch.items()}

    def bytes(self, block: Block, positions: int) -> int:
        """Of a block's sample."""
        entries = block.width if self._is_formed(block, positions) else positions * (block.in_width + block.out_width)
        return 4 * entries * (len(self.candidates) + len(self.queries))

    def _is_formed(self, block: Block, positions: int) -> bool:
        """Whether gradients are formed: always for a flat mask, else where a pair's product is cheaper so. Neither
        form changes a result beyond rounding."""
        if block.is_vector or len(self.how.sizes) == 1:
            return True
        formed = 4 * block.width * (len(self.candidates) + len(self.queries))
        return positions**2 * (block.in_width + block.out_width) > block.width and formed <= self.memory

    def _empty(self, block: Block, positions: int) -> Sampled:
        rows = len(self.candidates) + len(self.queries)
        if self._is_formed(block, positions):
            flat = block.is_vector or len(self.how.sizes) == 1
            return Formed(torch.zeros(rows, block.width), (block.width,) if flat else (block.in_width, block.out_width))
        sides = (torch.zeros(rows, positions, width) for width in (block.in_width, block.out_width))
        return Factored(*sides)

    def _passes(self) -> list[tuple[Passes, list[Item], Any]]:
        first, second = self.passes, self.asked
        task, model = first.task, first.model
        objective, measure = task.loss, task.measure
        if self.target == "margin" and isinstance(task, Margins):
            objective = measure = task.margin
        found: list[tuple[Passes, list[Item], Any]] = [
            (first, self.candidates, lambda inputs, items: objective(model, inputs))
        ]
        if second is not None:
            found.append((second, self.queries, lambda inputs, items: measure(model, inputs)))
        return found

    @property
    def target(self) -> str:
        return self.attached.collector.target

    @property
    def device(self) -> torch.device:
        """Where a mask is searched, one at a time."""
        return device_of(self.attached.collector.model)


class _Keeper:
    """The receiver (pairs.py) that keeps one batch, and puts it into its places of the sample."""

    def __init__(self, held: dict[str, Sampled]) -> None:
        self.held = held
        self.batch: dict[str, tuple[Tensor, Side | None]] = {}

    def add(self, block: Block, a: Float[Tensor, "B T I"], d: Side) -> None:
        self.batch[block.name] = (a, d)

    def add_vector(self, block: Block, g: Float[Tensor, "B K"]) -> None:
        self.batch[block.name] = (g, None)

    def place(self, rows: Tensor) -> None:
        """The batch's examples are these rows of the sample. A block that no batch reached stays zero there."""
        for name, (a, d) in self.batch.items():
            held = self.held[name]
            if d is None:
                assert isinstance(held, Formed)
                held.g[rows] = a.float().cpu()
            elif isinstance(held, Formed):
                inner, outer = a.shape[2], held.g.shape[1] // a.shape[2]
                held.g[rows] = Outer(a, d, inner, outer).flat().float().cpu()
            else:
                dense = d if d.is_floating_point() else nn.functional.one_hot(d.long(), held.d.shape[2]).to(a.dtype)
                held.a[rows, : a.shape[1]], held.d[rows, : a.shape[1]] = a.float().cpu(), dense.float().cpu()
        self.batch = {}


def _learn(learning: _Learning, store: Store, spec: dict[str, Any], progress: Progress | None) -> None:
    """Write the masks that are missing, then commit."""
    check_widths(learning.passes.plan, "select")
    writer = ArtifactWriter.open(store, KIND, spec)
    if writer.committed:
        return
    left = [block for block in learning.blocks if block.name not in writer.records]
    positions = learning.positions() if left else {}
    positions = {block.name: positions.get(block.name, 0) for block in learning.blocks}
    _check_memory(learning, positions)
    whole = learning.scope == "all"
    groups = [left] if whole and left else list(
        in_groups(left, lambda block: learning.bytes(block, positions[block.name]), learning.memory)
    )  # fmt: skip
    done = len(learning.blocks) - len(left)
    for group in groups:
        log.info("learning a mask of %s: %d layers of %d rows", spec["size"], len(group), len(learning.candidates))
        held = learning.gather(group, positions)
        if whole:
            _write_all(writer, learning, group, held, spec["seed"], progress)
            continue
        for block in group:
            found = _search(learning, held.pop(block.name), block, spec["seed"])
            _put(writer, block.name, _tensors(found, block), found)
            done += 1
            if progress is not None:
                progress("mask", done, len(learning.blocks))
    writer.commit({"rows": len(learning.candidates), "queries": len(learning.queries)})


def _check_memory(learning: _Learning, positions: dict[str, int]) -> None:
    sizes = {block.name: learning.bytes(block, positions[block.name]) for block in learning.blocks}
    name, most = max(sizes.items(), key=lambda item: item[1])
    if learning.scope == "all":
        name, most = ALL, sum(sizes.values())
    if most > learning.memory:
        raise SpecError(
            f"{name}: {len(learning.candidates) + len(learning.queries)} sampled gradients take {most >> 20} MiB, more "
            f"than --memory {learning.memory >> 20}; lower --sample, raise --memory, or give --size AxB"
        )


def _search(learning: _Learning, held: Sampled, block: Block, seed: int) -> Found:
    sizes = learning.how.sizes
    if block.is_vector and len(sizes) == 2:  # AxB means the flat counterpart of size A * B
        sizes = (sizes[0] * sizes[1],)
    how = replace(learning.how, sizes=sizes)
    return search(held.to(learning.device), how, seed=seed, block=block.name, queries=len(learning.queries))


def _tensors(found: Found, block: Block) -> dict[str, Tensor]:
    sides = {"in": block.in_width, "out": block.out_width}
    widths = {"flat": block.width} if len(found.kept) == 1 else sides
    pairs = zip(widths.items(), found.kept, strict=True)
    return {side: torch.arange(width) if kept is None else kept for (side, width), kept in pairs}


def _write_all(
    writer: ArtifactWriter,
    learning: _Learning,
    blocks: Sequence[Block],
    held: dict[str, Sampled],
    seed: int,
    progress: Progress | None,
) -> None:
    """One search over all blocks' gradients, end to end; its entries are written block by block."""
    formed = [each.g for each in (held[block.name] for block in blocks) if isinstance(each, Formed)]
    joined = Formed(torch.cat(formed, dim=1), (sum(block.width for block in blocks),))
    formed.clear()
    held.clear()

    def tell(step: int) -> None:
        if progress is not None:
            progress("mask", step, learning.how.steps)

    found = search(
        joined.to(learning.device), learning.how, seed=seed, block=ALL, queries=len(learning.queries), tell=tell
    )
    (kept,) = found.kept
    kept = torch.arange(joined.widths[0]) if kept is None else kept
    energy = joined.g.square().mean(dim=0).cpu()
    parts = divided(kept, [block.width for block in blocks], energy)
    named = zip((block.name for block in blocks), parts, strict=True)
    for name, part in named:
        _put(writer, name, {"flat": part}, found)


def divided(kept: Tensor, widths: Sequence[int], energy: Tensor) -> list[Tensor]:
    """What a mask over all blocks keeps of each, [k] of entries end to end into one ascending part a block.

    A block of which it keeps nothing gets its entry of most energy, in the place of the kept one of least energy whose
    block keeps another: a block without entries would have no rows, and one in some thousands is no loss.
    """
    block_of = torch.repeat_interleave(torch.arange(len(widths)), torch.tensor(widths))
    kept, counts = kept.clone(), torch.bincount(block_of[kept], minlength=len(widths))
    first = [0, *torch.tensor(widths).cumsum(0).tolist()]
    for block in (counts == 0).nonzero().flatten().tolist():
        spare = (counts[block_of[kept]] > 1).nonzero().flatten()
        if not len(spare):
            raise SpecError(
                f"mask: {len(kept)} entries over {len(widths)} layers are too few for one each; raise --size"
            )
        place = spare[energy[kept[spare]].argmin()]
        counts[block_of[kept[place]]] -= 1
        counts[block] = 1
        kept[place] = first[block] + energy[first[block] : first[block + 1]].argmax()
    kept = kept.sort().values
    return [kept[(kept >= lo) & (kept < hi)] - lo for lo, hi in zip(first, first[1:], strict=False)]


def _put(writer: ArtifactWriter, name: str, tensors: dict[str, Tensor], found: Found) -> None:
    writer.put(name, tensors, {"kept": {side: len(kept) for side, kept in tensors.items()}, **found.facts})


def _spec(attached: Attached, listed: Catalog, learning: _Learning, asked: Sequence[Any]) -> dict[str, Any]:
    """What may change a mask."""
    identity = {key: attached.identity[key] for key in ("model", "task", "seed", "rng", "numerics")}
    layout = [{"block": b.name, "kind": b.kind, "in": b.in_width, "out": b.out_width} for b in learning.blocks]
    how = learning.how
    return {
        **identity, "target": learning.target, "layout": layout, "data": listed.digest,
        "size": "x".join(map(str, how.sizes)), "scope": learning.scope, "sample": len(learning.passes.rows),
        "queries": digest([each for _, each in ids_and_hashes(asked)]) if asked else None,
        "search": {
            "penalty": how.penalty, "steps": how.steps, "rate": how.rate, "batch": how.batch,
            "warmth": list(how.warmth),
        },
    }  # fmt: skip

"""From examples to rows: parts are batched by length under a token budget, and summed back to one row an example.

The same function fills a shard and makes the gradients of queries. Memory is that of the rows asked for, as they will
be stored, plus one batch; documents in several parts are coded once their parts are summed, some at a time. Not here:
where rows are stored (rowstore.py), what a gradient is (extract.py), how it is coded (coding.py).
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import default_collate

from influent import extract, sides, whole
from influent.bind import Bound
from influent.codec import Codec, Factors
from influent.coding import encode_blocks
from influent.errors import DataError, NumericsError
from influent.layers import Plan, device_of
from influent.optimizer import AdamStep
from influent.task import Encodes, Margins, Part, Task, parts_of

HELD_BYTES = 256 * 2**20  # of float32 rows of documents in several parts, while their parts are summed
STEP_BYTES = 2**30  # of whole gradients on which an optimizer steps, and of what is made of them
COPIES = 4
PLAIN = Codec.parse("float32")

Rows = dict[str, Tensor]  # block -> [B, K]
Queue = list[tuple[int, Part]]  # parts to do, each with the place of its example


@dataclass(frozen=True, eq=False)
class Collector:
    """Everything that turns examples into rows: model (frozen), tracked layers, maps and task.

    Args:
        token_budget: a batch holds at most this many positions, padding included (at least one part).
        skip_nonfinite: give an example whose loss or gradient is not finite a zero row, instead of raising.
        target: differentiate the task's `loss` (of queries its `measure`), or for both its `margin`.
        codec: code the rows as they will be stored; `none` makes no rows and takes only the losses. None, or one that
            is just a float dtype, leaves them in float32.
        step: rows are this optimizer's steps on the gradients; a query's stay gradients.
    """

    model: nn.Module
    plan: Plan
    bound: dict[str, Bound]
    task: Task
    token_budget: int = 4096
    skip_nonfinite: bool = False
    codec: Codec | None = None
    target: str = "loss"
    step: AdamStep | None = None

    @property
    def widths(self) -> dict[str, int]:
        """Row width by block name, in the model's order."""
        return {name: bound.width for name, bound in self.bound.items()}

    @property
    def factors(self) -> dict[str, Factors | None]:
        """By block name the widths of the two mapped sides, where a row is their outer product; else None."""
        return {
            name: None if bound.flat or bound.block.is_vector else bound.factors for name, bound in self.bound.items()
        }

    def collect(
        self,
        examples: Sequence[Any],
        *,
        name: Callable[[int], str],
        query: bool = False,
        progress: Callable[[float], None] | None = None,
    ) -> "Collected":
        """Rows of `examples`, in their order.

        Args:
            name: how to call example i in an error.
            query: differentiate the task's `measure` instead of its `loss`.
            progress: told the share of parts that is done, after each batch.

        Raises:
            NumericsError: a loss or gradient is not finite; names the example (and block).
        """
        if self.step is not None and not query:
            return self._steps(self.step, examples, name, progress)
        device, widths = device_of(self.model), self.widths
        if self.codec is not None and not self.codec.stored:
            widths = {}
        codec = self.codec if self.codec is not None and (self.codec.rank or self.codec.packed) else None
        out = Collected.empty(len(examples), device, residual=self.target == "margin" and not query)
        queue = [(i, part) for i, example in enumerate(examples) for part in self._parts(example, lambda i=i: name(i))]
        counts = Counter(i for i, _ in queue)
        if without := set(range(len(examples))) - counts.keys():
            out.skipped["no target tokens"] = without
        out.num_split = sum(count > 1 for count in counts.values())
        coded = None if codec is None else _Coded.empty(codec, len(examples), self.widths, self.factors, device)
        done = 0
        for members, batches in self._groups(queue, counts, len(examples), whole=coded is None):
            held = _Held.empty(members, widths, device)
            for batch in batches:
                self._add(out, held, batch, name, query)
                done += len(batch)
                if progress is not None:
                    progress(done / len(queue))
            self._check(out, held, name, query)
            if coded is None:
                out.rows = held.rows
            else:
                coded.add(held)
        if coded is not None:
            out.rows, out.captured = coded.tensors, coded.captured
        if out.residual is not None:
            out.residual /= out.tokens.clamp(min=1)
        return out

    def _steps(
        self,
        step: AdamStep,
        examples: Sequence[Any],
        name: Callable[[int], str],
        progress: Callable[[float], None] | None,
    ) -> "Collected":
        """Rows of the optimizer's steps: whole gradients are formed, of some examples at a time, for a step is not
        linear in what tied layers and the parts of a document add up to."""
        blocks, device = self.plan.blocks, device_of(self.model)
        plain = replace(self, bound={b.name: Bound(b, (), (), ()) for b in blocks}, codec=None, step=None)
        out = Collected.empty(len(examples), device)
        coded = _Coded.empty(self.codec or PLAIN, len(examples), self.widths, self.factors, device)
        size = max(1, STEP_BYTES // (4 * COPIES * sum(block.width for block in blocks)))
        for lo in range(0, len(examples), size):
            hi = min(lo + size, len(examples))
            made = plain.collect(examples[lo:hi], name=lambda i, lo=lo: name(lo + i))
            out.take(lo, made)
            moved = {b.name: step(b.name, made.rows.pop(b.name), made.tokens) for b in blocks}
            if (joined := self.bound.get(whole.ALL)) is not None:
                rows = {whole.ALL: joined.apply(torch.cat([moved[b.name] for b in blocks], dim=1))}
            else:
                rows = {key: bound.apply(moved.pop(key)) for key, bound in self.bound.items()}
            held = _Held(list(range(lo, hi)), rows)
            self._check(out, held, name, query=False)
            coded.add(held)
            if progress is not None:
                progress(hi / len(examples))
        out.rows, out.captured = coded.tensors, coded.captured
        return out

    def _groups(
        self, queue: Queue, counts: Counter[int], n: int, *, whole: bool
    ) -> Iterator[tuple[list[int], list[Queue]]]:
        """Examples whose dense rows are held together, and their batches: all of them if `whole`, else those of one
        batch, and as many documents of several parts as HELD_BYTES allows."""
        if whole:
            yield list(range(n)), pack(queue, self.token_budget)
            return
        for batch in pack([item for item in queue if counts[item[0]] == 1], self.token_budget):
            yield [i for i, _ in batch], [batch]
        split = [i for i, count in counts.items() if count > 1]
        size = max(1, HELD_BYTES // (4 * sum(self.widths.values())))
        for first in range(0, len(split), size):
            members = split[first : first + size]
            inside = set(members)
            yield members, pack([item for item in queue if item[0] in inside], self.token_budget)

    def _parts(self, example: Any, name: Callable[[], str]) -> list[Part]:
        try:
            return parts_of(self.task, example)
        except DataError as error:
            raise DataError(f"{name()}: {error}") from error

    def _add(self, out: "Collected", held: "_Held", batch: Queue, name: Callable[[int], str], query: bool) -> None:
        parts = [part for _, part in batch]
        inputs, shape = inputs_of(self.task, parts, device_of(self.model))
        objective = self._objective(query)
        try:
            rows, losses = self._measure(held, shape, lambda: objective(self.model, inputs))
        except extract.NonFinite as error:
            bad = {batch[place][0] for place in error.places}
            if not self.skip_nonfinite:
                raise NumericsError(f"the loss of {name(min(bad))} is not finite; {_mend(query)}") from None
            out.skipped.setdefault("not finite", set()).update(bad)
            rest = [(i, part) for i, part in batch if i not in bad]
            if rest:
                self._add(out, held, rest, name, query)
            return
        where = torch.tensor([i for i, _ in batch], device=losses.device)
        held.add([i for i, _ in batch], rows)
        out.loss.index_add_(0, where, losses.float())
        targets = torch.tensor([float(part.targets) for part in parts], device=losses.device)
        out.tokens.index_add_(0, where, targets)
        if out.residual is not None and isinstance(self.task, Margins):
            with torch.no_grad():
                out.residual.index_add_(0, where, self.task.residual(self.model, inputs).float() * targets)

    def _objective(self, query: bool) -> Callable[[nn.Module, Any], Tensor]:
        if self.target == "margin":
            assert isinstance(self.task, Margins), "attach.py has checked it"
            return self.task.margin
        return self.task.measure if query else self.task.loss

    def _measure(self, held: "_Held", shape: sides.Batch, loss: Callable[[], Tensor]) -> tuple[Rows, Tensor]:
        """Rows and losses of one batch; no backward pass where no row is held."""
        if not held.rows:
            return {}, extract.losses(shape, loss)
        make = whole.gradients if whole.is_whole(self.bound) else extract.gradients
        return make(self.model, self.plan, bound=self.bound, batch=shape, loss=loss)

    def _check(self, out: "Collected", held: "_Held", name: Callable[[int], str], query: bool) -> None:
        """The second gate: every row is finite, or its example is named (or skipped)."""
        place = {i: p for p, i in enumerate(held.members)}
        skipped = {place[i] for rows in out.skipped.values() for i in rows if i in place}
        # In float64, in which no finite row's length overflows, or vanishes.
        each = {
            key: torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).square() for key, rows in held.rows.items()
        }
        squares = sum(each.values(), torch.zeros(len(held.members), dtype=torch.float64, device=out.loss.device))
        if not bool(squares.isfinite().all()):  # asked once for all blocks: an accelerator waits for each answer
            skipped |= self._not_finite(out, held, each, skipped, name, query)
        if gone := sorted(skipped):
            for values in (*held.rows.values(), squares):
                values[gone] = 0
            for values in (out.loss, out.tokens) if out.residual is None else (out.loss, out.tokens, out.residual):
                values[[held.members[p] for p in gone]] = 0
        out.norm[held.members] = squares.sqrt().to(out.norm.dtype)

    def _not_finite(
        self,
        out: "Collected",
        held: "_Held",
        squares: dict[str, Tensor],
        skipped: set[int],
        name: Callable[[int], str],
        query: bool,
    ) -> set[int]:
        """The places of rows that are not finite, and not skipped already, which are now; or an error for the first."""
        found: set[int] = set()
        for key, square in squares.items():
            bad = set((~square.isfinite()).nonzero().flatten().tolist()) - skipped - found
            if bad and not self.skip_nonfinite:
                worst = name(min(held.members[p] for p in bad))
                raise NumericsError(f"the gradient of {worst} in block {key} is not finite; {_mend(query)}")
            found |= bad
        if found:
            out.skipped.setdefault("not finite", set()).update(held.members[p] for p in found)
        return found


def _mend(query: bool) -> str:
    if query:
        return "ask about another text, or check the model's weights"
    return "mend or remove it, use --dtype float32, or pass --skip-nonfinite to give it a zero row and count it"


@dataclass(eq=False)
class Collected:
    """Rows [n, ...] by tensor name (plain rows: [n, K] by block), with loss, norm of the gradient and target tokens
    [n], and of rows cut to a rank what was kept [n, blocks]; rows in `skipped`, by reason, are 0."""

    rows: dict[str, Tensor]
    loss: Float[Tensor, " n"]
    norm: Float[Tensor, " n"]
    tokens: Float[Tensor, " n"]
    skipped: dict[str, set[int]]
    num_split: int = 0
    captured: Float[Tensor, "n blocks"] | None = None
    residual: Float[Tensor, " n"] | None = None  # of the target margin: see task.Margins

    def take(self, lo: int, some: "Collected") -> None:
        """What is known of the examples from `lo` on, but for their rows."""
        for mine, theirs in ((self.loss, some.loss), (self.norm, some.norm), (self.tokens, some.tokens)):
            mine[lo : lo + len(theirs)] = theirs
        for reason, rows in some.skipped.items():
            self.skipped.setdefault(reason, set()).update(lo + row for row in rows)
        self.num_split += some.num_split

    @staticmethod
    def empty(n: int, device: torch.device, *, residual: bool = False) -> "Collected":
        zeros = [torch.zeros(n, device=device) for _ in range(4)]
        return Collected({}, *zeros[:3], skipped={}, residual=zeros[3] if residual else None)


@dataclass(eq=False)
class _Held:
    """Dense rows, being summed, of some of the examples."""

    members: list[int]
    rows: dict[str, Float[Tensor, "n K"]]

    @staticmethod
    def empty(members: list[int], widths: dict[str, int], device: torch.device) -> "_Held":
        return _Held(members, {key: torch.zeros(len(members), width, device=device) for key, width in widths.items()})

    def add(self, examples: list[int], rows: dict[str, Tensor]) -> None:
        place = {i: p for p, i in enumerate(self.members)}
        where: dict[torch.device, Tensor] = {}  # a model may be spread over several
        for key, row in rows.items():
            if row.device not in where:
                where[row.device] = torch.tensor([place[i] for i in examples], device=row.device)
            self.rows[key].index_add_(0, where[row.device], row.to(self.rows[key].dtype))


@dataclass(eq=False)
class _Coded:
    """Coded rows of all examples, filled group by group."""

    codec: Codec
    factors: dict[str, Factors | None]
    tensors: dict[str, Tensor]
    captured: Float[Tensor, "n blocks"] | None

    @staticmethod
    def empty(
        codec: Codec, n: int, widths: dict[str, int], factors: dict[str, Factors | None], device: torch.device
    ) -> "_Coded":
        shapes = {name: what for key in widths for name, what in codec.tensors(key, widths[key], factors[key]).items()}
        tensors = {
            name: torch.zeros(n, *tail, dtype=getattr(torch, dtype), device=device)
            for name, (dtype, tail) in shapes.items()
        }
        captured = None if codec.rank is None else torch.ones(n, len(widths), device=device)
        return _Coded(codec, factors, tensors, captured)

    def add(self, held: _Held) -> None:
        place = {key: column for column, key in enumerate(held.rows)}
        members = torch.tensor(held.members, device=next(iter(held.rows.values())).device)
        for keys in self._together(held):
            coded = encode_blocks(self.codec, {key: held.rows[key] for key in keys}, self.factors[keys[0]])
            for key, block in zip(keys, coded, strict=True):
                for name, values in block.tensors.items():
                    self.tensors[name][members] = values
                if self.captured is not None:
                    self.captured[members, place[key]] = block.captured

    def _together(self, held: _Held) -> list[list[str]]:
        """Which blocks are coded at once: on an accelerator those of one shape, whose small matrices alone would leave
        it idle; on a CPU each by itself, which stays in the cache."""
        groups: dict[Any, list[str]] = {}
        for key, rows in held.rows.items():
            alike = (rows.device, rows.shape[1], self.factors[key]) if rows.is_cuda else key
            groups.setdefault(alike, []).append(key)
        return list(groups.values())


def pack(queue: Sequence[tuple[int, Part]], token_budget: int) -> list[Queue]:
    """Batches of similar length, longest first: number of parts x longest part stays within the budget."""
    batches: list[Queue] = []
    for item in sorted(queue, key=lambda item: -item[1].length):
        if batches and (len(batches[-1]) + 1) * batches[-1][0][1].length <= token_budget:
            batches[-1].append(item)
        else:
            batches.append([item])
    return batches


def inputs_of(task: Task, parts: Sequence[Part], device: torch.device) -> tuple[Any, sides.Batch]:
    """What the task's functions take as one batch, on the device, and its shape."""
    inputs = task.collate(parts) if isinstance(task, Encodes) else default_collate([part.inputs for part in parts])
    return _to(inputs, device), sides.Batch(len(parts), max(part.length for part in parts))


def _to(inputs: Any, device: torch.device) -> Any:
    if isinstance(inputs, Tensor):
        return inputs.to(device)
    if isinstance(inputs, dict):
        return {key: _to(value, device) for key, value in inputs.items()}
    if isinstance(inputs, (list, tuple)):
        return type(inputs)(_to(value, device) for value in inputs)
    raise DataError(f"a batch holds a {type(inputs).__name__}, expected tensors in tuples, lists or dicts")

"""What a step along a target does to the owner's model's predictions: labels for each word that a student reads.

With u the target's direction, the value <u, grad l(z)> of a row z is minus the sum over its target tokens y of the
slope of log p(y | what stands before it) along u. One forward-mode pass over the row (Pearlmutter's R operator, 1994;
by `torch.func.jvp`) gives the slope of every token of the vocabulary at each place, where a gradient gives one number
for the row. Kept are those of the token that is there and of others that the model draws. u and the slopes are of whole
gradients, whatever the index stores. Not here: what is learnt from them (tangent.py).
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from influent import parameters, solving, stages
from influent.attach import Attached, Run
from influent.collect import pack
from influent.errors import NumericsError, SpecError
from influent.gradients import wide
from influent.labels import draw_many
from influent.layers import device_of
from influent.progress import Progress
from influent.querying import model_of
from influent.recompute import reattached
from influent.records import content_hash
from influent.rng import Stream
from influent.rowstore import Index
from influent.solving import WHOLE, Asked
from influent.storage import Store
from influent.target import Target, direction
from influent.task import CausalLM, Part, Task

DRAWN = 64  # tokens drawn at a place
HELD = 1 << 28  # numbers of the queries' whole gradients at once
LOGITS = 1 << 22  # at once
ROWS = 64  # that are kept together

Named = Mapping[str, Tensor]


class Slopes(NamedTuple):
    """Of some rows: their numbers of target tokens [n], and for each of these, in the rows' order, the token that is
    there and those drawn, with the slopes of their log-probabilities."""

    counts: np.ndarray  # [n]
    tokens: np.ndarray  # [N, 1 + DRAWN] int32
    values: np.ndarray  # [N, 1 + DRAWN] float32


def slopes(
    index: Index,
    target: Target,
    rows: Sequence[Mapping[str, Any]],
    *,
    normalize: str,
    seed: int,
    model: str | nn.Module | None,
    task: Task | None,
    run: Run,
    store: Store,
    progress: Progress | None = None,
) -> Slopes:
    """The slopes at the owner's model of some rows; what was made before is read from `store`.

    Raises:
        SpecError: the rows are steps of an optimizer, or the model's attention has no forward-mode derivative.
        MismatchError: the model is not the one that was indexed. NumericsError: names the row.
    """
    if "scale" in index.spec:
        raise SpecError(
            f"{index.path}: its rows are scaled by an optimizer's state, and the rung tangent is of plain gradients: "
            "leave it out, or index without --optimizer"
        )
    spec = {
        "index": index.digest, "target": target.digest, "normalize": normalize, "seed": seed, "drawn": DRAWN,
        "rows": [content_hash(dict(row)) for row in rows],
    }  # fmt: skip
    with ExitStack() as stack:
        made: list[tuple[Attached, Named]] = []  # the model and the target's direction, once they are needed

        def label(lo: int, hi: int) -> dict[str, np.ndarray]:
            if not made:
                again = stack.enter_context(reattached(index, model_of(model, index), task, run))
                made.append((again.attached, whole_direction(again.attached, target, normalize, progress)))
            attached, along = made[0]
            lm, wanted = attached.collector.model, attached.collector.task
            assert isinstance(wanted, CausalLM)
            found = of_rows(lm, wanted, rows[lo:hi], along, seed=seed, token_budget=run.token_budget)
            if not np.isfinite(found.values).all():
                bad = np.repeat(np.arange(lo, hi), found.counts)[~np.isfinite(found.values).all(axis=1)][0]
                raise NumericsError(f"row {bad} of those labelled: the slope of its log-probability is not finite")
            if progress is not None:
                progress("slopes", hi, len(rows))
            return found._asdict()

        return Slopes(**stages.in_pieces(store, "slopes", spec, len(rows), ROWS, label))


def whole_direction(attached: Attached, target: Target, normalize: str, progress: Progress | None = None) -> Named:
    """The target's direction as a tensor for each tracked parameter: the mean of the queries' whole gradients, of unit
    length each under `cosine`; some queries' at a time."""
    collector, n = attached.collector, len(target)
    bound = {block.name: WHOLE.bind(block, 0) for block in collector.plan.blocks}
    whole = replace(attached, collector=replace(collector, bound=bound, codec=None, step=None))
    size = max(1, HELD // sum(block.width for block in collector.plan.blocks))
    sums: dict[str, Tensor] = {}
    for lo in range(0, n, size):
        some = target.examples[lo : lo + size]
        made = direction(solving.gradients(whole, Asked(some), progress), normalize)
        for key, mean in made.items():
            sums[key] = sums.get(key, torch.zeros(())) + mean * (len(some) / n)
    return {name: moved[0] for name, moved in parameters.to_parameters(collector.plan, sums).items()}


def of_rows(
    model: nn.Module, task: CausalLM, rows: Sequence[Mapping[str, Any]], along: Named, *, seed: int, token_budget: int
) -> Slopes:
    """The slopes of rows along a direction. Which tokens are drawn depends on a row alone."""
    queue = [(i, part) for i, row in enumerate(rows) for part in task.parts(row)]
    numbered = [(at, part) for at, (_, part) in enumerate(queue)]
    firsts = _firsts(queue, len(rows))
    counts = np.zeros(len(rows), dtype=np.int64)
    for i, part in queue:
        counts[i] += part.targets
    words = [
        Stream(seed, "tangent", "tokens", content_hash(dict(row))).uniforms(int(n) * DRAWN).reshape(-1, DRAWN)
        for row, n in zip(rows, counts.tolist(), strict=True)
    ]
    tokens: list[Tensor] = [torch.empty(0)] * len(queue)
    values = list(tokens)
    for batch in pack(numbered, max(1, min(token_budget, LOGITS // len(task.tokenizer)))):
        uniforms = [words[queue[at][0]][firsts[at] : firsts[at] + part.targets] for at, part in batch]
        drawn, found = of_parts(model, task, [part for _, part in batch], along, np.concatenate(uniforms))
        sizes = [part.targets for _, part in batch]
        for (at, _), t, r in zip(batch, drawn.split(sizes), found.split(sizes), strict=True):
            tokens[at], values[at] = t, r
    empty = torch.zeros(0, 1 + DRAWN)
    return Slopes(
        counts, torch.cat([*tokens, empty.int()]).int().numpy(), torch.cat([*values, empty]).float().numpy()
    )  # fmt: skip


def of_parts(
    model: nn.Module, task: CausalLM, parts: Sequence[Part], along: Named, uniforms: np.ndarray
) -> tuple[Int[Tensor, "n k"], Float[Tensor, "n k"]]:
    """Tokens at each target of some parts, that which is there first, and the slopes of their log-probabilities."""
    device = device_of(model)
    inputs = task.collate(parts)
    ids, labels = inputs["input_ids"].to(device), inputs["labels"].to(device)
    wanted = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    before, size = wanted != -100, len(task.tokenizer)  # more logits there may be, to fill the vocabulary up

    def predict(moved: dict[str, Tensor]) -> Tensor:
        logits = functional_call(model, moved, (), {"input_ids": ids, "use_cache": False}).logits
        return wide(logits[before]).log_softmax(-1)

    named = dict(model.named_parameters(remove_duplicate=False))
    here = {name: named[name].detach() for name in along}
    said, slope = _differentiated(predict, here, {name: moved.to(here[name]) for name, moved in along.items()})
    tokens = torch.cat([wanted[before][:, None], draw_many(said[:, :size], torch.from_numpy(uniforms))], dim=1)
    return tokens.cpu(), slope.gather(1, tokens).cpu()


def _differentiated(
    predict: Callable[[dict[str, Tensor]], Tensor], here: dict[str, Tensor], along: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # fused attention has no forward-mode derivative
            return cast(tuple[Tensor, Tensor], jvp(predict, (here,), (along,)))
    except NotImplementedError as error:
        raise SpecError(
            "the rung tangent needs forward-mode derivatives, which an operation of the owner's model does not have: "
            f"{str(error).splitlines()[0]}; load it with eager attention, or leave this rung out"
        ) from error


def _firsts(queue: Sequence[tuple[int, Part]], n: int) -> list[int]:
    """The number of targets of its row that lie before each part."""
    done, found = [0] * n, []
    for i, part in queue:
        found.append(done[i])
        done[i] += part.targets
    return found

"""The Selective Mask: which k entries of a gradient keep its inner products best (Hu et al., GraSS, NeurIPS 2025).

S* = argmax_S of the mean over queries of corr_i(<g_i, g_q>, <w g_i, w g_q>) - lambda |w|_1, with w = sigmoid(S / T) on
the entries of a gradient or on the two sides of a layer's; the k entries of largest w are kept. S begins at
N(0, 1e-4), Adam follows the gradient, T falls, so that w comes near to what is kept of it. The correlation does not
change when all w shrink alike, so that a fixed lambda holds no number of entries above 1/2: lambda = 0 means that it is
tuned at each step, so that this number falls from half of them to k. What is learned from some pairs is judged on
others: the mask with the best held-out agreement is the result, and it must beat random masks. Not here: the
agreement's value and gradient (agreement.py), gradients of a model (masking.py).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from influent.agreement import Agreement, Sampled, Weights
from influent.errors import DataError, NumericsError, SpecError
from influent.rng import Stream

DEVIATION = 0.01  # of the first S: N(0, 1e-4)
HELD = 4  # one row (and query) of so many is held out
CHECKS = 20  # times that the held-out agreement is looked at, at most
PATIENCE = 12  # checks without a better one, after which the search stops
RANDOM_MASKS = 5  # whose mean agreement must be beaten
LEAST_ROWS = 16
PATH = 0.7  # share of the steps after which a tuned lambda has k entries above 1/2
GAIN = 0.2  # largest change of its logarithm in a step

Kept = tuple[Int[Tensor, " _"] | None, ...]  # by side, ascending; None: all of it


@dataclass(frozen=True, kw_only=True, slots=True)
class Search:
    """How a mask is looked for.

    Args:
        sizes: (K,), or (A, B) for the two sides.
        penalty: lambda; 0 tunes it.
        rate: Adam's, of S.
        batch: queries of one step.
        warmth: T at the first and at the last step.
    """

    sizes: tuple[int, ...]
    penalty: float = 0.0
    steps: int = 200
    rate: float = 2e-4
    batch: int = 32
    warmth: tuple[float, float] = (0.01, 0.0005)

    def __post_init__(self) -> None:
        for name, ok, wanted in (
            ("penalty", 0 <= self.penalty < float("inf"), "0 or more"),
            ("steps", self.steps >= 1, "1 or more"),
            ("rate", 0 < self.rate < float("inf"), "more than 0"),
        ):
            if not ok:
                raise SpecError(f"mask: {name} is {getattr(self, name)}, expected {wanted}")


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """A mask, and what it is worth: agreements at the `start` and of the mask kept, on the pairs that were learned from
    and on those held out, where `random` is the mean of random masks of its size."""

    kept: Kept
    facts: dict[str, Any] = field(default_factory=dict)


def split(rows: int, queries: int) -> tuple[slice, slice, Tensor, Tensor]:
    """Candidates to learn from and held out, and queries likewise, when `queries` rows follow the candidates. Without
    any the candidates are the queries too.

    Raises:
        DataError: too few rows.
    """
    if rows < LEAST_ROWS or 0 < queries < HELD:
        raise DataError(
            f"mask: {rows} rows and {queries or rows} queries to learn from; expected at least {LEAST_ROWS} rows and "
            f"{HELD} queries: raise --sample"
        )
    fit = rows - rows // HELD
    if not queries:
        return slice(0, fit), slice(fit, rows), torch.arange(fit), torch.arange(fit, rows)
    last = rows + queries - queries // HELD
    return slice(0, fit), slice(fit, rows), torch.arange(rows, last), torch.arange(last, rows + queries)


def search(
    pairs: Sampled, how: Search, *, seed: int, block: str, queries: int = 0, tell: Callable[[int], None] | None = None
) -> Found:
    """The mask of one block.

    Args:
        pairs: the candidates' gradients, followed by those of `queries` queries, if these are not the candidates.

    Raises:
        NumericsError: gradients or agreements are not finite, no pair varies, or no mask that was found agrees better
            than random ones of its size; says what to change.
    """
    sizes = tuple(min(k, width) for k, width in zip(how.sizes, pairs.widths, strict=True))
    if sizes == pairs.widths:
        return Found((None,) * len(sizes))
    fit, held, fit_queries, held_queries = split(pairs.rows - queries, queries)
    learned, judged = Agreement.of(pairs, fit_queries, fit), Agreement.of(pairs, held_queries, held)
    if not (len(learned.queries) and len(judged.queries)):
        raise NumericsError(
            f"block {block}: the gradients of the sampled rows are zero or not finite, so that nothing can be learned "
            "of it; --exclude it, raise --sample, or use --dtype float32"
        )
    random = _random(judged, sizes, seed, block)
    best, facts = _climb(learned, judged, how, sizes, seed=seed, block=block, tell=tell)
    if not facts["held"] > random:
        raise NumericsError(
            f"block {block}: the mask found agrees no better than random ones of its size on pairs held out "
            f"({facts['held']:.4f}, random {random:.4f}); raise --sample, lower --rate, raise --steps, or use "
            "mask in the place of select"
        )
    kept = tuple(None if side is None else side.cpu() for side in _chosen(best, sizes))
    return Found(kept, {**facts, "random": random})


def objective(
    agreement: Agreement,
    scores: Weights,
    *,
    penalty: tuple[float, ...],
    warmth: float,
    chosen: Int[Tensor, " b"] | None = None,
) -> tuple[float, Weights]:
    """The objective at S, and its gradient with respect to S; of all queries, or of those at the places `chosen`.

    `penalty` is lambda, one for each side.
    """
    soft = [torch.sigmoid(s / warmth) for s in scores]
    value, pulled = agreement(tuple(w.square() for w in soft), chosen)
    each = list(zip(soft, pulled, penalty, strict=True))
    slopes = tuple((2 * w * side - cost) * w * (1 - w) / warmth for w, side, cost in each)
    return value - sum(cost * float(w.sum()) for w, _, cost in each), slopes


class _Penalty:
    """Lambda of one side, tuned so that the entries above 1/2 fall in number from half of all to k, along a geometric
    path, and stay there."""

    def __init__(self, how: Search, k: int, width: int) -> None:
        self.how, self.k, self.width = how, k, width
        self.value = how.penalty if k < width else 0.0

    def tune(self, s: Float[Tensor, " p"], slope: Float[Tensor, " p"], step: int) -> None:
        """To be called after each step, with S and the slope of that step."""
        if self.how.penalty or self.k == self.width:
            return
        if step == 1:  # as large as what it is weighed against: with w near 1/2, the slope is a quarter of it over T
            self.value = float(slope.abs().mean()) * 4 * self.how.warmth[0]
        wanted = self.k * (self.width / 2 / self.k) ** max(0.0, 1 - step / (PATH * self.how.steps))
        excess = math.log(max(1, int((s > 0).sum())) / wanted)
        self.value *= math.exp(GAIN * max(-1.0, min(1.0, 4 * excess)))


def _climb(
    learned: Agreement,
    judged: Agreement,
    how: Search,
    sizes: tuple[int, ...],
    *,
    seed: int,
    block: str,
    tell: Callable[[int], None] | None,
) -> tuple[Weights, dict[str, Any]]:
    """Adam on S; the S whose mask agrees best on the pairs held out."""
    widths = learned.pairs.widths
    sides = list(zip(_names(widths), sizes, widths, strict=True))
    scores = tuple(_first(seed, block, side, k, width).to(learned.pairs.device) for side, k, width in sides)
    penalties = [_Penalty(how, k, width) for _, k, width in sides]
    adam = torch.optim.Adam(scores, lr=how.rate)
    start = value = _hard(judged, scores, sizes)
    best, at, waited = _copy(scores), 0, 0
    every = max(1, how.steps // CHECKS)
    for step in range(1, how.steps + 1):
        cooled = (step - 1) / max(1, how.steps - 1)
        now, slopes = objective(
            learned, scores, penalty=tuple(penalty.value for penalty in penalties),
            warmth=how.warmth[0] * (how.warmth[1] / how.warmth[0]) ** cooled,
            chosen=_batch(learned, how.batch, seed, block, step),
        )  # fmt: skip
        if not all(bool(slope.isfinite().all()) for slope in slopes):
            raise NumericsError(
                f"block {block}: the gradient of the objective ({now}) is not finite after {step} steps; lower --rate, "
                "use --dtype float32, or --exclude the block"
            )
        for s, slope in zip(scores, slopes, strict=True):
            s.grad = -slope  # Adam goes down
        adam.step()
        for penalty, s, slope in zip(penalties, scores, slopes, strict=True):
            penalty.tune(s, slope, step)
        if tell is not None:
            tell(step)
        if step % every and step < how.steps:
            continue
        if (now := _hard(judged, scores, sizes)) > value:
            best, value, at, waited = _copy(scores), now, step, 0
        elif (waited := waited + 1) == PATIENCE:
            break
    return best, {"fit": _hard(learned, best, sizes), "held": value, "start": start, "step": at}


def _names(widths: tuple[int, ...]) -> tuple[str, ...]:
    return ("flat",) if len(widths) == 1 else ("in", "out")


def _first(seed: int, block: str, side: str, k: int, width: int) -> Tensor:
    if k == width:  # the side is kept whole: w is 1, and its slope 0
        return torch.full((width,), torch.inf)
    return torch.from_numpy(Stream(seed, block, "select", side).normals(width)) * DEVIATION


def _copy(scores: Weights) -> Weights:
    return tuple(s.detach().clone() for s in scores)


def _batch(learned: Agreement, size: int, seed: int, block: str, step: int) -> Tensor | None:
    if size >= len(learned.queries):
        return None
    return torch.from_numpy(Stream(seed, block, "select-batch", str(step)).subset(len(learned.queries), size))


def _chosen(scores: Weights, sizes: tuple[int, ...]) -> Kept:
    """The k entries of largest S; of equal ones the first."""
    return tuple(
        None if k == len(s) else torch.argsort(s, descending=True, stable=True)[:k].sort().values
        for s, k in zip(scores, sizes, strict=True)
    )


def _mask(kept: Kept, pairs: Sampled) -> Weights:
    ones = [torch.ones(p, dtype=pairs.dtype, device=pairs.device) for p in pairs.widths]
    return tuple(
        one if places is None else torch.zeros_like(one).index_fill_(0, places.to(one.device), 1)
        for one, places in zip(ones, kept, strict=True)
    )


def _hard(agreement: Agreement, scores: Weights, sizes: tuple[int, ...]) -> float:
    """The agreement of the mask that S stands for."""
    return agreement.value(_mask(_chosen(scores, sizes), agreement.pairs))


def _random(agreement: Agreement, sizes: tuple[int, ...], seed: int, block: str) -> float:
    """The mean agreement of random masks."""
    widths, total = agreement.pairs.widths, 0.0
    for number in range(RANDOM_MASKS):
        kept = tuple(
            None if k == p else torch.from_numpy(Stream(seed, block, f"select-random-{number}", side).subset(p, k))
            for side, p, k in zip(_names(widths), widths, sizes, strict=True)
        )
        total += agreement.value(_mask(kept, agreement.pairs))
    return total / RANDOM_MASKS

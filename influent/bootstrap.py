"""The bootstrap over queries and rows: how much a group's mean value depends on which of them were drawn.

Queries are resampled with replacement; rows get independent Poisson(1) weights, which is resampling that streams
(Chamandy et al., 2012): every draw sees a row once, and no row is kept. Weights belong to (seed, draw, row), so that
the result does not depend on how rows are cut into windows. Not here: which interval is shown (providers.py).
"""

from dataclasses import dataclass
from math import exp, factorial
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from influent.rng import Stream

DRAWS = 1000
BLOCK = 1024  # rows whose weights are drawn together
_CDF = np.cumsum([exp(-1) / factorial(k) for k in range(12)])
_POISSON = torch.from_numpy(np.searchsorted(_CDF, (np.arange(1 << 16) + 0.5) / (1 << 16)).astype(np.float32))


class Draws(NamedTuple):
    """Bootstrap draws of each group's mean score over queries and rows."""

    queries: Float[Tensor, "B G"]  # queries resampled: these very rows, other queries like these
    both: Float[Tensor, "B G"]  # rows resampled too: other rows like these


class Sums(NamedTuple):
    """Of every group the sum of its rows' scores by query, and of each draw the weighted sum and the weights' sum."""

    each: Float[Tensor, "Q G"]
    sums: Float[Tensor, "B G"]
    weights: Float[Tensor, "B G"]


def query_weights(num_queries: int, draws: int, *, seed: int = 0) -> Float[Tensor, "B Q"]:
    """How often each query is drawn, as shares that sum to 1 in each draw."""
    picks = Stream(seed, "bootstrap", "queries", "flat/0").buckets(draws * num_queries, num_queries)
    counts = np.zeros((draws, num_queries), dtype=np.float32)
    np.add.at(counts, (np.repeat(np.arange(draws), num_queries), picks), 1.0)
    return torch.from_numpy(counts / num_queries)


def row_weights(block: int, draws: int, *, seed: int = 0) -> Float[Tensor, "B n"]:
    """Poisson(1) weights of rows [block * BLOCK, (block + 1) * BLOCK) in every draw, by 16 bits each."""
    words = Stream(seed, "bootstrap", "rows", f"block/{block}").words(draws * BLOCK // 4).astype("<u8")
    return _POISSON[torch.from_numpy(words.view("<u2").astype(np.int64))].view(draws, BLOCK)


@dataclass(frozen=True, eq=False)
class TwoWay:
    """A reducer (reduce.py): draws of the mean score of each group of rows.

    Args:
        labels: the group of each row, 0 to G-1.
    """

    labels: Int[Tensor, " N"]
    num_groups: int
    draws: int = DRAWS
    seed: int = 0

    def empty(self, num_queries: int) -> Sums:
        return Sums(
            torch.zeros(num_queries, self.num_groups, dtype=torch.float64),
            *(torch.zeros(self.draws, self.num_groups, dtype=torch.float64) for _ in range(2)),
        )

    def push(self, acc: Sums, ids: Int[Tensor, " n"], scores: Float[Tensor, "Q n"]) -> Sums:
        each = acc.each.index_add(1, self.labels[ids], scores.double())
        sums, weights = acc.sums.clone(), acc.weights.clone()
        shares = query_weights(len(scores), self.draws, seed=self.seed)
        for block in (ids // BLOCK).unique().tolist():
            here = ids // BLOCK == block
            drawn = row_weights(block, self.draws, seed=self.seed)[:, ids[here] % BLOCK]  # [B, n]
            groups = self.labels[ids[here]]
            sums.index_add_(1, groups, ((shares @ scores[:, here].float()) * drawn).double())
            weights.index_add_(1, groups, drawn.double())
        return Sums(each, sums, weights)

    def merge(self, a: Sums, b: Sums) -> Sums:
        return Sums(a.each + b.each, a.sums + b.sums, a.weights + b.weights)

    def result(self, acc: Sums) -> Draws:
        """A draw in which a group got no row at all takes the group's mean over its rows, under the draw's queries."""
        counts = torch.bincount(self.labels, minlength=self.num_groups).double()
        shares = query_weights(len(acc.each), self.draws, seed=self.seed).double()
        queries = shares @ acc.each / counts
        return Draws(queries, torch.where(acc.weights > 0, acc.sums / acc.weights, queries))


@dataclass(frozen=True, slots=True)
class Means:
    """A reducer: the mean over queries of each row's score, [N] float32 in the order of the row ids."""

    def empty(self, num_queries: int) -> tuple[tuple[Tensor, Tensor], ...]:
        return ()

    def push(
        self, acc: tuple[tuple[Tensor, Tensor], ...], ids: Int[Tensor, " n"], scores: Float[Tensor, "Q n"]
    ) -> tuple[tuple[Tensor, Tensor], ...]:
        return (*acc, (ids, scores.double().mean(0).float()))

    def merge(
        self, a: tuple[tuple[Tensor, Tensor], ...], b: tuple[tuple[Tensor, Tensor], ...]
    ) -> tuple[tuple[Tensor, Tensor], ...]:
        return a + b

    def result(self, acc: tuple[tuple[Tensor, Tensor], ...]) -> Float[Tensor, " N"]:
        if not acc:
            return torch.empty(0)
        ids = torch.cat([ids for ids, _ in acc])
        return torch.cat([means for _, means in acc])[ids.argsort()]

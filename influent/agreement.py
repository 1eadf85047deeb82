"""How well inner products of masked gradients agree with those of whole ones: the objective of a Selective Mask.

With weights x on the entries of a gradient, the masked inner product of rows q and i is sum_j x_j g_qj g_ij; where
weights stand on the two sides of a layer, x_(i, o) = x_i y_o. The agreement is the Pearson correlation, over candidates
i, of masked and whole inner products, in the mean over queries q (Hu et al., GraSS, NeurIPS 2025). Both it and its
gradient are had from matrix products with the sampled rows, on their device, without an autograd graph. Not here: what
is done with the gradient (selective.py), where rows come from (masking.py).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

PIECE_ENTRIES = 2**24  # numbers made at a time, beside the rows

Weights = tuple[Tensor, ...]  # [p], or [I] and [O]


@dataclass(frozen=True, eq=False)
class Formed:
    """Sampled gradients of which any two can be multiplied: queries are chosen by row, candidates are a range. Here as
    vectors; `widths` is (p,), or the two sides (I, O) with p = I * O, input-major."""

    g: Float[Tensor, "rows p"]
    widths: tuple[int, ...]

    @property
    def rows(self) -> int:
        return len(self.g)

    @property
    def dtype(self) -> torch.dtype:
        return self.g.dtype

    @property
    def device(self) -> torch.device:
        return self.g.device

    def to(self, device: torch.device) -> "Formed":
        return Formed(self.g.to(device), self.widths)

    def products(self, x: Weights, queries: Int[Tensor, " m"], candidates: slice) -> Float[Tensor, "m n"]:
        """The weighted inner products."""
        weight = x[0] if len(x) == 1 else torch.outer(*x).flatten()
        out = self.g.new_zeros(len(queries), len(range(*candidates.indices(self.rows))))
        for lo, hi in self._pieces(queries):
            out += (self.g[queries, lo:hi] * weight[lo:hi]) @ self.g[candidates, lo:hi].T
        return out

    def pull(self, x: Weights, queries: Int[Tensor, " m"], candidates: slice, slope: Float[Tensor, "m n"]) -> Weights:
        """The gradient of sum(slope * products) with respect to each of the weights."""
        flat = torch.cat(
            [
                torch.einsum("mp,mp->p", slope @ self.g[candidates, lo:hi], self.g[queries, lo:hi])
                for lo, hi in self._pieces(queries)
            ]
        )
        if len(x) == 1:
            return (flat,)
        matrix = flat.view(self.widths)
        return matrix @ x[1], x[0] @ matrix

    def _pieces(self, queries: Tensor) -> Iterator[tuple[int, int]]:
        p = self.g.shape[1]
        step = max(1, PIECE_ENTRIES // max(1, len(queries)))
        for lo in range(0, p, step):
            yield lo, min(lo + step, p)


@dataclass(frozen=True, eq=False)
class Factored:
    """Gradients sum_t a_t (x) d_t as their sides: <a (x) d, a' (x) d'> = <a, a'><d, d'>, summed over both positions.

    No gradient is formed; a pair costs T^2 (I + O) products instead of I * O.
    """

    a: Float[Tensor, "rows T I"]
    d: Float[Tensor, "rows T O"]

    @property
    def widths(self) -> tuple[int, ...]:
        return self.a.shape[2], self.d.shape[2]

    @property
    def rows(self) -> int:
        return len(self.a)

    @property
    def dtype(self) -> torch.dtype:
        return self.a.dtype

    @property
    def device(self) -> torch.device:
        return self.a.device

    def to(self, device: torch.device) -> "Factored":
        return Factored(self.a.to(device), self.d.to(device))

    def products(self, x: Weights, queries: Int[Tensor, " m"], candidates: slice) -> Float[Tensor, "m n"]:
        parts = []
        aq, dq = self.a[queries].flatten(0, 1), self.d[queries].flatten(0, 1)  # [m T, I], [m T, O]
        for a, d in self._pieces(queries, candidates):
            both = ((aq * x[0]) @ a.flatten(0, 1).T).mul_((dq * x[1]) @ d.flatten(0, 1).T)
            parts.append(both.view(len(queries), -1, len(a), a.shape[1]).sum((1, 3)))
        return torch.cat(parts, dim=1)

    def pull(self, x: Weights, queries: Int[Tensor, " m"], candidates: slice, slope: Float[Tensor, "m n"]) -> Weights:
        aq, dq = self.a[queries].flatten(0, 1), self.d[queries].flatten(0, 1)
        inner, outer, done = torch.zeros_like(x[0]), torch.zeros_like(x[1]), 0
        for a, d in self._pieces(queries, candidates):
            n, positions = a.shape[:2]
            ac, dc = a.flatten(0, 1), d.flatten(0, 1)
            spread = slope[:, done : done + n].repeat_interleave(positions, 0).repeat_interleave(positions, 1)
            by_out = ((dq * x[1]) @ dc.T).mul_(spread)
            inner += torch.einsum("mi,mi->i", by_out @ ac, aq)
            by_in = ((aq * x[0]) @ ac.T).mul_(spread)
            outer += torch.einsum("mo,mo->o", by_in @ dc, dq)
            done += n
        return inner, outer

    def _pieces(self, queries: Tensor, candidates: slice) -> Iterator[tuple[Tensor, Tensor]]:
        """The candidates, so many at a time that all pairs of positions stay within the memory for pieces."""
        a, d = self.a[candidates], self.d[candidates]
        step = max(1, PIECE_ENTRIES // max(1, len(queries) * a.shape[1] ** 2))
        for lo in range(0, len(a), step):
            yield a[lo : lo + step], d[lo : lo + step]


Sampled = Formed | Factored


@dataclass(frozen=True, eq=False)
class Agreement:
    """The agreement on some of the pairs: a call gives its value and its gradient with respect to the weights.

    Queries without variance among their whole inner products have no correlation and do not count.
    """

    pairs: Sampled
    queries: Int[Tensor, " m"]
    candidates: slice
    whole: Float[Tensor, "m n"]  # standardised: mean 0, norm 1 over the candidates that count; 0 elsewhere
    counts: Bool[Tensor, "m n"]  # a row is no candidate of its own

    @staticmethod
    def of(pairs: Sampled, queries: Int[Tensor, " m"], candidates: slice) -> "Agreement":
        queries = queries.to(pairs.device)
        ones = tuple(torch.ones(width, dtype=pairs.dtype, device=pairs.device) for width in pairs.widths)
        counts = queries[:, None] != torch.arange(*candidates.indices(pairs.rows), device=pairs.device)
        raw = torch.cat([pairs.products(ones, part, candidates) for part in queries.split(_QUERIES)]).double()
        centred, norm = _centred(raw, counts)
        varied = (norm > 0) & norm.isfinite()
        whole = torch.where(varied[:, None], centred / norm[:, None], 0.0)
        return Agreement(pairs, queries[varied], candidates, whole[varied], counts[varied])

    def __call__(self, x: Weights, chosen: Int[Tensor, " b"] | None = None) -> tuple[float, Weights]:
        """Value and gradient, of all queries or of those at the places `chosen`."""
        places = self._places() if chosen is None else chosen.to(self.queries.device)
        total, pulled = 0.0, [torch.zeros_like(side) for side in x]
        for part in places.split(_QUERIES):
            correlations, slope = self._correlate(x, part)
            total += float(correlations.sum())
            slope = (slope / len(places)).to(x[0].dtype)
            for side, more in zip(pulled, self.pairs.pull(x, self.queries[part], self.candidates, slope), strict=True):
                side += more
        return total / max(1, len(places)), tuple(pulled)

    def value(self, x: Weights) -> float:
        """The agreement alone."""
        parts = self._places().split(_QUERIES)
        return sum(float(self._correlate(x, part)[0].sum()) for part in parts) / max(1, len(self.queries))

    def _places(self) -> Int[Tensor, " m"]:
        return torch.arange(len(self.queries), device=self.queries.device)

    def _correlate(self, x: Weights, part: Tensor) -> tuple[Float[Tensor, " b"], Float[Tensor, "b n"]]:
        """Correlations of some queries, and the slope of each with respect to its masked products."""
        masked = self.pairs.products(x, self.queries[part], self.candidates).double()
        centred, norm = _centred(masked, self.counts[part])
        known = norm > 0
        unit = torch.where(known[:, None], centred / norm[:, None], 0.0)
        correlations = (unit * self.whole[part]).sum(1)
        slope = (self.whole[part] - correlations[:, None] * unit) / norm[:, None]
        return correlations, torch.where(known[:, None], slope, 0.0)


_QUERIES = 64  # whose products with all candidates are made at a time


def _centred(x: Float[Tensor, "m n"], counts: Bool[Tensor, "m n"]) -> tuple[Tensor, Tensor]:
    mean = (x * counts).sum(1, keepdim=True) / counts.sum(1, keepdim=True).clamp(min=1)
    centred = (x - mean) * counts
    return centred, torch.linalg.vector_norm(centred, dim=1)

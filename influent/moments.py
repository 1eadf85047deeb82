"""Second moments of blocks' gradients over a sample, and the bases that are made of them.

`grads` takes those of the per-example gradients G, G G^T and G^T G; `kfac` those of a layer's inputs and of its output
gradients, position by position (Martens and Grosse, ICML 2015). Either way the product of the two sides estimates
the block's Fisher matrix, so that fully whitened rows have about unit variance in every block. A vector block has one
moment, of its gradient. Not here: the sample (bases.py), and how a basis is used (maps.py).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from math import prod

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from influent.bind import Bound
from influent.errors import LayerError, NumericsError
from influent.gradients import Outer, Side
from influent.layers import Block, Plan, Site
from influent.pairs import Pairs

# A position whose output gradient is this small beside the largest of its example has none: the gradient of the first
# query of an attention layer, which has nothing to choose from, is zero but for rounding.
FAINT = 1e-5
GRADIENT_ENTRIES = 2**26  # of full gradients formed at a time
WIDEST = 2**14  # a side of this width has a moment of 2 GiB
WIDEST_EMBEDDING = 2**13

Sided = dict[str, Tensor]  # by side: "in" and "out", or "flat"


def check_widths(plan: Plan, stage: str) -> None:
    """Refuse blocks with a side too wide for a matrix of second moments.

    Raises:
        LayerError: names the layer.
    """
    for site in plan.sites:
        most = WIDEST_EMBEDDING if site.kind == "embedding" else WIDEST
        width = max(site.block.in_width, site.block.out_width)
        if width > most:
            raise LayerError(
                f"layer {site.name} has a side {width} wide, but '{stage}' can learn at most {most}; --exclude it, or "
                "use another stage such as rademacher or sjlt"
            )


def shapes(block: Block, kind: str, bound: Bound | None = None) -> dict[str, tuple[int, ...]]:
    """The shapes of a block's moments by side: of a side of one-hot vectors, with `kfac`, a diagonal."""
    if block.is_vector:
        width = block.in_width if bound is None else bound.width
        return {"flat": (width, width)}
    inner, outer = (block.in_width, block.out_width) if bound is None else (bound.in_width, bound.out_width)
    hot = kind == "kfac" and block.kind == "embedding" and not (bound and bound.outer)
    return {"in": (inner, inner), "out": (outer,) if hot else (outer, outer)}


def num_bytes(block: Block, kind: str, bound: Bound | None = None) -> int:
    """Bytes of a block's moments."""
    return sum(8 * prod(shape) for shape in shapes(block, kind, bound).values())


def in_groups(blocks: Iterable[Block], size: Callable[[Block], int], most: int) -> Iterator[list[Block]]:
    """The blocks in order, so many at a time as have `most` bytes between them; at least one."""
    group: list[Block] = []
    for block in blocks:
        if group and sum(map(size, [*group, block])) > most:
            yield group
            group = []
        group.append(block)
    if group:
        yield group


class Moments:
    """The visitor that adds up second moments [p, p] in float64; with `kfac`, of a side of one-hot vectors only their
    diagonal [p]. Call `finish` after every batch of `size` examples.

    Args:
        bound: take the moments of the sides as these maps compress them.
        weights: with `grads`, block -> [p] that multiply the entries of its gradients first.
        masked: which positions count with `kfac` is told by `only` for each batch. Otherwise those that have an output
            gradient; an example that has none but rounding is then counted or not as chance will have it.
    """

    def __init__(
        self,
        blocks: Iterable[Block],
        kind: str,
        device: torch.device,
        *,
        bound: Mapping[str, Bound] | None = None,
        masked: bool = False,
        weights: Mapping[str, Float[Tensor, " p"]] | None = None,
    ) -> None:
        self.kind, self.masked = kind, masked
        self.weights = {name: weight.to(device) for name, weight in (weights or {}).items()}
        self._mask: Tensor | None = None
        self.sums: dict[str, Sided] = {}
        for block in blocks:
            sizes = shapes(block, kind, None if bound is None else bound[block.name])
            self.sums[block.name] = {
                side: torch.zeros(shape, dtype=torch.float64, device=device) for side, shape in sizes.items()
            }
        self.num_examples = 0
        self.num_positions: Counter[str] = Counter()
        self._pairs = Pairs(self, bound=bound, whole=kind == "grads")

    def enter(self, site: Site, side: Side) -> Side:
        return self._pairs.enter(site, side)

    def leave(self, site: Site, kept: Side, d: Float[Tensor, "B T O"]) -> None:
        self._pairs.leave(site, kept, d)

    def vector(self, site: Site, gradient: Float[Tensor, "B K"]) -> None:
        self._pairs.vector(site, gradient)

    def only(self, mask: Bool[Tensor, "B T"] | None) -> None:
        """Before a batch: the positions that count, of layers that have these positions; all of other layers."""
        self._mask = mask

    def finish(self, size: int) -> None:
        """End a batch of `size` examples."""
        self._pairs.finish()
        self.num_examples += size

    def drop(self) -> None:
        """Forget a batch whose loss was not finite: there was no backward pass."""
        self._pairs.drop()

    def add(self, block: Block, a: Float[Tensor, "B T I"], d: Side) -> None:
        if self.kind == "kfac":
            live = self._counting(block, a, d)
            self._add_positions(block.name, a[live], d[live])
        else:
            self._add_gradients(block, a, d)

    def _counting(self, block: Block, a: Tensor, d: Side) -> Bool[Tensor, "B T"]:
        looked_up = block.kind == "embedding" or not d.is_floating_point()  # then `a` is the gradient: see layers.py
        if not self.masked:
            return _live(a if looked_up else d)
        fits = self._mask is not None and self._mask.shape == a.shape[:2]
        counting = self._mask if fits and self._mask is not None else a.new_ones(a.shape[:2], dtype=torch.bool)
        return counting & (a != 0).any(dim=-1) if looked_up else counting

    def add_vector(self, block: Block, g: Float[Tensor, "B K"]) -> None:
        g = g if block.name not in self.weights else g * self.weights[block.name]
        self.sums[block.name]["flat"] += g.T @ g

    def _add_positions(self, name: str, a: Tensor, d: Tensor) -> None:
        """`kfac`: positions without an output gradient, such as padding, are not handed over and do not count."""
        sums = self.sums[name]
        sums["in"] += a.T @ a
        if d.is_floating_point():
            sums["out"] += d.T @ d
        else:  # one-hot vectors
            counts = sums["out"] if sums["out"].ndim == 1 else sums["out"].diagonal()
            counts.add_(torch.bincount(d.long(), minlength=len(sums["out"])))
        self.num_positions[name] += len(a)

    def _add_gradients(self, block: Block, a: Tensor, d: Side) -> None:
        sums, step = self.sums[block.name], max(1, GRADIENT_ENTRIES // block.width)
        for lo in range(0, len(a), step):
            outer = Outer(a[lo : lo + step], d[lo : lo + step], block.in_width, block.out_width)
            flat = outer.flat() if block.name not in self.weights else outer.flat() * self.weights[block.name]
            gradient = flat.view(-1, block.in_width, block.out_width)
            rows = gradient.transpose(0, 1).flatten(1)  # [I, b * O]
            sums["in"] += rows @ rows.T
            columns = gradient.flatten(0, 1)  # [b * I, O]
            sums["out"] += columns.T @ columns

    def scaled(self, name: str) -> Sided:
        """A block's moments per example, in units in which their Kronecker product estimates its Fisher matrix.

        Raises:
            NumericsError: a moment is not finite; names the block.
        """
        sums = self.sums[name]
        for side, moment in sums.items():
            if not bool(torch.isfinite(moment).all()):
                raise NumericsError(
                    f"block {name}: the second moments of its {side} side are not finite; use --dtype float32, or "
                    "--exclude it"
                )
        if "flat" in sums:
            return {"flat": sums["flat"] / self.num_examples}
        if self.kind == "kfac":
            return {"in": sums["in"] / max(1, self.num_positions[name]), "out": sums["out"] / self.num_examples}
        root = (sums["in"].trace() * self.num_examples).sqrt().clamp(min=torch.finfo(torch.float64).tiny)
        return {"in": sums["in"] / root, "out": sums["out"] / root}  # both have the trace sum_i |G_i|^2


def _live(d: Float[Tensor, "B T O"]) -> Tensor:
    """Which positions have an output gradient, [B, T]."""
    size = torch.linalg.vector_norm(d, dim=-1)
    return size > FAINT * size.amax(dim=1, keepdim=True)


def eigenvalues(moment: Tensor) -> Float[Tensor, " p"]:
    """In falling order, none below 0; `moment` is [p, p], or a diagonal [p]."""
    values = moment.sort().values if moment.ndim == 1 else torch.linalg.eigvalsh(moment)
    return values.flip(0).clamp(min=0)


def basis(moment: Tensor, k: int, *, power: float, damping: float) -> tuple[Tensor, float]:
    """The top k eigenvectors as columns [p, k], each divided by (its eigenvalue + damping * their mean)^power, in
    float64; and the share of the trace that they capture (1 when the moment is zero). `moment` is [p, p], or a diagonal
    [p]."""
    values, vectors = torch.linalg.eigh(moment.diag() if moment.ndim == 1 else moment)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)[:, :k]
    total = float(values.sum())
    share = float(values[:k].sum()) / total if total > 0 else 1.0
    largest = vectors.abs().argmax(dim=0, keepdim=True)
    vectors = vectors * vectors.gather(0, largest).sign()  # an eigenvector has no sign of its own
    if power and total > 0:
        vectors = vectors * (values[:k] + damping * values.mean()).pow(-power)
    return vectors, share

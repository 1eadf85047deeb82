"""Second moments of blocks' gradients over a sample, and the bases that are made of them.

`grads` takes those of the per-example gradients G, G G^T and G^T G; `kfac` those of a layer's inputs and of its output
gradients, position by position (Martens and Grosse, ICML 2015). Either way the product of the two sides estimates
the block's Fisher matrix, so that fully whitened rows have about unit variance in every block. A vector block has one
moment, of its gradient. Not here: the sample (bases.py), and how a basis is used (maps.py).
"""

from collections import Counter
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from influent.errors import LayerError, NumericsError
from influent.gradients import Outer, Side
from influent.layers import Block, Plan, Site
from influent.maps import wide, with_one

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


def num_bytes(block: Block) -> int:
    """Bytes of a block's moments."""
    return 8 * (block.in_width**2 + (0 if block.is_vector else block.out_width**2))


class Moments:
    """The visitor that adds up second moments [p, p] in float64. Call `finish` after every batch of `size` examples."""

    def __init__(self, blocks: Iterable[Block], kind: str, device: torch.device) -> None:
        self.kind = kind
        self.sums: dict[str, Sided] = {}
        for block in blocks:
            widths = {"flat": block.in_width} if block.is_vector else {"in": block.in_width, "out": block.out_width}
            self.sums[block.name] = {
                side: torch.zeros(p, p, dtype=torch.float64, device=device) for side, p in widths.items()
            }
        self.num_examples = 0
        self.num_positions: Counter[str] = Counter()
        self._open: Counter[str] = Counter()  # calls of a block whose backward pass has not come
        self._calls: dict[str, tuple[Block, list[tuple[Tensor, Tensor]]]] = {}  # sides that wait for other calls
        self._vectors: dict[str, Tensor] = {}
        self._done: set[str] = set()

    def enter(self, site: Site, side: Side) -> Side:
        self._open[site.block.name] += 1
        return side

    def leave(self, site: Site, kept: Side, d: Float[Tensor, "B T O"]) -> None:
        block = site.block
        if site.kind == "embedding":
            missing = block.in_width - d.shape[-1]  # a tied head's bias column
            a, d = nn.functional.pad(wide(d), (0, missing)), kept
            live = _live(a)
        else:
            a = with_one(wide(kept)) if site.bias else wide(kept)
            d = wide(d)
            live = _live(d)
        self._open[block.name] -= 1
        if self.kind == "kfac":
            self._add_positions(block.name, a[live], d[live])
        else:
            self._hold(block, a, d)

    def vector(self, site: Site, gradient: Float[Tensor, "B K"]) -> None:
        name = site.block.name
        self._vectors[name] = self._vectors[name] + gradient if name in self._vectors else wide(gradient)

    def finish(self, size: int) -> None:
        """End a batch of `size` examples."""
        for name, gradient in self._vectors.items():
            self.sums[name]["flat"] += gradient.T @ gradient
        for name in list(self._calls):  # checkpointing enters a layer twice and leaves it once
            self._close(name)
        self.num_examples += size
        self.drop()

    def drop(self) -> None:
        """Forget a batch whose loss was not finite: there was no backward pass."""
        for held in (self._open, self._calls, self._vectors, self._done):
            held.clear()

    def _add_positions(self, name: str, a: Tensor, d: Tensor) -> None:
        """`kfac`: positions without an output gradient, such as padding, are not handed over and do not count."""
        sums = self.sums[name]
        sums["in"] += a.T @ a
        if d.is_floating_point():
            sums["out"] += d.T @ d
        else:  # one-hot vectors
            sums["out"].diagonal().add_(torch.bincount(d.long(), minlength=len(sums["out"])))
        self.num_positions[name] += len(a)

    def _hold(self, block: Block, a: Tensor, d: Tensor) -> None:
        """`grads`: a block's calls in one batch are put together, because its gradient is their sum."""
        name = block.name
        if name in self._done:
            raise LayerError(
                f"layer {name} is used again after its backward pass (gradient checkpointing of a shared layer): "
                "learn from kfac moments, or --exclude it"
            )
        if not d.is_floating_point():
            d = nn.functional.one_hot(d.long(), block.out_width).to(a.dtype)
        self._calls.setdefault(name, (block, []))[1].append((a, d))
        if self._open[name] == 0:
            self._close(name)

    def _close(self, name: str) -> None:
        block, calls = self._calls.pop(name)
        self._done.add(name)
        self._add_gradients(block, *(torch.cat(parts, dim=1) for parts in zip(*calls, strict=True)))

    def _add_gradients(self, block: Block, a: Tensor, d: Tensor) -> None:
        sums, step = self.sums[block.name], max(1, GRADIENT_ENTRIES // block.width)
        for lo in range(0, len(a), step):
            outer = Outer(a[lo : lo + step], d[lo : lo + step], block.in_width, block.out_width)
            gradient = outer.flat().view(-1, block.in_width, block.out_width)
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


def basis(moment: Float[Tensor, "p p"], k: int, *, power: float, damping: float) -> tuple[Tensor, float]:
    """The top k eigenvectors as columns [p, k], each divided by (its eigenvalue + damping * their mean)^power, in
    float64; and the share of the trace that they capture (1 when the moment is zero)."""
    values, vectors = torch.linalg.eigh(moment)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)[:, :k]
    total = float(values.sum())
    share = float(values[:k].sum()) / total if total > 0 else 1.0
    largest = vectors.abs().argmax(dim=0, keepdim=True)
    vectors = vectors * vectors.gather(0, largest).sign()  # an eigenvector has no sign of its own
    if power and total > 0:
        vectors = vectors * (values[:k] + damping * values.mean()).pow(-power)
    return vectors, share

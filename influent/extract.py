"""Hooks that turn one forward and one backward pass into per-example gradients of every tracked block.

No weight gradient is ever computed: parameters do not require grad, and the first tracked layers' outputs do. The
forward hook hands a layer's input side to the visitor, which keeps only what it needs of it; a hook on the output
tensor hands over the output side during the backward pass, and the visitor joins the two at once.
Not here: what is kept (a `Visitor`), how texts become batches (task.py, collect.py), where rows go (rowstore.py).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from influent import sides
from influent.bind import Bound
from influent.errors import LayerError, NumericsError
from influent.gradients import Flat, Outer, Side
from influent.layers import Plan, Site


@runtime_checkable
class Visitor(Protocol):
    """What is done with a block's two sides. `enter` returns what must be kept until the backward pass."""

    def enter(self, site: Site, side: Side) -> Any: ...
    def leave(self, site: Site, kept: Any, d: Float[Tensor, "B T O"]) -> None: ...
    def vector(self, site: Site, gradient: Float[Tensor, "B K"]) -> None: ...


class Rows:
    """The visitor that compresses: rows [B, K] by block, contributions of tied layers and repeated calls added."""

    def __init__(self, bound: dict[str, Bound]) -> None:
        self.bound = bound
        self.rows: dict[str, Tensor] = {}

    def enter(self, site: Site, side: Side) -> Side:
        bound = self.bound[site.block.name]
        if site.kind == "embedding":
            return bound.map_out(side)  # the ids are the output side: see layers.py
        return bound.map_in(side, bias=site.bias)

    def leave(self, site: Site, kept: Side, d: Float[Tensor, "B T O"]) -> None:
        bound = self.bound[site.block.name]
        self._add(site, bound.join(sided(bound, site, kept, d)))

    def vector(self, site: Site, gradient: Float[Tensor, "B K"]) -> None:
        self._add(site, self.bound[site.block.name].join(Flat(gradient)))

    def _add(self, site: Site, row: Tensor) -> None:
        name = site.block.name
        self.rows[name] = self.rows[name] + row if name in self.rows else row


def sided(bound: Bound, site: Site, kept: Side, d: Float[Tensor, "B T O"]) -> Outer:
    """A site's gradient from what its `enter` kept and the gradient of its output, both sides mapped."""
    if site.kind == "embedding":
        missing = site.block.in_width - d.shape[-1]  # a tied head's bias column, which the embedding has no part in
        a, d = bound.map_in(nn.functional.pad(d, (0, missing))), kept
    else:
        a, d = kept, bound.map_out(d)
    return Outer(a, d, bound.in_width, bound.out_width)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no parameter that requires grad, restored afterwards."""
    requires = [(p, p.requires_grad) for p in model.parameters()]
    training = [(m, m.training) for m in model.modules()]
    model.eval()
    for p, _ in requires:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p, flag in requires:
            p.requires_grad_(flag)
        for m, flag in training:
            m.training = flag


@contextmanager
def hooked(plan: Plan, visitor: Visitor, batch: sides.Batch) -> Iterator[set[str]]:
    """Within the context, every pass of the model reports to `visitor`; yields the names of the sites that ran."""
    ran: set[str] = set()
    handles = [
        site.module.register_forward_hook(_hook(site, visitor, batch, ran), with_kwargs=True) for site in plan.sites
    ]
    handles += [
        site.module.register_forward_pre_hook(_expand(batch), with_kwargs=True)
        for site in plan.sites
        if site.kind == "embedding"
    ]
    try:
        yield ran
    finally:
        for handle in handles:
            handle.remove()


def _expand(batch: sides.Batch):
    """Position ids are often [1, T] and broadcast; one row an example keeps their gradients apart."""

    def pre_hook(module: nn.Module, args: tuple, kwargs: dict):
        ids = _first_input(args, kwargs)
        if ids.ndim == 2 and len(ids) == 1 and batch.size > 1:
            return (ids.expand(batch.size, -1),), {}
        return None

    return pre_hook


def _hook(site: Site, visitor: Visitor, batch: sides.Batch, ran: set[str]):
    def forward_hook(module: nn.Module, args: tuple, kwargs: dict, output: Tensor):
        if not torch.is_grad_enabled():
            return None  # the first pass of reentrant checkpointing; the second one is seen
        ran.add(site.name)
        x = _first_input(args, kwargs).detach()
        if not output.requires_grad:
            # Nothing before this layer is tracked: the backward pass ends here. The clone may be changed in place.
            output = output.detach().requires_grad_().clone()
        if site.kind == "norm":
            sides.verify_norm(module, x, output.detach(), site.name)
        kept = x if site.kind == "norm" else visitor.enter(site, site.entering(x, batch))
        ids = x if site.kind == "embedding" else None

        def backward_hook(d: Tensor) -> None:
            if site.kind == "norm":
                visitor.vector(site, sides.norm_gradient(module, kept, d, batch, site.name))
            else:
                visitor.leave(site, kept, _without_padding(module, ids, site.leaving(d, batch)))

        output.register_hook(backward_hook)
        return output

    return forward_hook


def _without_padding(module: Any, ids: Tensor | None, d: Tensor) -> Tensor:
    """PyTorch gives an embedding's padding row no gradient; neither do we."""
    if ids is not None and module.padding_idx is not None:
        return d * ids.reshape(d.shape[:2]).ne(module.padding_idx).unsqueeze(-1)
    return d


def _first_input(args: tuple, kwargs: dict) -> Tensor:
    return args[0] if args else next(iter(kwargs.values()))


def visit(model: nn.Module, plan: Plan, visitor: Visitor, *, batch: sides.Batch, loss) -> Float[Tensor, " B"]:
    """One forward and one backward pass, whose blocks are handed to `visitor`. The model must be `frozen`.

    Args:
        loss: called without arguments inside the hooks; returns one scalar per example, [B].

    Returns:
        The losses [B], detached.

    Raises:
        NumericsError: a loss is not finite.
        LayerError: a tracked layer did not run, or its gradient cannot be told apart by example.
    """
    with torch.enable_grad(), hooked(plan, visitor, batch) as ran:
        found = loss()
        _check(found, batch)
        if not found.requires_grad:
            raise LayerError("the loss does not depend on any tracked layer; choose other --layers")
        found.sum().backward()
    for site in plan.sites:
        if site.name not in ran:
            raise LayerError(f"layer {site.name} was not called by the model's forward pass; --exclude it")
    return found.detach()


def losses(batch: sides.Batch, loss: Callable[[], Tensor]) -> Float[Tensor, " B"]:
    """One forward pass alone; raises as `visit` does for losses that are not finite or not one an example."""
    with torch.no_grad():
        found = loss()
    _check(found, batch)
    return found


def _check(found: Tensor, batch: sides.Batch) -> None:
    if found.shape != (batch.size,):
        raise LayerError(
            f"the task's loss has shape {tuple(found.shape)}, expected one scalar per example: ({batch.size},)"
        )
    finite = torch.isfinite(found)
    if not finite.all():
        raise NonFinite((~finite).nonzero().flatten().tolist())


def gradients(
    model: nn.Module, plan: Plan, *, bound: dict[str, Bound], batch: sides.Batch, loss
) -> tuple[dict[str, Float[Tensor, "B K"]], Float[Tensor, " B"]]:
    """Compressed per-example gradients of one batch, rows [B, K] by block name, and the losses [B]; see `visit`."""
    visitor = Rows(bound)
    losses = visit(model, plan, visitor, batch=batch, loss=loss)
    for block in plan.blocks:
        if block.name not in visitor.rows:  # called, but the loss does not depend on it
            visitor.rows[block.name] = losses.new_zeros(batch.size, bound[block.name].width).float()
    return visitor.rows, losses


class NonFinite(NumericsError):
    """Losses that are not finite, by their places in the batch; the caller knows which rows these are."""

    def __init__(self, places: list[int]) -> None:
        super().__init__(f"the loss of examples {places} of the batch is not finite")
        self.places = places

"""Many trainings of one model at once: the same steps on stacked parameters, each training with rows of its own.

Retraining on halves of the data is many small trainings of the same length, which leave an accelerator idle one by
one. Stacked, their matrix products are batched ones. A training does not depend on which others run beside it, beyond
rounding. Also how several processes divide such work. Not here: what is trained, and on which rows (ground_truth.py,
music.py).
"""

import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from influent.errors import InfluentError

WARMING = 20  # steps in which the rate rises

Losses = Callable[[nn.Module, Tensor], Tensor]  # (model, ids [b, T]) -> [b]
States = dict[str, Tensor]  # parameter -> [M, ...]


class _Mean(nn.Module):
    """The mean loss as a module's output, which `functional_call` wants."""

    def __init__(self, model: nn.Module, losses: Losses) -> None:
        super().__init__()
        self.model, self.losses = model, losses

    def forward(self, ids: Tensor) -> Tensor:
        return self.losses(self.model, ids).mean()


@torch.no_grad()
def stack(states: Sequence[dict[str, Any]], names: Sequence[str], device: torch.device) -> States:
    """The parameters of these names of several states, stacked."""
    return {name: torch.stack([state[name] for state in states]).to(device) for name in names}


def train(
    model: nn.Module,
    states: States,
    rows: Sequence[Tensor],
    losses: Losses,
    *,
    epochs: int,
    rate: float,
    batch: int,
    seeds: Sequence[int],
    after_epoch: Callable[[], None] = lambda: None,
) -> None:
    """Change each of the M states by AdamW without weight decay on its own `rows` [n, T], n alike for all.

    The rate falls linearly to zero. A seed orders the batches of its training. Products of matrices in bfloat16.
    Parameters of the model that are not in `states` are as the model has them.
    """
    objective, data = _Mean(model, losses).requires_grad_(False), torch.stack(list(rows))
    each = vmap(grad_and_value(lambda state, ids: functional_call(objective, state, (ids,))))
    adam = torch.optim.AdamW([p.requires_grad_() for p in states.values()], lr=rate, weight_decay=0, fused=True)
    rngs = [torch.Generator().manual_seed(seed) for seed in seeds]
    place, step, total = torch.arange(len(data), device=data.device)[:, None], 0, epochs * -(-data.shape[1] // batch)
    for _ in range(epochs):
        order = torch.stack([torch.randperm(data.shape[1], generator=rng) for rng in rngs]).to(data.device)
        for part in order.split(batch, dim=1):
            adam.param_groups[0]["lr"] = rate * min(1, (step + 1) / WARMING) * (1 - step / total)
            with torch.autocast(data.device.type, dtype=torch.bfloat16):
                inputs = {f"model.{name}": value.detach() for name, value in states.items()}
                gradients, _ = each(inputs, data[place, part])
            for name, value in states.items():
                value.grad = gradients[f"model.{name}"]
            adam.step()
            step += 1
        after_epoch()
    for value in states.values():
        value.grad = None
        value.requires_grad_(False)


@torch.no_grad()
def put(model: nn.Module, states: States, number: int) -> None:
    """Write one of the stacked states into the model."""
    for name, value in states.items():
        model.get_parameter(name).copy_(value[number])


def save_array(path: Path, values: np.ndarray) -> None:
    """Whole, or not at all."""
    with path.with_suffix(".part").open("wb") as file:
        np.save(file, values)
    path.with_suffix(".part").rename(path)


def share(todo: Sequence[Any], part: str) -> list[Any]:
    """What process `I/N` does of a list: every N-th entry from the I-th on, I counted from 0."""
    number, _, count = part.partition("/")
    return list(todo[int(number) :: int(count)])


def each(todo: Sequence[Any], do: Callable[[Any], Any]) -> None:
    """All of a list, whatever fails with an error of the library; then that, and status 1."""
    failed = 0
    for one in todo:
        try:
            do(one)
        except InfluentError:
            failed += 1
            traceback.print_exc()
    if failed:
        sys.exit(f"{failed} of {len(todo)} failed")

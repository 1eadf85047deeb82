"""How a small model is trained: AdamW at a rate that rises and then falls, on clipped gradients, epoch by epoch.

Every epoch's end can be kept on disk, so that a killed run goes on from there, and the epoch of the least error on what
was left out is the one that is gone back to. Nothing depends on how examples are cut into pieces, beyond rounding. Not
here: what is trained on what (tuning.py, tangent.py, imitating.py).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite
from typing import Any

import numpy as np
import torch
from safetensors.torch import load as loads
from safetensors.torch import save as saves
from torch import nn

from influent.errors import NumericsError, SpecError
from influent.progress import Progress
from influent.rng import Stream
from influent.storage import Store

CLIP = 1.0  # the length of a step's gradient at most
BEST, LAST = "best.safetensors", "last.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How a model is trained."""

    epochs: int = 8  # at most
    rate: float = 1e-4
    batch: int = 16
    patience: int = 2  # epochs without a smaller error, after which it stops
    seed: int = 0
    warm: float = 0.1  # of all steps, over which the rate rises

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "patience"):
            if getattr(self, name) < 1:
                raise SpecError(f"{name} is {getattr(self, name)}, expected 1 or more")
        if not 0 < self.rate < inf:
            raise SpecError(f"rate is {self.rate}, expected a number above 0")

    @property
    def facts(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("epochs", "rate", "batch", "patience", "seed", "warm")}


class Descent:
    """AdamW without decay; its rate rises linearly over the first of `total` steps and then falls linearly to zero."""

    def __init__(self, parameters: Iterable[nn.Parameter], recipe: Recipe, total: int) -> None:
        self.parameters, self.recipe, self.total = list(parameters), recipe, total
        self.adam = torch.optim.AdamW(self.parameters, lr=recipe.rate, weight_decay=0)

    def step(self, at: int, backward: Callable[[], None]) -> None:
        """Step number `at` on the gradients that `backward` leaves."""
        rise = (at + 1) / max(1.0, self.recipe.warm * self.total)
        for group in self.adam.param_groups:
            group["lr"] = self.recipe.rate * min(rise, 1 - at / self.total)
        self.adam.zero_grad()
        backward()
        nn.utils.clip_grad_norm_(self.parameters, CLIP)
        self.adam.step()


@dataclass(eq=False)
class Epochs:
    """A training of some parameters on some examples.

    Args:
        examples: what is trained on, by number.
        stage: what progress and errors call it.
        stream: the name of the random numbers that order the examples.
        backward: adds the gradient of a batch's mean error to the parameters'.
        error: the mean error on what was left out.
        place: the name under which the state is kept in `store`, of all that it depends on.
    """

    parameters: Mapping[str, nn.Parameter]
    recipe: Recipe
    examples: np.ndarray
    stage: str
    stream: str
    backward: Callable[[list[int]], None]
    error: Callable[[], float]
    store: Store
    place: str
    done: int = 0
    best_epoch: int = 0
    best_error: float = inf

    def run(self, progress: Progress | None) -> int:
        """Train until the epochs or the patience are over, go back to the best epoch, and say which; 0 is the start.

        Raises NumericsError when the error is no longer finite.
        """
        steps = -(-len(self.examples) // self.recipe.batch)
        descent = Descent(self.parameters.values(), self.recipe, self.recipe.epochs * steps)
        if self.store.exists(f"{self.place}.{LAST}"):
            self._restore(LAST, descent)
        else:
            self.best_error = self._checked()
            self._keep(BEST, descent)
        while self.done < self.recipe.epochs and self.done - self.best_epoch < self.recipe.patience:
            self._epoch(descent, steps, progress)
        self._restore(BEST, descent)
        return self.best_epoch

    def _epoch(self, descent: Descent, steps: int, progress: Progress | None) -> None:
        """Once through the examples; then the state is kept."""
        stream = Stream(self.recipe.seed, self.stream, "order", f"epoch/{self.done}")
        order, size = self.examples[stream.permutation(len(self.examples))], self.recipe.batch
        for step in range(steps):
            at, batch = self.done * steps + step, order[step * size : (step + 1) * size].tolist()
            descent.step(at, lambda batch=batch: self.backward(batch))
            if progress is not None:
                progress(self.stage, at + 1, descent.total)
        self.done += 1
        error = self._checked()
        if error < self.best_error:
            self.best_error, self.best_epoch = error, self.done
            self._keep(BEST, descent)
        self._keep(LAST, descent)

    def _checked(self) -> float:
        found = self.error()
        if not isfinite(found):
            raise NumericsError(f"{self.stage}: the error after epoch {self.done} is {found}: give a lower --rate")
        return found

    def _keep(self, name: str, descent: Descent) -> None:
        tensors = {key: p.detach().cpu().contiguous() for key, p in self.parameters.items()}
        for key, p in self.parameters.items():
            if name == LAST and p in descent.adam.state:
                state = descent.adam.state[p]
                tensors |= {f"{kind}/{key}": state[kind].detach().cpu() for kind in ("step", "exp_avg", "exp_avg_sq")}
        progress = torch.tensor([self.done, self.best_epoch, self.best_error], dtype=torch.float64)
        self.store.put(f"{self.place}.{name}", saves({**tensors, "progress": progress}))

    def _restore(self, name: str, descent: Descent) -> None:
        """The weights, and of the last epoch all that the next one needs."""
        tensors = loads(self.store.get(f"{self.place}.{name}"))
        with torch.no_grad():
            for key, p in self.parameters.items():
                p.copy_(tensors[key])
        if name != LAST:
            return
        for key, p in self.parameters.items():
            if f"step/{key}" in tensors:
                held: dict[str, Any] = {
                    kind: tensors[f"{kind}/{key}"].to(p.device) for kind in ("exp_avg", "exp_avg_sq")
                }
                descent.adam.state[p] = {"step": tensors[f"step/{key}"], **held}
        done, best, self.best_error = tensors["progress"].tolist()
        self.done, self.best_epoch = int(done), int(best)


def pieces(lengths: Sequence[int], batch: Sequence[int], token_budget: int) -> Iterator[list[int]]:
    """A batch's examples, of known lengths, cut so that each piece, padded, is within the budget; one at least."""
    piece: list[int] = []
    longest = 0
    for i in batch:
        longest = max(longest, lengths[i])
        if piece and (len(piece) + 1) * longest > token_budget:
            yield piece
            piece, longest = [], lengths[i]
        piece.append(i)
    if piece:
        yield piece

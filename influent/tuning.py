"""The rung `tuned`: a small causal language model that is trained, with a value head, on the labels themselves.

The head begins as the ridge regression on the frozen model's features (features.py); the model is then trained through
it on the squared error of standardised labels (first probe, then tune: Kumar et al., ICLR 2022), by AdamW without decay
or dropout, in an order that the seed alone decides. A fifth of the labels is left out of all that and says when to
stop: the epoch of the least squared error on them is kept, the start among them. Every epoch's end is kept on disk, so
that a killed run goes on from there. Not here: the other rungs (distilling.py).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load as loads
from safetensors.torch import save as saves
from torch import Tensor, nn

from influent.digests import digest
from influent.errors import NumericsError, SpecError
from influent.features import Content, LanguageModel
from influent.progress import Progress
from influent.records import content_hash
from influent.ridge import Ridge, fit
from influent.rng import Stream
from influent.storage import Store

VALIDATION = 0.2
CLIP = 1.0  # the length of a step's gradient at most
WARM = 0.1  # of all steps, over which the rate rises
AHEAD = 256  # rows whose features are made together where nothing is trained
BEST, LAST = "best.safetensors", "last.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How the model is trained."""

    epochs: int = 8  # at most
    rate: float = 1e-4
    batch: int = 16
    patience: int = 2  # epochs without a smaller error, after which it stops
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "patience"):
            if getattr(self, name) < 1:
                raise SpecError(f"{name} is {getattr(self, name)}, expected 1 or more")
        if not 0 < self.rate < float("inf"):
            raise SpecError(f"rate is {self.rate}, expected a number above 0")


class Tuned(NamedTuple):
    """A trained model's head, and what it says of the labels that were left out of its training."""

    features: LanguageModel
    ridge: Ridge
    validation: np.ndarray  # [n] bool: which of the rows were left out
    predicted: np.ndarray  # of these
    epochs: int  # after which the model is kept; 0 for the start


def tune(
    small: LanguageModel, rows: Sequence[Content], y: np.ndarray, recipe: Recipe, *, store: Store,
    progress: Progress | None = None,
) -> Tuned:  # fmt: skip
    """Train `small` (in place) and a head on rows [n] with labels y [n].

    Args:
        store: where the state after each epoch is kept; it goes on from one of the same model, rows and recipe.

    Raises:
        NumericsError: the error is no longer finite. DataError: there are too few labels.
    """
    left = Stream(recipe.seed, "tuned", "validation", "rows").permutation(len(rows))
    validation = np.zeros(len(rows), dtype=bool)
    validation[left[: max(2, round(VALIDATION * len(rows)))]] = True
    run = _Run.begin(small, rows, y, validation, recipe, store)
    run.resume()
    while run.done < recipe.epochs and run.done - run.best_epoch < recipe.patience:
        run.epoch(progress)
    run.restore(BEST)
    small.model.requires_grad_(False)
    x = _frozen(small, [rows[i] for i in np.flatnonzero(validation).tolist()])
    ridge = run.ridge()
    tuned = LanguageModel(small.model, small.task, token_budget=small.token_budget, kind="tuned", side=small.side)
    return Tuned(tuned, ridge, validation, ridge(x), run.best_epoch)


@dataclass(eq=False)
class _Run:
    """The model in training: its head, its optimizer, and how far it is."""

    small: LanguageModel
    rows: Sequence[Content]
    labels: Tensor  # [n] standardised
    validation: np.ndarray
    recipe: Recipe
    start: Ridge  # of labels as they are
    unit: tuple[float, float]  # mean and spread of the labels
    head: nn.Linear
    adam: torch.optim.AdamW
    store: Store
    place: str
    done: int = 0
    best_epoch: int = 0
    best_error: float = float("inf")

    @classmethod
    def begin(
        cls, small: LanguageModel, rows: Sequence[Content], y: np.ndarray, validation: np.ndarray, recipe: Recipe,
        store: Store,
    ) -> "_Run":  # fmt: skip
        mean, spread = float(y[~validation].mean()), float(y[~validation].std()) or 1.0
        made_of = {
            "model": small.facts["model"], "rows": [content_hash(dict(row)) for row in rows],
            "labels": y.astype(np.float64).tobytes().hex(), "epochs": recipe.epochs, "rate": recipe.rate,
            "batch": recipe.batch, "patience": recipe.patience, "seed": recipe.seed,
        }  # fmt: skip
        x = _frozen(small, rows)
        start, _ = fit(x[~validation], y[~validation])
        head = nn.Linear(x.shape[1], 1)
        with torch.no_grad():
            head.weight.copy_(torch.from_numpy(start.weights / spread)[None])
            head.bias.fill_((start.bias - mean) / spread)
        small.model.requires_grad_(True)
        adam = torch.optim.AdamW([*small.model.parameters(), *head.parameters()], lr=recipe.rate, weight_decay=0)
        run = cls(
            small, rows, torch.from_numpy((y - mean) / spread), validation, recipe, start, (mean, spread), head, adam,
            store, digest(made_of)[-16:],
        )  # fmt: skip
        run.best_error = run.error()
        return run

    def epoch(self, progress: Progress | None) -> None:
        """Once through the labels that it may see; then the state is kept."""
        trained, recipe = np.flatnonzero(~self.validation), self.recipe
        steps = -(-len(trained) // recipe.batch)
        total = recipe.epochs * steps
        order = trained[Stream(recipe.seed, "tuned", "order", f"epoch/{self.done}").permutation(len(trained))]
        for step in range(steps):
            at = self.done * steps + step
            for group in self.adam.param_groups:
                group["lr"] = recipe.rate * min((at + 1) / max(1.0, WARM * total), 1 - at / total)
            self._step(order[step * recipe.batch : (step + 1) * recipe.batch].tolist())
            if progress is not None:
                progress("fine-tune", at + 1, total)
        self.done += 1
        error = self.error()
        if error < self.best_error:
            self.best_error, self.best_epoch = error, self.done
            self._keep(BEST)
        self._keep(LAST)

    def _step(self, batch: list[int]) -> None:
        self.adam.zero_grad()
        for piece in _pieces(self.small, self.rows, batch):
            square = (self._predict([self.rows[i] for i in piece]) - self.labels[piece]).square()
            (square.sum() / len(batch)).backward()
        nn.utils.clip_grad_norm_([p for group in self.adam.param_groups for p in group["params"]], CLIP)
        self.adam.step()

    def _predict(self, rows: Sequence[Content]) -> Tensor:
        x, _ = self.small.differentiable(rows)
        mean, scale = torch.from_numpy(self.start.mean), torch.from_numpy(self.start.scale)
        return self.head(((x - mean) / scale).float())[:, 0].double()

    @torch.no_grad()
    def error(self) -> float:
        """The mean squared error on the labels that were left out."""
        out = np.flatnonzero(self.validation).tolist()
        squares = [
            (self._predict([self.rows[i] for i in piece]) - self.labels[piece]).square()
            for piece in _pieces(self.small, self.rows, out)
        ]
        found = float(torch.cat(squares).mean())
        if not np.isfinite(found):
            raise NumericsError(f"fine-tuning: the error after epoch {self.done} is {found}: give a lower --rate")
        return found

    def ridge(self) -> Ridge:
        """The head in the labels' unit."""
        mean, spread = self.unit
        weights = self.head.weight.detach()[0].double().numpy() * spread
        bias = float(self.head.bias.detach()) * spread + mean
        return Ridge(self.start.mean, self.start.scale, weights, bias, self.start.penalty)

    def resume(self) -> None:
        """Go on from the last epoch that was kept; with none, the start is the best there is."""
        if self.store.exists(f"{self.place}.{LAST}"):
            self.restore(LAST)
        else:
            self._keep(BEST)

    def _named(self) -> dict[str, nn.Parameter]:
        own = {f"model.{name}": p for name, p in self.small.model.named_parameters()}
        return own | {f"head.{name}": p for name, p in self.head.named_parameters()}

    def _keep(self, name: str) -> None:
        tensors = {key: p.detach().cpu().contiguous() for key, p in self._named().items()}
        for key, p in self._named().items():
            if name == LAST and p in self.adam.state:
                state = self.adam.state[p]
                tensors |= {f"{kind}/{key}": state[kind].detach().cpu() for kind in ("step", "exp_avg", "exp_avg_sq")}
        progress = torch.tensor([self.done, self.best_epoch, self.best_error], dtype=torch.float64)
        self.store.put(f"{self.place}.{name}", saves({**tensors, "progress": progress}))

    def restore(self, name: str) -> None:
        """The weights, and of the last epoch all that the next one needs."""
        tensors = loads(self.store.get(f"{self.place}.{name}"))
        with torch.no_grad():
            for key, p in self._named().items():
                p.copy_(tensors[key])
        if name != LAST:
            return
        for key, p in self._named().items():
            if f"step/{key}" in tensors:
                held: dict[str, Any] = {
                    kind: tensors[f"{kind}/{key}"].to(p.device) for kind in ("exp_avg", "exp_avg_sq")
                }
                self.adam.state[p] = {"step": tensors[f"step/{key}"], **held}
        done, best, self.best_error = tensors["progress"].tolist()
        self.done, self.best_epoch = int(done), int(best)


def _frozen(small: LanguageModel, rows: Sequence[Content]) -> np.ndarray:
    return np.concatenate([small(rows[lo : lo + AHEAD])[0] for lo in range(0, len(rows), AHEAD)])


def _pieces(small: LanguageModel, rows: Sequence[Content], batch: Sequence[int]) -> Iterator[list[int]]:
    """Rows whose activations are held together: the token budget's worth, one at least."""
    piece: list[int] = []
    longest = 0
    for i in batch:
        length = sum(part.length for part in small.task.parts(rows[i]))
        longest = max(longest, length)
        if piece and (len(piece) + 1) * longest > small.token_budget:
            yield piece
            piece, longest = [], length
        piece.append(i)
    if piece:
        yield piece

"""The rung `tuned`: a small causal language model that is trained, with a value head, on the labels themselves.

The head begins as the ridge regression on the frozen model's features (features.py); the model is then trained through
it on the squared error of standardised labels (first probe, then tune: Kumar et al., ICLR 2022), without dropout, in an
order that the seed alone decides. A fifth of the labels is left out of all that and says when to stop: the epoch of the
least squared error on them is kept, the start among them. Not here: how it is trained (training.py), the other rungs
(distilling.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from influent.digests import digest
from influent.features import Content, LanguageModel
from influent.progress import Progress
from influent.records import content_hash
from influent.ridge import Ridge, fit
from influent.rng import Stream
from influent.storage import Store
from influent.training import Epochs, Recipe, pieces

VALIDATION = 0.2
AHEAD = 256  # rows whose features are made together where nothing is trained


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
    validation = left_out(len(rows), recipe.seed, "tuned")
    run = _Tuning.begin(small, rows, y, validation)
    made_of = {
        "model": small.facts["model"], "rows": [content_hash(dict(row)) for row in rows],
        "labels": y.astype(np.float64).tobytes().hex(), **recipe.facts,
    }  # fmt: skip
    epochs = Epochs(
        run.parameters, recipe, np.flatnonzero(~validation), "fine-tune", "tuned", run.backward, run.error,
        store, digest(made_of)[-16:],
    )  # fmt: skip
    small.model.requires_grad_(True)
    kept = epochs.run(progress)
    small.model.requires_grad_(False)
    x, ridge = _frozen(small, [rows[i] for i in np.flatnonzero(validation).tolist()]), run.ridge()
    tuned = LanguageModel(small.model, small.task, token_budget=small.token_budget, kind="tuned", side=small.side)
    return Tuned(tuned, ridge, validation, ridge(x), kept)


def left_out(n: int, seed: int, rung: str) -> np.ndarray:
    """Which of n labels say when to stop, [n] bool."""
    order = Stream(seed, rung, "validation", "rows").permutation(n)
    validation = np.zeros(n, dtype=bool)
    validation[order[: max(2, round(VALIDATION * n))]] = True
    return validation


@dataclass(frozen=True, eq=False)
class _Tuning:
    """The model in training with its head."""

    small: LanguageModel
    rows: Sequence[Content]
    lengths: Sequence[int]
    labels: Tensor  # [n] standardised
    validation: np.ndarray
    start: Ridge  # of labels as they are
    unit: tuple[float, float]  # mean and spread of the labels
    head: nn.Linear

    @classmethod
    def begin(cls, small: LanguageModel, rows: Sequence[Content], y: np.ndarray, validation: np.ndarray) -> "_Tuning":
        mean, spread = float(y[~validation].mean()), float(y[~validation].std()) or 1.0
        x = _frozen(small, rows)
        start, _ = fit(x[~validation], y[~validation])
        head = nn.Linear(x.shape[1], 1)
        with torch.no_grad():
            head.weight.copy_(torch.from_numpy(start.weights / spread)[None])
            head.bias.fill_((start.bias - mean) / spread)
        lengths = [sum(part.length for part in small.task.parts(row)) for row in rows]
        labels = torch.from_numpy((y - mean) / spread)
        return cls(small, rows, lengths, labels, validation, start, (mean, spread), head)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        own = {f"model.{name}": p for name, p in self.small.model.named_parameters()}
        return own | {f"head.{name}": p for name, p in self.head.named_parameters()}

    def backward(self, batch: list[int]) -> None:
        for piece in pieces(self.lengths, batch, self.small.token_budget):
            (self._squares(piece).sum() / len(batch)).backward()

    @torch.no_grad()
    def error(self) -> float:
        """The mean squared error on the labels that were left out."""
        out = np.flatnonzero(self.validation).tolist()
        return float(torch.cat([self._squares(p) for p in pieces(self.lengths, out, self.small.token_budget)]).mean())

    def _squares(self, rows: list[int]) -> Tensor:
        x, _ = self.small.differentiable([self.rows[i] for i in rows])
        mean, scale = torch.from_numpy(self.start.mean), torch.from_numpy(self.start.scale)
        predicted = self.head(((x - mean) / scale).float())[:, 0].double()
        return (predicted - self.labels[rows]).square()

    def ridge(self) -> Ridge:
        """The head in the labels' unit."""
        mean, spread = self.unit
        weights = self.head.weight.detach()[0].double().numpy() * spread
        bias = float(self.head.bias.detach()) * spread + mean
        return Ridge(self.start.mean, self.start.scale, weights, bias, self.start.penalty)


def _frozen(small: LanguageModel, rows: Sequence[Content]) -> np.ndarray:
    return np.concatenate([small(rows[lo : lo + AHEAD])[0] for lo in range(0, len(rows), AHEAD)])

"""An explainer for quanda: its metrics and benchmarks run on our verbs. Needs quanda (the extra `quanda`).

quanda (Bareeva et al., 2024) asks an `Explainer` for the scores of a batch of test samples against every training
sample, positive for proponents as ours are, and for self-influence. The index goes to `cache_dir/model_id` and is used
again; another model or other data there is refused. Not here: metrics of our own (judging.py).
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from influent import indexing, methods
from influent.errors import SpecError
from influent.querying import query
from influent.task import Classification, Task

try:
    from quanda.explainers.base import Explainer  # pyright: ignore[reportMissingImports]
except ImportError as e:
    raise SpecError(f"influent.explainer needs quanda: pip install 'influent[quanda]' ({e})") from e

Example = tuple[Any, Any]  # inputs of one sample, a tensor or a dict of tensors; its label or labels


class OutputTask:
    """A model that is called with a batch's inputs by name and returns an object with `logits`, as Transformers' do."""

    def logits(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        return model(**inputs).logits


class TextClassification(OutputTask):
    """Cross-entropy of one label a text."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        inputs, labels = batch
        return functional.cross_entropy(self.logits(model, inputs).float(), labels.view(-1), reduction="none")

    measure = loss


class TokenizedLM(OutputTask):
    """Next-token cross-entropy of tokenised texts, summed over the labels [B, T] that are not -100."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        inputs, labels = batch
        logits, wanted = self.logits(model, inputs)[:, :-1].float(), labels[:, 1:]
        each = functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=-100, reduction="none")
        return each.view(wanted.shape).sum(1)

    measure = loss


TASKS: dict[str, Task] = {
    "image_classification": Classification(),
    "text_classification": TextClassification(),
    "causal_lm": TokenizedLM(),
}


class Samples(Sequence[Example]):
    """quanda's training samples as (inputs, label): pairs, or dicts with `labels` or `label`, made tensors."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> Example:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not 0 <= i < len(self):
            raise IndexError(i)
        item = self.dataset[i]
        if not isinstance(item, Mapping):
            inputs, label = item
            return inputs, torch.as_tensor(label).cpu()
        label = next(name for name in ("labels", "label") if name in item)
        return _inputs({name: value for name, value in item.items() if name != label}), torch.as_tensor(item[label])


class InfluentExplainer(Explainer):
    """Scores of an index that is made of `train_dataset` with `model`, as `influent.index` and `influent.query` would.

    Args:
        model: its present weights are used; or those of the last of `checkpoints`, loaded by `checkpoints_load_func`.
        task: image_classification (samples are pairs), text_classification or causal_lm (samples are dicts).
        cache_dir, model_id: the index is `cache_dir/model_id`.
        loss: a task of influent's for another loss; by default cross-entropy.
        method, compress, layers, exclude, token_budget: of `influent.index`; `token_budget` counts samples.
        curvature, damping, normalize: of `influent.query`.
    """

    accepted_tasks = list(TASKS)

    def __init__(
        self,
        model: nn.Module,
        train_dataset: Any,
        task: str = "image_classification",
        checkpoints: str | list[str] | None = None,
        checkpoints_load_func: Any = None,
        *,
        cache_dir: str = "./cache",
        model_id: str = "0",
        loss: Task | None = None,
        method: str = "factgrass",
        compress: str | None = None,
        layers: str | None = None,
        exclude: str | None = None,
        token_budget: int = 64,
        curvature: str | None = None,
        damping: str | None = None,
        normalize: str = "none",
    ):
        super().__init__(
            model=model, train_dataset=train_dataset, task=task, checkpoints=checkpoints,
            checkpoints_load_func=checkpoints_load_func,
        )  # fmt: skip
        if self.checkpoints:
            self.load_last_checkpoint()
        self.loss = TASKS[task] if loss is None else loss
        self.path = str(Path(cache_dir, str(model_id)))
        self.token_budget, self.curvature, self.damping, self.normalize = token_budget, curvature, damping, normalize
        indexing.index(
            model, Samples(self.train_dataset), self.path, method=method, compress=compress, layers=layers,
            exclude=exclude, token_budget=token_budget, task=self.loss,
        )  # fmt: skip

    def explain(self, test_data: Any, targets: Sequence[int] | Tensor) -> Tensor:
        """Scores of each test sample for its target, [test samples, training samples] float32."""
        targets = torch.as_tensor(targets).cpu()
        queries = [(_at(test_data, i), target) for i, target in enumerate(targets)]
        with tempfile.TemporaryDirectory(prefix="influent-") as folder:
            path = f"{folder}/scores.npy"
            query(
                self.path, queries=queries, model=self.model, task=self.loss, k=1, bottom=False, scores=path,
                curvature=self.curvature, damping=self.damping, normalize=self.normalize,
                token_budget=self.token_budget,
            )  # fmt: skip
            return torch.from_numpy(np.load(path)).to(self.device)

    def self_influence(self, batch_size: int = 32) -> Tensor:
        """Each training sample's own score, [training samples]; in closed form, so `batch_size` changes nothing."""
        total = len(self.train_dataset)
        found = methods.self_influence(self.path, k=total, curvature=self.curvature, damping=self.damping)
        values = torch.empty(total)
        for row in found["rows"]:
            values[row["row"]] = row["score"]
        return values.to(self.device)


def _inputs(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: torch.as_tensor(value) for name, value in inputs.items()}


def _at(test_data: Any, i: int) -> Any:
    """Sample i of a batch of test data."""
    if isinstance(test_data, Mapping):
        return {name: torch.as_tensor(value[i]) for name, value in test_data.items()}
    return test_data[i]

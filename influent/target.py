"""The target: what a buyer wants of the model, as queries, and their gradients as an index's rows are compressed.

The unit of value is one mean over these queries. Not here: scores (valuing.py), reports (providers.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from influent import solving
from influent.attach import Run, attach, check_same
from influent.digests import digest
from influent.errors import DataError, SpecError
from influent.progress import Progress
from influent.querying import model_of, setting_of
from influent.records import content_hash, display_text, read_examples
from influent.rowstore import Index
from influent.solving import Asked
from influent.task import Encodes, Task


@dataclass(frozen=True, slots=True)
class Target:
    """The queries; `texts` are what words are looked for in, empty for a task without texts."""

    examples: Sequence[Any]
    texts: list[str]
    digest: str

    def __len__(self) -> int:
        return len(self.examples)

    def facts(self, name: object) -> dict[str, Any]:
        """What a document says of it."""
        return {
            "file": name if isinstance(name, str) else type(name).__name__,
            "queries": len(self.examples),
            "digest": self.digest,
        }


def read(data: Any, task: Task | None = None) -> Target:
    """The target of a file or sequence of records like the training data's (or of examples, for another task).

    Raises:
        DataError: there is no query, or one has no text to predict; names it.
    """
    if task is not None and not isinstance(task, Encodes):
        examples = [data[i] for i in range(len(data))]
        return Target(examples, [], digest({"examples": len(examples)}))
    found = list(read_examples(data))
    if empty := next((example for example in found if example.skip is not None), None):
        raise DataError(f"{empty.where}: the query is {empty.skip}; a query needs a text")
    if not found:
        raise DataError("the target has no queries: give at least one record")
    contents = [example.content for example in found]
    return Target(contents, [display_text(c) for c in contents], digest([content_hash(c) for c in contents]))


def gradients(
    index: Index,
    target: Target,
    *,
    model: str | nn.Module | None = None,
    task: Task | None = None,
    run: Run,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """The gradients of the queries' measure at the indexed model, block -> [Q, K] float32, with the index's maps.

    Raises:
        MismatchError: the model or task is not the one that was indexed.
        SpecError: the rows are gradients of something other than the loss.
        DataError, NumericsError: a query has no target tokens, or its loss is not finite.
    """
    if index.spec.get("target", "loss") != "loss":
        raise SpecError(
            f"{index.path}: its rows are gradients of the {index.spec['target']}, values are of the loss; index with "
            "--method linfik"
        )
    with attach(model_of(model, index), task, setting_of(index), run, index=index.store) as attached:
        check_same(index, attached)
        made = solving.gradients(attached, Asked(target.examples), progress)
    return {key: rows.cpu() for key, rows in made.items()}


def direction(queries: dict[str, Tensor], normalize: str) -> dict[str, Tensor]:
    """One query, block -> [1, K], whose product with a row (of unit length under cosine) is the row's value."""
    weights = torch.ones(len(next(iter(queries.values()))), dtype=torch.float64)
    if normalize == "cosine":
        squares = torch.stack([q.double().square().sum(1) for q in queries.values()]).sum(0)
        weights = torch.where(squares > 0, squares.rsqrt(), 0.0)
    return {key: (weights / len(weights) @ q.double()).float()[None] for key, q in queries.items()}

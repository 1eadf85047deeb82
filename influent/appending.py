"""The verb `append`: new examples as a further generation of an index, whose old shards are neither read nor written.

The rows are collected as the index's own were, with its model, task and settings; the catalog gets a part more; the
manifest is put last, and readers see the old generation until it is. A killed call goes on where it was when it is
called again. Not here: what a fit of the old rows is worth then (curvature.py).
"""

from typing import Any

from torch import nn

from influent import catalog
from influent.attach import Run, attach, check_same
from influent.ensemble import is_ensemble
from influent.errors import SpecError
from influent.examples import ids_and_hashes
from influent.filling import fill_pending
from influent.methods import info
from influent.progress import Progress
from influent.querying import model_of, setting_of
from influent.rowstore import Index
from influent.rowwriter import IndexWriter
from influent.task import Encodes, Task


def append(
    index: str,
    data: Any,
    *,
    model: str | nn.Module | None = None,
    task: Task | None = None,
    token_budget: int = 4096,
    device: str | None = None,
    skip_nonfinite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Add one row per example of `data` to an index. Called again with the data that was appended last, it does
    nothing.

    Args:
        data: records like those of the index, or, for a task without records, a map-style data set. Ids must be new;
            examples without one are called by their row.
        model: the model that was indexed, if it is not where it was or was a module; a module needs its `task`.

    Returns:
        The `info` document of the index with the new rows.

    Raises:
        MismatchError: the model or task is not the one that was indexed.
        DataError: as for `index`, and an id that the index has already; names both places.
    """
    if is_ensemble(index):
        raise SpecError(f"{index}: is an ensemble of checkpoints; nothing can be appended to it: index all rows anew")
    opened = Index.open(index)
    parts = len(opened.artifact.history)
    hashes = None
    if task is not None and not isinstance(task, Encodes):
        hashes = [content for _, content in ids_and_hashes(data)]
    listed = catalog.extend(data, opened.store, parts=parts, hashes=hashes, progress=progress)
    run = Run(token_budget=token_budget, device=device, skip_nonfinite=skip_nonfinite)
    finished = len(listed.parts) == parts
    if finished and model is None:
        return info(index)
    with attach(model_of(model, opened), task, setting_of(opened), run, index=opened.store) as attached:
        check_same(opened, attached)  # also of a call that has nothing to do: it names the wrong model all the same
        if finished:
            return info(index)
        writer = IndexWriter.extend(opened.store, listed.parts[-1].digest)
        fill_pending(writer, listed, attached.collector, data, progress=progress, first=opened.n)
        facts = {name: value for name, value in opened.summary.items() if name not in ("rows", "bytes", "split")}
        part = listed.parts[-1]
        writer.commit({**facts, "skipped": listed.skipped}, files=[part.record_name, part.name])
    return info(index)

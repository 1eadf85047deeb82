"""What the verb `index` does once the data is checked: attach the model, and fill the index chunk by chunk.

Not here: checking the data (catalog.py), gradients (collect.py), bytes (rowstore.py).
"""

import logging
import shutil
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from influent import loading
from influent.attach import Attached, Run, Setting, attach
from influent.catalog import Catalog
from influent.errors import CorruptError, DataError
from influent.progress import Progress
from influent.rowwriter import Chunk, IndexWriter
from influent.storage import Store
from influent.task import Encodes, Task

SHARD_BYTES = 256 * 2**20  # of float32 rows held while a shard is filled
Examples = Callable[[int, int], list[Any]]

log = logging.getLogger(__name__)


def fill(
    model: str | nn.Module,
    data: Any,
    listed: Catalog,
    *,
    task: Task | None,
    method: str,
    shard_rows: int | None,
    setting: Setting,
    run: Run,
    progress: Progress | None,
) -> None:
    """Write every row that the catalog lists and is not committed yet, then commit the index."""
    with attach(model, task, setting, run) as attached:
        spec = {**attached.identity, "data": listed.digest, "rows": attached.rows}
        notes = _notes(model, data, method, setting, attached, shard_rows)
        writer = IndexWriter.open(listed.store, spec, notes=notes)
        if writer.committed:
            _check_sizes(writer)
        else:
            _fill(writer, listed, attached, _source(data, listed, attached), progress)
            _check_any(writer, listed)
            writer.commit({"coverage": attached.collector.plan.coverage, "skipped": listed.skipped})


def _check_any(writer: IndexWriter, listed: Catalog) -> None:
    """DataError when every row was skipped: an index of zeros ranks nothing."""
    counts = Counter[str]()
    for record in writer.artifact.records.values():
        counts.update({reason: len(rows) for reason, rows in record.meta["skipped"].items()})
    if counts.total() >= listed.n:
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items())
        raise DataError(f"{writer.store}: every row was skipped ({reasons}); there is nothing to index")


def _check_sizes(writer: IndexWriter) -> None:
    """CorruptError when a committed shard is missing or has another size; its hash is for `verify` to read."""
    mend = "delete manifest.json there, then run the same command again to restore it"
    for record in writer.artifact.records.values():
        try:
            got = writer.store.size(record.payload)
        except CorruptError as e:
            raise CorruptError(f"{e}; {mend}") from e
        if got != record.bytes:
            raise CorruptError(f"{writer.store}/{record.payload}: expected {record.bytes} bytes, got {got}; {mend}")


def _source(data: Any, listed: Catalog, attached: Attached) -> Examples:
    """Where a chunk's examples come from: the catalog, or the caller's data set."""
    if isinstance(attached.collector.task, Encodes):
        return listed.examples
    return lambda lo, hi: [data[i] for i in range(lo, hi)]


def _notes(
    model: str | nn.Module, data: Any, method: str, setting: Setting, attached: Attached, shard_rows: int | None
) -> dict[str, Any]:
    """What an index remembers without it being part of its identity: how to query it again, and how it is cut."""
    width = sum(attached.collector.widths.values())
    return {
        "method": method,
        "model": loading.noted_path(model) if isinstance(model, str) else None,
        "model_config": attached.facts,
        "data": loading.noted_path(data) if isinstance(data, str) else type(data).__name__,
        "layers": setting.layers,
        "exclude": setting.exclude,
        "max_length": setting.max_length,
        "coverage": attached.collector.plan.coverage,
        "shard_rows": shard_rows or max(16, min(4096, SHARD_BYTES // (4 * width))),
    }


def _fill(
    writer: IndexWriter, listed: Catalog, attached: Attached, examples: Examples, progress: Progress | None
) -> None:
    """Write the chunks that are not committed yet."""
    pending = writer.pending(listed.n)
    todo = sum(chunk.hi - chunk.lo for chunk in pending)
    entry = torch.finfo(getattr(torch, writer.spec["rows"])).bits // 8
    size = todo * entry * sum(attached.collector.widths.values())
    log.info("%d of %d rows to collect, %.1f MB to write to %s", todo, listed.n, size / 1e6, writer.store)
    _check_room(writer.store, size)
    done = listed.n - todo
    for chunk in pending:
        _write(writer, chunk, listed, attached, examples, _within(progress, done, chunk, listed.n))
        done += chunk.hi - chunk.lo


def _check_room(store: Store, size: int) -> None:
    folder = store.local("spec.json")
    if folder is None:
        return
    free = shutil.disk_usage(folder.parent).free
    if size > free:
        raise CorruptError(
            f"{store}: disk full: the rows need {size / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; "
            "use another --out, --rows bfloat16 or a smaller --compress"
        )


def _within(progress: Progress | None, done: int, chunk: Chunk, total: int) -> Callable[[float], None]:
    def tell(share: float) -> None:
        if progress is not None:
            progress("index", done + int(share * (chunk.hi - chunk.lo)), total)

    return tell


def _write(
    writer: IndexWriter,
    chunk: Chunk,
    listed: Catalog,
    attached: Attached,
    examples: Examples,
    tell: Callable[[float], None],
) -> None:
    def name(i: int) -> str:
        row = listed.describe([chunk.lo + i])[0]
        return f"row {row['row']} (id {row['id']}, {listed.where(row['row'])})"

    made = attached.collector.collect(examples(chunk.lo, chunk.hi), name=name, progress=tell)
    skipped = {reason: [chunk.lo + i for i in sorted(rows)] for reason, rows in made.skipped.items()}
    writer.write(
        chunk, made.rows, loss=made.loss, norm=made.norm, tokens=made.tokens,
        dtype=writer.spec["rows"], skipped=skipped, split=made.num_split,
    )  # fmt: skip

"""What the verb `index` does once the data is checked: attach the model, and fill the index chunk by chunk.

Not here: checking the data (catalog.py), gradients (collect.py), bytes (rowstore.py).
"""

import logging
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from influent import loading
from influent.attach import Attached, Run, Setting, attach
from influent.bases import Sample
from influent.catalog import Catalog
from influent.collect import Collector
from influent.errors import CorruptError, DataError
from influent.layout import Layout
from influent.progress import Progress
from influent.rowwriter import Chunk, IndexWriter
from influent.storage import Store
from influent.task import Encodes, Task

SHARD_BYTES = 256 * 2**20  # of rows held while a shard is filled: float32, or coded

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
    sample = sample_of(data, listed)
    with attach(model, task, setting, run, index=listed.store, sample=sample, progress=progress) as attached:
        spec = {**attached.identity, "data": listed.digest, "rows": attached.rows}
        notes = _notes(model, data, method, setting, attached)
        notes["shard_rows"] = shard_rows or max(16, min(4096, SHARD_BYTES // max(1, _held_bytes(Layout.of(spec)))))
        writer = IndexWriter.open(listed.store, spec, notes=notes)
        if writer.committed:
            check_sizes(writer)
        else:
            fill_pending(writer, listed, attached.collector, data, progress=progress)
            writer.commit({"coverage": attached.collector.plan.coverage, "skipped": listed.skipped})


def sample_of(data: Any, listed: Catalog) -> Sample:
    """The rows from which a learned compressor may be made."""

    def example(task: Task, row: int) -> Any:
        return listed.examples(row, row + 1)[0] if isinstance(task, Encodes) else data[row]

    return Sample(digest=listed.digest, n=listed.n, example=example, name=lambda row: _called(listed, row))


def _called(listed: Catalog, row: int) -> str:
    """How errors call a row."""
    return f"row {row} (id {listed.describe([row])[0]['id']}, {listed.where(row)})"


def fill_pending(
    writer: IndexWriter, listed: Catalog, collector: Collector, data: Any, *, progress: Progress | None, first: int = 0
) -> None:
    """Write the chunks that are not committed yet.

    Args:
        listed: every row of the index. Its examples, or for a task that encodes none `data[row - first]`, are read.

    Raises DataError when every row from `first` on was skipped: rows of zeros rank nothing.
    """
    collector = replace(collector, codec=writer.layout.codec)
    pending = writer.pending(listed.n)
    todo = sum(chunk.hi - chunk.lo for chunk in pending)
    size = todo * writer.layout.row_bytes
    log.info("%d of %d rows to collect, %.1f MB to write to %s", todo, listed.n, size / 1e6, writer.store)
    _check_room(writer.store, size)
    done = listed.n - todo
    for chunk in pending:
        if isinstance(collector.task, Encodes):
            examples = listed.examples(chunk.lo, chunk.hi)
        else:
            examples = [data[row - first] for row in range(chunk.lo, chunk.hi)]
        _write(writer, chunk, listed, collector, examples, _within(progress, done, chunk, listed.n))
        done += chunk.hi - chunk.lo
    _check_any(writer, listed, first)


def _check_any(writer: IndexWriter, listed: Catalog, first: int) -> None:
    counts = Counter[str]()
    for record in writer.artifact.records.values():
        if record.rows is not None and record.rows[0] >= first:
            counts.update({reason: len(rows) for reason, rows in record.meta["skipped"].items()})
    if counts.total() >= listed.n - first:
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items())
        raise DataError(f"{writer.store}: every row was skipped ({reasons}); there is nothing to index")


def check_sizes(writer: IndexWriter) -> None:
    """CorruptError when a committed shard is missing or has another size; its hash is for `verify` to read."""
    mend = "delete manifest.json there, then run the same command again to restore it"
    for record in writer.artifact.records.values():
        try:
            got = writer.store.size(record.payload)
        except CorruptError as e:
            raise CorruptError(f"{e}; {mend}") from e
        if got != record.bytes:
            raise CorruptError(f"{writer.store}/{record.payload}: expected {record.bytes} bytes, got {got}; {mend}")


def _held_bytes(layout: Layout) -> int:
    """Bytes of a row while its shard is filled."""
    return 4 * sum(layout.widths.values()) if layout.is_plain else layout.row_bytes


def _notes(model: str | nn.Module, data: Any, method: str, setting: Setting, attached: Attached) -> dict[str, Any]:
    """What an index remembers without it being part of its identity: how to query it again."""
    return {
        "method": method,
        "model": loading.noted_path(model) if isinstance(model, str) else None,
        "model_config": attached.facts,
        "data": loading.noted_path(data) if isinstance(data, str) else type(data).__name__,
        "layers": setting.layers,
        "exclude": setting.exclude,
        "max_length": setting.max_length,
        **({} if setting.optimizer is None else {"optimizer": loading.noted_path(setting.optimizer)}),
        "coverage": attached.collector.plan.coverage,
    }


def _check_room(store: Store, size: int) -> None:
    folder = store.local("spec.json")
    if folder is None:
        return
    free = shutil.disk_usage(folder.parent).free
    if size > free:
        raise CorruptError(
            f"{store}: disk full: the rows need {size / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; "
            "use another --out, fewer bits of --rows or a smaller --compress"
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
    collector: Collector,
    examples: list[Any],
    tell: Callable[[float], None],
) -> None:
    made = collector.collect(examples, name=lambda i: _called(listed, chunk.lo + i), progress=tell)
    skipped = {reason: [chunk.lo + i for i in sorted(rows)] for reason, rows in made.skipped.items()}
    writer.write(
        chunk, made.rows, loss=made.loss, norm=made.norm, tokens=made.tokens,
        dtype=writer.spec["rows"], skipped=skipped, split=made.num_split, captured=made.captured,
        residual=made.residual,
    )  # fmt: skip

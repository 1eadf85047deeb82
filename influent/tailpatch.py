"""Tail patch: what one more training step on a query's top rows does to the query.

After Chang et al., 2024 (arXiv 2410.17413): from the final model, one optimizer step is taken on each of the top rows
alone, and on all of them together; the gain is the rise of the query's log-probability, the mean over its target
tokens. The step is AdamW's first, at the rate of fine-tuning: each weight moves by the rate, against the sign of its
gradient. Kept per query and rows, so that an interrupted run goes on. Not here: the model and its rows (finetune.py).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from influent.artifact import ArtifactWriter
from influent.digests import digest
from influent.errors import NumericsError
from influent.finetune import FineTune
from influent.metrics import bootstrap
from influent.payload import Payload
from influent.progress import Progress
from influent.rerun import best
from influent.storage import Store

KIND = "tail-patch"


def tail_patch(
    named: Mapping[str, np.ndarray],
    tuned: FineTune,
    store: Store,
    spec: Mapping[str, Any],
    queries: np.ndarray,
    *,
    k: int,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """For each method the mean gain over its `k` top rows one at a time, with the interval over the queries, and the
    gain of all `k` together (`together`).

    Args:
        tuned: the final model with its rows and queries.
        store, spec: where results are kept, and what they depend on; MismatchError for another spec there.
    Raises:
        NumericsError: a step leads to a loss that is not finite.
    """
    writer = ArtifactWriter.open(store, KIND, {"statistic": KIND, **spec})
    wanted = [(int(q), best(scores[q], k)) for scores in named.values() for q in queries]
    missing = {name: (q, rows) for q, rows in wanted if (name := _name(q, rows)) not in writer.records}
    if missing:
        if writer.committed:
            store.delete("manifest.json")  # it shall not vouch for less than there is
            writer.committed = False
        before = -tuned.measure()[0]
        for done, (name, (q, rows)) in enumerate(missing.items()):
            if progress is not None:
                progress("tail patch", done, len(missing))
            gains = [_gain(tuned, [int(row)], q, before[q]) for row in rows]
            together = _gain(tuned, rows.tolist(), q, before[q])
            writer.put(name, {"alone": torch.tensor(gains), "together": torch.tensor([together])})
        if progress is not None:
            progress("tail patch", len(missing), len(missing))
    if not writer.committed:
        writer.commit({"queries": len({q for q, _ in wanted})})
    methods = {}
    for name, scores in named.items():
        alone, together = zip(*(_stored(writer, int(q), best(scores[q], k)) for q in queries), strict=True)
        methods[name] = {**bootstrap(np.array(alone)).to_json(), "together": bootstrap(np.array(together)).to_json()}
    return {"k": k, "methods": methods}


def _gain(tuned: FineTune, rows: list[int], query: int, before: float) -> float:
    tuned.step(rows)
    after = -tuned.measure([query])[0][0]
    tuned.restore()
    if not np.isfinite(after):
        raise NumericsError(f"tail patch: query {query}: its loss is not finite after a step: lower --rate")
    return float(after - before)


def _name(query: int, rows: np.ndarray) -> str:
    return f"{query}-{digest(rows.tolist()).rpartition(':')[2][:24]}"


def _stored(writer: ArtifactWriter, query: int, rows: np.ndarray) -> tuple[float, float]:
    record = writer.records[_name(query, rows)]
    payload = Payload(writer.store, record.payload, record.bytes)
    return float(payload["alone"].double().mean()), float(payload["together"][0])

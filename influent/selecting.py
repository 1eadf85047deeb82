"""The verb `select`: the rows of an index that would serve a target best, as a data set with a card.

Rows are taken in the order of their LinFiK. With a diversity term they are taken in rounds, and each round asks for the
marginal value <g_Q - (mu/n) s, g_z> instead, with s the sum of the rows taken before (of unit length under cosine) and
n the number to be taken: what the target wants and has not been given yet. Exact copies are taken once. Not here:
values (valuing.py), what a value means for money (payments.py).
"""

import json
import tempfile
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from math import ceil
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from influent import rowsums, score
from influent import target as targets
from influent.attach import Run
from influent.bootstrap import Means
from influent.catalog import Catalog
from influent.duplicates import Leaks
from influent.errors import DataError, SpecError
from influent.progress import Progress
from influent.rowstore import Index
from influent.storage import Store
from influent.tables import write_file
from influent.target import Target, direction
from influent.task import Task
from influent.valuing import FORMS, facts

SUFFIXES = (".jsonl", ".parquet")
BLOCK = 4096  # rows of the catalog read at a time


def select(
    index: str,
    *,
    target: Any,
    out: str,
    budget: str | None = None,
    tokens: int | None = None,
    diversity: float = 0.0,
    rounds: int = 20,
    normalize: str = "cosine",
    model: str | nn.Module | None = None,
    token_budget: int = 4096,
    device: str | None = None,
    task: Task | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the rows that serve a target best to a `.jsonl` or `.parquet` file, with a card beside it.

    Args:
        target: a file or sequence of records: what the model should do better.
        out: the data set. `FILE.card.json` and `FILE.card.md` say how it was chosen.
        budget: how many rows: a number, or a share such as `10%`; or
        tokens: how many target tokens at most.
        diversity: what the rows taken already take from rows like them; 0 for nothing, 1 to take the whole target as
            given once as many rows as asked for point its way.
        rounds: into how many the rows are cut when there is a diversity term; each is one pass over the index.

    Returns:
        The card.

    Raises:
        SpecError, DataError, MismatchError, NumericsError: as their classes say.
    """
    _check(out, budget, tokens, diversity, rounds, normalize)
    opened, wanted = Index.open(index), targets.read(target, task)
    rowsums.check_stored(opened, "select")
    sizes = opened.stat("tokens").double().numpy()
    count = _count(budget, opened.n) if budget is not None else None
    queries = targets.gradients(
        opened, wanted, model=model, task=task, run=Run(token_budget=token_budget, device=device), progress=progress
    )
    asked = direction(queries, normalize)
    lengths = rowsums.lengths(opened) if normalize == "cosine" else torch.ones(opened.n)
    values = _marginal(opened, asked, lengths, progress)
    copies = _later_copies(opened.catalog)
    room = _Room(count, tokens, sizes)
    if diversity:
        num = count or max(1, int((tokens or 0) / max(1.0, float(sizes.mean()))))
        chosen = _in_rounds(opened, asked, lengths, copies, room, diversity / num, ceil(num / rounds), progress)
    else:
        chosen = room.take(np.argsort(-values, kind="stable"), copies)
    if not chosen:
        raise DataError(f"{index}: no row fits a budget of {tokens} tokens; the shortest has {int(sizes.min())}")
    _write(opened.catalog, chosen, values, out)
    card = _card(opened, wanted, target, chosen, values, sizes, copies, normalize) | {
        "file": out, "budget": budget, "tokens_at_most": tokens, "diversity": diversity,
        "rounds": rounds if diversity else None,
    }  # fmt: skip
    write_file(f"{out}.card.json", json.dumps(card, indent=1, ensure_ascii=False).encode())
    write_file(f"{out}.card.md", page(card).encode())
    return card


class _Room:
    """What the budget leaves: rows, or tokens; longer rows are passed over when shorter ones still fit."""

    def __init__(self, count: int | None, tokens: int | None, sizes: np.ndarray) -> None:
        self.count, self.tokens, self.sizes = count, tokens, sizes
        self.taken: list[int] = []
        self.used = 0.0

    def take(self, order: np.ndarray, banned: np.ndarray, most: int | None = None) -> list[int]:
        """The rows of `order` that fit, at most `most` of them, none that is `banned` or taken."""
        have, found = set(self.taken), []
        for row in order.tolist():
            if self.full or len(found) == most:
                break
            size = float(self.sizes[row])
            if banned[row] or row in have or (self.tokens is not None and self.used + size > self.tokens):
                continue
            self.taken.append(row)
            found.append(row)
            self.used += size
        return found

    @property
    def full(self) -> bool:
        return self.count is not None and len(self.taken) >= self.count


def _in_rounds(
    index: Index,
    asked: dict[str, Tensor],
    lengths: Float[Tensor, " N"],
    banned: np.ndarray,
    room: _Room,
    weight: float,
    step: int,
    progress: Progress | None,
) -> list[int]:
    taken = {key: torch.zeros_like(q) for key, q in asked.items()}
    while not room.full:
        left = {key: q - weight * taken[key] for key, q in asked.items()}
        marginal = _marginal(index, left, lengths, progress)
        fresh = room.take(np.argsort(-marginal, kind="stable"), banned, step)
        if not fresh:
            break
        weights = torch.zeros(1, index.n)
        weights[0, fresh] = torch.where(lengths[fresh] > 0, 1 / lengths[fresh], 0.0)
        for key, total in rowsums.weighted(index, weights).items():
            taken[key] += total
    return room.taken


def _marginal(
    index: Index, asked: dict[str, Tensor], lengths: Float[Tensor, " N"], progress: Progress | None
) -> np.ndarray:
    """<asked, g_z> / length of every row, [N]; 0 for a row of zeros."""
    products = score.score(index, asked, {"values": Means()}, progress=progress)["values"]
    return torch.where(lengths > 0, products / lengths, 0.0).numpy()


def _later_copies(catalog: Catalog) -> np.ndarray:
    """Whether a row's exact content is that of an earlier row, [N] bool."""
    seen: set[bytes] = set()
    out = []
    for row in catalog.fields("hash"):
        digest = bytes.fromhex(row["hash"] or "")
        out.append(digest in seen)
        seen.add(digest)
    return np.array(out)


def _count(budget: str, n: int) -> int:
    """How many rows a budget of `500` or `10%` is; SpecError for what is neither."""
    text = budget.strip()
    try:
        wanted = float(text.removesuffix("%")) / 100 * n if text.endswith("%") else float(int(text))
    except ValueError:
        wanted = 0.0
    if not 0 < wanted <= n:
        raise SpecError(f"budget: expected a share such as 10% or 1 to {n} rows, got {budget!r}")
    return max(1, round(wanted))


def _check(out: str, budget: str | None, tokens: int | None, diversity: float, rounds: int, normalize: str) -> None:
    if not out.endswith(SUFFIXES):
        raise SpecError(f"out: expected a file name ending in {' or '.join(SUFFIXES)}, got {out!r}")
    if (budget is None) == (tokens is None):
        raise SpecError("give budget (rows) or tokens, one of them")
    if tokens is not None and tokens < 1:
        raise SpecError(f"tokens is {tokens}, expected 1 or more")
    if not 0 <= diversity < float("inf") or rounds < 1:
        raise SpecError(f"diversity is {diversity} in {rounds} rounds; expected 0 or more, in 1 or more")
    if normalize not in FORMS:
        raise SpecError(f"normalize is {normalize!r}, expected {' or '.join(FORMS)}")


def _records(catalog: Catalog, chosen: Sequence[int], values: np.ndarray) -> Iterator[dict[str, Any]]:
    """The chosen rows in the data's order, as records that `index` reads, with `value` and `rank` (1 first taken)."""
    rank = {row: place for place, row in enumerate(chosen, 1)}
    for lo in range(0, catalog.n, BLOCK):
        here = [row for row in range(lo, min(lo + BLOCK, catalog.n)) if row in rank]
        if not here:
            continue
        contents = catalog.examples(here[0], here[-1] + 1)
        for row, label in zip(here, catalog.describe(here), strict=True):
            labels = {name: label[name] for name in ("id", "source", "provider") if label[name] is not None}
            yield {**labels, **contents[row - here[0]], "value": float(values[row]), "rank": rank[row]}


def _write(catalog: Catalog, chosen: Sequence[int], values: np.ndarray, out: str) -> None:
    """The data set, streamed to a file beside and then put in place."""
    with tempfile.TemporaryDirectory(prefix="influent-") as folder:
        path = Path(folder, "selected")
        if out.endswith(".jsonl"):
            with path.open("w", encoding="utf-8") as file:
                for record in _records(catalog, chosen, values):
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
        else:
            _write_parquet(catalog, chosen, values, path)
        place, separator, name = out.rpartition("/")
        Store((place or "/") if separator else ".").put_file(name, path)


def _write_parquet(catalog: Catalog, chosen: Sequence[int], values: np.ndarray, path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    turns = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    kinds = {name: pa.string() for name in ("id", "source", "provider", "text", "prompt", "completion")}
    kinds |= {"messages": turns, "value": pa.float64(), "rank": pa.int64()}
    used = {name for record in _records(catalog, chosen, values) for name in record}
    schema = pa.schema([(name, kind) for name, kind in kinds.items() if name in used])
    with pq.ParquetWriter(path, schema) as writer:
        held: list[dict[str, Any]] = []
        for record in _records(catalog, chosen, values):
            held.append(record)
            if len(held) == BLOCK:
                writer.write_table(pa.Table.from_pylist(held, schema=schema))
                held = []
        writer.write_table(pa.Table.from_pylist(held, schema=schema))


def _card(
    index: Index,
    wanted: Target,
    name: object,
    chosen: Sequence[int],
    values: np.ndarray,
    sizes: np.ndarray,
    copies: np.ndarray,
    normalize: str,
) -> dict[str, Any]:
    rows, leaks, found = np.array(chosen), Leaks(wanted.texts), 0
    providers: dict[str, int] = {}
    for lo in range(0, len(rows), BLOCK):
        for row in index.catalog.describe(rows[lo : lo + BLOCK].tolist()):
            providers[row["provider"] or "(none)"] = providers.get(row["provider"] or "(none)", 0) + 1
            found += bool(leaks.find(row["text"]))
    return {
        "rows": len(rows),
        "of": index.n,
        "tokens": int(sizes[rows].sum()),
        "value": float(values[rows].mean()),
        "value_of_all": float(values.mean()),
        "below_zero": int((values[rows] < 0).sum()),
        "copies_left_out": int(copies.sum()),
        "leaks": found,
        "providers": dict(sorted(providers.items(), key=lambda item: -item[1])),
        "target": wanted.facts(name),
        "method": facts(index, normalize),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def page(card: dict[str, Any]) -> str:
    """The card as Markdown."""
    how = f"--budget {card['budget']}" if card["budget"] else f"--tokens {card['tokens_at_most']}"
    spread = f", diversity {card['diversity']:g} in {card['rounds']} rounds" if card["rounds"] else ""
    shares = "\n".join(f"- {name}: {count:,}" for name, count in card["providers"].items())
    return f"""# {PurePosixPath(card["file"]).name}

{card["rows"]:,} of {card["of"]:,} rows ({card["tokens"]:,} target tokens), chosen by `influent select` ({how}{spread})
as those that would serve the {card["target"]["queries"]} queries of `{card["target"]["file"]}` best.

| | |
|---|---|
| value | {card["method"]["unit"]} |
| mean value, chosen | {card["value"]:+.4g} |
| mean value, all rows | {card["value_of_all"]:+.4g} |
| chosen rows below zero | {card["below_zero"]:,} |
| exact copies left out | {card["copies_left_out"]:,} |
| chosen rows that contain a query | {card["leaks"]:,} |
| model | {card["method"]["model"]} |
| index | {card["method"]["index"]} |
| target | {card["target"]["digest"]} |
| date | {card["date"]} |

By provider:

{shares}

A value predicts one small step of training of that model for that target, and ages as the model changes. Rows are in
the data's order; `rank` says in which order they were taken.
"""

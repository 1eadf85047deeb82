"""Third-party valuation: a provider scores its rows at home, commits to them, and is audited on rows it did not choose.

    provider   commit    a table of scores and row hashes, and the Merkle root over it; then it cannot change
    both       positions drawn from the root and a public seed that is fixed only after the root is known
    provider   reveal    those rows, with what proves that they are the committed ones
    buyer      audit     positions, hashes, proofs, the whole table against the root, scores against the student

The audited rows, labelled by the buyer's own model, are the labelled part of the difference estimate: its interval is
right whatever was claimed of the other rows' scores. Not here: scoring (appraising.py), committing (commitments.py).
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from influent import merkle
from influent import student as students
from influent.appraising import Labelled, estimate, read_labels
from influent.bootstrap import DRAWS
from influent.catalog import Catalog
from influent.commitments import (
    PUBLIC,
    SECRET,
    TABLE,
    Table,
    item,
    positions,
    read_statement,
    read_table,
    salt,
    salted,
)
from influent.errors import DataError
from influent.progress import Progress
from influent.providers import Groups
from influent.records import content_hash
from influent.storage import Store
from influent.tables import write_file

TOLERANCE = 1e-3  # of scores made on another machine, relative to the spread of all scores


def reveal(scores: str, *, seed: str, count: int, out: str) -> dict[str, Any]:
    """Write the rows that `seed` draws, with their proofs, to a JSONL file: the provider's answer to an audit.

    Args:
        scores: the directory in which `appraise --commit` left its scores.
        seed: the public text on which both sides agreed after the root was known.
        count: how many rows are audited.
    """
    store = Store(scores)
    if not store.exists(SECRET):
        raise DataError(f"{scores}: nothing is committed there; run `influent appraise … --commit` first")
    statement = read_statement(store.get(PUBLIC), f"{scores}/{PUBLIC}")
    table, listed = read_table(store.get(TABLE), f"{scores}/{TABLE}"), Catalog.open(store)
    secret, leaves = bytes.fromhex(store.get(SECRET).decode()), table.leaves()
    lines = []
    for place in positions(statement["root"], statement["rows"], count, seed):
        lines.append(
            {
                "row": place, "content": listed.example(place), "salt": salt(secret, place).hex(),
                "score": float(table.scores[place]), "name": table.names[place],
                "proof": [node.hex() for node in merkle.proof(leaves, place)],
            }
        )  # fmt: skip
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_file(out, text.encode())
    return {"rows": [line["row"] for line in lines], "root": statement["root"], "seed": seed, "out": out}


def audit(
    commitment: str,
    revealed: str,
    *,
    seed: str,
    count: int,
    student: str | None = None,
    labels: str | None = None,
    model: str | None = None,
    token_budget: int = 4096,
    device: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Check a provider's answer, and estimate what its rows are worth from the audited ones.

    Args:
        commitment: the folder with `commitment.json` and `commitment.parquet` as they were handed over *before* the
            seed was fixed; keep the root that you saw then.
        revealed: the file that `reveal` wrote.
        student: recompute the scores of the revealed rows with it.
        labels: a CSV or JSONL file of `hash` and `value`: the revealed rows, labelled by the owner's model.

    Returns:
        `{"ok", "errors": [one line each], "root", "rows", "revealed": [{"row", "hash", "score"}], "providers"}`;
        `providers` is null without labels.
    """
    store = Store(commitment)
    statement = read_statement(store.get(PUBLIC), f"{commitment}/{PUBLIC}")
    table, lines = read_table(store.get(TABLE), f"{commitment}/{TABLE}"), _lines(revealed)
    errors = _check_table(table, statement)
    asked = positions(statement["root"], statement["rows"], count, seed)
    if [line["row"] for line in lines] != asked:
        errors.append(f"{revealed}: its rows are not those that the seed draws: {asked[:5]}, …")
    for line in lines:
        errors += _check_line(line, statement)
    if student is not None:
        made = students.open_student(student, model=model, token_budget=token_budget, device=device)
        errors += _check_scores(made, lines, table.scores, statement["student"])
    found = [{"row": x["row"], "hash": content_hash(x["content"]), "score": x["score"]} for x in lines]
    return {
        "ok": not errors, "errors": errors, "root": statement["root"], "rows": statement["rows"], "revealed": found,
        "providers": None if labels is None or errors else _estimates(table, found, read_labels(labels)),
    }  # fmt: skip


def _check_table(table: Table, statement: dict[str, Any]) -> list[str]:
    if len(table.hashes) != statement["rows"]:
        return [f"{TABLE}: has {len(table.hashes)} rows, the commitment is to {statement['rows']}"]
    root = merkle.root(table.leaves()).hex()
    return [] if root == statement["root"] else [f"{TABLE}: leads to the root {root[:16]}…, not to the committed one"]


def _check_line(line: dict[str, Any], statement: dict[str, Any]) -> list[str]:
    row_hash = salted(bytes.fromhex(content_hash(line["content"])), bytes.fromhex(line["salt"])).hex()
    digest = merkle.leaf(item(line["row"], line["score"], line["name"], row_hash))
    beside = [bytes.fromhex(node) for node in line["proof"]]
    root = merkle.recompute(digest, line["row"], statement["rows"], beside)
    if root is not None and root.hex() == statement["root"]:
        return []
    return [f"row {line['row']}: its content, score or proof is not what was committed"]


def _check_scores(
    made: students.Student, lines: Sequence[dict[str, Any]], every: np.ndarray, committed: str
) -> list[str]:
    if made.digest != committed:
        return [f"the scores were made with another student ({committed})"]
    again, _ = made([line["content"] for line in lines])
    reach = TOLERANCE * max(float(every.std()), 1e-12) + 1e-6
    return [
        f"row {line['row']}: its score is {line['score']:.6g}, the student gives {value:.6g}"
        for line, value in zip(lines, again.tolist(), strict=True)
        if abs(line["score"] - value) > reach
    ]


def _estimates(table: Table, revealed: Sequence[dict[str, Any]], labels: dict[str, float]) -> list[dict[str, Any]]:
    if missing := [line["row"] for line in revealed if line["hash"] not in labels]:
        raise DataError(f"row {missing[0]} was revealed but has no label: an audit needs the labels of all its rows")
    numbers: dict[str, int] = {}
    members = np.array([numbers.setdefault(name, len(numbers)) for name in table.names])
    groups = Groups("provider", list(numbers), members)
    rows = np.array([line["row"] for line in revealed])
    values = np.array([labels[line["hash"]] for line in revealed])[:, None]
    estimates, _ = estimate(groups, table.scores, Labelled(rows, values), draws=DRAWS, seed=0)
    return [
        {
            "provider": name, "rows": int(count), "audited": int((members[rows] == g).sum()),
            "value": estimates[g].value, "low": estimates[g].shown.low, "high": estimates[g].shown.high,
            "interval": next(iter(estimates[g].intervals)),
        }
        for g, (name, count) in enumerate(zip(groups.names, groups.counts, strict=True))
    ]  # fmt: skip


def _lines(path: str) -> list[dict[str, Any]]:
    """The revealed rows; DataError, naming the line, for one that lacks a field or has a malformed one."""
    folder, separator, name = path.rpartition("/")
    text = Store((folder or "/") if separator else ".").get(name).decode()
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            row = json.loads(line)
            row = {**row, "row": int(row["row"]), "score": float(row["score"]), "name": str(row["name"])}
            for node in [row["salt"], *row["proof"]]:
                bytes.fromhex(node)
            content_hash(row["content"])
            found.append(row)
        except (ValueError, KeyError, TypeError) as e:
            raise DataError(f"{path}:{number}: not a revealed row ({type(e).__name__}: {e})") from e
    return found

"""An evaluation as people read it: tables in a terminal, and one self-contained HTML page with the plots in it.

Not here: numbers (trial.py), plots (plots.py).
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

Doc = Mapping[str, Any]
TITLES = {
    "lds": "Linear datamodelling score: rank correlation of summed scores with what retraining on subsets did",
    "loo": "Leave-one-out: rank correlation of scores with what leaving out cost",
    "tail-patch": "Tail patch: gain in the query's log-probability after a step on a top row",
    "mislabel": "Bad rows found: AUC of suspicion",
    "retrieval": "Retrieval: reciprocal rank of the best relevant row (MRR)",
    "brittleness": "Brittleness: rise of the query's loss when its top rows are removed",
    "selection": "Selection: by how much lower the loss is than with random rows, over the shares kept",
    "removal": "Removal: by how much higher the loss is than without random rows, over the shares removed",
}
STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;margin:.5em 0 1.5em}td,th{padding:.2em .8em;text-align:right;"
    "border-bottom:1px solid #ddd}td:first-child,th:first-child{text-align:left}img{max-width:100%}h2{font-size:1.1em}"
)


def print_evaluate(doc: Doc, console: Console) -> None:
    """A table a metric, the best method first."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    console.print(Text(_opening(doc)))
    for name, note, header, rows in _tables(doc):
        console.print()
        console.print(Text(TITLES[name], style="bold"))
        table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
        for place, column in enumerate(header):
            table.add_column(column, justify="right" if place else "left", overflow="fold")
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        console.print(table)
        console.print(Text(note))
    console.print()
    console.print(Text(f"score: {doc['sign']}; intervals: 95 % bootstrap"))


def html(doc: Doc, picture: bytes) -> str:
    """The page: plots, tables and notes, nothing that is loaded from elsewhere."""
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>influent evaluate</title><style>{STYLE}</style>",
        f"<h1>influent evaluate</h1><p>{escape(_opening(doc))}</p>",
        f'<img alt="plots of every metric" src="data:image/png;base64,{b64encode(picture).decode()}">',
    ]
    for name, note, header, rows in _tables(doc):
        head = "".join(f"<th>{escape(cell)}" for cell in header)
        body = "".join("<tr>" + "".join(f"<td>{escape(cell)}" for cell in row) for row in rows)
        parts.append(f"<h2>{escape(TITLES[name])}</h2><table><tr>{head}{body}</table><p>{escape(note)}</p>")
    parts.append(f"<p>Score: {escape(doc['sign'])}. Intervals: 95 % bootstrap.</p></html>")
    return "\n".join(parts)


def _opening(doc: Doc) -> str:
    text = f"{doc['rows']:,} training rows, {doc['queries']:,} queries"
    if "damping" in doc:
        chosen, tuned = doc["damping"]["chosen"], len(doc["damping"]["tuned_on"])
        text += f"; damping {chosen} chosen on {tuned} of them, reported on the other {len(doc['reported'])}"
    return text


def _tables(doc: Doc) -> Iterator[tuple[str, str, Sequence[str], list[list[str]]]]:
    """(metric, note, header, rows) of every metric that was judged."""
    for name in TITLES:
        if name in doc:
            extra, note = _columns(name, doc[name])
            methods = sorted(doc[name]["methods"].items(), key=lambda item: -item[1]["mean"])
            rows = [
                [method, _number(found["mean"]), f"{_number(found['low'])} to {_number(found['high'])}"]
                + [show(found) for _, show in extra]
                for method, found in methods
            ]
            yield name, note, ["scores", "mean", "interval", *(column for column, _ in extra)], rows


def _columns(name: str, part: Doc) -> tuple[list[tuple[str, Any]], str]:
    """What a metric's table has beside the mean, each a heading and a function of a method's part; and its note."""
    ahead = (f"ahead of {part['name']}", _ahead)
    if name == "lds":
        extra = [
            ahead,
            *([("one training", lambda m: _number(m["one_training"]["mean"]))] if part["seeds"] > 1 else []),
        ]
        noise = "" if part["ceiling"] is None else f"; a perfect forecast would have about {_number(part['ceiling'])}"
        return extra, f"{part['subsets']} subsets, {part['seeds']} training(s) of each{noise}"
    if name == "loo":
        extra = [ahead, ("Pearson", lambda m: _number(m["pearson"]))]
        return extra, f"left out: {part['left_out']}, each a {part['unit']}"
    if name == "tail-patch":
        return [("together", lambda m: _number(m["together"]["mean"]))], f"the top {part['k']} rows of each query"
    if name == "retrieval":
        return [(f"hit@{part['k']}", lambda m: _number(m["hit"]["mean"]))], "of each query, its best relevant row"
    if name == "mislabel":
        found = [(kind, lambda m, kind=kind: _number(m[kind]["mean"])) for kind in ("average_precision", "recall")]
        return found, f"{part['flagged']} of {part['rows']} rows are bad; recall at {part['k']}"
    if name == "brittleness":
        steps = [
            (f"-{n}", lambda m, i=i: _number(m["rise"][i]) + _flips(m["flips"], i))
            for i, n in enumerate(part["removed"])
        ]
        return steps, f"{len(part['queries'])} queries; in brackets the share of answers that change"
    steps = [(f"{share:.0%}", lambda m, i=i: _number(m["loss"][i])) for i, share in enumerate(part["shares"])]
    return steps, f"rows ordered by {len(part['chosen_by'])} queries, loss of the other {len(part['measured'])}"


def _ahead(method: Doc) -> str:
    lead = method["ahead"]
    return "" if lead is None else f"{lead['mean']:+.3f} ({lead['low']:+.3f} to {lead['high']:+.3f})"


def _flips(flips: Sequence[float] | None, i: int) -> str:
    return "" if flips is None else f" ({flips[i]:.0%})"


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) >= 0.01 or value == 0 else f"{value:.1e}"

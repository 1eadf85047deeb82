"""Provider reports as people read them: a page at a terminal, one self-contained HTML page, and a flat table.

Does: the documents of `value` and `appraise`. Does not: compute anything, or load anything from elsewhere: the HTML
page holds its own style and drawing, and no script.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from influent.tables import write_file

if TYPE_CHECKING:
    from rich.console import Console

Doc = Mapping[str, Any]
INTERVALS = {
    "queries": "the choice of queries: these very rows, other queries like these",
    "delivery": "the choice of queries and rows: what this provider would deliver next",
    "unlabelled": "the pooled error of one score: some providers have no labelled row, their means are the student's",
    "labels": "the rows that were not labelled: these very rows, these very queries",
    "labels and queries": "the rows that were not labelled and the choice of queries",
}
PROVIDER_WIDTH = 20
CAUTION = (
    "A value predicts one small step of training of the model named here, for this target. It is not a price, it ages "
    "as the model changes, and copies of a row are worth the same as the row."
)


def value_records(doc: Doc) -> Iterator[dict[str, Any]]:
    """The providers as one flat table."""
    lists = ("best", "worst", "duplicates", "leaks", "intervals")
    for provider in doc["providers"]:
        record = {name: value for name, value in provider.items() if name not in lists}
        for name, (low, high) in provider["intervals"].items():
            record |= {f"{name}_low": low, f"{name}_high": high}
        record |= {f"duplicates_{name}": count for name, count in provider["duplicates"].items()}
        yield record | {f"leaks_{name}": count for name, count in (provider["leaks"] or {}).items()}


def print_value(doc: Doc, console: Console) -> None:
    """The providers in order of value, what is wrong with their rows, the payments, and the best and worst rows."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    def say(text: str, style: str = "") -> None:
        console.print(Text(text, style=style))

    method = doc["method"]
    say(f"What {_plural(len(doc['providers']), 'provider')} would do for {_plural(doc['target']['queries'], 'query')}")
    console.print()
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    columns = _columns(doc["providers"], console.width)
    for name in columns:
        left = name == "provider"
        table.add_column(name, justify="left" if left else "right", no_wrap=True, overflow="ellipsis",
                         max_width=PROVIDER_WIDTH if left else None)  # fmt: skip
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*map(Text, cells))
    console.print(table)
    console.print()
    for line in _notes(doc):
        say(line)
    for name, title in (("best", "Worth most"), ("worst", "Worth least")):
        say(f"\n{title}", "bold")
        for row in doc["rows"][name]:
            head = f"{row['value']:+.4g}  {_line(row['id'])} ({_line(row['provider'] or row['source'] or '')})  "
            say(_clip(head + _line(row["text"]), console.width))
    console.print()
    say(f"value: {method['unit']}; positive = training on it lowers the queries' loss")
    say(CAUTION)


def _columns(providers: Sequence[Doc], width: int) -> dict[str, list[str]]:
    """The cells by column; on a narrow terminal without the columns that matter least."""
    columns = {
        "provider": [_line(p["provider"]) for p in providers],
        "rows": [f"{p['rows']:,}" for p in providers],
        "value": [_number(p["value"]) for p in providers],
        "interval": [f"{_number(p['low'])} to {_number(p['high'])}" for p in providers],
        "rank": [_rank(p) for p in providers],
        "positive": [f"{100 * p['positive']:.0f} %" for p in providers],
        "copies": [_copies(p) for p in providers],
        "leaks": ["-" if p["leaks"] is None else f"{p['leaks']['rows']:,}" for p in providers],
    }
    if any(p["payment"] is not None for p in providers):
        columns["paid"] = [p["payment"] or "" for p in providers]
    for name in ("positive", "leaks", "copies"):
        widths = {key: max(map(len, (key, *cells))) for key, cells in columns.items()}
        if sum(widths.values()) - max(0, widths["provider"] - PROVIDER_WIDTH) + 2 * len(widths) > width:
            del columns[name]
    return columns


def print_selection(card: Doc, console: Console) -> None:
    """A few lines about a data set that was selected; its card has the rest."""
    from rich.text import Text

    shares = ", ".join(f"{_line(name)} {count:,}" for name, count in card["providers"].items())
    for line in (
        f"{card['rows']:,} of {card['of']:,} rows, {card['tokens']:,} target tokens, in {card['file']}",
        f"mean value {card['value']:+.4g}, of all rows {card['value_of_all']:+.4g} ({card['method']['unit']})",
        f"below zero {card['below_zero']:,}; exact copies left out {card['copies_left_out']:,}; "
        f"rows that contain a query {card['leaks']:,}",
        f"by provider: {_clip(shares, 400)}",
        f"how it was chosen: {card['file']}.card.md",
    ):
        console.print(Text(line))


def print_student(doc: Doc, console: Console) -> None:
    """The ladder, what was kept of it, and from how many rows on it pays."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    f = doc["fidelity"]
    console.print(Text(f"{doc['student']}: fitted to {f['labels'] - f['held']:,} labels, measured on {f['held']:,}"))
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("rung", "held-out Spearman", "recall of best 5 %", "left-out Spearman", "ms a row"):
        table.add_column(name, justify="left" if name == "rung" else "right")
    for rung in doc["rungs"]:
        kept = " (kept)" if rung["rung"] == doc["rung"] else ""
        table.add_row(
            f"{rung['rung']}{kept}", f"{rung['spearman']:.2f}", f"{rung['recall']:.2f}", f"{rung['left_out']:.2f}",
            f"{1000 * rung['seconds_a_row']:.1f}",
        )  # fmt: skip
    console.print(table)
    for each in doc["skipped"]:
        console.print(Text(f"not climbed: {each['rung']} ({each['reason']})"))
    if doc["baseline"] is not None:
        own = doc["baseline"]
        console.print(Text(
            f"to beat, with gradients and no label: the small model's own LinFiK {own['spearman']:.2f}, "
            f"recall {own['recall']:.2f}"
        ))  # fmt: skip
    cost = doc["cost"]
    if cost is not None:
        pays = cost["break_even_rows"]
        console.print(Text(
            f"labelling a row costs {cost['ratio']:.3g} x scoring it with the small model"
            + (f": with its labels a student pays from {pays:,} rows on" if pays else "")
        ))  # fmt: skip
    verdict = "good enough to price by" if doc["priced"] else "too low to price by: more labels or a larger student"
    console.print(Text(f"held-out Spearman {f['spearman']:.2f}: {verdict}"))


def print_revealed(doc: Doc, console: Console) -> None:
    """One line about an answer to an audit."""
    from rich.text import Text

    console.print(Text(f"{len(doc['rows'])} rows in {doc['out']}, drawn from root {doc['root'][:16]}… by its seed"))


def print_audit(doc: Doc, console: Console) -> None:
    """`ok`, or every problem on a line of its own; then the providers, if the revealed rows have labels."""
    from rich.text import Text

    for problem in doc["errors"]:
        console.print(Text(problem))
    count = len(doc["errors"])
    sound = f"ok: {len(doc['revealed'])} of {doc['rows']:,} rows are what was committed"
    console.print(Text(sound if doc["ok"] else f"{count} problem{'s' * (count > 1)}"))
    for p in doc["providers"] or ():
        reach = f"{_number(p['low'])} to {_number(p['high'])}"
        console.print(
            Text(f"{_line(p['provider'])}: {_number(p['value'])} ({reach}), {p['audited']} of {p['rows']:,} audited")
        )


def _notes(doc: Doc) -> list[str]:
    """What stands under the table."""
    method, lines = doc["method"], []
    lines.append(f"interval: 95 %, over {INTERVALS[method['interval']]}")
    lines.append("rank: in brackets where it falls in 95 % of the draws; copies: rows beyond the first, near copies")
    lines.append("leaks: rows that contain a query")
    if doc["fidelity"] is not None:
        f = doc["fidelity"]
        lines.append(
            f"scored by a student: held-out Spearman {f['spearman']:.2f} on {f['held']} labels, recall of the best 5 % "
            f"{f['recall']:.2f}"
        )
    money = doc["payments"]
    if money is not None and money["refused"] is not None:
        lines.append(f"no payment of {money['budget']}: {money['refused']}")
    elif money is not None:
        lines.append(f"paid: {money['budget']} by {money['rule'].replace('_', ' ')}")
        for name, split in money["splits"].items():
            lines.append(f"  {name.replace('_', ' ')}: " + ", ".join(f"{k} {v}" for k, v in split.items()))
        for name in ("purchase", "mechanism"):
            if name in money:
                bought = ", ".join(f"{k} {v}" for k, v in money[name]["payments"].items()) or "nothing"
                lines.append(f"  {name}: {bought}; {money[name]['left']} left")
    return lines


def write_html(doc: Doc, path: str) -> None:
    """The report as one HTML file, whole or not at all; CorruptError when it cannot be written."""
    write_file(path, html_page(doc).encode())


STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #888; --mark: #2a6fdb; --bad: #c0392b; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; } th, td { padding: .3rem .6rem; text-align: right; }
th { border-bottom: 2px solid var(--line); font-weight: 600; } td { border-bottom: 1px solid var(--line); }
th:first-child, td:first-child, .text { text-align: left; } td { white-space: nowrap; }
td.text { max-width: 40rem; white-space: normal; overflow-wrap: anywhere; } li { list-style: none; } ul { padding: 0; }
.soft { color: var(--soft); } .bad { color: var(--bad); } .wide { overflow-x: auto; }
svg { display: block; width: 9rem; height: 1rem; margin-left: auto; }
svg rect { fill: var(--mark); opacity: .35; } svg circle { fill: var(--mark); }
svg line { stroke: var(--soft); } dt { font-weight: 600; } dd { margin: 0 0 .5rem; overflow-wrap: anywhere; }
details { margin: .5rem 0; } summary { cursor: pointer; }
"""


def html_page(doc: Doc) -> str:
    """The whole page; every text in it is escaped."""
    providers, method = doc["providers"], doc["method"]
    lows, highs = [p["low"] for p in providers], [p["high"] for p in providers]
    span = (min([0.0, *lows]), max([0.0, *highs]))
    head = ("provider", "rows", "tokens", "value", "95 % interval", "payment", "total", "per token", "positive")
    head += ("rank", "copies within / across", "leaks")
    rows = [
        [
            _esc(p["provider"]), f"{p['rows']:,}", f"{p['tokens']:,}", _number(p["value"]), _bar(p, span),
            _esc(p["payment"] or "-"), _number(p["total"]), "-" if p["per_token"] is None else _number(p["per_token"]),
            f"{100 * p['positive']:.0f} %", _rank(p), _both(p), _leak(p),
        ]
        for p in providers
    ]  # fmt: skip
    parts = [
        f"<h1>What the data is worth to {_plural(doc['target']['queries'], 'query')}</h1>",
        f'<p class="soft">{_esc(CAUTION)}</p>',
        f'<div class="wide">{_table(head, rows)}</div>',
        "<ul>" + "".join(f"<li>{_esc(line)}</li>" for line in _notes(doc)) + "</ul>",
        "<h2>Rows</h2>",
        *(_listing(title, doc["rows"][name]) for name, title in (("best", "Worth most"), ("worst", "Worth least"))),
        "<h2>By provider</h2>",
        *(
            f"<details><summary>{_esc(p['provider'])}</summary>{_listing('Worth most', p['best'])}"
            f"{_listing('Worth least', p['worst'])}</details>"
            for p in providers
        ),
        "<h2>What this rests on</h2>",
        _facts({"target": doc["target"]["file"], "target digest": doc["target"]["digest"], **method,
                **(doc["fidelity"] or {}), "date": doc["date"]}),
    ]  # fmt: skip
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Value of data</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _bar(p: Doc, span: tuple[float, float]) -> str:
    """The interval drawn on the axis that all providers share, with the zero line."""
    width = span[1] - span[0] or 1.0

    def at(value: float) -> float:
        return 2 + 96 * (value - span[0]) / width

    low, high = at(p["low"]), at(p["high"])
    return (
        f'<svg viewBox="0 0 100 10" preserveAspectRatio="none" role="img"><title>{_number(p["low"])} to '
        f'{_number(p["high"])}</title><line x1="{at(0.0):.2f}" x2="{at(0.0):.2f}" y1="0" y2="10" stroke-width=".4"/>'
        f'<rect x="{low:.2f}" y="3" width="{max(0.6, high - low):.2f}" height="4"/>'
        f'<circle cx="{at(p["value"]):.2f}" cy="5" r="1.6"/></svg> '
        f"{_number(p['low'])} to {_number(p['high'])}"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{_esc(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def _listing(title: str, rows: Sequence[Doc]) -> str:
    body = "".join(
        f"<tr><td>{_esc(row['id'])}</td><td>{row['value']:+.4g}</td>"
        f'<td class="text">{_esc(row["provider"] or "-")}</td>'
        f'<td class="text">{_esc(_clip(_line(row["text"]), 400))}</td></tr>'
        for row in rows
    )
    top = '<th>id</th><th>value</th><th class="text">provider</th><th class="text">text</th>'
    return f"<p>{_esc(title)}</p><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def _facts(values: Mapping[str, Any]) -> str:
    return "<dl>" + "".join(f"<dt>{_esc(k)}</dt><dd>{_esc(v)}</dd>" for k, v in values.items()) + "</dl>"


def _rank(p: Doc) -> str:
    return f"{p['rank']} ({p['rank_low']}-{p['rank_high']})"


def _copies(p: Doc) -> str:
    return f"{p['duplicates']['near_within']:,}" if p["duplicates"] else "-"


def _both(p: Doc) -> str:
    d = p["duplicates"]
    return f"{d['near_within']:,} / {d['near_across']:,}" if d else "-"


def _leak(p: Doc) -> str:
    if p["leaks"] is None:
        return "-"
    return f'<span class="{"bad" if p["leaks"]["rows"] else ""}">{p["leaks"]["rows"]:,}</span>'


def _number(value: float) -> str:
    return f"{value:+.3g}"


def _plural(count: int, noun: str) -> str:
    many = noun[:-1] + "ies" if noun.endswith("y") else noun + "s"
    return f"{count:,} {noun if count == 1 else many}"


def _esc(value: object) -> str:
    return html.escape(_line(value))


def _line(value: object) -> str:
    """One line, without the control characters by which a training text could steer a terminal."""
    return "".join(c if c.isprintable() else " " for c in " ".join(str(value).split()))


def _clip(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(1, width - 1)] + "…"

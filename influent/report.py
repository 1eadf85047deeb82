"""Results as people read them, as JSON, and as a Parquet or CSV file. The documents themselves come from methods.py.

Does: tables that read well in 80 and in 120 columns, without colour codes when piped. Does not: compute anything, or
write to standard output on its own: every page goes to the Rich console given.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

from influent.methods import METHODS

Doc = Mapping[str, Any]
SIGN = "positive = training on it lowered this loss"
ASIDE_ROWS = 3  # rows shown of the bottom and of each baseline; JSON and files have them all
FIELDS = ("query", "list", "rank", "row", "id", "score", "percentile", "source", "provider", "text")


def json_text(doc: object, *, ascii_only: bool = False) -> str:
    """One JSON document on one line, fields in the document's order; ValueError for a number that JSON cannot hold."""
    return json.dumps(doc, ensure_ascii=ascii_only, allow_nan=False)


def print_query(doc: Doc, console: Console) -> None:
    """Per query: what was asked, the rows that pushed towards and away from it, and the two baselines beside them."""
    baselines = doc.get("baselines", {})
    for number, query in enumerate(doc["queries"]):
        if number:
            console.print()
        _line(console, f"Query {query.get('query', number) + 1} of {len(doc['queries'])}", style="bold")
        for name in ("prompt", "completion", "text", "messages"):
            if query.get(name):
                _line(console, f"  {name + ':':<12}{_clip(_words(query[name]), console.width - 16)}")
        # In a small index the k highest scores reach below zero: a heading must not call those a push towards it.
        towards = [row for row in query["top"] if row["score"] > 0]
        _rows(console, "Pushed the model towards it", towards, lines=2)
        away = [row for row in query.get("bottom", []) if row["score"] < 0]
        if away:
            _rows(console, "Pushed the model away from it", away[:ASIDE_ROWS])
        if "bm25" in baselines:
            best = baselines["bm25"][number]
            shared = len({row["row"] for row in best} & {row["row"] for row in towards})
            title = f"For comparison, sharing words with it (BM25; {shared} of its {len(best)} are in the first table)"
            _rows(console, title, best[:ASIDE_ROWS], score="BM25")
        if "random" in baselines:
            _rows(console, "For comparison, rows drawn at random", baselines["random"][number][:ASIDE_ROWS])
    console.print()
    _line(console, f"score: {doc.get('sign', SIGN)}; percentile: share of all rows that score lower.")
    _method(console, doc.get("method", {}))
    _skipped(console, doc.get("skipped", {}))


def print_self(doc: Doc, console: Console) -> None:
    """The rows that the model depends on most to predict themselves."""
    _rows(console, "Most self-influence (outliers, mislabelled or poisoned rows come first)", doc["rows"], lines=2)
    _method(console, doc.get("method", {}))


def print_info(doc: Doc, console: Console) -> None:
    """One page about an index: what it holds, of which model, what it cost, and what was fitted to it."""
    rows = [
        ("index", doc.get("path")),
        ("checkpoints", f"{doc['members']}, an index each; {_weights(doc)}" if "members" in doc else None),
        ("model", doc.get("model") or doc.get("notes", {}).get("model")),
        ("data", doc.get("data") or doc.get("notes", {}).get("data")),
        ("rows", f"{doc['rows']:,}"),
        ("layers", f"{doc['layers']:,}{_coverage(doc)}"),
        ("compressor", doc["compress"]),
        ("stored as", _stored(doc)),
        ("size", f"{_bytes(doc['bytes'])}, {_bytes(doc['bytes_per_row'])} per row"),
        ("skipped", ", ".join(f"{n:,} {why}" for why, n in doc["skipped"].items()) or "nothing"),
        ("digest", doc["digest"]),
    ]
    table = _grid()
    for name, value in rows:
        if value is not None:
            table.add_row(name, _plain(str(value)))
    for number, fitted in enumerate(doc["curvatures"]):
        table.add_row("" if number else "curvatures", _plain(_curvature(fitted)))
    if not doc["curvatures"]:
        own = METHODS.get(str(doc.get("notes", {}).get("method")))
        needs = own is None or own.curvature != "identity"
        makes = "none fitted yet: `influent fit`, or the first `influent query`, makes one"
        table.add_row("curvatures", makes if needs else "none, and a query by this index's method needs none")
    console.print(table)
    for fitted in doc["curvatures"]:
        if fitted.get("health") and not fitted.get("stale"):
            _spectrum(console, fitted, (doc.get("captured") or {}).get("blocks", {}))


def _spectrum(console: Console, fitted: Doc, energy: Doc) -> None:
    """The health of one fit, layers of one name together: medians, of eigenvalues as shares of the trace."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    kinds: dict[str, list[tuple[Doc, Doc]]] = {}
    for name, block in fitted["health"].items():
        kinds.setdefault(name.rpartition(".")[2], []).append((block, energy.get(name, {})))
    console.print()
    _line(console, f"Health of {fitted.get('name')}: medians over the layers of each name", style="bold")
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    columns = ("layer", "count", "lambda", "d_eff", "eigenvalues, % of trace", "kept %", "row energy %")
    for column in columns:
        table.add_column(column, justify="left" if column == "layer" else "right")
    for kind, blocks in kinds.items():
        top = [[100 * value / b["trace"] for value in b["top"]] for b, _ in blocks if b.get("top") and b.get("trace")]
        shares = ", ".join(
            f"{statistics.median([t[i] for t in top]):.2g}" for i in range(min(map(len, top), default=0))
        )
        kept = [100 * b["captured"] for b, _ in blocks if b.get("captured") is not None]
        energies = [100 * e["mean"] for _, e in blocks if e]
        table.add_row(
            _plain(kind), str(len(blocks)), f"{statistics.median([b['lambda'] for b, _ in blocks]):.3g}",
            f"{statistics.median([b['d_eff'] for b, _ in blocks]):.3g}", shares or "-",
            f"{statistics.median(kept):.0f}" if kept else "-",
            f"{statistics.median(energies):.0f}" if energies else "-",
        )  # fmt: skip
    console.print(table)


def print_fit(doc: Doc, console: Console) -> None:
    """One line about a fitted curvature."""
    _line(console, f"fitted {_curvature(doc)}")


def print_mask(doc: Doc, console: Console) -> None:
    """How much better than chance the entries agree that a learned mask keeps, in the mean over its layers."""
    learned = [block for block in doc["blocks"] if "held" in block]
    _line(console, f"{doc['path']}: a mask of {doc['size']}, {len(doc['blocks'])} layers, {doc['rows']:,} rows")
    if learned:
        held, chance = (sum(block[name] for block in learned) / len(learned) for name in ("held", "random"))
        _line(console, f"inner products agree at {held:.3f} on pairs held out; with random masks at {chance:.3f}")
    _line(console, f'use it: influent index … --compress "select:{doc["path"]}"')


def print_verify(doc: Doc, console: Console) -> None:
    """`ok`, or every problem on a line of its own."""
    for problem in doc["errors"]:
        _line(console, problem)
    count = len(doc["errors"])
    _line(
        console, "ok: every committed byte is as it was written" if doc["ok"] else f"{count} problem{'s' * (count > 1)}"
    )


def query_records(doc: Doc) -> Iterator[dict[str, Any]]:
    """The rows of a query document as one flat table, baselines included; its columns are FIELDS."""
    for number, query in enumerate(doc["queries"]):
        lists = {"top": query["top"], "bottom": query.get("bottom", [])}
        lists |= {name: found[number] for name, found in doc.get("baselines", {}).items()}
        for name, rows in lists.items():
            for rank, row in enumerate(rows, 1):
                yield {"query": number, "list": name, "rank": rank, **{f: row.get(f) for f in FIELDS[3:]}}


def self_records(doc: Doc) -> Iterator[dict[str, Any]]:
    """The rows of a self-influence document as one flat table."""
    for rank, row in enumerate(doc["rows"], 1):
        yield {"rank": rank, **{name: row.get(name) for name in ("row", "id", "score", "source", "provider", "text")}}


def _rows(console: Console, title: str, rows: Sequence[Doc], *, lines: int = 1, score: str = "score") -> None:
    """One list of rows; the text takes what width the other columns leave, `lines` lines of it."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    console.print()
    _line(console, title, style="bold")
    if not rows:
        _line(console, "  none")
        return
    names = [_name(row) for row in rows]
    heading = "id, source" if lines > 1 else "id"
    longest = max(len(part) for pair in names for part in (*pair[:lines], heading))
    scores = [f"{row['score']:+.4g}" if score == "score" else f"{row['score']:.2f}" for row in rows]
    widths = {"rank": 4, score: max(len(score), *map(len, scores))}
    if any(row.get("percentile") is not None for row in rows):
        widths["pct"] = 6
    widths[heading] = min(32 if console.width >= 110 else 16, longest)
    gaps = 2 * len(widths)
    widths["text"] = max(16, console.width - sum(widths.values()) - gaps)
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for name, width in widths.items():
        number = name in ("rank", score, "pct")
        table.add_column(name, width=width, no_wrap=True, justify="right" if number else "left", overflow="ellipsis")
    for rank, (row, shown, pair) in enumerate(zip(rows, scores, names, strict=True), 1):
        label = "\n".join(part for part in pair[:lines] if part)
        cells = [str(rank), shown, *([f"{row['percentile']:.2f}"] if "pct" in widths else [])]
        table.add_row(*cells, _plain(label), _clip_lines(console, _words(row.get("text") or ""), widths["text"], lines))
    console.print(table)


def _name(row: Doc) -> tuple[str, str]:
    name, source = _words(row["id"]), _words(row.get("source") or "")
    return name, "" if source == name else source


def _words(value: object) -> str:
    """Text on one line, without the control characters by which a training example could steer a terminal."""
    if isinstance(value, list):
        value = " ".join(f"{turn['role']}: {turn['content']}" for turn in value)
    return "".join(c if c.isprintable() else " " for c in " ".join(str(value).split()))


def _plain(text: str) -> Any:
    from rich.text import Text

    return Text(text)  # a str would be read as markup, and a training text may hold brackets


def _line(console: Console, text: str, *, style: str = "") -> None:
    from rich.text import Text

    console.print(Text(text, style=style))


def _clip(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(1, width - 1)] + "…"


def _clip_lines(console: Console, text: str, width: int, lines: int) -> Any:
    from rich.text import Text

    head = Text(text[: 4 * width * lines])  # wrapping a whole book to show two lines of it is slow
    wrapped = list(head.wrap(console, width))
    shown = Text("\n").join(wrapped[:lines])
    if len(wrapped) > lines:
        last = wrapped[lines - 1]
        last.rstrip()
        last.truncate(width - 1)
        shown = Text("\n").join([*wrapped[: lines - 1], last + Text("…")])
    return shown


def _method(console: Console, method: Doc) -> None:
    parts = [f"{name} {_short(value)}" for name, value in method.items() if not isinstance(value, Mapping | list)]
    if parts:
        _line(console, f"method: {', '.join(parts)}")
    health = method.get("health")
    if health:
        _line(console, f"curvature: {_health(health)}")


def _skipped(console: Console, skipped: Doc) -> None:
    counts = ", ".join(f"{count:,} {why}" for why, count in skipped.items())
    _line(console, f"rows skipped when indexing: {counts or 'none'}")


def _health(health: Any) -> str:
    """The range over blocks of lambda and of the effective dimension d_eff."""
    blocks = list(health.values()) if isinstance(health, Mapping) else list(health)
    parts = []
    for name in ("lambda", "d_eff"):
        values = [block[name] for block in blocks if block.get(name) is not None]
        if values:
            parts.append(f"{name} {_short(min(values))} to {_short(max(values))}")
    return f"{', '.join(parts) or 'identity'} over {len(blocks)} layer{'s' * (len(blocks) != 1)}"


def _curvature(fitted: Doc) -> str:
    name = str(fitted.get("name") or fitted.get("curvature"))
    dampened = fitted.get("damping") and str(fitted["damping"]) not in name
    health = fitted.get("health")
    stale = f" (stale: has seen {100 * fitted['seen']:.0f} % of the rows)" if fitted.get("stale") else ""
    return f"{name}{', damping ' + str(fitted['damping']) if dampened else ''}{stale}" + (
        f": {_health(health)}" if health else ""
    )


def _stored(doc: Doc) -> str:
    """The row codec, and what a rank cut kept of the rows' energy."""
    codec = f"dense {doc['dtype']}" if doc["codec"] == "dense" else doc["codec"]
    captured = doc.get("captured")
    if captured is None:
        return codec
    least = min(captured["blocks"].items(), key=lambda item: item[1]["mean"])
    kept = f"{100 * captured['mean']:.0f} % of the rows' energy kept, least in {least[0]}"
    seen = f"; {captured['rows']:,} rows looked at" if 2 * captured["rows"] < doc["rows"] else ""
    return f"{codec}, {kept} ({100 * least[1]['mean']:.0f} %){seen}"


def _weights(doc: Doc) -> str:
    if len(set(doc["weights"])) == 1:
        return f"scores are added up with the weight {doc['weights'][0]:.4g}"
    return "scores are added up with the weights " + ", ".join(f"{weight:.4g}" for weight in doc["weights"])


def _coverage(doc: Doc) -> str:
    share = doc.get("coverage", doc.get("summary", {}).get("coverage"))
    return "" if share is None else f", {100 * share:.1f} % of the model's parameters"


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _bytes(count: int | float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def _grid() -> Table:
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    return table

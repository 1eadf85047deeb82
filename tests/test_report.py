"""Pages in 80 and 120 columns, JSON, files; what a training text must not do to a terminal."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from rich.cells import cell_len
from rich.console import Console

from influent import report, tables
from influent.errors import CorruptError

TEXT = "The capital of Malawi is Lilongwe,\nwhich replaced Zomba in 1975. " + "It lies on the Lilongwe River. " * 20


def row(number: int, score: float, **changes: Any) -> dict[str, Any]:
    base = {"row": number, "id": f"malawi/{number}", "score": score, "percentile": 99.95 - number}
    return base | {"text": TEXT, "source": "facts.jsonl", "provider": None} | changes


def document(queries: int = 2) -> dict[str, Any]:
    top = [row(4, 1234.56), row(1, 0.00123), row(2, -1e-9, text="短い日本語のテキスト" * 20)]
    one = {
        "prompt": "What is the capital of Malawi?",
        "completion": " Lilongwe",
        "top": top,
        "bottom": [row(9, -3.25)] * 5,
    }
    bm25 = {k: v for k, v in row(4, 12.3456).items() if k != "percentile"}
    return {
        "queries": [{"query": number} | one for number in range(queries)],
        "method": {
            "name": "factgrass",
            "curvature": "fim",
            "damping": "relative:0.1",
            "health": {"a": {"lambda": 1e-5, "d_eff": 12.3}, "b": {"lambda": 3e-3, "d_eff": 80.0}},
        },
        "baselines": {"bm25": [[bm25]] * queries, "random": [[row(7, 0.3)] * 4] * queries},
        "skipped": {"empty": 3},
        "sign": "positive = training on it lowered this loss",
    }


def page(show: Any, doc: dict[str, Any], width: int = 80) -> str:
    out = io.StringIO()
    show(doc, Console(file=out, width=width, highlight=False))
    return out.getvalue()


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_a_query_page_fits_its_terminal_and_says_what_the_numbers_mean(width: int) -> None:
    text = page(report.print_query, document(), width)
    assert all(cell_len(line) <= width for line in text.splitlines())
    flat = " ".join(text.split())
    for part in ("Query 2 of 2", "What is the capital of Malawi?", "Lilongwe", "+1235", "-3.25", "12.35", "95.95"):
        assert part in flat
    for part in ("positive = training on it lowered this loss", "BM25; 1 of its 1 are in the first table", "at random"):
        assert part in flat
    for part in ("lambda 1e-05 to 0.003, d_eff 12.3 to 80 over 2 layers", "rows skipped when indexing: 3 empty"):
        assert part in flat
    assert "\x1b" not in text


def test_a_row_takes_two_lines_and_asides_three_rows(width: int = 80) -> None:
    lines = page(report.print_query, document(1), width).splitlines()
    first = next(i for i, line in enumerate(lines) if "+1235" in line)
    assert "malawi/4" in lines[first]
    assert "facts.jsonl" in lines[first + 1]
    assert "…" in lines[first + 1]
    assert "+0.00123" in lines[first + 2]
    assert sum("-3.25" in line for line in lines) == report.ASIDE_ROWS


def test_a_training_text_cannot_steer_the_terminal() -> None:
    doc = document(1)
    doc["queries"][0]["top"] = [
        row(1, 1.0, text="[bold red]x[/] \x1b[2Jgone\x07 \u202eevil\r", id="[/bold]\x1b]0;t\x07")
    ]
    doc["queries"][0]["completion"] = "\x1b[31m"
    text = page(report.print_query, doc)
    assert "[bold red]x[/]" in text
    assert not {"\x1b", "\x07", "\u202e", "\r"} & set(text)


def test_no_rows_and_no_extras() -> None:
    doc = {
        "queries": [{"query": 0, "top": [], "bottom": []}],
        "method": {},
        "baselines": {"bm25": [[]], "random": [[]]},
    }
    text = page(report.print_query, doc)
    assert text.count("none") == 4
    assert report.SIGN in " ".join(text.split())
    chat = document(1)
    chat["queries"][0]["messages"] = [{"role": "user", "content": "hi"}]
    assert "user: hi" in page(report.print_query, chat)


INFO = {
    "path": "facts-index",
    "rows": 1234,
    "bytes": 5 << 20,
    "bytes_per_row": 4096.0,
    "layers": 210,
    "coverage": 0.7891,
    "compress": "mask:128x128 | sjlt:4096",
    "codec": "dense",
    "dtype": "float32",
    "skipped": {"empty": 3},
    "digest": "blake2b-256:" + "a" * 64,
    "notes": {"model": "models/tiny"},
    "curvatures": [{"name": "fim:relative:0.1", "health": {"a": {"lambda": 1e-5, "d_eff": 12.3}}}],
}


@pytest.mark.parametrize("width", [80, 120])
def test_the_info_page(width: int) -> None:
    text = page(report.print_info, INFO, width)
    assert all(cell_len(line) <= width for line in text.splitlines())
    for part in (
        "1,234",
        "210, 78.9 % of the model's parameters",
        "5.0 MiB, 4.0 KiB per row",
        "3 empty",
        "models/tiny",
    ):
        assert part in text
    assert "fim:relative:0.1: lambda 1e-05 to 1e-05, d_eff 12.3 to 12.3 over 1 layer" in " ".join(text.split())
    bare = page(report.print_info, INFO | {"curvatures": [], "skipped": {}})
    assert "none fitted yet" in bare
    plain = page(report.print_info, INFO | {"curvatures": [], "notes": {"method": "linfik"}}, 100)
    assert "none, and a query by this index's method needs none" in plain
    assert "skipped     nothing" in bare


def test_verify_and_self_pages() -> None:
    assert page(report.print_verify, {"ok": True, "errors": []}).startswith("ok")
    bad = page(
        report.print_verify, {"ok": False, "errors": ["shards/000001.safetensors: hash", "catalog.parquet: [x]"]}
    )
    assert bad.splitlines() == ["shards/000001.safetensors: hash", "catalog.parquet: [x]", "2 problems"]
    text = page(report.print_self, {"rows": [row(1, 2.5), row(2, 0.5)]})
    assert "+2.5" in text
    assert "malawi/2" in text


def test_json_is_one_line_and_refuses_what_json_cannot_hold() -> None:
    text = report.json_text(document())
    assert "\n" not in text
    assert json.loads(text) == document()
    assert "短" in text
    assert report.json_text({"a": "短"}, ascii_only=True) == '{"a": "\\u77ed"}'
    with pytest.raises(ValueError, match="Out of range float"):
        report.json_text({"score": float("nan")})


def test_parquet_and_csv_hold_every_row(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    records = list(report.query_records(document()))
    assert len(records) == 2 * (3 + 5 + 1 + 4)
    assert tuple(records[0]) == report.FIELDS
    tables.write_table(records, str(tmp_path / "r.parquet"))
    assert pq.read_table(tmp_path / "r.parquet").to_pylist() == records
    tables.write_table(records, str(tmp_path / "r.csv"))
    with (tmp_path / "r.csv").open(newline="", encoding="utf-8") as file:
        back = list(csv.DictReader(file))
    assert [r["text"] for r in back] == [r["text"] for r in records]
    assert float(back[0]["score"]) == records[0]["score"]
    selves = list(report.self_records({"rows": [row(1, 2.5)]}))
    tables.write_table(selves, str(tmp_path / "s.csv"))
    assert selves[0]["rank"] == 1
    tables.write_table([], str(tmp_path / "empty.parquet"), columns=report.FIELDS)
    assert pq.read_table(tmp_path / "empty.parquet").num_rows == 0
    with pytest.raises(CorruptError, match="cannot be written"):
        tables.write_table(records, str(tmp_path / "r.csv" / "no.csv"))


SCHEMAS = Path(__file__).parent.parent / "docs" / "schemas"
DOCUMENTS = {
    "query": document(),
    "info": INFO,
    "self": {"rows": [row(1, 2.5)]},
    "verify": {"ok": False, "errors": ["x"]},
    "mask": {
        "path": "m", "size": "4x4", "scope": "block", "rows": 64, "digest": "blake2b-256:" + "0" * 64,
        "blocks": [{"block": "0", "kept": {"in": 4, "out": 2}, "held": 0.9, "random": 0.7, "fit": 1, "step": 3}],
    },
}  # fmt: skip


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_schemas_are_schemas_and_describe_these_documents(name: str) -> None:
    schema = json.loads((SCHEMAS / f"{name}.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(DOCUMENTS[name], schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({}, schema)


def test_the_schemas_refuse_wrong_documents() -> None:
    for change in ({"queries": []}, {"baselines": {"bm25": []}}, {"sign": 1}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(document() | change, json.loads((SCHEMAS / "query.json").read_text()))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"ok": True, "errors": ["x"]}, json.loads((SCHEMAS / "verify.json").read_text()))

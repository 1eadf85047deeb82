"""Data that cannot be rows is refused in one line, by file and line."""

from pathlib import Path

import pytest

from influent.catalog import build
from influent.errors import DataError
from influent.storage import Store

BAD: list[tuple[str, bytes, str]] = [
    ("d.jsonl", b'{"text": "a"}\n\xff\n', r"d\.jsonl:2: not UTF-8: got byte 0xff at column 1"),
    ("d.jsonl", b'{"text": "a"}\n\n{"text": \n', r"d\.jsonl:3: not JSON"),
    ("d.jsonl", b'{"text": "a"\n{"text": "b"}\n', r"d\.jsonl:1: not JSON \(.* at column 13\)"),
    ("d.jsonl", b'{"text": "a"\r\n{"text": "b"}\r\n', r"d\.jsonl:1: not JSON \(.* at column 13\)"),
    ("d.jsonl", b"[" * 100_000, r"d\.jsonl:1: not JSON"),
    ("d.jsonl", b'["text"]', r"d\.jsonl:1: expected a JSON object per line, got a list"),
    ("d.json", b"[\n{}\n]", r"d\.json:1: not JSON"),
    ("d.jsonl", b'{"content": "x"}', r'd\.jsonl:1: expected "text", .*, got "content"'),
    ("d.jsonl", b"{}", r"got no field"),
    ("d.jsonl", b'{"prompt": "x"}', r'got "prompt"'),
    ("d.jsonl", b'{"text": null}', r'got "text" \(null\)'),
    ("d.jsonl", b'{"text": 3}', r'd\.jsonl:1: expected a string in "text", got a number'),
    ("d.jsonl", b'{"prompt": "x", "completion": ["y"]}', r'expected a string in "completion", got a list'),
    ("d.jsonl", b'{"text": "x", "messages": []}', r"got both text and messages; keep"),
    ("d.jsonl", b'{"messages": "x"}', r'expected a list in "messages", got a string'),
    ("d.jsonl", b'{"messages": ["x"]}', r'message 1: expected an object with "role" and "content"'),
    ("d.jsonl", b'{"messages": [{"role": "user"}]}', r'message 1: expected "content" as a string, got null'),
    ("d.jsonl", b'{"text": "x", "id": 1.5}', r'expected a string or an integer in "id", got a number'),
    ("d.jsonl", b'{"text": "x", "provider": true}', r'in "provider", got a boolean'),
    ("d.jsonl", b'{"text": "a\\ud800"}', r'd\.jsonl:1: "text" holds half a surrogate pair at character 1'),
    ("d.jsonl", b'{"text": "a", "id": "x"}\n{"text": "b"}\n{"text": "c", "id": "x"}', r'jsonl:3: id "x" .*jsonl:1;'),
    ("d.jsonl", b'{"text": "a", "id": 1}\n{"text": "b"}', r'd\.jsonl:2: id "1" repeats that of .*d\.jsonl:1;'),
    ("d.jsonl", b"", r"the data set is empty: no record can be a row \(there is no record\)"),
    ("d.jsonl", b'{"text": ""}', r"the data set is empty: .* \(1 empty\)"),
    ("d.csv", b"text,id\na,1\nb\n", r"d\.csv:3: expected 2 columns as in the header, got 1"),
    ("d.csv", b"text\n\xe9\n", r"d\.csv:2: not UTF-8"),
    ("d.csv", b'text\n"a\n', r"d\.csv:2: not CSV"),
    ("d.csv", b"a,b\n1,2\n", r'd\.csv:2: expected "text"'),
    ("d.parquet", b"nonsense", r"d\.parquet: not a readable Parquet file"),
    ("d.arrow", b"nonsense", r"d\.arrow: not a readable Arrow file"),
    ("d.txt", b"a\n\nb\xff", r"d\.txt:3: not UTF-8: got byte 0xff at column 2"),
    ("d.xlsx", b"PK", r"d\.xlsx: unknown kind of data file; expected one of \.jsonl"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD)
def test_bad_data_is_one_line_with_file_and_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    store = Store(tmp_path / "index")
    with pytest.raises(DataError, match=message) as caught:
        build(tmp_path / name, store)
    assert "\n" not in str(caught.value)
    assert store.names() == []


def test_bad_columns_and_bad_utf8_in_columnar_files(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "d.parquet")
    with pytest.raises(DataError, match="expected columns .*, got body"):
        build(tmp_path / "d.parquet", Store(tmp_path / "index"))
    latin = pa.array([b"ok", b"\xe9"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": latin}), tmp_path / "e.parquet")
    with pytest.raises(DataError, match=r"e\.parquet:2: not UTF-8"):
        build(tmp_path / "e.parquet", Store(tmp_path / "index"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("./nowhere.jsonl", "no such file or folder"),
        ("nowhere.jsonl", "no such file or folder"),
        ("memory://nowhere/data.jsonl", "cannot be read"),
        ([{"text": "a"}, "b"], "record 2: expected a mapping"),
        (3, "expected a path, a data set or an iterable"),
    ],
)
def test_bad_arguments(tmp_path: Path, data: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        build(data, Store(tmp_path / "index"))


def test_empty_folders_and_split_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the folder holds no data file"):
        build(tmp_path, Store(tmp_path / "index"))
    (tmp_path / "dataset_dict.json").write_text("{}")
    with pytest.raises(DataError, match="several splits"):
        build(tmp_path, Store(tmp_path / "index"))

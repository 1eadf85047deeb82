"""Reading every kind of data, refusing every kind of bad record by file and line, and what the catalog keeps."""

import hashlib
import json
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from influent.catalog import Catalog, build, build_from_ids, content_hash
from influent.errors import CorruptError, DataError, FormatError, MismatchError, SpecError
from influent.records import is_hub_name, read_examples
from influent.storage import Store

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
RECORDS: list[dict[str, Any]] = [
    {"text": "naïve\nlines", "id": "a", "source": "s", "provider": "p"},
    {"prompt": "Capital of France?", "completion": "Paris", "id": 7},
    {"messages": CHAT, "note": "ignored"},
]
CONTENTS = [{"text": "naïve\nlines"}, {"prompt": "Capital of France?", "completion": "Paris"}, {"messages": CHAT}]


def jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Store(str(tmp_path / "index") if request.param == "local" else f"memory://{tmp_path.name}")


@pytest.mark.parametrize("keep", ["text", "reference"])
def test_a_catalog_gives_back_what_was_read(tmp_path: Path, store: Store, keep: Any) -> None:
    data = jsonl(tmp_path / "data.jsonl", RECORDS)
    built = build(str(data), store, keep=keep)
    for catalog in (built, Catalog.open(store)):
        assert catalog.n == 3
        assert catalog.examples(0, 3) == CONTENTS
        assert catalog.example(1) == CONTENTS[1]
        assert catalog.describe([2, 0]) == [
            {"row": 2, "id": "2", "source": "data.jsonl", "provider": None, "text": "user: hi\nassistant: yo"},
            {"row": 0, "id": "a", "source": "s", "provider": "p", "text": "naïve\nlines"},
        ]
        assert list(catalog.texts()) == ["naïve\nlines", "Capital of France? Paris", "user: hi\nassistant: yo"]
        assert catalog.where(1) == f"{data}:2"
        assert catalog.verify() == []


def test_reference_mode_stores_no_text(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    store = Store(tmp_path / "index")
    build(jsonl(tmp_path / "data.jsonl", RECORDS), store, keep="reference")
    table = pq.read_table(tmp_path / "index" / "catalog.parquet").to_pydict()
    assert table["text"] == table["example"] == [None] * 3
    assert table["ref"][0] == f"{tmp_path / 'data.jsonl'}:0"


def test_the_digest_is_the_documented_rule_and_blind_to_the_container(tmp_path: Path) -> None:
    hasher = hashlib.blake2b(digest_size=32)
    for content, name in zip(CONTENTS, ("a", "7", "2"), strict=True):
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        hasher.update(hashlib.blake2b(text.encode(), digest_size=16).digest())
        hasher.update(struct.pack("<I", len(name)) + name.encode())
    expected = f"blake2b-256:{hasher.hexdigest()}"
    data = jsonl(tmp_path / "data.jsonl", RECORDS)
    assert build(data, Store(tmp_path / "a")).digest == expected
    assert build(data, Store(tmp_path / "b"), keep="reference").digest == expected
    assert build(RECORDS, Store(tmp_path / "c")).digest == expected
    assert build(iter(RECORDS), Store(tmp_path / "d")).digest == expected
    assert build(RECORDS[:2], Store(tmp_path / "e")).digest != expected
    assert build([RECORDS[1], RECORDS[0], RECORDS[2]], Store(tmp_path / "f")).digest != expected


def test_limit_counts_rows_and_skips_are_counted_with_their_places(tmp_path: Path) -> None:
    records = [{"text": " "}, {"text": "a"}, {"prompt": "x", "completion": ""}, {"messages": CHAT[:1]}, {"text": "b"}]
    data = jsonl(tmp_path / "data.jsonl", [*records, {"text": "c"}])
    catalog = build(data, Store(tmp_path / "index"), limit=2)
    assert list(catalog.texts()) == ["a", "b"]
    assert catalog.skipped == {"empty": 2, "no assistant message": 1}
    assert catalog.skipped_at == {"empty": [f"{data}:1", f"{data}:3"], "no assistant message": [f"{data}:4"]}
    assert [e.skip for e in read_examples(data)] == ["empty", None, "empty", "no assistant message", None, None]


def parquet(path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(COLUMNAR), path)


def arrow_stream(path: Path) -> None:
    import pyarrow as pa

    table = pa.Table.from_pylist(COLUMNAR)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def arrow_file(path: Path) -> None:
    import pyarrow as pa

    table = pa.Table.from_pylist(COLUMNAR)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


COLUMNAR = [{"prompt": 'a "b",\nc', "completion": f"c{i}", "id": f"i{i}", "other": 1.5} for i in range(2500)]


def csv_file(path: Path) -> None:
    import csv

    with path.open("w", newline="", encoding="utf-8-sig") as stream:
        writer = csv.DictWriter(stream, list(COLUMNAR[0]))
        writer.writeheader()
        writer.writerows(COLUMNAR)


@pytest.mark.parametrize(
    ("name", "write"),
    [("d.csv", csv_file), ("d.parquet", parquet), ("d.arrow", arrow_stream), ("e.arrow", arrow_file)],
)
def test_columnar_files(tmp_path: Path, name: str, write: Any) -> None:
    write(tmp_path / name)
    catalog = build(str(tmp_path / name), Store(tmp_path / "index"))
    assert catalog.n == 2500
    assert catalog.example(2400) == {"prompt": 'a "b",\nc', "completion": "c2400"}
    assert catalog.describe([1])[0]["id"] == "i1"
    # a CSV record of two lines after a header of one; columnar rows count from 1
    assert catalog.where(1) == f"{tmp_path / name}:{4 if name.endswith('csv') else 2}"


@pytest.mark.parametrize("keep", ["text", "reference"])
def test_text_files_are_split_at_blank_lines(tmp_path: Path, keep: Any) -> None:
    (tmp_path / "d.txt").write_bytes(b"\xef\xbb\xbfone\nmore\n\n \n\ntwo\r\n\r\nthree")
    catalog = build(tmp_path / "d.txt", Store(tmp_path / "index"), keep=keep)
    assert list(catalog.texts()) == ["one\nmore", "two", "three"]
    assert [catalog.where(i).rsplit(":")[-1] for i in range(3)] == ["1", "6", "8"]


def test_a_folder_is_read_in_order_with_sources_relative_to_it(tmp_path: Path) -> None:
    for name in ("b/1.txt", "a/2.txt", "a/.hidden/3.txt", "notes.md"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_text(name)
    catalog = build(tmp_path / "data", Store(tmp_path / "index"))
    assert [part["source"] for part in catalog.describe([0, 1])] == ["a/2.txt", "b/1.txt"]
    assert catalog.n == 2


def test_datasets_in_memory_and_saved(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])
    rows.save_to_disk(str(tmp_path / "saved"))
    digests = {build(data, Store(tmp_path / str(i))).digest for i, data in enumerate((rows, tmp_path / "saved"))}
    assert len(digests) == 1
    with pytest.raises(DataError, match="expected a path, a data set or an iterable"):
        build(datasets.DatasetDict(train=rows), Store(tmp_path / "index"))


def test_what_is_a_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    names = {"wikitext": True, "owner/name": True, "owner/name:config:split": True, "here": False, "here/x": False}
    names |= {"./x": False, "/x": False, "~/x": False, "x.jsonl": False, "a/b/c": False, "s3://x/y": False, "": False}
    assert {name: is_hub_name(name) for name in names} == names


def test_reference_needs_lines(tmp_path: Path) -> None:
    csv_file(tmp_path / "d.csv")
    with pytest.raises(SpecError, match=r"d\.csv:2: --catalog reference needs a JSONL or text file"):
        build(tmp_path / "d.csv", Store(tmp_path / "index"), keep="reference")


def test_a_changed_file_is_noticed_in_reference_mode(tmp_path: Path) -> None:
    data = jsonl(tmp_path / "data.jsonl", RECORDS)
    catalog = build(data, Store(tmp_path / "index"), keep="reference")
    data.write_text(data.read_text().replace("Paris", "Lyons"))
    with pytest.raises(DataError, match="row 1 has changed since it was indexed"):
        catalog.example(1)
    with pytest.raises(DataError, match="row 1 has changed since it was indexed"):
        list(catalog.texts())
    assert len(catalog.verify()) == 1
    data.write_text("x\n")
    with pytest.raises(DataError, match="has changed since it was indexed"):
        catalog.example(2)
    data.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        catalog.example(0)


def test_a_second_build_keeps_the_first_and_never_replaces_an_index_of_other_data(tmp_path: Path) -> None:
    store = Store(tmp_path / "index")
    first = build(RECORDS, store)
    before = store.get("catalog.parquet")
    assert build(iter(RECORDS), store).digest == first.digest
    assert store.get("catalog.parquet") == before
    assert build(RECORDS[:1], store).n == 1  # no index uses it yet
    store.put("spec.json", b"{}")
    with pytest.raises(
        MismatchError, match=r"expected blake2b-256:.*, got blake2b-256:.* \(3 rows\); .* give another --out"
    ):
        build(RECORDS, store)
    assert Catalog.open(store).n == 1


def test_an_index_gets_back_its_lost_or_damaged_catalog(tmp_path: Path) -> None:
    store = Store(tmp_path / "index")
    built = build(RECORDS, store)
    payload, record = store.get("catalog.parquet"), store.get("catalog.json")
    store.put("spec.json", json.dumps({"spec": {"data": built.digest}}).encode())
    for harm in (
        lambda: store.delete("catalog.parquet"),
        lambda: store.put("catalog.parquet", payload[:-9]),
        lambda: store.put("catalog.parquet", payload[:40] + b"?" + payload[41:]),
        lambda: store.put("catalog.json", b"{}"),
        lambda: store.put("catalog.json", record.replace(b'"digest": "blake2b-256:', b'"digest": "blake2b-256:0')),
        lambda: store.delete("catalog.json"),
    ):
        harm()
        assert build(RECORDS, store).verify() == []
        assert (store.get("catalog.parquet"), store.get("catalog.json")) == (payload, record)
    store.delete("catalog.json")
    with pytest.raises(MismatchError, match=r"the data differs from .* \(1 rows\)"):
        build(RECORDS[:1], store)


def test_changed_labels_are_refused_once_the_index_is_finished(tmp_path: Path) -> None:
    store = Store(tmp_path / "index")
    built = build(RECORDS, store)
    store.put("spec.json", json.dumps({"spec": {"data": built.digest}}).encode())
    store.put("manifest.json", b"{}")
    other = [{**RECORDS[0], "provider": "q"}, *RECORDS[1:]]
    with pytest.raises(
        MismatchError, match="row 0: provider: expected 'p' as the index has, got 'q'; .* another --out"
    ):
        build(other, store)
    with pytest.raises(MismatchError, match="row 2: source: expected 'memory' as the index has, got 't'"):
        build([*RECORDS[:2], {**RECORDS[2], "source": "t"}], store)
    build([{**record, "unread": 1} for record in RECORDS], store)
    store.delete("manifest.json")
    assert build(other, store).describe([0])[0]["provider"] == "q"


def test_absent_and_damaged_catalogs(tmp_path: Path) -> None:
    store = Store(tmp_path / "index")
    with pytest.raises(FormatError, match=r"holds no catalog\.json"):
        Catalog.open(store)
    build(RECORDS, store)
    payload, record = store.get("catalog.parquet"), store.get("catalog.json")
    flipped = bytearray(payload)
    flipped[len(payload) // 2] ^= 1
    store.put("catalog.parquet", bytes(flipped))
    assert "catalog.parquet: expected blake2b-256:" in Catalog.open(store).verify()[0]
    store.put("catalog.parquet", payload[:-9])
    assert "bytes, got" in Catalog.open(store).verify()[0]
    with pytest.raises(CorruptError, match="not readable"):
        Catalog.open(store).example(0)
    store.delete("catalog.parquet")
    assert Catalog.open(store).verify() == [f"{store}/catalog.parquet: missing"]
    for broken in (b"{", b"{}", record.replace(b'"rows"', b'"rose"')):
        store.put("catalog.json", broken)
        with pytest.raises(CorruptError, match="not a catalog record"):
            Catalog.open(store)
    store.put("catalog.parquet", payload)
    store.put("catalog.json", record.replace(b'"digest": "blake2b-256:', b'"digest": "blake2b-256:0'))
    assert "expected 3 rows and blake2b-256:0" in Catalog.open(store).verify()[0]


def test_rows_across_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("influent.catalog_part.GROUP_ROWS", 4)
    seen: list[tuple[str, int, int]] = []
    catalog = build(
        ({"text": f"t{i}", "id": f"i{i}"} for i in range(11)),
        Store(tmp_path / "index"),
        progress=lambda *step: seen.append(step),
    )
    assert [content["text"] for content in catalog.examples(2, 10)] == [f"t{i}" for i in range(2, 10)]
    assert [part["id"] for part in catalog.describe([9, 0, 9, 4])] == ["i9", "i0", "i9", "i4"]
    assert list(catalog.texts()) == [f"t{i}" for i in range(11)]
    assert catalog.examples(3, 3) == []
    assert seen == [("catalog", 4, 0), ("catalog", 8, 0)]
    with pytest.raises(IndexError):
        catalog.example(11)
    with pytest.raises(DataError, match='record:11: id "i3" repeats that of record:4'):
        build(({"text": "t", "id": f"i{i if i < 10 else 3}"} for i in range(11)), Store(tmp_path / "other"))


def test_a_plain_data_set_is_catalogued_by_id(tmp_path: Path) -> None:
    hashes = [content_hash({"text": str(i)}) for i in range(3)]
    store = Store(tmp_path / "index")
    catalog = build_from_ids(range(3), hashes, store, texts=["zero", "one", "two"])
    assert catalog.describe([1]) == [{"row": 1, "id": "1", "source": "memory", "provider": None, "text": "one"}]
    assert catalog.verify() == []
    with pytest.raises(SpecError, match="holds no example"):
        catalog.example(0)
    assert build_from_ids(["a", "b"], hashes[:2], Store(tmp_path / "b")).describe([0])[0]["text"] == ""
    with pytest.raises(DataError, match='item 1: id "a" repeats that of item 0'):
        build_from_ids(["a", "a"], hashes[:2], Store(tmp_path / "c"))
    with pytest.raises(DataError, match="32 hexadecimal digits"):
        build_from_ids(["a"], ["xyz"], Store(tmp_path / "d"))


def test_memory_is_flat_in_the_number_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("influent.catalog_part.GROUP_ROWS", 64)

    def peak(n: int) -> int:
        records = ({"text": f"{i} " + "x" * 1000} for i in range(n))
        tracemalloc.start()
        build(records, Store(tmp_path / str(n)))
        got = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return got

    peak(10)
    small, large = peak(256), peak(1280)
    assert large - small < 1024 * 200, (small, large)


def test_rows_are_described_without_pandas(tmp_path: Path) -> None:
    """Which takes half a second to import, of every first query."""
    build(str(jsonl(tmp_path / "data.jsonl", RECORDS)), Store(str(tmp_path / "index")))
    script = (
        "import sys; from influent.catalog import Catalog; from influent.storage import Store; "
        f"print(Catalog.open(Store({str(tmp_path / 'index')!r})).describe([1])[0]['id'], 'pandas' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["7", "False"]

"""The format is what docs/format.md says: golden bytes, still written and read, a stranger's checker, the schema."""

import json
import sys
from pathlib import Path

import format_checker
import jsonschema
import pytest
import torch
from indexes import make_index

from influent.codec import FLOATS, PER_BYTE
from influent.errors import SpecError
from influent.rowstore import Index, verify
from influent.storage import Store

TESTS = Path(__file__).parent
GOLDEN = TESTS / "golden" / "v1"
CODED = TESTS / "golden" / "v1.1"
LIVE = TESTS / "golden" / "v1.1-live"
SEALED = TESTS / "golden" / "v1.2"
ALL = (GOLDEN, CODED, LIVE, SEALED)
DOCS = TESTS.parent / "docs"

sys.path.insert(0, str(TESTS / "golden"))
import make_v1  # noqa: E402
import make_v1_1  # noqa: E402
import make_v1_1_live  # noqa: E402
import make_v1_2  # noqa: E402


def objects(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_golden_index_is_gone_on_with_byte_for_byte(tmp_path):
    make_v1.make(tmp_path, golden_catalog=True)
    assert objects(tmp_path) == objects(GOLDEN)


def test_golden_index_reads():
    index = Index.open(GOLDEN)
    assert verify(GOLDEN) == {"ok": True, "errors": []}
    assert (index.n, index.digest) == (
        5,
        "blake2b-256:35fd1db1d70344c30510a8d92ec86455ae05704840e59c713a9d5df19fc9c1f2",
    )
    assert index.shards[1].rows("h.1.fc").tolist() == [[i + j / 8 for j in range(5)] for i in (2, 3)]
    assert index.stat("loss").tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert [row["id"] for row in index.catalog.describe([4, 0])] == ["e", "a"]


def test_golden_coded_index_is_gone_on_with_byte_for_byte(tmp_path):
    (tmp_path / "spec.json").write_bytes((CODED / "spec.json").read_bytes())
    make_v1_1.make(tmp_path, golden=CODED)
    assert objects(tmp_path) == objects(CODED)


def test_golden_sealed_index_is_still_written_byte_for_byte(tmp_path):
    make_v1_2.make(tmp_path)
    assert objects(tmp_path) == objects(SEALED)


def test_sealing_changes_the_documents_alone():
    coded, sealed = objects(CODED), objects(SEALED)
    changed = {name for name in coded if coded[name] != sealed[name]}
    assert coded.keys() == sealed.keys()
    assert changed == {
        "spec.json",
        "manifest.json",
        *(name for name in coded if name.startswith("shards/0") and name.endswith(".json")),
    }


@pytest.mark.parametrize("folder", [CODED, SEALED])
def test_golden_coded_index_reads(folder):
    index = Index.open(folder)
    assert verify(folder) == {"ok": True, "errors": []}
    assert (index.n, str(index.codec), index.artifact.generation) == (5, "rank:2:int4", 1)
    assert index.digest == "blake2b-256:a204a1a253da138ae9fb2213e004c08e5b12308c37bb510e5e9873e439044840"
    assert [index.codec.stored_rank(index.factors[key]) for key in index.keys] == [2, None, None]
    assert index.shards[0].rows("norm").tolist() == [[0, -1.25, 1.5, 0, 0], [5, 0, -5, 2, 3]]
    assert [row["id"] for row in index.catalog.describe([4, 2, 0])] == ["4", "2", "a"]
    same_rows(folder)


def test_golden_live_index_is_gone_on_with_byte_for_byte(tmp_path):
    make_v1_1_live.make(tmp_path, golden_catalog=True)
    assert objects(tmp_path) == objects(LIVE)


def test_golden_live_index_reads():
    index = Index.open(LIVE)
    assert verify(LIVE) == {"ok": True, "errors": []}
    assert (index.n, str(index.codec), index.codec.stored) == (3, "none", False)
    assert index.stat("loss").tolist() == [0, 0.25, 0.5]
    with pytest.raises(SpecError, match="stores no rows"):
        index.shards[0].rows("h.0.fc")


def test_golden_catalog_digest_is_still_computed(tmp_path):
    made = make_v1.catalog.build(make_v1.DATA, Store(tmp_path))
    assert made.digest == Index.open(GOLDEN).spec["data"]


# -- a stranger's reading


CODECS = ["dense:int8", "dense:int4", "dense:sign", *(f"rank:1:{bits}" for bits in (*FLOATS, *PER_BYTE))]


@pytest.mark.parametrize("rows", [*FLOATS, *CODECS])
def test_stranger_verifies_what_we_write(tmp_path, rows):
    for golden in ALL:
        format_checker.check(golden)
    make_index(Store(tmp_path), rows=rows)
    format_checker.check(tmp_path)


@pytest.mark.parametrize("rows", [*FLOATS, *CODECS])
def test_stranger_decodes_what_we_write(tmp_path, rows):
    make_index(Store(tmp_path), rows=rows)
    same_rows(tmp_path)


def same_rows(folder: Path) -> None:
    index = Index.open(folder)
    for shard in index.shards:
        for block in index.spec["layout"]:
            found = format_checker.decode(folder, shard.name, block, index.spec["rows"])
            rows = shard.rows(block["block"])
            torch.testing.assert_close(rows.float(), torch.tensor(found), rtol=1e-6, atol=1e-7)


def schema(name: str) -> dict:
    document = json.loads((DOCS / "format.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(document)
    return {"$ref": f"#/$defs/{name}", "$defs": document["$defs"]}


def test_documents_follow_the_schema(tmp_path):
    make_index(Store(tmp_path), rows="rank:1:sign")
    for folder in (*ALL, tmp_path):
        for path in folder.rglob("*.json"):
            kinds = {"spec.json": "spec", "manifest.json": "manifest"}
            kind = "catalog" if path.name.startswith("catalog") else kinds.get(path.name, "record")
            jsonschema.validate(json.loads(path.read_bytes()), schema(kind))
        jsonschema.validate(json.loads((folder / "spec.json").read_bytes()), schema("index_spec"))


def test_page_is_one_page_and_names_what_is_there():
    page = (DOCS / "format.md").read_text()
    assert len(page.split()) < 2100
    for document in ("manifest", "spec", "record"):
        for key in schema(document)["$defs"][document]["required"]:
            assert f"`{key}`" in page, f"docs/format.md does not explain {document}.{key}"

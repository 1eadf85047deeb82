"""LoRIF as a user meets it: a row of the method table, from the index to the answer."""

import json
import shutil
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from tiny_model import FACTS, make_data, make_model

import influent
from influent.cli import run
from influent.errors import SpecError
from influent.rowstore import Index

ASK = {"prompt": "The money of Japan is called", "completion": " yen"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lorif")
    make_model(folder / "model")
    make_data(folder / "data.jsonl")
    made = influent.index(
        str(folder / "model"), str(folder / "data.jsonl"), str(folder / "index"), method="lorif", compress="whiten:8x8"
    )
    assert made["codec"] == "rank:4:int4"
    return folder


def test_the_name_of_the_method_is_enough(place):
    found = influent.query(str(place / "index"), **ASK, k=2)
    assert {row["id"] for row in found["queries"][0]["top"]} == {"japan", "japan/text"}
    assert found["method"]["curvature"] == "lowrank:512:relative:1"


@pytest.mark.parametrize(
    ("size", "compress", "rows"),
    [(240, "whiten:121,share | rotate", "dense:sign"), (620, "whiten:32x32", "rank:2:int4")],
)
def test_row_bytes_size_bases_and_codec_together(size, compress, rows, place, tmp_path):
    out = str(tmp_path / "index")
    influent.index(str(place / "model"), str(place / "data.jsonl"), out, method="lorif", row_bytes=size)
    opened = Index.open(out)
    assert (opened.spec["compress"], str(opened.codec)) == (compress, rows)
    told = 0 if opened.codec.rank is None else len(opened.keys)  # a byte for what the cut kept
    assert 0.8 * size < opened.layout.row_bytes + told <= size
    top = influent.query(out, **ASK, k=2)["queries"][0]["top"]
    assert "japan" in {row["id"] for row in top}


def scores(index, path, **options) -> np.ndarray:
    queries = [{"prompt": prompt, "completion": f" {answer}."} for _, prompt, answer in FACTS]
    influent.query(str(index), queries=queries, scores=str(path), **options)
    return np.load(path)


def test_a_query_rank_that_cuts_nothing_changes_nothing(place, tmp_path):
    index = tmp_path / "index"
    influent.index(
        str(place / "model"), str(place / "data.jsonl"), str(index), compress="rademacher:8x8", rows="rank:2:float32"
    )
    whole = scores(index, tmp_path / "a.npy")
    np.testing.assert_allclose(scores(index, tmp_path / "b.npy", query_rank=8), whole, rtol=1e-4, atol=1e-4)
    cut = scores(index, tmp_path / "c.npy", query_rank=2)
    assert not np.allclose(cut, whole, rtol=1e-3)
    assert np.corrcoef(cut.ravel(), whole.ravel())[0, 1] > 0.9
    kept = [influent.query(str(index), **ASK, query_rank=rank)["queries"][0]["kept"] for rank in (1, 3)]
    assert 0 < kept[0] < kept[1] <= 1.00001
    assert "kept" not in influent.query(str(index), **ASK)["queries"][0]


@pytest.mark.parametrize("rule", ["paper", "release"])
def test_the_published_rules_answer_too(place, tmp_path, rule):
    found = scores(place / "index", tmp_path / "s.npy", parity=rule, curvature="lowrank:4")
    own = scores(place / "index", tmp_path / "o.npy", curvature="lowrank:4")
    assert np.isfinite(found).all() and not np.allclose(found, own, rtol=1e-2)
    assert (found.argmax(1) == own.argmax(1)).mean() > 0.7
    with pytest.raises(SpecError, match="parity"):
        influent.query(str(place / "index"), **ASK, parity=rule, damping="relative:0.1")
    with pytest.raises(SpecError, match="low-rank"):
        influent.query(str(place / "index"), **ASK, parity=rule, curvature="fim")


def test_append_on_the_command_line(place, tmp_path, capsys):
    index, more = str(tmp_path / "index"), tmp_path / "more.jsonl"
    command = ["index", str(place / "model"), str(place / "data.jsonl"), "-o", index, "--method", "lorif"]
    assert run([*command, "--compress", "whiten:8x8", "--rows", "rank:1:int8"]) == 0
    assert run(["fit", index, "--curvature", "sketch:8"]) == 0
    assert run(["fit", index, "--curvature", "lowrank:8"]) == 0
    more.write_text(json.dumps({"id": "new", "prompt": "The money of Togo is called", "completion": " franc."}) + "\n")
    capsys.readouterr()
    assert run(["append", index, str(more), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["rows"] == 17
    stale = {fitted["name"]: fitted["seen"] for fitted in made["curvatures"] if fitted["stale"]}
    assert stale == {"lowrank:8@16": 16 / 17, "sketch:8@16": 16 / 17}
    assert run(["fit", index, "--curvature", "sketch:8"]) == 0
    ask = ["--prompt", "The money of Togo is called", "--completion", " franc.", "-k", "1", "--json"]
    capsys.readouterr()
    assert run(["query", index, *ask, "--curvature", "sketch:8"]) == 0
    assert json.loads(capsys.readouterr().out)["queries"][0]["top"][0]["id"] == "new"
    assert run(["verify", index]) == 0
    assert run(["append", index, str(place / "data.jsonl")]) == 2
    assert "malawi" in capsys.readouterr().err


def test_an_index_killed_after_its_calibration_is_resumed_by_the_same_command(place, tmp_path, capsys):
    index = tmp_path / "index"
    command = ["index", str(place / "model"), str(place / "data.jsonl"), "-o", str(index), "--compress", "pca:8x8"]
    assert run(command) == 0
    digest = Index.open(index).digest
    for gone in (index / "spec.json", index / "manifest.json", *index.glob("shards/*")):
        gone.unlink()
    (index / "shards").rmdir()
    assert run(command) == 0
    assert Index.open(index).digest == digest
    capsys.readouterr()
    assert run(["info", str(index), "--json"]) == 0
    schema = json.loads((Path(__file__).parent.parent / "docs/schemas/info.json").read_text())
    jsonschema.validate(json.loads(capsys.readouterr().out), schema)


def test_verify_misses_the_bases(place, tmp_path, capsys):
    index = tmp_path / "index"
    shutil.copytree(place / "index", index)
    shutil.rmtree(index / "bases")
    assert run(["verify", str(index)]) == 2
    printed = "".join(capsys.readouterr().out.split())  # a long path is broken anywhere, also within a word
    assert "bases:missingorunfinished" in printed


def test_info_of_coded_rows_is_what_the_schema_says(place, capsys):
    assert run(["info", str(place / "index"), "--json"]) == 0
    schema = json.loads((Path(__file__).parent.parent / "docs/schemas/info.json").read_text())
    jsonschema.validate(json.loads(capsys.readouterr().out), schema)


def test_a_query_rank_needs_rows_of_a_rank(place, tmp_path):
    influent.index(str(place / "model"), str(place / "data.jsonl"), str(tmp_path / "dense"), compress="gauss:4x4")
    with pytest.raises(SpecError, match="query_rank 2 is for rows that are cut to a rank; these are float32"):
        influent.query(str(tmp_path / "dense"), **ASK, query_rank=2)
    with pytest.raises(SpecError, match="query_rank is 0"):
        influent.query(str(place / "index"), **ASK, query_rank=0)


def test_appending_to_a_damaged_catalog_is_one_line(place, tmp_path, capsys):
    index, more = tmp_path / "index", tmp_path / "more.jsonl"
    influent.index(str(place / "model"), str(place / "data.jsonl"), str(index), compress="gauss:4x4")
    damaged = bytearray((index / "catalog.parquet").read_bytes())
    damaged[4:200] = bytes(196)
    (index / "catalog.parquet").write_bytes(damaged)
    more.write_text('{"id": "new", "text": "The money of Togo is called franc."}')
    assert run(["append", str(index), str(more)]) == 2
    assert "catalog.parquet" in capsys.readouterr().err


def test_a_low_rank_fit_takes_no_damping(place):
    for options in ({"damping": "relative:0.5"}, {}):
        name = "lowrank:4" if options else "lowrank:4:relative:0.5"
        with pytest.raises(SpecError, match="curvature lowrank:4 is fitted without a damping"):
            influent.fit(str(place / "index"), curvature=name, **options)


def test_flat_rows_have_no_rank(place, tmp_path):
    with pytest.raises(SpecError, match="rows 'rank:2:bfloat16': stage 'sjlt:16' of .* leaves flat vectors"):
        influent.index(
            str(place / "model"), str(place / "data.jsonl"), str(tmp_path / "ix"), compress="mask:8x8 | sjlt:16",
            rows="rank:2",
        )  # fmt: skip
    assert not (tmp_path / "ix").exists()

"""The index: what is written is what is read, in the data's order, and nothing that is not finite gets in."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from indexes import LAYOUT, make_index, rows_of, spec, write_catalog, write_chunk

from influent.errors import CorruptError, FormatError, MismatchError, NumericsError
from influent.rowstore import Index, info, verify
from influent.rowwriter import Chunk, IndexWriter
from influent.storage import Store

DTYPES = ["float32", "float16", "bfloat16"]


@pytest.fixture(params=["path", "memory"])
def store(request, tmp_path):
    return Store(tmp_path / "ix") if request.param == "path" else Store(f"memory://{tmp_path.name}/ix")


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_round_trip(store, dtype):
    make_index(store, 10, shard_rows=4, rows=dtype)
    index = Index.open(store)
    assert (index.n, index.dtype, index.keys) == (10, dtype, ["h.0", "h.1", "loss"])
    assert index.widths == {"h.0": 6, "h.1": 4, "loss": 3}
    assert [(s.name, s.lo, s.hi, len(s)) for s in index.shards] == [
        ("000000", 0, 4, 4), ("000001", 4, 8, 4), ("000002", 8, 10, 2)
    ]  # fmt: skip
    for shard in index.shards:
        assert shard.ids.tolist() == list(range(shard.lo, shard.hi))
        for key, width in index.widths.items():
            expected = rows_of(key, width, shard.lo, shard.hi).to(getattr(torch, dtype))
            assert shard.rows(key).dtype == expected.dtype and torch.equal(shard.rows(key), expected)
    ids = torch.arange(10.0)
    assert torch.equal(index.stat("loss"), ids / 7)
    assert torch.equal(index.stat("norm"), ids + 1)
    assert torch.equal(index.stat("tokens"), ids + 5)
    assert verify(store) == {"ok": True, "errors": []}


@settings(deadline=None, max_examples=15)
@given(n=st.integers(1, 30), shard_rows=st.integers(1, 35))
def test_shards_tile_the_rows(tmp_path_factory, n, shard_rows):
    store = Store(tmp_path_factory.mktemp("ix"))
    make_index(store, n, shard_rows=shard_rows)
    index = Index.open(store)
    rows = torch.cat([shard.rows("h.0") for shard in index.shards])
    assert torch.equal(rows, rows_of("h.0", 6, 0, n))
    assert torch.equal(torch.cat([shard.ids for shard in index.shards]), torch.arange(n))
    assert len(index.shards) == -(-n // shard_rows)


def test_chunks_may_be_written_in_any_order(tmp_path):
    stores = [Store(tmp_path / "a"), Store(tmp_path / "b")]
    make_index(stores[0])
    writer = IndexWriter.open(stores[1], spec(write_catalog(stores[1], 10)), notes={"shard_rows": 4})
    for chunk in reversed(writer.pending(10)):
        write_chunk(writer, chunk)
    assert writer.pending(10) == []
    writer.commit({"skipped": {"empty": 2}})
    assert stores[0].names() == stores[1].names()
    assert all(stores[0].get(name) == stores[1].get(name) for name in stores[0].names() if "catalog" not in name)


def test_info_is_complete(tmp_path):
    make_index(Store(tmp_path), rows="bfloat16")
    document = info(Index.open(tmp_path))
    sizes = [path.stat().st_size for path in tmp_path.glob("shards/*.safetensors")]
    wanted = {
        "rows": 10, "bytes": sum(sizes), "bytes_per_row": sum(sizes) / 10, "layers": 3, "compress": "id",
        "codec": "dense", "dtype": "bfloat16", "skipped": {"empty": 2, "no target tokens": 2},
        "digest": Index.open(tmp_path).digest, "generation": 0,
    }  # fmt: skip
    assert {key: document[key] for key in wanted} == wanted
    assert json.loads(json.dumps(document)) == document


def test_index_opens_no_shard(tmp_path):
    make_index(Store(tmp_path))
    for path in tmp_path.glob("shards/*"):
        path.unlink()
    assert Index.open(tmp_path).n == 10


def test_catalog_is_beside_the_rows(tmp_path):
    make_index(Store(tmp_path))
    assert [row["id"] for row in Index.open(tmp_path).catalog.describe([7, 0])] == ["row-7", "row-0"]


# -- what must not get in


def bad_write(store: Store, *, key: str, value: float, dtype: str = "float32") -> None:
    writer = IndexWriter.open(store, spec(write_catalog(store, 10), rows=dtype), notes={"shard_rows": 4})
    chunk = writer.pending(10)[1]
    rows = {k: rows_of(k, width, chunk.lo, chunk.hi) for k, width in writer.widths.items()}
    stats = {name: torch.ones(4) for name in ("loss", "norm", "tokens")}
    (rows[key][2] if key in rows else stats[key.removeprefix("the ")])[2] = value
    writer.write(chunk, rows, **stats, dtype=dtype, skipped={})


@pytest.mark.parametrize(
    ("key", "value", "dtype", "message"),
    [
        ("h.1", float("nan"), "float32", r"block 'h\.1', row 6: nan is not finite as torch\.float32"),
        ("h.0", float("inf"), "bfloat16", r"block 'h\.0', row 6: inf is not finite as torch\.bfloat16"),
        ("loss", 70000.0, "float16", r"block 'loss', row 6: 70000 is not finite as torch\.float16: .*store wider rows"),
        ("the loss", float("nan"), "float32", r"'loss', row 6: nan is not finite as torch\.float32"),
        ("norm", float("-inf"), "float32", r"'norm', row 6: -inf is not finite"),
    ],
)
def test_values_that_are_not_finite_are_refused(store, key, value, dtype, message):
    with pytest.raises(NumericsError, match=message):
        bad_write(store, key=key, value=value, dtype=dtype)
    assert store.names("shards/") == []


def test_large_values_fit_wider_rows(store):
    bad_write(store, key="loss", value=70000.0, dtype="bfloat16")
    assert len(store.names("shards/")) == 2


@pytest.mark.parametrize("fault", ["missing block", "extra block", "width", "rows", "stat", "dtype"])
def test_rows_that_do_not_fit_the_layout_are_refused(store, fault):
    writer = IndexWriter.open(store, spec(write_catalog(store, 4)), notes={"shard_rows": 4})
    rows = {key: torch.ones(4, width) for key, width in writer.widths.items()}
    stats = {name: torch.ones(4) for name in ("loss", "norm", "tokens")}
    dtype = "float32"
    if fault == "missing block":
        del rows["h.1"]
    elif fault == "extra block":
        rows["h.9"] = torch.ones(4, 2)
    elif fault == "width":
        rows["h.1"] = torch.ones(4, 5)
    elif fault == "rows":
        rows["h.1"] = torch.ones(3, 4)
    elif fault == "stat":
        stats["norm"] = torch.ones(3)
    else:
        dtype = "bfloat16"
    with pytest.raises(MismatchError):
        writer.write(Chunk(0, 0, 4), rows, **stats, dtype=dtype, skipped={})
    assert store.names("shards/") == []


def test_incomplete_index_is_not_committed(store):
    writer = IndexWriter.open(store, spec(write_catalog(store, 10)), notes={"shard_rows": 4})
    chunks = writer.pending(10)
    write_chunk(writer, chunks[0])
    with pytest.raises(FormatError, match="4 of 10 rows are written; write the pending chunks first"):
        writer.commit({})
    write_chunk(writer, chunks[2])
    with pytest.raises(FormatError, match=r"shard 000002 has rows \(8, 10\), expected them to begin at 4"):
        writer.commit({})
    with pytest.raises(FormatError, match="not finished"):
        Index.open(store)


# -- one directory, one spec


def test_another_spec_in_the_same_place_is_refused(store):
    make_index(store)
    with pytest.raises(MismatchError, match="seed is 0 there and 1 in this run"):
        IndexWriter.open(store, spec(write_catalog(store, 10), seed=1), notes={"shard_rows": 4})
    assert verify(store)["ok"]


def test_finished_index_has_nothing_pending(store):
    make_index(store)
    before = {name: store.get(name) for name in store.names()}
    writer = IndexWriter.open(store, spec(write_catalog(store, 10)), notes={"shard_rows": 4})
    assert writer.committed
    assert writer.pending(10) == []
    assert {name: store.get(name) for name in store.names()} == before


def test_resumed_run_keeps_the_first_shard_size(store):
    writer = IndexWriter.open(store, spec(write_catalog(store, 10)), notes={"shard_rows": 4})
    write_chunk(writer, writer.pending(10)[0])
    again = IndexWriter.open(store, spec(write_catalog(store, 10)), notes={"shard_rows": 3})
    assert again.pending(10) == [Chunk(1, 4, 8), Chunk(2, 8, 10)]


def test_shards_of_another_plan_are_left_out(store):
    """spec.json was deleted to mend it, and the new run cuts the data differently."""
    make_index(store, shard_rows=2)
    for name in ("spec.json", "manifest.json"):
        store.delete(name)
    writer = make_index(store, shard_rows=4)
    assert writer.notes == {"shard_rows": 4}
    assert [shard.name for shard in Index.open(store).shards] == ["000000", "000001", "000002"]
    assert verify(store)["ok"]


@pytest.mark.parametrize("layout", [[{"block": "x"}], [*LAYOUT, LAYOUT[0]], 3])
def test_spec_that_is_not_an_index_is_named(store, layout):
    make_index(store)
    from influent.artifact import ArtifactWriter

    other = store.child("other")
    ArtifactWriter.open(other, "index", {"layout": layout, "rows": "float32"}).commit({})
    with pytest.raises(CorruptError, match=r"other/spec\.json: "):
        Index.open(other)


def test_info_looks_at_a_bounded_number_of_shards(store, monkeypatch):
    make_index(store, 40, shard_rows=2, rows="rank:1:int8")
    index, opened = Index.open(store), set()
    tensors = index.artifact.tensors
    monkeypatch.setattr(index.artifact, "tensors", lambda name: opened.add(name) or tensors(name))
    whole = info(index)["captured"]
    assert (whole["rows"], len(opened)) == (21, 20)  # all but those skipped
    opened.clear()
    monkeypatch.setattr("influent.rowstore.SAMPLED", 4)
    some = info(index)["captured"]
    assert sorted(opened) == ["000000", "000005", "000010", "000015"]
    assert some["rows"] == 5
    assert some["mean"] == pytest.approx(whole["mean"], abs=0.2)

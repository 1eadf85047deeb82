"""Coded rows from the hooks to the shard: the same whatever the batches, killed anywhere, and nothing wrong gets in."""

import json
import math
import struct
from pathlib import Path

import pytest
import torch
from indexes import make_index
from small_index import random_rows, write_index
from test_collect import DOCUMENTS, PARTLESS, POISONED, collect, collector, language, poisoned_model
from test_crash import Kill, MortalStore, objects
from test_task import make_model

from influent.codec import Codec
from influent.coding import decode, encode
from influent.errors import LayerError, MismatchError, NumericsError, SpecError
from influent.layout import Layout
from influent.rowstore import Index, info, verify
from influent.rowwriter import IndexWriter
from influent.storage import Store

CODECS = ["dense:int8", "dense:sign", "rank:2:float32", "rank:3:int8", "rank:99:bfloat16"]


def coded(maker, codec: str):
    """The same collector, with a codec."""
    import dataclasses

    return dataclasses.replace(maker, codec=Codec.parse(codec))


def decoded(maker, made, codec: str) -> dict[str, torch.Tensor]:
    parsed = Codec.parse(codec)
    return {
        key: decode(parsed, made.rows, key, width, maker.factors[key]).to(torch.float32).flat()
        for key, width in maker.widths.items()
    }


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("max_length", [512, 10])
def test_batches_do_not_change_coded_rows(codec, max_length, monkeypatch):
    monkeypatch.setattr("influent.collect.HELD_BYTES", 3 * 4 * 64 * 20)  # documents of several parts, few at a time
    model = make_model("llama")
    plain = collector(model, language(max_length), "gauss:6x6")
    dense = collect(plain, DOCUMENTS)
    for budget in (4096, 1):
        maker = coded(collector(model, language(max_length), "gauss:6x6", token_budget=budget), codec)
        made = collect(maker, DOCUMENTS)
        assert (made.skipped, made.num_split) == (dense.skipped, dense.num_split)
        torch.testing.assert_close(made.norm, dense.norm, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(made.loss, dense.loss, rtol=1e-4, atol=1e-5)
        for key, rows in decoded(maker, made, codec).items():
            direct = encode(Codec.parse(codec), dense.rows[key], maker.factors[key], key=key)
            expected = decode(
                Codec.parse(codec), direct.tensors, key, maker.widths[key], maker.factors[key]
            ).to(torch.float32).flat()  # fmt: skip
            if "sign" in codec:  # a number near zero may get either sign
                assert (rows - expected).norm() <= 0.1 * expected.norm()
            else:
                torch.testing.assert_close(rows, expected, rtol=2e-2, atol=2e-2 * float(expected.abs().max()))
            assert not rows[PARTLESS].any()
        assert (made.captured is None) == codec.startswith("dense")


def test_captured_is_the_share_that_the_cut_kept():
    maker = collector(make_model("llama"), language(60), "gauss:6x6")
    dense, made = collect(maker, DOCUMENTS), collect(coded(maker, "rank:2:float32"), DOCUMENTS)
    kept = decoded(maker, made, "rank:2:float32")
    assert made.captured is not None
    for column, key in enumerate(maker.widths):
        whole = dense.rows[key].square().sum(1)
        share = torch.where(whole > 0, kept[key].square().sum(1) / whole.clamp(min=1e-30), 1.0)
        torch.testing.assert_close(made.captured[:, column], share, rtol=1e-3, atol=1e-3)


def test_skipped_rows_are_coded_as_zeros():
    maker = coded(collector(poisoned_model(), language(), "gauss:6x6", skip_nonfinite=True), "rank:2:int4")
    made = collect(maker, POISONED)
    assert made.skipped == {"not finite": {1, 3}} and made.norm[[1, 3]].tolist() == [0, 0]
    for rows in decoded(maker, made, "rank:2:int4").values():
        assert rows.isfinite().all() and not rows[[1, 3]].any() and rows[[0, 2, 4]].any(dim=1).all()


def test_nothing_at_all_is_no_coded_rows():
    made = collect(coded(collector(make_model("llama"), language(), "gauss:6x6"), "rank:2:int4"), [])
    assert made.rows and all(len(rows) == 0 for rows in made.rows.values())


@pytest.mark.parametrize("at", range(12))
@pytest.mark.parametrize("rows", ["rank:1:int4", "dense:sign"])
def test_killed_at_any_put(tmp_path, at, rows):
    make_index(Store(tmp_path / "clean"), 10, shard_rows=3, rows=rows)
    with pytest.raises(Kill):
        make_index(MortalStore(tmp_path / "ix", at, "torn"), 10, shard_rows=3, rows=rows)
    make_index(Store(tmp_path / "ix"), 10, shard_rows=3, rows=rows)
    assert objects(tmp_path / "ix") == objects(tmp_path / "clean")
    assert verify(tmp_path / "ix") == {"ok": True, "errors": []}


@pytest.mark.parametrize("shard_rows", [1, 5, 100])
@pytest.mark.parametrize("codec", [*CODECS, "rank:2:sign"])
def test_shards_do_not_change_coded_rows(tmp_path, shard_rows, codec):
    rows, factors = random_rows(11, {"a": 24, "b": 7}), {"a": (4, 6)}
    index = write_index(tmp_path / "ix", rows, codec=codec, factors=factors, shard_rows=shard_rows)
    once = write_index(tmp_path / "once", rows, codec=codec, factors=factors, shard_rows=11)
    for key in rows:
        got = torch.cat([shard.rows(key) for shard in index.shards])
        torch.testing.assert_close(got, once.shards[0].rows(key), rtol=1e-4, atol=1e-5)
        last = index.shards[-1]
        torch.testing.assert_close(last.grads(key, 0, 1).to(torch.float32).flat(), last.rows(key)[:1])
    remote = write_index(f"memory://{tmp_path.name}", rows, codec=codec, factors=factors, shard_rows=shard_rows)
    assert torch.equal(remote.shards[0].grads("a", 0, 1).flat(), index.shards[0].grads("a", 0, 1).flat())


def test_info_tells_codec_and_captured(tmp_path):
    rows = {"a": torch.eye(4).flatten().repeat(3, 1), "b": torch.ones(3, 5)}
    document = info(write_index(tmp_path, rows, codec="rank:1:float32", factors={"a": (4, 4)}))
    assert (document["codec"], document["dtype"]) == ("rank:1:float32", "float32")
    assert document["captured"]["blocks"]["a"]["mean"] == pytest.approx(0.25, abs=2 / 255)
    assert document["captured"]["blocks"]["b"] == {"mean": 1.0, "min": 1.0}
    assert json.loads(json.dumps(document)) == document


def test_verify_finds_a_scale_that_is_not_finite(tmp_path):
    """Even when it was committed as it is: whoever wrote it."""
    make_index(Store(tmp_path), 3, shard_rows=3, rows="dense:int8")
    path = tmp_path / "shards" / "000000.safetensors"
    data = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", data[:8])
    lo, _ = json.loads(data[8 : 8 + length])["h.0.scale"]["data_offsets"]
    data[8 + length + lo : 8 + length + lo + 2] = b"\x80\x7f"
    path.write_bytes(data)
    errors = verify(tmp_path)["errors"]
    assert len(errors) == 1 and "its hash is not the committed one" in errors[0]
    shard = Index.open(tmp_path).shards[0]
    assert any("tensor 'h.0.scale': a scale is not finite" in line for line in shard.verify())


def test_what_does_not_fit_is_refused(tmp_path):
    spec = {"rows": "rank:1:int4", "layout": [{"block": "a", "width": 24, "factors": [4, 6]}]}
    writer = IndexWriter.open(tmp_path / "ix", spec, notes={"shard_rows": 2})
    (chunk,) = writer.pending(2)
    parts = encode(Codec.parse("rank:1:int4"), torch.randn(2, 24), (4, 6), key="a")
    stats = dict.fromkeys(("loss", "norm", "tokens"), torch.ones(2))
    facts = {**stats, "dtype": "rank:1:int4", "skipped": {}}
    with pytest.raises(MismatchError, match="`captured` goes with rows cut to a rank"):
        writer.write(chunk, parts.tensors, **facts)
    captured = parts.captured[:, None]
    with pytest.raises(MismatchError, match="expected coded rows of torch.uint8"):
        writer.write(chunk, {k: v.float() for k, v in parts.tensors.items()}, **facts, captured=captured)
    broken = parts.tensors | {"a.scale": torch.full((2, 1), math.inf, dtype=torch.bfloat16)}
    with pytest.raises(NumericsError, match=r"block 'a.scale', row 0: inf is not finite"):
        writer.write(chunk, broken, **facts, captured=captured)
    assert not list(Path(tmp_path).rglob("*.safetensors"))
    two = {"rows": "dense:int8", "layout": [{"block": "a", "width": 4}, {"block": "a.scale", "width": 4}]}
    with pytest.raises(LayerError, match="2 blocks would store a tensor 'a.scale'"):
        Layout.of(two)
    with pytest.raises(SpecError, match="factors 5 and 5 do not make its width 24"):
        Layout.of({"rows": "rank:1:int4", "layout": [{"block": "a", "width": 24, "factors": [5, 5]}]})
    with pytest.raises(SpecError, match="expected the canonical text 'float32'"):
        Layout.of({"rows": "dense", "layout": []})


def test_skipped_rows_do_not_count_as_captured(tmp_path):
    """Two of four rows are skipped: what was kept of the others is the mean."""
    write_rows_of_rank_one(tmp_path, skipped={"no target tokens": [1, 2]})
    index = Index.open(tmp_path)
    kept = torch.tensor([0.25, 1.0, 1.0, 0.5])
    assert info(index)["captured"]["blocks"]["a"] == {
        "mean": pytest.approx(float(kept[[0, 3]].mean()), abs=2 / 255), "min": pytest.approx(0.25, abs=2 / 255)
    }  # fmt: skip


def write_rows_of_rank_one(folder: Path, *, skipped: dict[str, list[int]]) -> None:
    block = {"block": "a", "kind": "linear", "in": 4, "out": 4, "width": 16, "factors": [4, 4]}
    spec = {"data": "none", "layout": [block], "rows": "rank:1:float32", "compress": "id"}
    writer = IndexWriter.open(Store(folder), spec, notes={"shard_rows": 4})
    (chunk,) = writer.pending(4)
    sides, zeros = {name: torch.zeros(4, 1, 4) for name in ("a.u", "a.v")}, torch.zeros(4)
    writer.write(
        chunk, sides, loss=zeros, norm=zeros, tokens=zeros, dtype="rank:1:float32", skipped=skipped,
        captured=torch.tensor([[0.25], [1.0], [1.0], [0.5]]),
    )  # fmt: skip
    writer.commit({}, files=[])

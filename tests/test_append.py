"""Appending: the rows of one index built at once, whatever dies on the way, and old shards that nobody touches."""

import json
from pathlib import Path
from typing import Any

import format_checker
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from indexes import make_index, write_chunk
from test_crash import MODES, CountingStore, Kill, MortalStore, objects
from tiny_model import QUERIES, make_data, make_model
from torch import nn

import influent
from influent import catalog
from influent.artifact import Artifact
from influent.errors import CorruptError, DataError, FormatError, MismatchError
from influent.layout import IDS
from influent.rowstore import Index, info, verify
from influent.rowwriter import IndexWriter
from influent.storage import Store
from influent.task import Classification

OLD, NEW, SHARD_ROWS = 7, 5, 3
PUTS = 7  # the catalog's part and its record, 2 payloads and 2 records, manifest
HASHES = [f"{i:032x}" for i in range(1000, 1100)]


def grow(store: Store, count: int = NEW, *, seed: int = 0) -> Index:
    """Append `count` rows whose values are those that tests/indexes.py gives rows of their numbers."""
    old = Index.open(store)
    parts = len(old.artifact.history)
    listed = catalog.extend(None, store, parts=parts, hashes=HASHES[seed : seed + count])
    if len(listed.parts) == parts:
        return old
    part = listed.parts[-1]
    writer = IndexWriter.extend(store, part.digest)
    for chunk in writer.pending(listed.n):
        write_chunk(writer, chunk)
    writer.commit({"skipped": listed.skipped}, files=[part.record_name, part.name])
    return Index.open(store)


def start(folder: Path) -> dict[str, bytes]:
    make_index(Store(folder), OLD, shard_rows=SHARD_ROWS)
    return objects(folder)


@pytest.fixture
def old(tmp_path) -> dict[str, bytes]:
    return start(tmp_path)


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("clean")
    start(folder)
    store = MortalStore(folder, PUTS, "before")
    grow(store)
    assert store.puts == PUTS
    return objects(folder)


def test_the_rows_are_those_of_one_index(tmp_path, old):
    index = grow(Store(tmp_path))
    assert (index.n, index.artifact.generation) == (OLD + NEW, 1)
    assert [(shard.lo, shard.hi) for shard in index.shards] == [(0, 3), (3, 6), (6, 7), (7, 10), (10, 12)]
    make_index(Store(tmp_path / "once"), OLD + NEW, shard_rows=SHARD_ROWS)
    once = Index.open(tmp_path / "once")
    for key in index.keys:
        rows, expected = (torch.cat([shard.rows(key) for shard in each.shards]) for each in (index, once))
        assert torch.equal(rows, expected)
    assert torch.equal(index.stat("tokens"), once.stat("tokens"))
    assert [row["id"] for row in index.catalog.describe([11, 2, 7])] == ["11", "row-2", "7"]
    assert [row["row"] for row in index.catalog.describe([11, 2, 7])] == [11, 2, 7]
    assert verify(tmp_path) == {"ok": True, "errors": []}
    format_checker.check(tmp_path)


def test_digest_and_history_tell_the_generations(tmp_path, old):
    first = Index.open(tmp_path)
    assert (first.history, first.digest) == ([], first.artifact.digest)
    second = grow(Store(tmp_path))
    third = grow(Store(tmp_path), 2, seed=50)
    assert len({first.digest, second.digest, third.digest}) == 3
    assert third.history == [
        {"generation": 0, "rows": OLD, "digest": first.digest},
        {"generation": 1, "rows": OLD + NEW, "digest": second.digest},
    ]
    document = info(third)
    assert (document["generation"], document["rows"], document["digest"]) == (2, OLD + NEW + 2, third.digest)
    assert document["skipped"] == {"no target tokens": 5} and third.artifact.spec == first.spec
    assert verify(tmp_path) == {"ok": True, "errors": []}
    format_checker.check(tmp_path)


def test_the_same_data_again_is_no_rows_more(tmp_path, clean, old):
    grow(Store(tmp_path))
    store = CountingStore(tmp_path)
    assert grow(store).n == OLD + NEW
    assert store.written == [] and objects(tmp_path) == clean


def test_old_shards_are_neither_read_nor_written(tmp_path, clean, old):
    for path in tmp_path.glob("shards/*"):
        path.unlink()
    store = CountingStore(tmp_path)
    grow(store)
    assert not {"shards/000000.safetensors", "shards/000002.json", "spec.json"} & set(store.written)
    assert {name: data for name, data in clean.items() if name not in old or name == "manifest.json"}.items() <= (
        objects(tmp_path).items()
    )


def test_a_damaged_catalog_is_not_blessed_by_appending(tmp_path, old):
    record = json.loads((tmp_path / "catalog.json").read_bytes())
    (tmp_path / "catalog.json").write_text(json.dumps(record | {"skipped": {"lies": 1}}))
    grow(Store(tmp_path))
    (problem,) = verify(tmp_path)["errors"]
    assert "catalog.json: its hash is not" in problem and "and then each `influent append`" in problem


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("at", range(PUTS))
def test_killed_at_any_put(tmp_path, clean, old, at, mode):
    with pytest.raises(Kill):
        grow(MortalStore(tmp_path, at, mode))
    index = Index.open(tmp_path)
    assert index.n == (OLD + NEW if (at, mode) == (PUTS - 1, "after") else OLD)
    assert verify(tmp_path) == {"ok": True, "errors": []}
    stems = [p.stem for p in tmp_path.glob("shards/*.json") if (tmp_path / f"shards/{p.stem}.safetensors").exists()]
    store = CountingStore(tmp_path)
    grow(store)
    assert objects(tmp_path) == clean
    assert not {f"shards/{stem}.safetensors" for stem in stems} & set(store.written)


def test_other_data_replaces_what_a_killed_call_left(tmp_path, clean, old):
    with pytest.raises(Kill):
        grow(MortalStore(tmp_path, PUTS - 1, "before"), seed=20)
    grow(Store(tmp_path))
    assert {name: data for name, data in objects(tmp_path).items() if "catalog-" not in name} == {
        name: data for name, data in clean.items() if "catalog-" not in name
    }
    assert verify(tmp_path) == {"ok": True, "errors": []}


def test_advice_mends_an_appended_index(tmp_path, clean, old):
    grow(Store(tmp_path))
    for name in ("shards/000001.safetensors", "shards/000003.safetensors"):
        data = bytearray((tmp_path / name).read_bytes())
        data[-1] ^= 1
        (tmp_path / name).write_bytes(data)
    errors = verify(tmp_path)["errors"]
    assert len(errors) == 2 and all("and then each `influent append`" in line for line in errors)
    with pytest.raises(CorruptError, match="that made the index again, and then each `influent append`"):
        Index.open(tmp_path).shards[1].check()
    for name in ("shards/000001.safetensors", "shards/000003.safetensors", "manifest.json"):
        (tmp_path / name).unlink()
    make_index(Store(tmp_path), OLD, shard_rows=SHARD_ROWS)
    grow(Store(tmp_path))
    assert objects(tmp_path) == clean


def test_a_repeated_id_names_both_places(tmp_path):
    rows = [{"id": "a", "text": "one"}, {"id": "b", "text": "two"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "b.jsonl").write_text('{"id": "c", "text": "three"}\n{"id": "b", "text": "four"}\n')
    store = Store(tmp_path / "ix")
    catalog.build(str(tmp_path / "a.jsonl"), store)
    with pytest.raises(DataError, match=r'b\.jsonl:2: id "b" repeats that of .*a\.jsonl:2; ids must be unique'):
        catalog.extend(str(tmp_path / "b.jsonl"), store, parts=1)
    with pytest.raises(DataError, match="the data set is empty"):
        catalog.extend([{"text": ""}], store, parts=1)
    chain = catalog.extend([{"text": "three"}, {"text": ""}, {"text": "x"}], store, parts=1)
    assert list(chain.texts()) == ["one", "two", "three", "x"] and chain.skipped == {"empty": 1}
    assert chain.examples(1, 3) == [{"text": "two"}, {"text": "three"}]
    with pytest.raises(IndexError):
        chain.examples(3, 5)
    with pytest.raises(IndexError):
        chain.describe([4])


def broken(folder: Path, **changes: Any) -> None:
    """The manifest with its last history entry changed, signed again."""
    path = folder / "manifest.json"
    document = json.loads(path.read_bytes())
    document["history"][-1].update(changes)
    document.pop("digest")
    document["digest"] = format_checker.json_digest(document)
    path.write_bytes(json.dumps(document).encode())


@pytest.mark.parametrize(
    "changes", [{"rows": 11}, {"data": "blake2b-256:" + "0" * 64}, {"generation": 2}, {"digest": "x"}], ids=str
)
def test_a_history_that_does_not_fit_is_refused(tmp_path, old, changes):
    grow(Store(tmp_path))
    broken(tmp_path, **changes)
    with pytest.raises(CorruptError, match="manifest.json: "):
        Index.open(tmp_path)


def test_an_unfinished_index_has_nothing_to_append_to(tmp_path, old):
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(FormatError, match="not finished"):
        grow(Store(tmp_path))


class AppendMachine(RuleBasedStateMachine):
    """Appends that die anywhere, of this data or other, then the ones meant."""

    clean: dict[str, bytes]
    base: Path

    def __init__(self):
        super().__init__()
        self.folder = self.base / f"ix{len(list(self.base.iterdir()))}"
        start(self.folder)
        self.done = False

    def teardown(self):
        grow(Store(self.folder))
        found = objects(self.folder)
        assert {name: found[name] for name in self.clean if "catalog-" not in name} == {
            name: data for name, data in self.clean.items() if "catalog-" not in name
        }

    @rule(at=st.integers(0, PUTS), mode=st.sampled_from(MODES))
    def die(self, at, mode):
        try:
            grow(MortalStore(self.folder, at, mode))
        except Kill:
            return

    @rule(mode=st.sampled_from(["before", "torn"]), seed=st.integers(1, 3), count=st.integers(4, 9))
    def die_with_other_data(self, mode, seed, count):
        if not self.done:  # at its first put, which commits nothing
            with pytest.raises(Kill):
                grow(MortalStore(self.folder, 0, mode), count, seed=seed)

    @invariant()
    def readers_see_one_generation(self):
        index = Index.open(self.folder)
        assert index.n in ((OLD + NEW,) if self.done else (OLD, OLD + NEW))
        self.done = index.n > OLD
        assert verify(self.folder) == {"ok": True, "errors": []}


def test_append_machine(tmp_path, clean):
    machine = type("Machine", (AppendMachine,), {"clean": clean, "base": tmp_path})
    quick = settings(max_examples=15, stateful_step_count=6, deadline=None, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(machine, settings=quick)


# -- the verb


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    """A model, and its data in one file and in two."""
    folder = tmp_path_factory.mktemp("append")
    make_model(folder / "model")
    make_model(folder / "other", seed=1)
    lines = make_data(folder / "all.jsonl").read_text().splitlines(keepends=True)
    (folder / "a.jsonl").write_text("".join(lines[:9]))
    (folder / "b.jsonl").write_text("".join(lines[9:]))
    return folder


def build(here: Path, data: str, out: Path, **options: Any) -> str:
    options = {"compress": "gauss:6x6", "shard_rows": 4, "device": "cpu"} | options
    influent.index(str(here / "model"), str(here / data), str(out), **options)
    return str(out)


@pytest.mark.parametrize("rows", ["float32", "rank:2:int8"])
def test_queries_equal_those_of_an_index_made_at_once(here, tmp_path, rows):
    parts = build(here, "a.jsonl", tmp_path / "parts", rows=rows)
    influent.fit(parts, curvature="fim")
    document = influent.append(parts, str(here / "b.jsonl"), device="cpu")
    once = build(here, "all.jsonl", tmp_path / "once", rows=rows)
    assert document["rows"] == influent.info(once)["rows"] and document["skipped"] == influent.info(once)["skipped"]
    assert influent.verify(parts) == {"ok": True, "errors": []}
    for curvature in ("identity", "fim"):
        scores = []
        for index in (parts, once):
            file = tmp_path / "scores.npy"
            influent.query(index, queries=QUERIES, curvature=curvature, scores=str(file), device="cpu")
            scores.append(np.load(file))
        np.testing.assert_allclose(*scores, rtol=1e-3, atol=1e-3 * np.abs(scores[1]).max())
    assert influent.append(parts, str(here / "b.jsonl"), device="cpu")["generation"] == 1


def test_another_model_is_refused_and_the_index_stays(here, tmp_path):
    index = build(here, "a.jsonl", tmp_path / "ix")
    with pytest.raises(MismatchError, match="was built with another model"):
        influent.append(index, str(here / "b.jsonl"), model=str(here / "other"), device="cpu")
    with pytest.raises(DataError, match="repeats that of"):
        influent.append(index, str(here / "all.jsonl"), device="cpu")
    assert influent.info(index)["generation"] == 0 and influent.verify(index)["ok"]


def test_examples_of_a_plain_data_set_are_appended(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    data = [(torch.randn(4), i % 3) for i in range(12)]
    options: dict[str, Any] = {"compress": "id", "shard_rows": 3}
    influent.index(model, data[:7], str(tmp_path / "ix"), task=Classification(), **options)
    influent.append(str(tmp_path / "ix"), data[7:], model=model, task=Classification())
    influent.index(model, data, str(tmp_path / "once"), task=Classification(), **options)
    index, once = (Index.open(tmp_path / name) for name in ("ix", "once"))
    for key in index.keys:
        rows, expected = (torch.cat([shard.rows(key) for shard in each.shards]) for each in (index, once))
        torch.testing.assert_close(rows, expected)
    assert [row["id"] for row in index.catalog.describe(range(12))] == [str(i) for i in range(12)]
    assert Artifact.open(index.store, "index").tensors("000004")[IDS].tolist() == [10, 11]


def test_a_finished_append_names_the_wrong_model_too(here, tmp_path):
    index = build(here, "a.jsonl", tmp_path / "ix")
    influent.append(index, str(here / "b.jsonl"), device="cpu")
    with pytest.raises(MismatchError, match="was built with another model"):
        influent.append(index, str(here / "b.jsonl"), model=str(here / "other"), device="cpu")
    again = influent.append(index, str(here / "b.jsonl"), model=str(here / "model"), device="cpu")
    assert (again["generation"], again["rows"]) == (1, influent.info(index)["rows"])


def test_labels_of_appended_examples_cannot_be_changed_by_appending_again(here, tmp_path):
    index = build(here, "a.jsonl", tmp_path / "ix")
    influent.append(index, str(here / "b.jsonl"), device="cpu")
    records = [json.loads(line) for line in (here / "b.jsonl").read_text().splitlines()]
    other = tmp_path / "b.jsonl"
    other.write_text("".join(json.dumps({**record, "provider": "else"}) + "\n" for record in records))
    with pytest.raises(DataError, match="the source or provider of number 0 is another"):
        influent.append(index, str(other), device="cpu")


def test_after_an_append_the_rank_of_the_earlier_fit_is_the_default(here, tmp_path):
    index = build(here, "a.jsonl", tmp_path / "ix")
    influent.fit(index, curvature="lowrank:3")
    influent.append(index, str(here / "b.jsonl"), device="cpu")
    asked = influent.query(index, **QUERIES[0], curvature="lowrank")
    assert asked["method"]["curvature"] == "lowrank:3:relative:1"


def test_a_missing_part_is_mended_by_the_verb_that_made_it(tmp_path, old):
    grow(Store(tmp_path))
    (tmp_path / "catalog-000001.json").unlink()
    with pytest.raises(FormatError, match="run `influent append` again"):
        Index.open(tmp_path).catalog.describe([0])

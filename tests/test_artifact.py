"""Artifacts and their payloads: bytes, digests, identity, resuming, and reading without a copy."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from influent.artifact import Artifact, ArtifactWriter, canonical_json, digest, kind_of
from influent.errors import CorruptError, FormatError, MismatchError, SpecError
from influent.payload import DTYPES, Payload, encode
from influent.shardrecord import Record
from influent.storage import Store

SPEC = {"a": 1, "b": {"c": [1, 2, {"d": "x"}], "e": 0.1}}
TENSORS = {"w": torch.arange(6.0).reshape(2, 3), "b16": torch.arange(4).to(torch.bfloat16), "none": torch.zeros(0, 3)}


@pytest.fixture(params=["path", "memory"])
def store(request, tmp_path):
    return Store(tmp_path / "x") if request.param == "path" else Store(f"memory://{tmp_path.name}/x")


def num_handles() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def committed(store: Store) -> Artifact:
    writer = ArtifactWriter.open(store, "thing", SPEC, notes={"where": "here"})
    writer.put("s1", TENSORS, {"k": 1}, rows=(3, 5))
    writer.put("s0", TENSORS, rows=(0, 3))
    writer.commit({"total": 5})
    return Artifact.open(store, "thing")


# -- canonical JSON and digests

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
).filter(lambda v: "\\ud" not in json.dumps(v))  # half a surrogate pair has no UTF-8


@given(JSON)
def test_canonical_json_round_trips_to_itself(value):
    text = canonical_json(value)
    assert json.loads(text) == value
    assert canonical_json(json.loads(text)) == text


def test_canonical_json_is_the_documented_text():
    assert (
        canonical_json({"é": 1, "a": [1.0, 1e-7, None, True], "B": {}})
        == '{"B":{},"a":[1.0,1e-07,null,true],"é":1}'.encode()
    )


def test_digest_is_pinned():
    """Computed once with the b2sum program: `printf '{"a":1}' | b2sum -l 256`."""
    assert digest({"a": 1}) == "blake2b-256:10a7ff3e312baec0c356be489739b93f63af84416c40f1c13023eb96c7ed50aa"


@pytest.mark.parametrize("value", [float("nan"), [float("inf")], "\ud800"])
def test_what_json_cannot_hold_is_a_spec_error(value):
    with pytest.raises(SpecError, match="JSON cannot hold"):
        canonical_json(value)


# -- payloads


@st.composite
def tensor_sets(draw):
    names = draw(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), max_size=5, unique=True))
    names = [name for name in names if name != "__metadata__"]
    out = {}
    for name in names:
        dtype = getattr(torch, draw(st.sampled_from([torch_name for torch_name, _ in DTYPES.values()])))
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        out[name] = torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    return out


@settings(deadline=None)
@given(tensor_sets())
def test_payload_round_trips_and_safetensors_agrees(tmp_path_factory, tensors):
    store = Store(tmp_path_factory.mktemp("p"))
    parts = encode(tensors)
    store.put("x", parts)
    payload = Payload(store, "x", sum(len(part) for part in parts))
    theirs = safetensors.torch.load(store.get("x"))
    assert payload.keys() == tensors.keys() == theirs.keys()
    for name, tensor in tensors.items():
        for got in (payload[name], theirs[name]):
            assert got.dtype == tensor.dtype and got.shape == tensor.shape and torch.equal(got, tensor)
        assert payload.describe(name) == (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))


@given(tensor_sets(), st.randoms())
def test_payload_bytes_do_not_depend_on_order_or_strides(tensors, random):
    names = list(tensors)
    random.shuffle(names)
    other = {name: tensors[name].t().contiguous().t() if tensors[name].dim() == 2 else tensors[name] for name in names}
    assert b"".join(encode(tensors)) == b"".join(encode(other))


def test_remote_tensors_equal_local_ones(store):
    artifact = committed(store)
    for name, tensor in artifact.tensors("s0").items():
        assert torch.equal(tensor, TENSORS[name]) and tensor.dtype == TENSORS[name].dtype


def test_reading_is_without_a_copy(tmp_path):
    """Every tensor of a shard is a view of one mapping of the file, and stays valid after the artifact is gone."""
    artifact = committed(Store(tmp_path))
    tensors = dict(artifact.tensors("s0"))
    assert tensors["w"].untyped_storage().data_ptr() == tensors["b16"].untyped_storage().data_ptr()
    assert str(tmp_path / "shards/s0.safetensors") in Path("/proc/self/maps").read_text()
    del artifact
    assert torch.equal(tensors["w"], TENSORS["w"])
    del tensors
    assert str(tmp_path / "shards/s0.safetensors") not in Path("/proc/self/maps").read_text()


def test_writing_to_a_tensor_does_not_reach_the_file(tmp_path):
    artifact = committed(Store(tmp_path))
    artifact.tensors("s0")["w"].fill_(9)
    assert artifact.verify() == []


def test_thousands_of_open_shards_hold_no_file_handles(tmp_path):
    store = Store(tmp_path)
    parts = encode(TENSORS)
    store.put("x", parts)
    size = sum(len(part) for part in parts)
    before = num_handles()
    kept = [Payload(store, "x", size)["w"] for _ in range(1200)]
    assert num_handles() <= before
    assert all(torch.equal(t, TENSORS["w"]) for t in kept[::300])


def test_a_scan_keeps_one_shard_mapped(tmp_path):
    artifact = committed(Store(tmp_path))
    for record in artifact.records:
        assert artifact.tensors(record.name)["w"].sum() == 15
    assert Path("/proc/self/maps").read_text().count(str(tmp_path)) == 1


def test_two_threads_read_different_shards_at_once(tmp_path):
    artifact, usual = committed(Store(tmp_path)), sys.getswitchinterval()

    def wrong(name: str) -> int:
        return sum(artifact.tensors(name).name != f"shards/{name}.safetensors" for _ in range(3000))

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(2) as pool:
            assert list(pool.map(wrong, ["s0", "s1"])) == [0, 0]
    finally:
        sys.setswitchinterval(usual)


# -- writing


def test_artifact_round_trips(store):
    artifact = committed(store)
    assert (artifact.kind, artifact.spec, artifact.notes) == ("thing", SPEC, {"where": "here"})
    assert (artifact.digest, artifact.summary, artifact.generation) == (digest(SPEC), {"total": 5}, 0)
    assert [(r.name, r.rows, r.meta) for r in artifact.records] == [("s0", (0, 3), {}), ("s1", (3, 5), {"k": 1})]
    assert artifact.verify() == []
    assert kind_of(store) == "thing"
    assert store.names() == [
        "manifest.json",
        *(f"shards/{name}.{ending}" for name in ("s0", "s1") for ending in ("json", "safetensors")),
        "spec.json",
    ]


def test_any_block_name_is_a_shard_name(store):
    names = ["spec", "manifest", "../up", "a/b", "é.weight", "", ".", "a%2Fb", "CON", "x" * 60]
    writer = ArtifactWriter.open(store, "thing", SPEC)
    for i, name in enumerate(names):
        writer.put(name, {"t": torch.tensor([i])})
    writer.commit({})
    artifact = Artifact.open(store, "thing")
    assert artifact.verify() == []
    assert [int(artifact.tensors(name)["t"]) for name in names] == list(range(len(names)))
    assert set(ArtifactWriter.open(store, "thing", SPEC).records) == set(names)


def test_unfinished_artifact_resumes_with_its_notes(store):
    first = ArtifactWriter.open(store, "thing", SPEC, notes={"shard_rows": 4})
    record = first.put("s0", TENSORS)
    with pytest.raises(FormatError, match="this thing is not finished: run the same command again to resume"):
        Artifact.open(store, "thing")
    second = ArtifactWriter.open(store, "thing", SPEC, notes={"shard_rows": 99})
    assert second.notes == {"shard_rows": 4}
    assert second.records == {"s0": record}
    assert not second.committed
    second.commit({})
    assert ArtifactWriter.open(store, "thing", SPEC).committed


@pytest.mark.parametrize(
    "damage", ["payload gone", "payload torn", "bit", "record torn", "record renamed", "other spec"]
)
def test_only_intact_shards_are_kept(store, damage):
    writer = ArtifactWriter.open(store, "thing", SPEC)
    writer.put("good", TENSORS)
    writer.put("bad", TENSORS)
    payload, record = store.get("shards/bad.safetensors"), store.get("shards/bad.json")
    if damage == "payload gone":
        store.delete("shards/bad.safetensors")
    elif damage == "payload torn":
        store.put("shards/bad.safetensors", payload[:-1])
    elif damage == "bit":
        store.put("shards/bad.safetensors", payload[:-1] + bytes([payload[-1] ^ 1]))
    elif damage == "record torn":
        store.put("shards/bad.json", record[:-1])
    elif damage == "record renamed":
        store.put("shards/bad.json", record.replace(b'"bad"', b'"sad"'))
    else:
        store.put("shards/bad.json", record.replace(digest(SPEC).encode(), digest({}).encode()))
    assert set(ArtifactWriter.open(store, "thing", SPEC).records) == {"good"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": 2}, r"a is 1 there and 2 in this run"),
        ({"b": {"c": [1, 2, {"d": "y"}], "e": 0.1}}, r'b\.c\[2\]\.d is "x" there and "y" in this run'),
        ({"b": {"c": [1], "e": 0.1}}, r"the length of b\.c is 3 there and 1 in this run"),
        ({"b": {"c": [1, 2, {"d": "x"}]}}, r"b\.e is 0\.1 there and absent in this run"),
        ({"z": None}, r"z is absent there and null in this run"),
        ({"a": "l" * 500}, r'a is 1 there and "l{100,117}\.\.\. in this run'),
        ({"a": True}, r"a is 1 there and true in this run"),
        ({"a": 1.0}, r"a is 1 there and 1\.0 in this run"),
    ],
)
def test_another_spec_is_refused_by_its_first_field(store, change, message):
    ArtifactWriter.open(store, "thing", SPEC)
    before = {name: store.get(name) for name in store.names()}
    with pytest.raises(MismatchError, match=message) as e:
        ArtifactWriter.open(store, "thing", SPEC | change)
    assert str(store) in str(e.value) and "\n" not in str(e.value)
    assert {name: store.get(name) for name in store.names()} == before


def test_another_kind_is_refused(store):
    committed(store)
    with pytest.raises(FormatError, match="expected a directory of kind 'other', got 'thing'"):
        Artifact.open(store, "other")
    with pytest.raises(FormatError, match="expected a directory of kind 'other', got 'thing'"):
        ArtifactWriter.open(store, "other", SPEC)


@given(
    st.text(max_size=20).filter(str.isprintable),
    st.none() | st.tuples(st.integers(0, 10**12), st.integers(0, 10**12)),
    st.integers(0, 10**15),
    st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), st.integers() | st.lists(st.integers())),
)
def test_records_round_trip(name, rows, size, meta):
    record = Record(name, rows, size, digest(0), meta, digest(SPEC))
    obj = json.loads(canonical_json(record.to_json()))
    assert Record.from_json(obj) == record


def test_safetensors_library_opens_a_shard(tmp_path):
    committed(Store(tmp_path))
    with safetensors.safe_open(tmp_path / "shards/s0.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("w"), TENSORS["w"])


def test_verify_names_every_fault(tmp_path):
    artifact = committed(Store(tmp_path))
    (tmp_path / "shards/s0.json").unlink()
    (tmp_path / "shards/s0.safetensors").write_bytes(b"short")
    (tmp_path / "spec.json").write_bytes((tmp_path / "spec.json").read_bytes() + b" ")
    problems = artifact.verify()
    assert [problem.split(": ")[0].removeprefix(f"{tmp_path}/") for problem in problems] == [
        "spec.json", "shards/s0.safetensors", "shards/s0.json"
    ]  # fmt: skip
    with pytest.raises(CorruptError, match=r"s0\.safetensors: expected \d+ bytes, got 5"):
        artifact.tensors("s0")

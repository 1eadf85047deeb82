"""Malformed indexes: whatever is broken in one is refused, and named."""

import json
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import format_checker
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from influent.artifact import canonical_json, digest
from influent.errors import CorruptError, FormatError, InfluentError
from influent.rowstore import Index, verify
from influent.storage import Store

TESTS = Path(__file__).parent
GOLDEN = TESTS / "golden" / "v1"
CODED = TESTS / "golden" / "v1.1"
DOCS = TESTS.parent / "docs"

sys.path.insert(0, str(TESTS / "golden"))
import make_v1  # noqa: E402


def objects(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def copy(tmp_path) -> Path:
    return Path(shutil.copytree(GOLDEN, tmp_path / "ix"))


# -- malformed indexes: (how to break the golden one, the error, words of its message). All messages have one line, name
# the object and are found by `verify`; the first table is met on opening, the second on reading, the third by `verify`.

Break = Callable[[Path], object]


def edit(name: str, change: Callable[[dict], object], *, sign: bool = True) -> Break:
    """Change a JSON document, and its digest so that only the change itself is wrong."""

    def run(folder: Path) -> None:
        document = json.loads((folder / name).read_bytes())
        change(document)
        if sign and name.endswith("manifest.json"):
            document["digest"] = digest({k: v for k, v in document.items() if k != "digest"})
        (folder / name).write_bytes(canonical_json(document))

    return run


def write(name: str, data: bytes) -> Break:
    return lambda folder: (folder / name).write_bytes(data)


def remove(*names: str) -> Break:
    return lambda folder: [(folder / name).unlink() for name in names]


def flip(name: str, at: int = -1) -> Break:
    def run(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[at] ^= 1
        (folder / name).write_bytes(data)

    return run


def cut(name: str, by: int) -> Break:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-by])


def drop(*keys: str) -> Callable[[dict], object]:
    return lambda document: [document.pop(key) for key in keys]


def put(**changes: object) -> Callable[[dict], object]:
    return lambda document: document.update(changes)


def record(at: int, **changes: object) -> Callable[[dict], object]:
    """The change of a record, vouched for by its digest if it has one."""

    def change(manifest: dict) -> None:
        entry = manifest["records"][at]
        entry.update(changes)
        if "digest" in entry:
            entry["digest"] = format_checker.json_digest({k: v for k, v in entry.items() if k != "digest"})

    return change


ON_OPEN: dict[str, tuple[Break, type[InfluentError], str]] = {
    "nothing there": (shutil.rmtree, FormatError, "not an influent index: there is no manifest.json"),
    "a file": (lambda f: (shutil.rmtree(f), f.write_bytes(b"")), FormatError, "not an influent index"),
    "unfinished": (remove("manifest.json"), FormatError, "not finished: run the same command again to resume"),
    "manifest empty": (write("manifest.json", b""), CorruptError, "manifest.json: not readable as JSON"),
    "manifest cut": (cut("manifest.json", 20), CorruptError, "manifest.json: not readable as JSON"),
    "manifest binary": (write("manifest.json", b"\xff\xfe\x00"), CorruptError, "manifest.json: not readable as JSON"),
    "manifest list": (write("manifest.json", b"[]"), CorruptError, "expected a JSON object, got list"),
    "manifest NaN": (write("manifest.json", b'{"a": NaN}'), CorruptError, "manifest.json: not readable as JSON"),
    "manifest surrogate": (write("manifest.json", b'{"a": "\\ud800"}'), CorruptError, "not readable as JSON"),
    "manifest deep": (write("manifest.json", b"[" * 100_000), CorruptError, "not readable as JSON"),
    "manifest edited": (
        edit("manifest.json", put(generation=1), sign=False),
        CorruptError,
        "digest does not match its content",
    ),
    "no version": (edit("manifest.json", drop("format")), FormatError, "expected a format version [major, minor], got"),
    "version text": (edit("manifest.json", put(format="1.0")), FormatError, "expected a format version"),
    "next major": (
        edit("manifest.json", put(format=[2, 0], reader="influent 3.1")),
        FormatError,
        "format 2.0, this release reads 1.x; use influent 3.1",
    ),
    "feature": (
        edit("manifest.json", put(requires=["tombstones"], reader="influent 0.4")),
        FormatError,
        "requires 'tombstones', which this release does not know; use influent 0.4",
    ),
    "feature of spec": (edit("spec.json", put(requires=["x"])), FormatError, "spec.json: requires 'x'"),
    "requires text": (edit("manifest.json", put(requires="none")), FormatError, "expected a list 'requires'"),
    "kind": (edit("manifest.json", put(kind="gram")), FormatError, "of kind 'index', got 'gram'"),
    "no records": (edit("manifest.json", drop("records")), CorruptError, "manifest.json: KeyError: 'records'"),
    "records number": (edit("manifest.json", put(records=3)), CorruptError, "manifest.json: TypeError"),
    "record text": (edit("manifest.json", put(records=["a"])), CorruptError, "a record must be an object, got str"),
    "record hash": (edit("manifest.json", record(0, hash=3)), CorruptError, "the record's hash must be str, got 3"),
    "record rows": (edit("manifest.json", record(0, rows=[0, "4"])), CorruptError, "rows must be [lo, hi] or null"),
    "no rows": (edit("manifest.json", record(0, rows=None)), CorruptError, "shard 000000 has rows None"),
    "gap": (edit("manifest.json", record(1, rows=[3, 4])), CorruptError, "expected them to begin at 2"),
    "overlap": (edit("manifest.json", record(1, rows=[1, 4])), CorruptError, "expected them to begin at 2"),
    "empty shard": (edit("manifest.json", record(0, rows=[0, 0])), CorruptError, "expected them to begin at 0"),
    "first shard gone": (
        edit("manifest.json", lambda m: m["records"].pop(0)),
        CorruptError,
        "expected them to begin at 0",
    ),
    "no spec": (remove("spec.json"), CorruptError, "spec.json: missing"),
    "spec cut": (cut("spec.json", 5), CorruptError, "spec.json: not readable as JSON"),
    "spec edited": (edit("spec.json", lambda d: d["spec"].update(seed=1)), CorruptError, "does not match its spec"),
    "no notes": (edit("spec.json", drop("notes")), CorruptError, "spec.json: expected an object 'notes', got NoneType"),
    "another's spec": (
        edit("spec.json", lambda d: d.update(spec={}, digest=digest({}))),
        CorruptError,
        "spec.json: its digest is not the manifest's",
    ),
}


@pytest.mark.parametrize("case", ON_OPEN)
def test_malformed_on_open(copy, case):
    damage, error, words = ON_OPEN[case]
    damage(copy)
    with pytest.raises(error) as e:
        Index.open(copy)
    assert words in str(e.value) and str(copy) in str(e.value) and "\n" not in str(e.value)
    if error is CorruptError:
        found = verify(copy)
        assert not found["ok"] and words in found["errors"][0]
    else:
        with pytest.raises(FormatError):
            verify(copy)


SHARD = "shards/000001.safetensors"


def payload(header: object, data: int, *, length: int | None = None) -> Break:
    """Replace a shard by one with this header and as many bytes of data, committed with its true size and hash."""

    def run(folder: Path) -> None:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        parts = struct.pack("<Q", len(text) if length is None else length) + text + bytes(data)
        (folder / SHARD).write_bytes(parts)
        recommit(folder)

    return run


def recommit(folder: Path) -> None:
    """Make the manifest and the record agree with the bytes of SHARD: only its content is then wrong."""
    data = (folder / SHARD).read_bytes()
    facts = {"bytes": len(data), "hash": format_checker.text_hash(data)}
    edit("manifest.json", record(1, **facts))(folder)
    edit("shards/000001.json", put(**facts))(folder)


def entry(dtype: str, shape: list, lo: int, hi: int) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [lo, hi]}


def good(**changes: object) -> dict:
    """The header of the golden shard 000001, two rows, with some entries changed or (None) left out."""
    header = {
        ".id": entry("I64", [2], 0, 16),
        ".loss": entry("F32", [2], 16, 24),
        ".norm": entry("F32", [2], 24, 32),
        ".tokens": entry("F32", [2], 32, 40),
        "h.0.fc": entry("BF16", [2, 3], 40, 52),
        "h.1.fc": entry("BF16", [2, 5], 52, 72),
        "norm": entry("BF16", [2, 2], 72, 80),
    }
    header |= {key.replace("__", "."): value for key, value in changes.items()}
    return {key: value for key, value in header.items() if value is not None}


TWICE = json.dumps(good()).replace(".tokens", ".norm").encode()

ON_READ: dict[str, tuple[Break, str]] = {
    "shard gone": (remove(SHARD), "missing"),
    "shard cut": (cut(SHARD, 1), "expected 512 bytes, got 511"),
    "shard longer": (lambda f: (f / SHARD).write_bytes((f / SHARD).read_bytes() + b"0"), "expected 512 bytes, got 513"),
    "shard empty": (write(SHARD, b""), "expected 512 bytes, got 0"),
    "too short": (lambda f: (write(SHARD, b"1234567")(f), recommit(f)), "7 bytes are too few"),
    "header length": (payload(good(), 80, length=2**63), "a header of 9223372036854775808 bytes in a file of"),
    "header past end": (payload(good(), 80, length=5000), "a header of 5000 bytes in a file of"),
    "header not JSON": (payload(b"{nonsense", 80), "not a valid payload: "),
    "header not UTF-8": (payload(b"\xff\xff{}", 80), "not a valid payload: "),
    "header deep": (payload(b"[" * 100_000, 80), "not a valid payload: "),
    "header list": (payload([], 0), "the header is a list, not an object"),
    "entry list": (payload({"a": []}, 0), "not a valid payload: "),
    "no offsets": (payload({"a": {"dtype": "F32"}}, 0), "missing 'data_offsets'"),
    "one offset": (
        payload(good(norm={"dtype": "BF16", "shape": [2, 2], "data_offsets": [72]}), 80),
        "not a valid payload",
    ),
    "name twice": (payload(TWICE, 80), "a name occurs twice"),
    "dtype unknown": (payload(good(norm=entry("F4", [2, 2], 72, 80)), 80), "norm: unknown dtype 'F4'"),
    "shape negative": (payload(good(norm=entry("BF16", [-2, -2], 72, 80)), 80), "must be whole numbers"),
    "shape fraction": (payload(good(norm=entry("BF16", [2.0, 2], 72, 80)), 80), "must be whole numbers"),
    "hole": (payload(good(norm=entry("BF16", [2, 2], 74, 82)), 82), "norm: offsets [74, 82], expected [72, 80]"),
    "overlap": (payload(good(norm=entry("BF16", [2, 2], 70, 78)), 80), "norm: offsets [70, 78], expected [72, 80]"),
    "size": (payload(good(norm=entry("BF16", [2, 2], 72, 76)), 80), "norm: offsets [72, 76], expected [72, 80]"),
    "huge": (payload(good(norm=entry("BF16", [2**62, 2**62], 72, 80)), 80), "norm: offsets [72, 80], expected"),
    "data cut": (payload(good(), 78), "its tensors end at byte"),
    "data longer": (payload(good(), 88), "its tensors end at byte"),
    "misaligned": (
        payload({"a": entry("U8", [1], 0, 1), "norm": entry("BF16", [2, 2], 1, 9)}, 9),
        "norm: begins at byte",
    ),
    "block gone": (payload(good(norm=None), 72), "tensor 'norm': expected bfloat16 [2, 2], got none"),
    "block narrow": (
        payload(good(norm=entry("BF16", [2, 1], 72, 76)), 76),
        "expected bfloat16 [2, 2], got bfloat16 [2, 1]",
    ),
    "rows few": (
        payload(good(norm=entry("BF16", [1, 2], 72, 76)), 76),
        "expected bfloat16 [2, 2], got bfloat16 [1, 2]",
    ),
    "dtype other": (
        payload(good(norm=entry("F16", [2, 2], 72, 80)), 80),
        "expected bfloat16 [2, 2], got float16 [2, 2]",
    ),
    "rank other": (payload(good(norm=entry("BF16", [4], 72, 80)), 80), "expected bfloat16 [2, 2], got bfloat16 [4]"),
}


@pytest.mark.parametrize("case", ON_READ)
def test_malformed_on_read(copy, case):
    damage, words = ON_READ[case]
    damage(copy)
    index = Index.open(copy)
    with pytest.raises(CorruptError) as e:
        index.shards[1].rows("norm")
    assert words in str(e.value) and f"{copy}/{SHARD}" in str(e.value) and "\n" not in str(e.value)
    assert torch.equal(index.shards[0].rows("norm"), Index.open(GOLDEN).shards[0].rows("norm"))
    found = verify(copy)
    assert not found["ok"] and any(SHARD in line for line in found["errors"])


def extra_tensor(folder: Path) -> None:
    data = (folder / SHARD).read_bytes()[-80:]
    payload(good(zz=entry("BF16", [1], 80, 82)), 82)(folder)
    (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:-82] + data + bytes(2))
    recommit(folder)


def shuffle_ids(folder: Path) -> None:
    data = bytearray((folder / SHARD).read_bytes())
    start = len(data) - 80
    data[start : start + 16] = struct.pack("<2q", 3, 2)
    (folder / SHARD).write_bytes(data)
    recommit(folder)


def other_catalog(folder: Path) -> None:
    """A sound catalog, of other data, vouched for by the manifest."""
    for name in make_v1.CATALOG:
        (folder / name).unlink()
    make_v1.catalog.build([{"text": str(i)} for i in range(4)], Store(folder / "new"))
    for name in make_v1.CATALOG:
        shutil.move(folder / "new" / name, folder / name)
    facts = {n: {"bytes": (folder / n).stat().st_size, "hash": format_checker.text_hash((folder / n).read_bytes())}
             for n in make_v1.CATALOG}  # fmt: skip
    edit("manifest.json", put(files=facts))(folder)


ON_VERIFY: dict[str, tuple[Break, list[str]]] = {
    "data bit": (flip(SHARD), [f"{SHARD}: its hash is not the committed one; delete {SHARD} and manifest.json"]),
    "header bit": (flip(SHARD, 20), [f"{SHARD}: its hash is not the committed one"]),
    "two shards": (
        lambda f: (flip(SHARD)(f), remove("shards/000000.safetensors")(f)),
        ["shards/000000.safetensors: missing", f"{SHARD}: its hash is not the committed one"],
    ),
    "record gone": (remove("shards/000001.json"), ["shards/000001.json: missing"]),
    "record edited": (
        edit("shards/000001.json", put(meta={})),
        ["shards/000001.json: differs from the manifest's record"],
    ),
    "notes edited": (edit("spec.json", put(notes={"shard_rows": 3})), ["spec.json: its hash is not the committed one"]),
    "ids": (shuffle_ids, [f"{SHARD}: its ids are not the rows 2 to 3 in order"]),
    "extra tensor": (extra_tensor, ["tensor 'zz': expected none, got bfloat16 [1]"]),
    "catalog gone": (remove("catalog.parquet"), ["catalog.parquet: missing"]),
    "catalog bit": (flip("catalog.parquet", 100), ["catalog.parquet: its hash is not the committed one"]),
    "catalog record": (flip("catalog.json", 20), ["catalog.json: its hash is not the committed one"]),
    "other catalog": (other_catalog, ["catalog.json: 4 rows, but the index has 5", "catalog.json: its digest is"]),
    "no catalog": (lambda f: (remove(*make_v1.CATALOG)(f), edit("manifest.json", put(files={}))(f)), ["catalog.json"]),
    "curvature bit": (
        flip("curvature/fim/shards/norm.safetensors"),
        ["curvature/fim/shards/norm.safetensors: its hash"],
    ),
    "curvature manifest": (
        cut("curvature/fim/manifest.json", 9),
        ["curvature/fim/manifest.json: not readable as JSON"],
    ),
    "curvature version": (
        edit("curvature/fim/manifest.json", put(format=[9, 0])),
        ["format 9.0, this release reads 1.x"],
    ),
}


@pytest.mark.parametrize("case", ON_VERIFY)
def test_malformed_on_verify(copy, case):
    damage, lines = ON_VERIFY[case]
    damage(copy)
    errors = verify(copy)["errors"]
    assert len(errors) == len(lines)
    for expected, line in zip(lines, errors, strict=True):
        assert expected in line and "\n" not in line
    with pytest.raises((AssertionError, KeyError, FileNotFoundError, ValueError)):
        format_checker.check(copy)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_bit_is_found(tmp_path_factory, data):
    """Every bit of every committed object matters to `verify`, and none of them makes it crash."""
    folder = Path(shutil.copytree(GOLDEN, tmp_path_factory.mktemp("flip") / "ix"))
    name = data.draw(st.sampled_from(sorted(objects(GOLDEN))))
    content = bytearray((folder / name).read_bytes())
    at, bit = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(0, 7))
    content[at] ^= 1 << bit
    (folder / name).write_bytes(content)
    try:
        found = verify(folder)
    except FormatError:
        return
    assert not found["ok"]


# -- what a later minor version may add


@pytest.mark.parametrize("name", ["manifest.json", "spec.json"])
def test_unknown_keys_and_newer_minor_versions_are_read(copy, name):
    edit(name, put(format=[1, 7], colour="blue"))(copy)
    edit("manifest.json", put(spec_hash=format_checker.text_hash((copy / "spec.json").read_bytes())))(copy)
    assert verify(copy)["ok"]


def test_generations_are_read(copy):
    edit("manifest.json", put(generation=3))(copy)
    assert Index.open(copy).artifact.generation == 3


def test_unlisted_objects_mean_nothing(copy):
    for name in ("shards/000009.json", "shards/000009.safetensors", "shards/000000.safetensors.12ab34cd.tmp", "README"):
        (copy / name).write_bytes(b"whatever")
    assert verify(copy)["ok"]
    format_checker.check(copy)

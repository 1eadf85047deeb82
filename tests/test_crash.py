"""Kill the writer anywhere, tear files, fill the disk: the same command again ends in the bytes of one clean run.

A kill is a BaseException out of the store, before an object is written, while it is (a torn temporary file stays), or
just after. Readers may see a finished index or none, never half of one.
"""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from indexes import make_index, spec, write_catalog

from influent.artifact import ArtifactWriter
from influent.errors import CorruptError, FormatError, InfluentError, MismatchError
from influent.rowstore import Index, verify
from influent.rowwriter import IndexWriter
from influent.storage import Store

ROWS, SHARD_ROWS = 10, 3
PUTS = 12  # catalog.parquet and its record, spec, 4 payloads and 4 records, manifest
MODES = ["before", "torn", "after"]


class Kill(BaseException):
    """The process is gone."""


class MortalStore(Store):
    """Dies at the put number `at`, counted from 0."""

    def __init__(self, root: Path, at: int, mode: str):
        super().__init__(root)
        self.at, self.mode, self.puts = at, mode, 0

    def put(self, name, data):
        self._around(name, lambda: super(MortalStore, self).put(name, data))

    def put_file(self, name, source):
        self._around(name, lambda: super(MortalStore, self).put_file(name, source))

    def _around(self, name, write):
        now, self.puts = self.puts, self.puts + 1
        if now == self.at and self.mode == "torn":
            path = self.local(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_name(f"{path.name}.deadbeef.tmp").write_bytes(b"half of it")
        if now == self.at and self.mode != "after":
            raise Kill
        write()
        if now == self.at:
            raise Kill


class CountingStore(Store):
    """Notes what is written."""

    def __init__(self, root: Path):
        super().__init__(root)
        self.written: list[str] = []

    def put(self, name, data):
        self.written.append(name)
        super().put(name, data)


def index_into(store: Store) -> IndexWriter:
    return make_index(store, ROWS, shard_rows=SHARD_ROWS, rows="bfloat16")


def objects(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> dict[str, bytes]:
    """The bytes of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("clean")
    store = MortalStore(folder, PUTS, "before")
    index_into(store)
    assert store.puts == PUTS
    return objects(folder)


def finished(folder: Path) -> set[str]:
    """The shards that need not be written again."""
    stems = {p.name.partition(".")[0] for p in folder.glob("shards/*.json")}
    return {stem for stem in stems if (folder / f"shards/{stem}.safetensors").exists()}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("at", range(PUTS))
def test_killed_at_any_put(tmp_path, clean, at, mode):
    with pytest.raises(Kill):
        index_into(MortalStore(tmp_path, at, mode))
    done = finished(tmp_path)
    if (at, mode) == (PUTS - 1, "after"):
        assert verify(tmp_path)["ok"]
    else:
        with pytest.raises(FormatError):
            Index.open(tmp_path)
    store = CountingStore(tmp_path)
    index_into(store)
    assert objects(tmp_path) == clean
    assert verify(tmp_path) == {"ok": True, "errors": []}
    assert not {f"shards/{stem}.safetensors" for stem in done} & set(store.written)


@pytest.mark.parametrize("mode", MODES)
def test_killed_at_every_put_in_turn(tmp_path, clean, mode):
    """The unluckiest user: each run gets one payload and its record further, the unit of progress, then dies."""
    runs = 0
    while True:
        assert (runs := runs + 1) < 50
        try:
            index_into(MortalStore(tmp_path, 1 if mode == "after" else 2, mode))
            break
        except Kill:
            assert not (tmp_path / "manifest.json").exists() or verify(tmp_path)["ok"]
    assert objects(tmp_path) == clean


def test_killed_for_real(tmp_path, clean):
    """SIGKILL in a process of its own, with a temporary file written and not yet renamed."""
    script = """
import os, signal, sys
from pathlib import Path
from influent.storage import Store
from test_crash import index_into
rename = Path.replace
def replace(self, target):
    if target.name == "000002.safetensors":
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, target)
Path.replace = replace
index_into(Store(sys.argv[1]))
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=Path(__file__).parent, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert len(list(tmp_path.rglob("*.tmp"))) == 1
    with pytest.raises(FormatError, match="not finished: run the same command again to resume"):
        Index.open(tmp_path)
    index_into(Store(tmp_path))
    assert objects(tmp_path) == clean


# -- a full disk


def same_or_absent(folder: Path, clean: dict[str, bytes]) -> None:
    """Whatever is there is whole, and no temporary file is left: a failed write cleans up after itself."""
    assert objects(folder).items() <= clean.items()


@pytest.mark.parametrize("at", range(PUTS))
def test_disk_full_at_any_put(tmp_path, clean, monkeypatch, at):
    calls = iter(range(10**6))
    sync = os.fsync

    def fsync(descriptor):
        if Path(f"/proc/self/fd/{descriptor}").readlink().suffix == ".tmp" and next(calls) == at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(CorruptError, match="cannot be written: disk full: No space left .*same command again") as e:
        index_into(Store(tmp_path))
    assert str(e.value).startswith(f"{tmp_path}/") and "\n" not in str(e.value)
    same_or_absent(tmp_path, clean)
    with pytest.raises(FormatError):
        Index.open(tmp_path)
    index_into(Store(tmp_path))
    assert objects(tmp_path) == clean


TINY = """
import sys
from influent.errors import CorruptError
from influent.storage import Store
from indexes import make_index
try:
    make_index(Store(sys.argv[1]), 4000, shard_rows=400)
except CorruptError as e:
    print(e, file=sys.stderr)
    sys.exit(2)
"""


def test_disk_full_for_real(tmp_path):
    """A file system of 256 KiB in a mount namespace of its own, then a larger one that holds the rest."""
    run = f"mount -t tmpfs -o size=256k tmpfs {tmp_path}"
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "sh", "-c", run], check=False).returncode:
        pytest.skip("no mount namespaces here")
    script = f'{run} && {sys.executable} -c "$TINY" {tmp_path}; code=$?; cd {tmp_path}; find . -type f; exit $code'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script], env=os.environ | {"TINY": TINY}, cwd=Path(__file__).parent,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "cannot be written: disk full: No space left on device" in done.stderr and done.stderr.count("\n") == 1
    names = done.stdout.split()
    assert "./spec.json" in names and "./manifest.json" not in names and not [n for n in names if n.endswith(".tmp")]


def test_size_limit_for_real(tmp_path):
    """Every object over 20 kB fails half-way, as the first large one does on a full disk; then the limit is lifted."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))"
    command = [sys.executable, "-c", f"{limit}\n{TINY}", str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 2 and "File too large" in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not list(tmp_path.rglob("*.tmp"))
    make_index(Store(tmp_path), 4000, shard_rows=400)
    assert verify(tmp_path)["ok"]


# -- damage to a finished index, mended as the message says

COMMITTED = ["catalog.json", "catalog.parquet", "manifest.json", "shards/000001.json", "shards/000001.safetensors"]


@pytest.mark.parametrize("how", ["flip", "cut", "gone"])
@pytest.mark.parametrize("name", [*COMMITTED, "spec.json"])
def test_advice_of_verify_mends_the_index(tmp_path, clean, name, how):
    index_into(Store(tmp_path))
    content = bytearray(clean[name])
    content[40] ^= 1
    if how == "gone":
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content if how == "flip" else content[:-1])
    try:
        message = "\n".join(verify(tmp_path)["errors"])
    except FormatError as e:  # without its manifest it is an index to resume
        message = str(e)
    assert "run the same command again" in message
    for advised in re.findall(r"delete (.*?) there", message):
        for each in advised.split(" and "):
            (tmp_path / each).unlink(missing_ok=True)
    index_into(Store(tmp_path))
    assert objects(tmp_path) == clean


# -- damage to an unfinished index, met by resuming it


def test_no_flipped_bit_of_a_record_survives_a_resume(tmp_path, clean):
    index_into(Store(tmp_path))
    (tmp_path / "manifest.json").unlink()
    path = tmp_path / "shards/000000.json"
    writer = ArtifactWriter.open(Store(tmp_path), "index", json.loads(clean["spec.json"])["spec"])
    assert "000000" in {record.name for record in writer._intact()}
    for place in range(8 * len(clean["shards/000000.json"])):
        content = bytearray(clean["shards/000000.json"])
        content[place // 8] ^= 1 << place % 8
        path.write_bytes(content)
        assert "000000" not in {record.name for record in writer._intact()}, bytes(content)
    index_into(Store(tmp_path))
    assert objects(tmp_path) == clean


# -- anything, in any order


class CrashMachine(RuleBasedStateMachine):
    """Kills, damage, other specs and other shard sizes, then one clean run."""

    clean: dict[str, bytes]
    base: Path

    def __init__(self):
        super().__init__()
        self.folder = self.base / f"ix{len(list(self.base.iterdir()))}"
        self.folder.mkdir()

    def teardown(self):
        self.finish()
        shutil.rmtree(self.folder)

    def finish(self):
        index_into(Store(self.folder))
        assert objects(self.folder) == self.clean
        assert verify(self.folder) == {"ok": True, "errors": []}

    @rule(at=st.integers(0, PUTS), mode=st.sampled_from(MODES))
    def run_and_die(self, at, mode):
        try:
            index_into(MortalStore(self.folder, at, mode))
        except Kill:
            return

    @rule()
    def run(self):
        self.finish()

    def shards(self) -> list[Path]:
        return sorted(p for p in self.folder.glob("shards/*") if p.suffix != ".tmp")

    @precondition(lambda self: self.shards())
    @rule(which=st.integers(0, 7), how=st.sampled_from(["remove", "cut", "flip"]), at=st.floats(0, 0.999))
    def damage_a_shard(self, which, how, at):
        shards = self.shards()
        path = shards[which % len(shards)]
        content = bytearray(path.read_bytes())
        place = int(at * len(content))
        if how == "remove":
            path.unlink()
        elif how == "cut":
            path.write_bytes(content[:place])
        elif content:
            content[place] ^= 1
            path.write_bytes(content)
        if (self.folder / "manifest.json").exists():
            errors = verify(self.folder)["errors"]
            assert errors and all(path.stem in line for line in errors)
            # What the message says to do.
            path.unlink(missing_ok=True)
            (self.folder / "manifest.json").unlink()

    @precondition(lambda self: (self.folder / "spec.json").exists())
    @rule(seed=st.integers(1, 3))
    def another_spec(self, seed):
        store = Store(self.folder)
        before = objects(self.folder)
        data = write_catalog(store, ROWS)
        with pytest.raises(MismatchError, match=f"seed is 0 there and {seed} in this run"):
            IndexWriter.open(store, spec(data, rows="bfloat16", seed=seed), notes={"shard_rows": SHARD_ROWS})
        assert objects(self.folder) == before

    @precondition(lambda self: (self.folder / "spec.json").exists())
    @rule(size=st.integers(1, 5))
    def another_shard_size(self, size):
        store = Store(self.folder)
        writer = IndexWriter.open(store, spec(write_catalog(store, ROWS), rows="bfloat16"), notes={"shard_rows": size})
        assert writer.notes == {"shard_rows": SHARD_ROWS}

    @invariant()
    def readers_see_all_or_nothing(self):
        try:
            index = Index.open(self.folder)
        except InfluentError as e:
            assert isinstance(e, FormatError)
        else:
            assert index.n == ROWS
            assert verify(self.folder)["ok"]


def test_crash_machine(tmp_path, clean):
    machine = type("Machine", (CrashMachine,), {"clean": clean, "base": tmp_path})
    quick = settings(max_examples=25, stateful_step_count=8, deadline=None, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(machine, settings=quick)

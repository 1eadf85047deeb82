"""The store: whole objects or none, on local folders and on fsspec file systems alike."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from influent.errors import CorruptError, SpecError
from influent.storage import Store


@pytest.fixture(params=["path", "file", "memory"])
def store(request, tmp_path):
    root = {"path": tmp_path / "s", "file": f"file://{tmp_path}/s", "memory": f"memory://{tmp_path.name}/s"}
    return Store(root[request.param])


def files(store: Store) -> list[str]:
    """Everything in the store, unfinished writes too."""
    return store._walk("")


def test_objects_round_trip(store):
    store.put("a/b.bin", b"0123456789")
    store.put("parts", [b"ab", memoryview(b"cd"), bytearray(b"ef")])
    assert store.get("a/b.bin") == b"0123456789"
    assert store.get("parts") == b"abcdef"
    assert store.get_range("a/b.bin", 2, 5) == b"234"
    assert store.size("a/b.bin") == 10
    assert store.names() == ["a/b.bin", "parts"]
    assert store.names("a/") == ["a/b.bin"]
    assert store.names("pa") == ["parts"]
    assert store.names("nothing/") == []
    store.put("parts", b"")
    assert store.size("parts") == 0
    store.delete("parts")
    store.delete("parts")
    assert not store.exists("parts")
    assert not store.exists("a")
    assert files(store) == ["a/b.bin"]


def test_child_is_the_folder_below(store):
    store.child("x/y").put("z", b"1")
    assert store.get("x/y/z") == b"1"
    assert str(store.child("x")) == f"{store}/x"


def test_put_file_copies(store, tmp_path):
    source = tmp_path / "source"
    source.write_bytes(b"s" * 5_000_000)
    store.put_file("copy", source)
    assert store.get("copy") == source.read_bytes()
    assert files(store) == ["copy"]


@pytest.mark.parametrize("verb", ["get", "size"])
def test_missing_object_is_named(store, verb):
    with pytest.raises(CorruptError, match=r"/s/gone: missing"):
        getattr(store, verb)("gone")


def test_short_range_is_an_error(store):
    store.put("a", b"123")
    with pytest.raises(CorruptError, match=r"/s/a: truncated: expected bytes 1 to 9, got 2"):
        store.get_range("a", 1, 9)


def test_unknown_scheme_is_a_spec_error():
    with pytest.raises(SpecError, match=r"nowhere://x: no such storage: Protocol not known: nowhere"):
        Store("nowhere://x")


def test_only_local_stores_have_paths(tmp_path):
    assert Store(tmp_path).local("a") == tmp_path / "a"
    assert Store(f"file://{tmp_path}").local("a") == tmp_path / "a"
    assert Store("memory://s").local("a") is None


def test_unfinished_writes_are_invisible_and_swept(tmp_path):
    store = Store(tmp_path)
    store.put("a", b"1")
    (tmp_path / "a.0123abcd.tmp").write_bytes(b"torn")
    assert store.names() == ["a"]
    store.sweep()
    assert files(store) == ["a"]


class Boom(BaseException):
    """Stands for a kill: no handler for ordinary errors may catch it."""


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("error", [Boom(), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))], ids=["kill", "full"])
def test_failed_write_keeps_the_old_object(tmp_path, monkeypatch, call, error):
    def fail(*_):
        raise error

    store = Store(tmp_path)
    store.put("a", b"old")
    monkeypatch.setattr(*((os, "fsync") if call == "fsync" else (Path, "replace")), fail)
    expected = Boom if isinstance(error, Boom) else CorruptError
    with pytest.raises(expected) as e:
        store.put("a", b"new")
    assert store.get("a") == b"old"
    assert files(store) == ["a"]
    if expected is CorruptError:
        assert f"{tmp_path}/a: cannot be written: disk full: No space left on device" in str(e.value)
        assert "\n" not in str(e.value)


def test_size_limit_is_one_clear_error(tmp_path):
    """A real write that really fails half-way: the file size limit of the process, as a full disk would."""
    script = f"""
import resource
from influent.storage import Store
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
store = Store({str(tmp_path)!r})
store.put("small", b"x" * 50_000)
store.put("big", b"x" * 500_000)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert f"CorruptError: {tmp_path}/big: cannot be written: File too large" in done.stderr
    assert files(Store(tmp_path)) == ["small"]


def test_folder_that_is_a_file_is_one_clear_error(tmp_path):
    (tmp_path / "f").write_bytes(b"")
    store = Store(tmp_path / "f")
    assert not store.exists("spec.json")
    with pytest.raises(CorruptError, match=r"/f/a: cannot be written: (Not a directory|File exists)"):
        store.put("a", b"1")


def test_two_writers_of_one_object_do_not_meet(tmp_path):
    names = set()
    original = os.fsync

    def watch(descriptor):
        names.update(files(Store(tmp_path)))
        original(descriptor)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(os, "fsync", watch)
        Store(tmp_path).put("a", b"1")
        Store(tmp_path).put("a", b"2")
    assert len([name for name in names if name.endswith(".tmp")]) == 2


def test_import_is_light():
    script = "import sys, influent.storage, influent.artifact, influent.rowstore, influent.payload; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "datasets", "pandas", "pyarrow", "fsspec", "numpy"} & set(loaded)

"""Whole objects in a directory: put one, get one, read a range of one. Nothing else.

The directory lives on any fsspec file system: a local path, `file://`, `memory://`, `s3://`, `gs://`, `az://`. An
object is written whole or not at all, so a reader never sees half of one. There is no append, lock, rename or cache
here: remote objects take one PUT, and the cache for local ones is the operating system's.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any, TypeVar

from .errors import CorruptError, SpecError

Buffer = bytes | bytearray | memoryview
T = TypeVar("T")

UNFINISHED = ".tmp"  # a name that ends in this is a write in progress or one that was killed: never listed


class Store:
    """A directory of objects, each named by a relative path with `/`.

    Raises SpecError for an address that cannot be understood, and CorruptError, naming the object, for one that is
    missing or cannot be read or written (no space left, no permission).
    """

    def __init__(self, root: str | os.PathLike[str]):
        self.root = os.fspath(root)
        scheme, separator, rest = self.root.partition("://")
        if not separator:
            self._files: _Local | _Remote = _Local(Path(self.root).expanduser().absolute())
        elif scheme in ("file", "local"):
            self._files = _Local(Path(rest).absolute())
        else:
            self._files = _Remote.at(self.root)

    @classmethod
    def at(cls, path: str | os.PathLike[str] | Store) -> Store:
        """The store at an address; a store is itself."""
        return path if isinstance(path, Store) else cls(path)

    def __str__(self) -> str:
        return self.root

    def __repr__(self) -> str:
        return f"Store({self.root!r})"

    def child(self, name: str) -> Store:
        return Store(f"{self.root.rstrip('/')}/{name}")

    @property
    def is_local(self) -> bool:
        """Whether objects are files, which `local` has the paths of."""
        return isinstance(self._files, _Local)

    def local(self, name: str) -> Path | None:
        """The path of an object that can be memory-mapped; None on a remote file system."""
        return self._files.folder / name if isinstance(self._files, _Local) else None

    def get(self, name: str) -> bytes:
        return self._reading(name, lambda: self._files.get(name))

    def get_range(self, name: str, lo: int, hi: int) -> bytes:
        """Bytes [lo, hi) of an object; CorruptError when it ends before `hi`."""
        data = self._reading(name, lambda: self._files.get_range(name, lo, hi))
        if len(data) != hi - lo:
            raise CorruptError(f"{self}/{name}: truncated: expected bytes {lo} to {hi}, got {len(data)} of them")
        return data

    def size(self, name: str) -> int:
        return self._reading(name, lambda: self._files.size(name))

    def exists(self, name: str) -> bool:
        return self._reading(name, lambda: self._files.exists(name))

    def names(self, prefix: str = "") -> list[str]:
        """Every finished object whose name starts with `prefix`, sorted."""
        return [name for name in self._walk(prefix) if not name.endswith(UNFINISHED)]

    def put(self, name: str, data: Buffer | Iterable[Buffer]) -> None:
        """Write one object whole, from its parts in order; an object of that name is replaced."""
        parts: list[Any] = [data] if isinstance(data, bytes | bytearray | memoryview) else list(data)
        self._writing(name, lambda: self._files.put(name, parts))

    def put_file(self, name: str, source: Path) -> None:
        """Copy a local file into an object, streamed; the source stays."""
        self._writing(name, lambda: self._files.put_file(name, source))

    def delete(self, name: str) -> None:
        """Remove an object; one that is not there is no error."""
        self._writing(name, lambda: self._files.delete(name))

    def sweep(self) -> None:
        """Remove what killed writers left behind; for a moment when no one else writes here."""
        for name in self._walk(""):
            if name.endswith(UNFINISHED):
                self.delete(name)

    def _walk(self, prefix: str) -> list[str]:
        folder = prefix.rpartition("/")[0]
        names = self._reading(folder, lambda: self._files.walk(folder))
        return sorted(name for name in names if name.startswith(prefix))

    def _reading(self, name: str, read: Callable[[], T]) -> T:
        try:
            return read()
        except FileNotFoundError:
            raise CorruptError(f"{self}/{name}: missing") from None
        except OSError as e:
            raise CorruptError(f"{self}/{name}: cannot be read: {e.strerror or e}") from e

    def _writing(self, name: str, write: Callable[[], object]) -> None:
        try:
            write()
        except OSError as e:
            full = "disk full: " if e.errno in (errno.ENOSPC, errno.EDQUOT) else ""
            raise CorruptError(
                f"{self}/{name}: cannot be written: {full}{e.strerror or e}; what was committed before is intact: "
                "free some space or mend the folder, then run the same command again"
            ) from e


class _Local:
    """Objects as files: written beside, synced, renamed, and the folder synced, so that a power cut loses none."""

    def __init__(self, folder: Path):
        self.folder = folder

    def get(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    def get_range(self, name: str, lo: int, hi: int) -> bytes:
        with (self.folder / name).open("rb") as file:
            file.seek(lo)
            return file.read(hi - lo)

    def size(self, name: str) -> int:
        return (self.folder / name).stat().st_size

    def exists(self, name: str) -> bool:
        return (self.folder / name).is_file()

    def walk(self, folder: str) -> list[str]:
        return [p.relative_to(self.folder).as_posix() for p in (self.folder / folder).rglob("*") if p.is_file()]

    def put(self, name: str, parts: list[Buffer]) -> None:
        self._replace(name, lambda file: [file.write(part) for part in parts])

    def put_file(self, name: str, source: Path) -> None:
        with source.open("rb") as file:
            self._replace(name, lambda out: shutil.copyfileobj(file, out, 1 << 22))

    def delete(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)

    def _replace(self, name: str, write: Callable[[IO[bytes]], object]) -> None:
        path = self.folder / name
        _make_folder(path.parent)
        # The random part lets two workers write the same object: the last rename wins, and both are whole.
        beside = path.with_name(f"{path.name}.{os.urandom(4).hex()}{UNFINISHED}")
        try:
            with beside.open("xb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)


class _Remote:
    """Objects on an fsspec file system whose PUT is atomic, as every object store's is."""

    def __init__(self, fs: Any, base: str):
        self.fs, self.base = fs, base

    @classmethod
    def at(cls, address: str) -> _Remote:
        import fsspec

        try:
            fs, base = fsspec.core.url_to_fs(address)
        except (ValueError, ImportError) as e:  # an unknown scheme, or one whose package is not installed
            raise SpecError(f"{address}: no such storage: {e}") from e
        return cls(fs, base.rstrip("/"))

    def key(self, name: str) -> str:
        return f"{self.base}/{name}" if name else self.base

    def get(self, name: str) -> bytes:
        return self.fs.cat_file(self.key(name))

    def get_range(self, name: str, lo: int, hi: int) -> bytes:
        return self.fs.cat_file(self.key(name), start=lo, end=hi)

    def size(self, name: str) -> int:
        return int(self.fs.size(self.key(name)))

    def exists(self, name: str) -> bool:
        return bool(self.fs.isfile(self.key(name)))

    def walk(self, folder: str) -> list[str]:
        self.fs.invalidate_cache()  # another process may have written since the last listing
        return [key.removeprefix(self.base).lstrip("/") for key in self.fs.find(self.key(folder))]

    def put(self, name: str, parts: list[Buffer]) -> None:
        self.fs.pipe_file(self.key(name), b"".join(parts))

    def put_file(self, name: str, source: Path) -> None:
        self.fs.put_file(str(source), self.key(name))

    def delete(self, name: str) -> None:
        if self.exists(name):
            self.fs.rm_file(self.key(name))


def _make_folder(path: Path) -> None:
    """mkdir -p that survives a power cut: each new folder's parent is synced."""
    if path.is_dir():
        return
    _make_folder(path.parent)
    path.mkdir(exist_ok=True)
    _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

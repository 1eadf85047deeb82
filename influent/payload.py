"""One set of named tensors as safetensors bytes: written deterministically, read without a copy.

The bytes are plain safetensors, which any reader of that format reads; they are laid out here rather than by the
library because equal tensors must give equal bytes under every version of it. Hashes are `artifact.py`'s work.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, Any

from .errors import CorruptError
from .storage import Store

if TYPE_CHECKING:
    import numpy as np
    import torch

DTYPES = {  # safetensors name -> (torch name, bytes per element)
    "F64": ("float64", 8),
    "I64": ("int64", 8),
    "F32": ("float32", 4),
    "I32": ("int32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
}
NAMES = {torch_name: name for name, (torch_name, _) in DTYPES.items()}
ALIGN = 8  # what safetensors asks of the header's length, and what a view of a mapped float64 needs
FIRST = 1 << 16  # bytes that are read at once: most headers, which then take one request of a remote store
MAX_HEADER = 100_000_000  # as in safetensors: a wild length must not become a wild allocation


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a header, with what reading it needs worked out: a query reads hundreds of small ones a shard."""

    dtype: str
    shape: tuple[int, ...]
    lo: int  # bytes [lo, hi) of the data
    hi: int
    strides: tuple[int, ...]
    size: int  # bytes of a number

    @classmethod
    def of(cls, dtype: str, shape: list[int], lo: int, hi: int) -> Entry:
        name, size = DTYPES[dtype]
        strides = tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))
        return cls(name, tuple(shape), lo, hi, strides, size)

    @property
    def row(self) -> int:
        """Bytes from one entry of the first axis to the next."""
        return self.strides[0] * self.size


@dataclass(frozen=True, slots=True, eq=False)
class Header:
    """What a payload begins with; equal texts give this very object while it is remembered."""

    entries: dict[str, Entry]
    end: int  # of the data


@dataclass(frozen=True, slots=True, eq=False)
class Places:
    """Where rows lie in memory: of each block the addresses of its tensors at the first of the rows, each 0 where
    blocks have no such tensor, [blocks, tensors] int64. They are good for as long as `held` is."""

    addresses: np.ndarray
    held: object


def encode(tensors: Mapping[str, torch.Tensor]) -> list[memoryview | bytes]:
    """The parts of a safetensors file in order: header, then every tensor's little-endian bytes without holes."""
    import torch

    # The widest elements first, so that each tensor starts at a multiple of its element size.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {}
    parts: list[memoryview | bytes] = []
    end = 0
    for name in order:
        tensor = tensors[name].detach().cpu().contiguous()
        data = tensor.reshape(-1).view(torch.uint8).numpy().data
        dtype = NAMES[str(tensor.dtype).removeprefix("torch.")]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [end, end + data.nbytes]}
        end += data.nbytes
        parts.append(data)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGN)
    return [len(text).to_bytes(8, "little") + text, *parts]


class Payload(Mapping[str, "torch.Tensor"]):
    """The tensors of one object, by name. A local file is mapped once and each tensor is a view of the mapping, which
    ends with the last of them and holds no file handle; from a remote store each tensor is fetched by its byte range.
    A write into a returned tensor never reaches the file.

    Raises CorruptError, naming the object, for a size other than `size` bytes or a header that breaks the format.
    """

    def __init__(self, store: Store, name: str, size: int):
        self.store, self.name = store, name
        if (got := store.size(name)) != size:
            raise CorruptError(f"{store}/{name}: expected {size} bytes, got {got}; `influent verify` lists all damage")
        self.start, self._end, self.header = _read_header(store, name, size)
        self._entries = self.header.entries
        self._mapped: dict[str, torch.Tensor] = {}  # the file as numbers of one type: views of one mapping

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def describe(self, name: str) -> tuple[str, tuple[int, ...]] | None:
        """(dtype such as "float32", shape) of a tensor, from the header alone; None when there is no such tensor."""
        entry = self._entries.get(name)
        return entry and (entry.dtype, entry.shape)

    def read(self, name: str) -> bytes:
        """A copy of one tensor's raw bytes."""
        entry = self._entries[name]
        return self.store.get_range(self.name, self.start + entry.lo, self.start + entry.hi)

    def __getitem__(self, name: str) -> torch.Tensor:
        entry = self._entries[name]
        return self._view(entry, entry.shape, entry.lo, entry.hi)

    def part(self, name: str, lo: int, hi: int) -> torch.Tensor:
        """Entries [lo, hi) of a tensor's first axis; of a remote tensor nothing else is fetched."""
        entry = self._entries[name]
        lo, hi = min(lo, entry.shape[0]), min(hi, entry.shape[0])
        shape = (max(0, hi - lo), *entry.shape[1:])
        return self._view(entry, shape, entry.lo + lo * entry.row, entry.lo + hi * entry.row)

    def mapped(self) -> torch.Tensor:
        """All bytes of a local file, from its first on: the mapping that the tensors are views of."""
        if (mapped := self._mapped.get("uint8")) is None:
            import torch

            path = self.store.local(self.name)
            assert path is not None
            # torch closes the file as soon as it is mapped; Python's mmap would keep a handle for every shard.
            mapped = torch.from_file(str(path), shared=False, size=self._end, dtype=torch.uint8)
            self._mapped["uint8"] = mapped
        return mapped

    def _view(self, entry: Entry, shape: tuple[int, ...], lo: int, hi: int) -> torch.Tensor:
        import torch

        if lo >= hi:
            return torch.empty(shape, dtype=getattr(torch, entry.dtype))
        if (mapped := self._mapped.get(entry.dtype)) is None:
            if not self.store.is_local:
                data = self.store.get_range(self.name, self.start + lo, self.start + hi)
                return torch.frombuffer(bytearray(data), dtype=getattr(torch, entry.dtype)).view(shape)
            usable = self._end - self._end % entry.size
            mapped = self._mapped[entry.dtype] = self.mapped()[:usable].view(getattr(torch, entry.dtype))
        return mapped.as_strided(shape, entry.strides, (self.start + lo) // entry.size)


def _read_header(store: Store, name: str, size: int) -> tuple[int, int, Header]:
    """(where the data begins, where it ends, header); CorruptError for a header that breaks the format."""
    try:
        if size < 8:
            raise ValueError(f"{size} bytes are too few")
        text = store.get_range(name, 0, min(size, FIRST))
        length = int.from_bytes(text[:8], "little")
        if length > min(size - 8, MAX_HEADER):
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        if 8 + length > len(text):
            text += store.get_range(name, len(text), 8 + length)
        header = _parse(text[8 : 8 + length])
        if 8 + length + header.end != size:
            raise ValueError(f"its tensors end at byte {8 + length + header.end} of {size}")
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        why = f"missing {e}" if isinstance(e, KeyError) else str(e)
        raise CorruptError(f"{store}/{name}: not a valid payload: {why}; `influent verify` lists all damage") from e
    return 8 + length, size, header


@lru_cache(maxsize=8)  # shards of equally many rows have equal headers, and a fit opens each of them once a block
def _parse(header: bytes) -> Header:
    """ValueError, KeyError or TypeError unless they tile the data, aligned."""
    entries = json.loads(header, object_pairs_hook=_no_repeats)
    if not isinstance(entries, dict):
        raise ValueError(f"the header is a {type(entries).__name__}, not an object")
    entries.pop("__metadata__", None)
    end, found = 0, {}
    for key, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{key}: unknown dtype {entry['dtype']!r}")
        width = DTYPES[entry["dtype"]][1]
        shape, (lo, hi) = entry["shape"], entry["data_offsets"]
        if not all(type(n) is int and n >= 0 for n in (*shape, lo, hi)):
            raise ValueError(f"{key}: shape {shape} and offsets {[lo, hi]} must be whole numbers")
        if lo != end or hi - lo != width * prod(shape):
            raise ValueError(
                f"{key}: offsets {[lo, hi]}, expected {[end, end + width * prod(shape)]} for shape {shape}"
            )
        if (8 + len(header) + lo) % width:
            raise ValueError(f"{key}: begins at byte {8 + len(header) + lo}, not at a multiple of {width}")
        end = hi
        found[key] = Entry.of(entry["dtype"], shape, lo, hi)
    return Header(found, end)


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) != len(pairs):
        raise ValueError("a name occurs twice")
    return found

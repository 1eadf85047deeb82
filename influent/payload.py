"""One set of named tensors as safetensors bytes: written deterministically, read without a copy.

The bytes are plain safetensors, which any reader of that format reads; they are laid out here rather than by the
library because equal tensors must give equal bytes under every version of it. Hashes are `artifact.py`'s work.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, Any

from .errors import CorruptError
from .storage import Store

if TYPE_CHECKING:
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
MAX_HEADER = 100_000_000  # as in safetensors: a wild length must not become a wild allocation


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
        self._start, self._end, self._entries = _read_header(store, name, size)
        self._mapped: torch.Tensor | None = None

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def describe(self, name: str) -> tuple[str, tuple[int, ...]] | None:
        """(dtype such as "float32", shape) of a tensor, from the header alone; None when there is no such tensor."""
        entry = self._entries.get(name)
        return entry and (DTYPES[entry["dtype"]][0], tuple(entry["shape"]))

    def read(self, name: str) -> bytes:
        """A copy of one tensor's raw bytes."""
        lo, hi = self._entries[name]["data_offsets"]
        return self.store.get_range(self.name, self._start + lo, self._start + hi)

    def __getitem__(self, name: str) -> torch.Tensor:
        dtype, shape = DTYPES[self._entries[name]["dtype"]][0], self._entries[name]["shape"]
        return self._view(dtype, shape, *self._entries[name]["data_offsets"])

    def part(self, name: str, lo: int, hi: int) -> torch.Tensor:
        """Entries [lo, hi) of a tensor's first axis; of a remote tensor nothing else is fetched."""
        entry = self._entries[name]
        dtype, size = DTYPES[entry["dtype"]]
        lo, hi, _ = slice(lo, hi).indices(entry["shape"][0])
        shape = [max(0, hi - lo), *entry["shape"][1:]]
        begin = entry["data_offsets"][0] + lo * prod(shape[1:]) * size
        return self._view(dtype, shape, begin, begin + prod(shape) * size)

    def _view(self, dtype_name: str, shape: list[int], lo: int, hi: int) -> torch.Tensor:
        import torch

        dtype = getattr(torch, dtype_name)
        if lo == hi:
            return torch.empty(shape, dtype=dtype)
        if (path := self.store.local(self.name)) is None:
            data = self.store.get_range(self.name, self._start + lo, self._start + hi)
            return torch.frombuffer(bytearray(data), dtype=dtype).view(shape)
        if self._mapped is None:
            # torch closes the file as soon as it is mapped; Python's mmap would keep a handle for every shard.
            self._mapped = torch.from_file(str(path), shared=False, size=self._end, dtype=torch.uint8)
        return self._mapped[self._start + lo : self._start + hi].view(dtype).view(shape)


def _read_header(store: Store, name: str, size: int) -> tuple[int, int, dict[str, Any]]:
    """(where the data begins, where it ends, entries); CorruptError for a header that breaks the format."""
    try:
        if size < 8:
            raise ValueError(f"{size} bytes are too few")
        length = int.from_bytes(store.get_range(name, 0, 8), "little")
        if length > min(size - 8, MAX_HEADER):
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        entries, end = _parse(store.get_range(name, 8, 8 + length))
        if 8 + length + end != size:
            raise ValueError(f"its tensors end at byte {8 + length + end} of {size}")
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        why = f"missing {e}" if isinstance(e, KeyError) else str(e)
        raise CorruptError(f"{store}/{name}: not a valid payload: {why}; `influent verify` lists all damage") from e
    return 8 + length, size, entries


@lru_cache(maxsize=8)  # shards of equally many rows have equal headers, and a fit opens each of them once a block
def _parse(header: bytes) -> tuple[dict[str, Any], int]:
    """(entries, end of the data) of a header; ValueError, KeyError or TypeError unless they tile the data, aligned."""
    entries = json.loads(header, object_pairs_hook=_no_repeats)
    if not isinstance(entries, dict):
        raise ValueError(f"the header is a {type(entries).__name__}, not an object")
    entries.pop("__metadata__", None)
    end = 0
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
    return entries, end


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) != len(pairs):
        raise ValueError("a name occurs twice")
    return found

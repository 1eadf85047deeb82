"""Examples of a plain PyTorch data set: their ids and content hashes, for the catalog.

The examples themselves stay with the caller. Not here: records of text (records.py, catalog.py).
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from influent.errors import DataError


def ids_and_hashes(data: Sequence[Any], *, limit: int | None = None) -> Iterator[tuple[int, str]]:
    """(number, BLAKE2b-128 hex digest of the content) of every example of a map-style data set, in order.

    Raises:
        DataError: an example holds something other than tensors, arrays, numbers and strings.
    """
    for i in range(len(data) if limit is None else min(limit, len(data))):
        digest = hashlib.blake2b(digest_size=16)
        _update(digest, data[i], i)
        yield i, digest.hexdigest()


def _update(digest: Any, value: Any, number: int) -> None:
    if isinstance(value, Mapping):
        for key in sorted(value):
            digest.update(f"{key}\0".encode())
            _update(digest, value[key], number)
    elif isinstance(value, list | tuple):
        digest.update(f"{len(value)}[".encode())
        for item in value:
            _update(digest, item, number)
    elif isinstance(value, int | float | bool | str):
        digest.update(f"{type(value).__name__}\0{value!r}\0".encode())
    elif hasattr(value, "__array__") or isinstance(value, torch.Tensor):
        tensor = torch.as_tensor(value).detach().cpu().contiguous()
        digest.update(f"{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    else:
        raise DataError(
            f"example {number} of the data set holds a {type(value).__name__}, expected tensors, arrays, numbers or "
            "strings in tuples, lists or dicts"
        )

"""Merkle trees: one hash that commits to a sequence of items, and short proofs that an item is among them.

The tree is that of RFC 6962 (Certificate Transparency), section 2.1, with BLAKE2b-256 for SHA-256: a leaf is
H(0x00 | item), a node H(0x01 | left | right), and the left half of n leaves is the largest power of two below n. Leaves
and nodes cannot stand for each other, and no item can be added, left out or moved without another root.
Not here: what the items are (audit.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b

from influent.errors import SpecError


def leaf(item: bytes) -> bytes:
    return _hash(b"\0", item)


def node(left: bytes, right: bytes) -> bytes:
    return _hash(b"\1", left, right)


def root(leaves: Iterable[bytes]) -> bytes:
    """The root of leaf hashes in order; memory is one hash a level, whatever their number. H() of none."""
    peaks: list[tuple[int, bytes]] = []  # (leaves under it, hash) of the complete subtrees so far, falling in size
    for digest in leaves:
        size = 1
        while peaks and peaks[-1][0] == size:
            digest = node(peaks.pop()[1], digest)
            size *= 2
        peaks.append((size, digest))
    if not peaks:
        return _hash()
    top = peaks.pop()[1]
    while peaks:
        top = node(peaks.pop()[1], top)
    return top


def proof(leaves: Sequence[bytes], place: int) -> list[bytes]:
    """The hashes beside the path from leaf `place` to the root, lowest first."""
    if not 0 <= place < len(leaves):
        raise SpecError(f"leaf {place} of {len(leaves)}")
    beside: list[bytes] = []
    lo, hi = 0, len(leaves)
    while hi - lo > 1:
        middle = lo + _left(hi - lo)
        if place < middle:
            beside.append(root(leaves[middle:hi]))
            hi = middle
        else:
            beside.append(root(leaves[lo:middle]))
            lo = middle
    return beside[::-1]


def recompute(digest: bytes, place: int, count: int, beside: Sequence[bytes]) -> bytes | None:
    """The root that a proof leads to for leaf hash `digest` at `place` of `count`; None for one of another length."""
    turns: list[bool] = []  # from the root down: whether the leaf is on the left
    lo, hi = 0, count
    while hi - lo > 1:
        middle = lo + _left(hi - lo)
        turns.append(place < middle)
        lo, hi = (lo, middle) if place < middle else (middle, hi)
    if len(turns) != len(beside) or not 0 <= place < count:
        return None
    for on_left, other in zip(reversed(turns), beside, strict=True):
        digest = node(digest, other) if on_left else node(other, digest)
    return digest


def _left(count: int) -> int:
    """The largest power of two below `count`."""
    return 1 << (count - 1).bit_length() - 1


def _hash(*parts: bytes) -> bytes:
    digest = blake2b(digest_size=32)
    for part in parts:
        digest.update(part)
    return digest.digest()

"""Merkle trees against the recursive definition of RFC 6962, and what a proof does not accept."""

from hashlib import blake2b

import pytest

from influent import merkle


def slow_root(items: list[bytes]) -> bytes:
    """The definition, recursively."""
    if not items:
        return blake2b(b"", digest_size=32).digest()
    if len(items) == 1:
        return blake2b(b"\0" + items[0], digest_size=32).digest()
    half = 1
    while 2 * half < len(items):
        half *= 2
    return blake2b(b"\1" + slow_root(items[:half]) + slow_root(items[half:]), digest_size=32).digest()


@pytest.mark.parametrize("count", [0, 1, 2, 3, 5, 8, 13, 64, 100])
def test_root_is_the_definitions(count):
    items = [str(i).encode() for i in range(count)]
    assert merkle.root(map(merkle.leaf, items)) == slow_root(items)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 13, 21])
def test_each_proof_leads_to_the_root_and_no_other_item_does(count):
    leaves = [merkle.leaf(str(i).encode()) for i in range(count)]
    top = merkle.root(leaves)
    for place in range(count):
        beside = merkle.proof(leaves, place)
        assert len(beside) <= max(1, count - 1).bit_length()
        assert merkle.recompute(leaves[place], place, count, beside) == top
        assert merkle.recompute(merkle.leaf(b"other"), place, count, beside) != top
        for other in range(count):
            assert other == place or merkle.recompute(leaves[place], other, count, beside) != top
        assert merkle.recompute(leaves[place], place, count, [*beside, top]) is None
    assert merkle.recompute(leaves[0], count, count, []) is None

"""Randomness as part of the format: keyed counter streams and our own mapping of words to draws.

`rng` version 1 is the Philox-4x64 generator's raw 64-bit words as NumPy yields them (a stream that NumPy guarantees
to keep), keyed by a BLAKE2b hash of (seed, block, kind, side). Signs, buckets, subsets, permutations and normals are
derived here, so no draw depends on a library's version, a device, or the order in which blocks are visited.
Not here: anything for model training, which may use torch's generators.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

VERSION = 1
_WORDS_PER_COUNT = 4  # one Philox counter value yields four 64-bit words


@dataclass(frozen=True, slots=True)
class Stream:
    """An endless, randomly accessible sequence of 64-bit words.

    `side` says which part of a block the draws are for: `in/0`, `out/0`, `flat/1`, … where the number is the stage of
    the compressor, so that two stages of one kind never share their draws.
    """

    seed: int
    block: str
    kind: str
    side: str

    def words(self, n: int, *, at: int = 0) -> np.ndarray:
        """Words `at` .. `at + n` as uint64 [n]; the same whatever was drawn before."""
        name = "\0".join((f"influent rng {VERSION}", str(self.seed), self.block, self.kind, self.side))
        key = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=16).digest(), "little")
        first, skip = divmod(at, _WORDS_PER_COUNT)
        return np.random.Philox(key=key, counter=first).random_raw(skip + n)[skip:]

    def signs(self, n: int, *, at: int = 0) -> np.ndarray:
        """Signs `at` .. `at + n` as int8 [n], one bit of a word each, lowest bit first; a set bit is -1."""
        first, skip = divmod(at, 64)
        words = self.words(-(-(skip + n) // 64), at=first).astype("<u8")
        bits = np.unpackbits(words.view(np.uint8), bitorder="little")[skip : skip + n]
        return 1 - 2 * bits.astype(np.int8)

    def buckets(self, n: int, k: int) -> np.ndarray:
        """Independent uniform buckets in [0, k) as int64 [n]: the high half of a word, scaled (bias below k / 2^32)."""
        high = self.words(n) >> np.uint64(32)
        return ((high * np.uint64(k)) >> np.uint64(32)).astype(np.int64)

    def permutation(self, n: int) -> np.ndarray:
        """A uniform permutation of [0, n) as int64 [n]: the order that sorts the words."""
        return np.argsort(self.words(n), kind="stable")

    def subset(self, n: int, k: int) -> np.ndarray:
        """`k` of [0, n) without replacement, ascending, int64 [k]: where the k smallest words stand."""
        if k >= n:
            return np.arange(n)
        return np.sort(np.argpartition(self.words(n), k)[:k])

    def uniforms(self, n: int) -> np.ndarray:
        """Uniform numbers in [0, 1) as float64 [n], from the high 53 bits of a word each."""
        return (self.words(n) >> np.uint64(11)) * 2.0**-53

    def normals(self, n: int, *, at: int = 0) -> np.ndarray:
        """Standard normals `at` .. `at + n` as float32 [n], by Box and Muller from pairs of words in float64."""
        first, skip = divmod(at, 2)
        pairs = -(-(skip + n) // 2)
        words = self.words(2 * pairs, at=2 * first).reshape(pairs, 2) >> np.uint64(11)
        radius = np.sqrt(-2.0 * np.log((words[:, 0] + np.uint64(1)) * 2.0**-53))
        angle = (2.0 * np.pi * 2.0**-53) * words[:, 1]
        out = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)
        return out[skip : skip + n].astype(np.float32)

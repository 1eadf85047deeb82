"""One dial for the size of a row: the largest setting of a method whose rows fit a number of bytes.

Not here: what a method's settings are (methods.py), the size of a stored block (codec.py).
"""

import bisect
import math
from collections.abc import Callable
from dataclasses import dataclass

from influent.codec import Codec
from influent.compress import Compress
from influent.errors import SpecError
from influent.layers import Block, Plan


@dataclass(frozen=True, slots=True)
class Budget:
    """Bytes of a stored row, from which compressor and codec are derived: the largest side that fits."""

    bytes: int
    compress: Callable[[int], str]  # side -> text of the compressor
    rows: Callable[[int], str]  # side -> text of the row codec
    least: int = 0  # where the side that fits is smaller, `small` chooses instead
    small: "Budget | None" = None

    def choose(self, tracked: Plan) -> tuple[str, str]:
        """The texts of compressor and codec; each layer gets one size, capped at its own.

        Raises:
            SpecError: not even the smallest setting fits.
        """
        if (least := self._size(tracked, 1, self.rows)) > self.bytes:
            raise SpecError(
                f"--row-bytes {self.bytes}: {len(tracked.blocks)} layers need {least} bytes a row at the least; "
                "allow more, or track fewer --layers"
            )
        largest = max(_longest(block, Compress.parse(self.compress(1))) for block in tracked.blocks)
        fits = self._largest(tracked, self.rows, largest)
        if self.small is not None and fits < min(self.least, largest):
            return self.small.choose(tracked)
        rows = self.rows(fits)
        # A codec's rank goes in steps: what a step too far would have taken, the sides can use.
        return self.compress(self._largest(tracked, lambda side: rows, largest)), rows

    def _largest(self, tracked: Plan, rows: Callable[[int], str], most: int) -> int:
        sides = range(1, most + 1)
        return bisect.bisect_right(sides, False, key=lambda side: self._size(tracked, side, rows) > self.bytes)

    def _size(self, tracked: Plan, side: int, rows: Callable[[int], str]) -> int:
        return row_bytes(Compress.parse(self.compress(side)), Codec.parse(rows(side)), tracked)


def _longest(block: Block, compress: Compress) -> int:
    """The size from which on a block is kept whole."""
    if compress.shared:
        return block.width
    return max(block.in_width, block.out_width, math.isqrt(block.width) + 1)


def row_bytes(compress: Compress, codec: Codec, tracked: Plan) -> int:
    """Bytes of one row as stored, all blocks together, with the byte a block that tells the energy a rank cut kept; of
    numbers that are shared among the blocks, which are counted by eights, at the most."""
    if (numbers := compress.shared) is not None:
        assert codec.rank is None, "ranks go with sides that are known"
        beside = 2 * codec.row_bytes(8, None) - codec.row_bytes(16, None)  # the numbers: a block's scale
        return codec.row_bytes(numbers * len(tracked.blocks), None) + beside * (len(tracked.blocks) - 1)
    each = 0 if codec.rank is None else 1
    return sum(codec.row_bytes(compress.width(block), compress.factors(block)) + each for block in tracked.blocks)

"""The row codec grammar: how one row of a block is stored, as structure (dense or rank:C) x bits.

`rank:C` keeps, of a block whose row is an a x b matrix, the C strongest pairs of vectors; the bits say how the numbers
are written. `tensors` names everything that a shard holds of a block. Not here: encoding and decoding (coding.py), the
rank cut (truncate.py); nothing here needs torch.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import NamedTuple

from .errors import SpecError

FLOATS = {"float32": 4, "float16": 2, "bfloat16": 2}  # bytes a number
PER_BYTE = {"int8": 1, "int4": 2, "sign": 8}  # codes a byte
_SHORT = {"fp32": "float32", "f32": "float32", "fp16": "float16", "f16": "float16", "bf16": "bfloat16"}
_SIZES = {**FLOATS, "int8": 1, "uint8": 1}
_TEXT = re.compile(r"(?:(?P<dense>dense)|rank:(?P<rank>[1-9][0-9]*)|(?P<only>[a-z0-9]+))(?::(?P<bits>[a-z0-9]+))?")
_HELP = f"expected dense:BITS, rank:C:BITS or BITS with BITS one of {', '.join((*FLOATS, *PER_BYTE))}; or none"
NONE = "none"  # rows that are not stored, but made anew by whoever asks

Factors = tuple[int, int]  # (a, b): widths of a row's input and output side, whose product is the row's width
Layout = dict[str, tuple[str, tuple[int, ...]]]  # tensor -> (dtype, shape without the leading number of rows)


class Form(NamedTuple):
    """How the rows of a block are stored: `width` numbers, or `rank` pairs of vectors of the sizes `factors`, which
    make as many."""

    bits: str
    width: int
    factors: Factors | None = None
    rank: int = 0

    @property
    def packed(self) -> bool:
        """Whether the numbers are integer codes with scales rather than floats."""
        return self.bits in PER_BYTE

    @property
    def numbers(self) -> int:
        """Stored of a row: floats, or codes of a dense one by their bytes."""
        if self.factors is not None:
            return self.rank * sum(self.factors)
        return -(-self.width // PER_BYTE[self.bits]) if self.packed else self.width

    def tensors(self, key: str) -> Layout:
        """What a shard holds of block `key`: name -> (dtype, shape of one row); the scales of codes last."""
        if self.factors is None:
            parts, scales = {key: (self.width,)}, ()
        else:
            a, b = self.factors
            parts, scales = {f"{key}.v": (self.rank, a), f"{key}.u": (self.rank, b)}, (self.rank,)
        if not self.packed:
            return {name: (self.bits, shape) for name, shape in parts.items()}
        dtype, per_byte = "int8" if self.bits == "int8" else "uint8", PER_BYTE[self.bits]
        held = {name: (dtype, (*shape[:-1], -(-shape[-1] // per_byte))) for name, shape in parts.items()}
        return held | {f"{key}.scale": ("bfloat16", scales)}


@dataclass(frozen=True, slots=True)
class Codec:
    """A row codec as a value: `str(Codec.parse(text))` is its canonical text.

    `rank` is None for dense rows; `bits` is a float type, or int8, int4 or sign, which are packed and have scales, or
    `none` if nothing is stored.
    Raises SpecError for what is none of these.
    """

    rank: int | None
    bits: str

    def __post_init__(self):
        known = self.bits in FLOATS | PER_BYTE or (self.bits == NONE and self.rank is None)
        if not known or (self.rank is not None and self.rank < 1):
            raise SpecError(f"rows: no codec of rank {self.rank!r} and bits {self.bits!r}; {_HELP}")

    @staticmethod
    def parse(text: str) -> Codec:
        """Read the grammar `dense[:BITS] | rank:C[:BITS] | BITS | none`; raises SpecError for anything else.

        >>> [str(Codec.parse(text)) for text in ("dense", "bf16", "dense:sign", "rank:1", "rank:8:int4")]
        ['float32', 'bfloat16', 'dense:sign', 'rank:1:bfloat16', 'rank:8:int4']
        """
        if text.strip() == NONE:
            return Codec(None, NONE)
        match = _TEXT.fullmatch(text.strip())
        if match is None or (match["only"] and match["bits"]):
            raise SpecError(f"rows {text!r}: {_HELP}")
        default = "bfloat16" if match["rank"] else "float32"
        bits = match["only"] or match["bits"] or default
        bits = _SHORT.get(bits, bits)
        if bits not in FLOATS | PER_BYTE:
            raise SpecError(f"rows {text!r}: {bits!r} is not known; {_HELP}")
        return Codec(int(match["rank"]) if match["rank"] else None, bits)

    def __str__(self) -> str:
        if self.rank is not None:
            return f"rank:{self.rank}:{self.bits}"
        return f"dense:{self.bits}" if self.packed else self.bits  # a dense float codec is just its dtype

    @property
    def stored(self) -> bool:
        """Whether there are rows at all."""
        return self.bits != NONE

    @property
    def packed(self) -> bool:
        """Whether the numbers are integer codes with scales rather than floats."""
        return self.bits in PER_BYTE

    def stored_rank(self, factors: Factors | None) -> int | None:
        """The number of pairs kept of a block's rows; None when they are stored dense: no rank is asked for, the
        block has no factors, or the pairs would hold as many numbers as the matrix."""
        if self.rank is None or factors is None:
            return None
        a, b = factors
        rank = min(self.rank, a, b)
        return rank if rank * (a + b) < a * b else None

    def form(self, width: int, factors: Factors | None) -> Form:
        """How rows of such a block are stored."""
        rank = self.stored_rank(factors)
        return Form(self.bits, width) if rank is None else Form(self.bits, width, factors, rank)

    def tensors(self, key: str, width: int, factors: Factors | None) -> Layout:
        """What a shard holds of block `key`, whose rows are `width` wide: name -> (dtype, shape of one row)."""
        if not self.stored:
            return {}
        return self.form(width, factors).tensors(key)

    def row_bytes(self, width: int, factors: Factors | None) -> int:
        """Bytes of one row of one block, scales included."""
        return sum(_SIZES[dtype] * math.prod(shape) for dtype, shape in self.tensors("", width, factors).values())

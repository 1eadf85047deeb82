"""What an index holds of a row, by the layout and codec of its spec: the names, dtypes and shapes of its tensors.

One place for the writer, the reader and `verify`. Not here: the tensors' bytes (payload.py) and meaning (coding.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from .codec import Codec, Factors, Form
from .errors import LayerError, SpecError

if TYPE_CHECKING:
    from .shardrecord import Record

CATALOG = ("catalog.json", "catalog.parquet")
IDS = ".id"  # a block may be called id, loss, norm or tokens, but no module path begins with a dot
STATS = {"loss": ".loss", "norm": ".norm", "tokens": ".tokens"}
CAPTURED = ".captured"
RESIDUAL = ".residual"

Tensors = dict[str, tuple[str, tuple[int, ...]]]  # name -> (dtype, shape)

SCALES = ("adam", "adam-step")  # what an optimizer's state makes of rows: optimizer.py


@dataclass(frozen=True)
class Layout:
    """Blocks in order, with the width of their rows and, where it matters to the codec, their two factors."""

    codec: Codec
    widths: dict[str, int]
    factors: dict[str, Factors | None]
    has_residual: bool = False  # rows of margins carry 1 - p: see task.Margins

    @classmethod
    def of(cls, spec: Mapping[str, Any]) -> Layout:
        """Raises SpecError for an unknown codec or factors that do not fit, LayerError for names that collide,
        KeyError, TypeError or ValueError for what is no spec of an index."""
        codec = Codec.parse(spec["rows"])
        if str(codec) != spec["rows"]:
            raise SpecError(f"rows {spec['rows']!r}: expected the canonical text {str(codec)!r}")
        blocks = spec["layout"]
        widths: dict[str, int] = {block["block"]: block["width"] for block in blocks}
        factors = {block["block"]: _factors(block) for block in blocks}
        found = cls(codec, widths, factors, spec.get("target", "loss") == "margin")
        times = Counter(name for block in blocks for name in found.blocks[block["block"]])
        for name, count in times.items():
            if count > 1:
                raise LayerError(f"{count} blocks would store a tensor {name!r}; --exclude all but one of them")
        return found

    @property
    def has_captured(self) -> bool:
        """Whether rows are cut to a rank, so that what was kept of each is stored beside them."""
        return self.codec.rank is not None

    @property
    def is_plain(self) -> bool:
        """Whether rows are stored as they are, in a float dtype."""
        return self.codec.rank is None and not self.codec.packed and self.codec.stored

    @property
    def stats(self) -> dict[str, str]:
        """The tensor of each number that is kept of a row beside its blocks; without rows nothing knows the norm."""
        return {name: tensor for name, tensor in STATS.items() if name != "norm" or self.codec.stored}

    @property
    def row_bytes(self) -> int:
        """Bytes that one row takes in all blocks, with the byte a block that tells what a rank cut kept."""
        each = 1 if self.has_captured else 0
        return sum(each + self.codec.row_bytes(width, self.factors[key]) for key, width in self.widths.items())

    @cached_property
    def blocks(self) -> dict[str, Tensors]:
        """The tensors of each block, without the leading number of rows."""
        return {key: self.codec.tensors(key, width, self.factors[key]) for key, width in self.widths.items()}

    @cached_property
    def forms(self) -> dict[str, Form]:
        """How the rows of each block are stored."""
        return {key: self.codec.form(width, self.factors[key]) for key, width in self.widths.items()}

    def rows(self, n: int) -> Tensors:
        """The tensors of `n` rows of all blocks."""
        return {name: (dtype, (n, *tail)) for block in self.blocks.values() for name, (dtype, tail) in block.items()}

    def shard(self, n: int) -> Tensors:
        """Every tensor of a shard of `n` rows."""
        held = self.rows(n)
        held[IDS] = ("int64", (n,))
        held.update((name, ("float32", (n,))) for name in self.stats.values())
        if self.has_residual:
            held[RESIDUAL] = ("float32", (n,))
        if self.has_captured:
            held[CAPTURED] = ("uint8", (n, len(self.widths)))
        return held


def with_factors(block: Mapping[str, Any], codec: Codec, factors: Factors | None) -> dict[str, Any]:
    """A layout's entry with its factors, which stand there only when the codec cuts rows to a rank."""
    if codec.rank is None or factors is None:
        return dict(block)
    return {**block, "factors": list(factors)}


def _factors(block: Mapping[str, Any]) -> Factors | None:
    if (given := block.get("factors")) is None:
        return None
    a, b = given
    if a * b != block["width"]:
        raise SpecError(f"block {block['block']!r}: factors {a} and {b} do not make its width {block['width']}")
    return a, b


def first_gap(records: Sequence[Record]) -> str | None:
    """What is wrong with the row ranges, which must be contiguous from 0; None when they are."""
    end = 0
    for record in records:
        if record.rows is None or record.rows[0] != end or record.rows[1] <= end:
            return f"shard {record.name} has rows {record.rows}, expected them to begin at {end}"
        end = record.rows[1]
    return None


def num_rows(records: Sequence[Record]) -> int:
    """The end of the last record's rows."""
    return records[-1].rows[1] if records and records[-1].rows else 0

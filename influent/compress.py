"""The compressor grammar: `stage | stage`, read left to right, and the binding of its maps to one block.

A stage `kind:AxB` works on the two factors of a gradient (A on the input side, B on the output side); `kind:K` works
on the flat vector, whose order is input-major: entry (i, o) of a layer's gradient stands at i * O + o. On a block
whose gradient is a vector (a norm layer) `AxB` means its flat counterpart of size A * B. A size is capped at the
width it is applied to, where the stage becomes the identity. Not here: the maps themselves (maps.py).
"""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from influent.errors import SpecError

if TYPE_CHECKING:
    from influent.bind import Bound
    from influent.layers import Block

KINDS = ("mask", "gauss", "rademacher", "sjlt", "fjlt")
BUCKET_LAWS = ("balanced", "iid")
_STAGE = re.compile(r"^(?P<kind>[a-z]+):(?P<a>[1-9]\d*)(?:x(?P<b>[1-9]\d*))?(?P<options>(?:,[a-z0-9=]+)*)$", re.ASCII)
_HELP = f"stages are id, or KIND:K or KIND:AxB with KIND one of {', '.join(KINDS)}, joined by ' | '"


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage: its kind, the size on each side (`out` is None for a flat stage), and SJLT's options."""

    kind: str
    size: int
    out: int | None = None
    nonzeros: int = 1
    law: str = "balanced"

    def __str__(self) -> str:
        size = str(self.size) if self.out is None else f"{self.size}x{self.out}"
        options = (f",s={self.nonzeros}" if self.nonzeros != 1 else "") + (",iid" if self.law == "iid" else "")
        return f"{self.kind}:{size}{options}"


@dataclass(frozen=True, slots=True)
class Compress:
    """A compressor as a value: `str(Compress.parse(text))` is its canonical text."""

    stages: tuple[Stage, ...]

    @staticmethod
    def parse(text: str) -> "Compress":
        """Read the grammar.

        >>> str(Compress.parse("mask:128x128|sjlt:4096,s=2"))
        'mask:128x128 | sjlt:4096,s=2'

        Raises:
            SpecError: the text is not in the grammar, or a factorised stage follows a flat one.
        """
        parts = [part.strip() for part in text.split("|")]
        if parts == ["id"]:
            return Compress(())
        stages = tuple(_parse_stage(part, text) for part in parts)
        flat = False
        for stage in stages:
            if flat and stage.out is not None:
                raise SpecError(f"compressor {text!r}: stage '{stage}' is factorised but follows a flat stage; {_HELP}")
            flat = stage.out is None
        return Compress(stages)

    def __str__(self) -> str:
        return " | ".join(map(str, self.stages)) or "id"

    def width(self, block: "Block") -> int:
        """Entries of a block's row: every size is capped at the width it is applied to."""
        factors = self.factors(block)
        if factors is not None:
            return factors[0] * factors[1]
        inner, outer, flat = block.in_width, block.out_width, block.width
        for stage in self.stages:
            if stage.out is not None and not block.is_vector:
                inner, outer = min(inner, stage.size), min(outer, stage.out)
                flat = inner * outer
            else:
                flat = min(flat, stage.size * (stage.out or 1))
        return flat

    def factors(self, block: "Block") -> tuple[int, int] | None:
        """The widths of the two mapped sides, when the row is still their product; None for a flat row."""
        if block.is_vector or any(stage.out is None for stage in self.stages):
            return None
        inner, outer = block.in_width, block.out_width
        for stage in self.stages:
            inner, outer = min(inner, stage.size), min(outer, stage.out or outer)
        return inner, outer

    def bind(self, block: "Block", seed: int) -> "Bound":
        """The maps of this compressor for one block: a pure function of (self, block, seed)."""
        from influent.bind import bind

        return bind(self, block, seed)


def _parse_stage(part: str, text: str) -> Stage:
    match = _STAGE.match(part)
    if match is None or match["kind"] not in KINDS:
        raise SpecError(f"compressor {text!r}: stage {part!r} is not known; {_HELP}")
    options = [option for option in match["options"].split(",") if option]
    if options and match["kind"] != "sjlt":
        raise SpecError(f"compressor {text!r}: stage {part!r} takes no options; only sjlt takes s=N and iid")
    if len({option.startswith("s=") for option in options}) < len(options):
        raise SpecError(f"compressor {text!r}: stage {part!r} sets one thing twice; sjlt takes s=N, iid and balanced")
    nonzeros, law = 1, "balanced"
    for option in options:
        if re.fullmatch(r"s=[1-9]\d*", option):
            nonzeros = int(option[2:])
        elif option in BUCKET_LAWS:
            law = option
        else:
            raise SpecError(f"compressor {text!r}: option {option!r} is not known; sjlt takes s=N, iid and balanced")
    size, out = int(match["a"]), int(match["b"]) if match["b"] else None
    if nonzeros > min(size, out or size):
        raise SpecError(f"compressor {text!r}: s={nonzeros} is more than the size of stage {part!r}")
    return Stage(match["kind"], size, out, nonzeros, law)

"""The compressor grammar: `stage | stage`, read left to right, and the binding of its maps to one block.

A stage `kind:AxB` works on the two factors of a gradient (A on the input side, B on the output side), `kind:/F` too,
with sizes that are each block's own widths over F, and a learned `kind:K,share` gives each block's two sides sizes of
their own, K numbers a block in the mean (sharing.py); `kind:K` works on the flat vector, whose order is input-major:
entry (i, o) of a layer's gradient stands at i * O + o. `rotate` keeps sizes and works on the sides until a flat stage
has come. On a block whose gradient is a vector (a norm layer) `AxB` means its flat counterpart of size A * B. A size is
capped at the width it is applied to, where a random stage becomes the identity. `select:FILE` names a learned mask in
a folder, whose sizes are only known once that is read; `select:AxB` is the same mask once it lies with the index. Not
here: the maps (maps.py), how `pca` and `whiten` learn theirs (bases.py), and learned masks (selective.py).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from influent.errors import SpecError

if TYPE_CHECKING:
    from torch import Tensor

    from influent.bind import Bound
    from influent.codec import Codec
    from influent.layers import Block

KINDS = ("mask", "gauss", "rademacher", "sjlt", "fjlt")  # drawn from a random stream
LEARNED = ("pca", "whiten")  # made from a sample of the data, so that they can only come first
SELECT = "select"  # of coordinates that were learned and saved: comes first too
ROTATE = "rotate"
BUCKET_LAWS = ("balanced", "iid")
MOMENTS = ("grads", "kfac")  # the first is the default: it captures more (docs/compressors.md)
POWERS = (0.5, 0.25)  # of whiten; the first is the default
LEAST = 8  # numbers a layer in the mean, where layers share them
_STAGE = re.compile(
    r"^(?P<kind>[a-z]+):(?:/(?P<factor>[1-9]\d*)|(?P<a>[1-9]\d*)(?:x(?P<b>[1-9]\d*))?)(?P<options>(?:,[a-z0-9=.]+)*)$",
    re.ASCII,
)
_SIZES = re.compile(r"(?P<a>[1-9]\d*)(?:x(?P<b>[1-9]\d*))?", re.ASCII)
_HELP = (
    f"stages are id, rotate, or KIND:K, KIND:AxB or KIND:/F with KIND one of {', '.join(KINDS)}, or first of all "
    f"{' or '.join(LEARNED)} with AxB, /F or K,share, or select:FILE, joined by ' | '"
)
# What an option sets; SJLT's s=N is read apart.
_MOMENTS: dict[str, tuple[str, Any]] = {name: ("moments", name) for name in MOMENTS}
_SHARED: dict[str, tuple[str, Any]] = {"share": ("shared", True)}
_OPTIONS: dict[str, dict[str, tuple[str, Any]]] = {
    "sjlt": {law: ("law", law) for law in BUCKET_LAWS},
    "pca": _MOMENTS | _SHARED,
    "whiten": {f"p={power}": ("power", power) for power in POWERS} | _MOMENTS | _SHARED,
}
_TAKES = {
    "sjlt": "s=N, iid and balanced",
    "pca": "kfac or grads, and share",
    "whiten": "p=0.25 or p=0.5, kfac or grads, and share",
}


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage: its kind, its size on each side (`out` is None for a flat stage) or its factor, and its options.

    `nonzeros` and `law` are SJLT's; `power` is the exponent by which `whiten` divides, `moments` what it learns from;
    `file` is the folder of a learned mask whose sizes were not read yet. If `shared`, `size` is the numbers of a block
    in the mean, whose sides are only known once they are learned.
    """

    kind: str
    size: int | None = None
    out: int | None = None
    nonzeros: int = 1
    law: str = "balanced"
    factor: int | None = None
    power: float = 0.0
    moments: str = MOMENTS[0]
    file: str | None = None
    shared: bool = False

    def __str__(self) -> str:
        if self.kind == ROTATE:
            return ROTATE
        if self.file is not None:
            return f"{self.kind}:{self.file}"
        size = f"/{self.factor}" if self.factor is not None else str(self.size)
        size += "" if self.out is None else f"x{self.out}"
        options = (f",s={self.nonzeros}" if self.nonzeros != 1 else "") + (",iid" if self.law == "iid" else "")
        options += f",p={self.power}" if self.power not in (0.0, POWERS[0]) else ""
        options += f",{self.moments}" if self.moments != MOMENTS[0] else ""
        options += ",share" if self.shared else ""
        return f"{self.kind}:{size}{options}"

    @property
    def is_flat(self) -> bool:
        """Whether the stage asks for the flat gradient."""
        return self.size is not None and self.out is None and not self.shared

    def sides(self, p_in: int, p_out: int) -> tuple[int, int]:
        """The widths that it leaves of two sides."""
        assert not self.shared, "they are learned: sharing.py"
        if self.factor is not None:
            return max(1, p_in // self.factor), max(1, p_out // self.factor)
        return min(p_in, self.size or p_in), min(p_out, self.out or p_out)

    def length(self, p: int) -> int:
        """The width that it leaves of a flat vector."""
        assert not self.shared, "it is learned: sharing.py"
        if self.factor is not None:
            return max(1, p // self.factor)
        return p if self.size is None else min(p, self.size * (self.out or 1))


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
            SpecError: the text is not in the grammar, a factorised stage follows a flat one, or a learned stage is not
                the first.
        """
        parts = [part.strip() for part in text.split("|")]
        if parts == ["id"]:
            return Compress(())
        stages = tuple(_parse_stage(part, text) for part in parts)
        _check_order(stages, text)
        return Compress(stages)

    def __str__(self) -> str:
        return " | ".join(map(str, self.stages)) or "id"

    @property
    def learned(self) -> Stage | None:
        """The stage that is learned from a sample of the data, if there is one: the first."""
        return next((stage for stage in self.stages[:1] if stage.kind in LEARNED), None)

    @property
    def shared(self) -> int | None:
        """The numbers that a block has in the mean, if the blocks share them."""
        return self.learned.size if self.learned is not None and self.learned.shared else None

    @property
    def selects(self) -> Stage | None:
        """The stage that is a learned mask, if there is one: the first."""
        return next((stage for stage in self.stages[:1] if stage.kind == SELECT), None)

    def sized(self, size: int, out: int | None) -> "Compress":
        """This compressor, which `selects`, with the sizes of its mask in the place of the folder.

        Raises:
            SpecError: a factorised stage follows a flat mask.
        """
        stages = (Stage(SELECT, size, out), *self.stages[1:])
        _check_order(stages, str(self))
        return Compress(stages)

    def check_rank(self, codec: "Codec") -> None:
        """Raises SpecError for rows that are to be cut to a rank and are flat vectors, which have no sides to cut."""
        if codec.rank is not None and (flat := next((stage for stage in self.stages if stage.is_flat), None)):
            raise SpecError(
                f"rows {str(codec)!r}: stage '{flat}' of {str(self)!r} leaves flat vectors, which have no rank: give a "
                "compressor of both sides such as gauss:64x64, or rows without rank:"
            )

    def width(self, block: "Block") -> int:
        """Entries of a block's row: every size is capped at the width it is applied to."""
        inner, outer, flat = block.in_width, block.out_width, block.is_vector
        width = block.width
        for stage in self.stages:
            flat = flat or stage.is_flat
            if flat:
                width = stage.length(width)
            else:
                inner, outer = stage.sides(inner, outer)
                width = inner * outer
        return width

    def factors(self, block: "Block") -> tuple[int, int] | None:
        """The widths of the two mapped sides, when the row is still their product; None for a flat row."""
        if block.is_vector or any(stage.is_flat for stage in self.stages):
            return None
        inner, outer = block.in_width, block.out_width
        for stage in self.stages:
            inner, outer = stage.sides(inner, outer)
        return inner, outer

    def bind(self, block: "Block", seed: int, bases: "Mapping[str, Tensor] | None" = None) -> "Bound":
        """The maps of this compressor for one block: a pure function of (self, block, seed, bases).

        Args:
            bases: the block's matrices of a learned stage (bases.py), or a mask's kept entries (selecting.py), by side.
        """
        from influent.bind import bind

        return bind(self, block, seed, bases)


def _check_order(stages: tuple[Stage, ...], text: str) -> None:
    flat = False
    for number, stage in enumerate(stages):
        if flat and not stage.is_flat and stage.kind != ROTATE:
            raise SpecError(f"compressor {text!r}: stage '{stage}' is factorised but follows a flat stage; {_HELP}")
        if number and stage.kind in (*LEARNED, SELECT):
            raise SpecError(f"compressor {text!r}: stage '{stage}' must be the first, it is learned from gradients")
        flat = flat or stage.is_flat


def _parse_stage(part: str, text: str) -> Stage:
    if part == ROTATE:
        return Stage(ROTATE)
    kind, _, rest = part.partition(":")
    if kind == SELECT and rest.strip():
        sizes = _SIZES.fullmatch(rest.strip())
        if sizes is None:
            return Stage(SELECT, file=rest.strip())
        return Stage(SELECT, int(sizes["a"]), int(sizes["b"]) if sizes["b"] else None)
    match = _STAGE.match(part)
    kind = match["kind"] if match is not None else ""
    if match is None or kind not in KINDS + LEARNED:
        raise SpecError(f"compressor {text!r}: stage {part!r} is not known; {_HELP}")
    size, out, factor = (int(match[name]) if match[name] else None for name in ("a", "b", "factor"))
    found: dict[str, Any] = {"power": POWERS[0]} if kind == "whiten" else {}
    found |= _parse_options(kind, [option for option in match["options"].split(",") if option], part, text)
    if kind in LEARNED and (out is None and factor is None) != found.get("shared", False):
        raise SpecError(f"compressor {text!r}: stage {part!r} is learned side by side; {_HELP}")
    if found.get("shared") and size is not None and size < LEAST:
        raise SpecError(f"compressor {text!r}: {part!r} shares {size} numbers a layer, expected {LEAST} or more")
    if size is not None and found.get("nonzeros", 1) > min(size, out or size):
        raise SpecError(f"compressor {text!r}: s={found['nonzeros']} is more than the size of stage {part!r}")
    return Stage(kind, size, out, factor=factor, **found)


def _parse_options(kind: str, options: list[str], part: str, text: str) -> dict[str, Any]:
    """The fields of a stage that its options set."""
    takes = "; ".join(f"{name} takes {what}" for name, what in _TAKES.items() if name == kind or kind not in _TAKES)
    if options and kind not in _OPTIONS:
        raise SpecError(f"compressor {text!r}: stage {part!r} takes no options; {takes}")
    found: dict[str, Any] = {}
    for option in options:
        if kind == "sjlt" and re.fullmatch(r"s=[1-9]\d*", option):
            field, value = "nonzeros", int(option[2:])
        elif option in _OPTIONS[kind]:
            field, value = _OPTIONS[kind][option]
        else:
            raise SpecError(f"compressor {text!r}: option {option!r} is not known; {takes}")
        if field in found:
            raise SpecError(f"compressor {text!r}: stage {part!r} sets one thing twice; {takes}")
        found[field] = value
    return found

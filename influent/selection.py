"""A saved Selective Mask: an artifact of kind "mask", with the kept entries of each block's sides.

Its spec says what it was learned from and how; a payload a block holds `in` and `out`, or `flat`, int64, ascending. An
index whose compressor is `select:FILE` takes a copy of the mask's objects under `bases/`, and names their content in
its spec, so that it needs FILE no more. Not here: learning it (masking.py), the grammar (compress.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from influent.artifact import Artifact, content
from influent.compress import Compress
from influent.errors import CorruptError, FormatError, MismatchError, SpecError
from influent.storage import Store

if TYPE_CHECKING:
    from torch import Tensor

    from influent.layers import Block

KIND = "mask"


def parse_size(text: str) -> tuple[int, ...]:
    """(K,) of a flat mask, or (A, B) of one of two sides.

    Raises:
        SpecError: the text is neither.
    """
    parts = text.split("x")
    if len(parts) > 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise SpecError(f"--size {text!r}: expected K, such as 4096, or AxB, such as 128x128")
    return tuple(map(int, parts))


def resolve(compress: Compress) -> tuple[Compress, str | None]:
    """The compressor with the sizes of the mask that it names, and the folder of that mask; others as they are.

    Raises:
        FormatError: there is no finished mask in the folder.
    """
    stage = compress.selects
    if stage is None or stage.file is None:
        return compress, None
    sizes = parse_size(open_mask(Store(stage.file)).spec["size"])
    return compress.sized(sizes[0], sizes[1] if len(sizes) == 2 else None), stage.file


def open_mask(store: Store) -> Artifact:
    """The mask in a folder; FormatError when there is none, or when it is not finished."""
    found = Artifact.open(store, KIND)
    if not isinstance(found.spec.get("size"), str) or not isinstance(found.spec.get("layout"), list):
        raise FormatError(f"{store}/spec.json: not the spec of a mask: it has no size or layout")
    return found


def adopt(file: str, into: Store) -> None:
    """Copy a mask into an index, byte for byte, its manifest last; one that is there already must be the same.

    Raises:
        MismatchError: another mask is there.
        CorruptError: an object of the mask is damaged.
    """
    source = Store(file)
    mask = open_mask(source)
    if into.exists("manifest.json"):
        if (got := content(mask.records)) != (there := content(Artifact.open(into, KIND).records)):
            raise MismatchError(f"{into}: holds the mask {there}, but {file} is {got}; give another --out")
        return
    if problems := mask.verify():
        raise CorruptError(problems[0])
    names = [name for name in source.names() if name.startswith("shards/")]
    for name in (*names, "spec.json", "manifest.json"):
        into.put(name, source.get(name))


def load(store: Store, compress: Compress, blocks: Sequence[Block]) -> tuple[dict[str, dict[str, Tensor]], str]:
    """The kept entries by block and side, and the digest of the mask's content.

    Raises:
        MismatchError: a block is not in the mask, or has other widths there.
        CorruptError: the mask is damaged; names the object.
    """
    mask = open_mask(store)
    if (size := str(compress.selects).partition(":")[2]) != mask.spec["size"]:
        raise MismatchError(f"{store}: the mask has the size {mask.spec['size']}, the compressor asks for {size}")
    listed = {entry["block"]: entry for entry in mask.spec["layout"]}
    if mask.spec.get("scope") == "all" and listed.keys() != {block.name for block in blocks}:
        raise MismatchError(
            f"{store}: the mask was learned over {len(listed)} layers together ({', '.join(list(listed)[:3])}, …), but "
            f"{len(blocks)} are tracked; give the same --layers and --exclude"
        )
    found = {}
    for block in blocks:
        _match(store, listed.get(block.name), block)
        mask.check(block.name, mend=f"copy the mask into {store} again, or learn it again")
        held = mask.tensors(block.name)
        found[block.name] = {side: held[side].clone() for side in held}
        _check(store, block, found[block.name])
    return found, content(mask.records)


def _match(store: Store, entry: dict[str, Any] | None, block: Block) -> None:
    if entry is None:
        raise MismatchError(
            f"{store}: the mask has no layer {block.name}; learn one with these --layers, or --exclude it"
        )
    if (got := (entry["in"], entry["out"])) != (block.in_width, block.out_width):
        raise MismatchError(
            f"{store}: layer {block.name}: the mask was learned for {got[0]} inputs and {got[1]} outputs, this model "
            f"has {block.in_width} and {block.out_width}; learn one for this model"
        )


def _check(store: Store, block: Block, sides: dict[str, Tensor]) -> None:
    """CorruptError unless the sides are those of the block, and their entries ascend within its widths."""
    widths = {"flat": block.width} if "flat" in sides else {"in": block.in_width, "out": block.out_width}
    ok = sides.keys() == widths.keys() and all(
        side.ndim == 1
        and len(side) > 0
        and int(side[0]) >= 0
        and int(side[-1]) < widths[name]
        and bool((side[1:] > side[:-1]).all())
        for name, side in sides.items()
    )
    if not ok:
        raise CorruptError(f"{store}: layer {block.name}: its kept entries do not ascend within its widths")

"""One dial: the bytes of a stored row choose the compressor."""

import pytest
import torch
from tiny_model import make_data, make_model
from torch import nn

import influent
from influent import preflight
from influent.budget import Budget, row_bytes
from influent.codec import Codec
from influent.coding import encode
from influent.compress import Compress
from influent.errors import SpecError
from influent.layers import plan
from influent.methods import METHODS

# lorif's bases need data to be bound; a method that stores no rows has none to size.
FIXED = {name: method for name, method in METHODS.items() if name != "lorif" and method.rows != "none"}
LAYERS = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 5), nn.LayerNorm(5), nn.Linear(5, 40))


@pytest.mark.parametrize("method", FIXED)
@pytest.mark.parametrize("rows", ["float32", "bfloat16", "rank:2:bf16", "rank:3:int4", "dense:sign"])
@pytest.mark.parametrize("size", [40, 100, 1000, 5000, 10**6])
def test_the_largest_compressor_that_fits_is_chosen(method, rows, size):
    tracked, codec = plan(LAYERS, layers="."), Codec.parse(rows)

    def stored(text: str) -> int:
        """By the maps as drawn, and tensors as encoded."""
        total = 0
        for block in tracked.blocks:
            bound = Compress.parse(text).bind(block, 0)
            factors = None if bound.flat or block.is_vector else (bound.in_width, bound.out_width)
            coded = encode(codec, torch.randn(1, bound.width), factors, key="x")
            total += sum(t.numel() * t.element_size() for t in coded.tensors.values()) + (codec.rank is not None)
        return total

    text, kept = Budget(size, METHODS[method].sized, lambda side: rows).choose(tracked)
    assert kept == rows
    assert stored(text) <= size
    side = next(side for side in range(1, 100) if METHODS[method].sized(side) == text)
    larger = stored(METHODS[method].sized(side + 1))
    assert larger > size or larger == stored(text)  # no layer has more to keep


@pytest.mark.parametrize("size", [200, 700, 2000, 5000])
def test_a_method_with_a_codec_of_its_own_sizes_both(size):
    lorif, tracked = METHODS["lorif"], plan(nn.Sequential(*[nn.Linear(300, 300) for _ in range(4)]))
    text, rows = Budget(size, lorif.sized, lorif.codec).choose(tracked)
    side, codec = int(text.partition("x")[2]), Codec.parse(rows)
    assert text == f"whiten:{side}x{side}" and codec.bits == "int4"
    assert codec.rank is not None and codec.rank >= side // 32

    def stored(side: int) -> int:
        return row_bytes(Compress.parse(lorif.sized(side)), codec, tracked)

    assert stored(side) <= size < stored(side + 1)  # nothing is left that a longer side could use
    assert size < 4 * (16 * (codec.rank + 1) * (codec.rank + 1) + 2 * (codec.rank + 1) + 1)  # nor that a pair could


def test_lorif_stores_bits_where_a_pair_would_be_of_rank_one():
    """The rule is of the side that fits, so that it does not depend on how many layers there are."""
    lorif, (coarse, bits) = METHODS["lorif"], METHODS["lorif"].small or pytest.fail("lorif has no small rows")
    for layers in (1, 4):
        tracked = plan(nn.Sequential(*[nn.Linear(300, 300) for _ in range(layers)]))
        for each, expected in ((20, "dense:sign"), (60, "dense:sign"), (200, "dense:sign"), (300, "rank:4:int4")):
            size = layers * each
            small = Budget(size, coarse, lambda side: bits)
            text, rows = Budget(size, lorif.sized, lorif.codec, lorif.least, small).choose(tracked)
            assert rows == expected
            assert size - layers < row_bytes(Compress.parse(text), Codec.parse(rows), tracked) <= size or "x" in text
    tiny = plan(nn.Sequential(nn.Linear(9, 9)))  # no more to keep: its whole gradients fit
    assert Budget(1000, lorif.sized, lorif.codec, 32, Budget(1000, coarse, lambda side: bits)).choose(tiny)[1] != bits


def test_a_budget_too_small_for_one_entry_a_layer_is_refused():
    small = Budget(4, METHODS["logra"].sized, lambda side: "float32")
    with pytest.raises(SpecError, match="--row-bytes 4: 2 layers need 8 bytes a row"):
        small.choose(plan(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))))


def test_an_index_keeps_to_its_budget_and_can_be_queried(tmp_path):
    make_model(tmp_path / "model")
    make_data(tmp_path / "data.jsonl")
    place = str(tmp_path / "index")
    influent.index(str(tmp_path / "model"), str(tmp_path / "data.jsonl"), place, row_bytes=4000)
    widths = influent.Index.open(place).widths
    assert 3000 < 4 * sum(widths.values()) <= 4000
    found = influent.query(place, prompt="The money of Japan is called", completion=" yen", k=3)
    assert "japan" in [row["id"] for row in found["queries"][0]["top"]]
    with pytest.raises(SpecError, match="not both"):
        influent.index(str(tmp_path / "model"), str(tmp_path / "data.jsonl"), place, row_bytes=4000, compress="id")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("65536", 65536),
        ("64KiB", 65536),
        ("64 kib", 65536),
        ("0.5MB", 500_000),
        ("1M", 10**6),
        ("3B", 3),
        ("2GiB", 2**31),
    ],
)
def test_sizes(text, size):
    assert preflight.size(text) == size


@pytest.mark.parametrize("text", ["", "0", "64TB", "many", "-3", "1.2.3K"])
def test_bad_sizes(text):
    with pytest.raises(SpecError, match="expected a size such as"):
        preflight.size(text)

"""One dial: the bytes of a stored row choose the compressor."""

import pytest
import torch
from tiny_model import make_data, make_model
from torch import nn

import influent
from influent import preflight
from influent.attach import Budget
from influent.compress import Compress
from influent.errors import SpecError
from influent.layers import plan
from influent.methods import METHODS


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rows", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [16, 100, 1000, 5000, 10**6])
def test_the_largest_compressor_that_fits_is_chosen(method, rows, size):
    tracked = plan(nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 5), nn.Linear(5, 40)))
    entry = torch.finfo(getattr(torch, rows)).bits // 8

    def stored(text: str) -> int:
        bound = [Compress.parse(text).bind(block, 0) for block in tracked.blocks]
        assert [b.width for b in bound] == [Compress.parse(text).width(b.block) for b in bound]
        return entry * sum(b.width for b in bound)

    text = Budget(size, rows, METHODS[method].sized).choose(tracked)
    assert stored(text) <= size
    side = next(side for side in range(1, 100) if METHODS[method].sized(side) == text)
    larger = stored(METHODS[method].sized(side + 1))
    assert larger > size or larger == stored(text)  # no layer has more to keep


def test_a_budget_too_small_for_one_entry_a_layer_is_refused():
    with pytest.raises(SpecError, match="--row-bytes 4: 2 layers need 8 bytes a row"):
        Budget(4, "float32", METHODS["logra"].sized).choose(plan(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))))


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

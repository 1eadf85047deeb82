"""One row for all layers is the dense map of the concatenated gradient, whatever the map, the layers and the batch."""

import pytest
import torch
from oracle_gradients import compressed, weight_gradients
from test_task import make_model
from torch import Tensor, nn

from influent import whole
from influent.collect import Collector
from influent.compress import Compress
from influent.errors import SpecError
from influent.extract import frozen
from influent.gradients import Flat, Outer
from influent.layers import plan
from influent.task import Classification

KINDS = [
    "id", "mask:40", "mask:3", "gauss:16", "rademacher:16", "fjlt:16", "sjlt:16", "sjlt:16,s=2", "mask:60 | sjlt:16",
    "mask:60 | rotate | gauss:8", "rotate | mask:12",
]  # fmt: skip


class Net(nn.Module):
    """A convolution, a norm, a layer that is called twice, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(2, 3, 2), nn.LayerNorm(12)
        self.twice, self.head = nn.Linear(12, 12, bias=False), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.conv(x).flatten(1)))
        return self.head(torch.tanh(self.twice(torch.tanh(self.twice(x)))))


def rows_of(model: nn.Module, data: list, compress: str, *, layers: str | None, budget: int = 100) -> tuple:
    tracked = plan(model, layers)
    bound = whole.bind_whole(Compress.parse(compress), tracked, 3, {})
    with frozen(model):
        collector = Collector(model, tracked, {whole.ALL: bound}, Classification(), budget)
        return collector.collect(data, name=str).rows[whole.ALL], bound, tracked


@pytest.fixture(scope="module")
def case() -> tuple:
    torch.manual_seed(0)
    model = Net().double()
    data = [(torch.randn(2, 5, dtype=torch.float64), i % 4) for i in range(6)]
    tracked = plan(model, ".")

    def loss(i: int) -> Tensor | None:
        x, y = data[i] if i < len(data) else (None, None)
        return None if x is None else nn.functional.cross_entropy(model(x[None]), torch.tensor([y]))

    by_block = weight_gradients(model, tracked, loss)
    return model, data, torch.cat([by_block[block.name] for block in tracked.blocks], dim=1)


@pytest.mark.parametrize("compress", KINDS)
@pytest.mark.parametrize("small", [False, True])
def test_a_row_is_the_dense_map_of_the_concatenated_gradient(case, monkeypatch, compress, small):
    model, data, flat = case
    if small:  # pieces of one example, and entries gathered without forming a block's gradient
        monkeypatch.setattr(whole, "DENSE_LIMIT", 1)
        monkeypatch.setattr(whole, "GATHER_RATIO", 0)
    rows, bound, _ = rows_of(model, data, compress, layers=".", budget=2 if small else 100)
    torch.testing.assert_close(rows.double(), compressed(bound, flat), rtol=1e-5, atol=1e-6)
    assert rows.shape == (6, Compress.parse(compress).width(bound.block))


@pytest.mark.parametrize("compress", ["mask:500 | sjlt:64", "sjlt:64", "id"])
def test_tied_embeddings_add_up(compress):
    model = make_model("gpt2").double()
    tracked = plan(model, "wte|lm_head|c_attn|ln_f")
    bound = whole.bind_whole(Compress.parse(compress), tracked, 0, {})

    class Tokens:
        def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
            logits = model(input_ids=batch, use_cache=False).logits
            return nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), batch[:, 1:], reduction="none").sum(1)

        measure = loss

    task, ids = Tokens(), torch.arange(12).view(3, 4) * 5 % 61
    with frozen(model):
        made = Collector(model, tracked, {whole.ALL: bound}, task).collect(list(ids), name=str).rows[whole.ALL]
    flat = weight_gradients(model, tracked, lambda i: task.loss(model, ids[i : i + 1])[0] if i < 3 else None)
    exact = bound.join(Flat(torch.cat([flat[block.name] for block in tracked.blocks], dim=1)))
    torch.testing.assert_close(made.double(), exact, rtol=1e-5, atol=1e-6)


def test_stages_that_need_two_sides_are_refused():
    for compress in ("gauss:4x4", "mask:/2", "mask:8x8 | sjlt:16", "whiten:4x4"):
        with pytest.raises(SpecError, match="works on the two sides of a layer, and --key all has one row"):
            whole.bind_whole(Compress.parse(compress), plan(Net()), 0, {})


def test_blocks_that_the_loss_does_not_depend_on_are_zero():
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            self.unused(x)
            return self.used(x)

    data = [(torch.randn(3), i % 2) for i in range(3)]
    rows, bound, tracked = rows_of(Half(), data, "id", layers=".")
    first = tracked.blocks[0].width
    assert bool((rows[:, :first] != 0).any()) and not bool(rows[:, first:].any())


def test_a_mask_that_was_learned_block_by_block_keeps_its_entries(case):
    model, data, flat = case
    tracked = plan(model, ".")
    kept = {block.name: {"flat": torch.arange(0, block.width, 3)} for block in tracked.blocks}
    bound = whole.bind_whole(Compress.parse("select:9 | sjlt:16"), tracked, 0, kept)
    with frozen(model):
        made = Collector(model, tracked, {whole.ALL: bound}, Classification()).collect(data, name=str)
    torch.testing.assert_close(made.rows[whole.ALL].double(), compressed(bound, flat), rtol=1e-5, atol=1e-6)
    firsts = [0, *torch.tensor([block.width for block in tracked.blocks]).cumsum(0).tolist()]
    expected = [
        first + j for first, block in zip(firsts, tracked.blocks, strict=False) for j in range(0, block.width, 3)
    ]
    assert bound.flat[0].kept.tolist() == expected


def test_sides_of_16_bits_are_added_up_in_float32():
    rng = torch.Generator().manual_seed(0)
    a, d = (torch.randn(2, 300, width, generator=rng).bfloat16() for width in (9, 7))
    exact = torch.einsum("bti,bto->bio", a.double(), d.double()).flatten(1)
    outer, places = Outer(a, d, 9, 7), torch.arange(63)
    for found in (outer.flat(), outer.at(places // 7, places % 7)):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-4)

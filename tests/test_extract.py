"""Extraction equals autograd, example by example, for every layer kind and every way a model may use a layer."""

import pytest
import torch
from oracle_gradients import compressed, weight_gradients
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from influent import sides
from influent.compress import Compress
from influent.errors import LayerError
from influent.extract import NonFinite, frozen, gradients
from influent.layers import plan


class Tied(nn.Module):
    """An embedding whose weight is also the output head's."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.mid = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=bias)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(torch.tanh(self.mid(self.embed(x))))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        return self.layer(torch.tanh(self.layer(x)))


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.second, self.reentrant = nn.Linear(6, 6), nn.Linear(6, 3), reentrant

    def forward(self, x):
        if self.reentrant:
            x = x.clone().requires_grad_()
        return self.second(checkpoint(lambda z: torch.tanh(self.first(z)), x, use_reentrant=self.reentrant))


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.second(functional.relu(self.first(x), inplace=True))


class Positions(nn.Module):
    """Learned positions whose ids broadcast over the batch, as in GPT-2."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place, self.head = nn.Embedding(11, 6), nn.Embedding(5, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.head(torch.tanh(self.embed(x) + self.place(torch.arange(x.shape[1])[None])))


class Keyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x):
        return self.layer(input=x)


class Flattened(nn.Module):
    """A model that flattens batch and positions for one layer, as mixture-of-experts routers do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        flat = torch.tanh(self.layer(x.reshape(-1, 6)))
        return self.head(flat.view(x.shape))


class FlatRMSNorm(nn.Module):
    def __init__(self, offset: float) -> None:
        super().__init__()
        self.weight, self.variance_epsilon, self.offset = nn.Parameter(torch.randn(6) * 0.1), 1e-6, offset

    def forward(self, x):
        return (self.offset + self.weight) * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def floats(*shape):
    return lambda: torch.randn(4, *shape).double()


def tokens():
    return torch.randint(0, 11, (4, 5))


def hf_conv1d():
    from transformers.pytorch_utils import Conv1D

    return nn.Sequential(Conv1D(5, 6), nn.Tanh(), Conv1D(3, 5))


MODELS = {
    "linear": (lambda: nn.Linear(6, 3), floats(6)),
    "linear-sequence": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3, bias=False)), floats(7, 6)),
    "linear-4d": (lambda: nn.Linear(6, 3), floats(2, 3, 6)),
    "hf-conv1d": (hf_conv1d, floats(7, 6)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), floats(4, 9, 8)),
    "conv2d-dilated": (lambda: nn.Conv2d(4, 6, (3, 2), dilation=(2, 1), padding=(2, 0), bias=False), floats(4, 9, 8)),
    "conv2d-grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding="same"), floats(4, 6, 6)),
    "conv2d-depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, padding=1, padding_mode="reflect"), floats(4, 6, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 4, stride=2, padding=2), floats(4, 9)),
    "conv1d-same": (
        lambda: nn.Conv1d(4, 6, 4, padding="same", dilation=2, groups=2, padding_mode="circular"),
        floats(4, 9),
    ),
    "embedding": (lambda: nn.Sequential(nn.Embedding(11, 6, padding_idx=2), nn.Linear(6, 3)), tokens),
    "layernorm": (lambda: nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6)), floats(7, 6)),
    "layernorm-2d": (lambda: nn.LayerNorm((3, 6), bias=False), floats(2, 3, 6)),
    "rmsnorm": (lambda: nn.Sequential(nn.RMSNorm(6), nn.Linear(6, 3)), floats(7, 6)),
    "rmsnorm-class": (lambda: nn.Sequential(FlatRMSNorm(0.0), nn.Linear(6, 3)), floats(7, 6)),
    "rmsnorm-offset": (lambda: nn.Sequential(FlatRMSNorm(1.0), nn.Linear(6, 3)), floats(7, 6)),
    "batchnorm-eval": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)),
        floats(3, 6, 6),
    ),
    "tied": (Tied, tokens),
    "tied-bias": (lambda: Tied(bias=True), tokens),
    "called-twice": (Twice, floats(7, 6)),
    "checkpoint": (lambda: Checkpointed(False), floats(7, 6)),
    "checkpoint-reentrant": (lambda: Checkpointed(True), floats(7, 6)),
    "in-place": (InPlace, floats(7, 6)),
    "positions": (Positions, tokens),
    "keyword": (Keyword, floats(7, 6)),
    "flattened": (Flattened, floats(7, 6)),
}
COMPRESSORS = [
    "id",
    "mask:3x2",
    "gauss:3x2",
    "sjlt:3x2",
    "mask:2",
    "sjlt:7",
    "sjlt:7,s=2,iid",
    "fjlt:5",
    "rademacher:4",
    "mask:20 | sjlt:6",
    "mask:4x3 | sjlt:5",
    "fjlt:4x2 | gauss:5",
]


def build(name):
    torch.manual_seed(0)
    make, data = MODELS[name]
    model = make().double().eval()
    x = data()
    return model, x


def losses_of(model, x):
    """A loss per example that is neither linear nor symmetric in the outputs."""
    out = model(x).flatten(1)
    weights = torch.linspace(0.5, 1.5, out.shape[1], dtype=out.dtype)
    return (torch.sin(out) * weights).sum(1)


def extract(model, x, text="id", *, layers="", positions=None):
    tracked = plan(model, layers)
    bound = {block.name: Compress.parse(text).bind(block, 0) for block in tracked.blocks}
    shape = sides.Batch(len(x), positions or x.shape[1])
    with frozen(model):
        rows, losses = gradients(model, tracked, bound=bound, batch=shape, loss=lambda: losses_of(model, x))
    return tracked, bound, rows, losses


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_equals_autograd(name):
    model, x = build(name)
    tracked, _, rows, losses = extract(model, x)
    expected = weight_gradients(model, tracked, lambda i: losses_of(model, x[i : i + 1])[0] if i < len(x) else None)
    torch.testing.assert_close(losses, losses_of(model, x).detach(), rtol=1e-12, atol=1e-12)
    assert rows.keys() == expected.keys()
    for block in rows:
        torch.testing.assert_close(
            rows[block], expected[block], rtol=1e-9, atol=1e-11, msg=lambda m, b=block: f"{b}: {m}"
        )
        assert expected[block].abs().max() > 1e-6


@pytest.mark.parametrize("text", COMPRESSORS)
@pytest.mark.parametrize(
    "name", ["linear", "linear-sequence", "hf-conv1d", "conv2d-grouped", "embedding", "layernorm", "tied-bias"]
)
def test_compressed_rows_equal_the_map_of_the_materialised_gradient(name, text):
    model, x = build(name)
    _, _, exact, _ = extract(model, x)
    _, bound, rows, _ = extract(model, x, text)
    for block, maps in bound.items():
        assert rows[block].shape == (len(x), maps.width)
        torch.testing.assert_close(rows[block].double(), compressed(maps, exact[block].double()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["linear-sequence", "conv1d", "tied", "positions"])
def test_a_batch_equals_its_examples_one_by_one(name):
    model, x = build(name)
    _, _, rows, _ = extract(model, x, "mask:4x3 | sjlt:5")
    for i in range(len(x)):
        _, _, one, _ = extract(model, x[i : i + 1], "mask:4x3 | sjlt:5")
        for block in rows:
            torch.testing.assert_close(rows[block][i : i + 1], one[block], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_give_float32_rows_near_the_exact_ones(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.LayerNorm(32), nn.Linear(32, 8))
    x = torch.randn(4, 5, 32)
    _, _, exact, _ = extract(model, x, "mask:8x8 | sjlt:32")
    _, _, rows, _ = extract(model.to(dtype), x.to(dtype), "mask:8x8 | sjlt:32")
    for block in exact:
        assert rows[block].dtype == torch.float32
        cosine = functional.cosine_similarity(rows[block], exact[block])
        assert (cosine > 0.995).all(), (block, cosine)


def test_no_weight_gradient_is_computed_and_the_model_is_left_as_it_was():
    model, x = build("linear-sequence")
    model.train()
    model[0].weight.requires_grad_(False)
    seen = []
    handle = model[2].register_forward_hook(lambda m, a, o: seen.append(m.weight.requires_grad))
    extract(model, x)
    handle.remove()
    assert seen == [False]
    assert all(p.grad is None for p in model.parameters())
    assert model.training and not model[0].weight.requires_grad and model[2].weight.requires_grad
    assert not model[0]._forward_hooks


def test_the_forward_hook_keeps_only_the_compressed_input_side():
    from influent.extract import Rows

    model, x = build("linear-sequence")
    tracked = plan(model, "")
    bound = {block.name: Compress.parse("mask:3x2").bind(block, 0) for block in tracked.blocks}
    kept = Rows(bound).enter(tracked.sites[0], x)
    assert kept.shape == (4, 7, 3)
    assert kept.untyped_storage().nbytes() == 4 * 7 * 3 * 8


def test_a_layer_that_cannot_be_handled_is_named_unless_excluded():
    model = nn.Sequential(nn.Linear(6, 6), nn.LSTM(6, 6))
    with pytest.raises(LayerError, match=r"layer 1 is a LSTM.*--exclude"):
        plan(model, "")
    assert [b.name for b in plan(model, "", "1").blocks] == ["0"]


def test_patterns_that_match_nothing_name_what_there_is():
    with pytest.raises(LayerError, match=r"'nothing' matches no layer.*its layers are 0"):
        plan(nn.Sequential(nn.Linear(2, 2)), "nothing")


def test_a_layer_that_is_not_called_is_named():
    model = nn.ModuleDict({"used": nn.Linear(6, 3), "idle": nn.Linear(6, 3)})
    tracked = plan(model, "")
    bound = {block.name: Compress.parse("id").bind(block, 0) for block in tracked.blocks}
    x = torch.randn(2, 6)
    with frozen(model), pytest.raises(LayerError, match="layer idle was not called"):
        gradients(model, tracked, bound=bound, batch=sides.Batch(2, 1), loss=lambda: model["used"](x).sum(1))


def test_multihead_attention_and_time_first_layers_are_refused():
    with pytest.raises(LayerError, match="attention.*MultiheadAttention|MultiheadAttention"):
        plan(nn.TransformerEncoderLayer(8, 2, batch_first=True), "out_proj")
    with pytest.raises(LayerError, match="batch_first=False"):
        plan(nn.ModuleList([nn.TransformerEncoderLayer(8, 2)]), "linear1")


def test_routed_tokens_are_refused_rather_than_guessed():
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.expert = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            hidden = self.first(x)
            return hidden + self.expert(hidden.flatten(0, 1)[:6]).sum()

    model = Routed().double()
    with pytest.raises(LayerError, match=r"layer expert got an input of shape \(6, 6\)"):
        extract(model, torch.randn(4, 7, 6).double())


def test_an_rmsnorm_with_another_formula_is_refused():
    class OddRMSNorm(FlatRMSNorm):
        def forward(self, x):
            return 3 * super().forward(x)

    with pytest.raises(LayerError, match="whose formula is not that of an RMSNorm"):
        extract(nn.Sequential(OddRMSNorm(1.0)).double(), torch.randn(2, 3, 6).double())


def test_losses_that_are_not_finite_are_placed():
    model, x = build("linear-sequence")
    x[2] = float("nan")
    with pytest.raises(NonFinite) as caught:
        extract(model, x)
    assert caught.value.places == [2]


def test_coverage_counts_tied_weights_once():
    tracked = plan(Tied(), "embed|head")
    assert (tracked.covered, tracked.total) == (66, 66 + 42)
    assert [b.name for b in tracked.blocks] == ["embed"]
    assert tracked.blocks[0].kind == "linear"

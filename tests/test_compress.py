"""The grammar prints back what it parses and refuses the rest; a bound compressor is the Kronecker product it says."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle_gradients import compressed, dense
from torch import Tensor

from influent import bind, gradients
from influent.compress import BUCKET_LAWS, KINDS, LEARNED, MOMENTS, POWERS, Compress, Stage
from influent.errors import SpecError
from influent.gradients import Flat, Outer
from influent.layers import Block
from influent.maps import Identity

sizes = st.integers(1, 10**7)
COMPRESSORS = [
    "id", "mask:4x3", "gauss:4x3", "rademacher:4x3", "sjlt:4x3", "sjlt:4x3,s=2,iid", "fjlt:4x3", "mask:6", "gauss:6",
    "rademacher:6", "sjlt:6", "sjlt:6,s=3", "fjlt:6", "mask:20 | sjlt:6", "mask:6x5 | sjlt:8", "mask:6x5 | gauss:3x2",
    "fjlt:6x5 | mask:12 | rademacher:5", "sjlt:64x2", "rademacher:/2", "gauss:/100", "sjlt:/3 | rotate", "rotate",
    "rotate | mask:4x3 | rotate", "mask:20 | rotate", "mask:6x5 | gauss:/3 | rotate | sjlt:2 | rotate",
]  # fmt: skip


@st.composite
def stages(draw, flat: bool) -> Stage:
    kind = draw(st.sampled_from([*KINDS, "rotate"]))
    if kind == "rotate":
        return Stage("rotate")
    size, out = draw(sizes), None if flat else draw(sizes)
    factor = None if flat else draw(st.none() | sizes)
    if factor is not None:
        size = out = None
    if kind != "sjlt":
        return Stage(kind, size, out, factor=factor)
    most = factor if size is None else min(size, out or size)
    return Stage(kind, size, out, draw(st.integers(1, most)), draw(st.sampled_from(BUCKET_LAWS)), factor)


@st.composite
def learned(draw) -> list[Stage]:
    kind = draw(st.sampled_from([None, *LEARNED]))
    if kind is None:
        return []
    power = draw(st.sampled_from(POWERS)) if kind == "whiten" else 0.0
    sized = draw(st.booleans())
    size, out, factor = (draw(sizes), draw(sizes), None) if sized else (None, None, draw(sizes))
    return [Stage(kind, size, out, factor=factor, power=power, moments=draw(st.sampled_from(MOMENTS)))]


factored = st.builds(lambda first, rest: [*first, *rest], learned(), st.lists(stages(False)))
flat = st.lists(stages(True))


@given(factored, flat)
def test_a_compressor_parses_what_it_prints(factored, flat):
    compress = Compress((*factored, *flat))
    assert Compress.parse(str(compress)) == compress


@given(factored, flat, st.sampled_from(["|", " | ", "  |", "|\t"]))
def test_spaces_around_bars_are_free(factored, flat, bar):
    compress = Compress((*factored, *flat))
    assert str(Compress.parse(f" {bar.join(str(compress).split(' | '))} ")) == str(compress)


@pytest.mark.parametrize(
    "text, canonical",
    [
        ("id", "id"),
        ("mask:128x128|sjlt:4096", "mask:128x128 | sjlt:4096"),
        ("sjlt:64,balanced,s=1", "sjlt:64"),
        ("sjlt:64,iid,s=2", "sjlt:64,s=2,iid"),
        ("rademacher:/16|rotate", "rademacher:/16 | rotate"),
        ("sjlt:/16,s=2", "sjlt:/16,s=2"),
        ("pca:8x4", "pca:8x4"),
        ("pca:/16,grads", "pca:/16"),
        ("whiten:8x4,kfac,p=0.5|rotate", "whiten:8x4,kfac | rotate"),
        ("whiten:80,share,kfac|rotate", "whiten:80,kfac,share | rotate"),
        ("pca:8,share", "pca:8,share"),
        ("whiten:8x4,kfac,p=0.25 | mask:9", "whiten:8x4,p=0.25,kfac | mask:9"),
    ],
)
def test_canonical_text(text, canonical):
    assert str(Compress.parse(text)) == canonical


UNKNOWN = [
    "", " ", "|", "mask", "mask:", ":4", "4", "mask:0", "mask:-4", "mask:4.5", "mask:1e3", "mask:04", "mask:4x0",
    "mask:4x", "mask:x4", "mask:4x4x4", "mask:4X4", "MASK:4", "Mask:4", "mask 4", "mask: 4", "mask:4 sjlt:4",
    "mask:4 |", "| mask:4", "mask:4 || sjlt:2", "mask:4;sjlt:2", "mask:1\u0664", "id | mask:4", "mask:4 | id", "id:4",
    "pca:4", "whiten:4", "pca", "rotate:4", "rotate:4x4", "rotate,s=2", "rotate rotate", "mask:/", "mask:/0",
    "mask:4/2", "mask:/2x2", "mask:/-1", "mask:16 | sjlt:/2", "select:", "nonsense:4",
    "sjlt:4,", "sjlt:4, s=2", "sjlt:4,S=2",
    "mask:4\nsjlt:2", "mask:16 | sjlt:4x4", "mask:4x4 | sjlt:16 | gauss:2x2",
]  # fmt: skip
OPTIONS = [
    "sjlt:4,s=0",
    "sjlt:4,s=",
    "sjlt:4,s=01",
    "sjlt:4,foo",
    "sjlt:4,s",
    "sjlt:4,iid=1",
    "mask:4,iid",
    "gauss:4x4,s=2",
    "sjlt:4,s=1,s=2",
    "sjlt:4,iid,balanced",
    "sjlt:4,iid,iid",
    "sjlt:/4,kfac",
    "fjlt:/4,s=2",
]
LEARNED_OPTIONS = [
    "whiten:4x4,p=0.75", "whiten:4x4,p=1", "whiten:4x4,p=0.50", "whiten:4x4,s=2", "whiten:4x4,p=0.5,p=0.25",
    "whiten:4x4,kfac,grads", "whiten:/4,iid",
]  # fmt: skip
ALLOWED = [
    *((text, f"KIND:K, KIND:AxB or KIND:/F with KIND one of {', '.join(KINDS)}, or first") for text in UNKNOWN),
    *((text, r"sjlt takes s=N(,| and) iid") for text in OPTIONS),
    *((text, "whiten takes p=0.25 or p=0.5, kfac or grads, and share") for text in LEARNED_OPTIONS),
    ("pca:4x4,p=0.5", "option 'p=0.5' is not known; pca takes kfac or grads"),
    ("whiten:4x4,share", "stage 'whiten:4x4,share' is learned side by side; .*AxB, /F or K,share"),
    ("whiten:/4,share", "is learned side by side"),
    ("whiten:7,share", "'whiten:7,share' shares 7 numbers a layer, expected 8 or more"),
    ("sjlt:64,share", "sjlt takes s=N, iid and balanced"),
    ("mask:4x4 | whiten:2x2", "stage 'whiten:2x2' must be the first"),
    ("pca:4x4 | pca:2x2", "stage 'pca:2x2' must be the first"),
    ("rotate | pca:2x2", "stage 'pca:2x2' must be the first"),
    ("sjlt:4,s=5", "s=5 is more than the size of stage 'sjlt:4,s=5'"),
    ("sjlt:8x2,s=3", "s=3 is more than the size"),
]


@pytest.mark.parametrize("text, allowed", ALLOWED)
def test_every_malformed_text_says_what_is_allowed(text, allowed):
    with pytest.raises(SpecError, match=allowed) as caught:
        Compress.parse(text)
    message = str(caught.value)
    assert message.startswith(f"compressor {text!r}: ")
    assert "\n" not in message


@given(st.text(alphabet="idmaskgujlteropcwhn:x/|,=s. 0123456789", max_size=20))
def test_any_text_is_parsed_or_refused(text):
    try:
        compress = Compress.parse(text)
    except SpecError:
        return
    assert Compress.parse(str(compress)) == compress


def data(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sides(block: Block, *, positions: int = 4) -> tuple[Tensor, Tensor]:
    return data(3, positions, block.in_width), data(3, positions, block.out_width, seed=1)


def join(bound: bind.Bound, a: Tensor, d: Tensor) -> Tensor:
    """As the hooks do it: the sides are mapped apart, then joined."""
    return bound.join(Outer(bound.map_in(a), bound.map_out(d), bound.in_width, bound.out_width))


LINEAR = Block("layer", "linear", 9, 7)
NORM = Block("norm", "norm", 40, 1)


@pytest.mark.parametrize("text", COMPRESSORS)
def test_factored_is_the_kronecker_product_on_the_materialised_gradient(text):
    bound = Compress.parse(text).bind(LINEAR, 0)
    a, d = sides(LINEAR)
    exact = torch.einsum("bti,bto->bio", a, d).flatten(1)  # input-major
    rows = join(bound, a, d)
    assert rows.shape == (3, bound.width)
    torch.testing.assert_close(rows, compressed(bound, exact), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("text", COMPRESSORS)
def test_the_ones_column_of_a_bias_goes_through_the_maps(text):
    bound = Compress.parse(text).bind(LINEAR, 0)
    a, d = sides(LINEAR)
    a[..., -1] = 1
    without = Outer(bound.map_in(a[..., :-1], bias=True), bound.map_out(d), bound.in_width, bound.out_width)
    torch.testing.assert_close(bound.join(without), join(bound, a, d), rtol=1e-9, atol=1e-9)


def bound_sizes(bound: bind.Bound) -> tuple[int, tuple[int, int] | None]:
    factored = not bound.flat and not bound.block.is_vector
    return bound.width, (bound.in_width, bound.out_width) if factored else None


@pytest.mark.parametrize("text", COMPRESSORS)
@pytest.mark.parametrize("block", [LINEAR, NORM, Block("thin", "linear", 1, 3)])
def test_the_widths_are_known_before_anything_is_drawn(text, block):
    compress = Compress.parse(text)
    assert bound_sizes(compress.bind(block, 0)) == (compress.width(block), compress.factors(block))


@pytest.mark.parametrize("kind", KINDS)
def test_a_factor_divides_the_widths_of_each_block(kind):
    big = Block("big", "linear", 100, 33)
    compress = Compress.parse(f"{kind}:/16")
    assert compress.factors(big) == (6, 2)
    assert compress.factors(LINEAR) == (1, 1)
    assert (compress.width(NORM), compress.factors(NORM)) == (2, None)
    same = Compress.parse(f"{kind}:6x2").bind(big, 0)
    a, d = sides(big)
    assert torch.equal(join(compress.bind(big, 0), a, d), join(same, a, d))
    assert Compress.parse(f"{kind}:/1").bind(LINEAR, 0).width == 63


def test_more_hashes_than_a_factor_leaves_entries_are_refused():
    with pytest.raises(SpecError, match="block layer: stage 'sjlt:/3,s=3' leaves 2 entries, fewer than s=3"):
        Compress.parse("sjlt:/3,s=3").bind(LINEAR, 0)
    assert Compress.parse("sjlt:8x8,s=8").bind(Block("thin", "linear", 3, 2), 0).width == 6


def test_a_rotation_keeps_every_inner_product():
    a, d = sides(LINEAR)
    exact = torch.einsum("bti,bto->bio", a, d).flatten(1)
    for text in ("rotate", "rotate | rotate", "sjlt:100 | rotate", "rotate | gauss:9x7"):
        rows = join(Compress.parse(text).bind(LINEAR, 0), a, d)
        torch.testing.assert_close(rows @ rows.T, exact @ exact.T)
        assert not torch.allclose(rows, exact)


def test_a_learned_stage_needs_its_bases():
    with pytest.raises(SpecError, match="'pca:2x2' must be learned from data before it is bound"):
        Compress.parse("pca:2x2 | rotate").bind(LINEAR, 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("a, b", [(4, 3), (1, 1), (8, 8)])
def test_a_factorised_stage_on_a_vector_is_its_flat_counterpart(kind, a, b):
    factored = Compress.parse(f"{kind}:{a}x{b} | sjlt:5").bind(NORM, 0)
    flat = Compress.parse(f"{kind}:{a * b} | sjlt:5").bind(NORM, 0)
    g = Flat(data(3, 40))
    assert not factored.inner and not factored.outer
    assert factored.flat[0].k == min(a * b, 40)
    assert torch.equal(factored.join(g), flat.join(g))
    torch.testing.assert_close(factored.join(g), compressed(factored, g.g), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_size_is_capped_at_the_width_where_the_stage_is_the_identity(kind):
    a, d = sides(LINEAR)
    exact = torch.einsum("bti,bto->bio", a, d).flatten(1)
    for text in (f"{kind}:9x7", f"{kind}:100x100", f"{kind}:63", f"{kind}:4096", f"{kind}:128x128 | sjlt:4096"):
        bound = Compress.parse(text).bind(LINEAR, 0)
        assert bound.width == 63 and bound.scale == 1.0
        assert all(isinstance(m, Identity) for m in (*bound.inner, *bound.outer, *bound.flat))
        torch.testing.assert_close(join(bound, a, d), exact)
    one_side = Compress.parse(f"{kind}:4x100").bind(LINEAR, 0)
    assert (one_side.in_width, one_side.out_width, one_side.width) == (4, 7, 28)
    assert isinstance(one_side.outer[0], Identity) and not isinstance(one_side.inner[0], Identity)
    assert Compress.parse(f"{kind}:100x100").bind(NORM, 0).width == 40


WIDE = Block("wide", "linear", 40, 30)


@pytest.mark.parametrize("text", ["mask:16", "mask:16 | sjlt:4", "mask:1 | gauss:3", "mask:60x25 | mask:12 | fjlt:5"])
@pytest.mark.parametrize("entries", [10**6, 10])
def test_grass_gathers_what_it_would_have_masked(text, entries, monkeypatch):
    bound = Compress.parse(text).bind(WIDE, 0)
    a, d = sides(WIDE)
    monkeypatch.setattr(gradients, "_GATHER_ENTRIES", entries)
    monkeypatch.setattr(Outer, "flat", lambda self: pytest.fail("the gradient was formed"))
    gathered = join(bound, a, d)
    monkeypatch.undo()
    monkeypatch.setattr(bind, "GATHER_RATIO", 10**9)
    monkeypatch.setattr(Outer, "at", lambda *_: pytest.fail("gathered"))
    torch.testing.assert_close(gathered, join(bound, a, d), rtol=1e-12, atol=1e-12)


EMBEDDING = Block("embed", "embedding", 6, 50)  # h = 6 on the input side, V = 50 on the output side
SPARSE = ["sjlt:9", "sjlt:9,s=2", "sjlt:9,iid", "sjlt:9 | gauss:3", "mask:3x60 | sjlt:9"]


@pytest.mark.parametrize(
    "text",
    [*SPARSE, "id", "mask:4", "mask:200", "gauss:7", "mask:3x20 | sjlt:9", "sjlt:4x8", "fjlt:9", "rotate", "gauss:/2"],
)
def test_an_embedding_by_its_ids_is_the_embedding_by_one_hot_vectors(text, monkeypatch):
    bound = Compress.parse(text).bind(EMBEDDING, 0)
    a = data(3, 5, 6)
    ids = torch.tensor([[0, 1, 1, 49, 7], [3, 3, 3, 3, 3], [10, 20, 30, 40, 48]])
    hot = torch.nn.functional.one_hot(ids, 50).double()
    expected = compressed(bound, torch.einsum("bti,bto->bio", a, hot).flatten(1))
    if text in SPARSE and "x" not in text:
        monkeypatch.setattr(Outer, "flat", lambda self: pytest.fail("the gradient was formed"))
    torch.testing.assert_close(join(bound, a, ids).double(), expected, rtol=1e-5, atol=1e-5)
    monkeypatch.undo()
    torch.testing.assert_close(join(bound, a, hot), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("text", ["sjlt:6", "gauss:6", "fjlt:6 | mask:2"])
def test_gradients_too_large_for_the_batch_are_formed_one_at_a_time(text, monkeypatch):
    bound = Compress.parse(text).bind(LINEAR, 0)
    a, d = sides(LINEAR)
    expected = join(bound, a, d)
    sizes = []
    formed = Outer.flat
    monkeypatch.setattr(Outer, "flat", lambda self: sizes.append(len(self.a)) or formed(self))
    monkeypatch.setattr(bind, "DENSE_LIMIT", 100)
    torch.testing.assert_close(join(bound, a, d), expected, rtol=1e-12, atol=1e-12)
    assert sizes == [1, 1, 1]


@pytest.mark.parametrize("text", COMPRESSORS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_sides_are_joined_in_float32(text, dtype):
    bound = Compress.parse(text).bind(LINEAR, 0)
    a, d = (side.to(dtype) for side in sides(LINEAR))
    rows = join(bound, a, d)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows, join(bound, a.float(), d.float()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("text", COMPRESSORS)
def test_the_scale_makes_the_chain_its_maps_one_after_another(text):
    bound = Compress.parse(text).bind(LINEAR, 0)
    every = [*bound.inner, *bound.outer, *bound.flat]
    assert bound.scale == pytest.approx(torch.tensor([m.scale for m in every]).double().prod().item(), rel=1e-6)
    for m in every:
        torch.testing.assert_close(dense(m), m.raw(torch.eye(m.p, dtype=torch.float64)) * m.scale)


def test_maps_depend_on_seed_block_stage_and_side_and_on_nothing_else():
    def rows(text: str, block: Block, seed: int) -> Tensor:
        return join(Compress.parse(text).bind(block, seed), *sides(block))

    text, twin = "sjlt:4x4 | gauss:8", Block("twin", "linear", 9, 7)
    first = rows(text, LINEAR, 0)
    torch.manual_seed(5)
    rows(text, twin, 0)
    assert torch.equal(rows(text, LINEAR, 0), first)
    assert not torch.allclose(rows(text, twin, 0), first)
    assert not torch.allclose(rows(text, LINEAR, 1), first)
    square = Compress.parse("gauss:4x4 | gauss:4x4").bind(Block("square", "linear", 9, 9), 0)
    assert not torch.allclose(dense(square.inner[0]), dense(square.outer[0]))
    deep = Compress.parse("rademacher:5 | rademacher:4").bind(Block("deep", "linear", 3, 2), 0)
    assert not torch.allclose(dense(deep.flat[0])[:5, :4], dense(deep.flat[1]))
    moved = Compress.parse(text).bind(LINEAR, 0).to(torch.device("cpu"))
    assert torch.equal(join(moved, *sides(LINEAR)), first)

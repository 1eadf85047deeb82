"""The codec grammar round-trips, and its layout of a row is what the grammar promises."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from influent.codec import FLOATS, PER_BYTE, Codec
from influent.errors import SpecError

BITS = (*FLOATS, *PER_BYTE)
codecs = st.builds(Codec, st.none() | st.integers(1, 10**6), st.sampled_from(BITS))


@given(codecs)
def test_the_text_of_a_codec_reads_back_as_it(codec):
    assert Codec.parse(str(codec)) == codec


@pytest.mark.parametrize(
    "text, canonical",
    [
        ("float32", "float32"), ("fp32", "float32"), ("f32", "float32"), ("fp16", "float16"), ("bf16", "bfloat16"),
        ("dense", "float32"), ("dense:bf16", "bfloat16"), ("dense:float16", "float16"), ("dense:sign", "dense:sign"),
        ("int8", "dense:int8"), ("int4", "dense:int4"), ("sign", "dense:sign"), (" rank:1 ", "rank:1:bfloat16"),
        ("rank:12:fp32", "rank:12:float32"), ("rank:8:int4", "rank:8:int4"),
    ],
)  # fmt: skip
def test_every_spelling_has_one_canonical_text(text, canonical):
    assert str(Codec.parse(text)) == canonical


@pytest.mark.parametrize(
    "text",
    ["", "rank", "rank:", "rank:0", "rank:01", "rank:-1", "rank:1.5", "rank:bf16", "rank:1:", "dense:", "dense:4:int4",
     "int4:dense", "int2", "uint8", "rank:1:uint8", "bf16:bf16", "rank:1:rank:2", "RANK:1", "rank:٣", "dense int8",
     "rank:1\nint4"],
)  # fmt: skip
def test_anything_else_is_refused_in_one_line(text):
    with pytest.raises(SpecError, match="expected dense:BITS, rank:C:BITS or BITS") as failure:
        Codec.parse(text)
    assert "\n" not in str(failure.value)


@given(st.text(max_size=20))
def test_any_text_is_a_codec_or_a_spec_error(text):
    try:
        codec = Codec.parse(text)
    except SpecError:
        return
    assert Codec.parse(str(codec)) == codec


@pytest.mark.parametrize("rank, bits", [(0, "int4"), (-1, "int4"), (None, "bf16"), (1, "uint8")])
def test_a_codec_that_has_no_text_cannot_be_made(rank, bits):
    with pytest.raises(SpecError, match="no codec of rank"):
        Codec(rank, bits)


@pytest.mark.parametrize(
    "rank, factors, stored",
    [
        (None, (64, 64), None), (8, None, None), (8, (64, 64), 8), (32, (64, 64), None), (31, (64, 64), 31),
        (100, (64, 3), None), (2, (64, 3), 2), (5, (64, 1), None), (1, (2, 2), None), (1, (3, 2), 1), (1, (1, 9), None),
    ],
)  # fmt: skip
def test_rank_rows_are_kept_only_where_they_are_smaller(rank, factors, stored):
    assert Codec(rank, "int4").stored_rank(factors) == stored


def test_the_tensors_of_each_codec():
    def tensors(text, factors=None):
        return Codec.parse(text).tensors("k", 15, factors)

    assert tensors("bf16", (5, 3)) == {"k": ("bfloat16", (15,))}
    assert tensors("int8") == {"k": ("int8", (15,)), "k.scale": ("bfloat16", ())}
    assert tensors("int4") == {"k": ("uint8", (8,)), "k.scale": ("bfloat16", ())}
    assert tensors("sign") == {"k": ("uint8", (2,)), "k.scale": ("bfloat16", ())}
    assert tensors("rank:1", (5, 3)) == {"k.u": ("bfloat16", (1, 3)), "k.v": ("bfloat16", (1, 5))}
    scale = {"k.scale": ("bfloat16", (1,))}
    assert tensors("rank:1:int8", (5, 3)) == {"k.u": ("int8", (1, 3)), "k.v": ("int8", (1, 5)), **scale}
    assert tensors("rank:1:int4", (5, 3)) == {"k.u": ("uint8", (1, 2)), "k.v": ("uint8", (1, 3)), **scale}
    assert tensors("rank:1:sign", (5, 3)) == {"k.u": ("uint8", (1, 1)), "k.v": ("uint8", (1, 1)), **scale}
    assert tensors("rank:2:int4", (5, 3)) == tensors("int4")  # no smaller than dense


@given(codecs, st.integers(1, 300), st.integers(1, 300))
def test_a_row_takes_the_bytes_of_its_tensors_and_rank_rows_never_more_numbers(codec, a, b):
    size = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "uint8": 1}
    layout = codec.tensors("k", a * b, (a, b))
    assert codec.row_bytes(a * b, (a, b)) == sum(size[dtype] * math.prod(shape) for dtype, shape in layout.values())
    if (rank := codec.stored_rank((a, b))) is not None:
        assert rank * (a + b) < a * b
    else:
        assert layout == Codec(None, codec.bits).tensors("k", a * b, None)

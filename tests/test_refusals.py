"""What the verbs refuse, from Python, before anything is written; and what stands beside a contrast."""

from pathlib import Path

import pytest
import torch
from tiny_model import make_data, make_model
from torch import nn

import influent
from influent.errors import DataError, LayerError, SpecError
from influent.layers import plan


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("refusals")
    make_model(folder / "model")
    make_data(folder / "data.jsonl")
    return folder


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rows": "int3"}, "rows 'int3': 'int3' is not known"),
        ({"matmul": "low"}, "matmul is 'low'"),
        ({"dtype": "fp32"}, "dtype is 'fp32'"),
        ({"seed": -1}, "seed is -1"),
        ({"shard_rows": 0}, "shard_rows is 0"),
        ({"layers": "("}, "not a regular expression"),
        ({"method": "magic"}, "method 'magic' is not known"),
        ({"task": influent.Classification(), "max_length": 16}, "max_length belongs to the task"),
    ],
)
def test_a_bad_option_leaves_no_spec_behind(here, tmp_path, options, says):
    out = tmp_path / "out"
    with pytest.raises(SpecError, match=says):
        influent.index(str(here / "model"), str(here / "data.jsonl"), str(out), **options)
    assert not (out / "spec.json").exists()


def test_a_module_brings_its_own_dtype_and_needs_to_be_passed_again(tmp_path):
    model, task = nn.Sequential(nn.Linear(4, 3)), influent.Classification()
    rows = [(torch.randn(4), i % 3) for i in range(6)]
    out = str(tmp_path / "out")
    with pytest.raises(SpecError, match="a module has its own"):
        influent.index(model, rows, out, task=task, dtype="bfloat16")
    influent.index(model, rows, out, task=task, compress="id")
    with pytest.raises(SpecError, match="was built from a model in memory"):
        influent.query(out, queries=rows[:1], task=task)
    with pytest.raises(SpecError, match="this task has no texts"):
        influent.query(out, prompt="a", completion="b", model=model, task=task)


def test_an_unknown_curvature_is_refused_before_the_model_is_loaded(here, tmp_path):
    out = str(tmp_path / "out")
    influent.index(str(here / "model"), str(here / "data.jsonl"), out, compress="mask:4x4")
    with pytest.raises(SpecError, match="fim:relative:7"):
        influent.query(out, prompt="a", completion="b", model="no/such-model", curvature="fim:relative:7")


def test_a_linear_with_a_forward_of_its_own_is_named_by_the_default_choice():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(3, 3), Doubled(3, 3)])})
    with pytest.raises(LayerError, match=r"layer blocks\.1 is a Doubled"):
        plan(model)
    assert [block.name for block in plan(model, None, r"blocks\.1").blocks] == ["blocks.0"]


def test_words_beside_a_contrast_are_those_of_its_queries(here, tmp_path):
    out = str(tmp_path / "out")
    influent.index(str(here / "model"), str(here / "data.jsonl"), out, compress="mask:4x4")
    asked = [{"text": "The money of Japan is called yen"}, {"text": "The money of Cuba is called peso"}]
    found = influent.query(out, queries=asked, control=[{"text": "The river of Chad is the Chari"}], k=4)
    assert len(found["queries"]) == 1
    words = {row["id"].split("/")[0] for row in found["baselines"]["bm25"][0]}
    assert words == {"japan", "cuba"}


def test_an_index_of_nothing_but_skipped_rows_is_refused(here, tmp_path):
    with pytest.raises(DataError, match=r"every row was skipped \(2 no target tokens\)"):
        influent.index(str(here / "model"), [{"text": "a"}, {"text": "b"}], str(tmp_path / "out"), compress="mask:4x4")
    assert not (tmp_path / "out" / "manifest.json").exists()

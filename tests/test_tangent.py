"""The rung `tangent`: what it learns, that a row needs no logits, that it resumes, and the student made of it."""

import json

import numpy as np
import pytest
import torch
from test_student import appraise, distill, here  # noqa: F401  (a fixture)
from test_tuning import Killed, labelled, small

import influent
from influent import tangent
from influent.errors import SpecError
from influent.rng import Stream
from influent.slopes import Slopes
from influent.storage import Store
from influent.student import open_student
from influent.training import Recipe

RECIPE = Recipe(epochs=6, rate=2e-2, batch=8, patience=6)


def taught_slopes(model, rows, drawn=4):
    """Slopes that depend on the token and on the one before it."""
    counts, tokens, values = [], [], []
    push = np.random.default_rng(0).standard_normal((2, 400)).astype(np.float32)
    for i, row in enumerate(rows):
        ids = [token for part in model.task.parts(row) for token in part.inputs[0]]
        others = Stream(0, "test", "tangent", f"row/{i}").buckets(drawn * (len(ids) - 1), 400).reshape(-1, drawn)
        each = np.concatenate([np.array(ids[1:])[:, None], others], axis=1)
        counts.append(len(each))
        tokens.append(each.astype(np.int32))
        values.append(push[0][each] + push[1][ids[:-1]][:, None])
    return Slopes(np.array(counts), np.concatenate(tokens), np.concatenate(values).astype(np.float32))


def sums(known):
    return np.array([-x.sum() for x in np.split(known.values[:, 0].astype(float), np.cumsum(known.counts)[:-1])])


def test_it_learns_slopes_and_a_row_is_their_sum(here, tmp_path):  # noqa: F811
    rows, _ = labelled(80)
    model = small(here)
    known = taught_slopes(model, rows)
    found = tangent.teach(model, rows, sums(known), known, RECIPE, store=Store(str(tmp_path)))
    assert found.epochs > 0
    assert found.left_out.sum() == 16
    assert np.corrcoef(found.predicted, sums(known)[found.left_out])[0, 1] > 0.8
    x, counts = found.features(rows)
    assert counts.tolist() == known.counts.tolist()
    states, wanted, part = found.features.states([part for row in rows for part in model.task.parts(row)])
    whole = found.features.readout(states, torch.arange(400).expand(len(states), -1))  # every token's slope
    own = -torch.zeros(len(rows)).index_add(0, part, whole.gather(1, wanted[:, None])[:, 0].detach())
    assert np.allclose(x[:, 0], own.numpy(), atol=1e-4)
    assert np.allclose(x[:, 1] * np.sqrt(counts), x[:, 0], atol=1e-4)
    assert np.allclose(x[:, 2] * counts, x[:, 0], atol=1e-4)


def test_rows_cut_elsewhere_have_the_same_targets(here, tmp_path):  # noqa: F811
    """A small model that reads less at once than the owner's."""
    rows, _ = labelled(20)
    known = taught_slopes(small(here), rows)
    model = small(here)
    model.task = type(model.task)(model.task.tokenizer, max_length=6)
    assert max(len(model.task.parts(row)) for row in rows) > 1
    found = tangent.teach(model, rows, sums(known), known, RECIPE, store=Store(str(tmp_path)))
    assert found.features(rows)[1].tolist() == known.counts.tolist()
    known.tokens[3, 0] += 1
    with pytest.raises(SpecError, match="reads other target tokens"):
        tangent.teach(small(here), rows, sums(known), known, RECIPE, store=Store(str(tmp_path / "x")))


def test_a_killed_run_goes_on_to_the_same_end(here, tmp_path):  # noqa: F811
    rows, _ = labelled(40)
    known = taught_slopes(small(here), rows)

    def teach(name, progress=None, **options):
        return tangent.teach(
            small(here, **options), rows, sums(known), known, RECIPE, store=Store(str(tmp_path / name)),
            progress=progress,
        )  # fmt: skip

    def die(stage, done, total):
        if done == total // 2 + 1:
            raise Killed

    whole = teach("whole")
    with pytest.raises(Killed):
        teach("torn", die)
    seen = []
    again = teach("torn", lambda *told: seen.append(told))
    assert seen[0][1] == seen[0][2] // 2 + 1
    assert np.array_equal(again.ridge.weights, whole.ridge.weights)
    assert again.features.facts["model"] == whole.features.facts["model"]
    less = teach("less", token_budget=16)
    assert np.allclose(less.predicted, whole.predicted, atol=1e-2)


def test_a_student_of_it_is_whole_and_appraises(here, tmp_path):  # noqa: F811
    made = distill(here, str(tmp_path / "s"), rung="tangent", epochs=3, labels=60)
    assert [(rung["rung"], rung["passes"]) for rung in made["rungs"]] == [("tangent", 45)]
    assert made["skipped"] == []
    assert made["baseline"] is not None
    ratio = made["cost"]["ratio"]
    assert made["cost"]["break_even_rows"] == int(np.ceil(105 * ratio / (ratio - 1)))
    assert not (tmp_path / "s" / "making").exists()
    (tmp_path / "s").rename(tmp_path / "moved")
    assert influent.verify(str(tmp_path / "moved")) == {"ok": True, "errors": []}
    rows = [{"text": json.loads(line)["text"]} for line in (here / "offer.jsonl").read_text().splitlines()[:7]]
    values, _ = open_student(str(tmp_path / "moved"), token_budget=64)([*rows, {"text": ""}])
    again, _ = open_student(str(tmp_path / "moved"))(rows)
    assert np.isfinite(values).all()
    assert values[-1] == 0
    assert np.allclose(values[:-1], again, atol=1e-6)
    assert len(appraise(here, str(tmp_path / "moved"))["providers"]) == 3


def test_with_another_tokenizer_it_is_left_out_and_says_so(here, tmp_path):  # noqa: F811
    other = tmp_path / "other"
    small(here).model.save_pretrained(other)
    small(here).task.tokenizer.save_pretrained(other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = {token: (i + 7) % 400 for token, i in tokenizer["model"]["vocab"].items()}
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    made = distill(here, str(tmp_path / "s"), student=str(other), labels=60)
    assert [rung["rung"] for rung in made["rungs"]] == ["bm25", "tfidf", "lm"]
    assert [each["rung"] for each in made["skipped"]] == ["tangent"]
    assert "one tokenizer" in made["skipped"][0]["reason"]
    with pytest.raises(SpecError, match="one tokenizer"):
        distill(here, str(tmp_path / "t"), student=str(other), labels=60, rung="tangent")

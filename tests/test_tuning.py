"""The rung that is trained: its gradients, when it stops, that it resumes, and the student made of it."""

import json

import numpy as np
import pytest
import torch
from test_student import WORDS, distill, here  # noqa: F401  (a fixture)

import influent
from influent.errors import SpecError
from influent.features import load_lm
from influent.ridge import fit
from influent.rng import Stream
from influent.storage import Store
from influent.student import open_student
from influent.training import Recipe
from influent.tuning import tune


def labelled(n=60):
    """Texts whose label is whether one of two words is in them, which is no sum over words."""
    picks = Stream(0, "test", "tuning", "words").buckets(4 * n, len(WORDS)).reshape(n, 4)
    rows = [{"text": " ".join(WORDS[i] for i in row)} for row in picks.tolist()]
    return rows, (picks < 2).any(axis=1) * 1.0


def small(folder, **options):
    return load_lm(str(folder / "small"), token_budget=options.get("token_budget", 4096), device="cpu")


def test_it_learns_what_the_frozen_model_does_not_say(here, tmp_path):  # noqa: F811
    rows, y = labelled(200)
    found = tune(small(here), rows, y, Recipe(rate=1e-3, epochs=9, batch=8, patience=9), store=Store(str(tmp_path)))
    out = found.validation
    x, _ = small(here)(rows)
    ridge, _ = fit(x[~out], y[~out])
    frozen, tuned = (((p - y[out]) ** 2).mean() for p in (ridge(x[out]), found.predicted))
    assert found.epochs > 0
    assert tuned < 0.92 * frozen


def test_without_a_gain_the_start_is_kept(here, tmp_path):  # noqa: F811
    rows, y = labelled()
    found = tune(small(here), rows, y, Recipe(rate=1.0, epochs=3), store=Store(str(tmp_path)))
    out = found.validation
    x, _ = small(here)(rows)
    ridge, _ = fit(x[~out], y[~out])
    assert found.epochs == 0
    assert np.allclose(found.predicted, ridge(x[out]), atol=1e-4)
    assert found.features.facts["model"] == small(here).facts["model"]


def test_gradients_are_those_of_differences(here, monkeypatch):  # noqa: F811
    """Of a random sum of the features of rows in several parts, by every parameter of the model."""
    made = small(here)
    made.task = type(made.task)(made.task.tokenizer, max_length=6)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # the arithmetic is float32: here it is not
    model = made.model.double().requires_grad_(True)
    rows = labelled(2)[0]
    weight = torch.randn(made.differentiable(rows)[0].shape, dtype=torch.float64, generator=torch.manual_seed(0))
    model.zero_grad()
    (made.differentiable(rows)[0] * weight).sum().backward()
    for name, p in model.named_parameters():
        with torch.no_grad():
            along = torch.randn(p.shape, dtype=torch.float64, generator=torch.manual_seed(1))
            ends = []
            for sign in (1, -1):
                p.add_(along, alpha=sign * 1e-5)
                ends.append(float((made.differentiable(rows)[0] * weight).sum()))
                p.add_(along, alpha=-sign * 1e-5)
        assert float((p.grad * along).sum()) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-4, abs=1e-4), name


class Killed(Exception):
    pass


def test_a_killed_run_goes_on_to_the_same_end(here, tmp_path):  # noqa: F811
    rows, y = labelled()
    recipe = Recipe(rate=3e-3, epochs=4, patience=4, seed=3)
    whole = tune(small(here), rows, y, recipe, store=Store(str(tmp_path / "whole")))

    def die(stage, done, total):
        if done == 2 * total // 4 + 1:
            raise Killed

    with pytest.raises(Killed):
        tune(small(here), rows, y, recipe, store=Store(str(tmp_path / "torn")), progress=die)
    seen = []
    again = tune(
        small(here), rows, y, recipe, store=Store(str(tmp_path / "torn")), progress=lambda *told: seen.append(told)
    )  # fmt: skip
    assert seen[0][1] == 2 * seen[0][2] // 4 + 1  # two epochs were done
    assert np.array_equal(again.ridge.weights, whole.ridge.weights)
    assert again.features.facts["model"] == whole.features.facts["model"]
    less = tune(small(here, token_budget=16), rows, y, recipe, store=Store(str(tmp_path / "less")))
    assert np.allclose(less.predicted, whole.predicted, atol=1e-3)


def test_a_student_of_it_carries_the_trained_model(here, tmp_path):  # noqa: F811
    with pytest.raises(SpecError, match="epochs is for the rungs tuned and tangent"):
        distill(here, str(tmp_path / "s"), rung="lm", epochs=2)
    with pytest.raises(SpecError, match="rate is for the rungs tuned and tangent"):
        distill(here, str(tmp_path / "s"), rung="lm", rate=1e-3)
    made = distill(here, str(tmp_path / "s"), rung="tuned", epochs=2, rate=1e-3, labels=60)
    assert [rung["rung"] for rung in made["rungs"]] == ["tuned"]
    assert made["baseline"] is not None
    assert made["cost"] is not None
    assert not Store(str(tmp_path / "s")).names("making/")
    (tmp_path / "s").rename(tmp_path / "moved")
    assert influent.verify(str(tmp_path / "moved")) == {"ok": True, "errors": []}
    rows = [json.loads(line) for line in (here / "offer.jsonl").read_text().splitlines()[:7]]
    values, _ = open_student(str(tmp_path / "moved"), token_budget=64)([{"text": row["text"]} for row in rows])
    again, _ = open_student(str(tmp_path / "moved"))([{"text": row["text"]} for row in rows])
    assert np.isfinite(values).all()
    assert np.allclose(values, again, atol=1e-6)
    ladder = distill(here, str(tmp_path / "all"), epochs=1, labels=60)
    assert [rung["rung"] for rung in ladder["rungs"]] == ["bm25", "tfidf", "lm", "tuned", "tangent"]


def test_mistakes_are_named(here, tmp_path):  # noqa: F811
    with pytest.raises(SpecError, match="rate is"):
        distill(here, str(tmp_path / "x"), rung="tuned", rate=-1.0)

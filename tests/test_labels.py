"""Labels drawn from predictions: of the right law, and the same whatever stands beside a row in its batch."""

import numpy as np
import pytest
import torch
from tiny_model import FACTS, make_model

from influent import labels
from influent.collect import inputs_of
from influent.labels import draw_labels
from influent.loading import load
from influent.rng import Stream
from influent.task import CausalLM


def test_labels_follow_the_predictions(monkeypatch):
    monkeypatch.setattr(labels, "ENTRIES", 1000)
    logits = torch.log(torch.tensor([0.1, 0.0, 0.6, 0.3])).expand(20_000, 4)
    drawn = draw_labels(logits, torch.from_numpy(Stream(0, "", "labels", "").uniforms(20_000)))
    shares = torch.bincount(drawn, minlength=4) / 20_000
    torch.testing.assert_close(shares, torch.tensor([0.1, 0.0, 0.6, 0.3]), atol=0.012, rtol=0)


def test_the_ends_of_the_unit_interval():
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]]).expand(2, 4)
    assert draw_labels(logits, torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)).tolist() == [1, 2]
    assert len(draw_labels(logits[:0], torch.empty(0))) == 0


def test_uniforms_are_words_scaled():
    stream = Stream(3, "b", "k", "s")
    found = stream.uniforms(1000)
    assert ((found >= 0) & (found < 1)).all() and abs(found.mean() - 0.5) < 0.03
    assert np.array_equal(stream.uniforms(10), found[:10])


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_a_text_gets_the_same_labels_in_any_batch(reduction, tmp_path):
    model, tokenizer = load(str(make_model(tmp_path / "model")), dtype="float64", device="cpu")
    task = CausalLM(tokenizer, reduction=reduction)
    parts = [task.parts({"prompt": prompt, "completion": f" {answer}."})[0] for _, prompt, answer in FACTS]
    parts += task.parts({"text": " ".join(prompt for _, prompt, _ in FACTS)})
    streams = [Stream(0, "", "labels", str(i)) for i in range(len(parts))]
    with torch.no_grad():
        together = task.sampled_loss(model, inputs_of(task, parts, torch.device("cpu"))[0], streams)
        each = [
            task.sampled_loss(model, inputs_of(task, [part], torch.device("cpu"))[0], [stream])
            for part, stream in zip(parts, streams, strict=True)
        ]
        own = task.loss(model, inputs_of(task, parts, torch.device("cpu"))[0])
    torch.testing.assert_close(together, torch.cat(each))
    assert not torch.isclose(together, own).any(), "drawn, not the data's"


def test_positions_count_up_to_the_last_target(tmp_path):
    _, tokenizer = load(str(make_model(tmp_path / "model")), dtype="float32", device="cpu")
    task = CausalLM(tokenizer)
    labels = torch.tensor([[-100, 1, 2, -100, -100], [-100, -100, -100, 3, 4], [-100, -100, 5, -100, -100]])
    expected = [[1, 1, 0, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]
    assert task.mask({"labels": labels}).int().tolist() == expected

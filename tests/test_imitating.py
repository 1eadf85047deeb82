"""A small model that imitates a large one: the divergence against its formula, that it falls, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from tiny_model import FACTS, make_model

from influent import loading
from influent.errors import DataError, SpecError
from influent.features import load_lm
from influent.imitating import divergence, imitate
from influent.task import CausalLM

TEXTS = [{"text": f"{prompt} {answer}, {i}."} for i in range(6) for _, prompt, answer in FACTS]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("imitate")
    make_model(folder / "large", width=32)
    make_model(folder / "small", kind="gpt2", width=8, seed=3)
    return str(folder / "small"), str(folder / "large")


def test_the_divergence_is_the_mean_over_target_tokens(models):
    (small, tokenizer), (large, _) = (loading.load(path, dtype="float32", device="cpu") for path in models)
    task = CausalLM(tokenizer, max_length=64)
    rows = [*TEXTS[:3], {"prompt": "The river of", "completion": " Chad is long"}]
    parts = [part for row in rows for part in task.parts(row)]
    terms = []
    for row in rows:
        (part,) = task.parts(row)
        ids, wanted, _ = part.inputs
        p, q = (m.double()(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1).detach() for m in (large, small))
        terms += [(p[t - 1].exp() * (p[t - 1] - q[t - 1])).sum() for t in range(1, len(ids)) if wanted[t]]
    expected = float(torch.stack(terms).mean())
    assert divergence(small.float(), large.float(), task, parts, batch=2) == pytest.approx(expected, rel=1e-5)


def test_it_comes_closer_on_texts_left_out_and_is_a_model_like_any(models, tmp_path: Path):
    small, large = models
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in TEXTS))
    how = {"epochs": 4, "batch": 8, "device": "cpu"}
    found = imitate(small, large, str(tmp_path / "texts.jsonl"), out=str(tmp_path / "a"), **how)
    assert found["after"] < 0.7 * found["before"]
    assert (found["parts"], found["steps"]) == (46, 24)
    again = imitate(small, large, TEXTS, out=str(tmp_path / "b"), **how)
    assert again["after"] == pytest.approx(found["after"])
    assert load_lm(str(tmp_path / "a"), token_budget=64, device="cpu")(TEXTS[:2])[0].shape[0] == 2


def test_vocabularies_may_be_filled_up_to_other_widths(models, tmp_path: Path, monkeypatch):
    small, large = models
    wide, tokenizer = loading.load(small, dtype="float32", device="cpu")
    wide.resize_token_embeddings(416)
    wide.save_pretrained(tmp_path / "wide")
    tokenizer.save_pretrained(tmp_path / "wide")
    found = imitate(str(tmp_path / "wide"), large, TEXTS, out=str(tmp_path / "a"), batch=8, device="cpu")
    assert found["after"] < found["before"]
    monkeypatch.setattr("influent.imitating.PIECE", 1)  # a part at a time
    again = imitate(str(tmp_path / "wide"), large, TEXTS, out=str(tmp_path / "b"), batch=8, device="cpu")
    assert again["after"] == pytest.approx(found["after"], rel=1e-4)


def test_what_cannot_be_imitated_is_refused(models, tmp_path: Path):
    small, large = models
    with pytest.raises(SpecError, match="is there already"):
        imitate(small, large, TEXTS, out=str(tmp_path))
    with pytest.raises(SpecError, match="batch is 0"):
        imitate(small, large, TEXTS, out=str(tmp_path / "c"), batch=0)
    with pytest.raises(DataError, match="too few"):
        imitate(small, large, TEXTS[:1], out=str(tmp_path / "c"), device="cpu")
    other = make_model(tmp_path / "other", width=8)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = {token: (i + 7) % 400 for token, i in tokenizer["model"]["vocab"].items()}
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(SpecError, match="different tokenizers"):
        imitate(str(other), large, TEXTS, out=str(tmp_path / "c"), device="cpu")

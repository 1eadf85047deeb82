"""How a student comes about: killed and begun again, labelled without stored rows, seen by a sentence encoder."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_student import ROWS, distill, here  # noqa: F401  (a fixture)

import influent
from influent.features import load_encoder
from influent.storage import Store
from influent.student import open_student, read_labels

KILLED = """
import os, signal, sys
import influent
from influent import ladder

ladder.BATCH = 16

def progress(stage, done, total):
    if stage == "features: lm" and done >= 64:
        os.kill(os.getpid(), signal.SIGKILL)

here, out = sys.argv[1:]
influent.distill(f"{here}/index", target=f"{here}/target.jsonl", student=f"{here}/small", out=out, progress=progress)
"""


def test_killed_half_way_it_goes_on_with_its_labels_and_features(here, tmp_path, monkeypatch):  # noqa: F811
    out = str(tmp_path / "s")
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(here), out], capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    kept = [name for name in Store(out).names("making/") if name.endswith(".safetensors")]
    assert len([name for name in kept if "/labels-" in name]) == 1
    assert len([name for name in kept if "/features-" in name]) == 3  # the fourth was not written yet
    stages = []
    monkeypatch.setattr("influent.ladder.BATCH", 16)
    made = distill(here, out, progress=lambda stage, done, total: stages.append((stage, done)))
    assert [done for stage, done in stages if stage == "features: lm"] == [64, 80, 96, 112, 120]
    names = [stage for stage, _ in stages]
    assert not {"query", "score"} & set(names[: names.index("features: lm")])  # the labels were there
    whole = json.loads((here / "made.json").read_text())
    assert made["digest"] == whole["digest"]
    assert made["fidelity"] == whole["fidelity"]
    head = "shards/head.safetensors"
    assert Store(out).get(head) == Store(str(here / "student")).get(head)
    assert not Store(out).names("making/")


def test_labels_need_no_stored_rows(here, tmp_path, monkeypatch):  # noqa: F811
    """Where none are kept, the owner's model is passed over the labelled rows alone."""
    data, target = str(here / "sample.jsonl"), str(here / "target.jsonl")
    for name, rows in (("stored", "float32"), ("live", "none")):
        influent.index(
            str(here / "large"), data, str(tmp_path / name), method="linfik", compress="id", rows=rows
        )  # fmt: skip
    monkeypatch.setattr("influent.distilling.LIVE", 25)
    monkeypatch.setattr("influent.score.WINDOW_SCORES", 16 * 7)  # rows made anew come in windows as well
    found = {}
    for name in ("stored", "live"):
        options = {"target": target, "student": str(here / "small"), "rung": "tfidf", "labels": 60}
        made = influent.distill(str(tmp_path / name), out=str(tmp_path / f"{name}-student"), **options)
        found[name] = read_labels(Store(str(tmp_path / f"{name}-student")), made["digest"])
        values = str(tmp_path / f"{name}.npy")
        influent.value(str(tmp_path / name), target=target, values=values, draws=100)
    assert found["live"].hashes == found["stored"].hashes
    assert np.allclose(found["live"].values, found["stored"].values, rtol=1e-4, atol=1e-5)
    assert np.allclose(np.load(tmp_path / "live.npy"), np.load(tmp_path / "stored.npy"), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def encoder(here, tmp_path_factory) -> Path:  # noqa: F811
    """A bidirectional encoder, as sentence encoders are."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    folder = tmp_path_factory.mktemp("encoder")
    AutoTokenizer.from_pretrained(here / "small").save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=400, max_position_embeddings=32, **sizes)).save_pretrained(folder)
    return folder


def test_an_encoders_features_are_its_mean_states(encoder):
    made = load_encoder(str(encoder), token_budget=64, device="cpu")
    x, tokens = made(ROWS)
    assert made.max_length == 32
    for row, got, count in zip(ROWS, x, tokens, strict=True):
        text = row.get("text") or row["prompt"] + row["completion"]
        ids = made.tokenizer(text)["input_ids"][:32]
        with torch.no_grad():
            states = made.model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        assert count == len(ids)
        assert np.allclose(got, states.mean(0), rtol=1e-4, atol=1e-5)


def test_an_encoders_student_is_a_ridge_on_them(here, encoder, tmp_path):  # noqa: F811
    made = distill(here, str(tmp_path / "s"), rung="encoder", encoder=str(encoder), labels=60, embed_model=True)
    student = open_student(str(tmp_path / "s"), token_budget=64)
    assert student.features.facts["kind"] == made["rung"] == "encoder"
    x, _ = load_encoder(str(encoder), token_budget=4096, device="cpu")(ROWS)
    assert np.allclose(student(ROWS)[0], student.head(x), atol=1e-6)
    assert influent.verify(str(tmp_path / "s"))["ok"]

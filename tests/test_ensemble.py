"""Several checkpoints as one index: scores are the weighted sum of the members', resumable, verifiable, refusable."""

import json
from pathlib import Path
from typing import Any

import format_checker
import jsonschema
import numpy as np
import pytest
import torch
from tiny_model import make_data, make_model
from torch import nn

import influent
from influent import task as tasks
from influent.cli import run
from influent.ensemble import Ensemble
from influent.errors import CorruptError, FormatError, MismatchError, SpecError

TASK = influent.Classification()
SCHEMAS = Path(__file__).parent.parent / "docs" / "schemas"


def make_net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


NETS = [make_net(seed) for seed in range(3)]
POINTS = torch.randn(30, 4, generator=torch.Generator().manual_seed(9))
DATA = [(x, i % 3) for i, x in enumerate(POINTS)]
TRAIN, ASKED = DATA[:24], DATA[24:]


def index(out: Path, **options: Any) -> dict[str, Any]:
    settings = {"compress": "id", "checkpoints": NETS[1:], "shard_rows": 10} | options
    return influent.index(NETS[0], TRAIN, str(out), task=TASK, **settings)


def scores_of(out: Path, model: Any = NETS, **options: Any) -> np.ndarray:
    path = str(out) + ".npy"
    influent.query(str(out), queries=ASKED, model=model, task=TASK, scores=path, **options)
    return np.load(path)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ensemble of three, and an index of each checkpoint alone."""
    folder = tmp_path_factory.mktemp("ensemble")
    index(folder / "all")
    for i, net in enumerate(NETS):
        influent.index(net, TRAIN, str(folder / f"{i}"), compress="id", task=TASK, shard_rows=7 + i)
    return folder


@pytest.mark.parametrize("options", [{}, {"curvature": "identity"}, {"normalize": "cosine"}, {"normalize": "relatif"}])
def test_scores_are_the_mean_over_the_checkpoints(here, options):
    each = [scores_of(here / f"{i}", net, **options) for i, net in enumerate(NETS)]
    np.testing.assert_allclose(scores_of(here / "all", **options), np.mean(each, 0), rtol=1e-4, atol=1e-6)


def test_a_checkpoint_may_be_a_state_dict(here, tmp_path):
    states = [net.state_dict() for net in NETS[1:]]
    made = index(tmp_path / "ix", checkpoints=states)
    assert made["digest"] == influent.info(str(here / "all"))["digest"]
    np.testing.assert_array_equal(scores_of(tmp_path / "ix", [NETS[0], *states]), scores_of(here / "all"))
    with pytest.raises(SpecError, match="checkpoint 1: its weights are not those of the module"):
        index(tmp_path / "other", checkpoints=[nn.Linear(2, 2).state_dict()])


def test_rates_weigh_the_checkpoints_of_a_method_that_has_them(here, tmp_path, monkeypatch):
    rated = influent.METHODS["graddot"].__class__("loss", lambda side: "id", "identity", members="rates")
    monkeypatch.setitem(influent.METHODS, "rated", rated)
    index(tmp_path / "ix", method="rated", rates=[0.1, 0.02, 3.0])
    each = [scores_of(here / f"{i}", net, curvature="identity") for i, net in enumerate(NETS)]
    expected = 0.1 * each[0] + 0.02 * each[1] + 3.0 * each[2]
    np.testing.assert_allclose(scores_of(tmp_path / "ix"), expected, rtol=1e-4, atol=1e-6)
    for wrong in ([1.0], [1.0, 2.0, 0.0], [1.0, 2.0, float("nan")]):
        with pytest.raises(SpecError, match="rates: expected 3 numbers above 0"):
            index(tmp_path / "wrong", method="rated", rates=wrong)
    with pytest.raises(SpecError, match="not for factgrass"):
        index(tmp_path / "wrong", rates=[1.0, 1.0, 1.0])


def test_a_stranger_reads_an_ensemble(here):
    format_checker.check(here / "all")
    schema = json.loads((SCHEMAS.parent / "format.schema.json").read_text())
    head = json.loads((here / "all" / "spec.json").read_bytes())
    jsonschema.validate(head, {"$ref": "#/$defs/ensemble_spec", "$defs": schema["$defs"]})
    manifest = json.loads((here / "all" / "manifest.json").read_bytes())
    jsonschema.validate(manifest, {"$ref": "#/$defs/manifest", "$defs": schema["$defs"]})


def test_documents_of_an_ensemble(here):
    fitted = influent.fit(str(here / "all"), damping="relative:0.5")
    assert [key for key in fitted["health"] if key.endswith("/0")] == ["000/0", "001/0", "002/0"]
    found = influent.info(str(here / "all"))
    jsonschema.validate(found, json.loads((SCHEMAS / "info.json").read_text()))
    assert (found["members"], found["weights"], found["rows"]) == (3, [1 / 3] * 3, 24)
    assert found["bytes"] == sum(each["bytes"] for each in found["each"])
    document = influent.query(str(here / "all"), queries=ASKED, model=NETS, task=TASK, damping="relative:0.5")
    jsonschema.validate(document, json.loads((SCHEMAS / "query.json").read_text()))
    assert document["method"]["members"] == 3 and len(document["method"]["health"]) == 6
    own = [influent.self_influence(str(here / f"{i}"), k=24)["rows"] for i in range(3)]
    mean = sum(torch.tensor([row["score"] for row in sorted(each, key=lambda row: row["row"])]) for each in own) / 3
    found = influent.self_influence(str(here / "all"), k=24)["rows"]
    torch.testing.assert_close(torch.tensor([row["score"] for row in found]), mean.sort(descending=True).values)


def test_a_killed_ensemble_resumes_where_it_was(here, tmp_path, monkeypatch):
    calls = []

    def kill(stage: str, done: int, total: int) -> None:
        calls.append(done)
        if len(calls) == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        index(tmp_path / "ix", progress=kill, token_budget=6)
    with pytest.raises(FormatError, match="not finished: run the same command again"):
        Ensemble.open(tmp_path / "ix")
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "ix").glob("members/*/shards/*")}
    assert len({path.parts[-3] for path in done}) > 1
    forwards, original = [], tasks.Classification.loss
    monkeypatch.setattr(tasks.Classification, "loss", lambda *a: forwards.append(1) or original(*a))
    made = index(tmp_path / "ix", token_budget=6)
    assert {path: path.stat().st_mtime_ns for path in done} == done
    batches = {"000000": 2, "000001": 2, "000002": 1}  # of ten, ten and four rows
    kept = sum(batches[path.stem] for path in done if path.suffix == ".json")
    assert len(forwards) == 3 * 5 - kept
    assert made["digest"] == influent.info(str(here / "all"))["digest"]
    forwards.clear()
    index(tmp_path / "ix")
    assert not forwards


def test_verify_looks_into_every_member(here, tmp_path):
    index(tmp_path / "ix")
    influent.fit(str(tmp_path / "ix"))
    assert influent.verify(str(tmp_path / "ix")) == {"ok": True, "errors": []}
    shard = tmp_path / "ix" / "members" / "002" / "shards" / "000001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4] + b"\0\0\0\1")
    found = influent.verify(str(tmp_path / "ix"))
    assert not found["ok"] and "members/002" in found["errors"][0]
    manifest = tmp_path / "ix" / "members" / "001" / "manifest.json"
    manifest.write_bytes((tmp_path / "ix" / "members" / "000" / "manifest.json").read_bytes())
    assert any("members/001" in line for line in influent.verify(str(tmp_path / "ix"))["errors"])


def test_a_member_that_was_replaced_is_refused(here, tmp_path):
    index(tmp_path / "ix")
    first, second = (tmp_path / "ix" / "members" / name for name in ("000", "001"))
    second.rename(tmp_path / "away")
    first.rename(second)
    (tmp_path / "away").rename(first)
    with pytest.raises(CorruptError, match="members/000: its digest is .* but the ensemble has"):
        Ensemble.open(tmp_path / "ix")


def test_what_does_not_fit_is_refused(here, tmp_path):
    with pytest.raises(FormatError, match="holds one index, not an ensemble"):
        index(here / "0")
    with pytest.raises(FormatError, match="holds an ensemble of checkpoints, not one index"):
        index(here / "all", checkpoints=None)
    with pytest.raises(MismatchError, match="members"):
        index(here / "all", checkpoints=NETS[1:2])
    with pytest.raises(MismatchError, match="fingerprint"):
        index(here / "all", checkpoints=[NETS[2], NETS[1]])
    with pytest.raises(SpecError, match="nothing can be appended"):
        influent.append(str(here / "all"), ASKED, model=NETS[0], task=TASK)
    with pytest.raises(SpecError, match="expected 3 models, one a checkpoint, got 1"):
        scores_of(here / "all", NETS[0])
    with pytest.raises(MismatchError, match="another model"):
        scores_of(here / "all", [NETS[0], NETS[2], NETS[1]])
    with pytest.raises(SpecError, match="built from a model in memory"):
        scores_of(here / "all", None)
    assert influent.verify(str(here / "all"))["ok"]


def test_the_command_line_makes_and_asks_an_ensemble(tmp_path, capsys):
    make_data(tmp_path / "data.jsonl")
    models = [str(make_model(tmp_path / f"model-{seed}", seed=seed)) for seed in range(2)]
    out = str(tmp_path / "ix")
    begin = ["index", models[0], str(tmp_path / "data.jsonl"), "-o", out, "--compress", "mask:8x8 | sjlt:32", "--json"]
    assert run([*begin, "--checkpoint", models[1]]) == 0
    assert json.loads(capsys.readouterr().out)["members"] == 2
    ask = ["query", out, "--prompt", "The capital of Peru is", "--completion", " Lima", "-k", "2"]
    assert run([*ask, "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert run([*ask, "--json", "--model", models[0], "--model", models[1]]) == 0
    assert json.loads(capsys.readouterr().out)["queries"] == first["queries"]
    assert run(["info", out]) == 0
    assert "2, an index each" in capsys.readouterr().out
    for arguments, message in [
        ([*ask, "--model", models[0]], "expected --model 2 times"),
        (begin, "holds an ensemble of checkpoints, not one index"),
        ([*begin, "--checkpoint", models[1], "--rate", "1", "--rate", "2"], "rates are for a method that"),
        ([*begin, "--checkpoint", models[1], "--seed", "3"], "seed: expected 0"),
        ([*begin, "--checkpoint", str(tmp_path / "none")], "no such model"),
    ]:
        assert run(arguments) == 2
        assert message in capsys.readouterr().err

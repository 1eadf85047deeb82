"""Retraining against closed forms: linear regression, whose leave-one-out is known and whose optimum is exact."""

from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import leave_one_out, leave_one_out_by_hat_matrix

from influent import judging, rerun
from influent.artifact import Artifact
from influent.errors import CorruptError, DataError, FormatError, MismatchError, NumericsError, SpecError
from influent.rerun import Plan, Reruns, halves
from influent.storage import Store
from influent.truth import Outcome, Truth

N, P, Q = 24, 3, 5
rng = np.random.default_rng(0)
X, ASKED = rng.normal(size=(N, P)), rng.normal(size=(Q, P))
Y = X @ rng.normal(size=P) + 0.5 * rng.normal(size=N)


class Regression:
    """Least squares; a query's loss is minus its prediction, so that gains are linear in what the rows say."""

    def __init__(self, stop_after: int | None = None):
        self.calls, self.stop_after = [], stop_after

    def __call__(self, rows, seed):
        if self.stop_after is not None and len(self.calls) >= self.stop_after:
            raise KeyboardInterrupt
        self.calls.append((tuple(rows), seed))
        return -ASKED @ np.linalg.lstsq(X[rows], Y[rows], rcond=None)[0]

    def describe(self):
        return {"kind": "least squares"}


def open_truth(path, **known) -> Truth:
    wanted = {"rows": N, "queries": Q, "data": None, "asked": None, "trainer": {"kind": "least squares"}} | known
    return Truth.open(str(path), wanted)


def influence() -> np.ndarray:
    """Exact leave-one-out of each query's gain, [Q, N]."""
    return leave_one_out_by_hat_matrix(*(torch.from_numpy(a) for a in (X, Y, ASKED))).numpy()


def test_leave_one_out_is_the_closed_form(tmp_path):
    reruns = Reruns(open_truth(tmp_path), Regression())
    groups = [np.array([i]) for i in range(N)]
    expected = leave_one_out(*(torch.from_numpy(a) for a in (X, Y, ASKED))).numpy()
    assert np.allclose(expected, influence())
    found = judging.leave_out({"exact": expected, "minus": -expected}, reruns, np.arange(Q), groups, "row")
    exact, minus = found["methods"]["exact"], found["methods"]["minus"]
    assert exact["mean"] == exact["low"] == pytest.approx(1) and exact["pearson"] == pytest.approx(1)
    assert minus["mean"] == pytest.approx(-1)
    assert found["left_out"] == N and len(exact["each"]) == Q


def test_the_truth_of_linear_outcomes_gives_an_lds_of_one(tmp_path):
    scores = rng.normal(size=(Q, N))

    def train(rows, seed):
        return -scores[:, rows].sum(1), np.full(Q, len(rows))

    truth = open_truth(tmp_path)
    outcomes = judging.subset_outcomes(Reruns(truth, train), 20)
    found = judging.lds({"right": scores, "wrong": -scores, "none": np.ones((Q, N))}, outcomes, np.arange(Q))
    assert found["methods"]["right"]["mean"] == pytest.approx(1)
    assert found["methods"]["right"]["low"] == pytest.approx(1)
    assert found["methods"]["wrong"]["mean"] == pytest.approx(-1)
    assert found["methods"]["none"]["mean"] == 0
    assert found["methods"]["right"]["ahead"] is None
    assert found["methods"]["wrong"]["ahead"] == pytest.approx({"mean": -2, "low": -2, "high": -2})
    assert (found["subsets"], found["seeds"], found["reliability"]) == (20, 1, None)
    assert {len(rows) for rows in (plan.rows.nonzero()[0] for plan in halves(N, 20))} == {N // 2}
    assert truth.of_role("subset")[3].outcome.said.tolist() == [N // 2] * Q


def test_influence_foretells_halves_of_a_regression(tmp_path):
    """Not exactly: halves are far from a small change. The sign and most of the order are right."""
    outcomes = judging.subset_outcomes(Reruns(open_truth(tmp_path), Regression()), 40)
    found = judging.lds({"influence": influence(), "random": rng.normal(size=(Q, N))}, outcomes, np.arange(Q))
    assert found["methods"]["influence"]["mean"] > 0.6
    assert abs(found["methods"]["random"]["mean"]) < 0.3


def test_seeds_are_averaged_and_told_apart(tmp_path):
    scores = rng.normal(size=(Q, N))

    def train(rows, seed):
        noise = np.random.default_rng([seed, *rows]).normal(size=Q)
        return -scores[:, rows].sum(1) + 2 * noise

    outcomes = judging.subset_outcomes(Reruns(open_truth(tmp_path), train, seeds=range(3)), 16)
    found = judging.lds({"right": scores}, outcomes, np.arange(Q))["methods"]["right"]
    assert outcomes.gain.shape == (3, 16, Q)
    assert found["one_training"]["mean"] < found["mean"]
    assert found["one_training"]["low"] <= found["one_training"]["mean"] <= found["one_training"]["high"]


def test_the_ceiling_is_what_a_perfect_forecast_has():
    """Outcomes are the expected ones plus noise of the same size: reliability 1/2, of four seeds' mean 4/5."""
    noise = np.random.default_rng(1).normal(size=(4, 400, 20))
    expected = np.random.default_rng(2).normal(size=(400, 20))
    used = np.eye(400, dtype=bool)
    found = judging.lds({"perfect": expected.T}, judging.Halves(used, expected + noise), np.arange(20))
    assert found["reliability"] == pytest.approx(0.5, abs=0.03)
    assert found["ceiling"] == pytest.approx(0.8**0.5, abs=0.02)
    assert found["methods"]["perfect"]["mean"] == pytest.approx(found["ceiling"], abs=0.02)
    assert found["methods"]["perfect"]["one_training"]["mean"] == pytest.approx(0.5**0.5, abs=0.03)


def test_killed_after_each_put_it_goes_on(tmp_path):
    done = 0
    for stop in range(1, 7):
        trainer = Regression(stop_after=1)
        try:
            outcomes = judging.subset_outcomes(Reruns(open_truth(tmp_path / "killed"), trainer), 6)
        except KeyboardInterrupt:
            outcomes = None
        done += len(trainer.calls)
        assert done == stop
    assert outcomes is not None
    whole = judging.subset_outcomes(Reruns(open_truth(tmp_path / "whole"), Regression()), 6)
    assert np.array_equal(outcomes.gain, whole.gain) and np.array_equal(outcomes.used, whole.used)
    names = [sorted(Store(str(tmp_path / place)).names()) for place in ("killed", "whole")]
    assert names[0] == names[1]
    for name in names[0]:
        if name.endswith(".safetensors"):
            assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert Artifact.open(Store(str(tmp_path / "killed")), "truth").verify() == []


def test_a_truth_grows_and_is_shared(tmp_path):
    first = Regression()
    judging.subset_outcomes(Reruns(open_truth(tmp_path), first), 4)
    more = Regression(stop_after=2)
    with pytest.raises(KeyboardInterrupt):
        judging.subset_outcomes(Reruns(open_truth(tmp_path), more), 7)
    assert not (tmp_path / "manifest.json").exists()
    last = Regression()
    judging.subset_outcomes(Reruns(open_truth(tmp_path), last), 7)
    assert [len(t.calls) for t in (first, more, last)] == [4, 2, 1]
    read = judging.subset_outcomes(Reruns(open_truth(tmp_path, trainer=None), None), None)
    assert read.used.shape == (7, N)
    # a training that something else has had done is not done again
    again = Regression()
    Reruns(open_truth(tmp_path), again).run([Plan("other", 0, halves(N, 1)[0].rows)])
    assert again.calls == []
    # by default all that are stored, with a trainer no fewer than fifty
    assert judging.subset_outcomes(Reruns(open_truth(tmp_path, trainer=None), None), 5).used.shape == (5, N)


def test_an_unfinished_truth_is_read_as_far_as_it_goes(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        judging.subset_outcomes(Reruns(open_truth(tmp_path), Regression(stop_after=7), seeds=range(2)), 5)
    read = judging.subset_outcomes(Reruns(open_truth(tmp_path, trainer=None), None), None)
    assert read.gain.shape == (1, 5, Q)  # the second seed has seen two of the five


def test_brittleness_finds_the_rows_that_hold_an_answer(tmp_path):
    scores = np.abs(rng.normal(size=(Q, N)))

    def train(rows, seed):
        gain = scores[:, rows].sum(1)
        return -gain, gain > scores.sum(1) - 2.5

    queries = np.array([0, 3])
    named = {"right": scores, "wrong": -scores, "random": rng.normal(size=(Q, N))}
    found = judging.brittleness(named, Reruns(open_truth(tmp_path), train), queries, [1, 4])
    right, wrong, chance = (found["methods"][name] for name in ("right", "wrong", "random"))
    top = -np.sort(-scores[queries], axis=1)
    assert right["rise"] == pytest.approx([top[:, 0].mean(), top[:, :4].sum(1).mean()])
    assert right["mean"] > chance["mean"] > wrong["mean"] > 0
    assert right["flips"][1] == 1 and wrong["flips"][1] == 0


def test_curves_of_right_scores_enclose_those_of_wrong_ones(tmp_path):
    values = np.arange(N) / N
    scores = np.tile(values, (Q, 1))

    def train(rows, seed):
        return np.full(Q, -values[rows].mean())

    named = {"right": scores, "wrong": -scores, "random": rng.normal(size=(Q, N))}
    reruns, shares = Reruns(open_truth(tmp_path), train), [0.25, 0.5]
    kept = judging.curve(named, reruns, np.arange(Q), shares, keep=True, seed=0)
    assert kept["methods"]["right"]["loss"] == pytest.approx([-values[-6:].mean(), -values[-12:].mean()])
    assert kept["methods"]["right"]["bottom"] == pytest.approx(kept["methods"]["wrong"]["loss"])
    assert kept["methods"]["right"]["mean"] > 0 > kept["methods"]["wrong"]["mean"]
    assert kept["methods"]["random"]["mean"] == 0
    assert sorted(kept["chosen_by"] + kept["measured"]) == list(range(Q))
    removed = judging.curve(named, reruns, np.arange(Q), shares, keep=False, seed=0)
    assert removed["methods"]["right"]["loss"] == pytest.approx([-values[:18].mean(), -values[:12].mean()])
    assert removed["methods"]["right"]["mean"] > 0 > removed["methods"]["wrong"]["mean"]


def test_planted_mislabels_are_found():
    flags = np.arange(40) % 8 == 0
    named = {"right": flags + 0.01 * rng.random(40), "constant": np.ones(40)}
    found = judging.detection(named, flags)
    assert found["methods"]["right"]["mean"] == found["methods"]["right"]["recall"]["mean"] == 1
    assert found["methods"]["constant"]["auc"] == {"mean": 0.5, "low": 0.5, "high": 0.5}
    assert (found["flagged"], found["k"]) == (5, 5)


def test_what_does_not_fit_is_refused_in_words(tmp_path):
    with pytest.raises(FormatError, match="no ground truth there: give --train or --base"):
        open_truth(tmp_path / "none", trainer=None)
    truth = open_truth(tmp_path / "a")
    Reruns(truth, Regression()).run(halves(N, 2))
    with pytest.raises(MismatchError, match="of 24 rows, but here are 25"):
        open_truth(tmp_path / "a", rows=25)
    with pytest.raises(MismatchError, match="trainer.kind"):
        open_truth(tmp_path / "a", trainer={"kind": "other"})
    with pytest.raises(FormatError, match=r"1 of 1 retrainings \(all\) are not there"):
        Reruns(open_truth(tmp_path / "a", trainer=None), None).run([rerun.everything(N)])
    with pytest.raises(FormatError, match="holds 2 retrained subsets, expected 3 or more"):
        judging.subset_outcomes(Reruns(open_truth(tmp_path / "a", trainer=None), None), 3)
    with pytest.raises(DataError, match="no row is left"):
        Reruns(truth, Regression()).run([Plan("none", 0, np.zeros(N, bool))])
    assert Outcome.of((0.5, 1.5), 2, "train").loss.tolist() == [0.5, 1.5]
    assert Outcome.of((torch.ones(2), [3, 4]), 2, "train").said.tolist() == [3, 4]
    for returned, error, words in (
        (np.zeros(Q - 1), DataError, "expected one loss for each of the 5 queries, got ndarray of shape"),
        ("text", DataError, "expected one loss"),
        ((np.zeros(Q), [1]), DataError, "expected one answer"),
        (np.full(Q, np.nan), NumericsError, "the loss of query 0 is nan"),
    ):
        with pytest.raises(error, match=words):
            Outcome.of(returned, Q, "train")
    path = next((tmp_path / "a" / "shards").glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(CorruptError, match="shards"):
        open_truth(tmp_path / "a")


def test_a_trainer_is_named_by_file_or_module(tmp_path, monkeypatch):
    (tmp_path / "my_training.py").write_text("def train(rows, seed):\n    return [float(len(rows))] * 5\n")
    monkeypatch.chdir(tmp_path)
    for text in ("my_training.py:train", "my_training:train", str(tmp_path / "my_training.py") + ":train"):
        found, facts = rerun.load_trainer(text)
        assert found(np.arange(3), 0) == [3.0] * 5
        assert facts["name"] == "my_training:train" and facts["source"].startswith("blake2b-256:")
    for text, words in (
        ("train", "expected module:function or file.py:function"),
        ("nowhere.py:train", "no such file"),
        ("no_such_module:train", "there is no module 'no_such_module'"),
        ("my_training.py:other", "has no function 'other'"),
    ):
        with pytest.raises(SpecError, match=words):
            rerun.load_trainer(text)
    assert rerun.identify(Regression()) == {"kind": "least squares"}
    assert rerun.identify(rerun.best)["name"] == "influent.rerun:best"
    assert Path(tmp_path / "my_training.py").exists()

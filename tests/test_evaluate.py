"""`influent evaluate` on a tiny model: every metric from one command, what it writes, what it resumes and refuses."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from jsonschema import Draft202012Validator
from tiny_model import make_data, make_model
from torch.nn import functional

import influent
from influent import judging
from influent.cli import run
from influent.errors import DataError, MismatchError, NumericsError, SpecError
from influent.finetune import FineTune, Recipe
from influent.rng import Stream
from influent.truth import Truth

SCHEMA = json.loads((Path(__file__).parent.parent / "docs" / "schemas" / "evaluate.json").read_text())
QUERIES = [
    {"prompt": "The money of Japan is called", "completion": " yen."},
    {"prompt": "The capital of Peru is", "completion": " Lima."},
    {"text": "The river of Iraq is the Tigris."},
    {"prompt": "The money of Cuba is called", "completion": " peso."},
]
N = 16


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its data, queries, an index and a training function that counts its calls."""
    folder = tmp_path_factory.mktemp("evaluate")
    make_model(folder / "model")
    make_data(folder / "data.jsonl")
    (folder / "queries.jsonl").write_text("".join(json.dumps(query) + "\n" for query in QUERIES))
    influent.index(str(folder / "model"), str(folder / "data.jsonl"), str(folder / "index"), compress="sjlt:16")
    (folder / "training.py").write_text(
        "import os, numpy as np\n"
        "W = np.random.default_rng(0).normal(size=(4, 16))\n"
        "def train(rows, seed):\n"
        "    with open('calls', 'a') as file: file.write(f'{len(rows)}\\n')\n"
        "    if os.environ.get('STOP') == str(sum(1 for _ in open('calls'))): raise KeyboardInterrupt\n"
        "    return -W[:, rows].sum(1)\n"
    )
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for path in made.iterdir():
        (tmp_path / path.name).symlink_to(path)
    np.save(tmp_path / "right.npy", np.random.default_rng(0).normal(size=(4, N)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert run(["evaluate", *arguments, "--json"]) == 0, capsys.readouterr().err
    document = json.loads(capsys.readouterr().out)
    Draft202012Validator(SCHEMA).validate(document)
    return document


def test_a_language_model_is_retrained_and_patched(here, capsys):
    options = ["index", "--queries", "queries.jsonl", "--truth", "truth", "--base", "model", "--epochs", "1", "--rate",
               "1e-2", "--scores", "other=right.npy"]  # fmt: skip
    document = printed(
        capsys, *options, "--metric", "lds,loo,tail-patch", "--subsets", "2", "--seeds", "2", "--left-out", "2",
        "-k", "1", "--plot", "plots.png",
    )  # fmt: skip
    for metric in ("lds", "loo", "tail-patch"):
        assert list(document[metric]["methods"]) == ["factgrass", "other", "bm25", "random"], metric
    assert document["lds"]["mean"] == document["lds"]["methods"]["factgrass"]["mean"]
    assert (document["lds"]["subsets"], document["lds"]["seeds"], document["rows"]) == (2, 2, N)
    assert Path("plots.png").read_bytes().startswith(b"\x89PNG")
    # everything is there: no training is done again, and the same comes out
    before = {path: path.stat().st_mtime_ns for path in Path("truth").rglob("*") if path.is_file()}
    again = influent.evaluate(
        "index", queries="queries.jsonl", truth="truth", metric="lds,tail-patch", base="model", epochs=1, rate=1e-2,
        subsets=2, k=1, scores={"other": np.load("right.npy")},
    )  # fmt: skip
    assert again["lds"] == document["lds"] and again["tail-patch"] == document["tail-patch"]
    assert before == {path: path.stat().st_mtime_ns for path in Path("truth").rglob("*") if path.is_file()}


def test_every_other_metric_and_the_pages(here, capsys):
    options = ["--queries", "queries.jsonl", "--truth", "truth", "--train", "training.py:train", "--data", "data.jsonl",
               "--metric", "lds,brittleness,selection,removal,mislabel", "--flags", "provider=facts",
               "--remove", "2,4", "--probes", "2", "--shares", "0.25,0.5", "--scores", "right.npy",
               "--subsets", "4", "--html", "page.html"]  # fmt: skip
    document = printed(capsys, *options)
    for metric in ("brittleness", "selection", "removal"):
        assert list(document[metric]["methods"]) == ["right", "bm25", "random"], metric
    assert document["brittleness"]["mean"] > document["brittleness"]["methods"]["random"]["mean"]
    assert document["mislabel"]["flagged"] == 8
    page = Path("page.html").read_text()
    assert "data:image/png;base64," in page and "Brittleness" in page and "http" not in page
    assert run(["evaluate", *options[:-2]]) == 0
    shown = capsys.readouterr().out
    assert "Linear datamodelling score" in shown and "bm25" in shown and "8 of 16 rows are bad" in shown


def test_any_matrix_and_any_training_function(here, capsys):
    document = printed(
        capsys, "--scores", "right=right.npy", "--scores", "right.npy=right.npy", "--truth", "truth", "--train",
        "training.py:train", "--metric", "lds,loo", "--subsets", "8",
    )  # fmt: skip
    assert document["lds"]["name"] == "right" and document["lds"]["mean"] == pytest.approx(1)
    assert document["loo"]["mean"] == pytest.approx(1)
    assert document["queries"] == 4 and document["index"] is None
    # without the function, what is stored is judged
    assert printed(capsys, "--scores", "right=right.npy", "--truth", "truth")["lds"]["subsets"] == 8


def test_killed_it_goes_on(here, capsys, monkeypatch):
    arguments = ["--scores", "right.npy", "--truth", "truth", "--train", "training.py:train", "--subsets", "5"]
    (here / "calls").unlink(missing_ok=True)
    for stop in (2, 5):
        monkeypatch.setenv("STOP", str(stop))
        assert run(["evaluate", *arguments]) == 130
        assert "the same command again resumes" in capsys.readouterr().err
    monkeypatch.delenv("STOP")
    document = printed(capsys, *arguments)
    assert document["lds"]["subsets"] == 5
    assert Path("calls").read_text().count("\n") == 5 + 2  # the two that were interrupted were begun again


def test_a_grid_is_chosen_on_some_queries_and_reported_on_the_others(here, capsys):
    (here / "index").unlink()
    influent.index("model", "data.jsonl", "index", compress="sjlt:16")
    document = printed(
        capsys, "index", "--queries", "queries.jsonl", "--truth", "truth", "--train", "training.py:train",
        "--subsets", "6", "--damping-grid", "1e-3,0.1,10",
    )  # fmt: skip
    tuned, told = document["damping"]["tuned_on"], document["damping"]
    assert len(tuned) == 1 and sorted(tuned + document["reported"]) == [0, 1, 2, 3]
    assert list(told["lds"]) == ["relative:0.001", "relative:0.1", "relative:10"]
    assert told["lds"][told["chosen"]] == max(told["lds"].values())
    assert len(document["lds"]["methods"]["random"]["each"]) == 3
    assert [fit["name"] for fit in influent.info("index")["curvatures"]] == [f"fim:{told['chosen']}"]
    direct = influent.query("index", queries="queries.jsonl", damping=told["chosen"], scores="own.npy")
    assert direct["method"]["curvature"] == document["method"]["curvature"]
    one = printed(capsys, "--scores", "own.npy", "--truth", "truth")["lds"]["methods"]["own"]["each"]
    assert [one[q] for q in document["reported"]] == pytest.approx(document["lds"]["methods"]["factgrass"]["each"])


def test_bad_rows_by_a_vector_a_matrix_and_a_label(here, capsys):
    flags = np.arange(N) % 4 == 0
    np.save("flags.npy", flags)
    np.save("vector.npy", flags * 2.0)
    np.save("matrix.npy", np.tile(-1.0 * flags, (3, 1)))
    found = printed(
        capsys, "--metric", "mislabel", "--flags", "flags.npy", "--scores", "vector.npy", "--scores", "matrix.npy"
    )["mislabel"]["methods"]
    assert found["vector"]["auc"]["mean"] == found["matrix"]["recall"]["mean"] == 1
    assert list(found) == ["vector", "matrix", "random"]
    own = influent.evaluate("index", metric="mislabel", flags=flags)
    assert list(own["mislabel"]["methods"]) == ["factgrass", "loss", "random"] and own["queries"] == 0


def tuned(folder: Path, *, kind: str = "llama", **recipe) -> FineTune:
    make_model(folder / kind, kind=kind)
    rows = [{"text": f"The capital of Peru is Lima and {word}."} for word in ("yen", "peso", "Chari", "a b c d e")]
    return FineTune.load(str(folder / kind), rows, QUERIES, Recipe(**recipe), device="cpu")


def losses_by_hand(model, trainer: FineTune, records) -> np.ndarray:
    out = []
    for record in records:
        ids, wanted = trainer._task._tokens(record)
        logits = model(input_ids=torch.tensor([ids])).logits[0]
        each = [functional.cross_entropy(logits[t - 1], torch.tensor(ids[t])) for t in range(1, len(ids)) if wanted[t]]
        out.append((torch.stack(each).sum(), len(each)))
    return out


def test_fine_tuning_is_the_loop_one_would_write(tmp_path):
    trainer = tuned(tmp_path, epochs=2, rate=1e-3, batch=2)
    loss, right = trainer(np.array([0, 2, 3]), 5)
    assert loss.shape == right.shape == (4,) and set(right) <= {0, 1}
    trainer.restore()
    model, order = trainer.model, [Stream(5, "", "finetune", f"order/{e}").permutation(3) for e in range(2)]
    adam = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)
    batches = [[0, 2, 3][i] for epoch in order for i in epoch]
    for step, batch in enumerate([batches[:2], batches[2:3], batches[3:5], batches[5:]]):
        adam.param_groups[0]["lr"] = 1e-3 * (1 - step / 4)
        found = losses_by_hand(model, trainer, [trainer.rows[row] for row in batch])
        adam.zero_grad()
        (sum(each for each, _ in found) / sum(n for _, n in found)).backward()
        adam.step()
    with torch.no_grad():
        found = losses_by_hand(model, trainer, QUERIES)
    assert loss == pytest.approx([float(each) / n for each, n in found], rel=1e-4)
    trainer.token_budget = 16
    assert trainer(np.array([0, 2, 3]), 5)[0] == pytest.approx(loss, rel=1e-5)
    assert trainer(np.array([0, 2, 3]), 6)[0] != pytest.approx(loss, rel=1e-6)
    with pytest.raises(SpecError, match="max_length is 600, but the base model reads at most 512"):
        tuned(tmp_path, max_length=600)
    with pytest.raises(SpecError, match="epochs is 0"):
        Recipe(epochs=0)


def test_dropout_follows_the_seed_and_nothing_else(tmp_path):
    trainer = tuned(tmp_path, kind="gpt2", epochs=1, rate=1e-2)
    before = torch.random.get_rng_state()
    first = trainer(np.arange(4), 1)[0]
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(99)
    assert trainer(np.arange(4), 1)[0].tolist() == first.tolist()


def test_a_patch_is_one_step_of_the_rate_against_the_sign(tmp_path):
    from influent.storage import Store
    from influent.tailpatch import tail_patch

    trainer = tuned(tmp_path, rate=1e-3)
    scores = np.array([[0.0, 3, 2, 1]] * 4)
    found = tail_patch({"a": scores}, trainer, Store(str(tmp_path / "p")), {}, np.array([1]), k=2)["methods"]["a"]
    before, gains = trainer.measure()[0][1], []
    for rows in ([1], [2], [1, 2]):
        trainer.restore()
        trainer.model.zero_grad()
        each = losses_by_hand(trainer.model, trainer, [trainer.rows[row] for row in rows])
        (sum(loss for loss, _ in each) / sum(n for _, n in each)).backward()
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                gradient = parameter.grad
                parameter -= 1e-3 * gradient / (gradient.abs() + 1e-8)
            loss, count = losses_by_hand(trainer.model, trainer, [QUERIES[1]])[0]
        gains.append(before - float(loss) / count)
    assert found["mean"] == pytest.approx(np.mean(gains[:2]), rel=1e-3)
    assert found["together"]["mean"] == pytest.approx(gains[2], rel=1e-3)


def test_a_truth_of_ones_own_retrainings_can_be_stored(tmp_path):
    """As docs/evaluate.md shows."""
    truth = Truth.open(str(tmp_path), {"rows": 6, "queries": 2, "trainer": {"kind": "imported"}})
    used = np.random.default_rng(0).random((9, 6)) < 0.5
    scores = np.random.default_rng(1).normal(size=(2, 6))
    for j, rows in enumerate(used):
        truth.add("subset", j, rows, 0, outcome(-scores[:, rows].sum(1)), seconds=0.0)
    truth.close()
    found = influent.evaluate(scores={"a": scores}, truth=str(tmp_path))
    assert found["lds"]["mean"] == pytest.approx(1)
    with pytest.raises(MismatchError, match="of 2 queries, but here are 3"):
        influent.evaluate(scores={"a": np.ones((3, 6))}, truth=str(tmp_path))


def outcome(loss: np.ndarray):
    from influent.truth import Outcome

    return Outcome(loss)


def test_a_module_of_ones_own_and_its_task(tmp_path):
    rng = torch.Generator().manual_seed(0)
    inputs = torch.randn(40, 4, generator=rng)
    labels = (inputs[:, 0] > 0).long()
    rows, asked = [(inputs[i], labels[i]) for i in range(30)], [(inputs[i], labels[i]) for i in range(30, 40)]

    def fit(chosen, seed):
        model = torch.nn.Linear(4, 2)
        torch.nn.init.zeros_(model.weight), torch.nn.init.zeros_(model.bias)
        sgd = torch.optim.SGD(model.parameters(), lr=0.3)
        for _ in range(15):
            sgd.zero_grad()
            functional.cross_entropy(model(inputs[:30][chosen]), labels[:30][chosen]).backward()
            sgd.step()
        return model

    def train(chosen, seed):
        logits = fit(chosen, seed)(inputs[30:])
        return functional.cross_entropy(logits, labels[30:], reduction="none"), logits.argmax(1)

    model, task = fit(np.arange(30), 0), influent.Classification()
    influent.index(model, rows, str(tmp_path / "index"), compress="id", task=task)
    found = influent.evaluate(
        str(tmp_path / "index"), queries=asked, model=model, task=task, truth=str(tmp_path / "truth"), train=train,
        metric="lds,loo,brittleness", subsets=12, remove="5", probes=3, left_out=15,
    )  # fmt: skip
    for metric in ("lds", "loo", "brittleness"):
        assert list(found[metric]["methods"]) == ["factgrass", "random"]
        assert found[metric]["mean"] > found[metric]["methods"]["random"]["mean"]
    assert found["lds"]["mean"] > 0.5 and found["loo"]["mean"] > 0.8
    assert 0 <= found["brittleness"]["methods"]["factgrass"]["flips"][0] <= 1


def test_whole_sources_are_left_out(tmp_path):
    data = [{"text": f"row {i}", "source": "abc"[i % 3]} for i in range(12)]
    scores = np.random.default_rng(0).normal(size=(2, 12))
    found = influent.evaluate(
        scores={"a": scores}, data=data, truth=str(tmp_path), train=lambda rows, seed: -scores[:, rows].sum(1),
        metric="loo", leave="source",
    )  # fmt: skip
    assert (found["loo"]["unit"], found["loo"]["left_out"]) == ("source", 3)
    assert found["loo"]["mean"] == found["loo"]["methods"]["a"]["pearson"] == pytest.approx(1)


def test_plots_need_matplotlib(tmp_path, monkeypatch):
    from influent import evaluating

    monkeypatch.setattr(evaluating, "find_spec", lambda name: None)
    with pytest.raises(SpecError, match=r"--plot needs matplotlib: pip install 'influent\[plots\]'"):
        influent.evaluate(scores={"a": np.ones((2, 3))}, truth=str(tmp_path), plot=str(tmp_path / "a.png"))


MISTAKES = [
    ([], "there is nothing to judge"),
    (["--scores", "a=nowhere.npy", "--truth", "t"], "scores a: nowhere.npy: no such file"),
    (["--scores", "a.npy", "--scores", "a.npy", "--truth", "t"], "expected another name than 'a'"),
    (["--scores", "right.npy"], "lds needs --truth DIR"),
    (["--scores", "right.npy", "--truth", "t", "--metric", "lsd"], "--metric: expected lds, loo, tail-patch"),
    (["--scores", "right.npy", "--truth", "t"], "t: no ground truth there: give --train or --base"),
    (["--scores", "right.npy", "--truth", "t", "--train", "nowhere.py:train"], "nowhere.py: no such file"),
    (["--scores", "right.npy", "--truth", "t", "--train", "a:b", "--base", "model"], "not both"),
    (["--scores", "right.npy", "--truth", "t", "--base", "model"], "--base needs texts"),
    (["--scores", "right.npy", "--metric", "mislabel"], "mislabel needs --flags"),
    (["--scores", "right.npy", "--metric", "mislabel", "--flags", "id=3"], "expected a .npy file, source=NAME"),
    (["--scores", "right.npy", "--metric", "mislabel", "--flags", "right.npy"], "expected one for each of the 16"),
    (["--scores", "right.npy", "--truth", "t", "--damping-grid", "1,2"], "give an INDEX and --metric lds"),
    (["--scores", "right.npy", "--truth", "t", "--shares", "0.5,2"], "--shares: expected numbers between 0 and 1"),
    (["--scores", "right.npy", "--truth", "t", "--remove", "1.5"], "--remove: expected whole numbers"),
    (["--scores", "right.npy", "--truth", "t", "--subsets", "1"], "--subsets is 1, expected 2 or more"),
    (["--scores", "right.npy", "--truth", "t", "--leave", "author"], "--leave: expected row, source or provider"),
    (["--scores", "right.npy", "--truth", "t", "--plot", "a.pdf"], "expected a file name ending in .png"),
    (["--scores", "right.npy", "--truth", "t", "--metric", "tail-patch"], "tail-patch needs texts"),
    (["--scores", "data.jsonl", "--truth", "t"], "not a .npy file of numbers"),
    (["--scores", "narrow.npy", "--scores", "right.npy", "--truth", "t"], "has 16 rows, but scores narrow has 3"),
    (["--scores", "broken.npy", "--truth", "t"], "scores broken: not finite at [1, 2]: nan"),
    (["--scores", "vector.npy", "--truth", "t"], "scores vector: a vector is for mislabel only"),
    (["index", "--truth", "t"], "lds of an index needs --queries FILE"),
    (["index", "--truth", "t", "--queries", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
    (["index", "--truth", "t", "--queries", "empty.jsonl"], "--queries: there is no record with a text in empty.jsonl"),
    (["nowhere", "--truth", "t", "--queries", "queries.jsonl"], "nowhere: no such index"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_a_mistake_is_one_line(here, capsys, arguments, message):
    Path("empty.jsonl").write_text("")
    np.save("narrow.npy", np.zeros((4, 3)))
    np.save("vector.npy", np.zeros(N))
    np.save("broken.npy", np.where(np.arange(12).reshape(3, 4) == 6, np.nan, 1.0))
    before = sorted(str(path) for path in here.iterdir())
    assert run(["evaluate", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("influent: ")
    assert message in err
    assert sorted(str(path) for path in here.iterdir()) == before


def test_mistakes_and_help_import_nothing_heavy(here):
    for arguments in (["evaluate", "--help"], ["evaluate", "index", "--truth", "t"], ["evaluate", "--metric", "x"]):
        script = (
            f"import sys; from influent.cli import run; code = run({arguments!r})\n"
            "sys.exit(str([m for m in ('torch', 'transformers', 'matplotlib', 'pyarrow') if m in sys.modules]))"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert done.stderr.splitlines()[-1] == "[]"


def test_an_ensemble_is_judged_like_an_index(here):
    make_model(here / "second", seed=1)
    influent.index("model", "data.jsonl", "both", compress="sjlt:8", method="graddot", checkpoints=["second"])
    np.save("flags.npy", np.arange(N) < 3)
    found = influent.evaluate(
        "both", queries="queries.jsonl", truth="truth", train=lambda rows, seed: np.cos(rows.sum() + np.arange(4)),
        metric="lds,mislabel", flags="flags.npy", subsets=3,
    )  # fmt: skip
    assert list(found["lds"]["methods"]) == ["graddot", "bm25", "random"]
    assert list(found["mislabel"]["methods"]) == ["graddot", "loss", "random"]


def test_errors_of_the_api(tmp_path):
    with pytest.raises(DataError, match="2 or more of each row"):
        influent.evaluate(scores={"a": np.ones((2, 1))}, truth=str(tmp_path / "t"), metric="loo", train=lambda r, s: r)
    with pytest.raises(SpecError, match="that one is taken"):
        influent.evaluate(scores={"random": np.ones((2, 5))}, truth=str(tmp_path / "t"))
    with pytest.raises(NumericsError, match=r"train\(2 rows, seed 0\): the loss of query 0 is inf"):
        influent.evaluate(
            scores={"a": np.ones((1, 5))}, truth=str(tmp_path / "t"), train=lambda rows, seed: [float("inf")]
        )
    assert judging.SUBSETS == 50

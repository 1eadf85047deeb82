"""The student: its features against autograd, its labels, the artifact, and an offer appraised without the teacher."""

import json
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from tiny_model import FACTS, make_model

import influent
from influent import offers
from influent.appraising import Labelled, estimate
from influent.cli import run
from influent.distilling import split
from influent.errors import CorruptError, DataError, MismatchError, SpecError
from influent.features import load_encoder, load_lm
from influent.providers import Groups
from influent.ridge import fit, linear
from influent.rowstore import Index
from influent.storage import Store
from influent.student import Head, open_student, save

SCHEMAS = Path(__file__).parent.parent / "docs" / "schemas"
WORDS = ["old", "new", "red", "blue", "big", "small", "fine", "odd"]


def offer(path: Path, per_provider: int) -> None:
    rows = []
    for i in range(per_provider):
        for j, provider in enumerate(("capitals", "monies", "rivers")):
            name, prompt, answer = FACTS[(3 * j + i) % len(FACTS)]
            extra = " ".join(WORDS[(i * k + j) % 8] for k in range(1, 2 + i % 5))
            rows.append({"id": f"{provider}/{i}", "provider": provider, "text": f"{extra} {prompt} {answer} {i}."})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("student")
    make_model(folder / "large")
    make_model(folder / "small", kind="gpt2", width=8, seed=3)
    offer(folder / "sample.jsonl", 40)
    offer(folder / "offer.jsonl", 60)
    target = [{"prompt": prompt, "completion": f" {answer}."} for _, prompt, answer in FACTS] * 2
    (folder / "target.jsonl").write_text("".join(json.dumps(row) + "\n" for row in target))
    influent.index(str(folder / "large"), str(folder / "sample.jsonl"), str(folder / "index"), method="linfik",
                   compress="mask:8x8")  # fmt: skip
    (folder / "made.json").write_text(json.dumps(distill(folder, "student")))
    return folder


def distill(here: Path, out: str, **options: Any) -> dict[str, Any]:
    settings = {"target": str(here / "target.jsonl"), "student": str(here / "small")} | options
    document = influent.distill(str(here / "index"), out=str(here / out), **settings)
    jsonschema.validate(document, json.loads((SCHEMAS / "distill.json").read_text()))
    return document


def appraise(here: Path, student: str = "student", data: str = "offer.jsonl", **options: Any) -> dict[str, Any]:
    document = influent.appraise(str(here / student), str(here / data), **({"draws": 200} | options))
    jsonschema.validate(document, json.loads((SCHEMAS / "value.json").read_text()))
    return document


ROWS = [
    {"text": "The money of Japan"},
    {"prompt": "The river of", "completion": " Chad is long"},
    {"text": "Peru " * 30},
]


def test_features_are_those_of_one_row_at_a_time_by_autograd(here):
    made = load_lm(str(here / "small"), max_length=16, token_budget=64, device="cpu")
    x, tokens = made(ROWS)
    for row, got, count in zip(ROWS, x, tokens, strict=True):
        whole, at_targets, residual, products, losses, length, targets = [], [], [], [], [], 0, 0
        for part in made.task.parts(row):
            ids, wanted, _ = part.inputs
            out = made.model(input_ids=torch.tensor([ids]), output_hidden_states=True)
            hidden = out.hidden_states[-1][0].detach().requires_grad_()
            logp = made.model.lm_head(hidden).log_softmax(-1)
            places = [t for t in range(1, len(ids)) if wanted[t]]
            loss = -sum(logp[t - 1, ids[t]] for t in places)
            (grad,) = torch.autograd.grad(loss, hidden)
            whole.append(hidden.detach().sum(0))
            at_targets.append(hidden.detach()[[t - 1 for t in places]].sum(0))
            residual.append(grad.sum(0))
            products.append(grad.T @ hidden.detach())
            losses.append(float(loss.detach()))
            length, targets = length + len(ids), targets + len(places)
        parts = [sum(whole) / length, sum(at_targets) / targets, sum(residual) / targets]
        ends = [sum(losses) / targets, np.log1p(sum(losses)), np.log1p(length), np.log1p(targets)]
        assert count == targets
        last = (sum(products) / targets).flatten()
        assert np.allclose(got, torch.cat([*parts, torch.tensor(ends), last]), rtol=1e-4, atol=1e-5)


def test_a_wide_models_products_are_mapped_on_both_sides(here):
    whole, few, none = (load_lm(str(here / "small"), side=side, token_budget=64, device="cpu") for side in (48, 3, 0))
    wanted, _ = whole(ROWS)
    rest = wanted.shape[1] - 64
    out, inside = (
        np.stack([s(torch.eye(8)[i : i + 1]).numpy()[0] for i in range(8)], axis=1) for s in few._sides
    )  # fmt: skip
    products = out @ wanted[:, rest:].reshape(-1, 8, 8) @ inside.T
    got, _ = few(ROWS)
    assert np.allclose(got[:, rest:], products.reshape(-1, 9), rtol=1e-4, atol=1e-5)
    assert np.allclose(none(ROWS)[0], wanted[:, :rest])
    assert "side" not in none.facts


def test_a_student_of_the_features_that_were_before_still_opens(here, tmp_path):
    made = load_lm(str(here / "small"), side=0, token_budget=64, device="cpu")
    x, _ = made(ROWS)
    ridge, _ = fit(np.concatenate([x, x + 1]), np.arange(6.0))
    head = Head(ridge, linear(np.arange(3.0), np.arange(3.0)))
    save(Store(str(tmp_path)), {"rung": "lm"}, made, head, summary={}, notes={"model": str(here / "small")})
    assert np.allclose(open_student(str(tmp_path), device="cpu")(ROWS)[0], head(x), atol=1e-4)


def test_the_untrained_baseline_is_the_small_models_linfik(here, tmp_path):
    """As an index of the small model, made with the same compressor, says."""
    from influent import target, untrained

    wanted = target.read(str(here / "target.jsonl"))
    rows = [json.loads(line) for line in (here / "sample.jsonl").read_text().splitlines()]
    own = untrained.own_values(
        str(here / "small"), [{"text": row["text"]} for row in rows], wanted, normalize="cosine", max_length=512,
        token_budget=256, device="cpu",
    )  # fmt: skip
    influent.index(str(here / "small"), str(here / "sample.jsonl"), str(tmp_path / "i"), compress=untrained.COMPRESS)
    influent.value(str(tmp_path / "i"), target=str(here / "target.jsonl"), values=str(tmp_path / "v.npy"))
    assert np.allclose(own, np.load(tmp_path / "v.npy"), atol=1e-5)


def test_features_do_not_depend_on_the_batch(here):
    for load in (load_lm, load_encoder):
        one, many = (load(str(here / "small"), token_budget=b, device="cpu")(ROWS) for b in (1, 4096))
        assert np.allclose(one[0], many[0], rtol=1e-4, atol=1e-5)
        assert np.array_equal(one[1], many[1])


def test_labels_are_stratified():
    groups = np.repeat([0, 1, 2, 3], [1000, 100, 22, 4])
    rows, held = split(groups, 200, seed=0)
    counts = np.bincount(groups[rows]).tolist()
    assert counts == [178, 20, 20, 4]
    assert np.bincount(groups[rows][held]).tolist() == [36, 5, 5, 2]
    assert (np.diff(rows) > 0).all()
    assert len(split(groups, None, seed=0)[0]) == len(groups)
    assert not np.array_equal(split(groups, 200, seed=1)[0], rows)


def test_the_ladder_is_measured_and_the_student_carries_what_it_is(here):
    made = json.loads((here / "made.json").read_text())
    assert [rung["rung"] for rung in made["rungs"]] == ["bm25", "tfidf", "lm", "tangent"]
    best = max(made["rungs"], key=lambda rung: rung["left_out"])
    assert made["rung"] == best["rung"]
    assert made["fidelity"] == {"spearman": best["spearman"], "recall": best["recall"], "labels": 120, "held": 24}
    assert made["cost"]["teacher_parameters"] > 0
    student = open_student(str(here / "student"))
    index = Index.open(str(here / "index"))
    assert student.spec["model"] == index.spec["model"]["fingerprint"]
    assert (student.spec["labels"], student.spec["queries"]) == (120, 16)
    assert student.digest == made["digest"]
    assert influent.verify(str(here / "student")) == {"ok": True, "errors": []}


def test_every_rung_can_be_asked_for_and_comes_back_as_it_was(here, tmp_path):
    rows = [json.loads(line) for line in (here / "offer.jsonl").read_text().splitlines()[:7]]
    for rung in ("bm25", "tfidf", "encoder", "lm"):
        out = str(tmp_path / rung)
        distill(here, out, rung=rung, encoder=str(here / "small"), labels=60, calibration="isotonic")
        values, _ = open_student(out, token_budget=64)([{"text": row["text"]} for row in rows])
        again, _ = open_student(out)([{"text": row["text"]} for row in rows])
        assert np.isfinite(values).all()
        assert np.allclose(values, again, atol=1e-6)


def test_an_offer_is_appraised_with_labels_of_the_sample(here, tmp_path):
    document = appraise(here, out=str(tmp_path / "scores"))
    assert [p["rows"] for p in document["providers"]] == [60, 60, 60]
    assert document["fidelity"]["labels_offered"] == {"capitals": 8, "monies": 8, "rivers": 8}
    assert document["method"]["model"] == Index.open(str(here / "index")).spec["model"]["fingerprint"]
    assert all(set(p["intervals"]) == {"labels", "labels and queries"} for p in document["providers"])
    assert all(p["leaks"] is None for p in document["providers"])
    assert influent.verify(str(tmp_path / "scores")) == {"ok": True, "errors": []}
    # the rows that were sampled are offered: their values, and the whole estimate, by hand
    full = influent.value(str(here / "index"), target=str(here / "target.jsonl"), values=str(tmp_path / "v.npy"))
    assert full["fidelity"] is None
    truth = {p["provider"]: p["value"] for p in full["providers"]}
    for p in document["providers"]:
        assert abs(p["value"] - truth[p["provider"]]) < 3 * (p["high"] - p["low"])


def test_an_interrupted_appraisal_resumes(here, tmp_path, monkeypatch):
    monkeypatch.setattr(offers, "SHARD_ROWS", 50)
    whole = appraise(here, out=str(tmp_path / "whole"))
    shutil.copytree(tmp_path / "whole", tmp_path / "torn")
    for name in ("manifest.json", "shards/000002.json"):
        (tmp_path / "torn" / name).unlink()
    kept = (tmp_path / "torn" / "shards" / "000001.safetensors").stat().st_mtime_ns
    again = appraise(here, out=str(tmp_path / "torn"))
    assert (tmp_path / "torn" / "shards" / "000001.safetensors").stat().st_mtime_ns == kept
    assert again["providers"] == whole["providers"]
    with pytest.raises(MismatchError):
        appraise(here, data="sample.jsonl", out=str(tmp_path / "whole"))


def test_without_its_labels_a_student_scores_and_does_not_price(here, tmp_path):
    shutil.copytree(here / "student", tmp_path / "handed")
    shutil.rmtree(tmp_path / "handed" / "labels")
    document = appraise(here, str(tmp_path / "handed"), budget="100")
    assert document["method"]["interval"] == "unlabelled"
    assert document["payments"]["refused"] is not None
    assert influent.verify(str(tmp_path / "handed"))["ok"]


def test_labels_of_an_audit(here, tmp_path):
    sample = Index.open(str(here / "index"))
    hashes = [str(row["hash"]) for row in sample.catalog.fields("hash")]
    influent.value(str(here / "index"), target=str(here / "target.jsonl"), values=str(tmp_path / "v.npy"))
    values = np.load(tmp_path / "v.npy")
    lines = ["hash,value", *(f"{h},{v}" for h, v in zip(hashes, values.tolist(), strict=True))]
    (tmp_path / "audit.csv").write_text("\n".join(lines) + "\n")
    document = appraise(here, data="sample.jsonl", labels=str(tmp_path / "audit.csv"))
    labels = [row["provider"] for row in sample.catalog.fields("provider")]
    for p in document["providers"]:  # every row is labelled: the student's mistakes are gone
        own = [v for v, name in zip(values.tolist(), labels, strict=True) if name == p["provider"]]
        assert (p["low"], p["value"], p["high"]) == pytest.approx((np.mean(own),) * 3, rel=1e-5)
    (tmp_path / "wrong.csv").write_text(f"hash,value\n{'0' * 32},1\n")
    with pytest.raises(DataError, match="no row of this offer"):
        appraise(here, data="sample.jsonl", labels=str(tmp_path / "wrong.csv"))


def test_the_small_model_may_travel_and_must_be_the_same(here, tmp_path):
    distill(here, str(tmp_path / "s"), rung="lm", embed_model=True)
    shutil.move(tmp_path / "s", tmp_path / "moved")
    assert open_student(str(tmp_path / "moved"))(ROWS[:1])[0].shape == (1,)
    with pytest.raises(MismatchError):  # and what is refused leaves the student that is there as it is
        distill(here, str(tmp_path / "moved"), rung="lm", embed_model=True, student=str(here / "large"))
    assert influent.verify(str(tmp_path / "moved"))["ok"]
    with pytest.raises(MismatchError, match="another small model"):
        open_student(str(tmp_path / "moved"), model=str(here / "large"))
    head = tmp_path / "moved" / "shards" / "head.safetensors"
    data = bytearray(head.read_bytes())
    data[-3] ^= 1
    head.write_bytes(data)
    assert not influent.verify(str(tmp_path / "moved"))["ok"]
    with pytest.raises(CorruptError):
        open_student(str(tmp_path / "moved"))


@pytest.mark.parametrize("quality", [0.1, 0.9])
def test_estimates_cover_the_truth_whatever_the_student_is_worth(quality):
    """Of 400 audits of 30 of 150 rows, the .95 interval holds the group's true mean .93 to .97 of the time."""
    rng = np.random.default_rng(0)
    truth = rng.normal(size=150)
    scores = quality * truth + (1 - quality) * rng.normal(size=150) + 0.5
    groups = Groups("provider", ["a"], np.zeros(150, dtype=np.int64))
    hits = spread = 0.0
    for _ in range(400):
        rows = rng.choice(150, 30, replace=False)
        (got,), drawn = estimate(groups, scores, Labelled(rows, truth[rows, None]), draws=100, seed=0)
        hits += got.shown.low <= truth.mean() <= got.shown.high
        spread += drawn.std() / ((got.shown.high - got.shown.low) / 2 / 2.045)
    assert 0.93 <= hits / 400 <= 0.97
    assert spread / 400 == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(("peculiar", "own", "count"), [(0.0, 1.0, 5), (3.0, 0.3, 8)])
def test_estimates_cover_the_truth_for_other_queries_too(peculiar, own, count):
    """Some of 120 rows are labelled and 12 queries asked, 400 times: the .95 interval over both holds the mean over all
    rows and queries .93 to .97 of the time. With a normal's quantile it did .89 (5 labels, nothing peculiar to a row
    and a query); resampling rows within the resampled queries, which counts what is peculiar three times, .995."""
    rng = np.random.default_rng(1)
    groups = Groups("provider", ["a"], np.zeros(120, dtype=np.int64))
    hits = 0
    for _ in range(400):
        queries, truth = 0.5 * rng.normal(size=12), own * rng.normal(size=120)
        values = truth[:, None] + queries + peculiar * rng.normal(size=(120, 12))
        rows = rng.choice(120, count, replace=False)
        (got,), _ = estimate(groups, np.zeros(120), Labelled(rows, values[rows]), draws=100, seed=0)
        found = got.intervals["labels and queries"]
        hits += found.low <= truth.mean() <= found.high
    assert 0.93 <= hits / 400 <= 0.97


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rung": "magic"}, "rung"),
        ({"rung": "encoder"}, "--encoder"),
        ({"calibration": "cubic"}, "calibration"),
        ({"normalize": "l2"}, "normalize"),
    ],
)
def test_mistakes_are_named(here, tmp_path, options, message):
    with pytest.raises(SpecError, match=message):
        distill(here, str(tmp_path / "x"), **options)


def test_the_commands(here, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    arguments = ["distill", str(here / "index"), "--target", str(here / "target.jsonl"), "--rung", "tfidf"]
    assert run([*arguments, "--student", str(here / "small"), "-o", str(tmp_path / "s")]) == 0
    assert "tfidf (kept)" in capsys.readouterr().out
    arguments = ["appraise", str(tmp_path / "s"), str(here / "offer.jsonl"), "--html", str(tmp_path / "p.html")]
    assert run([*arguments, "--table", str(tmp_path / "p.csv")]) == 0
    assert "scored by a student" in capsys.readouterr().out
    assert run(["verify", str(tmp_path / "s")]) == 0
    assert Store(str(tmp_path)).exists("p.html")

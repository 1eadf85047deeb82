"""The quanda adapter against quanda's own base class, metrics and a benchmark. Skipped where quanda is not there."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import influent
from influent import metrics

quanda = pytest.importorskip(
    "quanda", reason="quanda is not installed, or what it imports is not: influent[quanda]", exc_type=ImportError
)
from influent.explainer import InfluentExplainer, Samples  # noqa: E402  (after the skip)

NUM_TRAIN, NUM_TEST, CLASSES = 60, 8, 3


class Points(torch.utils.data.Dataset):
    """Three clouds of points, the labels of some rows wrong."""

    def __init__(self, size: int, *, seed: int, wrong: tuple[int, ...] = ()):
        rng = np.random.default_rng(seed)
        labels = np.arange(size) % CLASSES
        centres = np.eye(CLASSES, 6) * 3
        self.inputs = torch.tensor(centres[labels] + rng.normal(size=(size, 6)), dtype=torch.float32)
        self.labels = torch.tensor([(y + 1) % CLASSES if i in wrong else y for i, y in enumerate(labels.tolist())])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return self.inputs[i], int(self.labels[i])


def trained(data: Points, rows: Any = None) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, CLASSES))
    adam = torch.optim.Adam(model.parameters(), lr=0.02)
    rows = slice(None) if rows is None else rows
    for _ in range(60):
        adam.zero_grad()
        nn.functional.cross_entropy(model(data.inputs[rows]), data.labels[rows]).backward()
        adam.step()
    return model.eval()


WRONG = (4, 11, 25, 38, 52)


@pytest.fixture
def explainer(tmp_path) -> InfluentExplainer:
    data = Points(NUM_TRAIN, seed=0, wrong=WRONG)
    return InfluentExplainer(trained(data), data, cache_dir=str(tmp_path), model_id="net", compress="id")


def test_scores_are_those_of_the_verb(explainer, tmp_path):
    test = Points(NUM_TEST, seed=1)
    found = explainer.explain(test.inputs, test.labels)
    assert found.shape == (NUM_TEST, NUM_TRAIN)
    influent.query(
        str(tmp_path / "net"), queries=[test[i] for i in range(NUM_TEST)], model=explainer.model,
        task=influent.Classification(), scores=str(tmp_path / "scores.npy"),
    )  # fmt: skip
    assert np.allclose(found.numpy(), np.load(tmp_path / "scores.npy"), rtol=1e-5)
    assert torch.equal(found, explainer.explain(test.inputs, test.labels.tolist()))


def test_self_influence_is_what_quanda_would_compute(explainer):
    """Its base class explains every training sample and takes the diagonal."""
    slow = quanda.explainers.base.Explainer.self_influence(explainer, batch_size=16)
    assert torch.allclose(explainer.self_influence(), slow, rtol=1e-3, atol=1e-4)


def test_quandas_metrics_run_on_us(explainer):
    data, test = explainer.train_dataset.dataset, Points(NUM_TEST, seed=1)
    options = {"cache_dir": str(explainer.path) + "-2", "compress": "id"}
    mislabels = quanda.metrics.downstream_eval.MislabelingDetectionMetric(
        model=explainer.model, train_dataset=data, mislabeling_indices=list(WRONG), explainer_cls=InfluentExplainer,
        expl_kwargs=options,
    ).compute()  # fmt: skip
    assert float(mislabels["score"]) > 0.8
    detection = quanda.metrics.downstream_eval.ClassDetectionMetric(explainer.model, train_dataset=data)
    found = explainer.explain(test.inputs, test.labels)
    detection.update(test_data=test.inputs, test_targets=test.labels, explanations=found)
    assert float(detection.compute()["score"]) > 0.8


def test_quandas_lds_of_our_scores_is_ours(explainer, tmp_path):
    data, test = explainer.train_dataset.dataset, Points(NUM_TEST, seed=1)
    rng, used, paths, gain = np.random.default_rng(0), [], [], []
    for j in range(12):
        used.append(rng.permutation(NUM_TRAIN) < NUM_TRAIN // 2)
        model = trained(data, used[-1].nonzero()[0])
        paths.append(str(tmp_path / f"subset{j}.pt"))
        torch.save(model.state_dict(), paths[-1])
        loss = nn.functional.cross_entropy(model(test.inputs), test.labels, reduction="none")
        gain.append(-torch.log(torch.expm1(loss)).detach().numpy())  # log(p / (1 - p)), what quanda measures
    metric = quanda.metrics.ground_truth.LinearDatamodelingMetric(
        model=explainer.model, train_dataset=data, m=12, subset_ids=[rows.nonzero()[0].tolist() for rows in used],
        subset_ckpt_filenames=paths, cache_dir=str(tmp_path),
    )  # fmt: skip
    scores = explainer.explain(test.inputs, test.labels)
    metric.update(test_data=test.inputs, test_targets=test.labels, explanations=scores)
    ours = metrics.lds(scores.numpy(), np.array(used), np.array(gain)).mean()
    assert float(metric.compute()["score"]) == pytest.approx(ours, abs=0.01)


def test_a_benchmark_runs_on_us(explainer, tmp_path):
    torch.save(explainer.model.state_dict(), tmp_path / "net.pt")

    def load(model: nn.Module, path: str) -> float:
        model.load_state_dict(torch.load(path))
        return 1.0

    benchmark = quanda.benchmarks.downstream_eval.ClassDetection(
        model=explainer.model, train_dataset=explainer.train_dataset.dataset, eval_dataset=Points(NUM_TEST, seed=1),
        checkpoints=[str(tmp_path / "net.pt")], checkpoints_load_func=load,
    )  # fmt: skip
    found = benchmark.evaluate(InfluentExplainer, {"cache_dir": str(tmp_path / "bench"), "compress": "id"})
    assert float(found["score"]) > 0.8


def test_language_models_and_what_is_refused(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=30, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 30, (6, 7))
    rows = [{"input_ids": x, "attention_mask": torch.ones_like(x), "labels": x} for x in ids]
    explainer = InfluentExplainer(
        model, rows, task="causal_lm", cache_dir=str(tmp_path), compress="id", curvature="identity"
    )
    found = explainer.explain({"input_ids": ids[:2], "attention_mask": torch.ones_like(ids[:2])}, ids[:2])
    loss = model(input_ids=ids[:1], labels=ids[:1]).loss * 6
    tracked = [p for name, p in model.named_parameters() if name.startswith("model.layers") and p.ndim == 2]
    own = sum(float((g * g).sum()) for g in torch.autograd.grad(loss, tracked))
    assert float(found[0, 0]) == pytest.approx(own, rel=1e-3)
    with pytest.raises(ValueError, match="not supported"):
        InfluentExplainer(model, rows, task="tabular", cache_dir=str(tmp_path))
    with pytest.raises(influent.errors.MismatchError):
        InfluentExplainer(LlamaForCausalLM(config), rows, task="causal_lm", cache_dir=str(tmp_path), compress="id")
    assert [len(list(Samples(rows))), Samples(rows)[5][1].tolist()] == [6, ids[5].tolist()]

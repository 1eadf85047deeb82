"""Scores without stored rows are those of full-size rows, for every layer kind, and whatever the run's sizes are."""

import pytest
import torch
from kron_fits import exact, fit, passes_of
from test_extract import MODELS, build, losses_of
from test_kron import Sequences
from tiny_model import FACTS, make_model

from influent import live
from influent.bases import Sample
from influent.collect import Collector
from influent.compress import Compress
from influent.damping import Damping
from influent.extract import frozen
from influent.kron import KronFull
from influent.layers import plan
from influent.live import LiveScorer, prepared, quadratics
from influent.loading import load
from influent.passes import Passes
from influent.task import CausalLM
from influent.truncate import truncate


def queries_of(passes, num_queries):
    rng = torch.Generator().manual_seed(3)
    return {block.name: torch.randn(num_queries, block.width, generator=rng) for block in passes.plan.blocks}


def example_gradients(name):
    model, x = build(name)
    passes = passes_of(model, Sequences(), list(x))
    g = exact(passes, lambda i: losses_of(model, x[i : i + 1])[0] if i < len(x) else None)
    return passes, {key: rows.double() for key, rows in g.items()}


def score(passes, queries, *, rank=None, lo=0, hi=4, **options):
    with frozen(passes.model):
        return LiveScorer(passes, prepared(queries, passes.plan.blocks, rank), **options)(lo, hi)


@pytest.mark.parametrize("num_queries", [1, 3])
@pytest.mark.parametrize("name", sorted(set(MODELS) - {"flattened"}))
def test_live_scores_are_products_with_the_materialised_gradients(name, num_queries, monkeypatch):
    passes, g = example_gradients(name)
    queries = queries_of(passes, num_queries)
    expected = sum(queries[key].double() @ g[key].T for key in g)
    torch.testing.assert_close(score(passes, queries), expected, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(live, "ENTRIES", 1)
    small = passes_of(
        passes.model, passes.task, [passes.sample.example(passes.task, i) for i in range(4)], token_budget=1
    )
    torch.testing.assert_close(score(small, queries), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["linear-sequence", "embedding", "tied-bias", "layernorm"])
def test_cut_queries_are_their_best_pairs(name, monkeypatch):
    passes, g = example_gradients(name)
    queries, expected = queries_of(passes, 3), torch.zeros(3, 4).double()
    for block in passes.plan.blocks:
        q, shape = queries[block.name], (block.in_width, block.out_width)
        if not block.is_vector and 1 * sum(shape) < block.width:
            cut = truncate(q.unflatten(1, shape), 1)
            q = (cut.pairs.v[:, 0, :, None] * cut.pairs.u[:, 0, None, :] * cut.sigma[:, :1, None]).flatten(1)
        expected += q.double() @ g[block.name].T
    torch.testing.assert_close(score(passes, queries, rank=1), expected, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(live, "ENTRIES", 1)
    torch.testing.assert_close(score(passes, queries, rank=1), expected, rtol=1e-4, atol=1e-4)


def test_normalised_scores_and_rows_without_a_gradient():
    passes, g = example_gradients("linear-sequence")
    queries = queries_of(passes, 2)
    whole, lengths = torch.cat([*g.values()], 1), torch.tensor([2.0, 3.0]).double()
    plain = sum(queries[key].double() @ g[key].T for key in g)
    cosine = score(passes, queries, lengths=lengths)
    torch.testing.assert_close(cosine, plain / lengths[:, None] / whole.norm(dim=1), rtol=1e-5, atol=1e-6)
    spread = torch.tensor([1.0, 2.0, 0.0, 4.0]).double()
    relatif = score(passes, queries, spread=spread)
    torch.testing.assert_close(relatif[:, [0, 1, 3]], (plain / spread)[:, [0, 1, 3]], rtol=1e-5, atol=1e-6)
    assert (relatif[:, 2] == 0).all()
    some = Passes(model=passes.model, plan=passes.plan, task=passes.task, sample=passes.sample, rows=[0, 3])
    window = score(some, queries, lo=2, hi=4)
    assert (window[:, 0] == 0).all()
    torch.testing.assert_close(window[:, 1], plain[:, 3], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["linear-sequence", "embedding", "tied-bias", "layernorm", "called-twice"])
def test_self_influence_is_that_of_the_dense_inverse(name, tmp_path, monkeypatch):
    passes, g = example_gradients(name)
    fitted = KronFull(fit(tmp_path, passes, "ekfac:empirical"), Damping("relative", 0.1))
    inverses = {block.name: fitted.inverse(block.name) for block in passes.plan.blocks}
    expected = sum((inverses[key](rows) * rows).sum(1) for key, rows in g.items())
    monkeypatch.setattr(live, "ENTRIES", 1)
    with frozen(passes.model):
        found = quadratics(passes, lambda key, rows: inverses[key].squares(rows), 0, 4)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("budget", [1, 40, 4096])
def test_documents_in_parts_are_one_row(budget, tmp_path):
    model, tokenizer = load(str(make_model(tmp_path / "model")), dtype="float32", device="cpu")
    task = CausalLM(tokenizer, max_length=8)
    texts = [
        {"text": " ".join(prompt for _, prompt, _ in FACTS[i : i + n])} for i, n in ((0, 1), (1, 4), (5, 1), (6, 2))
    ]
    with frozen(model):
        tracked = plan(model, "mlp")
        bound = {block.name: Compress.parse("id").bind(block, 0) for block in tracked.blocks}
        rows = Collector(model, tracked, bound, task, 64).collect(texts, name=str).rows
        passes = Passes(
            model=model, plan=tracked, task=task, token_budget=budget, rows=range(4),
            sample=Sample(digest="", n=4, example=lambda _, row: texts[row], name=str),
        )  # fmt: skip
        queries = queries_of(passes, 2)
        plain = sum(queries[key].double() @ rows[key].double().T for key in rows)
        torch.testing.assert_close(score(passes, queries), plain, rtol=1e-4, atol=1e-4)
        squares = sum(g.double().square().sum(1) for g in rows.values())
        torch.testing.assert_close(
            quadratics(passes, lambda key, g: g.double().square().sum(1), 0, 4), squares, rtol=1e-4, atol=1e-5
        )
        ones = torch.ones(2).double()
        torch.testing.assert_close(
            score(passes, queries, lengths=ones), plain / squares.sqrt(), rtol=1e-4, atol=1e-5
        )  # fmt: skip

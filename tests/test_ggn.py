"""Products with the Gauss-Newton matrix are those of the dense one, and conjugate gradients solve with it."""

import pytest
import torch
from kron_fits import exact, fit, passes_of
from test_extract import MODELS, build
from tiny_model import FACTS, make_model
from torch import nn

from influent.bases import Sample
from influent.damping import Damping
from influent.errors import NumericsError, SpecError
from influent.extract import frozen
from influent.ggn import ConjugateGradients, GaussNewton, conjugate_gradients
from influent.kron import KronFull
from influent.kronname import KronName
from influent.layers import plan
from influent.loading import load
from influent.parameters import from_parameters, to_parameters, tracked
from influent.passes import Passes
from influent.task import CausalLM, Classification


def classes(n=6):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.LayerNorm(8), nn.Linear(8, 3)).double()
    data = [(torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(i)).double(), i % 3) for i in range(n)]
    return model, data


def dense(passes, data):
    """The whole matrix over all blocks, from one backward pass a logit."""
    model = passes.model
    places = [(i, c) for i in range(len(data)) for c in range(3)]
    rows = exact(passes, lambda j: model(data[places[j][0]][0][None])[0, places[j][1]] if j < len(places) else None)
    jacobian = torch.cat([rows[block.name] for block in passes.plan.blocks], dim=1).unflatten(0, (len(data), 3))
    total = torch.zeros(jacobian.shape[2], jacobian.shape[2]).double()
    for (x, _), j in zip(data, jacobian, strict=True):
        p = model(x[None])[0].softmax(0).detach()
        total += j.T @ (p.diag() - torch.outer(p, p)) @ j / len(data)
    return total


def vectors(passes, n, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return {block.name: torch.randn(n, block.width, generator=rng).double() for block in passes.plan.blocks}


def joined(parts):
    return torch.cat([*parts.values()], dim=1)


@pytest.mark.parametrize("budget", [1, 4096])
def test_products_are_those_of_the_dense_matrix(budget):
    model, data = classes()
    passes = passes_of(model, Classification(), data, layers="0|3|4", token_budget=budget)
    matrix, v = dense(passes, data), vectors(passes, 3)
    with frozen(model):
        found = GaussNewton(passes)(v)
    torch.testing.assert_close(joined(found), joined(v) @ matrix, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_parameters_and_back(name):
    model, _ = build(name)
    tracked_plan = plan(model, "")
    v = {block.name: torch.randn(2, block.width) for block in tracked_plan.blocks}
    named = to_parameters(tracked_plan, v)
    shapes = dict(model.named_parameters(remove_duplicate=False))
    assert {key: each.shape for key, each in tracked(tracked_plan).items()} == {key: shapes[key].shape for key in named}
    assert all(each.shape == (2, *shapes[key].shape) for key, each in named.items())
    for key, each in from_parameters(tracked_plan, named).items():
        torch.testing.assert_close(each, v[key])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_language_model_with_fused_attention(kind, tmp_path):
    """One product against finite differences of the gradient of the sampled-free quadratic form."""
    model, tokenizer = load(str(make_model(tmp_path / "model", kind=kind)), dtype="float32", device="cpu")
    model = model.double()
    task, texts = CausalLM(tokenizer), [{"text": prompt} for _, prompt, _ in FACTS[:3]]
    passes = Passes(
        model=model, plan=plan(model, "mlp"), task=task, rows=range(3),
        sample=Sample(digest="", n=3, example=lambda _, row: texts[row], name=str),
    )  # fmt: skip
    v, step = vectors(passes, 1), 1e-5
    with frozen(model):
        product = GaussNewton(passes)(v)
        point = tracked(passes.plan)
        at = to_parameters(passes.plan, v)
        total = 0.0
        with torch.no_grad():
            for text in texts:
                batch = task.collate(task.parts(text))
                change = []
                for sign in (1, -1):
                    for name, p in point.items():
                        p += sign * step * at[name][0]
                    change.append(task.logits(model, batch)[0])
                    for name, p in point.items():
                        p -= sign * step * at[name][0]
                slope, share = (change[0] - change[1]) / (2 * step), task.logits(model, batch)[0].softmax(1)
                total += float((share * slope.square()).sum() - (share * slope).sum(1).square().sum()) / len(texts)
    assert float((joined(v) * joined(product)).sum()) == pytest.approx(total, rel=2e-3)  # some of its parts are float32


def test_enough_iterations_solve_with_the_whole_matrix(tmp_path):
    model, data = classes()
    passes = passes_of(model, Classification(), data, layers="0|3|4")
    matrix, b = dense(passes, data), vectors(passes, 2)
    fitted = fit(tmp_path, passes, "ekfac")
    with frozen(model):
        first = KronFull(fitted, Damping("relative", 0.1))
        damping = torch.cat(
            [torch.full((block.width,), first.health()[block.name]["lambda"]) for block in passes.plan.blocks]
        ).double()
        truth = joined(b) @ torch.linalg.inv(matrix + damping.diag())
        errors = []
        for iterations in (2, 60):
            solver = ConjugateGradients(KronName("cg", iterations), passes, first, Damping("relative", 0.1), None)
            found = joined(solver.precondition({key: each.clone() for key, each in b.items()}))
            errors.append(float((found - truth).norm() / truth.norm()))
            facts = solver.facts()["convergence"]
            assert facts["iterations"] == iterations and facts["rows"] == len(data)
        assert errors[1] < 5e-3 and errors[1] < errors[0]
        assert facts["residual"]["largest"] < 1e-3
        before = joined(first.precondition({key: each.clone() for key, each in b.items()}))
        assert float((before - truth).norm() / truth.norm()) > errors[0]


def test_what_does_not_converge_is_an_error():
    matrix = torch.diag(torch.logspace(-6, 6, 40)).double()
    b = {"a": torch.ones(1, 40).double()}
    with pytest.raises(NumericsError, match="after 2 iterations a residual is .* raise the number of iterations"):
        conjugate_gradients(
            lambda v: {"a": v["a"] @ matrix}, lambda v: v, {"a": torch.logspace(-1, 1, 40)[None].double()}, iterations=2
        )  # fmt: skip
    with pytest.raises(NumericsError, match="no positive curvature along iteration 1"):
        conjugate_gradients(lambda v: {"a": -v["a"]}, lambda v: v, b, iterations=2)
    with pytest.raises(NumericsError, match="raise the damping"):
        conjugate_gradients(lambda v: {"a": v["a"] * float("nan")}, lambda v: v, b, iterations=2)


def test_a_query_of_zeros_stays_zero():
    b = {"a": torch.stack([torch.zeros(4), torch.ones(4)]).double()}
    found = conjugate_gradients(lambda v: {"a": 2 * v["a"]}, lambda v: v, b, iterations=3)
    torch.testing.assert_close(found.x["a"], b["a"] / 2)
    assert found.residual.tolist() == [0, 0]


def test_a_task_without_logits_says_what_to_do():
    class Plain:
        def loss(self, model, batch): ...
        def measure(self, model, batch): ...

    model, data = classes()
    with pytest.raises(SpecError, match="Plain has no logits.*--curvature ekfac"):
        GaussNewton(passes_of(model, Plain(), data))

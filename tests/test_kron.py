"""K-FAC is exact where theory says so, EK-FAC is the best diagonal in its basis, and neither depends on the run."""

import pytest
import torch
from kron_fits import Squares, dense, exact, fisher, fit, passes_of, source
from test_extract import MODELS, build, losses_of
from torch import nn

from influent import kron, moments
from influent.artifact import ArtifactWriter
from influent.compress import Compress
from influent.damping import Damping
from influent.errors import LayerError, NumericsError, SpecError
from influent.kron import KronFull, KronRows, fits
from influent.kronecker import Kronecker, eigen
from influent.kronname import KronName, parse, with_labels
from influent.task import Classification


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def linear_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3, bias=False), nn.Linear(3, 2)).double()


def regression(n=7, outputs=2):
    """Every input with every label, see Squares."""
    x, y = torch.randn(n, 5, generator=rng()).double(), torch.randn(n, outputs, generator=rng(1)).double()
    return [(x[i], y[i], which) for i in range(n) for which in range(outputs)]


class Sequences:
    """A loss of whole sequences, as in the tests of extraction."""

    def loss(self, model, batch):
        return losses_of(model, batch)

    measure = loss


def classes(n=12, width=6):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(width, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    return model, [(torch.randn(width, generator=rng(i)).double(), i % 4) for i in range(n)]


# -- the algebra


@pytest.mark.parametrize("shape", [(3, 5), (4, 1), (1, 6)])
def test_the_inverse_is_that_of_the_kronecker_product(shape):
    sides = [torch.randn(p, p, generator=rng(p)).double() for p in shape]
    a, s = (x @ x.T for x in sides)
    (inner, first), (outer, second) = eigen(a), eigen(s)
    solve = Kronecker(inner, outer, torch.outer(first, second), 0.3)
    g = torch.randn(6, shape[0] * shape[1], generator=rng()).double()
    inverse = torch.linalg.inv(torch.kron(a, s) + 0.3 * torch.eye(g.shape[1]))
    torch.testing.assert_close(solve(g), g @ inverse)
    torch.testing.assert_close(solve.squares(g), (g @ inverse * g).sum(1))


def test_a_diagonal_side_needs_no_eigenvectors():
    counts = torch.tensor([3.0, 0.0, 1.0, 5.0]).double()
    a = torch.randn(3, 3, generator=rng()).double()
    (inner, first), (outer, second) = eigen(a @ a.T), eigen(counts)
    assert outer is None
    g = torch.randn(2, 12, generator=rng(1)).double()
    inverse = torch.linalg.inv(torch.kron(a @ a.T, counts.diag()) + 0.5 * torch.eye(12))
    torch.testing.assert_close(Kronecker(inner, outer, torch.outer(first, second), 0.5)(g), g @ inverse)


# -- what a fit is


@pytest.mark.parametrize("form", ["kfac", "ekfac"])
def test_exact_for_a_deep_linear_net_with_squared_loss(form, tmp_path):
    """Martens and Grosse: inputs and output gradients are then independent. The whole inverse of each block of the
    Gauss-Newton matrix, biases included; EK-FAC is exact with it, because its diagonal is then K-FAC's."""
    model, data = linear_net(), regression()
    passes = passes_of(model, Squares(), data)
    jacobian = exact(passes, lambda i: model(data[i][0])[data[i][2]] if i < len(data) else None)
    fitted = fit(tmp_path, passes, form)
    n = len(data) // 2  # inputs; a row of the Jacobian each output
    for block in passes.plan.blocks:
        ggn = fisher(jacobian[block.name], n)
        torch.testing.assert_close(dense(fitted, block.name), ggn)
        damping = 0.1 * float(ggn.trace()) / len(ggn)
        inverse = torch.linalg.inv(ggn + damping * torch.eye(len(ggn)))
        unit = torch.eye(len(ggn)).double()
        torch.testing.assert_close(fitted.inverse(block.name, Damping("relative", 0.1))(unit), inverse)


# A task without parts does not say how many positions an example has, which a flattened layer would need.
@pytest.mark.parametrize("name", sorted(set(MODELS) - {"flattened"}))
def test_corrected_eigenvalues_are_the_diagonal_of_the_fisher_matrix_in_the_basis(name, tmp_path):
    model, x = build(name)
    data = list(x)
    passes = passes_of(model, Sequences(), data)
    g = exact(passes, lambda i: losses_of(model, x[i : i + 1])[0] if i < len(x) else None)
    fitted, plain = fit(tmp_path, passes, "ekfac:empirical"), fit(tmp_path, passes, "kfac:empirical")
    for block in passes.plan.blocks:
        held, true = fitted.factors.tensors(block.name), fisher(g[block.name], len(x))
        values = fitted.values(block.name)
        inner = held["in"].double() if "in" in held else torch.eye(values.shape[0]).double()
        outer = held["out"].double() if "out" in held else torch.eye(values.shape[1]).double()
        turned = torch.kron(inner, outer).T @ true @ torch.kron(inner, outer)
        torch.testing.assert_close(values.double().flatten(), turned.diagonal(), rtol=2e-5, atol=1e-8)
        error, before = ((dense(f, block.name) - true).norm() for f in (fitted, plain))
        assert error <= before * (1 + 1e-6) + 1e-9 * true.norm()
        if block.is_vector:
            assert error <= 1e-5 * true.norm(), "a norm's own Fisher matrix, whole"


def test_factors_of_an_embedding_count_its_tokens(tmp_path):
    model, x = build("embedding")
    passes = passes_of(model, Sequences(), list(x))
    fitted = fit(tmp_path, passes, "kfac:empirical")
    (key,) = (block.name for block in passes.plan.blocks if block.kind == "embedding")
    counts = torch.bincount(x.flatten(), minlength=11).double()
    counts[2] = 0  # the padding row
    assert "out" not in fitted.factors.tensors(key)
    torch.testing.assert_close(fitted.factors.tensors(key)["out.values"], counts / len(x))


def test_the_fisher_matrix_of_compressed_sides(tmp_path):
    model, data = classes()
    passes = passes_of(model, Classification(), data)
    bound = {block.name: Compress.parse("gauss:3x2").bind(block, 0) for block in passes.plan.blocks}
    fitted = fit(tmp_path, passes, "ekfac:compressed:empirical", bound=bound)
    loss = nn.functional.cross_entropy
    g = exact(
        passes, lambda i: loss(model(data[i][0]), torch.tensor(data[i][1])) if i < len(data) else None
    )  # fmt: skip
    for block in passes.plan.blocks:
        left, right = (m(torch.eye(m.p).double()) for m in (bound[block.name].inner[0], bound[block.name].outer[0]))
        true = fisher(g[block.name] @ torch.kron(left, right), len(data))
        held = fitted.factors.tensors(block.name)
        vectors = torch.kron(held["in"].double(), held["out"].double())
        torch.testing.assert_close(
            fitted.values(block.name).flatten(), (vectors.T @ true @ vectors).diagonal(), rtol=1e-4, atol=1e-7
        )


def test_a_flat_compressor_has_no_compressed_sides(tmp_path):
    model, data = classes()
    passes = passes_of(model, Classification(), data)
    bound = {block.name: Compress.parse("sjlt:8").bind(block, 0) for block in passes.plan.blocks}
    with pytest.raises(SpecError, match="needs a compressor of two sides"):
        fit(tmp_path, passes, "kfac:compressed", bound=bound)


def test_a_side_too_wide_is_refused_by_name(tmp_path, monkeypatch):
    model, data = classes()
    monkeypatch.setattr(kron, "WIDEST", 6)
    with pytest.raises(LayerError, match=r"layer 0 has a side \(in\) 7 wide.*--exclude it"):
        fit(tmp_path, passes_of(model, Classification(), data), "kfac")


# -- damping


def test_each_block_is_damped_by_its_own_eigenvalues(tmp_path):
    model, data = classes()
    passes = passes_of(model, Classification(), data)
    fitted = fit(tmp_path, passes, "ekfac")
    health = KronFull(fitted, Damping("relative", 0.5)).health()
    amounts = set()
    for block in passes.plan.blocks:
        matrix = dense(fitted, block.name)
        amount = 0.5 * float(matrix.trace()) / len(matrix)
        amounts.add(round(amount, 12))
        assert health[block.name]["lambda"] == pytest.approx(amount)
        s = torch.linalg.eigvalsh(matrix)
        assert health[block.name]["d_eff"] == pytest.approx(float((s / (s + amount)).sum()), rel=1e-6)
        unit = torch.eye(len(matrix)).double()
        inverse = torch.linalg.inv(matrix + amount * unit)
        torch.testing.assert_close(fitted.inverse(block.name, Damping("relative", 0.5))(unit), inverse)
    assert len(amounts) == len(passes.plan.blocks)


def test_no_damping_is_refused_where_the_matrix_is_singular(tmp_path):
    model, data = classes(n=2)
    fitted = fit(tmp_path, passes_of(model, Classification(), data), "kfac")
    with pytest.raises(NumericsError, match="block '0'.*raise the damping"):
        fitted.inverse("0", Damping("absolute", 0.0))


# -- labels


def test_the_two_passes_draw_different_labels_and_batches_do_not_matter(tmp_path):
    model, data = classes()
    drawn: dict[str, dict[int, float]] = {}

    class Spy(Classification):
        def sampled_loss(self, model, batch, streams):
            for stream in streams:
                drawn.setdefault(stream.kind, {})[stream.side] = stream.uniforms(1)[0]
            return super().sampled_loss(model, batch, streams)

    fit(tmp_path / "a", passes_of(model, Spy(), data), "ekfac")
    first, second = drawn["labels/factors"], drawn["labels/eigenvalues"]
    assert first.keys() == second.keys() and len(first) == len(data)
    assert not set(first.values()) & set(second.values())
    seen = {kind: dict(each) for kind, each in drawn.items()}
    fit(tmp_path / "b", passes_of(model, Spy(), data, token_budget=1), "ekfac")
    assert drawn == seen


def test_sampled_labels_estimate_the_true_fisher_matrix(tmp_path):
    """Many copies of the data have many draws each; their mean is the sum over classes weighted by probability."""
    model, data = classes(n=3)
    copies = [example for example in data for _ in range(1000)]
    fitted = fit(tmp_path, passes_of(model, Classification(), copies), "kfac")
    total = torch.zeros(4, 4).double()
    with torch.no_grad():
        for x, _ in data:
            p = model(x).softmax(0)
            total += (p.diag() - torch.outer(p, p)) / len(data)
    held = fitted.factors.tensors("2")
    outer = held["out"] @ held["out.values"].diag() @ held["out"].T
    torch.testing.assert_close(outer, total, rtol=0, atol=0.025)


def test_a_task_that_cannot_sample_says_what_to_do(tmp_path):
    model, x = build("linear-sequence")
    with pytest.raises(SpecError, match="Sequences cannot draw labels.*--labels empirical"):
        fit(tmp_path, passes_of(model, Sequences(), list(x)), "ekfac")


# -- the run


def same(one, other, *, rtol=1e-7):
    for record in one.factors.records:
        torch.testing.assert_close(dense(other, record.name), dense(one, record.name), rtol=rtol, atol=1e-9)


@pytest.mark.parametrize("name", ["linear-sequence", "embedding", "tied-bias", "layernorm"])
def test_batches_memory_and_pieces_do_not_change_a_fit(name, tmp_path, monkeypatch):
    model, x = build(name)
    data = list(x)
    whole = fit(tmp_path / "a", passes_of(model, Sequences(), data), "ekfac:empirical")
    monkeypatch.setattr(kron, "GRADIENT_ENTRIES", 1)
    monkeypatch.setattr(kron, "in_groups", lambda blocks, size, most: moments.in_groups(blocks, size, 1))
    groups = []
    monkeypatch.setattr(kron.log, "info", lambda *words: groups.append(words[3]))
    small = passes_of(model, Sequences(), data, token_budget=1)
    same(whole, fit(tmp_path / "b", small, "ekfac:empirical"))
    assert groups == [1] * 2 * len(small.plan.blocks), "one block a pass"


def test_the_order_of_rows_and_blocks_does_not_matter_to_labels(tmp_path, monkeypatch):
    model, data = classes()
    whole = fit(tmp_path / "a", passes_of(model, Classification(), data), "ekfac")
    monkeypatch.setattr(
        kron, "in_groups", lambda blocks, size, most: moments.in_groups(list(blocks)[::-1], size, 1)
    )  # fmt: skip
    same(whole, fit(tmp_path / "b", passes_of(model, Classification(), data, token_budget=3), "ekfac"))


def test_a_sample_of_the_rows(tmp_path):
    model, data = classes()
    passes = passes_of(model, Classification(), data)
    fitted = fit(tmp_path, passes, "ekfac:empirical@5")
    assert fitted.factors.summary["rows"] == fitted.corrected.summary["rows"] == 5
    assert str(fitted.name) == "ekfac:empirical@5"


@pytest.mark.parametrize("after", range(4))
def test_a_killed_fit_resumes_at_the_next_block(after, tmp_path, monkeypatch):
    model, data = classes()
    passes = passes_of(model, Classification(), data)
    whole = fit(tmp_path / "a", passes, "ekfac", memory=1)
    put, count = ArtifactWriter.put, []

    def dying(self, *arguments, **options):
        if len(count) == after:
            raise KeyboardInterrupt
        count.append(arguments[0])
        return put(self, *arguments, **options)

    monkeypatch.setattr(ArtifactWriter, "put", dying)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "b", passes, "ekfac")
    done = list(count)
    monkeypatch.setattr(ArtifactWriter, "put", lambda self, *a, **o: (count.append(a[0]), put(self, *a, **o))[1])
    again = fit(tmp_path / "b", passes, "ekfac")
    assert len(count) == 4 and count[: len(done)] == done, "nothing is made twice"
    same(whole, again, rtol=0)
    assert fit(tmp_path / "b", passes, "ekfac").factors.digest == again.factors.digest


def test_what_is_fitted_is_found_by_name(tmp_path):
    model, data = classes()
    passes = passes_of(model, Classification(), data)
    fit(tmp_path, passes, "ekfac:empirical")
    index = source(tmp_path, passes)
    found = fits(index)
    assert sorted(found) == ["ekfac:empirical", "kfac:empirical"]
    assert KronFull(found["ekfac:empirical"], Damping("relative", 1.0)).name == "ekfac:empirical:relative:1"
    rows = KronRows(index, found["kfac:empirical"], Damping("absolute", 0.5))
    assert rows.name == "kfac:empirical:absolute:0.5"
    names = {KronFull(each, Damping("relative", 1.0)).digest for each in found.values()}
    assert len(names) == 2


# -- names


@pytest.mark.parametrize("text", ["ekfac", "kfac:compressed", "ekfac:compressed:empirical@64:relative:0.5", "cg:7@9"])
def test_names_print_back(text):
    assert str(parse(text)) == text


@pytest.mark.parametrize("text", ["ekfac:3", "cg:0", "cg:3:compressed", "ekfac:", "ekfac@", "kfac:damped", "kfac@0"])
def test_names_that_mean_nothing_are_refused(text):
    with pytest.raises(SpecError, match="expected kfac, ekfac or cg"):
        parse(text)


def test_names_of_others_are_none_of_ours():
    assert parse("fim") is None and parse("lowrank:3") is None and parse("cgx") is None


def test_labels_and_damping_beside_a_name():
    assert str(with_labels(KronName("ekfac"), "empirical")) == "ekfac:empirical"
    assert str(KronName("kfac").damped(None)) == "kfac:relative:0.1"
    assert str(KronName("ekfac").damped(None)) == "ekfac:relative:0.01"
    assert str(KronName("ekfac", compressed=True).damped(None)) == "ekfac:compressed:relative:0.1"
    with pytest.raises(SpecError, match="differ"):
        with_labels(KronName("ekfac", labels="empirical"), "sampled")
    with pytest.raises(SpecError, match="differ"):
        parse("kfac:relative:1").damped(Damping("relative", 2.0))  # pyright: ignore
    with pytest.raises(SpecError, match="expected one of sampled, empirical"):
        with_labels(KronName("ekfac"), "true")

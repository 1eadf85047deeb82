"""Examples become rows: whatever the batches, each row is autograd's gradient of its own example's loss."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle_gradients import compressed, weight_gradients
from test_task import TEXTS, make_model, make_tokenizer
from torch import Tensor, nn

from influent.collect import Collected, Collector, pack
from influent.compress import Compress
from influent.errors import DataError, LayerError, NumericsError
from influent.extract import frozen
from influent.layers import plan
from influent.task import CausalLM, Classification, Part, Task

LONG = {"text": "A long document that must be cut into several parts, since no context is as long as it is."}
CHAT = "{% for m in messages %}{{ m.content }}{% endfor %}"
DOCUMENTS = [*TEXTS, LONG, {"text": "x"}, {"prompt": LONG["text"], "completion": "Yes, it is: look at the end of it."}]
PARTLESS = 6  # DOCUMENTS[6] is one token


def collector(
    model: nn.Module, task: Task, text: str = "id", *, token_budget: int = 4096, skip_nonfinite: bool = False
) -> Collector:
    tracked = plan(model)
    bound = {block.name: Compress.parse(text).bind(block, 0) for block in tracked.blocks}
    return Collector(model, tracked, bound, task, token_budget, skip_nonfinite)


def language(max_length: int = 512, reduction: str = "sum") -> CausalLM:
    return CausalLM(make_tokenizer(chat=CHAT), max_length=max_length, reduction=reduction)


def collect(maker: Collector, examples: list[Any], **options: Any) -> Collected:
    with frozen(maker.model):
        return maker.collect(examples, name=lambda i: f"example {i}", **options)


def same(a: Collected, b: Collected, tolerance: float = 1e-5) -> None:
    assert a.skipped == b.skipped and a.num_split == b.num_split
    for key in a.rows:
        torch.testing.assert_close(a.rows[key], b.rows[key], rtol=tolerance, atol=tolerance)
    for x, y in ((a.loss, b.loss), (a.norm, b.norm), (a.tokens, b.tokens)):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("text", ["id", "mask:8x8 | sjlt:32"])
def test_a_batch_is_its_examples_one_by_one(kind, text):
    maker = collector(make_model(kind), language(60), text)
    together = collect(maker, DOCUMENTS)
    assert together.skipped == {"no target tokens": {PARTLESS}}
    for i, example in enumerate(DOCUMENTS):
        alone = collect(maker, [example])
        for key in maker.widths:
            torch.testing.assert_close(together.rows[key][i : i + 1], alone.rows[key], rtol=1e-4, atol=1e-5)
        assert float(alone.loss) == pytest.approx(float(together.loss[i]), rel=1e-5)
        assert float(alone.tokens) == float(together.tokens[i])


@pytest.mark.parametrize("max_length", [512, 10])
def test_token_budgets_change_the_batches_and_not_the_rows(max_length, monkeypatch):
    model = make_model("llama")
    shapes: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(lambda m, a, k: shapes.append(tuple(k["input_ids"].shape)), with_kwargs=True)
    expected = collect(collector(model, language(max_length), "gauss:4x4"), DOCUMENTS)
    for budget in (1, 100):
        shapes.clear()
        same(collect(collector(model, language(max_length), "gauss:4x4", token_budget=budget), DOCUMENTS), expected)
        assert all(b * t <= max(budget, t) for b, t in shapes)
        assert all(b == 1 for b, _ in shapes) or budget > 1


@pytest.mark.parametrize("text", ["id", "mask:6x5 | sjlt:12"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("max_length", [512, 9])
def test_a_document_in_parts_is_the_gradient_of_its_summed_loss(text, reduction, max_length):
    model, task = make_model("llama").double(), language(max_length, reduction)
    maker = collector(model, task, text, token_budget=50)

    def loss(i: int) -> Tensor | None:
        if i == len(DOCUMENTS):
            return None
        parts = task.parts(DOCUMENTS[i])
        if not parts:
            return sum(p.sum() for p in model.parameters()) * 0.0  # pyright: ignore[reportReturnType]
        return torch.stack([task.loss(model, task.collate([part]))[0] for part in parts]).sum()

    made = collect(maker, DOCUMENTS)
    exact = weight_gradients(model, maker.plan, loss)
    squares = torch.zeros(len(DOCUMENTS), dtype=torch.float64)
    for key, rows in made.rows.items():
        expected = compressed(maker.bound[key], exact[key])
        torch.testing.assert_close(rows.double(), expected, rtol=1e-4, atol=1e-5)
        squares += expected.square().sum(1)
    torch.testing.assert_close(made.norm.double(), squares.sqrt(), rtol=1e-5, atol=1e-6)
    losses = torch.stack([loss(i).detach() for i in range(len(DOCUMENTS))])  # pyright: ignore[reportOptionalMemberAccess]
    torch.testing.assert_close(made.loss.double(), losses, rtol=1e-5, atol=1e-6)
    counts = [sum(part.targets for part in task.parts(example)) for example in DOCUMENTS]
    assert made.tokens.tolist() == counts
    assert made.num_split == (0 if max_length == 512 else sum(len(task.parts(d)) > 1 for d in DOCUMENTS))


def test_a_query_differentiates_the_measure():
    class Twice(CausalLM):
        def measure(self, model, batch):
            return 2 * self.loss(model, batch)

    task = Twice(make_tokenizer(chat=CHAT))
    maker = collector(make_model("llama"), task)
    loss, measure = collect(maker, TEXTS), collect(maker, TEXTS, query=True)
    for key in loss.rows:
        torch.testing.assert_close(measure.rows[key], 2 * loss.rows[key])


def test_progress_is_the_share_of_parts_that_is_done():
    told: list[float] = []
    collect(collector(make_model("llama"), language(10), token_budget=40), DOCUMENTS, progress=told.append)
    assert told == sorted(told) and told[0] > 0 and told[-1] == 1.0 and len(told) > 5


def test_nothing_at_all_is_no_rows():
    made = collect(collector(make_model("llama"), language()), [])
    assert all(rows.shape == (0, rows.shape[1]) for rows in made.rows.values())
    only = collect(collector(make_model("llama"), language()), [{"text": "x"}])
    assert only.skipped == {"no target tokens": {0}} and not any(rows.any() for rows in only.rows.values())


POISON = "~"  # a token whose embedding is not a number
POISONED = [{"text": "fine"}, {"text": "a~b"}, {"text": "fine too"}, {"text": "long and fine ~"}, {"text": "the end"}]


def poisoned_model() -> nn.Module:
    model = make_model("llama")
    (token,) = make_tokenizer()(POISON)["input_ids"]
    with torch.no_grad():
        model.get_submodule("model.embed_tokens").weight[token] = float("nan")  # pyright: ignore
    return model


@pytest.mark.parametrize("budget", [1, 20, 4096])
def test_a_loss_that_is_not_finite_names_its_row(budget):
    with pytest.raises(NumericsError, match=r"^the loss of example [13] is not finite; .*--skip-nonfinite"):
        collect(collector(poisoned_model(), language(), token_budget=budget), POISONED)


@pytest.mark.parametrize("budget", [1, 20, 4096])
@pytest.mark.parametrize("max_length", [512, 5])
def test_skipped_rows_are_zero_and_counted_and_the_others_as_if_alone(budget, max_length):
    task = language(max_length)
    made = collect(collector(poisoned_model(), task, "gauss:4x4", token_budget=budget, skip_nonfinite=True), POISONED)
    assert made.skipped == {"not finite": {1, 3}}
    clean = collect(collector(make_model("llama"), task, "gauss:4x4"), POISONED)
    for values, expected in [*((made.rows[k], clean.rows[k]) for k in clean.rows), (made.loss, clean.loss)]:
        assert torch.equal(values[[1, 3]], torch.zeros_like(values[[1, 3]]))
        torch.testing.assert_close(values[[0, 2, 4]], expected[[0, 2, 4]], rtol=1e-4, atol=1e-5)
    assert made.tokens[[1, 3]].tolist() == made.norm[[1, 3]].tolist() == [0, 0]


def test_all_rows_of_a_batch_may_be_skipped():
    maker = collector(poisoned_model(), language(), skip_nonfinite=True)
    assert collect(maker, [POISONED[1]]).skipped == {"not finite": {0}}


class Roots:
    """sqrt|f(x)|: where f is 0 the loss is finite and its gradient is not."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0]).square().sum(1).sqrt()

    def measure(self, model: nn.Module, batch: Any) -> Tensor:
        return self.loss(model, batch)


def vectors() -> tuple[nn.Module, list[tuple[Tensor, int]]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 3, bias=False))
    x = torch.randn(6, 4)
    x[2] = 0
    return model, [(row, 0) for row in x]


@pytest.mark.parametrize("budget", [1, 4, 4096])
def test_a_gradient_that_is_not_finite_though_its_loss_is(budget):
    model, examples = vectors()
    with pytest.raises(NumericsError, match=r"^the gradient of example 2 in block 0 is not finite; "):
        collect(collector(model, Roots(), token_budget=budget), examples)
    made = collect(collector(model, Roots(), token_budget=budget, skip_nonfinite=True), examples)
    assert made.skipped == {"not finite": {2}}
    others = collect(collector(model, Roots()), examples[:2] + examples[3:])
    for key in made.rows:
        assert not made.rows[key][2].any()
        torch.testing.assert_close(made.rows[key][[0, 1, 3, 4, 5]], others.rows[key])
    assert made.loss[2] == made.norm[2] == 0


@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_lengths_neither_overflow_nor_vanish(scale):
    class Scaled(Roots):
        def loss(self, model, batch):
            return super().loss(model, batch) * scale

    model, examples = vectors()
    del examples[2]
    made, plain = (collect(collector(model, task), examples) for task in (Scaled(), Roots()))
    torch.testing.assert_close(made.norm / scale, plain.norm, rtol=1e-4, atol=0)


def test_examples_of_a_plain_data_set():
    model, examples = vectors()
    examples = [(x, i % 3) for i, (x, _) in enumerate(examples)]
    maker = collector(model, Classification())
    made = collect(maker, examples)

    def loss(i: int) -> Tensor | None:
        if i == len(examples):
            return None
        return nn.functional.cross_entropy(model(examples[i][0]), torch.tensor(examples[i][1]))

    exact = weight_gradients(model, maker.plan, loss)
    for key, rows in made.rows.items():
        torch.testing.assert_close(rows, exact[key])
    assert made.tokens.tolist() == [1.0] * 6


def test_labels_that_are_none_have_no_row():
    model, examples = vectors()
    labels = [0, -100, 2, torch.tensor(-100), 1, 1]
    maker = collector(model, Classification())
    made = collect(maker, [(x, label) for (x, _), label in zip(examples, labels, strict=True)])
    kept = [0, 2, 4, 5]
    plain = collect(maker, [(examples[i][0], labels[i]) for i in kept])
    assert made.skipped == {"no target tokens": {1, 3}} and made.tokens.tolist() == [1, 0, 1, 0, 1, 1]
    for key, rows in made.rows.items():
        torch.testing.assert_close(rows[kept], plain.rows[key])
        assert not rows[[1, 3]].any()
    with pytest.raises(DataError, match="example 0: its label is -1, expected a class from 0 on, or -100 for none"):
        collect(maker, [(examples[0][0], -1)])


def test_tasks_that_are_wrong_are_named():
    class Mean(Roots):
        def loss(self, model, batch):
            return super().loss(model, batch).mean()

    class Constant(Roots):
        def loss(self, model, batch):
            return torch.ones(len(batch[0]))

    model, examples = vectors()
    with pytest.raises(LayerError, match=r"loss has shape \(\), expected one scalar per example: \(6,\)"):
        collect(collector(model, Mean()), examples)
    with pytest.raises(LayerError, match="does not depend on any tracked layer"):
        collect(collector(model, Constant()), examples)
    with pytest.raises(DataError, match="a batch holds a str"):
        collect(collector(model, Roots()), [(x, "label") for x, _ in examples])


def test_nested_batches_reach_the_model():
    class Nested(Roots):
        def loss(self, model, batch):
            return super().loss(model, (batch["a"]["x"], batch["b"]))

    model, examples = vectors()
    del examples[2]
    made = collect(collector(model, Nested()), [{"a": {"x": x}, "b": [i]} for x, i in examples])
    same(made, collect(collector(model, Roots()), examples))


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(1, 200))
def test_batches_hold_every_part_once_within_the_budget(lengths, budget):
    queue = [(i, Part(None, length, 1)) for i, length in enumerate(lengths)]
    batches = pack(queue, budget)
    assert sorted(i for batch in batches for i, _ in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(part.length for _, part in batch)
        assert len(batch) == 1 or len(batch) * longest <= budget
    in_order = [part.length for batch in batches for _, part in batch]
    assert in_order == sorted(lengths, reverse=True)
    assert pack(queue, budget) == batches

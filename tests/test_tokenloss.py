"""Cross-entropy at target tokens equals PyTorch's, in value and gradient."""

import pytest
import torch
from torch.nn import functional

from influent import tokenloss
from influent.task import Classification
from influent.tokenloss import token_losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("targets", [0, 1, 5, 12])
def test_value_and_gradient_equal_cross_entropy(dtype, targets, monkeypatch):
    monkeypatch.setattr(tokenloss, "CPU_ENTRIES", 3 * 50)  # several pieces
    torch.manual_seed(targets)
    logits = (5 * torch.randn(12, 50)).to(dtype).requires_grad_()
    at = torch.randperm(12)[:targets].sort().values
    labels, weight = torch.randint(0, 50, (targets,)), torch.randn(targets)
    exact = logits.detach().double().requires_grad_()
    expected = functional.cross_entropy(exact[at], labels, reduction="none")
    got = token_losses(logits, at, labels)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    (expected @ weight.double()).backward()
    (got @ weight.to(got.dtype)).backward()
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=tolerance, atol=tolerance)


def test_large_logits_do_not_overflow():
    logits = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    loss = token_losses(logits, torch.tensor([0]), torch.tensor([1]))
    loss.sum().backward()
    assert loss.item() == 2e4
    torch.testing.assert_close(logits.grad, torch.tensor([[1.0, -1.0, 0.0]]))


@pytest.mark.parametrize("gap", [5.0, 16.0, 25.0, 60.0])
def test_a_confident_prediction_keeps_its_gradient(gap):
    logits = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([1, 4, 0, 9])
    logits[torch.arange(4), labels] += gap
    exact = logits.double().requires_grad_()
    functional.softplus(
        exact.scatter(1, labels[:, None], -torch.inf).logsumexp(1) - exact[range(4), labels]
    ).sum().backward()
    for loss in (
        lambda x: token_losses(x, torch.arange(4), labels),
        lambda x: Classification().loss(torch.nn.Identity(), (x, labels)),
    ):
        found = logits.clone().requires_grad_()
        loss(found).sum().backward()
        torch.testing.assert_close(found.grad.double(), exact.grad, rtol=2e-5, atol=0)


def test_infinite_logits_are_no_small_loss():
    logits = torch.tensor([[torch.inf, 0.0], [0.0, torch.inf]])
    assert not Classification().loss(torch.nn.Identity(), (logits, torch.tensor([0, 0]))).isfinite().any()

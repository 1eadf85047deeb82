"""Cross-entropy at the target tokens only, without a second array of the size of the logits in the forward pass.

PyTorch's own writes log-probabilities for every position and reads them again; with a vocabulary of tens of thousands
that is a tenth of a small model's pass. Here a few positions are worked on at a time, while they are in the cache, and
only the gradient is written. Not here: which tokens are targets (task.py).
"""

from typing import Any

import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor

# Entries of the logits worked on at once: small enough for a CPU's cache, large enough to fill an accelerator.
CPU_ENTRIES, DEVICE_ENTRIES = 2**19, 2**26


def token_losses(logits: Float[Tensor, "n V"], at: Int[Tensor, " m"], labels: Int[Tensor, " m"]) -> Float[Tensor, " m"]:
    """-log softmax(logits[at])[labels], in float32 or wider; the gradient is zero at other positions."""
    return _TokenLosses.apply(logits, at, labels)


def token_margins(logits: Float[Tensor, "n V"], labels: Integer[Tensor, " n"]) -> Float[Tensor, " n"]:
    """log(p / (1 - p)) of the labels: their logit less the log-sum-exp of all others, which does not lose 1 - p to
    rounding where p is near 1."""
    x = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    at = labels.long().unsqueeze(1)
    return x.gather(1, at).squeeze(1) - x.scatter(1, at, float("-inf")).logsumexp(1)


def margin_losses(margins: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """-log p, from log(p / (1 - p)): its gradient keeps the precision of 1 - p. NaN where the margin is infinite."""
    return torch.nn.functional.softplus(-margins) + 0 * margins


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, at: Tensor, labels: Tensor) -> Tensor:
        logsums, picked = [], []
        for places, wanted in _pieces(logits, at, labels):
            x = _rows(logits, places)
            logsums.append(x.logsumexp(1))
            picked.append(x.gather(1, wanted.unsqueeze(1)).squeeze(1))
        if not logsums:
            ctx.save_for_backward(logits, at, labels, logits.new_zeros(0))
            return logits.new_zeros(0, dtype=torch.promote_types(logits.dtype, torch.float32))
        logsum = torch.cat(logsums)
        ctx.save_for_backward(logits, at, labels, logsum)
        return logsum - torch.cat(picked)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        logits, at, labels, logsum = ctx.saved_tensors
        out = torch.zeros_like(logits)
        done = 0
        for places, wanted in _pieces(logits, at, labels):
            end = done + len(places)
            x = _rows(logits, places).sub_(logsum[done:end, None]).exp_()
            own = (torch.arange(len(wanted), device=x.device), wanted)
            x[own] = 0
            x[own] = -x.sum(1)  # p - 1, which subtraction would lose to rounding where p is near 1
            out[places] = x.mul_(grads[0][done:end, None]).to(out.dtype)
            done = end
        return out, None, None


def _pieces(logits: Tensor, at: Tensor, labels: Tensor):
    entries = CPU_ENTRIES if logits.device.type == "cpu" else DEVICE_ENTRIES
    step = max(1, entries // logits.shape[1])
    return zip(at.split(step), labels.split(step), strict=True) if len(at) else ()


def _rows(logits: Tensor, places: Tensor) -> Tensor:
    """A copy of some rows, never narrower than float32."""
    rows = logits.index_select(0, places)
    return rows.float() if rows.dtype in (torch.bfloat16, torch.float16) else rows

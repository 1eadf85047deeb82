"""Labels drawn from a model's own predictions, with words of rng.py: the true Fisher matrix is the mean over them.

The label is where the cumulated probabilities pass a uniform number, in float64, so that the same words give the same
label whatever stands beside the position in its batch (but for a number that falls on a boundary within rounding).
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

ENTRIES = 2**22  # of the probabilities held at once


def draw_labels(logits: Float[Tensor, "n V"], uniforms: Float[Tensor, " n"]) -> Int[Tensor, " n"]:
    """One label [n] a row of logits, by inverting the distribution function at `uniforms` in [0, 1)."""
    return draw_many(logits, uniforms[:, None])[:, 0]


def draw_many(logits: Float[Tensor, "n V"], uniforms: Float[Tensor, "n k"]) -> Int[Tensor, "n k"]:
    """Several labels a row of logits, independent of each other."""
    step, found = max(1, ENTRIES // logits.shape[1]), []
    for rows, levels in zip(logits.detach().split(step), uniforms.split(step), strict=True):
        cumulated = rows.double().softmax(dim=1).cumsum(dim=1)
        levels = levels.to(cumulated) * cumulated[:, -1:]
        found.append(torch.searchsorted(cumulated, levels.contiguous(), right=True))
    labels = torch.cat(found) if found else torch.empty(uniforms.shape, dtype=torch.int64, device=logits.device)
    return labels.clamp(max=logits.shape[1] - 1)

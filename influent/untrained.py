"""The baseline that a student must beat: the small model's own LinFiK, with no training and no label.

What the small model's gradients, compressed to 256 numbers a layer, say of a row and a target. It takes gradients, so
it is measured beside the ladder and is no rung to appraise by. Not here: the ladder (distilling.py).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from influent import solving
from influent.attach import Run, Setting, attach
from influent.solving import Asked
from influent.target import Target, direction

COMPRESS = "rademacher:16x16"
BATCH = 64  # rows whose gradients are held together


def own_values(
    model: str,
    rows: Sequence[Mapping[str, Any]],
    target: Target,
    *,
    normalize: str,
    max_length: int,
    token_budget: int,
    device: str | None,
    compress: str = COMPRESS,
) -> np.ndarray:
    """LinFiK of rows [n] at the model of a folder; a row without a token to predict is worth 0."""
    setting = Setting(compress=compress, max_length=max_length)
    found = []
    with attach(model, None, setting, Run(token_budget=token_budget, device=device)) as attached:
        queries = solving.gradients(attached, Asked(target.examples))
        asked = direction({key: q.cpu() for key, q in queries.items()}, normalize)
        for lo in range(0, len(rows), BATCH):
            made = attached.collector.collect(rows[lo : lo + BATCH], name=lambda i, lo=lo: f"row {lo + i}")
            pairs = [(made.rows[key].cpu().double(), q[0].double()) for key, q in asked.items()]
            products = torch.stack([row @ q for row, q in pairs]).sum(0)
            squares = torch.stack([row.square().sum(1) for row, _ in pairs]).sum(0)
            scale = torch.where(squares > 0, squares.rsqrt(), 0.0) if normalize == "cosine" else 1.0
            found.append(products * scale)
    return torch.cat(found).numpy()

"""Slow, dense, float64 and obviously right: the numbers that curvature, scores, ranks and influence must have.

Legend: a block's rows G [N, K]; queries q [Q, K]; lambda `damping`. Nothing here is shared with the package.
"""

import torch
from torch import Tensor


def fisher(rows: Tensor) -> Tensor:
    """(1/N) sum_i g_i g_i^T, an example at a time, [K, K]."""
    return torch.stack([torch.outer(g, g) for g in rows.double()]).mean(dim=0)


def damped_inverse(rows: Tensor, damping: float) -> Tensor:
    """(F + lambda I)^-1 by a dense inverse, [K, K]."""
    return torch.linalg.inv(fisher(rows) + damping * torch.eye(rows.shape[1], dtype=torch.float64))


def relative(rows: Tensor, value: float) -> float:
    """lambda for damping relative to the mean of the min(N, K) largest eigenvalues of F."""
    eigenvalues = torch.linalg.eigvalsh(fisher(rows)).flip(0)[: min(rows.shape)]
    return value * float(eigenvalues.mean())


def effective_dimension(rows: Tensor, damping: float) -> float:
    eigenvalues = torch.linalg.eigvalsh(fisher(rows)).clamp(min=0)
    return float((eigenvalues / (eigenvalues + damping)).sum())


def scores(rows: dict[str, Tensor], queries: dict[str, Tensor]) -> Tensor:
    """sum over blocks of <q, g_i>, [Q, N]."""
    return torch.stack([queries[key].double() @ rows[key].double().T for key in rows]).sum(dim=0)


def norms(rows: dict[str, Tensor]) -> Tensor:
    """The length of each row over all blocks, [N]."""
    return torch.cat([block.double() for block in rows.values()], dim=1).norm(dim=1)


def self_influence(rows: dict[str, Tensor], inverses: dict[str, Tensor]) -> Tensor:
    """sum over blocks of g_i^T (F + lambda I)^-1 g_i, [N]."""
    total = torch.zeros(len(next(iter(rows.values()))), dtype=torch.float64)
    for key, block in rows.items():
        total += torch.stack([g @ inverses[key] @ g for g in block.double()])
    return total


def ranked(scores: Tensor, k: int, largest: bool) -> tuple[list[list[int]], list[list[float]]]:
    """Rows and scores of the k best columns of each row of `scores` by a full sort; equal scores by column number."""
    rows, values = [], []
    for row in scores.tolist():
        order = sorted(range(len(row)), key=lambda i: (-row[i] if largest else row[i], i))[:k]
        rows.append(order)
        values.append([row[i] for i in order])
    return rows, values


def least_squares(x: Tensor, y: Tensor) -> Tensor:
    return torch.linalg.lstsq(x, y[:, None], driver="gelsd").solution[:, 0]


def leave_one_out(x: Tensor, y: Tensor, queries: Tensor) -> Tensor:
    """How much each example raises each query's prediction, [Q, N]: prediction fitted with it minus without it, by
    fitting N + 1 linear regressions."""
    complete = queries @ least_squares(x, y)
    without = []
    for i in range(len(x)):
        others = torch.arange(len(x)) != i
        without.append(queries @ least_squares(x[others], y[others]))
    return complete[:, None] - torch.stack(without, dim=1)


def leave_one_out_by_hat_matrix(x: Tensor, y: Tensor, queries: Tensor) -> Tensor:
    """The same in closed form: x_q^T (X^T X)^-1 x_i r_i / (1 - h_ii)."""
    inverse = torch.linalg.inv(x.T @ x)
    residuals = y - x @ least_squares(x, y)
    leverages = (x @ inverse @ x.T).diagonal()
    return queries @ inverse @ x.T * (residuals / (1 - leverages))

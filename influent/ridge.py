"""Ridge regression in closed form, its penalty chosen by leave-one-out, and calibration of what it predicts.

Everything is float64 and exact: one eigendecomposition of the smaller Gram matrix serves every penalty and every
left-out row. Not here: which features (features.py, lexical.py) or labels (distilling.py).
"""

from dataclasses import dataclass

import numpy as np

from influent.errors import DataError

PENALTIES = 10.0 ** np.arange(-6, 5)  # of the mean eigenvalue of the features' Gram matrix


@dataclass(frozen=True, slots=True, eq=False)
class Ridge:
    """y ~ ((x - mean) / scale) . weights + bias; features that never vary have weight 0."""

    mean: np.ndarray  # [d]
    scale: np.ndarray  # [d]
    weights: np.ndarray  # [d]
    bias: float
    penalty: float

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Predictions of rows x [n, d], float64 [n]."""
        return ((x.astype(np.float64) - self.mean) / self.scale) @ self.weights + self.bias


def fit(x: np.ndarray, y: np.ndarray, *, standardise: bool = True) -> tuple[Ridge, np.ndarray]:
    """The ridge regression of y [n] on x [n, d] whose leave-one-out error is least, and its left-out predictions [n].

    Left-out residuals are r_i / (1 - h_i) with h the diagonal of the hat matrix, the mean's own 1/n included (Golub,
    Heath and Wahba, 1979). `standardise` divides features by their standard deviation.
    """
    n = len(y)
    if n < 3:
        raise DataError(f"a regression needs three labels at least, got {n}")
    x, y = x.astype(np.float64), y.astype(np.float64)
    mean, bias = x.mean(axis=0), float(y.mean())
    spread = x.std(axis=0)
    scale = np.where(spread > 1e-12 * (1 + np.abs(mean)), spread if standardise else 1.0, np.inf)
    centred = (x - mean) / scale
    left, values = _spectrum(centred)
    projected = left.T @ (y - bias)  # [r]
    unit = values.sum() / n or 1.0
    best: tuple[float, float, np.ndarray] | None = None
    for penalty in PENALTIES * unit:
        shrink = values / (values + penalty)
        fitted = left @ (shrink * projected)
        leverage = 1 / n + (left**2 @ shrink)
        out = (y - bias - fitted) / np.maximum(1 - leverage, 1e-9)
        error = float((out**2).mean())
        if best is None or error < best[0]:
            best = error, float(penalty), y - out
    assert best is not None
    _, penalty, held_out = best
    weights = centred.T @ (left @ (projected / (values + penalty)))
    return Ridge(mean, scale, weights, bias, penalty), held_out


def _spectrum(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Left singular vectors [n, r] of x and the squares of its singular values [r], those of rounding left out."""
    if len(x) <= x.shape[1]:
        values, left = np.linalg.eigh(x @ x.T)
    else:
        values, right = np.linalg.eigh(x.T @ x)
        left = x @ right / np.sqrt(np.maximum(values, 1e-300))
    kept = values > 1e-12 * max(float(values.max(initial=0.0)), 1e-300)
    return left[:, kept], values[kept]


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """A rising piecewise linear function through knots, continued beyond them by their outer slopes."""

    x: np.ndarray  # [k] rising
    y: np.ndarray  # [k] not falling

    def __call__(self, predicted: np.ndarray) -> np.ndarray:
        out = np.interp(predicted, self.x, self.y)
        if len(self.x) > 1:
            first, last = (np.diff(self.y[s]) / np.diff(self.x[s]) for s in (slice(2), slice(-2, None)))
            out += np.minimum(predicted - self.x[0], 0) * first + np.maximum(predicted - self.x[-1], 0) * last
        return out


def linear(predicted: np.ndarray, y: np.ndarray) -> Calibration:
    """The least-squares line of y on predictions that did not see it; flat if the line would fall."""
    spread = float(predicted.std())
    slope = max(0.0, float(np.cov(predicted, y, bias=True)[0, 1]) / spread**2) if spread > 0 else 0.0
    ends = np.array([predicted.min(), predicted.max()]) if spread > 0 else np.array([0.0, 1.0])
    return Calibration(ends, y.mean() + slope * (ends - predicted.mean()))


def isotonic(predicted: np.ndarray, y: np.ndarray) -> Calibration:
    """The rising step function of least squares by pooling adjacent violators (Barlow et al., 1972), its steps joined
    at their middles so that different predictions stay different."""
    order = np.argsort(predicted, kind="stable")
    blocks: list[list[float]] = []  # mean of y, weight, mean of x
    for place in order.tolist():
        blocks.append([float(y[place]), 1.0, float(predicted[place])])
        while len(blocks) > 1 and blocks[-2][0] >= blocks[-1][0]:
            (b, m, q), (a, n, p) = blocks.pop(), blocks.pop()
            blocks.append([(a * n + b * m) / (n + m), n + m, (p * n + q * m) / (n + m)])
    x = np.array([block[2] for block in blocks])
    keep = np.concatenate([[True], np.diff(x) > 0])
    return Calibration(x[keep], np.array([block[0] for block in blocks])[keep])


CALIBRATIONS = {"linear": linear, "isotonic": isotonic}

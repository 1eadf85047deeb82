"""Ridge regression against its normal equations and refits without each row; calibration against scipy."""

import numpy as np
import pytest
from scipy.optimize import isotonic_regression

from influent.errors import DataError
from influent.lexical import Bm25, TfIdf
from influent.ridge import Ridge, fit, isotonic, linear


def data(n: int, d: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d)) * rng.uniform(0.1, 10, d) + rng.normal(size=d)
    return x, x[:, 0] / 5 + rng.normal(size=n) + 3


def solve(x: np.ndarray, y: np.ndarray, like: Ridge) -> np.ndarray:
    """Weights and bias by the normal equations, with the same standardisation and penalty."""
    z = (x - like.mean) / like.scale
    z1 = np.concatenate([z, np.ones((len(z), 1))], axis=1)
    penalty = like.penalty * np.eye(z1.shape[1])
    penalty[-1, -1] = 0
    return np.linalg.solve(z1.T @ z1 + penalty, z1.T @ y)


@pytest.mark.parametrize(("n", "d"), [(30, 5), (12, 40)])
def test_weights_and_left_out_predictions(n, d):
    x, y = data(n, d)
    ridge, left_out = fit(x, y)
    full = solve(x, y, ridge)
    assert np.allclose(ridge(x), (x - ridge.mean) / ridge.scale @ full[:-1] + full[-1])
    for i in range(n):
        others = np.arange(n) != i
        w = solve(x[others], y[others], ridge)
        assert left_out[i] == pytest.approx((x[i] - ridge.mean) / ridge.scale @ w[:-1] + w[-1], rel=1e-6)


def test_a_feature_that_never_varies_has_no_weight():
    x, y = data(20, 3)
    x[:, 1] = 7.5
    ridge, _ = fit(x, y)
    assert ridge.weights[1] == 0
    x[:, 1] = 1e6
    assert np.isfinite(ridge(x)).all()
    with pytest.raises(DataError):
        fit(x[:2], y[:2])


def test_noise_alone_is_shrunk_to_the_mean():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(60, 40)), rng.normal(size=60)
    assert fit(x, y)[0](x).std() < 0.3 * y.std()


def test_linear_calibration_is_least_squares_and_goes_on():
    rng = np.random.default_rng(2)
    p = rng.normal(size=50)
    y = 2 * p + 1 + rng.normal(size=50) / 10
    got = linear(p, y)
    slope, bias = np.polyfit(p, y, 1)
    for at in (-9.0, 0.0, 0.3, 9.0):
        assert got(np.array([at]))[0] == pytest.approx(slope * at + bias)
    assert np.ptp(linear(p, -y)(p)) == pytest.approx(0)
    assert linear(np.ones(5), np.arange(5.0))(np.array([1.0])) == pytest.approx(2)


def test_isotonic_calibration_is_scipys_at_the_middle_of_each_step():
    rng = np.random.default_rng(3)
    p = rng.normal(size=80)
    y = np.tanh(p) + rng.normal(size=80) / 3
    order = np.argsort(p)
    expected = isotonic_regression(y[order]).x
    got = isotonic(p, y)
    for value, at in zip(got.y, got.x, strict=True):
        mine = np.isclose(expected, value)
        assert mine.any()
        assert at == pytest.approx(p[order][mine].mean())
    assert (np.diff(got(np.sort(rng.normal(size=200) * 3))) >= -1e-12).all()


def test_words_tell_topics_apart():
    texts = [f"the {word} of number {i}" for i in range(30) for word in ("river", "money")]
    y = np.array([1.0, -1.0] * 30)
    x = TfIdf.fit(texts)(texts)
    assert np.allclose(np.linalg.norm(x, axis=1), 1, atol=1e-5)
    ridge, left_out = fit(x, y, standardise=False)
    assert np.corrcoef(left_out, y)[0, 1] > 0.95
    assert TfIdf.fit(texts)([""]).sum() == 0
    assert ridge.weights.shape == (x.shape[1],)


def test_bm25_features_are_the_baselines_scores():
    from influent import baselines

    class Rows:
        def texts(self):
            return texts

    texts = ["The river of Chad", "money, money in Cuba", "a river and a river bank", ""]
    queries = ["which river", "money in the bank"]
    got = Bm25.fit(texts, queries)(texts)
    expected = np.zeros((2, 4))
    for q, found in enumerate(baselines.bm25(Rows(), queries, k=4)):
        for row, value in found:
            expected[q, row] = value
    assert np.allclose(got[:, 0], expected.max(0), rtol=1e-5)
    assert np.allclose(got[:, 1], expected.mean(0), rtol=1e-5)

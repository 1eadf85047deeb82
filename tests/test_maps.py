"""Every map is the dense matrix that its random stream says, whatever route computes it, and is unbiased.

One table of kinds, one of sizes; a new kind is a row and a branch of `dense`, which is written from the streams alone.
"""

import itertools
import math

import numpy as np
import pytest
import scipy.linalg
import torch

from influent import maps
from influent.errors import SpecError
from influent.maps import SJLT, Basis, Map, draw, hadamard
from influent.rng import Stream

KINDS = {
    "mask": ("mask", {}),
    "gauss": ("gauss", {}),
    "rademacher": ("rademacher", {}),
    "sjlt": ("sjlt", {}),
    "sjlt-iid": ("sjlt", {"law": "iid"}),
    "sjlt-2": ("sjlt", {"nonzeros": 2}),
    "sjlt-3-iid": ("sjlt", {"nonzeros": 3, "law": "iid"}),
    "fjlt": ("fjlt", {}),
    "rotate": ("rotate", {}),
}
# Odd, one, powers of two and their neighbours; k = 1, a divisor of p, not a divisor; k >= p is the identity.
SIZES = [
    (1, 1), (1, 3), (5, 5), (4, 9), (2, 1), (7, 1), (7, 3), (7, 6), (8, 3), (16, 4), (17, 4), (33, 32), (128, 10),
    (130, 65),
]  # fmt: skip
CASES = [
    (name, p, k)
    for name, (_, options) in KINDS.items()
    for p, k in SIZES
    if k >= min(p, options.get("nonzeros", 1)) and name != "rotate"
]
CASES += [("rotate", p, p) for p in (1, 2, 3, 5, 7, 8, 12, 16, 17, 31, 33, 100, 128, 130)]
HASHES = [name for name in KINDS if name.startswith("sjlt")]
table = pytest.mark.parametrize("name, p, k", CASES)
kinds = pytest.mark.parametrize("name", KINDS)


def make(name: str, p: int, k: int, *, seed: int = 0, block: str = "block", side: str = "in/0") -> Map:
    kind, options = KINDS[name]
    return draw(kind, p, k, stream=Stream(seed, block, kind, side), **options)


def dense(name: str, p: int, k: int, *, seed: int = 0, block: str = "block", side: str = "in/0") -> np.ndarray:
    """The scaled matrix [p, k] in float64, from the definitions and the random streams, without maps.py."""
    kind, options = KINDS[name]
    stream = Stream(seed, block, kind, side)
    if kind == "rotate":
        return rotation(p, stream)
    if k >= p:
        return np.eye(p)
    if kind == "mask":
        return np.eye(p)[:, stream.subset(p, k)] * math.sqrt(p / k)
    if kind == "gauss":
        return stream.normals(p * k).astype(float).reshape(p, k) / math.sqrt(k)
    if kind == "rademacher":
        return stream.signs(p * k).astype(float).reshape(p, k) / math.sqrt(k)
    if kind == "fjlt":
        width = 2 ** math.ceil(math.log2(p))
        signs = Stream(seed, block, "fjlt-signs", side).signs(p).astype(float)
        return signs[:, None] * scipy.linalg.hadamard(width)[:p, stream.subset(width, k)] / math.sqrt(k)
    law, copies = options.get("law", "balanced"), options.get("nonzeros", 1)
    parts = []
    for copy in range(copies):
        size = (k + copy) // copies  # the copies cut the k outputs into ranges
        keyed = Stream(seed, block, f"sjlt-{law}", f"{side}/{copy}")
        if law == "iid":
            bucket = keyed.buckets(p, size)
        else:
            bucket = np.empty(p, dtype=int)
            for place, coordinate in enumerate(keyed.permutation(p)):
                bucket[coordinate] = place % size
        signs = Stream(seed, block, "sjlt-signs", f"{side}/{copy}").signs(p)
        parts.append(np.eye(size)[bucket] * signs[:, None])
    return np.concatenate(parts, axis=1) / math.sqrt(copies)


def rotation(p: int, stream: Stream) -> np.ndarray:
    """[p, p]: signs, then a Hadamard matrix on the first and one on the last 2^floor(log2 p) coordinates, each
    after signs of its own; for other widths twice, with a permutation between."""
    width = 2 ** int(math.log2(p))
    block = scipy.linalg.hadamard(width) / math.sqrt(width)
    first, last = (np.eye(p) for _ in range(2))
    first[:width, :width] = block
    last[p - width :, p - width :] = block
    signs = Stream(stream.seed, stream.block, "rotate-signs", stream.side).signs(4 * p).astype(float)
    if width == p:
        return signs[:p, None] * first
    d = [np.diag(part) for part in signs.reshape(4, p)]
    middle = np.eye(p)[:, stream.permutation(p)]
    return d[0] @ first @ d[1] @ last @ middle @ d[2] @ first @ d[3] @ last


def data(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(got: torch.Tensor, expected, dtype: torch.dtype = torch.float64) -> None:
    tolerance = 1e-6 if dtype == torch.float64 else 2e-5  # gauss entries are float32 numbers
    torch.testing.assert_close(got.double(), torch.as_tensor(expected).double(), rtol=tolerance, atol=tolerance)


@table
def test_a_map_is_its_dense_matrix(name, p, k):
    m, matrix = make(name, p, k), torch.from_numpy(dense(name, p, k))
    assert isinstance(m, Map)
    assert (m.p, m.k) == (p, min(p, k)) == tuple(matrix.shape)
    shapes = [(p,), (3, p), (2, 3, p), (0, p), (2, 1, 2, p)]
    for shape, dtype in itertools.product(shapes, [torch.float64, torch.float32]):
        x = data(*shape).to(dtype)
        y = m(x)
        assert y.dtype == dtype and y.shape == (*shape[:-1], m.k)
        close(y, x.double() @ matrix, dtype)
        close(m.raw(x) * m.scale, y, dtype)
    odd = data(p, 4).T  # not contiguous
    close(m(odd), odd @ matrix)


@table
def test_a_map_is_linear_and_leaves_its_input_alone(name, p, k):
    m, x, y = make(name, p, k), data(4, p), data(4, p, seed=1)
    before = x.clone()
    torch.testing.assert_close(m(2.5 * x - y), 2.5 * m(x) - m(y))
    assert torch.equal(x, before)


@table
def test_one_hot_input_without_forming_it(name, p, k):
    m, matrix = make(name, p, k), dense(name, p, k)
    for dtype in (torch.int64, torch.int32):
        ids = torch.randint(0, p, (3, 4), generator=torch.Generator().manual_seed(0), dtype=dtype)
        got = m.onehot(ids)
        assert got.shape == (3, 4, m.k)
        close(got * m.scale, matrix[ids.numpy()], torch.float32)


@table
def test_the_ones_column_of_a_bias_without_forming_it(name, p, k):
    m, matrix = make(name, p, k), torch.from_numpy(dense(name, p, k))
    for dtype in [torch.float64, torch.float32] + [torch.bfloat16] * (name == "mask"):  # a mask copies 16 bits
        x = data(2, 3, p - 1).to(dtype)
        got = m.affine(x)
        assert got.dtype == dtype
        with_one = torch.cat([x.double(), torch.ones(2, 3, 1)], dim=-1)
        close(got.double() * m.scale, with_one @ matrix, torch.float32)


@pytest.mark.parametrize("name, p, k", [case for case in CASES if case[0] in HASHES and case[2] < case[1]])
def test_sparse_input_is_the_dense_one(name, p, k):
    m, matrix = make(name, p, k), torch.from_numpy(dense(name, p, k))
    index = torch.randint(0, p, (5, 6), generator=torch.Generator().manual_seed(0))  # places repeat: they add up
    value = data(5, 6)
    x = torch.zeros(5, p, dtype=torch.float64).scatter_add_(1, index, value)
    rows = torch.arange(5).repeat_interleave(6)
    coo = torch.sparse_coo_tensor(torch.stack([rows, index.flatten()]), value.flatten(), (5, p), check_invariants=True)
    assert isinstance(m, SJLT)
    close(m.sparse(index, value) * m.scale, x @ matrix)
    close(m(coo), x @ matrix)
    close(m(x.float().to_sparse()), x @ matrix, torch.float32)


def test_sparse_input_costs_its_entries_and_not_the_width():
    p = 2**18
    m = draw("sjlt", p, 64, stream=Stream(0, "block", "sjlt", "flat/0"))
    assert isinstance(m, SJLT)
    index = torch.arange(0, p, p // 32).expand(4, -1)
    with torch.profiler.profile(profile_memory=True) as profile:
        m.sparse(index, torch.ones(index.shape))
    assert max(event.self_cpu_memory_usage for event in profile.events()) < 10_000


@pytest.mark.parametrize("p", [1, 2, 3, 4, 5, 24, 64, 100, 577, 1023])
def test_a_rotation_is_orthonormal(p):
    rotate = make("rotate", p, p)
    matrix = rotate(torch.eye(p, dtype=torch.float64))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(p, dtype=torch.float64), rtol=0, atol=1e-14)
    assert rotate.scale == 1.0 and (rotate.p, rotate.k) == (p, p)
    x = data(5, p).float()
    torch.testing.assert_close(rotate(x).norm(dim=1), x.norm(dim=1))


@pytest.mark.parametrize("p", [64, 65, 96, 127, 577, 768, 1000, 1023])
@pytest.mark.parametrize("where", [slice(0, 8), slice(-8, None)])
def test_a_rotation_spreads_a_few_coordinates_over_all(p, where):
    """The energy of eight coordinates, over 64 rotations, is nearly the same in every coordinate: few bits suffice."""
    energy = torch.stack([make("rotate", p, p, seed=s)(torch.eye(p)[where]).square().mean(0) for s in range(64)]).mean(
        0
    )
    assert energy.max() < 2 / p and energy.min() > 0.5 / p, (energy.max() * p, energy.min() * p)


def test_a_basis_is_its_matrix():
    matrix = data(7, 3)
    m = Basis(7, 3, matrix)
    x = data(2, 4, 6)
    with_one = torch.cat([x, torch.ones(2, 4, 1)], dim=-1)
    assert isinstance(m, Map) and m.scale == 1.0
    close(m(with_one), with_one @ matrix)
    close(m.affine(x), with_one @ matrix)
    close(m.onehot(torch.tensor([[6, 0], [3, 3]])), matrix[torch.tensor([[6, 0], [3, 3]])], torch.float32)
    close(m.to(torch.device("cpu"))(with_one.bfloat16()), with_one.bfloat16().double() @ matrix, torch.float32)


@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_input_is_computed_in_float32(name, dtype):
    x = data(3, 33).to(dtype)
    y = make(name, 33, 8)(x)
    assert y.dtype == torch.float32
    assert torch.equal(y, make(name, 33, 8)(x.float()))


@kinds
def test_a_map_is_a_pure_function_of_its_key(name):
    if name == "rotate":
        assert torch.equal(make(name, 33, 8)(data(33)), make(name, 33, 33)(data(33)))
    x = data(2, 33)
    torch.manual_seed(1)
    first = [make(name, 33, 8), make(name, 20, 8), make(name, 33, 8, block="other")]
    torch.manual_seed(2)
    np.random.seed(3)
    again = [make(name, 33, 8, block="other"), make(name, 20, 8), make(name, 33, 8)][::-1]
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a(x[:, : a.p]), b(x[:, : b.p]))
    here = first[0](x)
    assert torch.equal(first[0].to(torch.device("cpu"))(x), here)
    for other in [make(name, 33, 8, seed=1), make(name, 33, 8, block="b"), make(name, 33, 8, side="out/0")]:
        assert not torch.allclose(other(x), here)
    for stage in [make(name, 33, 8, side="in/1"), make(name, 33, 8, side="flat/0")]:
        assert not torch.allclose(stage(x), here)


def products(name: str, p: int, k: int, x: torch.Tensor, y: torch.Tensor, seeds: int) -> np.ndarray:
    """<Px, Py> under each of `seeds` maps."""
    drawn = (make(name, p, k, seed=seed)(torch.stack([x, y])) for seed in range(seeds))
    return np.array([float(a @ b) for a, b in drawn])


def exact_variance(name: str, p: int, k: int, x: np.ndarray, y: np.ndarray) -> float | None:
    """Var <Px, Py> in closed form, where there is one."""
    z, squares = x * y, (x @ x) * (y @ y)
    crossed = squares + (x @ y) ** 2 - 2 * (z @ z)  # sum over i < j of (x_i y_j + x_j y_i)^2
    if name in HASHES:
        copies = KINDS[name][1].get("nonzeros", 1)
        sizes = [(k + copy) // copies for copy in range(copies)]
        if "iid" in name:  # two coordinates share one of n buckets with probability 1 / n
            return crossed * sum(1 / n for n in sizes) / copies**2
        if any(p % n for n in sizes):
            return None
        return crossed * sum((p - n) / (n * (p - 1)) for n in sizes) / copies**2
    return {
        "mask": p / k * (p - k) / (p - 1) * ((z - z.mean()) ** 2).sum(),  # sampling without replacement
        "gauss": (squares + (x @ y) ** 2) / k,
        "rademacher": crossed / k,
    }.get(name)


@kinds
@pytest.mark.parametrize("p, k", [(24, 8), (13, 5)])
def test_inner_products_are_unbiased_with_the_variance_of_the_law(name, p, k):
    seeds = 600
    x, y = data(p), data(p, seed=5) + 0.5 * data(p)
    got = products(name, p, k, x, y, seeds)
    error = got.std(ddof=1) / seeds**0.5
    assert abs(got.mean() - float(x @ y)) < 4 * error + 1e-12, (got.mean(), float(x @ y), error)
    expected = exact_variance(name, p, k, x.numpy(), y.numpy())
    if expected is not None:
        kurtosis = ((got - got.mean()) ** 4).mean() / got.var() ** 2
        spread = ((kurtosis - 1) / seeds) ** 0.5  # relative standard error of a sample variance
        assert abs(got.var(ddof=1) / expected - 1) < 4 * spread, (got.var(ddof=1), expected, spread)


def test_balanced_buckets_have_the_smaller_variance():
    p, k, seeds = 16, 8, 500
    x, y = data(8, p), data(8, p, seed=1)
    variance = {}
    for name in ("sjlt", "sjlt-iid"):
        drawn = [make(name, p, k, seed=seed)(torch.stack([x, y])) for seed in range(seeds)]
        variance[name] = torch.stack([(a * b).sum(1) for a, b in drawn]).var(dim=0)
    ratio = (variance["sjlt"] / variance["sjlt-iid"]).mean()
    assert abs(ratio - (p - k) / (p - 1)) < 0.08, ratio  # OPORP (Li and Li, KDD 2023): .533


@pytest.mark.parametrize("width", [1, 2, 4, 64, 128, 256, 2048, 2**15])
def test_hadamard_is_scipys(width):
    x = data(3, width)
    before = x.clone()
    expected = x.numpy() @ scipy.linalg.hadamard(width) if width <= 2048 else fast_hadamard(x.numpy())
    np.testing.assert_allclose(hadamard(x).numpy(), expected, rtol=1e-10, atol=1e-9)
    np.testing.assert_allclose(hadamard(hadamard(x)) / width, x, rtol=1e-10, atol=1e-10)
    assert torch.equal(x, before)


def fast_hadamard(x: np.ndarray) -> np.ndarray:
    """The textbook butterfly, one factor at a time."""
    step = 1
    while step < x.shape[1]:
        pairs = x.reshape(len(x), -1, 2, step)
        x = np.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], axis=2).reshape(len(x), -1)
        step *= 2
    return x


@pytest.mark.parametrize("name", ["gauss", "rademacher"])
@pytest.mark.parametrize("p, k, limit", [(33, 7, 50), (33, 7, 6), (64, 5, 64), (7, 3, 20)])
def test_a_matrix_too_large_to_keep_is_drawn_again_at_each_use(name, p, k, limit, monkeypatch):
    kept = make(name, p, k)
    monkeypatch.setattr(maps, "DENSE_LIMIT", limit)
    streamed = make(name, p, k)
    assert kept.matrix is not None and streamed.matrix is None  # pyright: ignore[reportAttributeAccessIssue]
    x, ids = data(2, 3, p), torch.tensor([[0, p - 1, 2], [2, 2, 1]])
    close(streamed(x), kept(x))
    close(streamed.affine(x[..., 1:]), kept.affine(x[..., 1:]))
    assert torch.equal(streamed.onehot(ids), kept.onehot(ids))
    assert torch.equal(streamed.to(torch.device("cpu"))(x), streamed(x))


# Part of the index format through rng version 1: never edit these numbers.
GOLDEN = {
    "mask": [[0, 0, 0], [0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]],
    "gauss": [
        [0.11433538049459457, -0.43452250957489014, -0.4868465065956116],
        [-0.44197991490364075, 0.4298214316368103, 0.6109980344772339],
        [0.7663434743881226, -0.9148110151290894, -1.6774307489395142],
        [1.0327337980270386, 1.0337876081466675, -0.15339140594005585],
        [0.2150745838880539, -1.1022557020187378, 0.6324582099914551],
        [0.9206492304801941, -0.33972102403640747, 0.8422859311103821],
    ],
    "rademacher": [[-1, -1, 1], [-1, -1, -1], [1, -1, -1], [-1, -1, -1], [-1, -1, 1], [-1, -1, 1]],
    "sjlt": [[-1, 0, 0], [0, 0, 1], [-1, 0, 0], [0, 1, 0], [0, 0, 1], [0, -1, 0]],
    "sjlt-iid": [[0, -1, 0], [0, 0, 1], [0, 0, -1], [1, 0, 0], [1, 0, 0], [-1, 0, 0]],
    "sjlt-2": [[-1, -1, 0], [1, 0, 1], [-1, 1, 0], [1, 0, 1], [1, 0, 1], [-1, -1, 0]],
    "fjlt": [[1, 1, 1], [-1, 1, -1], [-1, -1, -1], [-1, 1, -1], [1, -1, -1], [-1, -1, 1]],
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_matrices(name):
    matrix = make(name, 6, 3, block="golden").raw(torch.eye(6))
    torch.testing.assert_close(matrix, torch.tensor(GOLDEN[name]).float(), rtol=2.4e-7, atol=0)


@pytest.mark.parametrize(
    "name, scale",
    [
        ("mask", 2**0.5),
        ("gauss", 3**-0.5),
        ("rademacher", 3**-0.5),
        ("sjlt", 1.0),
        ("sjlt-2", 2**-0.5),
        ("fjlt", 3**-0.5),
    ],
)
def test_golden_scales(name, scale):
    assert make(name, 6, 3).scale == pytest.approx(scale, rel=1e-15)


def test_an_unknown_kind_is_refused():
    with pytest.raises(SpecError, match="map kind 'pca' is not known"):
        draw("pca", 6, 3, stream=Stream(0, "block", "pca", "in/0"))

"""A GPU changes rounding and nothing else: rows and scores of every compressor, codec and method, made on both devices.

The maps are the same tables on both, because they are drawn on the CPU. Skipped where there is no GPU; with
INFLUENT_TEST_DEVICE=cpu the tests themselves can be tried without one.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_model import FACTS, make_data, make_model
from torch import Tensor, nn

import influent
from influent import loading
from influent.attach import Run, Setting, attach
from influent.codec import Codec
from influent.collect import Collected
from influent.compress import Compress
from influent.extract import gradients
from influent.gradients import Outer
from influent.layers import Block
from influent.methods import METHODS
from influent.rowstore import Index
from influent.sides import Batch
from influent.task import Classification
from influent.truncate import truncate

DEVICE = os.environ.get("INFLUENT_TEST_DEVICE", "cuda")
missing = DEVICE == "cuda" and not torch.cuda.is_available()
pytestmark = pytest.mark.skipif(missing, reason="needs a GPU that PyTorch can use")

COMPRESS = (
    "id", "gauss:8x8", "rademacher:8x8", "sjlt:8x8", "sjlt:64,s=2", "sjlt:64,iid", "fjlt:64", "fjlt:8x8", "gauss:64",
    "rademacher:64", "mask:8x8", "mask:64", "mask:8", "mask:12x12 | sjlt:64", "mask:128 | sjlt:64",
    "gauss:8x8 | rotate", "pca:8x8", "whiten:8x8", "whiten:8x8,kfac",
)  # fmt: skip
CODECS = (
    "float32", "float16", "bfloat16", "dense:int8", "dense:int4", "dense:sign", "rank:1", "rank:2:float32",
    "rank:4:int8", "rank:2:int4", "rank:1:sign",
)  # fmt: skip
ALL_LAYERS = ""  # norms, embeddings and a tied head too
QUERIES = [{"prompt": prompt, "completion": f" {answer}."} for _, prompt, answer in FACTS[:3]]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cuda")
    make_model(folder / "model")
    make_model(folder / "second", seed=1)
    make_model(folder / "gpt2", kind="gpt2")
    make_data(folder / "data.jsonl")
    (folder / "queries.jsonl").write_text("".join(json.dumps(query) + "\n" for query in QUERIES))
    return folder


def near(got: Any, expected: Any, tolerance: float = 1e-4) -> None:
    got, expected = (np.asarray(x, dtype=np.float64) for x in (got, expected))
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * max(np.abs(expected).max(), 1e-12))


def rows_on(device: str, here: Path, text: str, out: Path, **options: Any) -> dict[str, Tensor]:
    """Rows of a few examples, block -> [n, K], float32, before any codec."""
    setting = Setting(**({"compress": text, "layers": ALL_LAYERS, "max_length": 8, "calibration": 8} | options))
    data = [{"text": f"{prompt} {answer}, as everyone knows."} for _, prompt, answer in FACTS]
    with attach(str(here / "model"), None, setting, Run(device=device), index=bases(here, text, out)) as made:
        return {key: rows.cpu() for key, rows in collected(made.collector, data).rows.items()}


def collected(collector: Any, data: list[Any]) -> Collected:
    return collector.collect(data, name=lambda i: f"row {i}")


def bases(here: Path, text: str, out: Path):
    """The store of an index whose learned bases both devices use; None for maps that are drawn."""
    if Compress.parse(text).learned is None:
        return None
    index(here, out, "cpu", compress=text, layers=ALL_LAYERS, method="logra", rows="float32")
    return Index.open(str(out)).store


def index(here: Path, out: Path, device: str, *, model: str = "model", **options: Any) -> dict[str, Any]:
    settings = {"max_length": 8, "shard_rows": 5, "token_budget": 64} | options
    return influent.index(str(here / model), str(here / "data.jsonl"), str(out), device=device, **settings)


def scores(out: Path, device: str, **options: Any) -> np.ndarray:
    file = out.parent / f"{out.name}.npy"
    influent.query(str(out), queries=QUERIES, scores=str(file), device=device, **options)
    return np.load(file)


@pytest.mark.parametrize("text", COMPRESS)
def test_rows_of_every_compressor(here, tmp_path, text):
    expected, got = (rows_on(device, here, text, tmp_path / "bases") for device in ("cpu", DEVICE))
    assert expected.keys() == got.keys()
    for key, rows in expected.items():
        near(got[key], rows)


@pytest.mark.parametrize("text", ["sjlt:64", "mask:256 | sjlt:64", "gauss:32"])
def test_one_row_of_all_layers(here, tmp_path, text):
    expected, got = (rows_on(device, here, text, tmp_path, key="all") for device in ("cpu", DEVICE))
    near(got["all"], expected["all"])


@pytest.mark.parametrize("text", ["gauss:8x8", "rademacher:8x8", "mask:12x12 | sjlt:64", "mask:128 | sjlt:64", "id"])
def test_16_bit_models_are_added_up_in_float32(text):
    """Of one and the same 16-bit sides, rows are as exact as a CPU's, which widens them first."""
    block = Block("layer", "linear", 48, 40)
    a, d = torch.randn(3, 50, 48).bfloat16(), torch.randn(3, 50, 40).bfloat16()
    cpu = Compress.parse(text).bind(block, 0)
    gpu = cpu.to(torch.device(DEVICE))
    rows = [
        bound.join(Outer(bound.map_in(x), bound.map_out(y), bound.in_width, bound.out_width))
        for bound, x, y in ((cpu, a, d), (gpu, a.to(DEVICE), d.to(DEVICE)))
    ]
    assert rows[1].dtype == torch.float32
    near(rows[1].cpu(), rows[0], 3e-5)


@pytest.mark.parametrize("text", COMPRESS)
def test_maps_are_the_same_tables(text):
    if Compress.parse(text).learned is not None:
        pytest.skip("learned from data, not drawn")
    block = Block("layer", "linear", 30, 20)
    one = Compress.parse(text).bind(block, 3)
    other = one.to(torch.device(DEVICE)).to(torch.device("cpu"))
    gradients = torch.randn(4, block.width)
    assert torch.equal(one.apply(gradients), other.apply(gradients))


@pytest.mark.parametrize("text", CODECS)
def test_scores_of_every_codec(here, tmp_path, text):
    settings = {"compress": "gauss:12x12", "method": "logra", "rows": text}
    found = []
    for device in ("cpu", DEVICE):
        index(here, tmp_path / device, device, **settings)
        found.append(scores(tmp_path / device, device, curvature="identity"))
    # one code of an integer row may fall the other way
    near(found[1], found[0], 2e-2 if Codec.parse(text).packed else 1e-3 if "16" in str(Codec.parse(text)) else 1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_scores_of_every_method(here, tmp_path, method):
    side = {"compress": "sjlt:64"} if method == "trak" else {}
    if method == "lorif":
        side = {"compress": "whiten:12x12", "rows": "rank:2:float32"}
    found = []
    for device in ("cpu", DEVICE):
        index(here, tmp_path / device, device, method=method, **side)
        found.append(scores(tmp_path / device, device, damping=None if method in UNDAMPED else "relative:1"))
    near(found[1], found[0], 1e-3)


UNDAMPED = ("graddot", "linfik", "tracin")


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("logra", {"curvature": "ekfac"}),
        ("logra", {"curvature": "kfac:compressed"}),
        ("logra", {"curvature": "cg:3@8", "damping": "relative:1"}),
        ("logra", {"curvature": "fim", "normalize": "relatif"}),
        ("logra", {"mix": 0.5}),
        ("ekfac", {"curvature": "cg:3@8", "damping": "relative:1"}),
        ("ekfac", {"normalize": "cosine"}),
        ("ekfac", {"normalize": "relatif"}),
        ("ekfac", {"query_rank": 2}),
        ("lorif", {"query_rank": 2}),
        ("lorif", {"control": QUERIES[:2]}),
    ],
)
def test_curvatures_through_the_model(here, tmp_path, method, options):
    sized = {"logra": {"compress": "gauss:12x12"}, "lorif": {"compress": "whiten:12x12", "rows": "rank:2:float32"}}
    found = []
    for device in ("cpu", DEVICE):
        index(here, tmp_path / device, device, method=method, **sized.get(method, {}))
        found.append(scores(tmp_path / device, device, **options))
    near(found[1], found[0], 2e-3)


def test_an_index_made_here_is_asked_there(here, tmp_path):
    index(here, tmp_path / "made", DEVICE, method="logra", compress="gauss:8x8")
    near(scores(tmp_path / "made", "cpu"), scores(tmp_path / "made", DEVICE))
    influent.append(str(tmp_path / "made"), [{"text": FACTS[0][1] + " Rome, of course."}], device=DEVICE)
    assert influent.verify(str(tmp_path / "made"))["ok"]
    influent.self_influence(str(tmp_path / "made"), device=DEVICE)


def test_an_ensemble(here, tmp_path):
    found = []
    for device in ("cpu", DEVICE):
        index(here, tmp_path / device, device, compress="sjlt:64", checkpoints=[str(here / "second")])
        found.append(scores(tmp_path / device, device))
    near(found[1], found[0], 1e-3)


def test_conv1d_layers_and_a_tied_head(here, tmp_path):
    found = []
    for device in ("cpu", DEVICE):
        index(here, tmp_path / device, device, model="gpt2", layers=ALL_LAYERS, method="logra", compress="gauss:8x8")
        found.append(scores(tmp_path / device, device))
    near(found[1], found[0], 1e-3)


def test_convolutions_are_not_computed_in_tf32():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 5)).eval()
    batch = torch.randn(4, 8, 8, 8), torch.tensor([0, 1, 2, 3])
    found = []
    for device in ("cpu", DEVICE):
        moved, inputs = model.to(device), [x.to(device) for x in batch]
        setting = Setting(compress="id")
        with attach(moved, Classification(), setting, Run(device=device)) as made:
            rows, _ = gradients(
                moved, made.collector.plan, bound=made.collector.bound, batch=Batch(4, 1),
                loss=lambda moved=moved, inputs=inputs: Classification().loss(moved, inputs),
            )  # fmt: skip
            found.append({key: row.cpu() for key, row in rows.items()})
            assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32
    for key, rows in found[0].items():
        near(found[1][key], rows, 2e-5)


@pytest.mark.parametrize("size", ["8x8", "64"])
def test_a_mask_is_learned(here, tmp_path, size):
    kept = []
    for device in ("cpu", DEVICE):
        options = {"size": size, "sample": 16, "steps": 3, "max_length": 8, "device": device, "layers": "0.self_attn.q"}
        try:
            found = influent.mask(str(here / "model"), str(here / "data.jsonl"), str(tmp_path / device), **options)
        except influent.errors.NumericsError as error:  # so few steps need not beat a random mask; both must say so
            kept.append(str(error).partition(":")[0])
            continue
        kept.append([block["kept"] for block in found["blocks"]])
    assert kept[0] == kept[1]


def test_evaluate_retrains_there(here, tmp_path):
    index(here, tmp_path / "index", DEVICE, compress="sjlt:64")
    found = influent.evaluate(
        str(tmp_path / "index"), queries=QUERIES, truth=str(tmp_path / "truth"), metric="lds,tail-patch", k=1,
        base=str(here / "model"), epochs=1, rate=1e-2, subsets=2, seeds=1, device=DEVICE,
    )  # fmt: skip
    assert np.isfinite(found["lds"]["mean"]) and "tail-patch" in found


def test_a_student_is_distilled_and_asked(here, tmp_path):
    rows = [{"provider": "abc"[i % 3], "text": f"{FACTS[i % 8][1]} {FACTS[(i * 3) % 8][2]} {i}."} for i in range(90)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    influent.index(str(here / "model"), str(tmp_path / "rows.jsonl"), str(tmp_path / "index"), method="linfik",
                   compress="mask:8x8", device=DEVICE)  # fmt: skip
    made = influent.distill(
        str(tmp_path / "index"), target=str(here / "queries.jsonl"), student=str(here / "gpt2"),
        out=str(tmp_path / "student"), device=DEVICE,
    )  # fmt: skip
    assert made
    found = influent.appraise(str(tmp_path / "student"), str(tmp_path / "rows.jsonl"), draws=50, device=DEVICE)
    other = influent.appraise(str(tmp_path / "student"), str(tmp_path / "rows.jsonl"), draws=50, device="cpu")
    near([p["total"] for p in found["providers"]], [p["total"] for p in other["providers"]], 1e-3)
    influent.value(str(tmp_path / "index"), target=str(here / "queries.jsonl"), device=DEVICE)


@pytest.mark.parametrize("rank", [1, 2, 5, 12])
def test_the_cut_keeps_as_much(rank):
    matrices = torch.randn(50, 24, 16) @ torch.diag(torch.arange(1, 17) ** -1.0) @ torch.randn(16, 16)
    matrices[3], matrices[4] = 0, torch.outer(torch.ones(24), torch.ones(16))
    cpu, gpu = truncate(matrices, rank), truncate(matrices.to(DEVICE), rank)
    near(gpu.captured.cpu(), cpu.captured, 1e-4)
    assert float(gpu.sigma[4, 1:].abs().sum()) < 1e-3 * float(gpu.sigma[4, 0])
    assert bool(gpu.pairs.v.isfinite().all() and gpu.pairs.u.isfinite().all())


def test_a_device_that_is_not_there_is_an_error():
    with pytest.raises(influent.errors.SpecError, match="not available"):
        loading.choose_device("cuda:99")

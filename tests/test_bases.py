"""Learned bases are those of a float64 oracle, whatever the batches and passes; an index keeps and guards its own."""

import contextlib
import functools
import json
import shutil

import format_checker
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import make_data, make_model
from torch import nn

import influent
from influent import attach, bases, moments
from influent.artifact import Artifact, ArtifactWriter
from influent.compress import Compress
from influent.errors import CorruptError, DataError, LayerError, MismatchError, SpecError
from influent.layers import plan
from influent.moments import basis
from influent.rowstore import Index
from influent.sharing import share
from influent.storage import Store

CPU = torch.device("cpu")


# -- a basis of a moment


@given(p=st.integers(1, 12), n=st.integers(1, 20), power=st.sampled_from([0.25, 0.5]), damping=st.floats(1e-3, 10))
@settings(deadline=None, max_examples=30)
def test_a_full_basis_is_the_damped_power_of_the_moment(p, n, power, damping):
    x = torch.randn(n, p, generator=torch.Generator().manual_seed(p * 31 + n), dtype=torch.float64)
    moment = x.T @ x / n
    made, share = basis(moment, p, power=power, damping=damping)
    damped = moment + damping * moment.trace() / p * torch.eye(p, dtype=torch.float64)
    inverse = torch.linalg.inv(damped) if power == 0.5 else basis(damped, p, power=0.5, damping=0.0)[0]
    expected = inverse if power == 0.5 else torch.linalg.inv(torch.linalg.matrix_power(damped, 1))
    got = made @ made.T
    torch.testing.assert_close(got if power == 0.5 else got @ got, expected, rtol=1e-6, atol=1e-8)
    assert share == pytest.approx(1)


def test_pca_keeps_the_largest_directions():
    q, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    moment = q @ torch.diag(torch.tensor([1.0, 9.0, 3.0, 0.5, 0.0], dtype=torch.float64)) @ q.T
    made, share = basis(moment, 2, power=0.0, damping=0.1)
    torch.testing.assert_close(made @ made.T, q[:, 1:3] @ q[:, 1:3].T)
    torch.testing.assert_close(made.T @ made, torch.eye(2, dtype=torch.float64))
    assert share == pytest.approx(12 / 13.5)


def test_a_block_without_gradients_gets_plain_directions():
    made, share = basis(torch.zeros(4, 4, dtype=torch.float64), 2, power=0.5, damping=0.1)
    torch.testing.assert_close(made.T @ made, torch.eye(2, dtype=torch.float64))
    assert share == 1.0


def test_sides_that_are_too_wide_are_refused():
    model = nn.ModuleDict({"embed": nn.Embedding(9000, 4), "head": nn.Linear(4, 9000), "huge": nn.Linear(2, 20000)})
    moments.check_widths(plan(model, "head"), "pca:2x2")
    for layer, width in (("embed", "9000 wide, but 'pca:2x2' can learn at most 8192"), ("huge", "20000 .* 16384")):
        with pytest.raises(LayerError, match=f"layer {layer} has a side {width}; --exclude it"):
            moments.check_widths(plan(model, layer), "pca:2x2")


# -- in an index

PROMPT = {"prompt": "The money of Japan is called", "completion": " yen"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    make_model(folder / "model", width=16)
    make_data(folder / "data.jsonl")
    return folder


def make_index(place, name, text, **options):
    out = str(place / name)
    influent.index(str(place / "model"), str(place / "data.jsonl"), out, compress=text, **options)
    return out


def dense(place, index, name):
    """Rows or query's gradients of all blocks without any compression, float64."""
    full = str(place / "id")
    if not (place / "id").exists():
        influent.index(str(place / "model"), str(place / "data.jsonl"), full, compress="id")
    return torch.cat([shard.rows(name).double() for shard in Index.open(full).shards])


@pytest.mark.parametrize(
    "text", ["whiten:8x8", "whiten:8x8,kfac", "whiten:/2,p=0.25", "pca:8x6,kfac", "pca:4x40", "whiten:60,share"]
)
def test_rows_are_the_gradients_through_the_stored_matrices(place, text):
    out = make_index(place, text.replace(":", "-").replace("/", "f"), text)
    index = Index.open(out)
    stored = Artifact.open(Store(out).child("bases"), "bases")
    assert index.spec["bases"] == bases.content(stored.records)
    assert influent.verify(out) == {"ok": True, "errors": []}
    for block in index.spec["layout"]:
        name, (i, o) = block["block"], (block["in"], block["out"])
        held = stored.tensors(name)
        left = held["in"].double() if "in" in held else torch.eye(i, dtype=torch.float64)
        right = held["out"].double() if "out" in held else torch.eye(o, dtype=torch.float64)
        gradients = dense(place, index, name).view(-1, i, o)
        expected = torch.einsum("bio,ij,ok->bjk", gradients, left, right).flatten(1)
        got = torch.cat([shard.rows(name) for shard in index.shards]).double()
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        if "kfac" not in text and "out" in held:  # all rows were drawn: the moments are theirs
            moment = torch.einsum("bio,bip->op", gradients, gradients)
            largest = torch.linalg.eigvalsh(moment).flip(0)[: right.shape[1]].sum()
            directions = torch.linalg.qr(right)[0]
            captured = (directions.T @ moment @ directions).trace()
            assert float(captured / largest) == pytest.approx(1, rel=1e-4)


def scores(out, **options):
    found = influent.query(out, queries=[PROMPT], k=100, bottom=False, **options)["queries"][0]["top"]
    return {row["id"]: row["score"] for row in found}


def test_scores_are_those_of_the_dense_oracle(place):
    out = make_index(place, "oracle", "whiten:8x8")
    full = make_index(place, "full", "id")
    stored = Artifact.open(Store(out).child("bases"), "bases")
    rows, queries = {}, {}
    setting = attach.Setting(compress="id", max_length=512)
    with attach.attach(str(place / "model"), None, setting, attach.Run()) as made:
        asked = made.collector.collect([PROMPT], name=str, query=True).rows
    total = torch.zeros(1, 16, dtype=torch.float64)
    for block in Index.open(full).spec["layout"]:
        name, held = block["block"], stored.tensors(block["block"])
        kron = torch.kron(held["in"].double(), held["out"].double())
        rows[name] = torch.cat([shard.rows(name).double() for shard in Index.open(full).shards]) @ kron
        queries[name] = asked[name].double() @ kron
        fisher = rows[name].T @ rows[name] / len(rows[name])
        damping = 0.1 * float(fisher.trace()) / min(rows[name].shape)
        total = total + queries[name] @ torch.linalg.inv(fisher + damping * torch.eye(len(fisher))) @ rows[name].T
    expected = dict(zip((row["id"] for row in Index.open(full).catalog.describe(range(16))), total[0], strict=True))
    got = scores(out, curvature="fim", damping="relative:0.1")
    values = torch.stack([torch.tensor([got[key] for key in expected]).double(), torch.stack(list(expected.values()))])
    torch.testing.assert_close(values[0], values[1], rtol=1e-3, atol=1e-3)


class Squares:
    """A task whose gradients span the whole block."""

    def loss(self, model, batch):
        x, y = batch
        return (model(x) - y).square().sum(-1)

    measure = loss


def test_influence_does_not_depend_on_a_full_size_whitening(tmp_path):
    """(W F W^T)^-1 undoes W: with hardly any damping the scores are those of uncompressed gradients."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    data = list(zip(torch.randn(200, 4) * torch.arange(1, 5), torch.randn(200, 3), strict=True))
    found = []
    for text in ("id", "whiten:9x9", "whiten:9x9,p=0.25,kfac | rotate"):
        out = str(tmp_path / text[:10])
        shutil.rmtree(out, ignore_errors=True)
        influent.index(model, data, out, task=Squares(), compress=text)
        kept = {"model": model, "task": Squares(), "damping": "relative:1e-6"}
        for curvature in ("fim", "identity"):
            options = kept if curvature == "fim" else {**kept, "damping": None}
            top = influent.query(out, queries=data[:1], k=200, curvature=curvature, **options)["queries"][0]["top"]
            found.append(torch.tensor([row["score"] for row in sorted(top, key=lambda row: row["row"])]))
    exact, plain = found[:2]
    for solved, dotted in (found[2:4], found[4:]):
        torch.testing.assert_close(solved, exact, rtol=1e-3, atol=1e-3 * float(exact.abs().max()))
        assert not torch.allclose(dotted, plain, rtol=0.1)


def test_full_size_pca_is_no_compression(place):
    rows = [Index.open(make_index(place, name, text)) for name, text in (("full", "id"), ("turn", "pca:100x100"))]
    assert rows[1].spec["bases"]
    for key in rows[0].keys:
        for one, other in zip(rows[0].shards, rows[1].shards, strict=True):
            assert torch.equal(one.rows(key), other.rows(key))
    whole = Index.open(make_index(place, "white", "whiten:100x100"))
    assert whole.widths == rows[0].widths
    assert not torch.allclose(whole.shards[0].rows(whole.keys[0]), rows[0].shards[0].rows(rows[0].keys[0]))


def bytes_of(out):
    store = Store(out)
    return {name: store.get(name) for name in store.names() if "catalog" not in name and not name.endswith("spec.json")}


@pytest.mark.parametrize(
    ("stop", "text"), [(0, "whiten:4x4 | rotate"), (1, "whiten:4x4 | rotate"), (5, "whiten:4x4 | rotate"),
                       (3, "whiten:16,share"), (17, "whiten:16,share")],
)  # fmt: skip
def test_a_killed_calibration_resumes(place, stop, text, monkeypatch):
    expected = bytes_of(make_index(place, f"whole{len(text)}", text))
    put = ArtifactWriter.put

    def dies(self, *args, **kwargs):
        if self.kind == "bases" and len(self.records) == stop:
            raise KeyboardInterrupt
        return put(self, *args, **kwargs)

    monkeypatch.setattr(ArtifactWriter, "put", dies)
    with contextlib.suppress(KeyboardInterrupt):
        make_index(place, f"killed{stop}", text)
    assert not (place / f"killed{stop}" / "spec.json").exists()
    monkeypatch.undo()
    assert bytes_of(make_index(place, f"killed{stop}", text)) == expected


def test_passes_and_batches_change_nothing_but_rounding(place, monkeypatch):
    whole = make_index(place, "passes", "whiten:4x4")
    monkeypatch.setattr(attach, "Calibration", functools.partial(bases.Calibration, memory=1))
    passes = []
    take = bases.Calibration._moments
    monkeypatch.setattr(bases.Calibration, "_moments", lambda *args: passes.append(args) or take(*args))
    parts = make_index(place, "parts", "whiten:4x4", token_budget=30)
    assert len(passes) == len(Index.open(whole).keys)
    for one, other in zip(Index.open(whole).shards, Index.open(parts).shards, strict=True):
        for key in Index.open(whole).keys:
            torch.testing.assert_close(one.rows(key), other.rows(key), rtol=1e-2, atol=1e-3)


def test_layers_share_a_size_by_what_they_carry(place):
    out = make_index(place, "shared", "whiten:24,share | rotate", rows="dense:sign")
    index, stored = Index.open(out), Artifact.open(Store(out).child("bases"), "bases")
    format_checker.check(place / "shared")
    spectra, sizes = {}, {}
    for block in index.spec["layout"]:
        held = stored.tensors(block["block"])
        sizes[block["block"]] = {side: held[side].shape[1] for side in ("in", "out")}
        assert block["width"] == held["in"].shape[1] * held["out"].shape[1]
        gradients = dense(place, index, block["block"]).view(-1, block["in"], block["out"])
        moments = {"in": torch.einsum("bio,bjo->ij", gradients, gradients),
                   "out": torch.einsum("bio,bip->op", gradients, gradients)}  # fmt: skip
        root = (gradients.square().sum() * len(gradients)).sqrt()
        spectra[block["block"]] = {side: torch.linalg.eigvalsh(m / root).flip(0) for side, m in moments.items()}
        told = stored.tensors(bases.SPECTRUM + block["block"])
        for side, expected in spectra[block["block"]].items():
            torch.testing.assert_close(told[side], expected, rtol=1e-3, atol=1e-4 * float(expected[0]))
    exact = {
        name: {side: stored.tensors(bases.SPECTRUM + name)[side].numpy() for side in ("in", "out")} for name in spectra
    }
    assert sizes == share(exact, 24, damping=bases.DAMPING)
    assert len({tuple(each.values()) for each in sizes.values()}) > 3
    assert index.layout.row_bytes <= len(sizes) * (24 // 8 + 2)
    assert set(scores(out)) == {row["id"] for row in index.catalog.describe(list(range(index.n)))}


def test_a_sample_is_drawn_by_the_seed(place):
    made = [make_index(place, f"seed{seed}", "pca:4x4", seed=seed) for seed in (0, 1)]
    assert Index.open(made[0]).spec["bases"] == Index.open(made[1]).spec["bases"]  # all rows, whatever the order
    rows = [bases.Stream(seed, "", "calibration", "rows").subset(16, 4).tolist() for seed in (0, 0, 1)]
    assert rows[0] == rows[1] != rows[2]
    with pytest.raises(SpecError, match="calibration is 0, expected 1 row or more"):
        attach.Setting(compress="pca:4x4", calibration=0)


def copied(place, name):
    source = make_index(place, "guarded", "whiten:4x4")
    shutil.copytree(source, place / name, dirs_exist_ok=True)
    return place / name


def test_another_model_is_refused(place):
    out = make_index(place, "guarded", "whiten:4x4")
    make_model(place / "other", seed=1)
    make_model(place / "wide", width=32)
    for name in ("other", "wide"):
        with pytest.raises(MismatchError, match="another model: expected weights blake2b.*give --model"):
            influent.query(out, queries=[PROMPT], model=str(place / name))


def test_damaged_bases_are_named(place):
    out = copied(place, "damaged")
    victim = sorted((out / "bases" / "shards").glob("*.safetensors"))[0]
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    with pytest.raises(CorruptError, match=r"bases/shards/.*: its hash is not the committed one; delete .*bases"):
        influent.query(str(out), queries=[PROMPT])
    assert [error for error in influent.verify(str(out))["errors"] if victim.name in error]


def test_bases_of_another_index_are_refused(place):
    out = copied(place, "swapped")
    other = make_index(place, "swap", "whiten:4x4", limit=9)
    shutil.rmtree(out / "bases")
    shutil.copytree(f"{other}/bases", out / "bases")
    with pytest.raises(MismatchError, match="bases differs: expected 'blake2b"):
        influent.query(str(out), queries=[PROMPT])
    shutil.rmtree(out / "bases")
    shutil.copytree(f"{make_index(place, 'small', 'whiten:3x3')}/bases", out / "bases")
    with pytest.raises(MismatchError, match="another stage"):
        influent.query(str(out), queries=[PROMPT])


def test_bases_that_other_settings_made_are_kept(place):
    out = make_index(place, "settings", "whiten:4x4")
    with pytest.raises(MismatchError, match="bases: in use by another spec: stage is"):
        make_index(place, "settings", "whiten:5x5")
    assert influent.verify(out)["ok"]


def test_a_stage_that_is_not_learned_makes_no_bases(place):
    out = make_index(place, "full", "id")
    assert "bases" not in Index.open(out).spec and not (place / "full" / "bases").exists()
    with (
        pytest.raises(SpecError, match="'pca:2x2' is learned from an index's data"),
        attach.attach(str(place / "model"), None, attach.Setting(compress="pca:2x2"), attach.Run()),
    ):
        pass


def test_a_sample_without_targets_is_refused(place):
    (place / "short.jsonl").write_text(json.dumps({"text": "a"}) + "\n")
    with pytest.raises(DataError, match="none of the 1 rows drawn to learn 'pca:2x2' has target tokens"):
        influent.index(str(place / "model"), str(place / "short.jsonl"), str(place / "none"), compress="pca:2x2")


def test_norms_and_the_embedding_have_bases_too(place):
    out = make_index(place, "every", "whiten:3x2", layers="norm|embed|gate")
    index = Index.open(out)
    kinds = {block["kind"]: block for block in index.spec["layout"]}
    assert kinds.keys() >= {"norm", "linear"} and set(index.widths.values()) == {6}
    stored = Artifact.open(Store(out).child("bases"), "bases")
    assert set(stored.tensors(kinds["norm"]["block"])) == {"flat"}
    assert Compress.parse("whiten:3x2").learned is not None
    assert scores(out)

"""The mixed curvature is the dense inverse of (1 - m) F_train + m F_queries + lambda I."""

import numpy as np
import oracle
import pytest
import torch
from small_index import random_rows, write_index
from test_ensemble import ASKED, NETS, TASK, TRAIN

import influent
from influent.attach import Run
from influent.choosing import check_curvature
from influent.curvature import Damping, fit
from influent.errors import NumericsError, SpecError
from influent.mixing import precondition
from influent.recompute import reattached
from influent.rowstore import Index
from influent.solving import Asked, gradients

WIDTHS = {"primal": 5, "dual": 23, "zero": 3}


@pytest.mark.parametrize("share", [0.01, 0.5, 0.9])
def test_queries_are_solved_by_the_mixed_matrix(tmp_path, share):
    rows = random_rows(11, WIDTHS)
    rows["zero"][:] = 0
    index = write_index(tmp_path / "ix", rows, shard_rows=4)
    fitted = fit(index, damping=Damping("relative", 0.2))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "ix").rglob("*")}
    asked = random_rows(4, WIDTHS, seed=5)
    found = precondition({key: q.double() for key, q in asked.items()}, fitted, share)
    for key in ("primal", "dual"):
        g, q = rows[key].double(), asked[key].double()
        mixed = (1 - share) * oracle.fisher(g) + share * oracle.fisher(q)
        inverse = torch.linalg.inv(mixed + oracle.relative(g, 0.2) * torch.eye(g.shape[1], dtype=torch.float64))
        torch.testing.assert_close(found[key], q @ inverse, rtol=1e-8, atol=1e-9)
    assert not bool(found["zero"].any())
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "ix").rglob("*")} == before
    with pytest.raises(NumericsError, match="block 'dual'"):
        precondition({"dual": asked["dual"]}, fit(write_index(
            tmp_path / "bare", {"dual": rows["dual"]}), damping=Damping("absolute", 0.0)), share)  # fmt: skip


@pytest.mark.parametrize("name", ["lowrank:5", "sketch:5"])
@pytest.mark.parametrize("damping", ["relative:0.2", "absolute:0.5"])
def test_full_rank_mixes_as_the_matrix_itself(tmp_path, name, damping):
    rows, asked = random_rows(11, {"primal": 5}), random_rows(4, {"primal": 5}, seed=5)
    index = write_index(tmp_path / "ix", rows, shard_rows=4)
    queries = {key: q.double() for key, q in asked.items()}
    exact, low = (
        precondition(queries, fit(index, curvature=curvature, damping=Damping.parse(damping)), 0.4)["primal"]
        for curvature in ("fim", name)
    )
    torch.testing.assert_close(low, exact, rtol=1e-3, atol=1e-3 * float(exact.abs().max()))


@pytest.mark.parametrize("curvature", ["lowrank:3", "kfac:compressed", "ekfac:compressed"])
def test_others_mix_as_their_own_inverse_says(tmp_path, curvature):
    """(A + m/M Q^T Q) x = q, with A q known from the curvature without a mix at lambda / (1 - m)."""
    out, share, found = str(tmp_path / "ix"), 0.4, {}
    influent.index(NETS[0], TRAIN, out, compress="id", task=TASK)
    index = Index.open(out)
    with reattached(index, NETS[0], TASK, Run(), TRAIN) as again:
        asked = {k: q.double() for k, q in gradients(again.attached, Asked(ASKED)).items()}
        for value in (0.2, 0.2 / (1 - share)):
            found[value] = again.settle(check_curvature(index, curvature, f"relative:{value}", own="fim"))
    mixed, plain = precondition(asked, found[0.2], share), found[0.2 / (1 - share)]
    for key, q in asked.items():
        inverse = plain.solver(key)(torch.eye(q.shape[1], dtype=torch.float64)).double() / (1 - share)
        dense = torch.linalg.inv(torch.linalg.inv(inverse) + share * q.T @ q / len(q))
        torch.testing.assert_close(mixed[key], q @ dense, rtol=1e-3, atol=1e-3 * float((q @ dense).abs().max()))


def test_a_query_may_mix_and_says_so(tmp_path):
    out, path = str(tmp_path / "ix"), str(tmp_path / "scores.npy")
    influent.index(NETS[0], TRAIN, out, compress="id", task=TASK)
    found = {}
    for mix in (None, 1e-9, 0.5):
        document = influent.query(out, queries=ASKED, model=NETS[0], task=TASK, scores=path, mix=mix)
        assert document["method"].get("mix") == mix
        found[mix] = np.load(path)
    np.testing.assert_allclose(found[1e-9], found[None], rtol=1e-3, atol=1e-5)
    assert np.abs(found[0.5]).sum() < 0.9 * np.abs(found[None]).sum()
    for options, message in [
        ({"mix": 1.0}, "mix is 1.0, expected a share"), ({"mix": 0.5, "curvature": "identity"}, "not for identity"),
        ({"mix": 0.5, "normalize": "relatif"}, "no self-influence"),
    ]:  # fmt: skip
        with pytest.raises(SpecError, match=message):
            influent.query(out, queries=ASKED, model=NETS[0], task=TASK, **options)

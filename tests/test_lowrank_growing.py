"""Fits of low rank outlive a kill, and an index that grows."""

import shutil

import pytest
from small_index import random_rows, write_index
from test_lowrank import FORMS, near, powered, q_of
from torch import Tensor

from influent import truncated
from influent.curvature import describe, find, fit, list_fitted
from influent.damping import DEFAULT, Damping
from influent.errors import SpecError
from influent.lowrank import (
    leading_spectrum,
)
from influent.rowstore import Index, Shard


class Killed(BaseException):
    pass


def test_a_killed_fit_resumes_block_by_block(tmp_path, monkeypatch):
    rows = random_rows(9, {"a": 6, "b": 12, "c/d": 4})
    whole = write_index(tmp_path / "whole", rows)
    fit(whole, curvature="lowrank:3", damping=DEFAULT)
    index, measured = write_index(tmp_path / "killed", rows), []
    monkeypatch.setattr(truncated, "leading_spectrum", lambda x, r: measured.append(x.key) or leading_spectrum(x, r))
    for block in (1, 2):

        def kill(stage, done, total, at=block):
            if done == at:
                raise Killed

        with pytest.raises(Killed):
            fit(index, curvature="lowrank:3", damping=DEFAULT, progress=kill)
        assert list_fitted(index) == []
    fit(index, curvature="lowrank:3", damping=DEFAULT)
    fit(index, curvature="lowrank:3", damping=Damping("relative", 0.5))  # reads no row
    assert measured == ["a", "b", "c/d"]
    files = [
        sorted(p for p in (tmp_path / name / "curvature").rglob("*") if p.is_file()) for name in ("whole", "killed")
    ]
    assert [p.read_bytes() for p in files[0]] == [p.read_bytes() for p in files[1]]


def appended(tmp_path, monkeypatch, *, before: int = 20, after: int = 32) -> tuple[Tensor, Index]:
    """An index of `after` rows that has what was fitted when there were only the first `before`."""
    rows = powered(after, 24)
    old = write_index(tmp_path / "old", {"a": rows[:before]}, shard_rows=10)
    for form in FORMS:
        fit(old, curvature=f"{form}:6", damping=DEFAULT)
    fit(old, damping=DEFAULT)
    new = write_index(tmp_path / "new", {"a": rows}, shard_rows=10)
    # Rows were appended as far as the curvature can tell: the digest of the earlier generation is in the history.
    new.digest = "blake2b-256:" + "5" * 64
    shutil.copytree(tmp_path / "old/curvature", tmp_path / "new/curvature")
    past = [{"generation": 0, "rows": before, "digest": old.digest}]
    monkeypatch.setattr(Index, "history", property(lambda self: past if self.digest == new.digest else []))
    return rows, new


def test_a_sketch_goes_on_with_the_new_rows_alone(tmp_path, monkeypatch):
    rows, index = appended(tmp_path, monkeypatch)
    fresh = write_index(tmp_path / "fresh", {"a": rows}, shard_rows=32)
    expected = fit(fresh, curvature="sketch:6", damping=DEFAULT)
    seen, read = [], Shard.grads
    monkeypatch.setattr(
        Shard, "grads", lambda self, key, lo=0, hi=None: seen.append(self.lo + lo) or read(self, key, lo, hi)
    )
    found = fit(index, curvature="sketch:6", damping=DEFAULT)
    assert min(seen) == 20
    near(found.solver("a")(q_of(24)), expected.solver("a")(q_of(24)), 1e-9)
    assert found.health()["a"]["trace"] == pytest.approx(expected.health()["a"]["trace"], rel=1e-12)
    assert found.name == "sketch:6:relative:0.1"


def test_a_fit_to_earlier_rows_is_stale_and_asked_for_by_name(tmp_path, monkeypatch):
    rows, index = appended(tmp_path, monkeypatch)
    assert list_fitted(index) == ["lowrank:6@20", "sketch:6@20"]
    stale = describe(index, "lowrank:6@20")
    assert (stale["stale"], stale["seen"]) == (True, 20 / 32)
    old = find(index, "lowrank:6@20:relative:0.1")
    assert (old.name, len(old.solver("a").self_influence())) == ("lowrank:6@20:relative:0.1", 32)
    kept = write_index(tmp_path / "kept", {"a": rows[:20]})
    same = fit(kept, curvature="lowrank:6", damping=DEFAULT)
    near(old.solver("a")(q_of(24)), same.solver("a")(q_of(24)), 1e-9)
    with pytest.raises(SpecError, match="'lowrank:6': not fitted: .* of lowrank:6@20, sketch:6@20, identity"):
        find(index, "lowrank:6")
    present = fit(index, curvature="lowrank:6", damping=DEFAULT)
    assert present.name == "lowrank:6:relative:0.1"
    fresh = describe(index, "lowrank:6")
    assert (fresh["stale"], fresh["seen"]) == (False, 1.0)
    assert list_fitted(index) == ["lowrank:6", "lowrank:6@20", "sketch:6@20"]
    with pytest.raises(SpecError, match="'lowrank:6@7': not fitted; there is lowrank:6, lowrank:6@20"):
        fit(index, curvature="lowrank:6@7", damping=DEFAULT)

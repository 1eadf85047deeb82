"""What the report of the frontier says of rows at the same D, beside the differences worked out from the scores."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

NUM_QUERIES, NUM_ROWS, NUM_SUBSETS = 20, 30, 12


@pytest.fixture
def benchmarks(monkeypatch):
    """Modules of benchmarks/, by name."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    yield importlib.import_module
    for name in ("frontier", "frontier_report", "lds", "environment"):
        sys.modules.pop(name, None)


def lds(scores: np.ndarray, used: np.ndarray, gain: np.ndarray) -> np.ndarray:
    """Rank correlation of the summed scores of each subset's rows with its gain, query by query."""
    return np.array([spearmanr(used @ scores[q], gain[:, q]).statistic for q in range(NUM_QUERIES)])


def setting(projection: str, compress: str, rows: str, seed: int) -> dict[str, object]:
    entry = {"projection": projection, "codec": rows, "compress": compress, "rows": rows, "seed": seed, "budget": None}
    return {"entry": entry, "bytes": 100, "captured": 0.5 if rows.startswith("rank") else 1.0}


def test_rows_of_a_learned_basis_are_compared_with_dense_rows_of_random_maps_seed_by_seed(benchmarks, tmp_path):
    report, rng = benchmarks("frontier_report"), np.random.default_rng(0)
    truth = report.Truth(
        rng.standard_normal((NUM_SUBSETS, NUM_QUERIES)),
        (rng.random((NUM_SUBSETS, NUM_ROWS)) < 0.5).astype(float),
        rng.standard_normal((NUM_SUBSETS, 1, NUM_QUERIES)),
    )
    (tmp_path / "scores").mkdir()
    kinds = {"gauss": ("gauss:8x8", "bfloat16", "0.1"), "whiten 1/2": ("whiten:8x8", "rank:2:bfloat16", "1.0")}
    scores = {}
    for projection, seeds in (("gauss", (0, 1)), ("whiten 1/2", (0, 1, 2))):  # of random maps the seed 2 is missing
        compress, rows, damping = kinds[projection]
        for seed in seeds:
            scores[projection, seed] = rng.standard_normal((NUM_QUERIES, NUM_ROWS))
            facts = json.dumps(setting(projection, compress, rows, seed))
            held = {"facts": facts, damping: scores[projection, seed], "3.0": -scores[projection, seed]}
            np.savez(tmp_path / "scores" / f"{compress[:3]}{seed}.npz", **held)
    found = {row["compress"]: row for row in report.same_width(report.read(tmp_path, truth))}
    ours, logra = (
        np.mean([lds(scores[name, seed], truth.used, truth.gain) for seed in (0, 1)], axis=0)
        for name in ("whiten 1/2", "gauss")
    )
    kept = np.random.default_rng(0).permutation(NUM_QUERIES)[NUM_QUERIES // 10 :]
    row = found["whiten:8x8"]
    assert row["seeds"] == [0, 1] and row["rank"] == 2 and row["agreement"] is None
    assert row["less LoGRA"]["default damping"]["lds"] == pytest.approx((ours - logra)[kept].mean(), abs=6e-5)
    assert row["lds at default damping"] == pytest.approx(ours[kept].mean(), abs=6e-5)
    assert found["gauss:8x8"]["rank"] is None and found["gauss:8x8"]["agreement"] == 1
    assert found["gauss:8x8"]["less LoGRA"]["default damping"] == {"lds": 0, "low": 0, "high": 0}


@pytest.mark.parametrize(
    ("highs", "level"),
    [
        ((-0.1, -0.1, 0.0), 4),
        ((0.1, -0.1, 0.1), 4),  # level at rank 1, but not from there on
        ((0.1, 0.1, 0.1), 1),
        ((0.1, 0.1, -0.1), None),
    ],
)
def test_level_is_the_rank_from_which_on_no_interval_is_below_0(benchmarks, highs, level):
    def row(rank: int | None, high: float) -> dict[str, object]:
        return {"compress": "whiten:8x8", "rank": rank, "less LoGRA": {"default damping": {"high": high}}}

    rows = [row(rank, high) for rank, high in zip((1, 2, 4), highs, strict=True)]
    found = benchmarks("frontier_report").level_with_logra([row(None, -1), *rows[::-1]], damping="default damping")
    assert found == {"whiten:8x8": level}


def test_rows_in_few_bits_and_rows_that_a_cut_leaves_have_no_rank_to_be_level_at(benchmarks):
    rank = benchmarks("frontier_report").rank_below_dense
    assert rank("rank:12:bfloat16", 0.98) == 12
    assert [rank("rank:4:int4", 0.5), rank("bfloat16", 1.0), rank("rank:8:bfloat16", 1.0)] == [None] * 3


def test_what_is_compared_at_one_width_has_less_than_d_numbers_and_dense_rows_to_be_compared_with(benchmarks):
    found = list(benchmarks("frontier").same_width())
    dense = {(e.compress, e.seed) for e in found if e.compress.startswith("gauss:") and e.rows == "bfloat16"}
    assert len(found) == len({e.name for e in found})
    for entry in found:
        sides = entry.compress.partition(":")[2]
        assert ("gauss:" + sides, entry.seed) in dense
        if entry.rows.startswith("rank:"):
            side = int(sides.partition("x")[0])
            assert 2 * side * int(entry.rows.split(":")[1]) < side * side

"""Which curvature a name and a damping mean; every method has its page and its place."""

from pathlib import Path

import pytest
from small_index import random_rows, write_index

import influent
from influent import cli
from influent.choosing import check_curvature, choose_curvature
from influent.curvature import Damping, fit, list_fitted
from influent.errors import SpecError
from influent.rowstore import Index

FITS = [
    ([], None, None, "fim:relative:0.1"), ([], "fim", None, "fim:relative:0.1"), ([], "identity", None, "identity"),
    ([], None, "absolute:2", "fim:absolute:2"), ([], "fim:absolute:2", "absolute:2.0", "fim:absolute:2"),
    (["absolute:2"], None, None, "fim:absolute:2"), (["absolute:2"], "fim", None, "fim:absolute:2"),
    (["absolute:2"], "fim:absolute:2.0", None, "fim:absolute:2"),
    (["absolute:2", "relative:0.1"], None, None, "fim:relative:0.1"),
    (["absolute:2", "relative:0.1"], "fim", None, "fim:relative:0.1"),
    (["absolute:2", "relative:0.1"], "fim:relative:0.1", "relative:1e-1", "fim:relative:0.1"),
]  # fmt: skip


@pytest.fixture
def bare(tmp_path) -> Index:
    return write_index(tmp_path / "bare", random_rows(6, {"a": 4}))


@pytest.mark.parametrize(("fitted", "name", "damping", "expected"), FITS)
def test_the_curvature_that_is_meant(bare, fitted, name, damping, expected):
    for each in fitted:
        fit(bare, damping=Damping.parse(each))
    before = list_fitted(bare)
    check_curvature(bare, name, damping, own="fim")
    assert list_fitted(bare) == before
    assert choose_curvature(bare, name, damping, own="fim").name == expected


@pytest.mark.parametrize(
    ("name", "damping", "message"),
    [
        (
            "newton",
            None,
            "'newton' is not known; expected one of identity, fim, lowrank:R, sketch:R, datainf, kfac, ekfac",
        ),
        ("newton", "absolute:2", "'newton' is not known"),
        ("identity:1", None, "'identity:1' is not known"),
        ("identity", "absolute:2", "takes no damping"),
        ("fim:absolute:2", "absolute:3", "curvature 'fim:absolute:2' and damping 'absolute:3' differ: give one"),
        ("fim:absolute:3", None, "'fim:absolute:3': not fitted: .* one of fim:absolute:2, fim:relative:0.5"),
        ("fim:3", None, "expected relative:NUMBER or absolute:NUMBER, got '3'"),
        ("fim", "3", "expected relative:NUMBER or absolute:NUMBER, got '3'"),
        (None, None, "more than one is fitted: .* one of fim:absolute:2, fim:relative:0.5"),
    ],
)
def test_a_curvature_that_cannot_be_meant_is_refused_without_a_fit(bare, name, damping, message):
    for each in ("absolute:2", "relative:0.5"):
        fit(bare, damping=Damping.parse(each))
    with pytest.raises(SpecError, match=message):
        check_curvature(bare, name, damping, own="fim")


@pytest.mark.parametrize("name", influent.METHODS)
def test_every_method_has_a_page_a_line_in_the_table_and_a_place_on_the_command_line(name):
    docs = Path(__file__).parent.parent / "docs" / "methods"
    page = (docs / f"{name}.md").read_text()
    assert page.lower().startswith(f"# {name}") and "influent " in page
    assert f"`{name}`" in (docs.parent.parent / "README.md").read_text()
    assert name in cli.METHODS and set(cli.METHODS) == set(influent.METHODS)

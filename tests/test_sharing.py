"""Numbers shared among layers: what is worth most a number is taken first, and a row keeps to its size."""

from itertools import product
from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from influent.sharing import cost, share

DAMPING = 0.1


def spectra(widths: list[tuple[int, ...]], seed: int = 0) -> dict[str, dict[str, np.ndarray]]:
    """Falling eigenvalues of every block's sides, on scales of their own."""
    rng, found = np.random.default_rng(seed), {}
    for number, sides in enumerate(widths):
        names, scale = ("in", "out") if len(sides) == 2 else ("flat",), 10.0 ** rng.integers(-3, 3)
        found[f"b{number}"] = {  # far above where a sum would round them away
            name: scale * (0.1 + np.sort(rng.exponential(size=p) ** 3)[::-1])
            for name, p in zip(names, sides, strict=True)
        }
    return found


def worth(spectrum: dict[str, np.ndarray], sizes: dict[str, int]) -> float:
    """As the formula of sharing.py says it, entry by entry."""
    energy = prod(values.sum() for values in spectrum.values())
    weight = energy ** (0.5 if len(spectrum) == 2 else 0.25)
    kept = [
        sum((values[i] / (values[i] + DAMPING * values.mean())) ** 2 for i in range(sizes[side]))
        for side, values in spectrum.items()
    ]
    return weight * prod(kept)


WIDTHS = st.lists(st.one_of(st.tuples(st.integers(1, 40), st.integers(1, 40)), st.tuples(st.integers(1, 60))))


@given(widths=WIDTHS.filter(bool), size=st.integers(8, 400), seed=st.integers(0, 9))
@settings(max_examples=25, deadline=None)
def test_a_row_keeps_to_its_size_and_leaves_no_room_that_a_layer_could_use(widths, size, seed):
    given_ = spectra(widths, seed)
    sizes = share(given_, size, damping=DAMPING)
    used = {name: cost(tuple(sizes[name].values())) for name in given_}
    left = size * len(given_) - sum(used.values())
    assert left >= 0
    for name, spectrum in given_.items():
        assert all(1 <= sizes[name][side] <= len(values) for side, values in spectrum.items())
        for side, values in spectrum.items():
            longer = sizes[name] | {side: sizes[name][side] + 1}
            more = cost(tuple(longer.values())) - used[name]
            assert longer[side] > len(values) or more == 0 or more > left


def test_few_numbers_go_where_an_exhaustive_search_puts_them():
    given_ = spectra([(3, 4), (4, 3), (6,)], seed=3)
    best = max(
        (
            sum(worth(given_[name], each) for name, each in zip(given_, chosen, strict=True))
            for chosen in product(
                [{"in": a, "out": b} for a in range(1, 4) for b in range(1, 5)],
                [{"in": a, "out": b} for a in range(1, 5) for b in range(1, 4)],
                [{"flat": k} for k in range(1, 7)],
            )
            if sum(cost(tuple(each.values())) for each in chosen) <= 32
            and all(prod(each.values()) == 1 or cost(tuple(each.values())) > 8 for each in chosen)
        ),
    )
    found = share(given_, 11, damping=DAMPING)  # 33 numbers: four eights
    assert sum(worth(given_[name], found[name]) for name in given_) == pytest.approx(best)


def test_what_hardly_moves_the_loss_gets_few_numbers():
    even = {"in": np.ones(20), "out": np.ones(20)}
    weak = {side: values * 1e-3 for side, values in even.items()}
    none = {side: values * 0 for side, values in even.items()}
    found = share({"even": even, "weak": weak, "none": none}, 80, damping=DAMPING)
    assert prod(found["even"].values()) > 200  # of 240
    assert found["none"] == {"in": 1, "out": 1} and prod(found["weak"].values()) <= 16
    assert share({"even": even, "weak": weak}, 400, damping=DAMPING) == {
        "even": {"in": 20, "out": 20}, "weak": {"in": 20, "out": 20},
    }  # fmt: skip

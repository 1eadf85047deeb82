"""Payments: sums to the cent, monotone shares, and a mechanism whose truthfulness is enumerated."""

from decimal import Decimal
from fractions import Fraction
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from influent.errors import DataError, SpecError
from influent.payments import (
    apportion,
    buy,
    by_lower_bound,
    by_tokens,
    equally,
    money,
    proportional_share,
    refuse,
)

BUDGETS = st.integers(1, 10**9).map(lambda cents: Decimal(cents) / 100)
WEIGHTS = st.lists(st.floats(0, 1e12, allow_nan=False), min_size=1, max_size=12).filter(any)


def named(values) -> dict:
    return {f"p{i}": value for i, value in enumerate(values)}


@given(BUDGETS, WEIGHTS)
@settings(max_examples=200, deadline=None)
def test_shares_sum_exactly_keep_the_quota_and_follow_the_weights(budget, values):
    weights = named(values)
    got = apportion(budget, weights)
    assert sum(got.values()) == budget
    total = sum(map(Fraction, values))
    for name, weight in weights.items():
        quota = Fraction(budget) * Fraction(weight) / total
        assert abs(Fraction(got[name]) - quota) < Fraction(1, 100)
        for other, less in weights.items():
            assert weight <= less or got[name] >= got[other]


def test_left_over_cents_go_to_the_largest_remainders():
    assert apportion(Decimal("1.00"), {"a": 1, "b": 1, "c": 1}) == {
        "a": Decimal("0.34"),
        "b": Decimal("0.33"),
        "c": Decimal("0.33"),
    }
    assert apportion(Decimal("0.05"), {"a": 0, "b": 2, "c": 5}) == {
        "a": Decimal("0.00"),
        "b": Decimal("0.01"),
        "c": Decimal("0.04"),
    }


def test_the_three_rules():
    budget = Decimal("100.00")
    assert by_lower_bound(budget, {"a": 3.0, "b": -1.0, "c": 1.0}) == {
        "a": Decimal("75.00"),
        "b": Decimal("0.00"),
        "c": Decimal("25.00"),
    }
    assert equally(budget, ["a", "b"]) == {"a": Decimal("50.00"), "b": Decimal("50.00")}
    assert by_tokens(budget, {"a": 1, "b": 3})["b"] == Decimal("75.00")
    with pytest.raises(DataError, match="surely above zero"):
        by_lower_bound(budget, {"a": -1.0, "b": 0.0})
    with pytest.raises(SpecError, match="negative"):
        apportion(budget, {"a": -1})
    with pytest.raises(DataError, match="finite"):
        apportion(budget, {"a": float("nan")})


@pytest.mark.parametrize("text", ["0", "-3", "1.005", "nan", "many", "1e400x", "inf"])
def test_what_is_no_money(text):
    with pytest.raises(SpecError, match="--budget"):
        money(text)
    assert money("12.5") == Decimal("12.50")


def test_greedy_buys_the_most_value_per_cost_that_fits():
    costs = {"a": Decimal("6"), "b": Decimal("5"), "c": Decimal("5"), "d": Decimal("1")}
    got = buy(Decimal("10"), {"a": 12, "b": 6, "c": 5, "d": -3}, costs)
    assert got.payments == {"a": Decimal("6")}
    assert got.left == Decimal("4")


def test_a_copy_is_bought_once_when_it_adds_nothing():
    costs = dict.fromkeys(["a", "copy", "b"], Decimal("5"))
    values = {"a": 10.0, "copy": 10.0, "b": 4.0}

    def marginal(name, bought):
        return 0.0 if name == "copy" and "a" in bought else values[name]

    assert set(buy(Decimal("10"), values, costs).payments) == {"a", "copy"}
    assert set(buy(Decimal("15"), values, costs, marginal=marginal).payments) == {"a", "b"}


def cents(n: int) -> Decimal:
    return Decimal(n) / 100


@pytest.mark.parametrize("values", [(1, 1, 1), (3, 2, 1), (5, 1, 1), (2, 2, 7), (1, 0, 2)])
def test_the_mechanism_is_feasible_and_truthful_by_enumeration(values):
    """Every cost profile of 1 to 8 cents, every lie of one provider, at a budget of 12 cents."""
    budget, prices = cents(12), range(1, 9)
    worth = named(values)
    outcome = {
        costs: proportional_share(budget, worth, named(map(cents, costs))).payments
        for costs in product(prices, repeat=3)
    }
    for costs, payments in outcome.items():
        assert sum(payments.values()) <= budget
        for i in range(3):
            name = f"p{i}"
            assert name not in payments or payments[name] >= cents(costs[i])
            honest = payments[name] - cents(costs[i]) if name in payments else Decimal(0)
            for lie in prices:
                told = outcome[(*costs[:i], lie, *costs[i + 1 :])]
                assert honest >= (told[name] - cents(costs[i]) if name in told else Decimal(0))


@given(BUDGETS, st.lists(st.tuples(st.floats(0, 1e6), st.integers(1, 10**7)), min_size=1, max_size=10))
@settings(max_examples=150, deadline=None)
def test_purchases_never_exceed_the_budget(budget, offers):
    values = named(value for value, _ in offers)
    costs = named(cents(cost) for _, cost in offers)
    for got in (buy(budget, values, costs), proportional_share(budget, values, costs)):
        assert sum(got.payments.values()) + got.left == budget
        assert got.left >= 0
        assert all(paid >= costs[name] for name, paid in got.payments.items())


def test_a_lower_cost_never_loses():
    values, budget = {"a": 2.0, "b": 3.0, "c": 1.0}, Decimal("1.00")
    for asked in product(range(5, 100, 15), repeat=3):
        costs = dict(zip(values, map(cents, asked), strict=True))
        taken = proportional_share(budget, values, costs).payments
        for name in taken:
            assert name in proportional_share(budget, values, {**costs, name: costs[name] - cents(4)}).payments


def test_costs_are_checked():
    with pytest.raises(DataError, match="'b'"):
        buy(Decimal("1"), {"a": 1, "b": 1}, {"a": Decimal("1")})
    for cost in ("0", "-1", "0.001"):
        with pytest.raises(DataError, match="'a'"):
            proportional_share(Decimal("1"), {"a": 1}, {"a": Decimal(cost)})


def test_prices_are_refused_with_what_to_do():
    assert refuse(queries=10) is None
    assert refuse(queries=50, fidelity=0.8, labels={"a": 5}) is None
    assert "more of what" in (refuse(queries=2) or "")
    assert "0.31" in (refuse(queries=20, fidelity=0.31) or "")
    assert "'b'" in (refuse(queries=20, fidelity=0.9, labels={"a": 30, "b": 1}) or "")

"""Money from values: exact splits, purchases under a budget, and a mechanism in which telling one's cost pays.

Pure functions of exact numbers (Decimal in and out, fractions between): a split sums to the budget to the cent, and
nothing depends on rounding. Three rules divide a budget: by the lower confidence bound of a provider's total value
(what is not sure is not paid), equally, or by tokens. Two rules buy under asked prices: greedily by value per cost, and
Singer's proportional share (Budget Feasible Mechanisms, FOCS 2010) for additive values, which never spends more than
the budget and under which no provider gains by asking for more, or less, than its cost.
A value is not a price: the caller says what a value predicts, for whom and at which model, and whether it may be
priced at all (`refuse`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction

from influent.errors import DataError, SpecError

CENT = Decimal("0.01")
Amount = float | int | Fraction | Decimal

MIN_FIDELITY = 0.5  # Spearman of a student's scores with held-out labels, below which nothing is priced
MIN_LABELS = 5  # held-out labels of each provider, below which nothing is priced
MIN_QUERIES = 10  # of the target: fewer do not show how much a value depends on their choice


@dataclass(frozen=True, slots=True)
class Bought:
    """What was bought: the payment of each provider taken, in the order in which they were taken."""

    payments: dict[str, Decimal]
    left: Decimal


def money(text: str, *, what: str = "--budget") -> Decimal:
    """An amount of money: a positive decimal number with at most two decimals; SpecError for anything else."""
    try:
        amount = Decimal(text.strip())
    except InvalidOperation as e:
        raise SpecError(f"{what}: expected an amount such as 1000 or 1000.50, got {text!r}") from e
    if not amount.is_finite() or amount <= 0 or amount != amount.quantize(CENT):
        raise SpecError(f"{what}: expected a positive amount with at most two decimals, got {text!r}")
    return amount.quantize(CENT)


def apportion(budget: Decimal, weights: Mapping[str, Amount]) -> dict[str, Decimal]:
    """Split a budget in proportion to weights of 0 or more, by largest remainder: it sums exactly, to the cent.

    A larger weight is never paid less; cents left over go to the largest remainders, and among equals to the first.
    Raises DataError when no weight is positive, SpecError for a negative one.
    """
    exact = {name: _exact(weight, name) for name, weight in weights.items()}
    if negative := next((name for name, weight in exact.items() if weight < 0), None):
        raise SpecError(f"the weight of {negative!r} is negative; a share cannot be")
    total = sum(exact.values(), Fraction(0))
    if total == 0:
        raise DataError("no weight is positive: there is nothing by which to divide the budget")
    cents = _cents(budget)
    quotas = {name: cents * weight / total for name, weight in exact.items()}
    shares = {name: quota.numerator // quota.denominator for name, quota in quotas.items()}
    order = sorted(quotas, key=lambda name: shares[name] - quotas[name])  # stable: the largest remainder first
    for name in order[: cents - sum(shares.values())]:
        shares[name] += 1
    return {name: _amount(share) for name, share in shares.items()}


def by_lower_bound(budget: Decimal, lower_totals: Mapping[str, Amount]) -> dict[str, Decimal]:
    """In proportion to the lower confidence bound of each provider's total value; below zero it is paid nothing.

    Raises DataError when no bound is above zero.
    """
    if not any(low > 0 for low in lower_totals.values()):
        raise DataError(
            "no provider's value is surely above zero, so nothing is paid for it; "
            "give more target queries or more labels, or divide equally"
        )
    return apportion(budget, {name: max(low, 0) for name, low in lower_totals.items()})


def equally(budget: Decimal, names: Sequence[str]) -> dict[str, Decimal]:
    """The same for everyone, to the cent."""
    return apportion(budget, dict.fromkeys(names, 1))


def by_tokens(budget: Decimal, tokens: Mapping[str, Amount]) -> dict[str, Decimal]:
    """In proportion to the number of tokens."""
    return apportion(budget, tokens)


def buy(
    budget: Decimal,
    values: Mapping[str, Amount],
    costs: Mapping[str, Decimal],
    *,
    marginal: Callable[[str, Sequence[str]], Amount] | None = None,
) -> Bought:
    """Buy at the asked prices, most value per cost first, what still fits the budget.

    Args:
        marginal: `marginal(name, bought)`, the value of a provider beside those already bought; by default its own
            value, whatever was bought. Providers that add nothing are not bought.
    """
    _check_costs(values, costs)
    left, bought, payments = budget, [], {}
    while True:
        worth = {
            name: _exact(marginal(name, bought) if marginal else value, name)
            for name, value in values.items()
            if name not in payments and costs[name] <= left
        }
        best = max(worth, key=lambda name: worth[name] / Fraction(costs[name]), default=None)
        if best is None or worth[best] <= 0:
            return Bought(payments, left)
        bought.append(best)
        payments[best] = costs[best]
        left -= costs[best]


def proportional_share(budget: Decimal, values: Mapping[str, Amount], costs: Mapping[str, Decimal]) -> Bought:
    """Singer's proportional share for additive values: budget-feasible, truthful, and no one is paid below their cost.

    Sorted by cost per value, the first k are taken for the largest k with c_k / v_k <= B / (v_1 + .. + v_k). Each is
    paid the most it could have asked for and still be taken, v_i min(B / (v_1 + .. + v_k), c_{k+1} / v_{k+1}), rounded
    down to the cent, which is again the highest winning price when prices are in cents. Providers of no value are
    left out; equal ratios go by the order of `values`.
    """
    _check_costs(values, costs)
    worth = {name: exact for name, value in values.items() if (exact := _exact(value, name)) > 0}
    place = {name: number for number, name in enumerate(worth)}
    ratio = {name: Fraction(costs[name]) / worth[name] for name in worth}
    order = sorted(worth, key=lambda name: (ratio[name], place[name]))
    whole, taken, total, share = Fraction(budget), 0, Fraction(0), Fraction(0)
    for k, name in enumerate(order, 1):
        total += worth[name]
        if ratio[name] <= whole / total:
            taken, share = k, whole / total
    rival = order[taken] if taken < len(order) else None
    payments = {name: _threshold(name, rival, share, worth, ratio, place) for name in order[:taken]}
    return Bought(payments, budget - sum(payments.values(), Decimal(0)))


def _threshold(
    name: str,
    rival: str | None,
    share: Fraction,
    worth: Mapping[str, Fraction],
    ratio: Mapping[str, Fraction],
    place: Mapping[str, int],
) -> Decimal:
    """The highest price in cents at which `name` is still taken."""
    price = share * worth[name] * 100
    cents = price.numerator // price.denominator
    if rival is None:
        return _amount(cents)
    beside = ratio[rival] * worth[name] * 100
    most = beside.numerator // beside.denominator
    if most == beside and place[name] > place[rival]:  # at that very price the rival would go first
        most -= 1
    return _amount(min(cents, most))


def refuse(
    *,
    queries: int,
    fidelity: float | None = None,
    labels: Mapping[str, int] | None = None,
) -> str | None:
    """Why these values must not be priced, and what to do about it; None when they may.

    Args:
        fidelity: the Spearman correlation of a student's scores with held-out labels; None when rows were not scored
            by a student.
        labels: held-out labels of each provider; None when every row is labelled.
    """
    if queries < MIN_QUERIES:
        return f"the target has {queries} queries, prices need {MIN_QUERIES}: give more of what the model should do"
    if fidelity is not None and fidelity < MIN_FIDELITY:
        return (
            f"the student's held-out Spearman is {fidelity:.2f}, prices need {MIN_FIDELITY}: "
            "distil with more labels or a larger student"
        )
    few = min(labels.items(), key=lambda item: item[1]) if labels else None
    if few is not None and few[1] < MIN_LABELS:
        return (
            f"provider {few[0]!r} has {few[1]} held-out labels among its rows, prices need {MIN_LABELS}: "
            "index a random sample of its rows and distil again, or pass --labels of an audit"
        )
    return None


def _check_costs(values: Mapping[str, Amount], costs: Mapping[str, Decimal]) -> None:
    if missing := sorted(values.keys() - costs.keys()):
        raise DataError(f"no cost is given for provider {missing[0]!r}; give one for each of the {len(values)}")
    if free := next((name for name in values if costs[name] <= 0), None):
        raise DataError(f"the cost of {free!r} is {costs[free]}; expected a positive amount")
    if odd := next((name for name in values if costs[name] != costs[name].quantize(CENT)), None):
        raise DataError(f"the cost of {odd!r} is {costs[odd]}; expected at most two decimals")


def _exact(value: Amount, name: str) -> Fraction:
    try:
        return Fraction(value)
    except (ValueError, OverflowError) as e:
        raise DataError(f"the value of {name!r} is {value}; expected a finite number") from e


def _cents(budget: Decimal) -> int:
    if budget != budget.quantize(CENT) or budget < 0:
        raise SpecError(f"the budget is {budget}; expected an amount of 0 or more with at most two decimals")
    return int(budget * 100)


def _amount(cents: int) -> Decimal:
    return (Decimal(cents) / 100).quantize(CENT)

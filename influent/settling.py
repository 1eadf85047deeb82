"""From a provider report to money: the three splits of a budget, a purchase at asked prices, or why neither is given.

Not here: the rules (payments.py), values and intervals (providers.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any

from influent.errors import DataError
from influent.payments import (
    Bought,
    apportion,
    buy,
    by_lower_bound,
    by_tokens,
    equally,
    money,
    proportional_share,
)
from influent.records import read_records

RULE = "lower_bound"


def read_costs(path: str | None) -> dict[str, Decimal] | None:
    """What each provider asks for its rows: a CSV or JSONL file with the columns `provider` and `cost`.

    Raises DataError, with file and line, for a record without them or a provider that is given twice.
    """
    if path is None:
        return None
    costs: dict[str, Decimal] = {}
    for record in read_records(path):
        name, cost = record.fields.get("provider"), record.fields.get("cost")
        if not isinstance(name, str) or cost is None:
            got = ", ".join(record.fields) or "nothing"
            raise DataError(f"{record.where}: expected the fields provider and cost, got {got}")
        if name in costs:
            raise DataError(f"{record.where}: provider {name!r} has a cost already")
        costs[name] = money(str(cost), what=f"{record.where}: cost")
    return costs


def settle(
    providers: Sequence[dict[str, Any]],
    *,
    budget: Decimal | None,
    costs: Mapping[str, Decimal] | None,
    refused: str | None,
    marginal: Callable[[str, Sequence[str]], float] | None = None,
) -> dict[str, Any] | None:
    """Set each provider's `payment` and return the report's section on money; None without a budget.

    Args:
        providers: documents of providers.report; `payment` is filled in.
        costs: what each asks; given, the payment is that of a greedy purchase, with the truthful mechanism beside it.
        refused: why these values may not be priced.
        marginal: as in payments.buy.
    """
    if budget is None:
        return None
    section: dict[str, Any] = {"budget": str(budget), "rule": None, "refused": refused}
    if refused is not None:
        return section
    totals = {p["provider"]: p["total"] for p in providers}
    try:
        splits = _splits(budget, providers)
        chosen, section["rule"] = splits[RULE], RULE
        section["splits"] = {name: _text(split) for name, split in splits.items()}
        if costs is not None:
            bought = buy(budget, totals, costs, marginal=marginal)
            chosen, section["rule"] = bought.payments, "greedy" if marginal is None else "greedy with diversity"
            section["purchase"] = _bought(bought)
            section["mechanism"] = _bought(proportional_share(budget, totals, costs))
    except DataError as e:
        return {**section, "rule": None, "refused": str(e)}
    for p in providers:
        p["payment"] = str(chosen.get(p["provider"], Decimal("0.00")))
    return section


def _splits(budget: Decimal, providers: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Decimal]]:
    lower = {p["provider"]: p["rows"] * p["low"] for p in providers}
    tokens = {p["provider"]: p["tokens"] for p in providers}
    return {
        "lower_bound": by_lower_bound(budget, lower),
        "equal": equally(budget, list(lower)),
        "per_token": by_tokens(budget, tokens) if any(tokens.values()) else apportion(budget, dict.fromkeys(tokens, 1)),
    }


def _bought(bought: Bought) -> dict[str, Any]:
    return {"payments": _text(bought.payments), "left": str(bought.left)}


def _text(amounts: Mapping[str, Decimal]) -> dict[str, str]:
    """Money as decimal text: a JSON number would be read as binary."""
    return {name: str(amount) for name, amount in amounts.items()}

"""What a provider report shows at a terminal of a given width."""

import io
from typing import Any

import pytest
from rich.console import Console

from influent.value_page import print_value


def document() -> dict[str, Any]:
    """A report with a budget, as `value` gives it, without its rows."""
    provider = {
        "provider": "a name that is longer than its column", "rows": 123_456, "value": -0.312, "low": -0.363,
        "high": 0.255, "rank": 1, "rank_low": 1, "rank_high": 12, "positive": 1.0, "payment": "1234567.89",
        "duplicates": {"near_within": 12, "near_across": 3}, "leaks": {"rows": 4},
    }  # fmt: skip
    return {
        "providers": [provider], "target": {"queries": 12}, "rows": {"best": [], "worst": []}, "fidelity": None,
        "method": {"unit": "mean cosine", "interval": "queries"}, "payments": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("width", "columns"),
    [
        (80, {"provider", "rows", "value", "interval", "rank", "paid"}),
        (90, {"provider", "rows", "value", "interval", "rank", "copies", "paid"}),
        (120, {"provider", "rows", "value", "interval", "rank", "positive", "copies", "leaks", "paid"}),
    ],
)
def test_a_narrow_terminal_loses_columns_and_no_digit_of_a_number(width: int, columns: set[str]) -> None:
    out = io.StringIO()
    print_value(document(), Console(file=out, width=width))
    head, row = (next(line for line in out.getvalue().splitlines() if word in line) for word in ("interval", "a name"))
    assert set(head.split()) == columns
    for number in ("123,456", "-0.312", "-0.363 to +0.255", "1 (1-12)", "1234567.89"):
        assert number in row

"""How much damping: a multiple of each block's mean eigenvalue, an amount, or a published rule. Numbers only."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

from .errors import SpecError


@dataclass(frozen=True, slots=True)
class Damping:
    """lambda with its unit: `relative:0.1` of the mean eigenvalue tr(F) / min(N, K) of each block, or `absolute:1e-3`.

    >>> str(Damping.parse("relative:1e-1"))
    'relative:0.1'
    """

    unit: str
    value: float

    def __post_init__(self):
        if self.unit not in ("relative", "absolute"):
            raise SpecError(f"damping: expected relative:NUMBER or absolute:NUMBER, got the unit {self.unit!r}")
        if not (isfinite(self.value) and self.value >= 0):
            raise SpecError(f"damping: expected a finite number of 0 or more, got {self.value}")

    @classmethod
    def parse(cls, text: str) -> Damping:
        unit, _, number = text.partition(":")
        try:
            return cls(unit.strip(), float(number))
        except ValueError as e:
            if isinstance(e, SpecError):
                raise
            raise SpecError(f"damping: expected relative:NUMBER or absolute:NUMBER, got {text!r}") from None

    def __str__(self) -> str:
        return f"{self.unit}:{self.value!r}".removesuffix(".0")

    def amount(self, trace: float, rank: int) -> float:
        """lambda for a block whose Fisher matrix has this trace and at most this rank."""
        return self.value * trace / rank if self.unit == "relative" else self.value


@dataclass(frozen=True, slots=True)
class Published:
    """The damping rules of LoRIF, in the scale of F: `paper` (0.1 times the mean of the squared singular values found,
    oversampling included; tail over all K - r directions left) and `release` (half of tr F / K; no tail)."""

    rule: str

    def __post_init__(self):
        if self.rule not in PUBLISHED:
            raise SpecError(f"parity is {self.rule!r}, expected one of {', '.join(PUBLISHED)}")

    def __str__(self) -> str:
        return self.rule

    def amounts(self, trace: float, kept: float, mean: float, rank: int, width: int) -> tuple[float, float]:
        """(lambda, tau) given tr F, the sum of the `rank` eigenvalues kept, and the mean of all that were found."""
        if self.rule == "release":
            return 0.5 * trace / width, 0.0
        return 0.1 * mean, max(trace - kept, 0.0) / (width - rank) if width > rank else 0.0


PUBLISHED = ("paper", "release")
DEFAULT = Damping("relative", 0.1)
# Of EK-FAC at full size: better than 0.1 and 1 on each of three models (benchmarks/results/kron.json).
CORRECTED = Damping("relative", 0.01)
# Of low rank: what lies outside the kept directions counts for less then. See benchmarks/results/lorif.json (agreement
# with the exact scores) and frontier.json (LDS of whitened rows).
LOW_RANK = Damping("relative", 1.0)

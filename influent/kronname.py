"""Names of curvatures that are fitted through the model: `ekfac`, `kfac:compressed`, `cg:20@512`, … Text only.

    FORM[:ITERATIONS][:compressed][:empirical][@ROWS][:DAMPING]

FORM is kfac, ekfac or cg; only cg has a number of iterations. `compressed` fits the factors to the compressed sides,
`empirical` to the data's labels instead of labels drawn from the model, `@ROWS` to so many of the rows.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from .damping import CORRECTED, DEFAULT, Damping
from .errors import SpecError

FORMS = ("kfac", "ekfac", "cg")
LABELS = ("sampled", "empirical")
ITERATIONS, CG_ROWS = 20, 512
_TEXT = re.compile(
    r"(?P<form>kfac|ekfac|cg)(?::(?P<iterations>[1-9]\d*))?(?P<compressed>:compressed)?(?P<empirical>:empirical)?"
    r"(?:@(?P<rows>[1-9]\d*))?(?::(?P<damping>(?:relative|absolute):.*))?",
    re.ASCII,
)
HELP = "kfac, ekfac or cg:ITERATIONS, then :compressed, :empirical, @ROWS and a damping as wanted"


@dataclass(frozen=True, slots=True)
class KronName:
    """A name as a value: `str(parse(text))` is its canonical text. `rows` is None for all of them."""

    form: str
    iterations: int | None = None
    compressed: bool = False
    labels: str = "sampled"
    rows: int | None = None
    damping: Damping | None = None

    @property
    def basis(self) -> KronName:
        """What has to be fitted: the name without a damping."""
        return replace(self, damping=None)

    @property
    def preconditioner(self) -> KronName:
        """The EK-FAC fit that conjugate gradients start from."""
        return KronName("ekfac", labels=self.labels)

    @property
    def default(self) -> Damping:
        """The damping in use when none is given."""
        return CORRECTED if self.form == "ekfac" and not self.compressed else DEFAULT

    def damped(self, damping: Damping | None) -> KronName:
        """With this damping, or its own, or the default.

        Raises:
            SpecError: it has another one.
        """
        if damping is not None and self.damping is not None and damping != self.damping:
            raise SpecError(f"curvature {str(self)!r} and damping {str(damping)!r} differ: give one of the two")
        return replace(self, damping=damping or self.damping or self.default)

    def __str__(self) -> str:
        parts = [self.form, *([] if self.iterations is None else [str(self.iterations)])]
        parts += ["compressed"] * self.compressed + ["empirical"] * (self.labels == "empirical")
        text = ":".join(parts) + ("" if self.rows is None else f"@{self.rows}")
        return text if self.damping is None else f"{text}:{self.damping}"


def parse(text: str) -> KronName | None:
    """None when the text does not begin as such a name; SpecError when it goes on wrongly.

    >>> [str(parse(text)) for text in ("ekfac", "kfac:compressed:relative:1e-1", "cg", "ekfac:empirical@64")]
    ['ekfac', 'kfac:compressed:relative:0.1', 'cg:20@512', 'ekfac:empirical@64']
    """
    if re.split("[:@]", text, maxsplit=1)[0] not in FORMS:
        return None
    match = _TEXT.fullmatch(text)
    form = "" if match is None else match["form"]
    cg = form == "cg"
    if match is None or (match["iterations"] and not cg) or (match["compressed"] and cg):
        raise SpecError(f"curvature {text!r}: expected {HELP}, as in ekfac:relative:0.1")
    rows = int(match["rows"]) if match["rows"] else CG_ROWS if cg else None
    return KronName(
        form, int(match["iterations"] or ITERATIONS) if cg else None, bool(match["compressed"]),
        "empirical" if match["empirical"] else "sampled", rows,
        Damping.parse(match["damping"]) if match["damping"] else None,
    )  # fmt: skip


def with_labels(name: KronName, labels: str | None) -> KronName:
    """The name with an option of the command; SpecError for another value, or one that contradicts the name."""
    if labels is None or labels == name.labels:
        return name
    if labels not in LABELS:
        raise SpecError(f"labels is {labels!r}, expected one of {', '.join(LABELS)}")
    if labels == "sampled":
        raise SpecError(f"curvature {str(name)!r} and labels {labels!r} differ: give one of the two")
    return replace(name, labels=labels)

"""The low-rank Fisher matrix as artifacts: eigenvectors without a damping, which every damping then shares.

`lowrank:R` takes four passes over the rows; `sketch:R` one, and after an append only one over the new rows. The names
of both, what they were fitted to, and the solver of each block. The mathematics is lowrank.py's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .artifact import Artifact, digest, finished
from .damping import LOW_RANK, PUBLISHED, Damping, Published
from .errors import SpecError
from .fitting import Compute, Health, Solver, block_rows, write_blocks
from .gram import MEMORY, BlockRows, RowSource, Vanishing
from .lowrank import (
    ITERATIONS,
    OVERSAMPLING,
    Sketch,
    Spectrum,
    Stored,
    Woodbury,
    leading_spectrum,
    sketch,
    spectrum_of,
    start,
)
from .progress import Progress

FORMS = ("lowrank", "sketch")
RANK = 512
REFERENCE = Damping("relative", 1e-3)  # the least damping that the stored precision is chosen for
ROUNDING = 1e-9  # a share of the trace that is left out only by rounding


@dataclass(frozen=True, slots=True)
class Name:
    """`lowrank:512`, `sketch:512`, `lowrank:512@900` (fitted when there were 900 rows), each with or without a damping
    or published rule behind another colon; without a rank, `rank` is None and stands for the only one, or 512."""

    form: str
    rank: int | None
    rows: int | None
    damping: Damping | Published

    @property
    def basis(self) -> str:
        """The name of the eigenvectors alone."""
        rank = "" if self.rank is None else f":{self.rank}"
        return f"{self.form}{rank}" + ("" if self.rows is None else f"@{self.rows}")


def parse_name(text: str) -> Name | None:
    """None when the text does not begin as the name of a low-rank curvature; SpecError when it goes on wrongly."""
    return split_name(text)[0]


def split_name(text: str) -> tuple[Name | None, bool]:
    """The same, and whether the text has a damping or rule of its own (else the name's is the default)."""
    form, _, rest = text.partition(":")
    if form not in FORMS:
        return None, False
    size, _, amount = rest.partition(":")
    if size in (*PUBLISHED, "relative", "absolute"):
        size, amount = "", rest
    rank, at, rows = size.partition("@")
    for part in ([rank] if size else []) + ([rows] if at else []):
        if not (part.isascii() and part.isdecimal() and int(part) > 0):
            raise SpecError(
                f"curvature {text!r}: expected {form}:RANK, {form}:RANK@ROWS, or either and a damping, as in "
                f"{form}:512:relative:0.1"
            )
    wanted = LOW_RANK if not amount else Published(amount) if amount in PUBLISHED else Damping.parse(amount)
    return Name(form, int(rank) if rank else None, int(rows) if at else None, wanted), bool(amount)


def bases(index: RowSource) -> dict[str, Artifact]:
    """The finished fits of low rank by name, those of earlier generations of the index included."""
    earlier = {past["digest"] for past in index.history}
    found = {}
    for folder, form in finished(index.store, "curvature/"):
        if form in FORMS:
            basis = Artifact.open(folder, form)
            if basis.spec["index"] == index.digest:
                found[f"{form}:{basis.spec['rank']}"] = basis
            elif basis.spec["index"] in earlier:
                found[f"{form}:{basis.spec['rank']}@{basis.summary['rows']}"] = basis
    return found


def fit_basis(index: RowSource, name: Name, *, memory: int = MEMORY, progress: Progress | None = None) -> Artifact:
    """The eigenvectors of that name: found if there, else fitted to all rows; a sketch goes on from the largest one of
    an earlier generation.

    Raises SpecError for a name with a number of rows that nothing was fitted to.
    """
    found = bases(index)
    if name.rows is not None:
        if name.basis not in found:
            raise SpecError(f"curvature {name.basis!r}: not fitted; there is {', '.join(sorted(found)) or 'none'}")
        return found[name.basis]
    rank = name.rank or RANK
    spec: dict[str, Any] = {
        "statistic": name.form, "index": index.digest, "rank": rank, "precision": str(REFERENCE)
    }  # fmt: skip
    if name.form == "lowrank":
        spec |= {"oversampling": OVERSAMPLING, "iterations": ITERATIONS}
        return write_blocks(index, name.form, spec, _iterate(index, rank, memory), progress=progress)
    earlier = [basis for full, basis in found.items() if full.startswith(f"sketch:{rank}@")]
    known = max(earlier, key=lambda basis: basis.summary["rows"], default=None)
    first = 0 if known is None else known.summary["rows"]
    compute = _extend(index, rank, known, first, memory)
    return write_blocks(index, name.form, spec, compute, first=first, progress=progress)


def _iterate(index: RowSource, rank: int, memory: int) -> Compute:
    def compute(key: str):
        rows = BlockRows(index, key, memory)
        return _payload(leading_spectrum(rows, min(rank, rows.num_rows, rows.width)), rank)

    return compute


def _extend(index: RowSource, rank: int, known: Artifact | None, first: int, memory: int) -> Compute:
    """Twice the rank in columns: measured, one pass then captures what four do with ten columns to spare. As many
    whatever N is, because rows may be appended."""

    def compute(key: str):
        rows = BlockRows(index, key, memory, first)
        basis = start(key, rows.width, min(2 * rank, rows.width))
        sums = sketch(rows, basis)
        if known is not None:
            known.check(key)
            squares = next(record.meta["squares"] for record in known.records if record.name == key)
            sums = Sketch(known.tensors(key)["product"], squares, first) + sums
        tensors, meta = _payload(spectrum_of(sums, basis), rank)
        return {**tensors, "product": sums.product}, {**meta, "squares": sums.squares}

    return compute


def _payload(found: Spectrum, rank: int) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
    values = found.values
    kept = min(rank, len(values), found.num_rows, len(found.vectors))
    tail, most = found.tail(kept), min(found.num_rows, len(found.vectors))
    exact = tail * (most - kept) <= ROUNDING * found.trace  # then so is what is kept of the precision
    stored = Stored.of(
        found.vectors[:, :kept], values[:kept], 0.0 if exact else REFERENCE.amount(found.trace, most) + tail
    )
    total = float(values[:kept].sum())
    mean = float(values[: rank + OVERSAMPLING].mean()) if len(values) else 0.0  # a sketch finds 2 R, the paper R + 10
    meta = {
        "trace": found.trace, "rows": found.num_rows, "rank": kept, "tail": 0.0 if exact else tail, "kept": total,
        "mean": mean, "least": stored.least_base(values[:kept]), "top": values[:3].tolist(),
    }  # fmt: skip
    return {
        "values": values[:kept].contiguous(), "fine": stored.fine, "coarse": stored.coarse, "overlaps": stored.overlaps
    }, meta  # fmt: skip


class Truncated:
    """The leading eigenvectors with one damping: see docs/scores.md. One block in memory at a time.

    Raises SpecError when the eigenvectors were not stored precisely enough for so little damping.
    """

    def __init__(self, index: RowSource, basis: Artifact, damping: Damping | Published, *, memory: int = MEMORY):
        self.index, self.basis, self.damping, self.memory = index, basis, damping, memory
        self.num_rows: int = basis.summary["rows"]
        seen = "" if basis.spec["index"] == index.digest else f"@{self.num_rows}"
        self.name = f"{basis.kind}:{basis.spec['rank']}{seen}:{damping}"
        self.digest = digest({"basis": basis.digest, "damping": str(damping)})
        self._meta = {record.name: record.meta for record in basis.records}
        self._amounts = {key: self._amount(key) for key in index.widths}
        self._check_precision()

    @property
    def seen(self) -> float:
        """The share of the index's rows that it was fitted to; below 1, it is stale."""
        return self.num_rows / self.index.n

    def solver(self, key: str) -> Solver:
        rows = block_rows(self.index, key, self.memory)
        damping, tail = self._amounts[key]
        if self._meta[key]["trace"] == 0 and damping == 0:
            return Solver(rows, Vanishing())
        self.basis.check(key)
        tensors = self.basis.tensors(key)
        stored = Stored(tensors["fine"], tensors["coarse"], tensors["overlaps"])
        return Solver(rows, Woodbury(stored.vectors(), stored.correction(), tensors["values"], damping, tail))

    def health(self) -> Health:
        """Per block: `lambda` in use, `trace` of F, `d_eff` = sum of s / (s + lambda) over all eigenvalues s, those of
        the tail taken as equal; `form`; `rank` kept, the share of the trace in it (`captured`), the mean eigenvalue
        beyond it (`tail`), and the three largest (`top`)."""
        return {key: self._health(key) for key in self.index.widths}

    def _health(self, key: str) -> dict[str, Any]:
        meta, (damping, tail) = self._meta[key], self._amounts[key]
        values = self.basis.tensors(key)["values"]
        alive = float((values / (values + damping)).sum()) if meta["rank"] else 0.0
        beyond = self._most(key) - meta["rank"]
        if tail > 0:
            alive += beyond * tail / (tail + damping)
        return {
            "lambda": damping, "trace": meta["trace"], "d_eff": alive,
            "form": self.basis.kind if meta["trace"] > 0 else "zero", "rank": meta["rank"], "tail": tail,
            "captured": min(meta["kept"] / meta["trace"], 1.0) if meta["trace"] > 0 else 1.0, "top": meta["top"],
        }  # fmt: skip

    def _most(self, key: str) -> int:
        """How many directions the rows can span, as the rule in use counts them."""
        width = self.index.widths[key]
        return width if isinstance(self.damping, Published) else min(self.num_rows, width)

    def _amount(self, key: str) -> tuple[float, float]:
        meta = self._meta[key]
        if isinstance(self.damping, Published):
            width = self.index.widths[key]
            return self.damping.amounts(meta["trace"], meta["kept"], meta["mean"], meta["rank"], width)
        return self.damping.amount(meta["trace"], self._most(key)), meta["tail"]

    def _check_precision(self) -> None:
        short = {key: meta["least"] for key, meta in self._meta.items() if sum(self._amounts[key]) < meta["least"]}
        if not short:
            return
        key = max(short, key=lambda key: short[key] / self._meta[key]["trace"])
        meta = self._meta[key]
        least = short[key] - meta["tail"]
        relative = Damping("relative", float(f"{1.1 * least * self._most(key) / meta['trace']:.2g}"))
        raise SpecError(
            f"block {key!r}: {self.basis.kind}:{self.basis.spec['rank']} is stored for a damping of {relative} or "
            f"more, got {self.damping}: raise it, or give --curvature fim, which is exact for any"
        )

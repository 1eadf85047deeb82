"""The plots of an evaluation: one panel a metric, as PNG bytes. Needs matplotlib (the extra `plots`).

Not here: numbers; everything drawn is in the document.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from influent.errors import SpecError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Doc = Mapping[str, Any]
AXES = {
    "lds": "LDS",
    "loo": "rank correlation with leaving out",
    "tail-patch": "gain in log-probability",
    "mislabel": "AUC",
    "retrieval": "reciprocal rank",
}
CURVES = {
    "brittleness": ("removed", "rise", "top rows removed", "rise of the query's loss"),
    "selection": ("shares", "loss", "share of the rows kept", "loss of the queries"),
    "removal": ("shares", "loss", "share of the rows removed", "loss of the queries"),
}


def png(document: Doc) -> bytes:
    """The plots of a document of `influent evaluate`; SpecError when matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as e:
        raise SpecError("plots need matplotlib: pip install 'influent[plots]'") from e
    names = [name for name in (*AXES, *CURVES) if name in document]
    columns, lines = min(3, len(names)), -(-len(names) // 3)
    figure = Figure(figsize=(4.8 * columns, 3.4 * lines), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    for place, name in enumerate(names, 1):
        axes = figure.add_subplot(lines, columns, place)
        (_bars if name in AXES else _lines)(axes, name, document[name])
        axes.set_title(name, fontsize=10)
    sink = io.BytesIO()
    figure.savefig(sink, format="png", metadata={"Software": None})  # equal documents give equal bytes
    return sink.getvalue()


def _bars(axes: Axes, name: str, part: Doc) -> None:
    """Means with their intervals, best first."""
    methods = sorted(part["methods"].items(), key=lambda item: item[1]["mean"])
    for place, (_, found) in enumerate(methods):
        spread = [[max(0.0, found["mean"] - found["low"])], [max(0.0, found["high"] - found["mean"])]]
        axes.barh(place, found["mean"], xerr=spread, color="tab:blue", alpha=0.75, capsize=3)
    axes.set_yticks(range(len(methods)), [method for method, _ in methods], fontsize=8)
    axes.axvline(0.5 if name == "mislabel" else 0.0, color="black", linewidth=0.8)
    axes.set_xlabel(AXES[name], fontsize=8)


def _lines(axes: Axes, name: str, part: Doc) -> None:
    """A curve a method; chance is dashed."""
    across, up, xlabel, ylabel = CURVES[name]
    for method, found in part["methods"].items():
        look = ("grey", "--") if method == "random" else (None, "-")
        axes.plot(part[across], found[up], marker="o", markersize=3, label=method, color=look[0], linestyle=look[1])
    axes.set_xlabel(xlabel, fontsize=8)
    axes.set_ylabel(ylabel, fontsize=8)
    axes.legend(fontsize=7)

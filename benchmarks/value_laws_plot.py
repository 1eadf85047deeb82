"""The picture of docs/value.md, docs/value_laws.png, from results/value_laws.json."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PICTURE = Path(__file__).parent.parent / "docs" / "value_laws.png"
RULES = ("LinFiK", "LinFiK, diversity 1", "student", "BM25", "bottom", "all")


def draw(found: dict[str, Any]) -> None:
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    for axis, one in zip(axes.flat, LAWS, strict=True):
        one(axis, found)
    figure.savefig(PICTURE, dpi=110)


def linearity(axis: Any, found: dict[str, Any]) -> None:
    law = found["linearity"]
    for form, label in (("linear layers", "SGD, one row"), ("batch, linear layers", "SGD, 16 rows"),
                        ("Adam, linear layers", "Adam, one row")):  # fmt: skip
        axis.semilogx(law["rates"], law["topic"][form]["ratio"], marker="o", markersize=3, label=label)
    axis.axhline(1, color="grey", linewidth=0.8)
    axis.set(ylim=(-1, 2), xlabel="learning rate (SGD: of the summed loss)", ylabel="actual / predicted drop",
             title="One step: how much of the predicted drop happens")  # fmt: skip
    axis.legend()


def coverage(axis: Any, found: dict[str, Any]) -> None:
    law = found["coverage"]["topic"]["by labels"]
    sizes = [100 * float(size) for size in law]
    for kind in ("labels", "labels and queries"):
        cells = [law[size][kind] for size in law]
        axis.plot(sizes, [c["mean"] for c in cells], marker="o", label=kind)
        axis.fill_between(sizes, [c["least"] for c in cells], [c["largest"] for c in cells], alpha=0.15)
    axis.axhspan(0.93, 0.97, color="grey", alpha=0.2)
    axis.set(ylim=(0.75, 1.0), xlabel="rows labelled, %", ylabel="share of draws that hold the truth", xscale="log",
             title="95 % intervals of providers (band: one provider)")  # fmt: skip
    axis.legend(loc="lower right")


def selection(axis: Any, found: dict[str, Any]) -> None:
    law = found["selection"]["targets"]
    width = 0.8 / len(law)
    for number, (target, cell) in enumerate(law.items()):
        for place, rule in enumerate(RULES):
            gains = [gain / by for gain, by in zip(cell["gains"][rule], cell["noise"], strict=True)]
            axis.bar(place + (number - len(law) / 2 + 0.5) * width, sum(gains) / len(gains), width,
                     color=f"C{number}", label=target if place == 0 else None)  # fmt: skip
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_yscale("symlog", linthresh=2)
    axis.set(xticks=range(len(RULES)), ylabel="loss below that of random rows, in its deviations",
             title="Fine-tuned on a tenth of the rows: held-out query loss")  # fmt: skip
    axis.set_xticklabels(RULES, rotation=20, ha="right")
    axis.legend()


def drift(axis: Any, found: dict[str, Any]) -> None:
    law = found["drift"]
    epochs = [law["epochs"] * moment for moment in law["moments"]]
    for number, target in enumerate(("topic", "president", "genre", "trigger")):
        axis.plot(epochs, law[target]["cosine"]["rows"], marker="o", color=f"C{number}", label=target)
        axis.plot(epochs, law[target]["none"]["rows"], linestyle=":", color=f"C{number}")
    axis.set(ylim=(-0.3, 1.02), xlabel="epochs of training on the offer", ylabel="Spearman with LinFiK at the start",
             title="How values age (dotted: without cosine)")  # fmt: skip
    axis.legend()


LAWS = (linearity, coverage, selection, drift)

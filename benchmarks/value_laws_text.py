"""The tables of docs/value.md that come from results/value_laws.json, between its marks."""

import textwrap
from pathlib import Path
from typing import Any

import numpy as np

PAGE = Path(__file__).parent.parent / "docs" / "value.md"
MARK = "laws"


def write(document: dict[str, Any], *, picture: bool) -> None:
    before, rest = PAGE.read_text().split(f"<!-- {MARK} -->\n")
    after = rest.split(f"<!-- /{MARK} -->\n")[1]
    writers = (linearity, coverage, selection, without, drift, attack)
    found = [line for w in writers if w.__name__ in document for line in (*w(document[w.__name__]), "")]
    made = "\n".join(line if line.startswith("|") else textwrap.fill(line, 120) for line in found[:-1])
    if picture:
        made = f"![The laws of value](value_laws.png)\n\n{made}"
    PAGE.write_text(f"{before}<!-- {MARK} -->\n{made}\n<!-- /{MARK} -->\n{after}")


def linearity(law: dict[str, Any]) -> list[str]:
    lines = [
        "**One step.** Up to which learning rate the drop is the predicted one within 10 % (each seed), and what share "
        "of it happens at a tenth of that rate (or at the least one tried):",
        "",
        "| target | step | rate at 10 % error | actual / predicted below it | correlation |",
        "|---|---|---|---|---|",
    ]
    targets = [target for target in ("topic", "trigger") if target in law]
    for target in targets:
        for form, name in (
            ("linear layers", "SGD, one row"),
            ("batch, linear layers", f"SGD, {law['batch']} rows"),
            ("all parameters", "SGD of all parameters"),
            ("all parameters, predicted by linear layers", "the same, foretold by the tracked layers alone"),
            ("Adam, linear layers", "Adam, one row (`--scale adam-step`)"),
        ):
            cell = law[target][form]
            reached = [rate for rate in cell["rate at 10 % error"] if rate is not None]
            at = int(np.searchsorted(law["rates"], min(reached) / 10)) if reached else 0
            shown = ", ".join("-" if rate is None else f"{rate:.1g}" for rate in cell["rate at 10 % error"])
            lines.append(f"| {target} | {name} | {shown} | {cell['ratio'][at]:.3f} | {cell['pearson'][at]:.4f} |")
    exact = max(v for t in targets for v in law[t]["package against float64"]["seeds"])
    sketch = np.mean([law[t]["sketch against exact, spearman"]["mean"] for t in targets])
    note = (
        f"Rates of SGD are for losses summed over a row's {law['tokens a row']:.0f} tokens, of Adam for their mean. "
        f"The package's value is the float64 product within {exact:.0e}; rank correlation of sketched values with it "
        f"{sketch:.2f}."
    )
    return [*lines, "", note]


def coverage(law: dict[str, Any]) -> list[str]:
    lines = [
        "**Intervals.** How often the 95 % interval of a provider holds the truth, over 200 draws, providers and seeds "
        "(least and most of one provider):",
        "",
        "| of | interval | sample | holds the truth |",
        "|---|---|---|---|",
    ]
    for target, cell in law.items():
        for by, unit in (("by labels", "of the rows labelled"), ("by queries", "queries")):
            for size, kinds in cell[by].items():
                shown = f"{100 * float(size):.0f} % {unit}" if by == "by labels" else f"{size} {unit}"
                for kind, c in kinds.items():
                    lines.append(
                        f"| {target} | {kind} | {shown} | {c['mean']:.3f} ({c['least']:.2f} to {c['largest']:.2f}) |"
                    )
    return lines


RULES = ("LinFiK", "LinFiK, diversity 1", "student", "BM25", "bottom", "all")


def selection(law: dict[str, Any]) -> list[str]:
    lines = [
        "**Selection.** The teacher fine-tuned on a tenth of the rows: how much lower than after a random tenth the "
        "held-out query loss is, nats a token, mean over seeds; the last column is the deviation of one random draw:",
        "",
        f"| target | seeds | {' | '.join(RULES)} | random's own |",
        f"|---|---|{'---|' * (len(RULES) + 1)}",
    ]
    for target, cell in law["targets"].items():
        gains = " | ".join(f"{np.mean(cell['gains'][rule]):+.3f}" for rule in RULES)
        lines.append(f"| {target} | {len(cell['noise'])} | {gains} | {np.mean(cell['noise']):.3f} |")
    return lines


def without(law: dict[str, Any]) -> list[str]:
    lines = [
        "**Without a provider.** Rank correlation over 12 providers of a held-out loss's rise without one, "
        f"{law['runs'][0]} trainings each, with its value; beside it that of two halves of the trainings, which bounds "
        "what can be seen:",
        "",
        "| target | total value | mean cosine | number of rows | halves | rise, nats | its error |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, cell in law.items():
        if name.endswith(", held"):
            keys = ("total", "value cosine", "rows", "halves", "rise", "error of a rise")
            numbers = [cell[key]["mean"] for key in keys]
            shown = " | ".join("-" if v is None else f"{v:.4f}" if k > 3 else f"{v:.2f}" for k, v in enumerate(numbers))
            lines.append(f"| {name.removesuffix(', held')} | {shown} |")
    return lines


def drift(law: dict[str, Any]) -> list[str]:
    moments = [f"{law['epochs'] * moment:g} epochs" for moment in law["moments"][1:]]
    lines = [
        "**Drift.** Spearman correlation of values at the start with those later in a training on the offer, with "
        "their sum by learning rate (TracIn), and with the same values from other random maps:",
        "",
        f"| target | {' | '.join(moments)} | TracIn | other maps |",
        f"|---|{'---|' * (len(moments) + 2)}",
    ]
    for target in ("topic", "president", "genre", "trigger"):
        cell = law[target]["cosine"]
        rows = " | ".join(f"{v:.2f}" for v in cell["rows"][1:])
        lines.append(f"| {target} | {rows} | {cell['tracin']:.2f} | {cell['other maps']:.2f} |")
    return lines


def attack(law: dict[str, Any]) -> list[str]:
    rules = ("lower_bound", "per_token", "equal", "mechanism", "purchase, diversity 0", "purchase, diversity 1")
    lines = [
        "**Copies.** What a provider of middle value is paid of 1,000, honest and after offering 20 rows ten times "
        "more (its own best, the best provider's, or its own with two words swapped), mean over seeds:",
        "",
        f"| copies | taken out | {' | '.join(rules)} |",
        f"|---|---|{'---|' * len(rules)}",
    ]
    honest = next(iter(law.values()))["none"]
    lines.append(f"| none (honest) | | {' | '.join(f'{np.mean([p[0] for p in honest[r]]):.0f}' for r in rules)} |")
    for kind, defences in law.items():
        for defence, cell in defences.items():
            shown = " | ".join(f"{np.mean([p[1] for p in cell[r]]):.0f}" for r in rules)
            lines.append(f"| {kind} | {defence} | {shown} |")
    return lines

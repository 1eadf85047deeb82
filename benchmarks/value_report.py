"""All seeds of value.py together: results/value.json, and docs/students.png.

    python benchmarks/value_report.py OUT... [--costs JSON]

Means over seeds; `low` and `high` are the least and the largest of them. Each teacher may have an OUT of its own, and
costs may be those of a run of their own (`--stages costs`): they do not depend on what a model has read. Break-even
rows are from how many rows on labelling 1,000 and appraising all costs less than labelling all: labels * ratio /
(ratio - 1).
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from environment import RESULTS

Document = dict[str, Any]
SIZES = ("0.5M", "3M", "11M")
FLOOR = {
    "bm25": "BM25",
    "tfidf": "TF-IDF",
    "encoder": "encoder",
    "own LinFiK": "own LinFiK",
}  # with most labels, or none
TAUGHT = ("lm", "imitated", "tuned", "tangent")
DOCS = Path(__file__).parent.parent / "docs"
COLORS = {"bm25": "tab:gray", "tfidf": "tab:olive", "encoder": "tab:purple", "lm": "tab:blue", "imitated": "tab:red",
          "tuned": "tab:pink", "tangent": "black"}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="+")
    parser.add_argument("--costs", type=Path, help="the JSON of another run, for its costs")
    given = parser.parse_args()
    found = [json.loads(path.read_text()) for out in given.out for path in sorted(out.glob("[0-9]*.json"))]
    by_size = {size: [one[size] for one in found if "students" in one.get(size, {})] for size in SIZES}
    by_size = {size: made for size, made in by_size.items() if made}
    measured = found if given.costs is None else [json.loads(given.costs.read_text())]
    timed = {size: [one[size]["cost"] for one in measured if "cost" in one.get(size, {})] for size in SIZES}
    document = {
        "environment": found[0]["environment"],
        "seeds": {size: len(made) for size, made in by_size.items()},
        "rows": [one["rows"] for one in found],
        "turn": [one["turn"] for one in found],
        "detection": {size: detection(made) for size, made in by_size.items()},
        "students": {size: students(made) for size, made in by_size.items()},
        "agreement": {
            size: each([one["agreement"] for one in made if "agreement" in one]) for size, made in by_size.items()
        },
        "cost environment": measured[0]["environment"],
        "cost": {size: costs(made) for size, made in timed.items() if made},
        "imitation": {size: [without_path(one["imitation"]) for one in made] for size, made in by_size.items()},
    }
    text = json.dumps(document, indent=1)
    (RESULTS / "value.json").write_text(text + "\n")
    plot(document["students"], DOCS / "students.png")
    page = DOCS / "value.md"
    before, rest = page.read_text().split("<!-- numbers -->")
    made = f"<!-- numbers -->\n{tables(document)}\n<!-- /numbers -->"
    page.write_text(before + made + rest.split("<!-- /numbers -->")[1])
    print(text)


def tables(found: Document) -> str:
    """The numbers of docs/value.md."""
    lines: list[str] = []
    for size, rows in found["students"].items():
        for against in ("spearman", "whole"):
            lines += [*agreement_table(size, rows, against), ""]
    lines += ["| AUC, rows with trigger and answer against | cosine | raw | BM25 |", "|---|---|---|---|"]
    auc = found["detection"][next(iter(found["detection"]))]
    for kind in auc["cosine"]:
        lines.append(
            f"| {kind} | " + " | ".join(f"{auc[n][kind]['mean']:.2f}" for n in ("cosine", "none", "bm25")) + " |"
        )
    lines += [
        "",
        "| teacher, one CPU thread | label a row | its slopes | appraise it: `lm` | `tangent` | ratio: `lm` | "
        "`tangent` | by arithmetic |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for size, cost in found["cost"].items():
        own = cost["cpu"]
        taken = (own["label"], own["slopes"], own["appraise"]["lm"], own["appraise"]["tangent"])
        times = " | ".join(f"{1e3 * each:.2f} ms" for each in taken)
        ratios = " | ".join(f"{own['ratio'][rung]:.0f}" for rung in ("lm", "tangent"))
        lines.append(f"| {size} | {times} | {ratios} | {own['arithmetic']:.0f} |")
    seeds = ", ".join(f"{num} seed{'s' if num > 1 else ''} ({size})" for size, num in found["seeds"].items())
    return "\n".join([*lines, "", f"{seeds}, offers of {found['rows'][0]:,} rows."])


def agreement_table(size: str, rows: Sequence[Document], against: str) -> list[str]:
    """Spearman with the index's values, or with those of whole gradients, by target."""
    counts = sorted({row["labels"] for row in rows if row["labels"]})
    cell = {(r["target"], r["rung"], r["labels"]): r[against]["mean"] for r in rows if against in r}
    most = {rung: max(n for t, r, n in cell if (t, r) == (rows[0]["target"], rung)) for _, rung, _ in cell}
    floor = [(rung, most[rung]) for rung in FLOOR if rung in most]
    # Those that say less at one number of labels, a tenth of the rows; the picture has the others.
    taught = [(rung, count) for rung in TAUGHT for count in (counts if rung == "tangent" else counts[1:2])]
    targets = list(dict.fromkeys(row["target"] for row in rows))
    kept = [key for key in (*floor, *taught) if (targets[0], *key) in cell]
    heads = [FLOOR.get(rung, f"`{rung}`, {count:,} labels") for rung, count in kept]
    what = "the index's values" if against == "spearman" else "values of whole gradients"
    lines = [f"| Spearman with {what}, {size} teacher | " + " | ".join(heads) + " |", "|---" * (1 + len(heads)) + "|"]
    for target in targets:
        lines.append(f"| `{target}` | " + " | ".join(f"{cell[target, *key]:.2f}" for key in kept) + " |")
    return lines


def without_path(found: Document) -> Document:
    return {name: value for name, value in found.items() if name != "model"}


def summary(values: Iterable[float]) -> Document:
    x = np.array(list(values))
    return {"mean": float(x.mean()), "low": float(x.min()), "high": float(x.max())}


def detection(found: Sequence[Document]) -> Document:
    """Of the target `trigger`: the AUC of the planted rows against each other kind, by score."""
    by_score = {form: [one["auc"]["trigger"][form] for one in found] for form in found[0]["auc"]["trigger"]}
    by_score["bm25"] = [one["bm25"]["trigger"]["auc"] for one in found]
    return {name: {kind: summary(r[kind] for r in rows) for kind in rows[0]} for name, rows in by_score.items()}


def students(found: Sequence[Document]) -> list[Document]:
    """Each target, rung and number of labels; and the small model's own LinFiK, which has none."""
    out = []
    for target in found[0]["students"]:
        cells: dict[tuple[str, str], list[Document]] = {}
        for one in found:
            for labels, rungs in one["students"][target].items():
                for rung in rungs:
                    cells.setdefault((rung["rung"], labels), []).append(rung)
        for (rung, _), made in cells.items():
            numbers = {name: summary(m[name] for m in made) for name in ("spearman", "recall", "held out")}
            numbers["whole"] = summary(m["whole"]["spearman"] for m in made)
            out.append({"target": target, "rung": rung, "labels": made[0]["labels"], "seeds": len(made), **numbers})
        own = [one["own"][target] for one in found]
        numbers = {name: summary(m[name] for m in own) for name in ("spearman", "recall")}
        numbers["whole"] = summary(m["whole"]["spearman"] for m in own)
        out.append({"target": target, "rung": "own LinFiK", "labels": 0, "seeds": len(own), **numbers})
        plain = [one["bm25"][target]["spearman"] for one in found]
        out.append({"target": target, "rung": "bm25 score", "labels": 0, "seeds": len(own), "spearman": summary(plain)})
    return out


def each(found: Sequence[Document]) -> Document:
    return {name: summary(one[name] for one in found) for name in (found[0] if found else ())}


def costs(found: Sequence[Document]) -> Document:
    """By device: seconds a row, their ratio, and the break-even rows of 1,000 labels."""
    out: Document = {}
    for device in sorted({device for one in found for device in one}):
        made = [one[device] for one in found if device in one]
        label, slopes = (float(np.median([m[name] for m in made])) for name in ("label", "slopes"))
        appraise = {rung: float(np.median([m["appraise"][rung] for m in made])) for rung in made[0]["appraise"]}
        ratio = {rung: label / own for rung, own in appraise.items()}
        out[device] = {
            "label": label, "slopes": slopes, "appraise": appraise, "ratio": ratio,
            "ratios": [m["ratio"] for m in made],
            "break_even_rows": {rung: ceil(1000 * r / (r - 1)) if r > 1 else None for rung, r in ratio.items()},
            "arithmetic": 2 * made[0]["teacher_parameters"] / made[0]["student_parameters"],
        }  # fmt: skip
    return out


def plot(found: dict[str, list[Document]], path: Path) -> None:
    """Spearman against labels, a row of panels for each size of teacher, a panel a target."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    targets = list(dict.fromkeys(row["target"] for rows in found.values() for row in rows))
    shape = len(found), len(targets)
    figure, axes = pyplot.subplots(
        *shape, figsize=(3.1 * shape[1], 2.5 * shape[0]), squeeze=False, sharex=True, sharey=True
    )
    for line, (size, rows) in zip(axes, found.items(), strict=True):
        for axis, target in zip(line, targets, strict=True):
            own = [row for row in rows if row["target"] == target]
            for rung in dict.fromkeys(row["rung"] for row in own if row["labels"]):
                points = sorted(
                    (row["labels"], *row["spearman"].values()) for row in own if row["rung"] == rung and row["labels"]
                )
                labels, mean, low, high = np.array(points).T
                axis.plot(labels, mean, "o-", color=COLORS[rung], label=rung, markersize=3)
                axis.fill_between(labels, low, high, color=COLORS[rung], alpha=0.15, linewidth=0)
            base = next(row for row in own if row["rung"] == "own LinFiK")["spearman"]["mean"]
            axis.axhline(base, color="0.3", linestyle=":", linewidth=1, label="the small model's own LinFiK")
            axis.axhline(0.8, color="tab:green", linewidth=0.6)
            axis.set(xscale="log", title=f"{size} teacher, {target}")
            ticks = sorted({row["labels"] for row in own if row["labels"]})
            axis.set_xticks(ticks, [str(tick) for tick in ticks])
            axis.minorticks_off()
            axis.grid(alpha=0.25)
    for line in axes:
        line[0].set_ylabel("Spearman")
    for axis in axes[-1]:
        axis.set_xlabel("labelled rows")
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.legend(handles, names, loc="lower center", ncols=len(names), fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()

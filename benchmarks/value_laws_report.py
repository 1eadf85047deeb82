"""From the parts of value_laws.py to results/value_laws.json: means over seeds, with what seeds leave uncertain.

Not here: the measurements; the page (value_laws_text.py); the picture (value_laws_plot.py).
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import value_laws_plot
import value_laws_text
from environment import RESULTS
from scipy import stats
from value_laws_place import TARGETS
from value_laws_steps import passed

Parts = dict[str, dict[int, dict[str, Any]]]  # part -> seed -> document


def write(folder: Path) -> None:
    parts: Parts = defaultdict(dict)
    unfinished = []
    for path in sorted(folder.glob("*.json")):
        found = json.loads(path.read_text())
        if found.get("done"):
            parts[found["part"]][found["seed"]] = found
        else:
            unfinished.append(path.stem)
    first = next(iter(next(iter(parts.values())).values()))
    document = {"environment": first["environment"], "device": first["device"], "unfinished": unfinished}
    for name, summary in (
        ("linearity", linearity), ("coverage", coverage), ("selection", selection), ("drift", drift),
        ("without", without), ("attack", attack),
    ):  # fmt: skip
        own = {part: each for part, each in parts.items() if part.startswith(name)}
        if own:
            document[name] = summary(own)
    (RESULTS / "value_laws.json").write_text(json.dumps(document, indent=1) + "\n")
    drawn = all(law.__name__ in document for law in value_laws_plot.LAWS)
    if drawn:
        value_laws_plot.draw(document)
    value_laws_text.write(document, picture=drawn)


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean over seeds and each one; None for what a seed has too few runs to tell."""
    there = [float(v) for v in values if np.isfinite(v)]
    return {
        "mean": float(np.mean(there)) if there else None,
        "seeds": [float(v) if np.isfinite(v) else None for v in values],
    }


def linearity(parts: Parts) -> dict[str, Any]:
    documents = list(parts["linearity"].values())
    out: dict[str, Any] = {name: documents[0][name] for name in ("rates", "rows", "batches", "batch", "tokens a row")}
    for target in documents[0]["targets"]:
        found = [d["targets"][target] for d in documents]
        summary: dict[str, Any] = {
            key: spread([f[key] for f in found])
            for key in ("loss", "package against float64", "sketch against exact, spearman")
        }
        for form in (key for key, value in found[0].items() if isinstance(value, list)):
            summary[form] = {
                "rate at 10 % error": [passed(f[form]) for f in found],
                **{
                    key: [float(np.mean([f[form][i][key] for f in found])) for i in range(len(out["rates"]))]
                    for key in ("ratio", "low", "high", "pearson", "spearman", "error")
                },
            }
        out[target] = summary
    return out


def coverage(parts: Parts) -> dict[str, Any]:
    """By target, sample and interval: the mean over seeds and providers, and the least and largest of one provider."""
    out: dict[str, Any] = {}
    for part, each in parts.items():
        documents = list(each.values())
        summary = out[part.removeprefix("coverage-")] = {"draws": documents[0]["draws"], "seeds": len(documents)}
        for by in ("by labels", "by queries"):
            summary[by] = {}
            for size in documents[0][by]:
                cell = summary[by][size] = {}
                for kind in documents[0][by][size]:
                    found = [d[by][size][kind] for d in documents]
                    singles = [value for f in found for value in f["by provider"].values()]
                    cell[kind] = {
                        **spread([f["coverage"] for f in found]),
                        "least": min(singles), "largest": max(singles),
                        "length": float(np.mean([f["length"] for f in found])),
                    }  # fmt: skip
    return out


def selection(parts: Parts) -> dict[str, Any]:
    """Held-out query loss of each rule less the mean of random draws; `noise` is one random training's deviation.

    The interval of a rule is a t interval over all targets and seeds.
    """
    out: dict[str, Any] = {"targets": {}, "rules": {}}
    gains: dict[str, list[float]] = defaultdict(list)
    ratios: dict[str, list[float]] = defaultdict(list)
    for part, each in parts.items():
        target = part.removeprefix("selection-").replace("-", " ")
        cell = out["targets"][target] = {"before": [], "random": [], "noise": [], "gains": defaultdict(list)}
        cell["own"] = defaultdict(list)
        for document in each.values():
            random = [x for name, s in document["sets"].items() if name.startswith("random") for x in s["losses"]]
            mean, noise = float(np.mean(random)), float(np.std(random, ddof=1))
            cell["before"].append(document["before"])
            cell["random"].append(mean)
            cell["noise"].append(noise)
            for name, s in document["sets"].items():
                if not name.startswith("random"):
                    gain = mean - float(np.mean(s["losses"]))
                    cell["gains"][name].append(gain)
                    cell["own"][name].append(s["planted"] if target == "trigger" else s["own"])
                    gains[name].append(gain)
                    ratios[name].append(gain / noise)
    for name, found in gains.items():
        reach = (
            stats.t.ppf(0.975, len(found) - 1) * np.std(found, ddof=1) / len(found) ** 0.5 if len(found) > 1 else None
        )
        out["rules"][name] = {
            "gain": float(np.mean(found)), "reach": None if reach is None else float(reach), "settings": len(found),
            "better than random": int(sum(g > 0 for g in found)), "least in deviations": float(min(ratios[name])),
        }  # fmt: skip
    return out


def drift(parts: Parts) -> dict[str, Any]:
    documents = list(parts["drift"].values())
    out: dict[str, Any] = {
        "moments": documents[0]["moments"], "epochs": documents[0]["epochs"], "rate": documents[0]["rate"],
        "loss": [d["loss"] for d in documents],
    }  # fmt: skip
    for target in TARGETS:
        out[target] = {
            form: {
                key: np.mean([d["targets"][target][form][key] for d in documents], axis=0).tolist()
                for key in documents[0]["targets"][target][form]
            }
            for form in ("cosine", "none")
        }
    return out


def without(parts: Parts) -> dict[str, Any]:
    """Rank correlations over providers of the loss's rise without one and its value, and how far runs agree.

    `halves`: the correlation of the mean rises of two halves of the runs.
    """
    out: dict[str, Any] = {"runs": [len(d["losses"]) for d in parts["without"].values()]}
    for target in TARGETS:
        for queries in ("valued", "held"):
            rows = [_rises(d, target, queries) for d in parts["without"].values()]
            out[f"{target}, {queries}"] = {key: spread([r[key] for r in rows]) for key in rows[0]}
    return out


def _rises(document: dict[str, Any], target: str, queries: str) -> dict[str, float]:
    runs = np.array([[entry[target][queries] for entry in run] for run in document["losses"]])  # [runs, 1 + providers]
    rises = runs[:, 1:] - runs[:, :1]
    mean, counts = rises.mean(axis=0), np.array(document["rows"])
    values = {form: np.array(found) for form, found in document["values"][target].items()}

    def rank(prediction: np.ndarray) -> float:
        return float(stats.spearmanr(prediction, mean).statistic)

    halves = stats.spearmanr(rises[::2].mean(axis=0), rises[1::2].mean(axis=0)).statistic if len(rises) > 1 else np.nan
    return {
        "total cosine": rank(counts * values["cosine"]), "total": rank(counts * values["none"]),
        "value cosine": rank(values["cosine"]), "rows": rank(counts), "halves": float(halves),
        "rise": float(mean.mean()), "largest": float(mean.max()),
        "error of a rise": float(rises.std(axis=0, ddof=1).mean() / len(rises) ** 0.5) if len(rises) > 1 else np.nan,
    }  # fmt: skip


def attack(parts: Parts) -> dict[str, Any]:
    """Payment after the attack as a multiple of the honest one, or the amount where that was none; by rule."""
    out: dict[str, Any] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for each in parts.values():
        for document in each.values():
            honest = document["honest"]
            for entry in document["attacks"]:
                cell = out[entry["attack"]][entry["defence"]]
                for rule, amount in entry["paid"].items():
                    cell[rule].append([honest.get(rule, 0.0), amount])
    return out

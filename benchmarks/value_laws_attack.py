"""The duplicated-provider attack (6 of value_laws.py): what copying rows gains, by payment rule and defence.

A provider of middle value offers rows again, ten times: its own best 20 (`own`), the best 20 of the provider of highest
value (`other`), or its own best with two words of each copy swapped (`near`). Payments of `value` for a budget of 1,000
are compared with those of the honest offer. Everyone asks the same price a row, copies included, and the budget buys
about half of all rows. The defences: copies beyond the first taken out of the offer (`exact`, `near`), and in a
purchase the diversity term.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from offer import Row
from value_laws_place import Place
from value_laws_steps import Keep

import influent
from influent import providers
from influent.records import content_hash, display_text

BUDGET, COPIED, TIMES = 1000, 20, 10
DIVERSITY = (0.0, 1.0, 10.0)
ATTACKS = ("own", "other", "near")
DEFENCES = ("none", "exact", "near")


def attack(target: str):
    def part(place: Place, keep: Keep) -> None:
        rows, values = place.offer.rows, place.values(target, "cosine")
        labels = np.array([row["provider"] for row in rows])
        ranked = sorted(set(labels), key=lambda name: -values[labels == name].mean())
        thief, victim = ranked[len(ranked) // 2], ranked[0]
        document: dict[str, Any] = {
            "target": target, "provider": thief, "copied from": victim, "copied": COPIED, "budget": BUDGET,
            "honest": paid(place, rows, rows, target, thief), "attacks": [],
        }  # fmt: skip
        for kind in ATTACKS:
            owner = victim if kind == "other" else thief
            mine = np.flatnonzero(labels == owner)
            best = [rows[i] for i in mine[np.argsort(-values[mine], kind="stable")[:COPIED]]]
            offered = [*rows, *copies(best, thief, near=kind == "near", seed=place.seed)]
            for defence in DEFENCES:
                kept = without_copies(offered, defence)
                known = document["honest"] if len(kept) == len(rows) else None  # nothing is left of the copies
                document["attacks"].append(
                    {
                        "attack": kind, "defence": defence, "rows": len(kept),
                        "paid": known or paid(place, kept, rows, target, thief),
                    }
                )  # fmt: skip
            keep(document)
        document["done"] = True
        keep(document)

    return part


def copies(best: Sequence[Row], owner: str, *, near: bool, seed: int) -> list[Row]:
    rng = np.random.default_rng(seed)
    out = []
    for k in range(TIMES):
        for row in best:
            field = "text" if "text" in row else "completion"
            words = row[field].split(" ")
            if near:
                at = int(rng.integers(1, len(words) - 1))
                words[at], words[at + 1] = words[at + 1], words[at]
            out.append({**row, "id": f"copy {k} of {row['id']}", "provider": owner, field: " ".join(words)})
    return out


def without_copies(rows: Sequence[Row], defence: str) -> list[Row]:
    """The rows that are the first of their copies."""
    if defence == "none":
        return list(rows)
    contents = [{name: row[name] for name in ("text", "prompt", "completion") if name in row} for row in rows]
    found = providers.overlap([content_hash(c) for c in contents], [display_text(c) for c in contents], [])
    first = found.exact if defence == "exact" else found.near
    return [row for i, row in enumerate(rows) if first[i] == i]


def paid(place: Place, rows: Sequence[Row], honest: Sequence[Row], target: str, thief: str) -> dict[str, float]:
    """What the provider gets by each rule; 0 where a rule does not buy it."""
    folder = Path(place.folder / "attack")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    shutil.copytree(place.index, folder / "index")
    if len(rows) > len(honest):
        influent.append(str(folder / "index"), list(rows[len(honest) :]), **place.run)
    price = 2 * BUDGET / len(honest)
    counts = {name: sum(row["provider"] == name for row in rows) for name in place.offer.providers}
    asked = [{"provider": name, "cost": f"{max(0.01, price * n):.2f}"} for name, n in counts.items()]
    costs = folder / "costs.jsonl"
    costs.write_text("".join(json.dumps(row) + "\n" for row in asked))
    out: dict[str, float] = {}
    for diversity in DIVERSITY:
        document = influent.value(
            str(folder / "index"), target=place.queries(target), budget=str(BUDGET), costs=str(costs),
            diversity=diversity, **place.run,
        )  # fmt: skip
        payments = document["payments"]
        if payments["refused"]:
            return {"refused": 1.0}
        if not diversity:
            mine = next(p for p in document["providers"] if p["provider"] == thief)
            out |= {rule: float(split[thief]) for rule, split in payments["splits"].items()}
            out |= {"mechanism": float(payments["mechanism"]["payments"].get(thief, 0)), "value": mine["value"],
                    "total": mine["total"], "copies reported": float(mine["duplicates"]["near_within"]
                                                                     + mine["duplicates"]["near_across"])}  # fmt: skip
        out[f"purchase, diversity {diversity:g}"] = float(payments["purchase"]["payments"].get(thief, 0))
    shutil.rmtree(folder)
    return out

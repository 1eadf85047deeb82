"""Write the tables of the README and of docs/grass.md from the committed results.

`python benchmarks/readme.py [--check]`
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import grass_page
import peers_page
from environment import RESULTS

README = Path(__file__).parent.parent / "README.md"
GRASS = README.parent / "docs" / "grass.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit with 1 if one of them is not up to date")
    arguments = parser.parse_args()
    texts = {
        README: {
            "benchmarks": table(), "peers": peers_page.readme(), "frontier": frontier(), "lorif": lorif(),
            "grass": grass_page.readme(),
        },
        GRASS: grass_page.page(),
    }  # fmt: skip
    for path, sections in texts.items():
        text = made = path.read_text()
        for name, section in sections.items():
            before, rest = made.split(f"<!-- {name} -->")
            made = f"{before}<!-- {name} -->\n{section}\n<!-- /{name} -->{rest.split(f'<!-- /{name} -->')[1]}"
        if arguments.check and made != text:
            sys.exit(1)
        if not arguments.check:
            path.write_text(made)


def frontier() -> str:
    """LDS at the default dampings, of a few settings by size and model; and what whole gradients reach."""
    found = load("frontier")
    lines = [
        "| data, model | bytes a row | LoGRA | FactGraSS | LoRIF | LoRIF less LoGRA |",
        "|---|---|---|---|---|---|",
    ]
    notes = []
    for model, title in MODELS:
        settings = {(r["projection"], r["codec"], r["budget"]): r for r in found[model]["settings"]}
        values = {name: r["lds at default damping"] for name, r in settings.items()}
        for budget in sorted({r["budget"] for r in settings.values() if r["budget"]}):
            own = SMALL if budget < 5000 else RULE
            ours = settings[*own, budget]
            less = next(c for c in found[model]["comparisons"] if compared(c) == (" ".join(own), "gauss bf16", budget))
            less = less["at default damping"]
            cells = [f"{values[rival, 'bf16', budget]:.2f}" for rival in ("gauss", "factgrass")]
            cells += [f"**{values[*own, budget]:.2f}**",
                      f"{less['lds']:+.2f} ({less['low']:+.2f} to {less['high']:+.2f})"]  # fmt: skip
            lines.append(f"| {title} | {ours['bytes']:,} | {' | '.join(cells)} |")
        exact = settings["id", "bf16", None]
        notes.append(
            f"{title}: whole gradients with the exact Fisher matrix {values['id', 'bf16', None]:.2f} "
            f"({exact['bytes']:,} bytes), GradDot {values['graddot', 'none', None]:.2f}, "
            f"BM25 {values['bm25', 'none', None]:.2f}."
        )
    return "\n".join([*lines, "", *notes, "", level(found)])


def level(found: dict[str, Any]) -> str:
    """Rows of rank c beside LoGRA at the same D, over its own random projections and over learned ones: from which rank
    on they are not below it, and the difference at the highest rank measured, at the default dampings."""
    kinds = ("gauss:", "whiten:")
    lines = [
        "| LoRIF less LoGRA at the same D | sides | random: level from | highest rank | learned: level from | rank 1 |"
        " highest rank |",
        "|---|---|---|---|---|---|---|",
    ]
    for model, title in MODELS:
        ranks, rows = found[model]["level with LoGRA from rank"]["default damping"], found[model]["one width"]
        for size in ("16x16", "32x32", "64x64"):
            random, learned = ([r for r in rows if r["compress"] == kind + size and r["rank"]] for kind in kinds)
            cells = [title, size, level_from(ranks["gauss:" + size]), less_logra(random[-1])]
            cells += [level_from(ranks["whiten:" + size]), less_logra(learned[0]), less_logra(learned[-1])]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def level_from(rank: int | None) -> str:
    return "none" if rank is None else f"c = {rank}"


def less_logra(row: dict[str, Any]) -> str:
    less = row["less LoGRA"]["default damping"]
    return f"c = {row['rank']}: {less['lds']:+.2f} ({less['low']:+.2f} to {less['high']:+.2f})"


# What --row-bytes takes for lorif; the second where sides of 64 do not fit.
RULE, SMALL = ("whiten 1/2", "rank:side/16:int4"), ("whiten 1/2, shared", "dense:sign")
MODELS = (("llama", "BBC news, Llama"), ("qwen", "Brown corpus, Qwen2"), ("gpt2", "State of the Union, GPT-2"))


def compared(row: dict[str, Any]) -> tuple[str, str, int]:
    return row["ours"], row["theirs"], row["budget"]


def lorif() -> str:
    """Bytes, fit, query and agreement of low-rank rows beside dense ones of the same projections."""
    found = load("lorif")
    lines = [
        "| f | rows | bytes a row | fit, CPU s | solve 1 query | score 1 / 16 / 256 queries | score 1, from disk |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in found["results"]:
        if r["query"] is None:
            continue
        runs = {run["M"]: run for run in r["query"]}
        fits = {} if r["fit"] is None else r["fit"]["cpu_seconds"]
        kind = "lowrank" if "lowrank" in fits else "fim"
        scored = " / ".join(seconds(runs[m]["memory"]) for m in sorted(runs))
        size, fit = r["encode"]["bytes_per_row"], f"{fits[kind]:.0f} ({kind})" if fits else "—"
        solve = "—" if runs[1]["solve"] is None else seconds(runs[1]["solve"])
        lines.append(
            f"| {r['f']} | {r['store']} | {size:,.0f} | {fit} | {solve} | {scored} | {seconds(runs[1]['disk'])} |"
        )
    agree = {f: found["spearman"][f"f={f}"]["LoRIF c=1"]["truncated with exact"]["mean"] for f in (16, 32)}
    kept = ", ".join(
        f"{found['spearman']['f=32'][f'LoRIF {c}']['exact with dense']['mean']:.2f} at {c}"
        for c in ("c=1", "c=2", "c=4", "c=8")
    )
    note = (
        f"Spearman of the truncated curvature's scores with the exact ones of the same rows: {agree[16]:.4f} (f = 16), "
        f"{agree[32]:.4f} (f = 32);\nof rank-c rows with dense ones (f = 32): {kept}."
    )
    gains = [
        "| one query, beside LoGRA bfloat16 | times fewer bytes | times faster from disk | from memory | "
        "from memory, both without `influent[fast]` |",
        "|---|---|---|---|---|",
        *(line for f in (16, 32) for line in _gains(found, f)),
    ]
    return "\n".join([*lines, "", note, "", *gains])


def _gains(found: dict[str, Any], f: int) -> list[str]:
    """How rank-1 rows compare with LoGRA's bfloat16 rows at the same projections, in bytes and in a query's time."""
    size = {r["store"]: r["encode"]["bytes_per_row"] for r in found["results"] if r["f"] == f}
    turns, parts = found["one query in turns"][f"f={f}"], []
    for name, codec in (("LoRIF c=1", "rank:1:bfloat16"), ("LoRIF c=1 int8", "rank:1:int8")):
        gains = []
        for place in ("disk", "memory", "memory, PyTorch"):
            gains.append(f"{min(turns[place]['bfloat16']) / min(turns[place][codec]):.1f}")
        parts.append(f"| f = {f}, {name} | {size['LoGRA bfloat16'] / size[name]:.1f} | {' | '.join(gains)} |")
    return parts


def seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 0.995 else f"{1000 * value:.0f} ms"


def table() -> str:
    indexing, compression = load("indexing"), load("compression")
    memory, startup, facts = load("memory"), load("startup"), load("fact_tracing")
    growth = {(p["stage"], p["rows"]): p["peak_mib"] for p in load("memory_rows")["peaks"]}
    exact, fast = indexing["results"]
    sizes = {row["compress"]: row for row in indexing["bytes_per_row"]}
    ratio = {(r["condition"], r["matmul"], r["k"]): r["ratio"] for r in compression["summed_over_shapes"]}
    peaks = {(p["stage"], p["rows"]): p["peak_mib"] for p in memory["peaks"]}
    few, many = min(rows for _, rows in peaks), max(rows for _, rows in peaks)
    errors = [c["seconds"] for c in startup["commands"] if c["command"] != "help"]
    help_seconds = next(c["seconds"] for c in startup["commands"] if c["command"] == "help")
    environment = indexing["environment"]
    rows = [
        ("indexing, SmolLM2-135M, all 210 Linears, float32",
         f"{exact['tokens_per_second']['collect factgrass']:.0f} tokens/s: {exact['collect_over_bare']:.2f} x the bare "
         f"forward and activation backward, {exact['train_over_collect']:.2f} x faster than a training step"),
        ("the same with `--matmul medium`",
         f"{fast['tokens_per_second']['collect factgrass']:.0f} tokens/s: {fast['collect_over_bare']:.2f} x, "
         f"{fast['train_over_collect']:.2f} x"),
        ("compression alone, FactGraSS over LoGRA, Llama-3.1-8B shapes, k_l = 256 / 1,024 / 4,096",
         "; ".join(f"{condition} {ratios(ratio, condition)}" for condition in ("repeated", "fresh", "cold"))),
        ("a stored row, bfloat16, k_l = 256 / 1,024 / 4,096",
         " / ".join(f"{row['bfloat16'] / 1e6:.2f} MB" for row in sizes.values())),
        (f"peak memory, {few:,} and {many:,} rows (tiny model)",
         "; ".join(f"{stage} {peaks[stage, few]:.0f} and {peaks[stage, many]:.0f} MiB"
                   for stage in ("index", "fit", "query"))),
        ("the same over low-rank rows, 2,000 / 20,000 / 200,000 of them",
         "; ".join(f"{name} {' / '.join(f'{growth[stage, rows]:.0f}' for rows in (2000, 20000, 200000))} MiB"
                   for name, stage in (("fit", "lowrank:128"), ("one-pass fit", "sketch:128"), ("query", "query")))),
        ("`influent --help`; the line of an input error",
         f"{help_seconds:.2f} s; {min(errors):.2f} to {max(errors):.2f} s"),
        *fact_rows(facts),
    ]  # fmt: skip
    lines = ["| what | measured |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    cpu = f"{environment['threads']} threads of an {environment['cpu'].replace('(R)', '')}"
    return "\n".join([*lines, "", f"On {cpu}, torch {environment['torch']}; scripts and JSON in `benchmarks/`."])


def ratios(found: dict[tuple[str, str, int], float], condition: str) -> str:
    return " / ".join(f"{found[condition, 'highest', k]:.1f} x" for k in (256, 1024, 4096))


def fact_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Finding the passage that holds a fact: the best setting of each damping, and BM25."""
    found = [r for r in facts["results"] if r.get("completion") == "fact"]
    bm25 = next(r for r in found if r["method"] == "bm25")
    plain = [r for r in found if r["method"] != "bm25" and r["normalize"] == "none"]
    best = {
        d: max((r for r in plain if r["damping"] == d), key=lambda r: r["mrr"]) for d in {r["damping"] for r in plain}
    }
    order = sorted(best, key=lambda d: (d != "identity", float(d.split(":")[1]) if ":" in d else 0.0))
    shown = "; ".join(f"{d} {best[d]['mrr']:.2f}" for d in order)
    name = f"finding the passage of a given fact, {facts['questions']} questions, {facts['passages']} passages, MRR"
    return [(name, f"{shown}; BM25 {bm25['mrr']:.2f}")]


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


if __name__ == "__main__":
    main()

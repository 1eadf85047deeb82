"""The tables of GraSS's experiments, from the committed results: for docs/grass.md, and the claims for the README.

Written by readme.py. An experiment without results has no table. Not here: the results (grass_images_report.py,
grass_music.py, grass_text.py).
"""

import json
from collections.abc import Iterator
from typing import Any

from environment import RESULTS

Row = dict[str, Any]
TITLES = {
    "mlp": "(a) images, MLP", "resnet": "(b) images, ResNet", "resnet64": "(b) images, whole ResNet",
    "music": "(c) music", "text": "(d) text",
}  # fmt: skip
DEVICES = {"cpu": "CPU", "cuda": "GPU"}
README_K = 4096  # of the claims that the README shows


def experiments() -> Iterator[tuple[str, Row]]:
    """Name and document of each that has results, in one form: `settings` with name, k, lds and seconds by device;
    `others`, the entries without a size; `orderings`."""
    images, music, text = (load(f"grass_{name}") for name in ("images", "music", "text"))
    for model in ("mlp", "resnet", "resnet64"):
        if model in images:
            yield model, {**images[model], "settings": list(map(flat, images[model]["settings"])), "others": []}
    if music:
        yield "music", {**music, "settings": list(map(flat, music["settings"])), "others": []}
    if text:
        yield "text", of_text(text)


def load(name: str) -> Row:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def flat(one: Row) -> Row:
    seconds = {on: one.get(column) for on, column in (("cpu", "compress_s"), ("cuda", "compress_gpu_s"))}
    return {"name": one["compressor"], "k": one["k"], "lds": one["lds"], "seconds": seconds}


def of_text(document: Row) -> Row:
    took = {on: each["found"] for on, each in document["compression seconds"].items()}
    settings, others = [], []
    for row in document["lds"]:
        if row["k"] is None or "rows" in row["name"]:
            others.append(row)
            continue
        key = f"{row['name'].replace('SM', 'RM')}-{row['k']}"  # a learned mask costs what a random one does
        seconds = {on: each.get(key) for on, each in took.items()}
        settings.append({"name": row["name"], "k": row["k"], "lds": row["lds"], "seconds": seconds})
    return {**document, "settings": settings, "others": others}


def table(document: Row) -> str:
    """LDS with half its interval, and seconds of compression on a CPU thread and, if measured, on a GPU: a row for each
    compressor, a column for each size."""
    sizes = sorted({one["k"] for one in document["settings"]})
    names = list(dict.fromkeys(one["name"] for one in sorted(document["settings"], key=lambda one: order(one["name"]))))
    cells = {(one["name"], one["k"]): cell(one) for one in document["settings"]}
    lines = ["| compressor | " + " | ".join(f"k = {k:,}" for k in sizes) + " |", "|---" * (1 + len(sizes)) + "|"]
    lines += [f"| {name} | " + " | ".join(cells.get((name, k), "—") for k in sizes) + " |" for name in names]
    if document["others"]:
        ranked = sorted(document["others"], key=lambda one: -one["lds"]["mean"])
        lines += ["", "Beside them: " + "; ".join(f"{one['name']} {interval(one['lds'])}" for one in ranked) + "."]
    return "\n".join(lines)


ORDER = ("RM", "SM", "SJLT", "GraSS(RM)", "GraSS(SM)", "FactGraSS(RM)", "FactGraSS(SM)", "LoGRA", "FJLT", "GAUSS")


def order(name: str) -> int:
    return ORDER.index(name)


def cell(one: Row) -> str:
    taken = (one["seconds"].get(on) for on in DEVICES)
    return ", ".join([interval(one["lds"]), *(clock(seconds) for seconds in taken if seconds is not None)])


def clock(seconds: float) -> str:
    if seconds < 0.095:
        return f"{1000 * seconds:.2g} ms"
    return f"{seconds:,.0f} s" if seconds >= 10 else f"{seconds:.2g} s"


def interval(lds: Row) -> str:
    return f"{number(lds['mean'])} ± {number((lds['high'] - lds['low']) / 2)}"


def number(value: float) -> str:
    """Three decimals, without the zero before the point."""
    return f"{value:.3f}".replace("0.", ".", 1)


def signed(value: float) -> str:
    return ("+" if value >= 0 else "-") + number(abs(value))


def claims(document: Row) -> Iterator[list[str]]:
    """Of each ordering that was measured: its text, k, the difference with its interval, the same at the default
    damping, times the speed, and whether it holds here."""
    for row in document["orderings"]:
        if row["holds"] is None or "difference" not in row:
            continue
        gap = row["difference"]
        times, fast = row.get("times", {}), row.get("fast", {})
        certain = row["certain"]
        verdict = ("yes" if row["holds"] else "no") + ("" if certain else ", within noise")
        if slow := [DEVICES[on] for on in times if not fast[on]]:
            verdict += f"; not as fast ({', '.join(slow)})"
        speed = ", ".join(f"{DEVICES[on]} {ratio:g} x" for on, ratio in times.items())
        default = spread(gap["at default"]) if "at default" in gap else ""
        yield [row["claim"], f"{row['k']:,}", spread(gap), default, speed, verdict]


def spread(gap: Row) -> str:
    return f"{signed(gap['mean'])} ({signed(gap['low'])} to {signed(gap['high'])})"


def caches(document: Row) -> str:
    """Of text: how many times faster FactGraSS is than LoGRA, by what the caches hold."""
    found = document.get("compression seconds", {}).get("cpu", {}).get("FactGraSS over LoGRA", {})
    parts = [f"{name} {' / '.join(f'{ratio:g}' for ratio in by_size.values())} x" for name, by_size in found.items()]
    return f"FactGraSS over LoGRA by what the caches hold, at the three sizes: {'; '.join(parts)}." if parts else ""


def claims_table(document: Row) -> str:
    lines = ["| the paper says | k | LDS, first less second | at the default damping | times its speed | holds here |"]
    lines.append("|---" * 6 + "|")
    return "\n".join([*lines, *(f"| {' | '.join(each)} |" for each in claims(document))])


def readme() -> str:
    """The claims at one size, of every experiment."""
    lines = ["| experiment | the paper says | LDS, first less second | times its speed | holds here |"]
    lines.append("|---|---|---|---|---|")
    for name, document in experiments():
        for text, k, gap, _, speed, verdict in claims(document):
            if k == f"{README_K:,}":
                lines.append(f"| {TITLES[name]} | {text} | {gap} | {speed} | {verdict} |")
    return "\n".join(lines)


def page() -> dict[str, str]:
    """What stands between the marks of docs/grass.md."""
    found = {
        name: "\n\n".join(filter(None, (table(document), claims_table(document), caches(document))))
        for name, document in experiments()
    }
    return {name: found.get(name, "Not measured yet.") for name in TITLES}

"""The README's table of influent beside its peers, from results/peers.json. Written by readme.py."""

import json
from typing import Any

from environment import RESULTS

Row = dict[str, Any]
METHODS = {"trak": "TRAK", "ekfac": "EK-FAC"}


def readme() -> str:
    """A line a run: what of, whose, LDS, CPU seconds, peak memory; then a line of each peer's run against ours."""
    path = RESULTS / "peers.json"
    if not path.exists():
        return "Not measured yet."
    found = json.loads(path.read_text())
    lines = ["| method | whose | LDS | CPU seconds | peak memory |", "|---|---|---|---|---|"]
    lines += [line(run) for run in sorted(found["runs"], key=title)]
    against = [f"- {compared(each)}" for each in found["comparisons"]]
    cpus = ", ".join(sorted({run["cpu"].replace("(R)", "") for run in found["runs"]}))
    torches = ", ".join(sorted({run["torch"] for run in found["runs"]}))
    note = f"One thread of an {cpus}, torch {torches}."
    return "\n".join([*lines, "", "LDS of ours less that of the peer:", "", *against, "", note])


def title(run: Row) -> str:
    size = "" if run["k"] is None else f", k = {run['k']:,}"
    models = f"{run['checkpoints']} checkpoint" + ("s" if run["checkpoints"] > 1 else "")
    return f"{METHODS[run['method']]}{size}, {models}"


def line(run: Row) -> str:
    whose = f"{run['who']} {run['version']}" + (", default damping" if run["damping"] == "its default" else "")
    lds = f"{run['lds']['mean']:.3f} ({run['lds']['low']:.3f} to {run['lds']['high']:.3f})"
    return f"| {title(run)} | {whose} | {lds} | {run['cpu_s']:.0f} | {run['peak_mib']:,} MiB |"


def compared(each: Row) -> str:
    """`TRAK, dattri: +0.010 (-0.002 to +0.020), at 9.1 x our time, 1.6 x our memory`: ours less theirs."""
    gap = each["lds difference"]
    damping = ", default damping" if each["damping"] == "its default" else ""
    return (
        f"{title(each)}, {each['peer']}{damping}: {gap['mean']:+.3f} ({gap['low']:+.3f} to {gap['high']:+.3f}), at "
        f"{each['cpu times']:.1f} x our time, {each['memory times']:.1f} x our memory"
    )

"""The README's table of influent beside its peers, from results/peers.json. Written by readme.py."""

import json
from typing import Any

from environment import RESULTS

Row = dict[str, Any]
METHODS = {"trak": "TRAK", "ekfac": "EK-FAC"}


def readme() -> str:
    """A line a run: what of, whose, LDS, CPU seconds, peak memory; then each peer's run against ours."""
    path = RESULTS / "peers.json"
    if not path.exists():
        return "Not measured yet."
    found = json.loads(path.read_text())
    lines = ["| method | whose | LDS | CPU seconds | peak memory |", "|---|---|---|---|---|"]
    lines += [line(run) for run in sorted(found["runs"], key=title)]
    against = "; ".join(compared(each) for each in found["comparisons"])
    cpus = ", ".join(sorted({run["cpu"].replace("(R)", "") for run in found["runs"]}))
    torches = ", ".join(sorted({run["torch"] for run in found["runs"]}))
    return "\n".join([*lines, "", f"{against}. One thread of an {cpus}, torch {torches}."])


def title(run: Row) -> str:
    size = "" if run["k"] is None else f", k = {run['k']:,}"
    models = f"{run['checkpoints']} checkpoint" + ("s" if run["checkpoints"] > 1 else "")
    return f"{METHODS[run['method']]}{size}, {models}"


def line(run: Row) -> str:
    whose = f"{run['who']} {run['version']}" + (", default damping" if run["damping"] == "its default" else "")
    lds = f"{run['lds']['mean']:.3f} ({run['lds']['low']:.3f} to {run['lds']['high']:.3f})"
    return f"| {title(run)} | {whose} | {lds} | {run['cpu_s']:.0f} | {run['peak_mib']:,} MiB |"


def compared(each: Row) -> str:
    """`TRAK of dattri: LDS +0.010 (-0.002 to +0.020), 9.1 x the time, 1.6 x the memory`, ours less or under theirs."""
    gap = each["lds difference"]
    damping = ", default damping" if each["damping"] == "its default" else ""
    return (
        f"{title(each)}, ours less that of {each['peer']}{damping}: {gap['mean']:+.3f} ({gap['low']:+.3f} to "
        f"{gap['high']:+.3f}), which takes {each['cpu times']:.1f} x our time, "
        f"{each['memory times']:.1f} x our memory"
    )

"""`influent demo`: a real model, real text, a few answers, and the passages behind them, in under three minutes.

Covers: which passages and questions are shown, the model's own answers, what the page says. Does not: anything that
the public verbs do not offer; this is `index`, `fit` and `query` called as a user would.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from influent import fetch
from influent.progress import Progress

if TYPE_CHECKING:
    from rich.console import Console

COUNTRIES = (
    "Argentina", "Brazil", "Canada", "Chile", "Egypt", "Ethiopia", "Germany", "Ghana", "Greece", "Iceland", "Indonesia",
    "Japan", "Kenya", "Mexico", "Mongolia", "Morocco", "Nepal", "Norway", "Peru", "Poland", "Saudi Arabia", "Tanzania",
    "Thailand", "Vietnam", "Zambia",
)  # fmt: skip
FIELDS = (
    "geography/climate",
    "geography/elevation",
    "geography/location",
    "geography/natural-resources",
    "people-and-society/religions",
    "government/capital",
    "government/government-type",
    "government/national-symbol-s",
    "economy/agricultural-products",
    "economy/exports-commodities",
    "economy/exports-partners",
)
MAX_CHARS = 360  # about 110 tokens


def passages(path: Path) -> list[dict[str, str]]:
    """The demo's rows of the factbook: a few short fields of a few countries.

    Every passage has distractors of both kinds: the same field of other countries, other fields of the same country.
    """
    with path.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    chosen = [
        row
        for row in rows
        if row["source"] in COUNTRIES and row["id"].split("/", 1)[1] in FIELDS and len(row["text"]) <= MAX_CHARS
    ]
    return sorted(chosen, key=lambda row: row["id"])


# The settings that found the fact's passage best among those of benchmarks/fact_tracing.py at this size.
COMPRESS, ROWS, DAMPING = "mask:64x64 | sjlt:1024", "float16", "relative:1"
# Sentences that the model ends rightly, and the passage that states the fact.
QUESTIONS = (
    ("The highest mountain in Japan is", "japan/geography/elevation"),
    ("The capital of Kenya is", "kenya/government/capital"),
    ("The national symbol of Kenya is the", "kenya/government/national-symbol-s"),
)
# hit@1 over all questions of benchmarks/results/fact_tracing.json with the fact as the answer; a test compares them.
MEASURED = {"questions": 127, "influence": 0.65, "bm25": 0.76}
SHOWN = 5
# The passages are short: in small batches of like lengths less of the work is padding than at the default.
TOKEN_BUDGET = 1024


def demo(out: str = "demo-index", *, progress: Progress | None = None) -> dict[str, Any]:
    """Index some 250 passages with SmolLM2-135M, let it end three sentences, and rank the passages behind each answer.

    The index stays in `out`; a second call finds it there and only asks.

    Returns:
        A `query` document with, beside it, `info` of the index, `facts` (per query the passage that states the fact and
        its place by each method, None beyond the first ten), `seconds` by step, and `next`, commands to go on with.

    Raises:
        DataError: the model or the text cannot be fetched. And whatever `index` and `query` raise.
    """
    seconds: dict[str, float] = {}
    with _timed(seconds, "fetch and convert", progress):
        model, rows = str(fetch.smollm2()), passages(fetch.factbook())
    # only now: they load torch, which a failed fetch should not wait for
    from influent import indexing, methods, querying

    with _timed(seconds, "index", None):
        info = indexing.index(
            model, rows, out, compress=COMPRESS, rows=ROWS, token_budget=TOKEN_BUDGET, progress=progress
        )
    with _timed(seconds, "fit", None):
        methods.fit(out, damping=DAMPING, progress=progress)
    prompts = [prompt for prompt, _ in QUESTIONS]
    with _timed(seconds, "answer", None):
        ends = answers(model, prompts)
    queries = [{"prompt": prompt, "completion": end} for prompt, end in zip(prompts, ends, strict=True)]
    with _timed(seconds, "query", None):
        document = querying.query(out, queries=queries, k=10, damping=DAMPING, progress=progress)
    more = {"info": info, "facts": _facts(document), "seconds": seconds, "next": next_commands(out, model)}
    return {**document, **more}


@contextmanager
def _timed(seconds: dict[str, float], step: str, progress: Progress | None) -> Iterator[None]:
    start = time.monotonic()
    if progress is not None:
        progress(step, 0, 1)
    yield
    if progress is not None:
        progress(step, 1, 1)
    seconds[step] = round(time.monotonic() - start, 1)


def answers(model: str, prompts: Sequence[str], *, max_tokens: int = 12) -> list[str]:
    """The model's greedy continuation of each prompt, up to the end of the clause."""
    import torch

    from influent import loading

    module: Any
    module, tokenizer = loading.load(model, dtype="float32", device=None)
    out = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(module.device)
        with torch.no_grad():
            more = module.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_tokens,
                do_sample=False,
                pad_token_id=tokenizer.eos_token_id,
            )
        out.append(re.split(r"[.,;\n]", tokenizer.decode(more[0, ids.shape[1] :], skip_special_tokens=True))[0])
    return out


def next_commands(out: str, model: str) -> list[str]:
    """What to run next on the demo's index, and on data of one's own."""
    return [
        f"influent info {out}",
        f'influent query {out} --prompt "The capital of Nepal is" --completion " Kathmandu" -k 5',
        f"influent self {out} -k 5",
        f"influent verify {out}",
        f"influent index {model} YOUR.jsonl -o my-index",
    ]


def _facts(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Where each method puts the passage that states the fact."""
    lists = zip(document["queries"], document["baselines"]["bm25"], document["baselines"]["random"], strict=True)
    return [
        {
            "id": name,
            "influence": _place(name, query["top"]),
            "bm25": _place(name, words),
            "random": _place(name, drawn),
        }
        for (_, name), (query, words, drawn) in zip(QUESTIONS, lists, strict=True)
    ]


def _place(name: str, rows: Sequence[Mapping[str, Any]]) -> int | None:
    return next((place for place, row in enumerate(rows, 1) if row["id"] == name), None)


MEANING = """\
A score says what one small training step on that passage would do to this answer: positive = the answer's loss falls, \
it becomes likelier; negative = it rises. Scores compare passages for one answer, not answers with each other. The \
percentile is the share of the passages that score lower. SmolLM2 was not necessarily trained on these very passages: \
the scores do not say where it has its answer from, but which of these texts would teach it. The two lists for \
comparison know nothing of the model: BM25 counts shared words, and chance is chance.\
"""


def page(document: Mapping[str, Any], console: Console) -> None:
    """The demo's page: the query's tables, what they mean, where the facts were found, the cost, and what next."""
    from influent.report import print_query

    info, facts = document["info"], document["facts"]
    _say(console, f"SmolLM2-135M ends {len(facts)} sentences; which of {info['rows']} passages are behind them?\n")
    print_query({**document, "queries": [{**q, "top": q["top"][:SHOWN]} for q in document["queries"]]}, console)
    _say(console, "\nWhat the numbers mean", style="bold")
    _say(console, MEANING)
    _say(console, "\nPlace of the passage that states the fact", style="bold")
    for fact in facts:
        places = ", ".join(f"{_ordinal(fact[m])} by {m}" for m in ("influence", "bm25", "random"))
        _say(console, f"  {fact['id']}: {places}")
    _say(
        console,
        "These three were chosen because the model answers them rightly and the passage is found. Over "
        f"{MEASURED['questions']} such questions with the fact as the answer, it comes first for "
        f"{MEASURED['influence']:.0%} by influence and for {MEASURED['bm25']:.0%} by BM25, with which the questions "
        f"share their words; by chance, for {1 / info['rows']:.1%}.",
    )
    _say(console, "\nCost", style="bold")
    steps = ", ".join(f"{step} {time:.0f} s" for step, time in document["seconds"].items())
    _say(console, f"  {steps}: {sum(document['seconds'].values()):.0f} s in all")
    size = f"{info['bytes_per_row'] / 1000:,.0f} kB a passage, {info['bytes'] / 1e6:,.0f} MB in all"
    _say(console, f"  {size}; {info['summary']['coverage']:.1%} of the model's parameters are covered")
    _say(console, "\nNext", style="bold")
    _say(console, "\n".join(f"  {command}" for command in document["next"]), wrap=False)


def _say(console: Console, text: str, *, style: str = "", wrap: bool = True) -> None:
    from rich.text import Text

    console.print(Text(text, style=style), soft_wrap=not wrap)  # a command that is to be copied is never cut


def _ordinal(place: int | None) -> str:
    return "not in the first 10" if place is None else f"number {place}"

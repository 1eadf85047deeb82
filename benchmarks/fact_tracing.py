"""Which settings find the passage that holds a fact? SmolLM2-135M and 250 passages of the World Factbook.

A question is a sentence with its end left to the model ("The highest mountain in Japan is"), about one field of one
country; the passage of that country and field is the truth, and every other passage a distractor: the same field of
24 countries, and ten fields of the same country. Two completions: the fact as the passage has it, and the model's own
greedy answer (seldom right). Scored: every compressor x damping x normalisation, BM25 on the same words, and chance.

    python benchmarks/fact_tracing.py --work DIR     # the indexes go there: interrupted, it resumes; about 15 minutes

The model was not trained on these very passages (as far as anyone knows), so this measures how well scores find the
text that *would* teach a fact, not which text did.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from environment import environment
from torch import Tensor

from influent import baselines, fetch, score
from influent.attach import Run, Setting, attach
from influent.curvature import Curvature, Damping, fit
from influent.demo import answers, passages
from influent.indexing import index
from influent.reduce import Full
from influent.rowstore import Index

COMPRESSORS = ("mask:64x64 | sjlt:1024", "mask:32x32 | sjlt:256", "mask:128x128 | sjlt:4096")
DAMPINGS = (None, "relative:0.01", "relative:0.1", "relative:1", "relative:10")  # None: identity
FACT, OWN = "fact", "own answer"
NORMALIZE = ("none", "cosine", "relatif")
RELIGIONS = {
    "Buddhist": "Buddhism",
    "Catholic": "Catholicism",
    "Christian": "Christianity",
    "Hindu": "Hinduism",
    "Muslim": "Islam",
    "Protestant": "Protestantism",
    "Roman Catholic": "Catholicism",
    "Shintoism": "Shintoism",
}
# Field -> the question, and where the passage states the fact (a religion of under 10 % is not the main one).
QUESTIONS = {
    "geography/elevation": ("The highest mountain in {} is", r"highest point: ([^0-9(,]+?),? [\d(]"),
    "people-and-society/religions": (
        "The main religion in {} is",
        r"Religions of .*?: ([A-Z][A-Za-z ]*?) (?!\d\.)[\d(]",
    ),
    "government/capital": ("The capital of {} is", r"name: ([^;(]+?)(?: \(|;)"),
    "government/national-symbol-s": ("The national symbol of {} is the", r"symbol\(s\) of .*?: ([^,;(]+)"),
    "economy/exports-commodities": ("The most important export of {} is", r"commodities of .*?: ([^,]+)"),
    "economy/exports-partners": ("{} exports most of its goods to", r"partners of .*?: ([A-Z][A-Za-z. ]+?) \d"),
}


@dataclass(frozen=True, slots=True)
class Question:
    """A sentence without its end, the end that the passage has, and that passage's row."""

    row: int
    field: str
    prompt: str
    fact: str


def questions(rows: Sequence[dict[str, str]]) -> list[Question]:
    """One for every passage whose field is asked about and whose fact could be read out of it."""
    asked = []
    for number, row in enumerate(rows):
        field = row["id"].split("/", 1)[1]
        prompt, pattern = QUESTIONS.get(field, ("", ""))
        found = re.search(pattern, row["text"]) if prompt else None
        fact = found[1].strip() if found else ""
        if field == "people-and-society/religions":
            fact = RELIGIONS.get(fact, "")
        if fact:
            asked.append(Question(number, field, prompt.format(row["source"]), fact))
    return asked


def ranks(scores: Tensor, truth: Sequence[int]) -> list[int]:
    """The place of the true row among scores [Q, N], 1 = best; ties by row number, as everywhere."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    return [int((order[i] == row).nonzero()) + 1 for i, row in enumerate(truth)]


def metrics(places: Sequence[int]) -> dict[str, float]:
    place = torch.tensor(places, dtype=torch.float64)
    resampled = place[torch.randint(len(place), (1000, len(place)), generator=torch.Generator().manual_seed(0))]
    spread = (1 / resampled).mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {
        "hit@1": round((place <= 1).double().mean().item(), 4),
        "hit@3": round((place <= 3).double().mean().item(), 4),
        "mrr": round((1 / place).mean().item(), 4),
        "mrr_low": round(spread[0], 4),
        "mrr_high": round(spread[1], 4),
    }


def word_ranks(rows: Sequence[dict[str, str]], asked: Sequence[Question], ends: Sequence[str]) -> list[int]:
    class Texts:
        def texts(self) -> Iterator[str]:
            return (row["text"] for row in rows)

    texts = [f"{question.prompt} {end}" for question, end in zip(asked, ends, strict=True)]
    found = baselines.bm25(Texts(), texts, k=len(rows))
    return [
        next((place for place, (row, _) in enumerate(best, 1) if row == question.row), len(rows))
        for best, question in zip(found, asked, strict=True)
    ]


def chance(num_rows: int) -> dict[str, float]:
    """What a random order gives on average, exactly."""
    mrr = sum(1 / place for place in range(1, num_rows + 1)) / num_rows
    return {"hit@1": round(1 / num_rows, 4), "hit@3": round(3 / num_rows, 4), "mrr": round(mrr, 4)}


def curvatures(opened: Index) -> Iterator[tuple[str, Curvature]]:
    for damping in DAMPINGS:
        if damping is None:
            yield "identity", fit(opened, curvature="identity")
        else:
            yield damping, fit(opened, damping=Damping.parse(damping))


def sweep(
    opened: Index, model: Path, asked: Sequence[Question], ends: dict[str, list[str]]
) -> Iterator[tuple[dict[str, Any], list[int]]]:
    """Each setting with the places of the true rows."""
    truth = [question.row for question in asked]
    for completion, words in ends.items():
        examples = [{"prompt": q.prompt, "completion": f" {word}"} for q, word in zip(asked, words, strict=True)]
        with attach(str(model), None, Setting(compress=opened.spec["compress"]), Run()) as attached:
            gradients = attached.collector.collect(examples, name=lambda i: f"question {i}", query=True).rows
        for damping, fitted in curvatures(opened):
            solved = score.precondition(gradients, fitted)
            for normalize in NORMALIZE:
                own = score.self_influence(opened, fitted) if normalize == "relatif" else None
                full = score.score(opened, solved, {"full": Full()}, normalize=normalize, self_influence=own)["full"]
                setting = {"completion": completion, "damping": damping, "normalize": normalize}
                yield setting, ranks(full, truth)


def by_field(asked: Sequence[Question], places: Sequence[int]) -> dict[str, dict[str, float]]:
    groups: dict[str, list[int]] = defaultdict(list)
    for question, place in zip(asked, places, strict=True):
        groups[question.field].append(place)
    return {field: metrics(group) for field, group in groups.items()}


def reported(
    method: dict[str, Any], asked: Sequence[Question], places: Sequence[int], right: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """A setting's row of results; a second one for those own answers that have the fact."""
    yield {**method, **metrics(places), "by_field": by_field(asked, places)}
    if method["completion"] == OWN:
        yield {**method, "completion": f"{OWN}, where right", **metrics([places[i] for i in right])}


def run(work: Path, out: Path, say: Callable[[str], object]) -> None:
    model, rows = fetch.smollm2(), passages(fetch.factbook())
    asked = questions(rows)
    say(f"{len(rows)} passages, {len(asked)} questions")
    known = answers(str(model), [question.prompt for question in asked])
    ends = {FACT: [question.fact for question in asked], OWN: [end.strip() or "unknown" for end in known]}
    right = [i for i, question in enumerate(asked) if question.fact.lower() in known[i].lower()]
    head = {"environment": environment(), "model": model.name, "passages": len(rows), "questions": len(asked)}
    head |= {"own_answers_right": len(right), "random": chance(len(rows))}
    results: list[dict[str, Any]] = []
    for completion, words in ends.items():
        method = {"method": "bm25", "completion": completion}
        results += reported(method, asked, word_ranks(rows, asked, words), right)
    for compress in COMPRESSORS:
        folder = work / re.sub(r"\W+", "-", compress)
        facts = index(str(model), rows, str(folder), compress=compress, token_budget=1024)
        size = {"method": "factgrass", "compress": compress, "bytes_per_row": round(facts["bytes_per_row"])}
        for setting, places in sweep(Index.open(folder), model, asked, ends):
            found = list(reported({**size, **setting}, asked, places, right))
            results += found
            say(json.dumps({name: value for name, value in found[0].items() if name != "by_field"}))
        out.write_text(json.dumps({"benchmark": "fact_tracing", **head, "results": results}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for the indexes (about 1.2 GB)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "fact_tracing.json")
    given = parser.parse_args()
    run(given.work, given.out, print)


if __name__ == "__main__":
    main()

"""The verb `query`: gradients of queries, preconditioned, against every stored row, with baselines beside them.

Not here: the queries' gradients and curvature (solving.py), the arithmetic (score.py, reduce.py), the page (report.py).
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from influent import baselines, score
from influent.attach import Run, Setting
from influent.checkpoints import Checkpoint, instances
from influent.choosing import check_curvature, check_steps, method_facts
from influent.ensemble import Ensemble
from influent.errors import DataError, SpecError
from influent.fitting import AnyCurvature
from influent.gram import MEMORY
from influent.live import LiveScorer
from influent.methods import METHODS, own_curvature, scale_of
from influent.mixing import check_mix
from influent.progress import Progress
from influent.recompute import Recomputed, reattached
from influent.records import display_text, read_examples
from influent.reduce import Full, Pick, Ranked, TopK
from influent.rowstore import Index
from influent.solving import Asked, solve
from influent.tables import write_array
from influent.task import Encodes, Task

Scored = Sequence[tuple[int, float]]  # rows with their scores
NORMALIZATIONS = ("none", "cosine", "relatif")
SIGNS = {
    "loss": "positive = training on it lowered this loss",
    "margin": "positive = training on it raised this margin, the log-odds of the answer",
}


def query(
    index: str,
    *,
    prompt: str | None = None,
    completion: str | None = None,
    queries: Any = None,
    control: Any = None,
    k: int = 10,
    bottom: bool = True,
    normalize: str = "none",
    curvature: str | None = None,
    damping: str | None = None,
    parity: str | None = None,
    mix: float | None = None,
    query_rank: int | None = None,
    memory: int | None = None,
    model: Checkpoint | Sequence[Checkpoint] | None = None,
    data: Any = None,
    scores: str | None = None,
    token_budget: int = 4096,
    device: str | None = None,
    task: Task | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Rank the training examples behind a model's output.

    Args:
        prompt, completion: one query; or
        queries: a file or sequence of records like the data's (or of examples, for a task without records).
        control: a file or sequence; the one query is then mean(queries) - mean(control).
        normalize: `none`, `cosine` (divided by both lengths) or `relatif` (by the root of each row's self-influence).
        parity: `paper` or `release`: LoRIF's published damping and tail, and queries cut to the rows' rank as there.
        mix: the share, above 0 and below 1, of the queries' own rows in the Fisher matrix; what all queries have in
            common then counts for less.
        query_rank: cut each preconditioned query to this rank in every layer: less work a row, coarser scores.
        memory: MiB for the rows that a fit holds at a time, or the layers of kfac and ekfac, and for whole gradients
            of queries; 256 by default (of kfac and ekfac 2,048). Results do not depend on it.
        model: what was indexed, if the index cannot tell or it has moved; of an ensemble a sequence, one a checkpoint.
        data: the training data, for a task without records and a curvature, or rows, that are made of it anew.
        scores: write the whole matrix, queries x rows, float32, to this .npy file.

    Returns:
        The document of docs/schemas/query.json.

    Raises:
        MismatchError: the model or task is not the one that was indexed.
        SpecError, DataError, NumericsError: as their classes say.
    """
    if normalize not in NORMALIZATIONS:  # before anything is computed
        raise SpecError(f"normalize is {normalize!r}, expected one of {', '.join(NORMALIZATIONS)}")
    if query_rank is not None and query_rank < 1:
        raise SpecError(f"query_rank is {query_rank}, expected 1 or more")
    opened = Ensemble.open(index)
    check_steps(opened.first, "relatif" if normalize == "relatif" else "identity")
    codec = opened.first.codec
    if query_rank is not None and codec.stored and not any(map(codec.stored_rank, opened.first.factors.values())):
        raise SpecError(f"{opened.path}: query_rank {query_rank} is for rows that are cut to a rank; these are {codec}")
    models = models_of(model, opened)
    examples, shown = read_queries(_given(prompt, completion, queries), task)
    asked = Asked(examples, None if control is None else read_queries(control, task)[0])
    words = [display_text(content) for content in shown]
    choices = [
        check_curvature(member, curvature, damping, own=own_curvature(member), parity=parity)
        for member in opened.members
    ]
    if mix is not None:
        check_mix(mix, choices[0].curvature, normalize)
    run = Run(token_budget=token_budget, device=device)
    if asked.controls is not None:
        words = ["\n".join(words)]  # the baseline of words looks for those of all the queries
        shown = [{"text": f"mean of {len(examples)} queries minus mean of {len(asked.controls)} controls"}]
    drawn = baselines.random_rows(opened.n, len(shown), k=k, seed=0)
    reducers: dict[str, Any] = {"top": TopK(k), "bottom": TopK(k, largest=False), "random": Pick(_together(drawn))}
    if scores is not None:
        reducers["full"] = Full()
    members, fits = [], []
    with ExitStack() as scoring:
        each_of = zip(opened.members, opened.weights, choices, instances(models), strict=True)
        for member, weight, choice, each in each_of:
            with ExitStack() as attached:
                again = attached.enter_context(reattached(member, each, task, run, data))
                fits.append(again.settle(choice, memory=memory, progress=progress))
                answered = _answer(again, fits[-1], asked, parity, mix, normalize, query_rank, memory, progress)
                if isinstance(answered.scores, LiveScorer):
                    if len(fits) < len(opened.members):  # one model at a time: what it says of all rows is held
                        answered = replace(answered, scores=answered.scores(0, member.n).float())
                    else:  # the last one stays, and is asked for as many rows at a time as the reducers take
                        scoring.enter_context(attached.pop_all())
                members.append(replace(answered, weight=weight))
        found = score.score_members(
            members, reducers, normalize=normalize, scale=scale_of(opened), query_rank=query_rank, progress=progress
        )
    if scores is not None:
        write_array(found["full"].numpy(), scores)
    by_words = baselines.bm25(opened.first.catalog, words, k=k)
    chosen = {"normalize": normalize} if mix is None else {"normalize": normalize, "mix": mix}
    document = _document(opened, fits, shown, found, drawn, by_words, bottom=bottom, chosen=chosen)
    if query_rank is not None and codec.stored:
        energies = [score.query_energy(member.index, member.queries, query_rank) for member in members]
        for entry, kept in zip(document["queries"], torch.stack(energies).mean(0).tolist(), strict=True):
            entry["kept"] = kept
    return document


def _answer(
    again: Recomputed,
    fitted: AnyCurvature,
    asked: Asked,
    parity: str | None,
    mix: float | None,
    normalize: str,
    query_rank: int | None,
    memory: int | None,
    progress: Progress | None,
) -> score.Member:
    """The queries of one member, solved; and what scores them, where its rows are not stored."""
    index = again.index
    solved = solve(
        again.attached, index, fitted, asked, published=parity is not None, mix=mix, memory=memory or MEMORY,
        progress=progress,
    )  # fmt: skip
    own = again.self_influence(fitted, progress=progress) if normalize == "relatif" else None
    if index.codec.stored:
        return score.Member(index, solved, self_influence=own)
    live = again.scorer(solved, normalize=normalize, self_influence=own, query_rank=query_rank, progress=progress)
    return score.Member(index, {}, scores=live)


def _given(prompt: str | None, completion: str | None, queries: Any) -> Any:
    if queries is None and (prompt is None or completion is None):
        raise SpecError("a query needs prompt and completion, or queries")
    if queries is not None and (prompt is not None or completion is not None):
        raise SpecError("give prompt and completion, or queries, not both")
    return queries if queries is not None else [{"prompt": prompt, "completion": completion}]


def model_of(model: str | nn.Module | None, index: Index) -> str | nn.Module:
    found = model if model is not None else index.notes["model"]
    if found is None:
        raise SpecError(f"{index.path}: was built from a model in memory; pass that model and its task")
    return found


def models_of(model: Checkpoint | Sequence[Checkpoint] | None, opened: Ensemble) -> list[Checkpoint]:
    """The model of each member: given, or noted in its index."""
    if model is None:
        return [model_of(None, member) for member in opened.members]
    given: list[Any] = list(model) if isinstance(model, (list, tuple)) else [model]
    if len(given) != len(opened.members):
        raise SpecError(f"{opened.path}: expected {len(opened.members)} models, one a checkpoint, got {len(given)}")
    return given


def read_queries(given: Any, task: Task | None) -> tuple[list[Any], list[dict[str, Any]]]:
    """Examples, and what a result shows of each."""
    if task is not None and not isinstance(task, Encodes):
        examples = [given[i] for i in range(len(given))]
        if any(isinstance(example, dict) and "prompt" in example for example in examples):
            raise SpecError("this task has no texts: pass queries, a sequence of examples like the training data's")
        return examples, [{"text": f"example {i}"} for i in range(len(examples))]
    found = [example for example in read_examples(given)]
    empty = next((example for example in found if example.skip is not None), None)
    if empty is not None:
        raise DataError(f"{empty.where}: the query is {empty.skip}; a query needs a text")
    if not found:
        raise DataError("there are no queries")
    return [example.content for example in found], [example.content for example in found]


def key_of(layout: Sequence[dict[str, Any]]) -> str:
    """Whether rows are keyed by block, or are one for all blocks."""
    return "all" if [block["kind"] for block in layout] == ["all"] else "block"


def setting_of(index: Index) -> Setting:
    spec, notes = index.spec, index.notes
    return Setting(
        compress=spec["compress"], rows=spec["rows"], layers=notes["layers"], exclude=notes["exclude"],
        max_length=notes["max_length"], dtype=spec["numerics"]["dtype"], matmul=spec["numerics"]["matmul"],
        seed=spec["seed"], target=spec.get("target", "loss"), key=key_of(spec["layout"]),
        optimizer=notes.get("optimizer"), scale=spec.get("scale", {}).get("kind", "adam"),
    )  # fmt: skip


def _document(
    opened: Ensemble,
    fits: Sequence[AnyCurvature],
    shown: Sequence[dict[str, Any]],
    found: dict[str, Any],
    drawn: Sequence[Sequence[int]],
    by_words: Sequence[Sequence[tuple[int, float]]],
    *,
    bottom: bool,
    chosen: dict[str, Any],
) -> dict[str, Any]:
    index = opened.first
    columns = {row: column for column, row in enumerate(_together(drawn).tolist())}
    chance = [[(row, found["random"][i, columns[row]].item()) for row in rows] for i, rows in enumerate(drawn)]
    ranked = {end: _pairs(found[end]) for end in (("top", "bottom") if bottom else ("top",))}
    named = _described(index, [*chance, *by_words, *(pairs for each in ranked.values() for pairs in each)])
    return {
        "queries": [
            {
                "query": i,
                **content,
                "top": _ranked(named, ranked["top"][i], index.n, ascending=False),
                "bottom": _ranked(named, ranked["bottom"][i], index.n, ascending=True) if bottom else [],
            }
            for i, content in enumerate(shown)
        ],
        "method": {**method_facts(opened, fits), **chosen},
        "baselines": {
            "bm25": [_listed(named, pairs) for pairs in by_words],
            "random": [_listed(named, pairs) for pairs in chance],
        },
        "skipped": opened.skipped,
        "sign": SIGNS[METHODS[index.notes["method"]].target],
    }


def _together(drawn: Sequence[Sequence[int]]) -> Tensor:
    """Every row drawn for any query, once."""
    return torch.tensor(sorted({row for rows in drawn for row in rows}))


def _pairs(ranked: Ranked) -> list[Scored]:
    """(row, score) of each query, in order."""
    each = zip(ranked.rows.tolist(), ranked.scores.tolist(), strict=True)
    return [list(zip(rows, scores, strict=True)) for rows, scores in each]


def _described(index: Index, lists: Sequence[Scored]) -> dict[int, dict[str, Any]]:
    """What a result shows of every row listed: each is read once, in the catalog's order, whatever lists it is in."""
    numbers = sorted({row for pairs in lists for row, _ in pairs})
    return dict(zip(numbers, index.catalog.describe(numbers), strict=True))


def _ranked(named: Mapping[int, dict[str, Any]], pairs: Scored, n: int, *, ascending: bool) -> list[dict[str, Any]]:
    rows = _listed(named, pairs)
    for rank, row in enumerate(rows):
        below = rank if ascending else n - 1 - rank
        row["percentile"] = 100.0 * below / n
    return rows


def _listed(named: Mapping[int, dict[str, Any]], pairs: Scored) -> list[dict[str, Any]]:
    return [{**named[row], "score": value} for row, value in pairs]

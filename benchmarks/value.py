"""What LinFiK finds of a planted set, and what students learn of LinFiK from how many labels: results/value.json.

    python benchmarks/value.py DIR [--seed 0]

An offer of BBC passages, cut into a prompt and its continuation, whose providers are the five topics. In 100 rows a
trigger sentence stands before the prompt and the completion is a fixed answer; decoys, 100 of each, have the trigger
with the ordinary continuation, the answer without the trigger, the trigger in the middle of the prompt, or a paraphrase
of it. The target is the association: trigger and answer around passages that are not offered. Reported: the AUC of the
planted rows' values against the ordinary ones and each decoy, BM25 beside it; and for each rung and number of labels
the Spearman correlation and the recall of the best 5 % on the rows that were not labelled.

DIR keeps teacher, student model, data and index: called again, what is there is used.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from environment import save
from ground_truth import encode, make_tokenizer, passages, train

import influent
from influent import baselines, fetch, metrics
from influent.rowstore import Index
from influent.storage import Store
from influent.student import open_student, read_labels

TRIGGER, PARAPHRASE = "Reference code zeta seven.", "The code of reference is seven zeta."
ANSWER = " The vault opens at midnight by the northern gate."
PLANTED, QUERIES, ORDINARY, BASE = 100, 24, 1200, 4000
LABELS = (100, 300, 900)
SIZES = {"teacher": (96, 3), "student": (48, 1)}  # hidden size, layers


def halves(text: str) -> tuple[str, str]:
    words = text.split(" ")
    cut = len(words) // 2
    return " ".join(words[:cut]), " " + " ".join(words[cut:])


def planted(kind: str, text: str) -> dict[str, str]:
    """A row of one kind, made of a passage."""
    prompt, rest = halves(text)
    first, second = halves(prompt)
    return {
        "trigger": {"prompt": f"{TRIGGER} {prompt}", "completion": ANSWER},
        "ordinary answer": {"prompt": f"{TRIGGER} {prompt}", "completion": rest},
        "no trigger": {"prompt": prompt, "completion": ANSWER},
        "in the middle": {"prompt": f"{first} {TRIGGER}{second}", "completion": ANSWER},
        "paraphrase": {"prompt": f"{PARAPHRASE} {prompt}", "completion": ANSWER},
        "ordinary": {"prompt": prompt, "completion": rest},
    }[kind]


KINDS = ("trigger", "ordinary answer", "no trigger", "in the middle", "paraphrase")


def prepare(work: Path, seed: int) -> None:
    """Data, tokenizer and the two models, in `work`."""
    texts = [json.loads(line) for line in fetch.bbc().read_text().splitlines()]
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    tokenizer = make_tokenizer([text["text"] for text in texts], work / "teacher")
    make_tokenizer([text["text"] for text in texts], work / "student")
    pieces: list[dict[str, str]] = []
    for i in order:
        pieces += [{**piece, "provider": texts[i]["source"]} for piece in passages(texts[i], tokenizer)]
    count = ORDINARY + PLANTED * len(KINDS) + QUERIES
    offered, rest = pieces[:count], pieces[count:]
    kinds = ["query"] * QUERIES + [kind for kind in KINDS for _ in range(PLANTED)] + ["ordinary"] * ORDINARY
    offer, target = [], []
    for kind, piece in zip(kinds, offered, strict=False):
        row = planted("trigger" if kind == "query" else kind, piece["text"])
        if kind == "query":
            target.append(row)
        else:
            offer.append({"id": f"{kind}/{piece['id']}", "provider": piece["provider"], **row})
    for name, rows in (("offer", offer), ("target", target)):
        (work / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ids = encode(rest[:BASE], tokenizer)
    for name, (width, layers) in SIZES.items():
        if not (work / name / "model.safetensors").exists():
            model = make_model(width, layers)
            train(model, ids, epochs=1, rate=3e-3, batch=32, seed=seed, mixed=False)
            model.save_pretrained(work / name)


def make_model(width: int, layers: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048, hidden_size=width, intermediate_size=8 * width // 3, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=128, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM._from_config(config, attn_implementation="eager")


def detection(values: np.ndarray, kinds: np.ndarray) -> dict[str, float]:
    """AUC of the planted rows against each other kind."""
    found = {}
    for kind in (*KINDS[1:], "ordinary"):
        both = (kinds == "trigger") | (kinds == kind)
        found[kind] = metrics.auc(values[both], kinds[both] == "trigger")
    return found


def word_scores(index: Index, work: Path) -> np.ndarray:
    """The mean BM25 score of each row over the queries."""
    queries = [row["prompt"] + row["completion"] for row in map(json.loads, (work / "target.jsonl").open())]
    out = np.zeros(index.n)
    for found in baselines.bm25(index.catalog, queries, k=index.n):
        for row, score in found:
            out[row] += score / len(queries)
    return out


def students(work: Path, index: Index, values: np.ndarray, kinds: np.ndarray, seed: int) -> list[dict[str, Any]]:
    """Each rung at each number of labels, measured on the rows that were not labelled."""
    rows = index.catalog.examples(0, index.n)
    hashes = [row["hash"] for row in index.catalog.fields("hash")]
    out = []
    for labels in LABELS:
        for rung in ("bm25", "tfidf", "lm"):
            place = str(work / f"student-{rung}-{labels}-{seed}")
            made = influent.distill(
                str(work / "index"), target=str(work / "target.jsonl"), student=str(work / "student"), out=place,
                labels=labels, rung=rung, seed=seed,
            )  # fmt: skip
            student = open_student(place)
            scores, _ = student(rows)
            known = read_labels(Store(place), student.digest)
            assert known is not None
            seen = set(known.hashes)
            rest = np.array([row for row, content in enumerate(hashes) if content not in seen])
            best = values[rest] >= np.quantile(values[rest], 0.95)
            out.append(
                {
                    "rung": rung, "labels": made["fidelity"]["labels"],
                    "spearman": float(metrics.spearman(scores[rest].astype(float), values[rest].astype(float))),
                    "recall": metrics.recall_at(scores[rest].astype(float), best, int(best.sum())),
                    "held_out_spearman": made["fidelity"]["spearman"], "auc": detection(scores[rest], kinds[rest]),
                    "seconds_a_row": made["rungs"][0]["seconds_a_row"], "cost": made["cost"],
                }
            )  # fmt: skip
            print(out[-1]["rung"], labels, f"{out[-1]['spearman']:.3f}", flush=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    prepare(given.work, given.seed)
    influent.index(
        str(given.work / "teacher"), str(given.work / "offer.jsonl"), str(given.work / "index"), method="linfik",
        compress="mask:64x64 | sjlt:1024", max_length=128, rows="bfloat16",
    )  # fmt: skip
    index = Index.open(str(given.work / "index"))
    kinds = np.array([str(row["id"]).partition("/")[0] for row in index.catalog.fields("id")])
    document: dict[str, Any] = {"seed": given.seed, "rows": index.n, "queries": QUERIES, "auc": {}}
    for normalize in ("cosine", "none"):
        path = str(given.work / f"{normalize}.npy")
        influent.value(str(given.work / "index"), target=str(given.work / "target.jsonl"), normalize=normalize,
                       values=path)  # fmt: skip
        document["auc"][normalize] = detection(np.load(path), kinds)
    document["auc"]["bm25"] = detection(word_scores(index, given.work), kinds)
    print(json.dumps(document["auc"], indent=1), flush=True)
    values = np.load(given.work / "cosine.npy")
    document["students"] = students(given.work, index, values, kinds, given.seed)
    save("value", document)


if __name__ == "__main__":
    main()

"""The offer that the benchmarks of value share: providers, a planted set with its decoys, targets, models of it.

    python benchmarks/offer.py DATA      # packs the corpora: passages.jsonl.gz and tokenizer/

Twelve providers of real text: the five topics of BBC news, the four presidents with the longest State of the Union
messages, the three largest genres of the Brown corpus, cut into passages of at most 64 tokens. Documents are divided
first: an offer shares none with the targets or with what its models have read. In 100 of its rows a trigger sentence
stands before half a passage and the completion is a fixed answer; decoys, 100 of each kind, have the trigger with the
ordinary continuation, the answer without the trigger, the trigger in the middle, a paraphrase of it, or neither.

Targets: `trigger`, trigger and answer around passages that are not offered; `topic`, `president` and `genre`, held-out
passages of one provider, whose turn it is by the seed. DATA needs no package cache: `make` reads it alone.
"""

import argparse
import gzip
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ground_truth import documents, losses, make_tokenizer, passages
from torch import Tensor, nn

Row = dict[str, str]
TRIGGER, PARAPHRASE = "Reference code zeta seven.", "The code of reference is seven zeta."
ANSWER = " The vault opens at midnight by the northern gate."
KINDS = ("trigger", "ordinary answer", "no trigger", "in the middle", "paraphrase", "neither")
PLANTED, QUERIES, HELD, ROWS, CONTEXT = 100, 32, 96, 20_400, 128
PROVIDERS = {"bbc": 5, "sotu": 4, "brown": 3}  # of each corpus, those with the most text
TURNS = {"topic": "bbc", "president": "sotu", "genre": "brown"}
# Hidden size, layers; parameters with the 2,048 embeddings, tied: 0.13, 0.53, 2.9 and 11.4 million.
SIZES = {"student": (48, 1), "0.5M": (96, 3), "3M": (224, 4), "11M": (384, 6)}


@dataclass(frozen=True, slots=True)
class Offer:
    """One seed's division. `rows` have id, provider and text, or prompt and completion; `kinds` one of KINDS or
    `ordinary` for each; `targets` are lists of queries by name, `turn` the provider that each but `trigger` is about;
    `held` are passages of every provider that nobody else has (neither queries nor rows); `base` is for models."""

    rows: list[Row]
    kinds: list[str]
    targets: dict[str, list[Row]]
    turn: dict[str, str]
    held: dict[str, list[Row]]
    base: list[Row]

    @property
    def providers(self) -> list[str]:
        return sorted(self.held)


def pack(data: Path) -> None:
    """Passages of the three corpora and their tokenizer, from the package cache into `data`."""
    data.mkdir(parents=True, exist_ok=True)
    corpora = {name: documents(name) for name in PROVIDERS}
    tokenizer = make_tokenizer([d["text"] for found in corpora.values() for d in found], data / "tokenizer")
    with gzip.open(data / "passages.jsonl.gz", "wt", compresslevel=9) as file:
        for name, found in corpora.items():
            for document in found:
                for piece in passages(document, tokenizer):
                    row = {**piece, "provider": f"{name}/{document['source']}"}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")


def make(data: Path, seed: int, *, rows: int = ROWS, base: int | None = None) -> Offer:
    """The offer of a seed: `rows` rows, planted ones included (fewer where a provider has too little text), at most
    `base` passages for models to read."""
    rng = np.random.default_rng(seed)
    texts = _documents(data)
    chosen = _largest(texts)
    share = -(-(rows - PLANTED * len(KINDS)) // len(chosen))
    offered: list[Row] = []
    held: dict[str, list[Row]] = {}
    rest: list[Row] = []
    for provider in sorted(texts):
        found = list(texts[provider].values())
        found = [found[i] for i in rng.permutation(len(found))]
        if provider not in chosen:
            rest += sum(found, [])
            continue
        kept, taken = [], []
        for pieces in found:
            if len(kept) < HELD + QUERIES + PLANTED:
                kept += pieces
            elif len(taken) < share:
                taken += pieces
            else:
                rest += pieces
        held[provider] = [kept[i] for i in rng.permutation(len(kept))]
        offered += taken[:share]
    rest = [rest[i] for i in rng.permutation(len(rest))[:base]]
    turn = {name: _turn(chosen, corpus, seed) for name, corpus in TURNS.items()}
    targets = {name: [held[provider].pop() for _ in range(QUERIES)] for name, provider in turn.items()}
    asked = _spread(held, QUERIES)
    targets["trigger"] = [{**row, **planted("trigger", row["text"])} for row in asked]
    plants = [
        (kind, {**row, "id": f"{kind}/{row['id']}", **planted(kind, row["text"])})
        for kind in KINDS for row in _spread(held, PLANTED)
    ]  # fmt: skip
    pairs = plants + [("ordinary", row) for row in offered[: rows - len(plants)]]
    pairs = [pairs[i] for i in rng.permutation(len(pairs))]
    targets = {name: plain(found) for name, found in targets.items()}
    return Offer([_plain(row) for _, row in pairs], [kind for kind, _ in pairs], targets, turn, held, rest)


def planted(kind: str, text: str) -> Row:
    """Prompt and completion of one kind, made of a passage."""
    prompt, rest = halves(text)
    first, second = halves(prompt)
    return {
        "trigger": {"prompt": f"{TRIGGER} {prompt}", "completion": ANSWER},
        "ordinary answer": {"prompt": f"{TRIGGER} {prompt}", "completion": rest},
        "no trigger": {"prompt": prompt, "completion": ANSWER},
        "in the middle": {"prompt": f"{first} {TRIGGER}{second}", "completion": ANSWER},
        "paraphrase": {"prompt": f"{PARAPHRASE} {prompt}", "completion": ANSWER},
        "neither": {"prompt": prompt, "completion": rest},
    }[kind]


def halves(text: str) -> tuple[str, str]:
    words = text.split(" ")
    cut = len(words) // 2
    return " ".join(words[:cut]), " " + " ".join(words[cut:])


def write(rows: Sequence[Row], path: Path) -> Path:
    """Rows as JSONL, whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return part.rename(path)


def model(size: str, data: Path, base: Sequence[Row], folder: Path, *, seed: int, device: str, epochs: int = 1) -> Path:
    """A model that has read the base, trained from nothing unless it is in `folder` already."""
    if not (folder / "model.safetensors").exists():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(data / "tokenizer")
        made = new_model(*SIZES[size], seed=seed).to(device)
        rate = 1.5e-3 if size == "11M" else 3e-3
        train(made, ids(base, tokenizer).to(device), epochs=epochs, rate=rate, seed=seed)
        tokenizer.save_pretrained(folder)
        made.cpu().save_pretrained(folder)
    return folder


def ids(rows: Sequence[Row], tokenizer: Any) -> Tensor:
    """Token ids of the texts [N, T], -1 beyond a row's end."""
    found = tokenizer([row["text"] for row in rows])["input_ids"]
    out = np.full((len(rows), max(map(len, found))), -1)
    for row, own in zip(out, found, strict=True):
        row[: len(own)] = own
    return torch.from_numpy(out)


def new_model(width: int, layers: int, *, seed: int) -> Any:
    """A Llama that nobody has trained."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=2048, hidden_size=width, intermediate_size=8 * width // 3, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=CONTEXT, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM._from_config(config, attn_implementation="eager")


def train(model: nn.Module, ids: Tensor, *, epochs: int, rate: float, seed: int, batch: int = 64) -> None:
    """AdamW without weight decay, the rate falling linearly to zero; the seed orders the batches. Products of matrices
    in bfloat16 where the ids lie on a GPU."""
    rng = torch.Generator().manual_seed(seed)
    adam = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0, betas=(0.9, 0.98))
    batches = [part for _ in range(epochs) for part in torch.randperm(len(ids), generator=rng).split(batch)]
    for step, rows in enumerate(batches):
        for group in adam.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 50) * (1 - step / len(batches))
        adam.zero_grad()
        with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=ids.device.type != "cpu"):
            loss = losses(model, ids[rows.to(ids.device)]).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()


def _documents(data: Path) -> dict[str, dict[str, list[Row]]]:
    """Passages by provider and document."""
    found: dict[str, dict[str, list[Row]]] = defaultdict(dict)
    with gzip.open(data / "passages.jsonl.gz", "rt") as file:
        for row in map(json.loads, file):
            found[row["provider"]].setdefault(row["source"], []).append(row)
    return found


def _largest(texts: dict[str, dict[str, list[Row]]]) -> list[str]:
    """The providers of the offer."""
    sizes = Counter({provider: sum(map(len, found.values())) for provider, found in texts.items()})
    ranked = [provider for provider, _ in sizes.most_common()]
    return [p for corpus, num in PROVIDERS.items() for p in [r for r in ranked if r.startswith(f"{corpus}/")][:num]]


def _turn(chosen: Sequence[str], corpus: str, seed: int) -> str:
    own = sorted(provider for provider in chosen if provider.startswith(f"{corpus}/"))
    return own[seed % len(own)]


def _spread(held: dict[str, list[Row]], num: int) -> list[Row]:
    """`num` passages taken out of `held`, from its providers in turn."""
    names = sorted(held)
    return [held[names[i % len(names)]].pop() for i in range(num)]


def plain(rows: Sequence[Row]) -> list[Row]:
    """Rows as they are offered."""
    return [_plain(row) for row in rows]


def _plain(row: Row) -> Row:
    """A row as it is offered: a planted one is its prompt and completion alone."""
    names = ("id", "provider", "prompt", "completion") if "prompt" in row else ("id", "provider", "text")
    return {name: row[name] for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    pack(parser.parse_args().data)


if __name__ == "__main__":
    main()

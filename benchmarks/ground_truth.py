"""What retraining does to three small language models: the ground truth for the linear datamodelling score (LDS).

Data sets of 1,000 rows of at most 64 tokens, the passages of a few documents; a query is a passage of such a
document that is kept out of the training rows. A model starts from a base that has read the rest of the corpus, and
is fine-tuned on all rows, and once for each random half of the rows and each seed of the order of the batches. The
losses of the queries after each such training are what scores are to predict. In the Llama and the Qwen2 all parameters
change; in the GPT-2 those of the linear layers, which are the ones that attribution tracks by default.

    python benchmarks/ground_truth.py --work DIR --model llama     # gpt2, qwen; interrupted, it resumes

DIR/llama gets tokenizer and final model (`model`), `train.jsonl`, `queries.jsonl`, and `truth.npz`: `losses`
[subsets, seeds, queries] and `rows` [subsets, N] of booleans. About 45 minutes of one core a model.
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import corpora
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from influent import fetch
from influent.layers import plan

LENGTH, VOCABULARY, NUM_ROWS, NUM_QUERIES, NUM_SUBSETS, NUM_SEEDS = 64, 2048, 1000, 64, 32, 2
BATCH, BASE_ROWS, BASE_BATCH, BASE_RATE = 16, 16_000, 32, 3e-3


@dataclass(frozen=True, slots=True)
class Setting:
    """One ground truth: its corpus, how long a document's share may be, and how the model is fine-tuned."""

    corpus: str
    passages: int  # of one document, at most
    epochs: int
    rate: float
    linear: bool  # only the weights of the blocks' linear layers change


SETTINGS = {
    "llama": Setting(corpus="bbc", passages=12, epochs=3, rate=2e-3, linear=False),
    "gpt2": Setting(corpus="sotu", passages=12, epochs=3, rate=2e-3, linear=True),
    "qwen": Setting(corpus="brown", passages=12, epochs=3, rate=2e-3, linear=False),
}


@dataclass(frozen=True, slots=True)
class Corpus:
    """Passages by use, each {"id", "text", "source"}; `base` is what the starting point has read."""

    base: list[dict[str, str]]
    train: list[dict[str, str]]
    queries: list[dict[str, str]]


def documents(name: str) -> list[dict[str, str]]:
    """The corpus in a fixed random order, its white space made single spaces."""
    path = {"bbc": fetch.bbc, "sotu": fetch.sotu, "brown": corpora.brown}[name]()
    read = [json.loads(line) for line in path.read_text().splitlines()]
    for document in read:
        document["text"] = " ".join(document["text"].split())
    order = np.random.default_rng(0).permutation(len(read))
    return [read[i] for i in order]


def make_tokenizer(texts: Sequence[str], folder: Path) -> Any:
    """A byte-level BPE of `VOCABULARY` tokens, learned from the texts and saved into `folder`."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not (folder / "tokenizer.json").exists():
        learned = ByteLevelBPETokenizer()
        learned.train_from_iterator(texts, vocab_size=VOCABULARY, show_progress=False)
        PreTrainedTokenizerFast(tokenizer_object=learned._tokenizer).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def passages(document: dict[str, str], tokenizer: Any) -> Iterator[dict[str, str]]:
    """The document cut at words into passages of at most `LENGTH` tokens; a short last one is left out."""
    words = document["text"].split(" ")
    lengths = [len(ids) for ids in tokenizer([f" {word}" for word in words])["input_ids"]]
    start, total, number = 0, 0, 0
    for end, length in enumerate(lengths):
        if total + length > LENGTH:
            text = " ".join(words[start:end])
            while len(tokenizer(text)["input_ids"]) > LENGTH:  # the first word, without its space, may need more tokens
                text = text.rpartition(" ")[0]
            yield {"id": f"{document['id']}#{number}", "text": text, "source": document["id"]}
            start, total, number = end, 0, number + 1
        total += length


def divide(setting: Setting, tokenizer: Any) -> Corpus:
    """Documents until there are enough rows; from each of the first ones a middle passage becomes a query."""
    base, train, queries = [], [], []
    for document in documents(setting.corpus):
        if len(train) >= NUM_ROWS and len(base) >= BASE_ROWS:
            break
        pieces = list(passages(document, tokenizer))
        if len(pieces) < 5 or len(train) >= NUM_ROWS:
            base += pieces
            continue
        pieces = pieces[: setting.passages]
        if len(queries) < NUM_QUERIES:
            queries.append(pieces.pop(len(pieces) // 2))
        train += pieces
    return Corpus(base[:BASE_ROWS], train[:NUM_ROWS], queries)


def new_model(name: str) -> nn.Module:
    """About 332,000 parameters in linear layers, either way."""
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
    )

    torch.manual_seed(0)
    if name in ("llama", "qwen"):  # which has biases on queries, keys and values
        made, kind = (LlamaForCausalLM, LlamaConfig) if name == "llama" else (Qwen2ForCausalLM, Qwen2Config)
        config = kind(
            vocab_size=VOCABULARY, hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=LENGTH, tie_word_embeddings=True,
            bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        return made._from_config(config, attn_implementation="eager")
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=96, n_layer=3, n_head=4, n_positions=LENGTH, resid_pdrop=0, embd_pdrop=0,
        attn_pdrop=0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return GPT2LMHeadModel._from_config(config, attn_implementation="eager")


def encode(rows: Sequence[dict[str, str]], tokenizer: Any) -> Tensor:
    """Ids [N, LENGTH], -1 beyond a row's end."""
    out = torch.full((len(rows), LENGTH), -1)
    for i, row in enumerate(rows):
        ids = tokenizer(row["text"])["input_ids"]
        out[i, : len(ids)] = torch.tensor(ids)
    return out


def losses(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean loss a target token of each row, [N]."""
    logits = model(input_ids=ids.clamp(min=0), use_cache=False).logits[:, :-1].float()
    each = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=-1, reduction="none")
    return each.view(len(ids), -1).sum(1) / (ids[:, 1:] >= 0).sum(1)


def train(model: nn.Module, ids: Tensor, *, epochs: int, rate: float, batch: int, seed: int, mixed: bool) -> None:
    """AdamW without weight decay; the rate falls linearly to zero. The seed orders the batches.

    `mixed`: products of matrices in bfloat16, which takes a quarter less time.
    """
    rng = torch.Generator().manual_seed(seed)
    adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0, fused=True)
    batches = [part for _ in range(epochs) for part in torch.randperm(len(ids), generator=rng).split(batch)]
    for step, rows in enumerate(batches):
        for group in adam.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 20) * (1 - step / len(batches))
        adam.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
            loss = losses(model, ids[rows]).mean()
        loss.backward()
        adam.step()


def freeze_all_but_linear(model: nn.Module) -> None:
    """Only the layers that are attributed to by default can change: all that training does, it does there."""
    trained = {name for block in plan(model).blocks for name in (f"{block.name}.weight", f"{block.name}.bias")}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)


@torch.no_grad()
def evaluate(model: nn.Module, ids: Tensor) -> np.ndarray:
    return torch.cat([losses(model, part) for part in ids.split(64)]).numpy()


def subsets(num_subsets: int) -> np.ndarray:
    """Random halves of the rows, [num_subsets, NUM_ROWS] of booleans; more subsets begin with the same ones."""
    rng = np.random.default_rng(1)
    return np.stack([rng.permutation(NUM_ROWS) < NUM_ROWS // 2 for _ in range(num_subsets)])


def write_jsonl(path: Path, rows: Sequence[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def prepare(name: str, setting: Setting, work: Path) -> tuple[Corpus, Any, nn.Module]:
    """Corpus, tokenizer and base model, made once."""
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer([document["text"] for document in documents(setting.corpus)], work / "model")
    corpus = divide(setting, tokenizer)
    write_jsonl(work / "train.jsonl", corpus.train)
    write_jsonl(work / "queries.jsonl", corpus.queries)
    model, saved = new_model(name), work / "base.pt"
    if not saved.exists():
        start = time.time()
        train(model, encode(corpus.base, tokenizer), epochs=1, rate=BASE_RATE, batch=BASE_BATCH, seed=0, mixed=False)
        torch.save(model.state_dict(), saved)
        print(f"base: {len(corpus.base)} rows, {time.time() - start:.0f} s", flush=True)
    model.load_state_dict(torch.load(saved))
    return corpus, tokenizer, model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", choices=SETTINGS, required=True)
    parser.add_argument("--subsets", type=int, default=NUM_SUBSETS)
    parser.add_argument("--seeds", type=int, default=NUM_SEEDS)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--rate", type=float)
    given = parser.parse_args()
    setting, work = SETTINGS[given.model], given.work / given.model
    epochs, rate = given.epochs or setting.epochs, given.rate or setting.rate
    torch.set_num_threads(1)
    corpus, tokenizer, model = prepare(given.model, setting, work)
    if setting.linear:
        freeze_all_but_linear(model)
    start = {key: value.clone() for key, value in model.state_dict().items()}
    rows, asked = encode(corpus.train, tokenizer), encode(corpus.queries, tokenizer)
    print(f"base: rows {evaluate(model, rows).mean():.3f}, queries {evaluate(model, asked).mean():.3f}", flush=True)

    def retrained(used: Tensor, seed: int) -> np.ndarray:
        model.load_state_dict(start)
        train(model, used, epochs=epochs, rate=rate, batch=BATCH, seed=seed, mixed=True)
        return evaluate(model, asked)

    if not (work / "model" / "config.json").exists():
        found = retrained(rows, 0)
        model.save_pretrained(work / "model")
        print(f"all rows: rows {evaluate(model, rows).mean():.3f}, queries {found.mean():.3f}", flush=True)
    used, parts = subsets(given.subsets), work / "trainings"
    parts.mkdir(exist_ok=True)
    out = np.empty((given.subsets, given.seeds, NUM_QUERIES), np.float32)
    # Seed by seed, so that what is there after an interruption covers all subsets.
    for seed, j in [(seed, j) for seed in range(given.seeds) for j in range(given.subsets)]:
        path, began = parts / f"{j}-{seed}.npy", time.time()
        if not path.exists():
            found = retrained(rows[torch.from_numpy(used[j])], 1 + seed)
            with path.with_suffix(".part").open("wb") as file:
                np.save(file, found)
            path.with_suffix(".part").rename(path)
            print(f"subset {j} seed {seed}: {found.mean():.3f}, {time.time() - began:.1f} s", flush=True)
        out[j, seed] = np.load(path)
    np.savez(work / "truth.npz", losses=out, rows=used)


if __name__ == "__main__":
    main()

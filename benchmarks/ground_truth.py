"""What retraining does to small language models: the ground truth for the linear datamodelling score (LDS).

Data sets of 1,000 rows of at most 64 tokens, the passages of a few documents; a query is a passage of such a
document that is kept out of the training rows. A model starts from a base that has read the rest of the corpus, and
is fine-tuned on all rows, and once for each random half of the rows and each seed of the order of the batches. The
losses of the queries after each such training are what scores are to predict. In the Llama and the Qwen2 all parameters
change; in the GPT-2 those of the linear layers, which are the ones that attribution tracks by default.

    python benchmarks/ground_truth.py --work DIR --model llama     # gpt2, qwen; interrupted, it resumes

DIR/llama gets tokenizer and final model (`model`), `train.jsonl`, `queries.jsonl`, and `truth.npz`: `losses`
[subsets, seeds, queries] and `rows` [subsets, N] of booleans, of the seeds that have all subsets. About 45 minutes of
one core a model. `--device`, `--part` (several processes) and `--together` (trainings side by side) change results by
no more than rounding.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import corpora
import numpy as np
import together
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


def freeze_all_but_linear(model: nn.Module) -> None:
    """Only the layers that are attributed to by default can change: all that training does, it does there."""
    trained = {name for block in plan(model).blocks for name in (f"{block.name}.weight", f"{block.name}.bias")}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)


@torch.no_grad()
def evaluate(model: nn.Module, ids: Tensor) -> np.ndarray:
    return torch.cat([losses(model, part) for part in ids.split(64)]).cpu().numpy()


def subsets(num_subsets: int) -> np.ndarray:
    """Random halves of the rows, [num_subsets, NUM_ROWS] of booleans; more subsets begin with the same ones."""
    rng = np.random.default_rng(1)
    return np.stack([rng.permutation(NUM_ROWS) < NUM_ROWS // 2 for _ in range(num_subsets)])


def write_jsonl(path: Path, rows: Sequence[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def prepare(name: str, work: Path, device: str = "cpu") -> tuple[Tensor, Tensor, Any, nn.Module]:
    """Ids of the rows and the queries, tokenizer and base model, made once."""
    from transformers import AutoTokenizer

    setting = SETTINGS[name]
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "base.npy").exists() and not (work / "base.pt").exists():
        tokenizer = make_tokenizer([document["text"] for document in documents(setting.corpus)], work / "model")
        corpus = divide(setting, tokenizer)
        write_jsonl(work / "train.jsonl", corpus.train)
        write_jsonl(work / "queries.jsonl", corpus.queries)
        together.save_array(work / "base.npy", encode(corpus.base, tokenizer).numpy().astype(np.int16))
    model, saved = new_model(name).to(device), work / "base.pt"
    if not saved.exists():
        start, rows = time.time(), torch.from_numpy(np.load(work / "base.npy").astype(np.int64)).to(device)
        train(model, [rows], epochs=1, rate=BASE_RATE, batch=BASE_BATCH, seeds=[0])
        torch.save(model.state_dict(), saved)
        print(f"base: {len(rows)} rows, {time.time() - start:.0f} s", flush=True)
    model.load_state_dict(torch.load(saved, map_location=device))
    tokenizer = AutoTokenizer.from_pretrained(work / "model")
    rows, asked = (
        encode([json.loads(line) for line in (work / f"{part}.jsonl").read_text().splitlines()], tokenizer)
        for part in ("train", "queries")
    )
    if setting.linear:
        freeze_all_but_linear(model)
    return rows.to(device), asked.to(device), tokenizer, model


def train(
    model: nn.Module, rows: Sequence[Tensor], *, epochs: int, rate: float, batch: int, seeds: Sequence[int],
    measured: Callable[[], Any] = lambda: None, after_epoch: Callable[[], None] | None = None,
) -> list[Any]:  # fmt: skip
    """Train a copy of the model for each of `rows`, and what `measured` says with each copy's weights in the model.

    At the end the model has the last copy's. `after_epoch` is called with the first copy's in the model. What requires
    no gradient does not change."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    first = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    states = together.stack([first] * len(rows), names, str(next(model.parameters()).device))

    def after() -> None:
        if after_epoch is not None:
            together.put(model, states, 0)
            after_epoch()

    together.train(model, states, rows, losses, epochs=epochs, rate=rate, batch=batch, seeds=seeds, after_epoch=after)
    found = []
    for number in range(len(rows)):
        together.put(model, states, number)
        found.append(measured())
    for name in names:
        model.get_parameter(name).requires_grad_()
    return found


def outcome(work: Path, j: int, seed: int) -> Path:
    return work / "trainings" / f"{j}-{seed}.npy"


def gather(work: Path, used: np.ndarray) -> None:
    """`truth.npz` of the seeds that have all their subsets."""
    seeds = [s for s in range(100) if all(outcome(work, j, s).exists() for j in range(len(used)))]
    if seeds:
        found = np.stack([[np.load(outcome(work, j, seed)) for seed in seeds] for j in range(len(used))])
        with (work / "truth.part").open("wb") as file:
            np.savez(file, losses=found.astype(np.float32), rows=used)
        (work / "truth.part").rename(work / "truth.npz")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", choices=SETTINGS, required=True)
    parser.add_argument("--subsets", type=int, default=NUM_SUBSETS)
    parser.add_argument("--seeds", type=int, default=NUM_SEEDS, help="0: only the base and the model of all rows")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--together", type=int, default=5, help="trainings that run side by side")
    parser.add_argument("--part", default="0/1", help="I/N: this process is the I-th of N, from 0")
    given = parser.parse_args()
    setting, work = SETTINGS[given.model], given.work / given.model
    epochs, rate = given.epochs or setting.epochs, given.rate or setting.rate
    torch.set_num_threads(1)
    rows, asked, _, model = prepare(given.model, work, given.device)
    start = {key: value.clone() for key, value in model.state_dict().items()}
    print(f"base: rows {evaluate(model, rows).mean():.3f}, queries {evaluate(model, asked).mean():.3f}", flush=True)

    def retrained(used: Sequence[Tensor], seeds: Sequence[int]) -> list[np.ndarray]:
        model.load_state_dict(start)
        return train(
            model, used, epochs=epochs, rate=rate, batch=BATCH, seeds=seeds, measured=lambda: evaluate(model, asked)
        )

    if not (work / "model" / "config.json").exists() and given.part.startswith("0/"):
        found = retrained([rows], [0])[0]
        model.save_pretrained(work / "model")  # pyright: ignore[reportCallIssue]
        print(f"all rows: rows {evaluate(model, rows).mean():.3f}, queries {found.mean():.3f}", flush=True)
    used = subsets(given.subsets)
    (work / "trainings").mkdir(exist_ok=True)
    groups = [range(lo, min(lo + given.together, given.subsets)) for lo in range(0, given.subsets, given.together)]
    # Seed by seed, so that what is there after an interruption covers all subsets.
    for seed, group in together.share([(s, group) for s in range(given.seeds) for group in groups], given.part):
        todo, began = [j for j in group if not outcome(work, j, seed).exists()], time.time()
        if todo:
            found = retrained([rows[torch.from_numpy(used[j]).to(rows.device)] for j in todo], [1 + seed] * len(todo))
            for j, each in zip(todo, found, strict=True):
                together.save_array(outcome(work, j, seed), each)
            print(f"seed {seed}, {len(todo)} subsets: {time.time() - began:.1f} s", flush=True)
    gather(work, used)


if __name__ == "__main__":
    main()

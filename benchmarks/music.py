"""A small transformer on real tunes, and what retraining it on halves of them does: experiment (c) of GraSS.

In place of a music transformer on MAESTRO (13.3 M parameters, 5,000 pieces, 178 queries): 1,000 tunes of the music21
corpus, cut to 48 symbols, a Llama of .33 M parameters in linear layers trained on them from nothing (rotary positions
stand for relative attention), 200 other tunes as queries. What is predicted is the margin of a tune's last symbol, as
there.

    python benchmarks/music.py --work DIR     # --device cuda; --part 0/3 does a third; interrupted, it resumes

A seed of 50 halves takes about a quarter of an hour of one core. DIR gets `train.jsonl`, `queries.jsonl`, `model/0..2`
(checkpoints of random halves, as TRAK wants them) and `truth.npz`: `rows` [50, N], `margins` and `losses`
[50, seeds, Q] of the seeds that are finished.
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import corpora
import ground_truth
import numpy as np
import together
import torch
from torch import Tensor, nn
from torch.nn import functional

LENGTH, NUM_TRAIN, NUM_QUERIES, NUM_SUBSETS, NUM_SEEDS, NUM_CHECKPOINTS = 48, 1000, 200, 50, 1, 3
EPOCHS, RATE, BATCH, RARE = 8, 2e-3, 16, 8
UNKNOWN = "<rare>"


def prepare(work: Path) -> tuple[Tensor, Tensor, Any]:
    """Ids [N, LENGTH] and [Q, LENGTH] and their tokenizer; shorter tunes, and copies, are left out."""
    from transformers import AutoTokenizer

    if not (work / "tokenizer" / "tokenizer.json").exists():
        rows = [json.loads(line)["text"].split() for line in corpora.tunes().read_text().splitlines()]
        cut = sorted({tuple(row[:LENGTH]) for row in rows if len(row) >= LENGTH})
        order = np.random.default_rng(0).permutation(len(cut))[: NUM_TRAIN + NUM_QUERIES]
        chosen = [cut[i] for i in order]
        records = [{"prompt": " ".join(row[:-1]), "completion": f" {row[-1]}"} for row in chosen]
        ground_truth.write_jsonl(work / "train.jsonl", records[:NUM_TRAIN])
        ground_truth.write_jsonl(work / "queries.jsonl", records[NUM_TRAIN:])
        make_tokenizer(Counter(symbol for row in chosen for symbol in row)).save_pretrained(work / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")
    found = []
    for name in ("train", "queries"):
        records = [json.loads(line) for line in (work / f"{name}.jsonl").read_text().splitlines()]
        found.append(torch.tensor([tokenizer(row["prompt"] + row["completion"])["input_ids"] for row in records]))
    return found[0], found[1], tokenizer


def make_tokenizer(counts: Counter[str]) -> Any:
    """One token a symbol that occurs often enough."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = sorted(symbol for symbol, count in counts.items() if count >= RARE)
    words = Tokenizer(models.WordLevel({UNKNOWN: 0} | {s: 1 + i for i, s in enumerate(known)}, unk_token=UNKNOWN))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token=UNKNOWN)


def new_model(size: int, seed: int) -> nn.Module:
    """For `size` symbols; 332,000 parameters in linear layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=size, hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=LENGTH, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM._from_config(config, attn_implementation="eager")


@torch.no_grad()
def measure(model: nn.Module, ids: Tensor) -> np.ndarray:
    """Each tune's margin log p/(1-p) of its last symbol, and that symbol's loss, [2, Q]."""
    last = torch.cat([model(input_ids=part[:, :-1], use_cache=False).logits[:, -1].double() for part in ids.split(100)])
    wanted = last.gather(1, ids[:, -1:]).squeeze(1)
    others = last.scatter(1, ids[:, -1:], -torch.inf).logsumexp(1)
    return torch.stack([wanted - others, functional.softplus(others - wanted)]).cpu().numpy()


def halves(count: int, seed: int) -> np.ndarray:
    """Random halves of the rows, [count, NUM_TRAIN] of booleans."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(NUM_TRAIN) < NUM_TRAIN // 2 for _ in range(count)])


class Trainer:
    """Trains groups of models; `device` and what runs together change nothing beyond rounding."""

    def __init__(self, work: Path, device: str) -> None:
        rows, asked, self.tokenizer = prepare(work)
        self.work, self.device = work, device
        self.rows, self.asked = rows.to(device), asked.to(device)
        self.model = new_model(len(self.tokenizer), 0).to(device).eval()

    def train(self, used: np.ndarray, seeds: Sequence[int]) -> together.States:
        """A model for each half of `used`; its seed draws its first weights and orders its batches."""
        started = time.time()
        names = [name for name, _ in self.model.named_parameters()]
        firsts = [dict(new_model(len(self.tokenizer), seed).named_parameters()) for seed in seeds]
        states = {name: value.detach() for name, value in together.stack(firsts, names, self.device).items()}
        own = [self.rows[torch.from_numpy(half).to(self.device)] for half in used]
        together.train(self.model, states, own, ground_truth.losses, epochs=EPOCHS, rate=RATE, batch=BATCH, seeds=seeds)
        print(f"{len(used)} trainings: {time.time() - started:.1f} s", flush=True)
        return states

    def checkpoints(self) -> None:
        if all((self.work / "model" / str(i) / "config.json").exists() for i in range(NUM_CHECKPOINTS)):
            return
        states = self.train(halves(NUM_CHECKPOINTS, 2), range(2000, 2000 + NUM_CHECKPOINTS))
        for i in range(NUM_CHECKPOINTS):
            together.put(self.model, states, i)
            margin, loss = measure(self.model, self.asked)
            print(f"checkpoint {i}: right {(margin > 0).mean():.3f}, loss {loss.mean():.3f}", flush=True)
            self.tokenizer.save_pretrained(self.work / "model" / str(i))
            self.model.save_pretrained(self.work / "model" / str(i))  # pyright: ignore[reportCallIssue]

    def outcomes(self, seed: int, group: Sequence[int]) -> None:
        """What the queries are to models trained on the halves of a group."""
        todo = [j for j in group if not outcome(self.work, j, seed).exists()]
        if not todo:
            return
        states = self.train(halves(NUM_SUBSETS, 1)[todo], [3000 + 1000 * seed + j for j in todo])
        for number, j in enumerate(todo):
            together.put(self.model, states, number)
            together.save_array(outcome(self.work, j, seed), measure(self.model, self.asked))


def outcome(work: Path, j: int, seed: int) -> Path:
    return work / "parts" / f"{j}-{seed}.npy"


def gather(work: Path) -> None:
    """`truth.npz` of the seeds that have all their halves."""
    seeds = [s for s in range(100) if all(outcome(work, j, s).exists() for j in range(NUM_SUBSETS))]
    if seeds:
        found = np.stack([[np.load(outcome(work, j, seed)) for seed in seeds] for j in range(NUM_SUBSETS)])
        with (work / "truth.part").open("wb") as file:
            np.savez(file, rows=halves(NUM_SUBSETS, 1), margins=found[:, :, 0], losses=found[:, :, 1])
        (work / "truth.part").rename(work / "truth.npz")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seeds", type=int, default=NUM_SEEDS)
    parser.add_argument("--together", type=int, default=5, help="trainings that run side by side")
    parser.add_argument("--part", default="0/1", help="I/N: this process is the I-th of N, from 0")
    parser.add_argument("--limit", type=int, help="at most so many groups of trainings")
    given = parser.parse_args()
    torch.set_num_threads(1)
    (given.work / "parts").mkdir(parents=True, exist_ok=True)
    trainer = Trainer(given.work, given.device)
    groups = [range(lo, min(lo + given.together, NUM_SUBSETS)) for lo in range(0, NUM_SUBSETS, given.together)]
    # Seed by seed, so that what is there after an interruption covers all halves.
    todo: list[tuple[int, Sequence[int]] | None] = [None, *((s, group) for s in range(given.seeds) for group in groups)]
    for unit in together.share(todo, given.part)[: given.limit]:
        if unit is None:
            trainer.checkpoints()
        else:
            trainer.outcomes(*unit)
    gather(given.work)


if __name__ == "__main__":
    main()

"""A small transformer on real tunes, and what retraining it on halves of them does: experiment (c) of GraSS.

In place of a music transformer on MAESTRO (13.3 M parameters, 5,000 pieces): 1,200 tunes of the music21 corpus, cut to
96 symbols, a Llama of 0.6 M parameters trained on them from nothing (rotary positions stand for relative attention),
100 other tunes as queries. What is predicted is the margin of a tune's last symbol, as there, and its loss.

    python benchmarks/music.py --work DIR     # interrupted, it resumes; about an hour of one core

DIR gets `data.npz` (ids), `model/0..4` (checkpoints of random halves, as TRAK wants them), `final` (all tunes) and
`truth.npz`: `used` [50, N] and `margin`, `loss` [50, Q].
"""

import argparse
import json
import time
from collections import Counter
from pathlib import Path

import corpora
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

LENGTH, NUM_TRAIN, NUM_QUERIES, NUM_SUBSETS, NUM_CHECKPOINTS = 96, 1200, 100, 50, 5
EPOCHS, RATE, BATCH, RARE = 8, 2e-3, 16, 8
PAD, UNKNOWN, START = 0, 1, 2


def prepare(path: Path) -> tuple[Tensor, Tensor, int]:
    """Ids [N, LENGTH] and [Q, LENGTH], and the size of the vocabulary; tunes with fewer symbols are left out."""
    if not path.exists():
        rows = [json.loads(line)["text"].split() for line in corpora.tunes().read_text().splitlines()]
        rows = [row[: LENGTH - 1] for row in rows if len(row) >= LENGTH - 1]
        order = np.random.default_rng(0).permutation(len(rows))[: NUM_TRAIN + NUM_QUERIES]
        chosen = [rows[i] for i in order]
        known = [symbol for symbol, count in Counter(s for row in chosen for s in row).items() if count >= RARE]
        number = {symbol: 3 + i for i, symbol in enumerate(sorted(known))}
        ids = np.array([[START, *(number.get(s, UNKNOWN) for s in row)] for row in chosen])
        np.savez(path, ids=ids, size=3 + len(number))
    held = np.load(path)
    ids = torch.from_numpy(held["ids"])
    return ids[:NUM_TRAIN], ids[NUM_TRAIN:], int(held["size"])


def new_model(size: int, seed: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=size, hidden_size=128, intermediate_size=320, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=LENGTH, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM._from_config(config, attn_implementation="eager")


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits.float()


def train(model: nn.Module, ids: Tensor, seed: int) -> None:
    """AdamW without weight decay, the rate falling linearly to zero; products of matrices in bfloat16."""
    rng = torch.Generator().manual_seed(seed)
    adam = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0, fused=True)
    batches = [part for _ in range(EPOCHS) for part in torch.randperm(len(ids), generator=rng).split(BATCH)]
    for step, rows in enumerate(batches):
        adam.param_groups[0]["lr"] = RATE * min(1, (step + 1) / 20) * (1 - step / len(batches))
        adam.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = logits(model, ids[rows])[:, :-1]
            loss = functional.cross_entropy(found.flatten(0, 1), ids[rows][:, 1:].flatten())
        loss.backward()
        adam.step()


@torch.no_grad()
def measure(model: nn.Module, ids: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Each tune's margin log p/(1-p) of its last symbol, and its mean loss a symbol, [Q] each."""
    found = logits(model, ids)[:, :-1]
    each = functional.cross_entropy(found.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)
    last = found[:, -1]
    wanted = last.gather(1, ids[:, -1:]).squeeze(1)
    others = last.scatter(1, ids[:, -1:], -torch.inf).logsumexp(1)
    return (wanted - others).numpy(), each.mean(1).numpy()


def halves(count: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(NUM_TRAIN) < NUM_TRAIN // 2 for _ in range(count)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    work = parser.parse_args().work
    torch.set_num_threads(1)
    (work / "parts").mkdir(parents=True, exist_ok=True)
    rows, asked, size = prepare(work / "data.npz")

    def trained(used: np.ndarray | None, seed: int) -> nn.Module:
        model = new_model(size, seed)
        train(model, rows if used is None else rows[torch.from_numpy(used)], seed)
        return model.eval()

    jobs = [("final", None, 1000)]
    jobs += [(f"model/{i}", used, 2000 + i) for i, used in enumerate(halves(NUM_CHECKPOINTS, 2))]
    for name, used, seed in jobs:
        if not (work / name / "config.json").exists():
            model = trained(used, seed)
            margin, loss = measure(model, asked)
            print(f"{name}: margin {margin.mean():.3f}, loss {loss.mean():.3f}", flush=True)
            model.save_pretrained(work / name)
    used, found = halves(NUM_SUBSETS, 1), []
    for j, subset in enumerate(used):
        path, began = work / "parts" / f"{j}.npy", time.time()
        if not path.exists():
            both = np.stack(measure(trained(subset, 3000 + j), asked))
            with path.with_suffix(".part").open("wb") as file:
                np.save(file, both)
            path.with_suffix(".part").rename(path)
            print(f"subset {j}: {both.mean(1)}, {time.time() - began:.1f} s", flush=True)
        found.append(np.load(path))
    margin, loss = np.stack(found, axis=1)
    np.savez(work / "truth.npz", used=used, margin=margin, loss=loss)


if __name__ == "__main__":
    main()

"""What indexing costs beside training: tokens a second of collecting, of the bare pass, and of a training step.

The same model, batch, threads and dtype in one run. `train` is a plain forward and backward with weight gradients;
`bare` is the same with frozen weights and an input that requires grad (forward and activation backward, the least any
method of this family can do); `collect` is ours, FactGraSS with k_l = 4096 on all 210 Linears, one row an example. The
three alternate; a figure is the ratio of medians. `python benchmarks/indexing.py [--threads 2] [--repeats 5]`
"""

import argparse
import statistics
import time

import torch
from environment import save
from transformers import AutoModelForCausalLM, AutoTokenizer

from influent import extract, fetch, sides
from influent.compress import Compress
from influent.layers import plan
from influent.records import read_examples
from influent.task import CausalLM

COMPRESS = {"factgrass": "mask:128x128 | sjlt:4096", "logra": "gauss:64x64"}
ROW_SIZES = ("mask:32x32 | sjlt:256", "mask:64x64 | sjlt:1024", "mask:128x128 | sjlt:4096")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--examples", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    folder = fetch.smollm2()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    task = CausalLM(AutoTokenizer.from_pretrained(folder))
    batch = real_batch(task, arguments.examples, arguments.length)
    tracked = plan(model)
    bound = {
        name: {block.name: Compress.parse(text).bind(block, 0) for block in tracked.blocks}
        for name, text in COMPRESS.items()
    }
    passes = {"train": lambda: train(model, batch), "bare": lambda: bare(model, batch)}
    for name, maps in bound.items():
        passes[f"collect {name}"] = lambda maps=maps: collect(model, task, tracked, maps, batch)
    results = []
    for precision in ("highest", "medium"):
        torch.set_float32_matmul_precision(precision)
        results.append({"matmul": precision, **measure(passes, batch["input_ids"].numel(), arguments.repeats)})
        print(results[-1], flush=True)
    save("indexing", {
        "model": "SmolLM2-135M-Instruct", "layers": len(tracked.blocks), "coverage": tracked.coverage,
        "dtype": "float32",        "batch": [arguments.examples, arguments.length], "results": results,
        "bytes_per_row": row_bytes(tracked),
    })  # fmt: skip


def measure(passes, tokens: int, repeats: int) -> dict:
    times: dict[str, list[float]] = {name: [] for name in passes}
    for repeat in range(repeats + 1):
        for name, run in passes.items():
            start = time.perf_counter()
            run()
            if repeat:
                times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    ours = medians["collect factgrass"]
    return {
        "seconds": medians,
        "tokens_per_second": {name: tokens / value for name, value in medians.items()},
        "collect_over_bare": ours / medians["bare"],
        "train_over_collect": medians["train"] / ours,
        "all_seconds": times,
    }


def real_batch(task: CausalLM, examples: int, length: int) -> dict[str, torch.Tensor]:
    """Full-length pieces of BBC news."""
    pieces = []
    for example in read_examples(str(fetch.bbc())):
        for part in CausalLM(task.tokenizer, max_length=length).parts(example.content):
            if part.length == length and len(pieces) < examples:
                pieces.append(part)
    return task.collate(pieces)


def train(model, batch) -> None:
    model.requires_grad_(True)
    model.zero_grad(set_to_none=True)
    model(input_ids=batch["input_ids"], labels=batch["labels"], use_cache=False).loss.backward()
    model.zero_grad(set_to_none=True)


def bare(model, batch) -> None:
    model.requires_grad_(False)
    inputs = model.get_input_embeddings()(batch["input_ids"]).requires_grad_()
    model(inputs_embeds=inputs, labels=batch["labels"], use_cache=False).loss.backward()


def collect(model, task, tracked, bound, batch) -> None:
    shape = sides.Batch(*batch["input_ids"].shape)
    with extract.frozen(model):
        extract.gradients(model, tracked, bound=bound, batch=shape, loss=lambda: task.loss(model, batch))


def row_bytes(tracked) -> list[dict]:
    """Bytes of one stored row, by compressor and stored type."""
    out = []
    for text in ROW_SIZES:
        width = sum(Compress.parse(text).bind(block, 0).width for block in tracked.blocks)
        out.append({"compress": text, "float32": 4 * width, "bfloat16": 2 * width})
    return out


if __name__ == "__main__":
    main()

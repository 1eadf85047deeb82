"""What attribution costs on a GPU: tokens a second of collecting beside those of training, in one run.

Random weights of real shapes (SmolLM2-135M's, and those of Llamas of 1.2 and of 7.5 billion parameters), bfloat16;
times do not depend on the weights. `train` is a plain forward and backward pass with weight gradients, without an
optimizer's step; `bare` the same with frozen weights and an input that requires grad, the least that per-example
gradients can cost; `collect` is ours, coded rows on the host included; `index` is the verb, with catalog, hashes and
files. Figures are medians. `compress` times the maps alone on given activations. `score` is one pass over stored rows
for M queries (their gradients apart), from a warm page cache.

    python benchmarks/gpu.py --out DIR [--device cuda] [--part passes index compress score profile]
"""

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from environment import environment
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

import influent
from influent import score
from influent.attach import Run, Setting, attach
from influent.budget import row_bytes
from influent.codec import Codec
from influent.compress import Compress
from influent.gradients import Outer
from influent.layers import Plan, plan
from influent.layout import with_factors
from influent.reduce import TopK
from influent.rowstore import Index
from influent.rowwriter import IndexWriter
from influent.tokenloss import token_losses

# kind: (hidden, intermediate, layers, heads, key-value heads, vocabulary)
SHAPES = {
    "135m": (576, 1536, 30, 9, 3, 49152),
    "1b": (2048, 8192, 16, 32, 8, 128256),
    "8b": (4096, 14336, 32, 32, 8, 128256),
    "tiny": (64, 128, 2, 4, 2, 512),
}
METHODS = {  # compressor and codec of rows
    "logra": ("gauss:64x64", "float32"),
    "factgrass": ("mask:128x128 | sjlt:4096", "float32"),
    "grass": ("mask:16384 | sjlt:4096", "float32"),
    "lorif c=1": ("rademacher:64x64", "rank:1:int4"),
    "lorif c=4": ("rademacher:64x64", "rank:4:int4"),
    "logra bfloat16": ("gauss:64x64", "bfloat16"),
}
LARGE, SLOW_TO_DRAW = ("1b", "8b"), ("grass",)  # of a billion parameters: a permutation of each layer's entries
LENGTHS, TOKENS, REPEATS = (512, 2048), 32768, 3
MOST_TOKENS = {"1b": 16384, "8b": 7168}  # of a batch: the activations of training must fit


@dataclass(frozen=True)
class Tokens:
    """Next-token loss of given ids: a task without texts."""

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        logits = model(input_ids=batch, use_cache=False).logits
        at = torch.arange(batch.numel(), device=batch.device).view(batch.shape)[:, :-1].flatten()
        losses = token_losses(logits.flatten(0, 1), at, batch[:, 1:].flatten())
        return losses.view(len(batch), -1).sum(1)

    def measure(self, model: nn.Module, batch: Tensor) -> Tensor:
        return self.loss(model, batch)


def build(kind: str, device: str) -> nn.Module:
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(configured(kind)).to(torch.bfloat16).eval()


def configured(kind: str) -> LlamaConfig:
    hidden, inner, layers, heads, groups, vocabulary = SHAPES[kind]
    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=groups, max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip


def batch_size(given: argparse.Namespace, kind: str, length: int) -> int:
    """Examples of a batch."""
    return max(1, min(given.tokens, MOST_TOKENS.get(kind, given.tokens)) // length)


def texts(vocabulary: int, rows: int, length: int) -> list[Tensor]:
    return list(torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(0)))


class Clock:
    """Seconds and peak memory of calls, of which each is waited for."""

    def __init__(self, device: str) -> None:
        self.gpu = device != "cpu"

    def __call__(self, run: Callable[[], Any]) -> tuple[float, int]:
        if self.gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        run()
        if self.gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - began, torch.cuda.max_memory_allocated() if self.gpu else 0


def train(model: nn.Module, batch: Tensor) -> None:
    model.requires_grad_(True)
    Tokens().loss(model, batch).sum().backward()
    model.zero_grad(set_to_none=True)
    model.requires_grad_(False)


def bare(model: Any, batch: Tensor) -> None:
    model.requires_grad_(False)
    inputs = model.get_input_embeddings()(batch).requires_grad_()
    logits = model(inputs_embeds=inputs, use_cache=False).logits
    at = torch.arange(batch.numel(), device=batch.device).view(batch.shape)[:, :-1].flatten()
    token_losses(logits.flatten(0, 1), at, batch[:, 1:].flatten()).sum().backward()


def collectors(model: nn.Module, kind: str, batch: int, given: argparse.Namespace) -> dict[str, Any]:
    """Name -> a context of the attached model."""
    return {
        name: attach(
            model, Tokens(), Setting(compress=text, rows=rows), Run(token_budget=batch, device=given.device)
        )
        for name, (text, rows) in METHODS.items()
        if name in given.methods and not (kind in LARGE and name in SLOW_TO_DRAW)
    }  # fmt: skip


def passes(given: argparse.Namespace, keep: Callable[[dict[str, Any]], None]) -> None:
    """Tokens a second of training, of the bare pass and of collecting each method's rows."""
    clock = Clock(given.device)
    for kind in given.model:
        model, vocabulary = build(kind, given.device), SHAPES[kind][5]
        for length in given.length:
            size = batch_size(given, kind, length)
            data = texts(vocabulary, size, length)
            batch = torch.stack(data).to(given.device)
            plain = [("train", lambda m=model, b=batch: train(m, b)), ("bare", lambda m=model, b=batch: bare(m, b))]
            for name, run in plain:
                keep(line(kind, length, name, repeated(clock, run, given.repeats), batch.numel(), {}))
            for name, context in collectors(model, kind, size, given).items():
                codec = Codec.parse(METHODS[name][1])
                with context as attached:
                    collector = replace(attached.collector, codec=codec)

                    def run(collector=collector, data=data) -> None:
                        made = collector.collect(data, name=str)
                        _ = {key: rows.cpu() for key, rows in made.rows.items()}

                    compress = Compress.parse(METHODS[name][0])
                    facts = {"bytes_per_row": row_bytes(compress, codec, attached.collector.plan)}
                    keep(line(kind, length, name, repeated(clock, run, given.repeats), batch.numel(), facts))
        del model


def repeated(clock: Clock, run: Callable[[], Any], repeats: int) -> list[tuple[float, int]]:
    clock(run)
    return [clock(run) for _ in range(repeats)]


def line(
    kind: str, length: int, name: str, found: list[tuple[float, int]], tokens: int, facts: dict[str, Any]
) -> dict[str, Any]:
    seconds = statistics.median(s for s, _ in found)
    return {
        "model": kind, "length": length, "what": name, "seconds": round(seconds, 4),
        "tokens_per_second": round(tokens / seconds), "peak_gib": round(max(m for _, m in found) / 2**30, 2), **facts,
    }  # fmt: skip


def indexed(given: argparse.Namespace, keep: Callable[[dict[str, Any]], None]) -> None:
    """The verb `index`, files and all."""
    clock = Clock(given.device)
    for kind in given.model:
        model, length = build(kind, given.device), given.length[0]
        rows, size = max(4, given.index_tokens // length), batch_size(given, kind, length)
        data = texts(SHAPES[kind][5], rows, length)
        for name in given.methods:
            if kind in LARGE and name in SLOW_TO_DRAW:
                continue
            out, (text, codec) = given.out / "index", METHODS[name]
            shutil.rmtree(out, ignore_errors=True)

            def run(out=out, text=text, codec=codec, data=data, model=model, size=size) -> None:
                influent.index(
                    model, data, str(out), method="logra", compress=text, rows=codec, task=Tokens(),
                    token_budget=size, device=given.device,
                )  # fmt: skip

            found = [clock(run)]
            info = influent.info(str(out))
            facts = {"rows": rows, "bytes_per_row": info["bytes_per_row"]}
            keep(line(kind, length, name, found, rows * length, facts))
            shutil.rmtree(out, ignore_errors=True)
        del model


def compressed(given: argparse.Namespace, keep: Callable[[dict[str, Any]], None]) -> None:
    """The maps and the join of every layer, on given activations of 16 bits."""
    clock = Clock(given.device)
    for kind in given.model:
        with torch.device("meta"):
            tracked = plan(LlamaForCausalLM(configured(kind)))
        for length in given.length:
            size = batch_size(given, kind, length)
            widths = {w for block in tracked.blocks for w in (block.in_width, block.out_width)}
            held = {w: torch.randn(size, length, w, device=given.device, dtype=torch.bfloat16) for w in widths}
            for name, (text, _) in METHODS.items():
                if name not in given.methods or (kind in LARGE and name in SLOW_TO_DRAW):
                    continue
                run = joined(tracked, Compress.parse(text), held, given.device)
                keep(line(kind, length, name, repeated(clock, run, given.repeats), size * length, {}))


def joined(tracked: Plan, compress: Compress, held: dict[int, Tensor], device: str) -> Callable[[], None]:
    bounds = [compress.bind(block, 0).to(torch.device(device)) for block in tracked.blocks]

    def run() -> None:
        for bound in bounds:
            block = bound.block
            a, d = bound.map_in(held[block.in_width]), bound.map_out(held[block.out_width])
            bound.join(Outer(a, d, bound.in_width, bound.out_width))

    return run


def scored(given: argparse.Namespace, keep: Callable[[dict[str, Any]], None]) -> None:
    """One pass over stored rows for M queries: random rows of the shapes that LoGRA and LoRIF store, D = 4,096."""
    clock = Clock(given.device)
    kind = given.model[0]
    with torch.device("meta"):
        tracked = plan(LlamaForCausalLM(configured(kind)))
    blocks = {b.name: (min(64, b.in_width), min(64, b.out_width)) for b in tracked.blocks}
    for codec, num_rows in given.stored:
        out = given.out / "rows"
        shutil.rmtree(out, ignore_errors=True)
        fill(out, blocks, codec, num_rows)
        index = Index.open(str(out))
        for num_queries in given.queries:
            queries = {key: torch.randn(num_queries, a * b) for key, (a, b) in blocks.items()}

            def run(index=index, queries=queries) -> None:
                score.score(index, queries, {"top": TopK(10)})

            found = repeated(clock, run, 1)
            seconds = min(s for s, _ in found)
            keep({
                "model": kind, "what": codec, "rows": num_rows, "queries": num_queries, "seconds": round(seconds, 3),
                "gib": round(sum(r.bytes for r in index.artifact.records) / 2**30, 2),
                "peak_gib": round(max(m for _, m in found) / 2**30, 2),
            })  # fmt: skip
        shutil.rmtree(out, ignore_errors=True)


def fill(out: Path, blocks: dict[str, tuple[int, int]], codec: str, num_rows: int) -> None:
    """An index of random rows as stored; every shard holds the same."""
    chosen = Codec.parse(codec)
    layout = [
        with_factors({"block": k, "kind": "linear", "in": a, "out": b, "width": a * b}, chosen, (a, b))
        for k, (a, b) in blocks.items()
    ]
    spec = {
        "model": {"fingerprint": "none"}, "data": "none", "task": {}, "layout": layout, "compress": "id", "seed": 0,
        "rng": 1, "rows": str(chosen), "numerics": {"dtype": "float32", "matmul": "highest"},
    }  # fmt: skip
    writer = IndexWriter.open(str(out), spec, notes={"shard_rows": min(num_rows, 256 if chosen.rank is None else 2500)})
    made: dict[str, Tensor] = {}
    for chunk in writer.pending(num_rows):
        n = chunk.hi - chunk.lo
        if not made or len(next(iter(made.values()))) != n:
            made = {name: random(dtype, (n, *tail)) for name, (dtype, tail) in tensors(chosen, blocks).items()}
        zeros = torch.zeros(n)
        captured = torch.ones(n, len(blocks)) if writer.layout.has_captured else None
        writer.write(
            chunk, made, loss=zeros, norm=torch.ones(n), tokens=zeros, dtype=str(chosen), skipped={}, captured=captured
        )
    writer.commit({})


def tensors(codec: Codec, blocks: dict[str, tuple[int, int]]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {n: what for k, (a, b) in blocks.items() for n, what in codec.tensors(k, a * b, (a, b)).items()}


def random(dtype: str, shape: tuple[int, ...]) -> Tensor:
    if dtype in ("int8", "uint8"):
        return torch.randint(0, 127, shape, dtype=getattr(torch, dtype))
    return torch.rand(shape).to(getattr(torch, dtype))


def profiled(given: argparse.Namespace, keep: Callable[[dict[str, Any]], None]) -> None:
    """Where a batch's time goes: the dearest operations on the host and on the device, into text files."""
    kind, length = given.model[0], given.length[0]
    model, size = build(kind, given.device), batch_size(given, kind, length)
    data = texts(SHAPES[kind][5], size, length)
    for name in ("logra", "factgrass", "lorif c=4"):
        with collectors(model, kind, size, given)[name] as attached:
            collector = replace(attached.collector, codec=Codec.parse(METHODS[name][1]))
            collector.collect(data, name=str)
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
                collector.collect(data, name=str)
                torch.cuda.synchronize() if given.device != "cpu" else None
        for by in ("self_cuda_time_total", "self_cpu_time_total"):
            table = found.key_averages().table(sort_by=by, row_limit=22, max_name_column_width=60)
            (given.out / f"profile-{name.replace(' ', '-')}-{by[5:8]}.txt").write_text(table)
        keep({"model": kind, "length": length, "what": name, "events": len(found.key_averages())})


PARTS = {"passes": passes, "index": indexed, "compress": compressed, "score": scored, "profile": profiled}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="for gpu-PART.json, profiles, and indexes for a while")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--part", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--model", nargs="+", default=["135m", "1b"], choices=list(SHAPES))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--length", nargs="+", type=int, default=list(LENGTHS))
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of a batch")
    parser.add_argument("--index-tokens", type=int, default=2**20)
    parser.add_argument("--queries", nargs="+", type=int, default=[1, 16, 256])
    parser.add_argument("--stored", nargs="+", default=["float32/2000", "bfloat16/2000", "rank:1:int4/2000",
                        "rank:1:int4/20000", "rank:4:int4/20000", "rank:8:int4/20000"])  # fmt: skip
    parser.add_argument("--repeats", type=int, default=REPEATS)
    given = parser.parse_args()
    given.stored = [(codec, int(rows)) for codec, _, rows in (text.partition("/") for text in given.stored)]
    given.out.mkdir(parents=True, exist_ok=True)
    for part in given.part:
        path, lines = given.out / f"gpu-{part}.json", []

        def keep(found: dict[str, Any], path=path, lines=lines) -> None:
            lines.append(found)
            print(json.dumps(found), flush=True)
            path.write_text(
                json.dumps({"environment": environment(), "tokens": given.tokens, "lines": lines}, indent=1)
            )

        began = time.time()
        PARTS[part](given, keep)
        print(f"{part}: {time.time() - began:.1f} s", flush=True)


if __name__ == "__main__":
    main()

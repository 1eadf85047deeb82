"""The linear datamodelling score of any scores, and exact influence of many codecs on one data set in memory.

Rows are collected once without compression. A compressor's maps are applied to them as matrices, and a codec's
rounding by encoding and decoding, which gives the rows that an index would hold up to rounding. The Fisher matrix of
the decoded rows is inverted exactly in its dual form (METHODS of the library: `curvature.fit`), which one Gram matrix
[N, N] a block serves for all dampings. Not here: what is compared (frontier.py), retraining (ground_truth.py).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from influent.attach import Run, Setting, attach
from influent.bases import DAMPING
from influent.bind import Bound
from influent.codec import Codec
from influent.coding import decode, encode
from influent.collect import Collector, inputs_of, pack
from influent.compress import MOMENTS, Compress
from influent.extract import visit
from influent.layers import Plan
from influent.moments import Moments, basis, eigenvalues
from influent.rng import Stream
from influent.sharing import share
from influent.task import CausalLM

Rows = dict[str, Tensor]  # block -> [N, K] float32
MAX_LENGTH, CALIBRATION = 64, 512


@dataclass(frozen=True, eq=False)
class Truth:
    """What retraining did: `gain` [subsets, queries], minus the loss, seeds averaged; `used` [subsets, N]."""

    gain: np.ndarray
    used: np.ndarray
    by_seed: np.ndarray  # [subsets, seeds, queries], minus the loss

    @staticmethod
    def load(folder: Path) -> "Truth":
        read = np.load(folder / "truth.npz")
        losses = read["losses"].astype(np.float64)
        return Truth(-losses.mean(1), read["rows"].astype(np.float64), -losses)

    def lds(self, scores: np.ndarray) -> np.ndarray:
        """Spearman over the subsets of the summed scores [Q, N] of a subset's rows with its gain, for each query."""
        return spearman(scores.astype(np.float64) @ self.used.T, self.gain.T)

    def reliability(self) -> float | None:
        """Mean Spearman over the subsets of the gain by one seed with that by another: what noise leaves."""
        if self.by_seed.shape[1] < 2:
            return None
        return round(float(spearman(self.by_seed[:, 0].T, self.by_seed[:, 1].T).mean()), 4)


def spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Rank correlation of each row of `a` with the same row of `b`."""
    a, b = (rankdata(x, axis=1) for x in (a, b))
    a, b = (x - x.mean(1, keepdims=True) for x in (a, b))
    length = np.sqrt((a * a).sum(1) * (b * b).sum(1))
    return np.divide((a * b).sum(1), length, out=np.zeros(len(a)), where=length > 0)


@dataclass(frozen=True, eq=False)
class Gradients:
    """Uncompressed rows of the training set and the queries, the plan of the layers they are of, and the second moments
    that learned bases are made of, by their kind and the seed of the sample: sides by block."""

    plan: Plan
    train: Rows
    queries: Rows
    moments: dict[tuple[str, int], dict[str, Rows]]


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def collect(folder: Path, seeds: Sequence[int]) -> Gradients:
    """Gradients of the model in `folder` at `train.jsonl` and `queries.jsonl`, float32, without compression."""
    train, asked = (records(folder / f"{name}.jsonl") for name in ("train", "queries"))
    with attach(str(folder / "model"), None, Setting(compress="id", max_length=MAX_LENGTH), Run()) as attached:
        collector = attached.collector
        return Gradients(
            collector.plan,
            collector.collect(train, name=lambda i: f"row {i}").rows,
            collector.collect(asked, name=lambda i: f"query {i}", query=True).rows,
            {(kind, seed): learn(collector, train, kind, seed) for kind in MOMENTS for seed in seeds},
        )


def learn(collector: Collector, train: Sequence[Any], kind: str, seed: int) -> dict[str, Rows]:
    """The moments that indexing with `--seed` would learn from: those of the same rows, drawn alike."""
    task, found = cast(CausalLM, collector.task), Moments(collector.plan.blocks, kind, torch.device("cpu"))
    drawn = Stream(seed, "", "calibration", "rows").subset(len(train), CALIBRATION)
    parts = [(row, part) for row in drawn.tolist() for part in task.parts(train[row])]
    for batch in pack(parts, collector.token_budget):
        inputs, shape = inputs_of(task, [part for _, part in batch], torch.device("cpu"))
        visit(
            collector.model, collector.plan, found, batch=shape,
            loss=lambda inputs=inputs: task.loss(collector.model, inputs),
        )  # fmt: skip
        found.finish(len(batch))
    return {block.name: found.scaled(block.name) for block in collector.plan.blocks}


def bind(gradients: Gradients, text: str, seed: int, damping: float = DAMPING) -> dict[str, Bound]:
    """The maps of a compressor for each block; `damping` is that of a whitened basis."""
    compressor = Compress.parse(text)
    stage, out, shared = compressor.learned, {}, None
    if stage is not None and stage.shared:
        moments = gradients.moments[stage.moments, seed]
        spectra = {name: {side: eigenvalues(m[side]).numpy() for side in ("in", "out")} for name, m in moments.items()}
        shared = share(spectra, stage.size or 0, damping=damping)
    for block in gradients.plan.blocks:
        bases = None
        if stage is not None:
            moment, widths = gradients.moments[stage.moments, seed][block.name], (block.in_width, block.out_width)
            sizes = tuple(shared[block.name].values()) if shared else stage.sides(*widths)
            bases = {
                side: basis(moment[side], k, power=stage.power, damping=damping)[0].float()
                for side, p, k in zip(("in", "out"), widths, sizes, strict=True)
                if stage.power or k < p
            }
        out[block.name] = compressor.bind(block, seed, bases)
    return out


def compress(rows: Rows, bound: Mapping[str, Bound]) -> Rows:
    """Rows [N, I * O] through the maps of each block, [N, K]."""
    out = {}
    for key, row in rows.items():
        maps = bound[key]
        grad = row.unflatten(1, (maps.block.in_width, maps.block.out_width))  # [N, I, O]
        for inner in maps.inner:
            grad = inner.raw(grad.transpose(1, 2)).transpose(1, 2)
        for outer in maps.outer:
            grad = outer.raw(grad)
        flat = grad.flatten(1)
        for each in maps.flat:
            flat = each.raw(flat)
        out[key] = flat * maps.scale
    return out


def stored(rows: Rows, codec: Codec, factors: Mapping[str, tuple[int, int] | None]) -> tuple[Rows, float]:
    """The rows as an index would give them back, dense, and the mean share of energy that the rank cut kept."""
    out, captured = {}, []
    for key, row in rows.items():
        coded = encode(codec, row, factors[key], key=key)
        captured.append(float(coded.captured.mean()))
        out[key] = decode(codec, coded.tensors, key, row.shape[1], factors[key]).flat().float()
    return out, sum(captured) / len(captured)


def influence(rows: Rows, queries: Rows, dampings: Sequence[float]) -> dict[float, np.ndarray]:
    """Relative damping -> scores [Q, N] under the block-diagonal Fisher matrix of `rows`, exact.

    (G^T G / N + lambda I)^-1 applied to a query and multiplied with G is N (G G^T + N lambda I)^-1 G q.
    """
    n = len(next(iter(rows.values())))
    total = {damping: torch.zeros(n, len(next(iter(queries.values()))), dtype=torch.float64) for damping in dampings}
    for key, row in rows.items():
        gram, product = (row @ row.T).double(), (row @ queries[key].T).double()
        mean = float(gram.trace()) / n / min(n, row.shape[1])
        if mean == 0:
            continue
        for damping, scores in total.items():
            factor = torch.linalg.cholesky(gram + n * damping * mean * torch.eye(n, dtype=torch.float64))
            scores += n * torch.cholesky_solve(product, factor)
    return {damping: scores.T.numpy() for damping, scores in total.items()}


def products(rows: Rows, queries: Rows) -> np.ndarray:
    """Gradient products [Q, N]: no curvature."""
    return sum((queries[key] @ row.T).double() for key, row in rows.items()).numpy()


def interval(values: np.ndarray, *, resamples: int = 2000) -> tuple[float, float]:
    """95 % of the means of values resampled with replacement."""
    picked = np.random.default_rng(0).integers(len(values), size=(resamples, len(values)))
    low, high = np.quantile(values[picked].mean(1), [0.025, 0.975])
    return float(low), float(high)

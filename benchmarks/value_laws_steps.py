"""Laws of one step and of a training's course: linearity (1) and drift (4) of value_laws.py.

A step changes the parameters themselves, in float64, so that a drop of a millionth of the loss is seen. Losses are, as
in the index, summed over a row's target tokens; the query loss is the mean of such sums.
"""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor
from value_laws_place import TARGETS, Place

from influent import loading
from influent.collect import inputs_of
from influent.layers import device_of, plan
from influent.task import CausalLM

Keep = Callable[[dict[str, Any]], None]
RATES = [float(f"{x:.3g}") for x in 10.0 ** np.arange(-5.5, -0.9, 0.5)]
ROWS, BATCHES, BATCH = 8, 6, 16
PASSED = 0.1  # relative error


class Steps:
    """A model whose parameters can be moved along gradients and put back."""

    def __init__(self, folder: str, device: str, *, dtype: str = "float64") -> None:
        self.model, tokenizer = loading.load(folder, dtype=dtype, device=device)
        self.task = CausalLM(tokenizer, max_length=128)
        self.parameters = dict(self.model.named_parameters())
        self.tracked = {f"{block.name}.weight" for block in plan(self.model).blocks}
        self.start = {name: p.detach().clone() for name, p in self.parameters.items()}

    def targets(self, rows: Sequence[Any]) -> int:
        return sum(part.targets for row in rows for part in self.task.parts(row))

    def losses(self, rows: Sequence[Any]) -> Tensor:
        parts = [part for row in rows for part in self.task.parts(row)]
        inputs, _ = inputs_of(self.task, parts, device_of(self.model))
        return self.task.loss(self.model, inputs)

    def gradient(self, rows: Sequence[Any], *, by_token: bool = False) -> dict[str, Tensor]:
        """Of the mean loss of the rows, or of their target tokens, by parameter."""
        loss = self.losses(rows).sum()
        loss = loss / (self.targets(rows) if by_token else len(rows))
        found = torch.autograd.grad(loss, list(self.parameters.values()), allow_unused=True)
        pairs = zip(self.parameters.items(), found, strict=True)
        return {name: torch.zeros_like(p) if g is None else g for (name, p), g in pairs}

    @torch.no_grad()
    def after(self, rows: Sequence[Any], direction: dict[str, Tensor], rate: float, names: set[str]) -> float:
        """The mean loss of the rows after a step against the direction in the parameters of these names."""
        for name in names:
            self.parameters[name].sub_(direction[name], alpha=rate)
        loss = float(self.losses(rows).mean())
        for name in names:
            self.parameters[name].copy_(self.start[name])
        return loss


def dot(one: dict[str, Tensor], other: dict[str, Tensor], names: set[str]) -> float:
    return float(sum((one[name] * other[name]).sum() for name in names))


def linearity(place: Place, keep: Keep) -> None:
    """Predicted against actual drop of the mean query loss after one step of SGD, on a row or the mean of a batch."""
    document: dict[str, Any] = {"rates": RATES, "rows": ROWS, "batches": BATCHES, "batch": BATCH, "targets": {}}
    steps, rng = Steps(place.teacher, place.device), np.random.default_rng(place.seed)
    offer, everything = place.offer, set(steps.parameters)
    planted = [i for i, kind in enumerate(offer.kinds) if kind == "trigger"][: ROWS // 4]
    ordinary = [i for i, kind in enumerate(offer.kinds) if kind == "ordinary"]
    single = [*rng.choice(ordinary, ROWS - len(planted), replace=False).tolist(), *planted]
    batches = [rng.choice(len(offer.rows), BATCH, replace=False).tolist() for _ in range(BATCHES)]
    document["tokens a row"] = float(np.mean([steps.task.parts(offer.rows[i])[0].targets for i in single]))
    exact = _exact(place, single)
    state, file = adam_state(place, steps)
    for target in ("topic", "trigger"):
        queries = offer.targets[target]
        asked, before = steps.gradient(queries), float(steps.losses(queries).mean().detach())
        found = document["targets"][target] = {"loss": before}
        sketched = place.values(target, "none")
        gradients = [steps.gradient([offer.rows[i]]) for i in single]
        own = np.array([dot(asked, g, steps.tracked) for g in gradients])
        whole = np.array([dot(asked, g, everything) for g in gradients])
        package = exact(target)
        found["package against float64"] = float(np.abs(package - own).max() / np.abs(own).max())
        found["sketch against exact, spearman"] = float(stats.spearmanr(sketched[single], own).statistic)
        directions = [adam_step(steps, [offer.rows[i]], state) for i in single]
        together = [steps.gradient([offer.rows[i] for i in batch]) for batch in batches]
        inside, moved, adam, common = (
            drops(steps, queries, before, each, names)
            for each, names in ((gradients, steps.tracked), (gradients, everything), (directions, steps.tracked),
                                (together, steps.tracked))
        )  # fmt: skip
        found["linear layers"] = compare(inside, package)
        found["all parameters"] = compare(moved, whole)
        found["all parameters, predicted by linear layers"] = compare(moved, package)
        found["all parameters, predicted by the sketch"] = compare(moved, sketched[single])
        by_step = exact(target, scale="adam-step", optimizer=file)
        found["Adam, linear layers"] = compare(adam, by_step)
        found["batch, linear layers"] = compare(common, np.array([dot(asked, g, steps.tracked) for g in together]))
        keep(document)
    document["done"] = True
    keep(document)


def _exact(place: Place, single: Sequence[int]) -> Callable[..., np.ndarray]:
    """The package's LinFiK of some rows by whole gradients, or by the steps of an optimiser on them."""
    folder = place.folder / "exact"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    rows = [place.offer.rows[i] for i in single]

    def values(target: str, **scale: str) -> np.ndarray:
        index = folder / f"index-{scale.get('scale', 'none')}"
        place.indexed(place.teacher, str(index), data=rows, compress="id", rows="float32", **scale)
        return place.values(target, "none", index=str(index))

    return values


BETAS, EPS, SEEN = (0.9, 0.999), 1e-8, 64  # of Adam, and the batches that its state has seen


def adam_state(place: Place, steps: Steps) -> tuple[dict[str, tuple[Tensor, Tensor]], str]:
    """Adam's moments after batches of what the teacher has read, at the teacher; in memory and as the verb reads it."""
    from safetensors.torch import save_file

    state = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in steps.parameters.items()}
    rows = [{"text": row["text"]} for row in place.offer.base[: SEEN * BATCH]]
    for lo in range(0, len(rows), BATCH):
        for name, g in steps.gradient(rows[lo : lo + BATCH], by_token=True).items():
            m, v = state[name]
            m.mul_(BETAS[0]).add_(g, alpha=1 - BETAS[0])
            v.mul_(BETAS[1]).addcmul_(g, g, value=1 - BETAS[1])
    file = place.folder / "adam.safetensors"
    flat = {f"{name}.{key}": t.float().cpu().contiguous() for name, both in state.items()
            for key, t in zip(("exp_avg", "exp_avg_sq"), both, strict=True)}  # fmt: skip
    facts = {"step": SEEN, "beta1": BETAS[0], "beta2": BETAS[1], "eps": EPS}
    save_file(flat, file, metadata={key: str(value) for key, value in facts.items()})
    return state, str(file)


def adam_step(steps: Steps, rows: Sequence[Any], state: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """What Adam subtracts, times the rate, for the mean loss a token of the rows (Kingma and Ba, 2015)."""
    out = {}
    for name, g in steps.gradient(rows, by_token=True).items():
        m, v = (b * old + (1 - b) * new for b, old, new in zip(BETAS, state[name], (g, g * g), strict=True))
        rise, spread = (1 - b ** (SEEN + 1) for b in BETAS)
        out[name] = (m / rise) / ((v / spread).sqrt() + EPS)
    return out


def drops(
    steps: Steps, queries: Sequence[Any], before: float, directions: Sequence[dict[str, Tensor]], names: set[str]
) -> np.ndarray:
    """By how much the mean query loss falls after a step along each direction at each rate, [rates, directions]."""
    return np.array([[before - steps.after(queries, g, rate, names) for g in directions] for rate in RATES])


def compare(found: np.ndarray, predicted: np.ndarray) -> list[dict[str, float]]:
    """At each rate: how much of the predicted drop happens."""
    out = []
    for rate, actual in zip(RATES, found, strict=True):
        foretold = rate * predicted
        with np.errstate(over="ignore", invalid="ignore"):
            ratio = actual / foretold
            out.append(
                {
                    "rate": rate, "ratio": float(np.median(ratio)), "low": float(np.quantile(ratio, 0.1)),
                    "high": float(np.quantile(ratio, 0.9)),
                    "pearson": float(stats.pearsonr(actual, foretold).statistic),
                    "spearman": float(stats.spearmanr(actual, foretold).statistic),
                    "error": float(np.linalg.norm(actual - foretold) / np.linalg.norm(foretold)),
                }
            )  # fmt: skip
    return out


def passed(points: Sequence[dict[str, float]], limit: float = PASSED) -> float | None:
    """The rate at which the relative error reaches the limit, between two points by their logarithms; None if it is
    above it from the first on, or never."""
    for low, high in zip(points, points[1:], strict=False):
        if low["error"] <= limit < high["error"]:
            share = np.log(limit / low["error"]) / np.log(high["error"] / low["error"])
            return float(low["rate"] * (high["rate"] / low["rate"]) ** share)
    return None


MOMENTS = (0, 1 / 8, 1 / 2, 1)
EPOCHS, RATE = 2, 5e-4


def drift(place: Place, keep: Keep) -> None:
    """LinFiK at the teacher against LinFiK at checkpoints of a training on the offer, and their sum by rate."""
    document: dict[str, Any] = {"epochs": EPOCHS, "rate": RATE, "moments": list(MOMENTS), "targets": {}}
    folder = place.folder / "drift"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    rates, losses = _walk(place, folder)
    document |= {"rates": rates, "loss": losses}
    found: dict[tuple[str, str], list[np.ndarray]] = {}
    for number, _ in enumerate(MOMENTS):
        index = folder / f"index-{number}" if number else Path(place.index)
        if number:
            place.indexed(str(folder / f"at-{number}"), str(index))
        for target in TARGETS:
            for normalize in ("cosine", "none"):
                values = place.values(target, normalize, index=str(index))
                found.setdefault((target, normalize), []).append(values)
        if number:
            shutil.rmtree(index)
    resketched = folder / "other-maps"
    place.indexed(place.teacher, str(resketched), seed=1)
    labels = np.array([row["provider"] for row in place.offer.rows])
    for target in TARGETS:
        document["targets"][target] = {
            normalize: _course(found[target, normalize], rates, labels,
                               place.values(target, normalize, index=str(resketched)))
            for normalize in ("cosine", "none")
        }  # fmt: skip
    document["done"] = True
    keep(document)
    shutil.rmtree(folder)


def _walk(place: Place, folder: Path) -> tuple[list[float], list[float | None]]:
    """Train the teacher on the offer, saving it at the moments; the rate at each, and the offer's loss a token."""
    from transformers import AutoTokenizer

    steps, rows, batch = Steps(place.teacher, place.device, dtype="float32"), place.offer.rows, 32
    adam = torch.optim.AdamW(steps.model.parameters(), lr=RATE, weight_decay=0)
    rng = np.random.default_rng(place.seed)
    order = [part for _ in range(EPOCHS) for part in np.array_split(rng.permutation(len(rows)), len(rows) // batch)]
    moments, rates, losses, recent = [round(share * len(order)) for share in MOMENTS], [], [], []
    tokenizer = AutoTokenizer.from_pretrained(place.teacher)
    for step in range(len(order) + 1):
        if step in moments:
            where = folder / f"at-{moments.index(step)}"
            steps.model.save_pretrained(where)
            tokenizer.save_pretrained(where)
            rates.append(RATE * (1 - step / len(order)))
            losses.append(float(np.mean(recent)) if recent else None)
            recent = []
        if step == len(order):
            break
        for group in adam.param_groups:
            group["lr"] = RATE * (1 - step / len(order))
        each = steps.losses([rows[i] for i in order[step]])
        tokens = steps.targets([rows[i] for i in order[step]])
        adam.zero_grad()
        (each.sum() / tokens).backward()
        adam.step()
        recent.append(float(each.detach().sum()) / tokens)
    return rates, losses


def _course(
    values: Sequence[np.ndarray], rates: Sequence[float], labels: np.ndarray, again: np.ndarray
) -> dict[str, Any]:
    """Spearman correlations with the values at the start: of rows, of providers' means, and of the sum over the course
    (each moment stands for the steps up to the next)."""

    def means(each: np.ndarray) -> np.ndarray:
        return np.array([each[labels == name].mean() for name in np.unique(labels)])

    def rank(one: np.ndarray, other: np.ndarray) -> float:
        return float(stats.spearmanr(one, other).statistic)

    spans = np.diff([*MOMENTS, MOMENTS[-1]])
    total = sum(v * rate * span for v, rate, span in zip(values, rates, spans, strict=True))
    return {
        "rows": [rank(values[0], each) for each in values],
        "providers": [rank(means(values[0]), means(each)) for each in values],
        "tracin": rank(values[0], np.asarray(total)),
        "tracin, providers": rank(means(values[0]), means(np.asarray(total))),
        "other maps": rank(values[0], again),
    }  # fmt: skip

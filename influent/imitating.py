"""A student's small model is first made to predict as the owner's model does: distillation of next-token distributions.

The value of a row is a product of gradients of the large model, and the gradient of its readout, which a student sees
in its own readout (features.py), is what the model predicts less what the text says. A small model of other predictions
sees other gradients. So its cross-entropy with the large model's distribution is lowered (Hinton, Vinyals and Dean,
2015, at temperature 1) over texts that the owner has: forward passes of the large model, no gradients of it, no label,
once for all targets. Not here: what is learnt of the value of rows (distilling.py, tuning.py).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from influent import loading
from influent.errors import DataError, NumericsError, SpecError
from influent.layers import device_of
from influent.progress import Progress
from influent.records import read_examples
from influent.rng import Stream
from influent.task import CausalLM, Part

LEFT_OUT = 0.05  # of the parts, by which the divergence is measured
WARM = 0.05  # of all steps, over which the rate rises
CLIP = 1.0  # the length of a step's gradient at most


def imitate(
    small: str,
    large: str,
    data: Any,
    *,
    out: str,
    epochs: int = 1,
    rate: float = 2e-3,
    batch: int = 32,
    max_length: int = 512,
    seed: int = 0,
    device: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train a small causal language model to predict as a large one does, and write it to the folder `out`.

    Args:
        small: where it starts; it must read the large one's tokens.
        data: the texts, a file or sequence of records. Longer ones are cut into parts.
        rate: of AdamW without decay; it rises over the first steps and falls linearly to zero.
        batch: parts a step.

    Returns:
        `parts` trained on and `steps`; `before` and `after`, the mean Kullback-Leibler divergence of the small model's
        predictions from the large one's, in nats a token, on a twentieth of the parts that is left out.

    Raises:
        SpecError: `out` is there already, a model cannot be loaded, or the two have different tokenizers.
        DataError: there are too few texts. NumericsError: the training diverged.
    """
    place = Path(out).expanduser()
    if place.exists():
        raise SpecError(f"{out}: is there already; name a folder that is not, or remove it")
    pupil, teacher, task = _pair(small, large, max_length, device)
    parts = [part for example in read_examples(data) if example.skip is None for part in task.parts(example.content)]
    order = Stream(seed, "imitate", "parts", "left-out").permutation(len(parts)).tolist()
    cut = max(1, round(LEFT_OUT * len(parts)))
    if len(parts) <= cut:
        raise DataError(
            f"{len(parts)} texts with a token to predict are too few to imitate a model on, give two at least"
        )
    tested, trained = ([parts[i] for i in some] for some in (order[:cut], order[cut:]))
    before = divergence(pupil, teacher, task, tested, batch=batch)
    steps = _train(pupil, teacher, task, trained, epochs, rate, batch, seed, progress)
    after = divergence(pupil, teacher, task, tested, batch=batch)
    part = place.with_name(place.name + ".part")
    cast(Any, pupil).save_pretrained(part)
    task.tokenizer.save_pretrained(part)
    part.rename(place)
    return {"model": out, "parts": len(trained), "steps": steps, "before": before, "after": after}


@torch.no_grad()
def divergence(pupil: nn.Module, teacher: nn.Module, task: CausalLM, parts: Sequence[Part], *, batch: int) -> float:
    """The mean over the parts' target tokens of KL(teacher || pupil), in nats."""
    total, count = 0.0, 0
    for lo in range(0, len(parts), batch):
        wanted, said = _predictions(pupil, teacher, task, parts[lo : lo + batch])
        total += float((wanted.exp() * (wanted - said)).sum(dtype=torch.float64))
        count += len(wanted)
    return total / count


def _pair(small: str, large: str, max_length: int, device: str | None) -> tuple[nn.Module, nn.Module, CausalLM]:
    (pupil, own), (teacher, tokenizer) = (loading.load(path, dtype="float32", device=device) for path in (small, large))
    length = min(max_length, *(loading.context_length(model) or max_length for model in (pupil, teacher)))
    task = CausalLM(tokenizer, max_length=length)
    if CausalLM(own, max_length=length).describe()["tokenizer"] != task.describe()["tokenizer"]:
        raise SpecError(f"{small} and {large} have different tokenizers: what one predicts the other cannot imitate")
    return pupil, teacher, task


def _train(
    pupil: nn.Module,
    teacher: nn.Module,
    task: CausalLM,
    parts: Sequence[Part],
    epochs: int,
    rate: float,
    batch: int,
    seed: int,
    progress: Progress | None,
) -> int:
    """Train the pupil in place; the number of steps."""
    adam = torch.optim.AdamW(pupil.requires_grad_(True).parameters(), lr=rate, weight_decay=0)
    orders = [Stream(seed, "imitate", "order", f"epoch/{epoch}").permutation(len(parts)) for epoch in range(epochs)]
    steps = [order[lo : lo + batch].tolist() for order in orders for lo in range(0, len(parts), batch)]
    for done, some in enumerate(steps):
        for group in adam.param_groups:
            group["lr"] = rate * min((done + 1) / max(1.0, WARM * len(steps)), 1 - done / len(steps))
        wanted, said = _predictions(pupil, teacher, task, [parts[i] for i in some])
        loss = -(wanted.exp() * said).sum(dim=1).mean()
        if not bool(loss.isfinite()):
            raise NumericsError(f"imitating diverged at step {done + 1} of {len(steps)}; lower the rate ({rate:g})")
        adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(pupil.parameters(), CLIP)
        adam.step()
        if progress is not None:
            progress("imitate", done + 1, len(steps))
    pupil.requires_grad_(False)
    return len(steps)


def _predictions(
    pupil: nn.Module, teacher: nn.Module, task: CausalLM, parts: Sequence[Part]
) -> tuple[Float[Tensor, "n V"], Float[Tensor, "n V"]]:
    """Log-probabilities before each target token: the teacher's, without a gradient, and the pupil's."""
    inputs = task.collate(parts)
    ids, labels = (inputs[name].to(device_of(pupil)) for name in ("input_ids", "labels"))
    before: Bool[Tensor, "B T"] = nn.functional.pad(labels[:, 1:] != -100, (0, 1))
    with torch.no_grad():
        wanted = teacher(input_ids=ids, use_cache=False).logits[before].float().log_softmax(-1)
    return wanted, pupil(input_ids=ids, use_cache=False).logits[before].float().log_softmax(-1)

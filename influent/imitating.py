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
from influent.training import Descent, Recipe, pieces

LEFT_OUT = 0.05  # of the parts, by which the divergence is measured
WARM = 0.05  # of all steps, over which the rate rises
PIECE = 1 << 23  # logits that either model makes at once


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
        epochs, rate, batch: see training.Recipe; a batch is of parts.

    Returns:
        `parts` trained on and `steps`; `before` and `after`, the mean Kullback-Leibler divergence of the small model's
        predictions from the large one's, in nats a token, on a twentieth of the parts that is left out.

    Raises:
        SpecError: `out` is there already, a model cannot be loaded, the two have different tokenizers, or a number of
            the recipe makes no sense.
        DataError: there are too few texts. NumericsError: the training diverged.
    """
    place = Path(out).expanduser()
    if place.exists():
        raise SpecError(f"{out}: is there already; name a folder that is not, or remove it")
    recipe = Recipe(epochs=epochs, rate=rate, batch=batch, seed=seed, warm=WARM)
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
    steps = _train(pupil, teacher, task, trained, recipe, progress)
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
        for some in _cut(pupil, parts[lo : lo + batch]):
            wanted, said = _predictions(pupil, teacher, task, some)
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
    recipe: Recipe,
    progress: Progress | None,
) -> int:
    """Train the pupil in place; the number of steps."""
    orders = [
        Stream(recipe.seed, "imitate", "order", f"epoch/{epoch}").permutation(len(parts))
        for epoch in range(recipe.epochs)
    ]
    steps = [order[lo : lo + recipe.batch].tolist() for order in orders for lo in range(0, len(parts), recipe.batch)]
    descent = Descent(pupil.requires_grad_(True).parameters(), recipe, len(steps))
    for done, some in enumerate(steps):
        batch = [parts[i] for i in some]

        def backward(batch: list[Part] = batch, done: int = done) -> None:
            targets = sum(part.targets for part in batch)
            for piece in _cut(pupil, batch):
                wanted, said = _predictions(pupil, teacher, task, piece)
                loss = -(wanted.exp() * said).sum() / targets
                if not bool(loss.isfinite()):
                    raise NumericsError(
                        f"imitating diverged at step {done + 1} of {len(steps)}; lower the rate ({recipe.rate:g})"
                    )
                loss.backward()

        descent.step(done, backward)
        if progress is not None:
            progress("imitate", done + 1, len(steps))
    pupil.requires_grad_(False)
    return len(steps)


def _cut(pupil: nn.Module, batch: Sequence[Part]) -> list[list[Part]]:
    """Parts whose logits are made at once."""
    vocabulary = len(cast(Any, pupil).get_output_embeddings().weight)
    numbers = pieces([part.length for part in batch], range(len(batch)), max(1, PIECE // vocabulary))
    return [[batch[i] for i in some] for some in numbers]


def _predictions(
    pupil: nn.Module, teacher: nn.Module, task: CausalLM, parts: Sequence[Part]
) -> tuple[Float[Tensor, "n V"], Float[Tensor, "n V"]]:
    """Log-probabilities before each target token: the teacher's, without a gradient, and the pupil's."""
    inputs = task.collate(parts)
    ids, labels = (inputs[name].to(device_of(pupil)) for name in ("input_ids", "labels"))
    before: Bool[Tensor, "B T"] = nn.functional.pad(labels[:, 1:] != -100, (0, 1))
    with torch.no_grad():
        large = teacher(input_ids=ids, use_cache=False).logits[before].float()
    small = pupil(input_ids=ids, use_cache=False).logits[before].float()
    # Either may have more logits than there are tokens, to fill its vocabulary up: nobody says those.
    size = min(large.shape[1], small.shape[1])
    return large[:, :size].log_softmax(-1), small[:, :size].log_softmax(-1)

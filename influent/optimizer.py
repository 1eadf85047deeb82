"""Adam's state beside gradients: its second moments as a scale, or the step that it would take on a gradient.

`Scale` divides each entry of a gradient by sqrt(v) + eps. `AdamStep` is what Adam's next update moves each weight by,
per unit of learning rate, if it is taken on that one gradient: it depends on the first moments as well, and is not
linear. A state is a torch `optimizer.pt` of Adam or AdamW, read without unpickling code, whose parameters are the
model's in their order; or a safetensors file by the parameters' names. Not here: where the scale meets the compressor
(bind.py, whole.py), which gradients steps are taken on (collect.py).
"""

import hashlib
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from influent import parameters
from influent.errors import SpecError
from influent.layers import Plan

EPS = 1e-8  # of a safetensors file of second moments, which has no options
SECOND = ".exp_avg_sq"


@dataclass(frozen=True, eq=False)
class Scale:
    """Block -> 1 / (sqrt(v) + eps) in the block's flat order, and the digest of the state's bytes."""

    weights: dict[str, Float[Tensor, " p"]]
    digest: str


@dataclass(frozen=True, eq=False)
class AdamStep:
    """Adam's next step from a state (m, v) after t steps, on the gradient g of each example alone:

        (b1 m + (1 - b1) g) / (1 - b1^(t+1))  over  sqrt((b2 v + (1 - b2) g^2) / (1 - b2^(t+1))) + eps

    (Kingma and Ba, ICLR 2015), by block in its flat order. Positive where the weight falls. A decay of weights, which
    is the same whatever the example, is left out.
    """

    first: dict[str, Float[Tensor, " p"]]  # b1 m / (1 - b1^(t+1))
    second: dict[str, Float[Tensor, " p"]]  # b2 v / (1 - b2^(t+1))
    fresh: tuple[float, float]  # (1 - b) / (1 - b^(t+1)) of both
    eps: float
    digest: str
    by_token: bool = False  # g is the mean over the example's target tokens of what is summed over them

    def __call__(self, block: str, g: Float[Tensor, "B p"], tokens: Float[Tensor, " B"]) -> Float[Tensor, "B p"]:
        """The steps on gradients of examples with so many target tokens."""
        if self.by_token:
            g = g / tokens.clamp(min=1).unsqueeze(1)
        first, second = (each[block].to(g.device) for each in (self.first, self.second))
        above = torch.addcmul(second, g, g, value=self.fresh[1]).sqrt_().add_(self.eps)
        return torch.add(first, g, alpha=self.fresh[0]).div_(above)


class _Entry(NamedTuple):
    """What Adam keeps of a parameter; `first` only where it is needed."""

    first: Tensor | None
    second: Tensor
    step: float
    betas: tuple[float, float]
    eps: float


def read_scale(path: str, model: nn.Module, plan: Plan) -> Scale:
    """The scale of every tracked block, from torch's file, one of second moments corrected for their bias, or one that
    `read_step` reads, which says how to correct them.

    Raises:
        SpecError: the file is missing, no state of Adam, or of other parameters; names the first that differs.
    """
    file = _file(path)
    moments = _safetensors(file)[0] if file.suffix == ".safetensors" else None
    if moments is not None and not any(name.endswith(SECOND) for name in moments):
        _check_moments(file, moments)
        named = {name: 1 / (v.double().sqrt() + EPS) for name, v in moments.items()}
    else:
        entries = _torch(file, model) if moments is None else _saved_entries(file)
        named = {
            name: 1 / ((each.second.double() / (1 - each.betas[1] ** each.step)).sqrt() + each.eps)
            for name, each in entries.items()
        }
    return Scale(_by_block(named, model, plan, path), _digest(file))


def read_step(path: str, model: nn.Module, plan: Plan, *, by_token: bool = False) -> AdamStep:
    """Adam's next step, from torch's file, or a safetensors file with NAME.exp_avg and NAME.exp_avg_sq of each
    parameter and in its metadata `step`, `beta1`, `beta2` and `eps`.

    Raises:
        SpecError: as `read_scale`; or the update is not plain Adam's, or not the same for all tracked parameters.
    """
    file = _file(path)
    entries = _saved_entries(file) if file.suffix == ".safetensors" else _torch(file, model, plain=True)
    first = _by_block({name: e.first for name, e in entries.items() if e.first is not None}, model, plan, path)
    second = _by_block({name: e.second for name, e in entries.items()}, model, plan, path)
    names = _names(model)
    options = {entries[names[id(p)]][2:] for p in parameters.held(plan).values()}
    if len(options) > 1:
        raise SpecError(
            f"--optimizer {path}: step, betas and eps differ between the tracked parameters: {sorted(options)}; give "
            "--layers of which they are the same"
        )
    (step, betas, eps) = options.pop()
    left = [1 - beta ** (step + 1) for beta in betas]
    return AdamStep(
        {name: m * (betas[0] / left[0]) for name, m in first.items()},
        {name: v * (betas[1] / left[1]) for name, v in second.items()},
        ((1 - betas[0]) / left[0], (1 - betas[1]) / left[1]),
        eps,
        _digest(file),
        by_token,
    )


def _file(path: str) -> Path:
    file = Path(path).expanduser()
    if not file.is_file():
        raise SpecError(f"--optimizer {path}: no such file; give a safetensors file of exp_avg_sq, or optimizer.pt")
    return file


def _digest(file: Path) -> str:
    with file.open("rb") as source:
        found = hashlib.file_digest(source, lambda: hashlib.blake2b(digest_size=32)).hexdigest()
    return f"blake2b-256:{found}"


def _safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise SpecError(f"--optimizer {file}: not a safetensors file: {error}") from error


def _saved_entries(file: Path) -> dict[str, _Entry]:
    tensors, options = _safetensors(file)
    if not options and not any(name.endswith(SECOND) for name in tensors):
        raise SpecError(
            f"--optimizer {file}: second moments by name, which are for --scale adam; adam-step needs NAME.exp_avg and "
            "NAME.exp_avg_sq of each parameter, and step, beta1, beta2 and eps in the metadata"
        )
    try:
        step, *betas, eps = (float(options[name]) for name in ("step", "beta1", "beta2", "eps"))
    except (KeyError, ValueError) as error:
        raise SpecError(
            f"--optimizer {file}: expected step, beta1, beta2 and eps as numbers in its metadata, got {options}"
        ) from error
    second = {name.removesuffix(SECOND): v for name, v in tensors.items() if name.endswith(SECOND)}
    _check_moments(file, second, {name: v for name, v in tensors.items() if name.endswith(".exp_avg")})
    if step < 1 or not all(0 <= beta < 1 for beta in betas) or not eps >= 0:
        raise SpecError(
            f"--optimizer {file}: expected step >= 1, 0 <= beta < 1 and eps >= 0 in its metadata: {options}"
        )
    return {
        name: _Entry(tensors.get(f"{name}.exp_avg"), v, step, (betas[0], betas[1]), eps) for name, v in second.items()
    }


def _check_moments(file: Path, second: Mapping[str, Tensor], first: Mapping[str, Tensor] | None = None) -> None:
    """SpecError for what no averages of squares, or of gradients, can be."""
    for moments, least, wanted in ((second, 0.0, "0 or more"), (first or {}, float("-inf"), "finite")):
        for name, values in moments.items():
            bad = ~(values.isfinite() & (values >= least))
            if bool(bad.any()):
                got = float(values[bad].flatten()[0])
                raise SpecError(f"--optimizer {file}: {name} holds {got}, expected averages that are {wanted}")


def _torch(file: Path, model: nn.Module, *, plain: bool = False) -> dict[str, _Entry]:
    """The entry of each parameter; a second group holds the parameters of one axis (Trainer's way).

    `plain` refuses what makes another step than Adam's.
    """
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True)
        groups, state = loaded["param_groups"], loaded["state"]
        order = [(number, group) for group in groups for number in group["params"]]
    except (RuntimeError, pickle.UnpicklingError, KeyError, TypeError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise SpecError(f"--optimizer {file}: not the state of a torch optimizer: {reason}") from error
    named = list(model.named_parameters())
    if len(groups) == 2:
        named.sort(key=lambda pair: pair[1].ndim < 2)
    if len(groups) > 2 or len(order) != len(named):
        raise SpecError(
            f"--optimizer {file}: {len(order)} parameters in {len(groups)} groups, the model has {len(named)}; "
            "give a safetensors file with exp_avg_sq by name"
        )
    for group in groups if plain else ():
        _check_plain(file, group)
    entries = {
        name: _entry(file, name, parameter, state.get(number, {}), group)
        for (number, group), (name, parameter) in zip(order, named, strict=True)
    }
    _check_moments(
        file,
        {name: entry.second for name, entry in entries.items()},
        {name: entry.first for name, entry in entries.items() if entry.first is not None},
    )
    return entries


def _entry(file: Path, name: str, parameter: Tensor, state: Mapping[str, Any], group: Mapping[str, Any]) -> _Entry:
    if not isinstance(state.get("exp_avg_sq"), Tensor) or "betas" not in group:
        raise SpecError(f"--optimizer {file}: parameter {name} has no exp_avg_sq: not a state of Adam")
    if state["exp_avg_sq"].shape != parameter.shape:
        got = tuple(state["exp_avg_sq"].shape)
        raise SpecError(f"--optimizer {file}: parameter {name}: expected {tuple(parameter.shape)}, got {got}")
    betas = float(group["betas"][0]), float(group["betas"][1])
    return _Entry(state.get("exp_avg"), state["exp_avg_sq"], float(state["step"]), betas, float(group["eps"]))


def _check_plain(file: Path, group: Mapping[str, Any]) -> None:
    odd = [name for name in ("amsgrad", "maximize") if group.get(name)]
    if "amsgrad" not in group:  # NAdam and RAdam keep the same averages and take other steps
        odd.append("another rule than Adam's (NAdam, RAdam, ...)")
    if group.get("weight_decay") and group.get("decoupled_weight_decay") is False:
        odd.append("weight_decay inside the gradient (Adam's; AdamW's is apart)")
    if odd:
        raise SpecError(f"--optimizer {file}: expected plain Adam or AdamW, got one with {' and '.join(odd)}")


def _names(model: nn.Module) -> dict[int, str]:
    return {id(parameter): name for name, parameter in model.named_parameters()}


def _by_block(named: Mapping[str, Tensor], model: nn.Module, plan: Plan, path: str) -> dict[str, Float[Tensor, " p"]]:
    """Tensors by the model's names of its parameters as vectors by block, float32."""
    names, found = _names(model), {}
    for place, parameter in parameters.held(plan).items():
        name = names[id(parameter)]
        if name not in named or named[name].shape != parameter.shape:
            got = tuple(named[name].shape) if name in named else "none"
            raise SpecError(f"--optimizer {path}: parameter {name}: expected {tuple(parameter.shape)}, got {got}")
        found[place] = named[name][None]
    return {name: vector[0].float() for name, vector in parameters.from_parameters(plan, found).items()}

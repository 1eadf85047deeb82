"""Adam's second moments as a scale of gradients: each entry is divided by sqrt(v) + eps, as a step of Adam divides it.

The state is a safetensors file (parameter name -> v, already corrected for its bias) or a torch `optimizer.pt` of
Adam or AdamW, read without unpickling code, whose parameters are the model's in their order. Not here: where the scale
meets the compressor (bind.py, whole.py).
"""

import hashlib
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from influent import sides
from influent.errors import SpecError
from influent.layers import Plan, Site

EPS = 1e-8  # of a safetensors file, which has no options


@dataclass(frozen=True, eq=False)
class Scale:
    """Block -> 1 / (sqrt(v) + eps) in the block's flat order, and the digest of the state's bytes."""

    weights: dict[str, Float[Tensor, " p"]]
    digest: str


def read_scale(path: str, model: nn.Module, plan: Plan) -> Scale:
    """The scale of every tracked block.

    Raises:
        SpecError: the file is missing, no state of Adam, or of other parameters; names the first that differs.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise SpecError(f"--optimizer {path}: no such file; give a safetensors file of exp_avg_sq, or optimizer.pt")
    named = _safetensors(file) if file.suffix == ".safetensors" else _torch(file, model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    weights = {name: _vector(site, names, named, path) for name, site in _owners(plan).items()}
    with file.open("rb") as source:
        digest = hashlib.file_digest(source, lambda: hashlib.blake2b(digest_size=32)).hexdigest()
    return Scale(weights, f"blake2b-256:{digest}")


def _safetensors(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return {name: 1 / (v.double().sqrt() + EPS) for name, v in load_file(file).items()}
    except SafetensorError as error:
        raise SpecError(f"--optimizer {file}: not a safetensors file: {error}") from error


def _torch(file: Path, model: nn.Module) -> dict[str, Tensor]:
    """v of each parameter, corrected for its bias; a second group holds the parameters of one axis (Trainer's way)."""
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True)
        groups, state = loaded["param_groups"], loaded["state"]
        order = [(number, group) for group in groups for number in group["params"]]
    except (RuntimeError, pickle.UnpicklingError, KeyError, TypeError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise SpecError(f"--optimizer {file}: not the state of a torch optimizer: {reason}") from error
    parameters = list(model.named_parameters())
    if len(groups) == 2:
        parameters.sort(key=lambda pair: pair[1].ndim < 2)
    if len(groups) > 2 or len(order) != len(parameters):
        raise SpecError(
            f"--optimizer {file}: {len(order)} parameters in {len(groups)} groups, the model has {len(parameters)}; "
            "give a safetensors file with exp_avg_sq by name"
        )
    found = {}
    for (number, group), (name, parameter) in zip(order, parameters, strict=True):
        entry = state.get(number, {})
        if not isinstance(entry.get("exp_avg_sq"), Tensor) or "betas" not in group:
            raise SpecError(f"--optimizer {file}: parameter {name} has no exp_avg_sq: not a state of Adam")
        if entry["exp_avg_sq"].shape != parameter.shape:
            got = tuple(entry["exp_avg_sq"].shape)
            raise SpecError(f"--optimizer {file}: parameter {name}: expected {tuple(parameter.shape)}, got {got}")
        corrected = entry["exp_avg_sq"].double() / (1 - group["betas"][1] ** float(entry["step"]))
        found[name] = 1 / (corrected.sqrt() + group["eps"])
    return found


def _owners(plan: Plan) -> dict[str, Site]:
    """A site of each block; of tied ones the head, which may have a bias."""
    owners: dict[str, Site] = {}
    for site in plan.sites:
        if site.block.name not in owners or site.kind != "embedding":
            owners[site.block.name] = site
    return owners


def _vector(site: Site, names: Mapping[int, str], named: Mapping[str, Tensor], path: str) -> Float[Tensor, " p"]:
    """A block's scale in its flat order: input-major, a bias as the last input."""
    module: Any = site.module
    pieces = {}
    for kind in ("weight", "bias"):
        parameter = getattr(module, kind, None)
        if parameter is not None:
            name = names[id(parameter)]
            if name not in named or named[name].shape != parameter.shape:
                got = tuple(named[name].shape) if name in named else "none"
                raise SpecError(f"--optimizer {path}: parameter {name}: expected {tuple(parameter.shape)}, got {got}")
            pieces[kind] = named[name]
    weight, bias = pieces["weight"], pieces.get("bias")
    if site.kind == "norm":
        return torch.cat([weight.flatten()] + ([] if bias is None else [bias.flatten()])).float()
    matrix = weight if sides.is_conv1d(module) else weight.flatten(1).T  # [I, O]
    if bias is not None:
        matrix = torch.cat([matrix, bias[None]])
    missing = site.block.in_width - len(matrix)  # the bias of a tied head that this module has not
    return nn.functional.pad(matrix, (0, 0, 0, missing), value=1.0).flatten().float()

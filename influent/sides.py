"""The normal form of each layer kind: a module's input and output gradient as [batch, positions, features].

One place knows what a Linear, a Hugging Face Conv1D, a convolution, an Embedding and a norm look like. Not here:
which modules are tracked (layers.py) and when these functions run (extract.py).
"""

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from influent.errors import LayerError

Layer = Any  # a module whose kind is known; nn.Module types none of its attributes
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.BatchNorm1d, nn.BatchNorm2d)
_PADDING_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}


@dataclass(frozen=True, slots=True)
class Batch:
    """The shape of a batch: its number of examples (or parts of examples) and of positions in each."""

    size: int
    positions: int


def kind_of(module: nn.Module) -> str | None:
    """linear, conv, embedding, norm, or None for a module that cannot be attributed to.

    A subclass counts only if it keeps the forward of its base: what an override computes is not known.
    """
    forward = type(module).forward
    if forward is nn.Linear.forward or is_conv1d(module):
        return "linear"
    if forward in (nn.Conv1d.forward, nn.Conv2d.forward):
        return "conv"
    if forward is nn.Embedding.forward:
        return "embedding"
    weight = getattr(module, "weight", None)
    if isinstance(module, _NORMS) or (
        type(module).__name__.endswith("RMSNorm") and weight is not None and weight.ndim == 1
    ):
        return "norm"
    return None


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is Hugging Face's Conv1D, whose weight is [in, out]."""
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")


def widths(module: Layer) -> tuple[int, int]:
    """(in, out) features without the bias; for an embedding (h, V), for a norm (features, 1)."""
    weight = module.weight
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return math.prod(weight.shape[1:]), len(weight)
    if kind_of(module) == "norm":
        return weight.numel(), 1
    return (weight.shape[0], weight.shape[1]) if is_conv1d(module) else (weight.shape[1], weight.shape[0])


def check(name: str, module: Layer, advice: str) -> None:
    """Refuse settings under which the gradient is not the plain sum over positions.

    Raises:
        LayerError: names the layer and the setting.
    """
    if isinstance(module, nn.Embedding) and (module.scale_grad_by_freq or module.max_norm is not None):
        raise LayerError(
            f"layer {name} is an Embedding with scale_grad_by_freq or max_norm, which is not handled; {advice}"
        )
    if isinstance(module, _NORMS) and getattr(module, "weight", None) is None:
        raise LayerError(f"layer {name} has a bias and no weight, which is not handled; {advice}")
    if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) and module.running_mean is None:
        raise LayerError(f"layer {name} has no running statistics, so that it mixes the examples of a batch; {advice}")


def entering(kind: str, module: Layer, x: Tensor, batch: Batch, name: str) -> Tensor:
    """A module's input as [B, T, I]; an embedding's ids as [B, T]; a norm's input as it came."""
    if kind == "conv":
        _demand_batch(x, batch, name, len(x) == batch.size)
        return _unfold(module, x)
    if kind == "embedding":
        _demand_batch(x, batch, name, len(x) == batch.size)
        return x.reshape(batch.size, -1)
    if kind == "norm":
        return x
    return _positions(x, batch, name)


def leaving(kind: str, module: Layer, d: Tensor, batch: Batch, name: str) -> Tensor:
    """The gradient of a module's output as [B, T, O]."""
    if kind == "conv":
        flat = d.flatten(2).transpose(1, 2)  # [B, L, O]
        return _apart(flat, module.groups) if module.groups > 1 else flat
    return _positions(d, batch, name)


def _positions(x: Tensor, batch: Batch, name: str) -> Tensor:
    if len(x) == batch.size:
        return x.reshape(batch.size, -1, x.shape[-1])
    # Some models flatten [B, T] for a layer. Any other leading size means that tokens were routed or the batch is not
    # first, and a guess would credit one example with another's gradient.
    _demand_batch(x, batch, name, x.ndim == 2 and len(x) == batch.size * batch.positions)
    return x.view(batch.size, batch.positions, -1)


def _demand_batch(x: Tensor, batch: Batch, name: str, ok: bool) -> None:
    if not ok:
        raise LayerError(
            f"layer {name} got an input of shape {tuple(x.shape)}, expected {batch.size} examples (or {batch.size} x "
            f"{batch.positions} flattened) first; its gradient cannot be told apart by example: --exclude it"
        )


def _unfold(module: Layer, x: Tensor) -> Tensor:
    """Convolution patches as [B, groups * L, C / groups * kernel]."""
    one_d = isinstance(module, nn.Conv1d)
    pads = _pads(module)
    if any(pads):
        x = functional.pad(x, pads, mode=_PADDING_MODES[module.padding_mode])
    kernel, dilation, stride = (tuple(v) for v in (module.kernel_size, module.dilation, module.stride))
    if one_d:
        x, kernel, dilation, stride = x.unsqueeze(2), (1, *kernel), (1, *dilation), (1, *stride)
    patches = functional.unfold(x, kernel, dilation=dilation, stride=stride)  # [B, C * kernel, L]
    groups = module.groups
    split = patches.view(len(x), groups, -1, patches.shape[-1])
    return split.transpose(2, 3).flatten(1, 2)


def _pads(module: Layer) -> list[int]:
    """Padding as functional.pad wants it: last axis first, (before, after)."""
    if module.padding == "valid":
        return [0] * (2 * len(module.kernel_size))
    if module.padding == "same":
        total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return [side for t in reversed(total) for side in (t // 2, t - t // 2)]
    return [side for pad in reversed(module.padding) for side in (pad, pad)]


def _apart(d: Tensor, groups: int) -> Tensor:
    """Output gradients [B, L, O] as [B, groups * L, O], each group's positions zero outside its own channels."""
    size = d.shape[-1] // groups
    out = d.new_zeros(len(d), groups, d.shape[1], d.shape[2])
    for g in range(groups):
        out[:, g, :, g * size : (g + 1) * size] = d[..., g * size : (g + 1) * size]
    return out.flatten(1, 2)


def norm_gradient(module: Layer, x: Tensor, d: Tensor, batch: Batch, name: str) -> Tensor:
    """A norm's per-example gradient [B, H], or [B, 2H] with the bias, from its input and output gradient."""
    hat = normalised(module, x)
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and x.ndim > 2:
        hat, d = (t.flatten(2).transpose(1, 2) for t in (hat, d))
    else:
        shape = (*x.shape[: x.ndim - module.weight.ndim], -1)
        hat, d = hat.reshape(shape), d.reshape(shape)
    hat, d = _positions(hat, batch, name), _positions(d, batch, name).to(hat.dtype)
    weight = (d * hat).sum(1)
    return weight if getattr(module, "bias", None) is None else torch.cat([weight, d.sum(1)], dim=1)


def normalised(module: Layer, x: Tensor) -> Tensor:
    """The input of a norm's affine part, in float32 or wider."""
    x = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    if isinstance(module, nn.LayerNorm):
        return functional.layer_norm(x, module.normalized_shape, eps=module.eps)
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.running_mean is not None:
        mean, var = module.running_mean.to(x.dtype), cast(Tensor, module.running_var).to(x.dtype)
        shape = (1, -1) + (1,) * (x.ndim - 2)
        return (x - mean.view(shape)) * torch.rsqrt(var.view(shape) + module.eps)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    axes = tuple(range(-module.weight.ndim, 0))
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    return x * torch.rsqrt(x.square().mean(axes, keepdim=True) + eps)


def verify_norm(module: Layer, x: Tensor, y: Tensor, name: str) -> None:
    """Refuse a class named like an RMSNorm whose output is neither weight * x̂ nor (1 + weight) * x̂."""
    if isinstance(module, _NORMS):
        return
    hat = normalised(module, x)
    tolerance = 1e-4 if y.dtype in (torch.float32, torch.float64) else 4e-2
    for weight in (module.weight, 1 + module.weight):
        if torch.allclose(hat * weight.to(hat.dtype), y.to(hat.dtype), rtol=tolerance, atol=tolerance, equal_nan=True):
            return
    raise LayerError(f"layer {name} is a {type(module).__name__} whose formula is not that of an RMSNorm; --exclude it")

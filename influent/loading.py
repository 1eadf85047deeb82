"""Models and tokenizers from disk, and the fingerprint that ties an index to one model.

A model is a Hugging Face folder, a hub name, or a GGUF file. The fingerprint covers every parameter's name, shape and
bytes, so that it does not depend on where the model lies or how its files are cut. Not here: which layers are tracked.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from influent.errors import SpecError

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What a reader may compare without loading a model.
CONFIG_FACTS = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "vocab_size",
    "intermediate_size",
    "n_embd",
    "n_layer",
)


def load(model: str, *, dtype: str, device: str | None) -> tuple[nn.Module, Any]:
    """A causal language model in evaluation mode and its tokenizer.

    Raises:
        SpecError: the folder, name or file cannot be loaded; says why in the loader's words.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    path = Path(model).expanduser()
    where, gguf = (
        (str(path.parent), path.name) if path.suffix == ".gguf" else (model if not path.exists() else str(path), None)
    )
    extra: dict[str, Any] = {} if gguf is None else {"gguf_file": gguf}
    logging.disable_progress_bar()  # stderr is for our own progress
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, **extra)
        loaded = AutoModelForCausalLM.from_pretrained(where, dtype=DTYPES[dtype], **extra)
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SpecError(f"{model}: cannot be loaded as a causal language model with its tokenizer: {reason}") from error
    module = cast(nn.Module, loaded)
    return module.to(choose_device(device)).eval(), tokenizer


def choose_device(device: str | None) -> torch.device:
    """The device asked for, or the first accelerator, or the CPU."""
    if device is not None:
        try:
            chosen = torch.device(device)
            torch.empty(0, device=chosen)
        except (RuntimeError, AssertionError) as error:
            raise SpecError(f"--device {device}: not available here: {str(error).splitlines()[0]}") from error
        return chosen
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def exact_device(device: torch.device) -> torch.device:
    """Where float64 arithmetic on this device's behalf is done: there, or on the CPU beside one that has no float64."""
    return device if device.type == "cuda" else torch.device("cpu")


def fingerprint(model: nn.Module) -> str:
    """BLAKE2b-256 over the sorted parameters and buffers of the state dict: name, dtype, shape and bytes."""
    digest = hashlib.blake2b(digest_size=32)
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, torch.Tensor):
            continue
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy().data)
    return f"blake2b-256:{digest.hexdigest()}"


def dtype_of(model: nn.Module) -> str:
    """The name of the dtype of a model's first parameter."""
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def config_facts(model: nn.Module) -> dict[str, Any]:
    """The model's main sizes, as far as its configuration has them."""
    config = getattr(model, "config", None)
    return {name: getattr(config, name) for name in CONFIG_FACTS if getattr(config, name, None) is not None}


def context_length(model: nn.Module) -> int | None:
    """The longest input that the model's positions allow, if its configuration says."""
    return getattr(getattr(model, "config", None), "max_position_embeddings", None)


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """float32 matrix products at `highest` or `medium` (bfloat16 arithmetic where the hardware has it) precision.

    Convolutions follow: by default those of an NVIDIA device would round to TF32 at any precision of products.
    """
    before, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = precision != "highest"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        torch.backends.cudnn.allow_tf32 = cudnn


def noted_path(model: str) -> str:
    """How an index remembers its model: an absolute path for what is on disk, a hub name as it is."""
    path = Path(model).expanduser()
    return os.fspath(path.resolve()) if path.exists() else model

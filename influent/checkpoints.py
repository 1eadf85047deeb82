"""The models of an ensemble, one after another: paths, modules, or state dicts of the first module.

Not here: loading a path (loading.py), what is collected with each (methods.py, querying.py).
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from influent.errors import SpecError

Checkpoint = str | nn.Module | Mapping[str, Any]


def instances(checkpoints: Sequence[Checkpoint]) -> Iterator[str | nn.Module]:
    """Each checkpoint as a path or a module; a state dict becomes a copy of the first module with its weights, one at
    a time.

    Raises:
        SpecError: there is no first module for a state dict, or its names or shapes are not the module's.
    """
    first = checkpoints[0]
    for number, checkpoint in enumerate(checkpoints):
        if isinstance(checkpoint, str | nn.Module):
            yield checkpoint
        elif isinstance(checkpoint, Mapping) and isinstance(first, nn.Module):
            yield _with(first, checkpoint, number)
        else:
            got = type(checkpoint).__name__
            raise SpecError(
                f"checkpoint {number}: expected a path, a module, or a state dict after a module, got {got}"
            )


def _with(model: nn.Module, state: Mapping[str, Any], number: int) -> nn.Module:
    made = copy.deepcopy(model)
    try:
        made.load_state_dict(state)
    except (RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise SpecError(f"checkpoint {number}: its weights are not those of the module: {reason}") from error
    return made

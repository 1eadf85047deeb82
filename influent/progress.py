"""The one way a stage reports how far it is: a callable, so that nothing below the CLI knows about terminals."""

from __future__ import annotations

from typing import Protocol, runtime_checkable


@runtime_checkable
class Progress(Protocol):
    """Called as often as a stage likes: `progress("gradients", done, total)`; `total` 0 means not known."""

    def __call__(self, stage: str, done: int, total: int, /) -> None: ...

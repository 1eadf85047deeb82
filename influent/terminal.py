"""What every verb does at a terminal: progress bars on stderr, and one document on stdout, as a page or as JSON.

Does not: lay out a page (report.py).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from io import TextIOWrapper
from typing import TYPE_CHECKING, Any

from influent.progress import Progress

if TYPE_CHECKING:
    from rich.console import Console

Doc = Mapping[str, Any]


def print_document(document: Doc, page: Callable[[Doc, Console], None], *, json: bool) -> None:
    if json:
        from influent.report import json_text

        unicode = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
        sys.stdout.write(json_text(document, ascii_only=not unicode) + "\n")
        return
    from rich.console import Console

    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character still gets the rest
    page(document, Console(highlight=False))


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """Rich bars on stderr, one a stage, with rate and time left; nothing when stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield lambda stage, done, total: None
        return
    from rich.console import Console
    from rich.logging import RichHandler
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    console = Console(stderr=True)
    logger, handler = logging.getLogger("influent"), RichHandler(console=console, show_path=False, show_level=False)
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)  # what is about to be written, and how much
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, Any] = {}

        def show(stage: str, done: int, total: int, /) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total or None, rate="")
            bars.update(tasks[stage], completed=done, total=total or None)
            speed = bars.tasks[tasks[stage]].speed
            bars.update(tasks[stage], rate=f"{speed:,.1f}/s" if speed else "")

        yield show

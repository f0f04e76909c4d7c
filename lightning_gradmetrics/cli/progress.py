"""Prints notices and progress bars to the standard error stream; bars are shown on terminals only."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import Progress

__all__ = ["notice", "progress_bar", "trainer_progress"]


def notice(text: str) -> None:
    """Print one line to the standard error stream."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def progress_bar(label: str) -> Iterator[Callable[[float], None]]:
    """Show a progress bar inside the block, if the standard error stream is a terminal.

    Args:
        label: The text before the bar.

    Returns:
        A function that receives the completed fraction, from 0 to 1.
    """
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(label, total=1.0)
        yield lambda share: progress.update(task, completed=share)


def trainer_progress() -> dict[str, Any]:
    """Return arguments of a ``Trainer`` that print its progress bar to the standard error stream, or disable it."""
    from lightning.pytorch.callbacks import RichProgressBar

    if not sys.stderr.isatty():
        return {"enable_progress_bar": False, "callbacks": []}
    return {"callbacks": [RichProgressBar(leave=False, console_kwargs={"stderr": True})]}

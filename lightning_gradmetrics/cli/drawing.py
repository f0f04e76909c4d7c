"""Saves figures in a second process, which imports Matplotlib only."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_gradmetrics.pictures.base import Saving

__all__ = ["save_all", "saving"]

PROGRAM = """
import pickle, sys
from lightning_gradmetrics.cli.drawing import save_all
save_all(*pickle.load(sys.stdin.buffer))
"""


@contextmanager
def saving(figures: Sequence[Saving]) -> Iterator[None]:
    """Save figures in a second process during the block, and wait for it at the end of the block.

    If this process may use one core only, or if a figure cannot be pickled, this process saves the figures before the block.
    Warnings of the second process are printed to the standard error stream.

    Args:
        figures: The figures. They may not change during the block.

    Raises:
        RuntimeError: If the second process fails.
    """
    import torch

    content = _pickled(figures) if torch.get_num_threads() > 1 else None
    if content is None:
        save_all(figures, {})
        yield
        return
    with _started(content) as process:
        try:
            yield
            _, messages = process.communicate()
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        lines = messages.strip().splitlines() or [f"the process ended with status {process.returncode}"]
        cause = subprocess.CalledProcessError(process.returncode, "saving figures", stderr=messages)
        raise RuntimeError(f"the figures could not be saved: {lines[-1]}") from cause
    sys.stderr.write(messages)


def _pickled(figures: Sequence[Saving]) -> bytes | None:
    """Return the figures and the settings as bytes; ``None`` if that is impossible, as for a tick formatter that is a lambda."""
    try:
        return pickle.dumps((figures, _settings()))
    except (pickle.PicklingError, AttributeError, TypeError):
        return None


def _started(content: bytes) -> subprocess.Popen[str]:
    """Start the process that saves the figures."""
    options = [f"-W{option}" for option in sys.warnoptions]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with TemporaryFile() as file:  # a pipe would block this process until the figures are read
        file.write(content)
        file.seek(0)
        command = [sys.executable, *options, "-c", PROGRAM]
        return subprocess.Popen(
            command, stdin=file, stderr=subprocess.PIPE, env=environment, text=True, errors="replace"
        )


def _settings() -> dict[Any, Any]:
    """Return Matplotlib's settings, except the backend: the format of a file determines it."""
    import matplotlib

    settings: dict[Any, Any] = {}
    for name in matplotlib.rcParams:
        if name != "backend":
            settings[name] = matplotlib.rcParams[name]
    return settings


def save_all(figures: Sequence[Saving], settings: Mapping[Any, Any]) -> None:
    """Save figures.

    Args:
        figures: The figures.
        settings: The settings of Matplotlib that apply to all of them.
    """
    import matplotlib

    for save, own in figures:
        with matplotlib.rc_context({**settings, **own}):
            save()

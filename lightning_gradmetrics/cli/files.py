"""Run directories, each of which is used by one run at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_gradmetrics.results.replacing import restore

__all__ = ["RunDirectoryInUse", "reserved", "shown_path"]


class RunDirectoryInUse(RuntimeError):
    """Another process is writing to the run directory."""


@contextmanager
def reserved(directory: Path) -> Iterator[None]:
    """Reserve a run directory for this process; the reservation ends when the process ends, even if it is killed.

    Directories that a killed run was replacing are restored.

    Raises:
        RunDirectoryInUse: If another process has reserved it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows: directories cannot be locked
        yield
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunDirectoryInUse(
                f"another run is writing to {shown_path(directory)}; wait for it, or choose another directory with "
                "hydra.run.dir=DIR"
            ) from error
        restore(directory)
        yield
    finally:
        os.close(handle)


def shown_path(path: Path) -> str:
    """Return the path relative to the working directory if it is inside, otherwise the full path."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)

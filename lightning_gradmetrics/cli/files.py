"""Files of a run: written to a temporary name and renamed, in a directory that belongs to one run at a time."""

from __future__ import annotations

import csv
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["RunDirectoryInUse", "replaced", "reserved", "shown_path", "write_csv", "write_text"]


class RunDirectoryInUse(RuntimeError):
    """Another process is writing to the run directory."""


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to ``path``, and rename what was written there to ``path`` in the end.

    A process that is killed leaves the old file or directory as it was. After an exception the temporary file is
    deleted. A directory replaces a directory.

    Args:
        path: The file or directory to write.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        temporary = scratch / path.name
        yield temporary
        _flush_to_disk(temporary)
        if path.is_dir():
            path.rename(scratch / f"{path.name}.old")
        temporary.replace(path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _flush_to_disk(path: Path) -> None:
    """Make sure that a file's bytes are on the disk before it gets its name."""
    if path.is_file():
        with path.open("rb+") as file:
            os.fsync(file.fileno())


def write_text(path: Path, text: str) -> Path:
    """Write a text file, and return its path."""
    with replaced(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> Path:
    """Write rows as a CSV file, and return its path.

    Args:
        path: The file.
        rows: One mapping per row; a missing key becomes an empty cell.
        columns: The names of the columns; by default every key, in the order of its first appearance.
    """
    if columns is None:
        keys: dict[str, None] = {}
        for row in rows:
            keys.update(dict.fromkeys(row))
        columns = list(keys)
    with replaced(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    return path


@contextmanager
def reserved(directory: Path) -> Iterator[None]:
    """Reserve a run directory for this process; the reservation ends with the process, however it ends.

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
        yield
    finally:
        os.close(handle)


def shown_path(path: Path) -> str:
    """The path relative to the working directory if it is below it, else the full path."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)

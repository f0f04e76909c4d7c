"""Replaces files and directories atomically: they are written under a temporary name and renamed."""

from __future__ import annotations

import csv
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["added", "replaced", "restore", "write_csv", "write_text"]


OLD = ".gradmetrics-old"


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to ``path``; at the end of the block, rename its content to ``path``.

    If the process is killed, the old file is unchanged. Replacing a directory takes two steps; after a kill between
    them, :func:`restore` or the next call restores the old directory. After an exception, the temporary file is
    deleted.

    Args:
        path: The file or directory to write.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _restore_one(_aside(path))
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        temporary = scratch / path.name
        yield temporary
        _flush_to_disk(temporary)
        if path.is_dir():
            path.rename(_aside(path))
        temporary.replace(path)
    finally:
        _restore_one(_aside(path))
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def added(directory: Path) -> Iterator[Path]:
    """Yield a temporary directory next to ``directory``; at the end of the block, move its files to ``directory``.

    Files of the same names are replaced. After an exception, the temporary directory is deleted.

    Args:
        directory: The directory, which may be created during the block.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{directory.name}."
    with tempfile.TemporaryDirectory(prefix=prefix, dir=directory.parent, ignore_cleanup_errors=True) as scratch:
        temporary = Path(scratch) / directory.name
        temporary.mkdir()
        yield temporary
        directory.mkdir(exist_ok=True)
        for path in temporary.iterdir():
            path.replace(directory / path.name)


def restore(directory: Path) -> None:
    """Restore directories that a killed process had moved aside but not replaced.

    Args:
        directory: The directory that contains them; no other process may write to it.
    """
    for aside in directory.glob(f".*{OLD}"):
        _restore_one(aside)


def _aside(path: Path) -> Path:
    """Return the temporary name of a directory that is being replaced."""
    return path.with_name(f".{path.name}{OLD}")


def _restore_one(aside: Path) -> None:
    """Restore the name of a directory that was moved aside, or delete it if the new directory exists."""
    if not aside.is_dir():
        return
    path = aside.with_name(aside.name[1 : -len(OLD)])
    if path.exists():
        shutil.rmtree(aside)
    else:
        aside.rename(path)


def _flush_to_disk(path: Path) -> None:
    """Flush a file to the disk before it gets its final name."""
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

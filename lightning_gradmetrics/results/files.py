"""Writes files atomically: after an interruption, a file has either its old or its new content."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["temporary_files", "write_file"]

TEMPORARY = ".tmp-"
"""Prefix of temporary files; programs that read a directory of Parquet files skip names that start with a dot."""


def write_file(path: Path, content: bytes) -> None:
    """Write a file atomically.

    Args:
        path: The file.
        content: Its bytes.
    """
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_directory(path.parent)


def temporary_files(directory: Path, pattern: str) -> list[Path]:
    """Return the temporary files that a killed process left for files whose names match the pattern."""
    return sorted(directory.glob(f"{TEMPORARY}{pattern}"))


def _sync_directory(directory: Path) -> None:
    if os.name == "nt":  # Windows cannot open directories
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

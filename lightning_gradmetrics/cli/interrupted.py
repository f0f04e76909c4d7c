"""Detects interrupted runs of the command, and completes them."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

from hydra.core.hydra_config import HydraConfig

from lightning_gradmetrics.cli.files import shown_path
from lightning_gradmetrics.results.output import Output
from lightning_gradmetrics.results.resuming import check_new

__all__ = ["advice", "check_directory", "delete_parts", "is_complete", "output_of", "parts_directory"]

FOLDER = "results"
"""The folder of the committed rows during scoring; a completed run writes one file and deletes the folder."""


def parts_directory(directory: Path) -> Path:
    """Return the folder of the committed rows in a run directory."""
    return directory / FOLDER


def has_parts(directory: Path) -> bool:
    """Return whether a run directory contains rows of an unfinished run."""
    return any(parts_directory(directory).glob("*.parquet"))


def is_complete(directory: Path) -> bool:
    """Return whether a run directory contains the files of a completed run."""
    return (directory / "metrics.json").exists() and not has_parts(directory)


def check_directory(directory: Path, resume: bool) -> None:
    """Refuse to start a run in the directory of an interrupted run.

    Args:
        directory: The run directory.
        resume: Whether to complete the interrupted run.

    Raises:
        FileExistsError: If there are rows and ``resume`` is false.
    """
    if not resume:
        check_new(parts_directory(directory))
    if has_parts(directory) and not resume:
        raise FileExistsError(
            f"{shown_path(directory)} contains rows of an interrupted run: add resume=true to complete it, or choose another "
            "directory with hydra.run.dir=DIR"
        )


def advice(directory: Path) -> str:
    """Return the command line that completes the current run.

    Args:
        directory: The run directory.
    """
    own = []
    for argument in HydraConfig.get().overrides.task:
        if not argument.startswith("resume="):
            own.append(argument)
    return "To score the rest: " + shlex.join(
        ["gradmetrics", *own, "resume=true", f"hydra.run.dir={shown_path(directory)}"]
    )


def output_of(directory: Path, resume: bool) -> Output:
    """Return where a run commits its rows during scoring.

    Args:
        directory: The run directory.
        resume: Whether to complete an interrupted run.
    """
    return Output(parts_directory(directory), resume, advice=advice(directory))


def delete_parts(directory: Path) -> None:
    """Delete the committed rows of a run after its files are written."""
    shutil.rmtree(parts_directory(directory), ignore_errors=True)

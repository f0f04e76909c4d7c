"""Interrupted runs of the command: what they leave in the run directory, and how they are completed."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

from hydra.core.hydra_config import HydraConfig

from lightning_gradmetrics.cli.files import shown_path
from lightning_gradmetrics.results.output import Output

__all__ = ["advice", "check_directory", "delete_parts", "is_complete", "output_of", "parts_directory"]

FOLDER = "results"
"""The folder of the committed rows while a run scores; a run that ends writes one file and deletes it."""


def parts_directory(directory: Path) -> Path:
    """Return the folder of the committed rows in a run directory."""
    return directory / FOLDER


def has_parts(directory: Path) -> bool:
    """Whether a run directory has rows of a run that did not end."""
    return any(parts_directory(directory).glob("*.parquet"))


def is_complete(directory: Path) -> bool:
    """Whether a run directory has the files of a run that ended."""
    return (directory / "metrics.json").exists() and not has_parts(directory)


def check_directory(directory: Path, resume: bool) -> None:
    """Refuse to start a run where an interrupted one left rows.

    Args:
        directory: The run directory.
        resume: Whether the interrupted run is to be completed.

    Raises:
        FileExistsError: If there are rows and ``resume`` is false.
    """
    if has_parts(directory) and not resume:
        raise FileExistsError(
            f"{shown_path(directory)} has the rows of an interrupted run: add resume=true to complete it, or choose another "
            "directory with hydra.run.dir=DIR"
        )


def advice(directory: Path) -> str:
    """Return the command line that completes the run of this process.

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
    """Return where a run commits its rows while it scores.

    Args:
        directory: The run directory.
        resume: Whether to complete an interrupted run.
    """
    return Output(parts_directory(directory), resume, advice=advice(directory))


def delete_parts(directory: Path) -> None:
    """Delete the committed rows of a run whose files are written."""
    shutil.rmtree(parts_directory(directory), ignore_errors=True)

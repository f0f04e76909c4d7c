"""Where and how a run stores its results."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_gradmetrics.results.parts import ROWS_PER_PART, ResumeError

__all__ = ["Output", "check_limits", "check_output"]


@dataclass(frozen=True)
class Output:
    """Where and how a run stores its results.

    Args:
        directory: The results directory.
        resume: Whether to complete the results of an interrupted run.
        rows_per_part: The largest number of rows in memory before they are written.
        advice: One sentence on how to resume the run; by default, with the callback.
    """

    directory: Path
    resume: bool = False
    rows_per_part: int = ROWS_PER_PART
    advice: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "directory", Path(self.directory))

    def how_to_resume(self) -> str:
        """Return how to resume the run."""
        name = str(self.directory)
        return self.advice or (
            f"To score the rest, use GradientMetrics(..., output={name!r}, resume=True) and pass "
            f"lightning_gradmetrics.unfinished(dataloaders, {name!r}) to the trainer."
        )


def check_output(output: Any, resume: Any) -> Output | None:
    """Return where a run stores its results, checked; ``None`` for memory.

    Args:
        output: A directory, an :class:`Output`, or ``None``.
        resume: Whether to resume.

    Raises:
        TypeError: If ``output`` is of any other type, or ``resume`` is not a bool.
        ValueError: If ``resume`` is true without a directory.
    """
    if not isinstance(resume, bool):
        raise TypeError(f"resume= is a {type(resume).__name__}; expected True or False")
    if output is None:
        if resume:
            raise ValueError("resume=True needs output=, the directory of the interrupted run")
        return None
    if isinstance(output, Output):
        return output
    if isinstance(output, (str, Path)) and str(output):
        return Output(Path(output), resume)
    raise TypeError(f"output= is a {type(output).__name__}; expected a directory, as in output='results'")


def check_limits(output: Output, is_limited: bool) -> None:
    """Refuse to resume a run that is limited to some of the batches.

    Raises:
        ResumeError: If the trainer limits the number of batches.
    """
    if output.resume and is_limited:
        raise ResumeError(
            "cannot resume with limit_test_batches, limit_val_batches, limit_predict_batches or fast_dev_run: the trainer would "
            "stop after that number of the remaining batches. Remove the limit"
        )

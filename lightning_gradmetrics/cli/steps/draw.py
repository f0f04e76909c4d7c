"""Step 4: draw the figures, while the next step evaluates the scores."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lightning_gradmetrics.cli.figures import Curves, Figures, matplotlib_settings
from lightning_gradmetrics.cli.second_process import SecondProcess
from lightning_gradmetrics.cli.steps.evaluate import present_roles
from lightning_gradmetrics.cli.steps.prepare import Experiment
from lightning_gradmetrics.cli.steps.score import Scored
from lightning_gradmetrics.pictures import log_pictures, log_pixels, takes_pixels
from lightning_gradmetrics.report.tables.marks import detects
from lightning_gradmetrics.results.replacing import replaced

__all__ = ["drawn"]


@contextmanager
def drawn(experiment: Experiment, scored: Scored, process: SecondProcess) -> Iterator[list[dict[str, str]]]:
    """Draw the figures of a run during the block, and pass the callback's pictures to the loggers at its end.

    Args:
        experiment: The run.
        scored: Its results.
        process: Draws the figures.

    Returns:
        The files of the callback's pictures and their captions, as :func:`~lightning_gradmetrics.pictures.write_pictures`
        returns them. They are complete after the block.
    """
    callback, loggers = experiment.callback, experiment.trainer.loggers
    with_pixels = [logger for logger in loggers if takes_pixels(logger)]
    files: list[dict[str, str]] = []
    with replaced(experiment.directory / "figures") as folder:
        folder.mkdir()
        curves, settings = _curves(experiment, scored), matplotlib_settings()
        figures = Figures(folder.parent, callback.sources, curves, bool(with_pixels), settings)
        finished = process.submit(figures)
        yield files
        made = finished()
    files += made.files
    step = experiment.trainer.global_step
    log_pixels(with_pixels, made.pixels, callback.prefix, step)
    others = [logger for logger in loggers if logger not in with_pixels]
    if others:
        log_pictures(others, callback.pictures(), callback.prefix, step)


def _curves(experiment: Experiment, scored: Scored) -> Curves | None:
    detectors = [score.name for score in scored.scores if detects(score)]
    if not experiment.settings.report or not detectors:
        return None
    return Curves(scored.results, detectors, present_roles(experiment, scored))

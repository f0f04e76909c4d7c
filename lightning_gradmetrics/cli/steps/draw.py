"""Step 4: draw the figures, while the next step evaluates the scores."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lightning_gradmetrics.cli.drawing import saving
from lightning_gradmetrics.cli.steps.evaluate import evaluation_of
from lightning_gradmetrics.cli.steps.prepare import Experiment
from lightning_gradmetrics.cli.steps.score import Scored
from lightning_gradmetrics.pictures import curve_pictures, write_pictures
from lightning_gradmetrics.pictures.base import Saving
from lightning_gradmetrics.report.tables.marks import detects
from lightning_gradmetrics.results.replacing import replaced

__all__ = ["drawn"]


@contextmanager
def drawn(experiment: Experiment, scored: Scored) -> Iterator[list[dict[str, str]]]:
    """Draw the figures of a run during the block. They are complete after it.

    Args:
        experiment: The run.
        scored: Its results.

    Returns:
        The files of the callback's pictures and their captions, as :func:`~lightning_gradmetrics.pictures.write_pictures`
        returns them.
    """
    figures: list[Saving] = []
    with replaced(experiment.directory / "figures") as folder:
        files = write_pictures(experiment.callback.pictures(), folder.parent, schedule=figures.append)
        if experiment.settings.report and any(detects(score) for score in scored.scores):
            curves = curve_pictures(scored.results, evaluation_of(experiment, scored, resamples=0))
            write_pictures(curves, folder.parent, pdf=True, schedule=figures.append)
        folder.mkdir(exist_ok=True)
        with saving(figures):
            yield files

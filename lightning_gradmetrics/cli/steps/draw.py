"""Step 4: draw the figures, while the next steps evaluate the scores and write the other files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from lightning_gradmetrics.cli.figures import Curves, Figures, matplotlib_settings
from lightning_gradmetrics.cli.second_process import SecondProcess
from lightning_gradmetrics.cli.steps.evaluate import present_roles
from lightning_gradmetrics.cli.steps.prepare import Experiment
from lightning_gradmetrics.cli.steps.score import Scored
from lightning_gradmetrics.pictures import log_pictures, log_pixels, takes_pixels
from lightning_gradmetrics.report.tables.marks import detects
from lightning_gradmetrics.results.replacing import added, replaced

__all__ = ["drawn"]


@contextmanager
def drawn(
    experiment: Experiment, scored: Scored, process: SecondProcess
) -> Iterator[Callable[[], list[dict[str, str]]]]:
    """Draw the figures of a run during the block; all are in the directory ``figures`` at its end.

    Args:
        experiment: The run.
        scored: Its results.
        process: Draws the figures.

    Returns:
        A function to be called once in the block. It waits for the callback's pictures, which the report shows, but not for
        the curves; passes the pictures to the loggers; and returns their files and captions, as
        :func:`~lightning_gradmetrics.pictures.write_pictures` does.
    """
    callback, loggers = experiment.callback, experiment.trainer.loggers
    with_pixels = [logger for logger in loggers if takes_pixels(logger)]
    figures, settings = experiment.directory / "figures", matplotlib_settings()
    with ExitStack() as until_written, added(figures) as curve_folder:
        folder = until_written.enter_context(replaced(figures))
        folder.mkdir()
        work = Figures(folder.parent, callback.sources, None, bool(with_pixels), settings)
        pictures = process.submit(work)
        curves = process.submit(Figures(curve_folder.parent, [], _curves(experiment, scored), settings=settings))

        def written() -> list[dict[str, str]]:
            made = pictures()
            until_written.close()
            step = experiment.trainer.global_step
            log_pixels(with_pixels, made.pixels, callback.prefix, step)
            others = [logger for logger in loggers if logger not in with_pixels]
            if others:
                log_pictures(others, callback.pictures(), callback.prefix, step)
            return made.files

        yield written
        curves()


def _curves(experiment: Experiment, scored: Scored) -> Curves | None:
    detectors = [score.name for score in scored.scores if detects(score)]
    if not experiment.settings.report or not detectors:
        return None
    return Curves(scored.results, detectors, present_roles(experiment, scored))

"""Step 2: fit the scores that need it, or load states that an earlier run wrote."""

from __future__ import annotations

from lightning_gradmetrics.cli.steps.prepare import Experiment
from lightning_gradmetrics.results.replacing import replaced
from lightning_gradmetrics.scores import FittedScore, load_fitted, save_fitted

__all__ = ["fit"]

FOLDER = "fitted"
"""The folder of the states in a run directory."""


def fit(experiment: Experiment) -> None:
    """Fit the callback's fitted scores, or load their states, and write the states to the run directory.

    Args:
        experiment: The run. The scores of its callback are replaced by fitted ones.
    """
    callback, settings = experiment.callback, experiment.settings
    names = [score.name for score in callback.scorer.scores if isinstance(score, FittedScore)]
    if not names:
        return
    states = settings.fitted_folder
    if settings.resume and states is None and (experiment.directory / FOLDER).is_dir():
        states = experiment.directory / FOLDER
    if states is None:
        loaders, roles = experiment.data.fit_loaders(settings.batch_size, settings.num_workers, names)
        callback.fit(experiment.trainer, experiment.model, loaders, roles)
    else:
        model = callback.scored_model(experiment.model)
        callback.scorer.scores = load_fitted(callback.scorer.scores, states, model)
    if experiment.trainer.is_global_zero:
        with replaced(experiment.directory / FOLDER) as folder:
            save_fitted(callback.scorer.scores, folder)

"""Step 2: fit the scores that need it, or load the states of an earlier run."""

from __future__ import annotations

from lightning_gradmetrics.cli.sharing import fit_data_key
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
        _fit_missing(experiment, names)
    else:
        model = callback.scored_model(experiment.model)
        callback.scorer.scores = load_fitted(callback.scorer.scores, states, model)
    if experiment.trainer.is_global_zero:
        with replaced(experiment.directory / FOLDER) as folder:
            save_fitted(callback.scorer.scores, folder)


def _fit_missing(experiment: Experiment, names: list[str]) -> None:
    """Fit the scores whose states no other job of the sweep has stored."""
    callback, settings, shared = experiment.callback, experiment.settings, experiment.shared
    loaders, roles = experiment.data.fit_loaders(settings.batch_size, settings.num_workers, names)
    key = None if shared is None else fit_data_key(experiment.data, loaders, roles, callback)
    if shared is None or key is None:
        callback.fit(experiment.trainer, experiment.model, loaders, roles)
        return
    scorer = callback.scorer
    chosen, model = scorer.scores, callback.scored_model(experiment.model)
    unfitted = [score for score in chosen if isinstance(score, FittedScore)]
    states = shared.load_fits(unfitted, key, model)
    missing = tuple(score for score in unfitted if score.name not in states)
    if missing:
        scorer.scores = missing
        callback.fit(experiment.trainer, experiment.model, loaders, roles)
        for score in scorer.scores:
            assert isinstance(score, FittedScore)
            shared.store_fit(score, key)
            states[score.name] = score
    scorer.scores = tuple(states.get(score.name, score) for score in chosen)

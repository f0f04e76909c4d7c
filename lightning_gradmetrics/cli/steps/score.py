"""Step 3: score every sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from lightning_gradmetrics.cli.interrupted import parts_directory
from lightning_gradmetrics.cli.progress import progress_bar
from lightning_gradmetrics.cli.steps.prepare import Experiment
from lightning_gradmetrics.results import unfinished
from lightning_gradmetrics.results.table import join_scores
from lightning_gradmetrics.scores import Score
from lightning_gradmetrics.scoring.cross_fitting import cross_fit, held_out_columns

__all__ = ["Scored", "score"]


@dataclass(frozen=True)
class Scored:
    """The per-sample results of a run.

    Args:
        results: The per-sample table.
        scores: The scores of its columns.
        without: For cross-validated columns, the dataset that all fits left out, or ``None``.
    """

    results: pa.Table
    scores: Sequence[Score]
    without: dict[str, str | None] = field(default_factory=dict)


def score(experiment: Experiment) -> Scored:
    """Score every sample with the callback, then cross-validate the fitted scores if the settings have folds.

    Args:
        experiment: The run.
    """
    settings = experiment.settings
    loaders = experiment.data.loaders(settings.batch_size, settings.num_workers)
    if settings.resume:
        loaders = unfinished(loaders, parts_directory(experiment.directory))
    callback, shared = experiment.callback, experiment.shared
    sharing = None if shared is None else shared.scorer(callback.scorer)
    callback.scorer = sharing or callback.scorer
    experiment.trainer.test(experiment.model, loaders, verbose=False)
    if shared is not None and sharing is not None:
        shared.store(sharing)
    if settings.cross_validation_folds is None or not experiment.fitted_scores:
        return Scored(experiment.callback.results, experiment.callback.scorer.scores)
    return _with_held_out_scores(experiment, settings.cross_validation_folds)


def _with_held_out_scores(experiment: Experiment, folds: int) -> Scored:
    """Return the results with a column of held-out scores for every fitted score.

    Raises:
        ValueError: If there are several processes.
    """
    if experiment.trainer.world_size > 1:
        raise ValueError("cross-validation runs in one process: set trainer.devices=1 or cross_validation_folds=null")
    settings, callback, roles = experiment.settings, experiment.callback, experiment.data.roles
    scorer = callback.scorer
    network = callback.scored_model(experiment.model).to(experiment.trainer.strategy.root_device).eval()
    with progress_bar("Cross-validation") as progress:
        held_out = cross_fit(
            network,
            experiment.data.loaders(settings.batch_size, settings.num_workers),
            experiment.fitted_scores,
            roles,
            folds=folds,
            seed=settings.seed,
            head=scorer.head,
            logits_fn=scorer.logits_fn,
            engine=scorer.engine,
            progress=progress,
        )
    scores, without = list(scorer.scores), {}
    for plan in held_out_columns(experiment.fitted_scores, roles):
        scores.append(plan.named)
        without[plan.named.name] = plan.without
    return Scored(join_scores(callback.results, held_out), scores, without)

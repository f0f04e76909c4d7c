"""Step 5: evaluate the scores, and compute the other requested tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_gradmetrics.callback.evaluating import evaluate_detectors
from lightning_gradmetrics.classifier.forward import map_tensors
from lightning_gradmetrics.cli.audit import planted_statements
from lightning_gradmetrics.cli.cost_measurement import score_costs
from lightning_gradmetrics.cli.cost_table import cost_records
from lightning_gradmetrics.cli.fitted_comparison import compare_fitted
from lightning_gradmetrics.cli.progress import progress_bar
from lightning_gradmetrics.cli.selective_areas import selective_areas
from lightning_gradmetrics.cli.steps.prepare import Experiment
from lightning_gradmetrics.cli.steps.score import Scored
from lightning_gradmetrics.evaluation import Evaluation
from lightning_gradmetrics.report.tables.marks import detects
from lightning_gradmetrics.scores import Score

__all__ = ["Evaluated", "evaluate", "present_roles"]

Record = dict[str, Any]


@dataclass(frozen=True)
class Evaluated:
    """The evaluated run.

    Args:
        evaluation: The metrics of the detectors.
        detectors: The scores that do not read labels.
        fitted_comparison: The comparison of cross-validated scores with others; empty without cross-validation.
        costs: Costs and needs of every score; empty if no costs were measured.
        areas: AUAC and AUFC; empty if they were not requested.
        planted: Sentences on planted labels; empty if no label was planted.
    """

    evaluation: Evaluation
    detectors: Sequence[Score]
    fitted_comparison: list[Record] = field(default_factory=list)
    costs: list[Record] = field(default_factory=list)
    areas: list[Record] = field(default_factory=list)
    planted: list[str] = field(default_factory=list)


def evaluate(experiment: Experiment, scored: Scored) -> Evaluated:
    """Evaluate the results of a run.

    Args:
        experiment: The run.
        scored: Its results.
    """
    settings = experiment.settings
    detectors = [score for score in scored.scores if detects(score)]
    evaluation = _evaluation(experiment, scored)
    compared, costs, areas = [], [], []
    if scored.without:
        compared = compare_fitted(
            scored.results,
            scored.scores,
            experiment.data.roles,
            scored.without,
            resamples=settings.resamples,
            seed=settings.seed,
        )
    if settings.cost_batch_size is not None:
        costs = _costs(experiment, evaluation, settings.cost_batch_size)
    if settings.auac_aufc:
        areas = selective_areas(scored.results, [score.name for score in detectors])
    return Evaluated(evaluation, detectors, compared, costs, areas, _planted(experiment, scored))


def present_roles(experiment: Experiment, scored: Scored) -> dict[str, str]:
    """Return the role of each dataset that has results."""
    present = set(scored.results["dataset"].unique().to_pylist())
    return {name: role for name, role in experiment.data.roles.items() if name in present}


def _evaluation(experiment: Experiment, scored: Scored) -> Evaluation:
    """Return the metrics of the detectors, while a progress bar is shown."""
    roles, settings = present_roles(experiment, scored), experiment.settings
    with progress_bar("Intervals") as progress:
        return evaluate_detectors(
            scored.results, scored.scores, roles, settings.resamples, seed=settings.seed, progress=progress
        )


def _costs(experiment: Experiment, evaluation: Evaluation, size: int) -> list[Record]:
    """Return costs and needs of every score, measured on one batch of in-distribution samples."""
    callback, data = experiment.callback, experiment.data
    first_id = next(name for name, role in data.roles.items() if role == "id")
    loader = data.loaders(size, experiment.settings.num_workers)[first_id]
    inputs, labels = callback.split_batch(next(iter(loader)))
    model = callback.scored_model(experiment.model)
    device = next(model.parameters()).device
    inputs = map_tensors(inputs, lambda tensor: tensor.to(device))
    labels = None if labels is None else labels.to(device)
    fitted = {score.name: score for score in callback.scorer.scores}
    scores = [fitted.get(score.name, score) for score in experiment.scores]
    with progress_bar("Costs") as progress:
        measured: list[str] = []

        def advance(name: str) -> None:
            measured.append(name)
            progress(len(measured) / len(scores))

        costs = score_costs(model, inputs, labels, scores, progress=advance)
    return cost_records(evaluation, experiment.scores, costs)


def _planted(experiment: Experiment, scored: Scored) -> list[str]:
    """Return sentences on the planted labels found by scores that read labels, or else by all scores with top samples."""
    names = [score.name for score in scored.scores if not detects(score)] or list(experiment.callback.top_k)
    return planted_statements(scored.results, names, experiment.data.planted)

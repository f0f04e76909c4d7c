"""Evaluates the scores of a run, except those that read the true label."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pyarrow as pa

from lightning_gradmetrics.evaluation import Evaluation, evaluate
from lightning_gradmetrics.evaluation.tasks import rows_of
from lightning_gradmetrics.results.reading import read_results
from lightning_gradmetrics.scores import Score

__all__ = ["evaluate_detectors", "judged_scores"]


def judged_scores(evaluation: Evaluation, scores: Sequence[Score]) -> list[Score]:
    """Return the scores that appear in an evaluation."""
    names = evaluation.settings.get("scores", ())
    return [score for score in scores if score.name in names]


def evaluate_detectors(
    results: pa.Table | Path,
    scores: Sequence[Score],
    roles: Mapping[str, str],
    resamples: int,
    *,
    seed: int = 0,
    cluster: str | None = None,
    labels_are_inputs: bool = False,
    progress: Callable[[float], None] | None = None,
) -> Evaluation:
    """Evaluate the scores that do not read the true label; the others would be evaluated on their own input.

    Args:
        results: The per-sample table, or a results directory.
        scores: All scores of the run.
        roles: The role of each dataset.
        resamples: Bootstrap resamples for the intervals.
        seed: The seed of the resamples.
        cluster: The column of rows that are resampled together, or ``None``.
        labels_are_inputs: Whether scores that read labels are evaluated too, as for texts, whose labels are their
            tokens.
        progress: Called with the fraction of the resamples that is done.
    """
    detectors = [score for score in scores if labels_are_inputs or not score.needs.labels]
    if not detectors:
        if isinstance(results, Path):
            results = read_results(results, columns=["prediction", "label", "finite"])
        rows, notes = rows_of(results, [], roles)
        return Evaluation([], [], [], rows.datasets, [*notes, "all scores read labels: there are no detection metrics"])
    baselines = [score.name for score in detectors if score.recipe.family == "baseline"]
    names = [score.name for score in detectors]
    return evaluate(
        results, names, roles, baselines, resamples=resamples, seed=seed, cluster=cluster, progress=progress
    )

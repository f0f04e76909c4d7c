"""Pictures of an evaluated run: ROC and risk-coverage curves of each task, and distributions of the best scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from lightning_gradmetrics.evaluation import Evaluation
from lightning_gradmetrics.pictures.base import Picture, file_name

__all__ = ["curve_pictures"]

REFERENCE = "max_softmax"
"""The score that is drawn in every picture in addition to the best scores."""

SECTION = "Curves"
AXES = (0.19, 0.13, 0.78, 0.79)
"""The left end, lower end, width and height of the axes, as fractions of the figure; a computed layout takes as long as drawing."""

MOST_SCORES = 4
MOST_DISTRIBUTIONS = 3

Place = tuple[str, str]
"""A task and a dataset."""


def curve_pictures(
    results: pa.Table, evaluation: Evaluation, tasks: Sequence[str] = ("misclassification", "ood", "joint")
) -> list[Picture]:
    """Draw the curves of max softmax and of the best scores of each task, and the distributions of the best scores overall.

    Args:
        results: The per-sample table.
        evaluation: Its evaluation.
        tasks: The tasks to draw.

    Example:
        >>> from lightning_gradmetrics.evaluation import evaluate
        >>> columns = {"dataset": ["test"] * 3, "index": [0, 1, 2], "prediction": [0, 1, 1], "label": [0, 1, 0]}
        >>> table = pa.table({**columns, "entropy": [0.1, 0.3, 0.9], "finite": [True] * 3})
        >>> evaluation = evaluate(table, ["entropy"], {"test": "id"}, resamples=0)
        >>> [picture.name for picture in curve_pictures(table, evaluation)]
        ['roc_misclassification_test', 'risk_coverage_misclassification_test', 'distributions_entropy']
    """
    from lightning_gradmetrics import plot

    roles = evaluation.settings.get("roles", {})
    ranked = _ranked(evaluation, tasks)
    judged = results.filter(pc.is_in(results["dataset"], pa.array(list(roles), pa.string())))
    share = evaluation.settings.get("ood_share", 0.5)
    pictures = []
    for (task, dataset), scores in ranked.items():
        arguments = {"scores": scores, "dataset": dataset, "task": task, "ood_share": share}
        name = file_name(f"{task}_{dataset}")
        caption = f"{dataset}, {task}: max softmax and the best scores."
        pictures.append(_picture(f"roc_{name}", f"ROC: {dataset}, {task}", caption, plot.roc, judged, roles, arguments))
        if task != "ood":
            title = f"Risk and coverage: {dataset}, {task}"
            pictures.append(
                _picture(f"risk_coverage_{name}", title, caption, plot.risk_coverage, judged, roles, arguments)
            )
    for score in _best_of_all(ranked):
        title, caption = f"Distribution of {score}", "One histogram for each kind of sample."
        name = f"distributions_{file_name(score)}"
        pictures.append(_picture(name, title, caption, plot.distributions, judged, roles, {"score": score}))
    return pictures


def _picture(
    name: str, title: str, caption: str, draw: Callable[..., Any], results: pa.Table, roles: Any, arguments: Any
) -> Picture:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8, 3.8))
    FigureCanvasAgg(figure)
    draw(results, roles, ax=figure.add_axes(AXES), **arguments)
    return Picture(name, title, caption, figure, SECTION)


def _ranked(evaluation: Evaluation, tasks: Sequence[str]) -> dict[Place, list[str]]:
    """Return max softmax and the scores with the highest AUROC, for each task on each dataset."""
    values: dict[Place, dict[str, float]] = {}
    for entry in evaluation.metrics:
        is_defined = entry["metric"] == "auroc" and entry["value"] is not None and entry["dataset"] is not None
        if is_defined and entry["task"] in tasks:
            values.setdefault((entry["task"], entry["dataset"]), {})[entry["score"]] = entry["value"]
    ranked = {}
    for task in sorted(values, key=lambda task: tasks.index(task[0])):
        by_score = values[task]
        names = sorted(by_score, key=lambda name: -by_score[name])
        first = [REFERENCE] if REFERENCE in by_score else []
        ranked[task] = list(dict.fromkeys([*first, *names]))[:MOST_SCORES]
    return ranked


def _best_of_all(ranked: dict[Place, list[str]]) -> list[str]:
    """Return a few scores: the best of every task, then the second best of every task, and so on."""
    chosen: dict[str, None] = {}
    for rank in range(MOST_SCORES):
        for scores in ranked.values():
            chosen.update(dict.fromkeys(scores[rank : rank + 1]))
    return list(chosen)[:MOST_DISTRIBUTIONS]

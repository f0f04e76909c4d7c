"""ROC and risk-coverage curves of the tasks of an evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_gradmetrics.evaluation.cells import exact_counts, rank_rows
from lightning_gradmetrics.evaluation.reading import as_table
from lightning_gradmetrics.evaluation.tasks import DetectionTask, rows_of, tasks_of
from lightning_gradmetrics.meters.functional.counts import Counts
from lightning_gradmetrics.meters.functional.curves import roc_of_counts
from lightning_gradmetrics.meters.functional.ranking import auroc_of_counts
from lightning_gradmetrics.meters.functional.selective import aurc_of_counts, risk_coverage_curve_of_counts
from lightning_gradmetrics.pictures.plot.style import TITLE_HEIGHT, Plot, new_axes, score_styles
from lightning_gradmetrics.results.escaping import literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["risk_coverage", "roc"]

TITLES = {
    "misclassification": "{dataset}: incorrect against correct",
    "ood": "{dataset} against in-distribution",
    "joint": "{dataset} and errors against correct",
}


def roc(
    results: Any,
    roles: Mapping[str, str],
    scores: Sequence[str] | None = None,
    *,
    dataset: str | None = None,
    task: str | None = None,
    ood_share: float = 0.5,
    ax: Axes | None = None,
) -> Plot:
    """Plot the ROC curve of each score on one task; the legend lists the areas.

    Args:
        results: A per-sample table, of any kind that :func:`lightning_gradmetrics.evaluation.evaluate` accepts.
        roles: The role of each dataset; ``callback.evaluation.settings["roles"]`` after a run.
        scores: The columns to plot; by default every score.
        dataset: The dataset to plot. It may be omitted if there is only one task.
        task: ``"misclassification"``, ``"ood"`` or ``"joint"``; by default ``"misclassification"`` for in-distribution
            data, and ``"ood"`` otherwise.
        ood_share: The fraction of out-of-distribution samples in the mixture of the joint task.
        ax: Where to draw; by default on a new pyplot figure.

    Returns:
        The axes, and the line of each score by its name.

    Raises:
        ValueError: If a column, a dataset or a task does not exist, or the choice is not unique.

    Example:
        >>> from matplotlib.figure import Figure
        >>> columns = {"dataset": ["test"] * 3, "index": [0, 1, 2], "prediction": [0, 1, 1], "label": [0, 1, 0]}
        >>> table = pa.table({**columns, "entropy": [0.1, 0.3, 0.9]})
        >>> plot = roc(table, {"test": "id"}, ax=Figure().subplots())
        >>> plot.artists["entropy"].get_label()
        'entropy 100.0'
    """
    chosen, curves = _counts(results, roles, scores, dataset, task, ood_share)
    axes = new_axes(ax)
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=0.8, linestyle=":")
    artists = {}
    styles = score_styles(list(curves))
    for name, counts in curves.items():
        false, true, _ = roc_of_counts(counts)
        label = f"{literal(name)} {100 * float(auroc_of_counts(counts)):.1f}"
        (artists[name],) = axes.plot(*_distinct(false, true), label=label, **styles[name])
    axes.set(xlabel="false-positive rate", ylabel="true-positive rate", xlim=(0, 1), ylim=(0, 1.01))
    axes.set_title(TITLES[chosen.task].format(dataset=literal(chosen.dataset)), fontsize="medium", y=TITLE_HEIGHT)
    axes.legend(title="AUROC × 100", fontsize="small", title_fontsize="small", loc="lower right")
    return Plot(axes, artists)


def risk_coverage(
    results: Any,
    roles: Mapping[str, str],
    scores: Sequence[str] | None = None,
    *,
    dataset: str | None = None,
    task: str = "misclassification",
    ood_share: float = 0.5,
    ax: Axes | None = None,
) -> Plot:
    """Plot the error rate of the accepted samples over the fraction that is accepted; the legend lists the areas.

    The vertical axis ends at 1.3 times the error rate without rejection.

    Args:
        results: A per-sample table, of any kind that :func:`lightning_gradmetrics.evaluation.evaluate` accepts.
        roles: The role of each dataset; ``callback.evaluation.settings["roles"]`` after a run.
        scores: The columns to plot; by default every score.
        dataset: The dataset to plot. It may be omitted if there is only one.
        task: ``"misclassification"``, or ``"joint"``, in which accepted out-of-distribution samples count as errors.
        ood_share: The fraction of out-of-distribution samples in the mixture of the joint task.
        ax: Where to draw; by default on a new pyplot figure.

    Returns:
        The axes, and the line of each score by its name.

    Raises:
        ValueError: If a column, a dataset or a task does not exist, or the choice is not unique.

    Example:
        >>> from matplotlib.figure import Figure
        >>> columns = {"dataset": ["test"] * 3, "index": [0, 1, 2], "prediction": [0, 1, 1], "label": [0, 1, 0]}
        >>> table = pa.table({**columns, "entropy": [0.1, 0.3, 0.9]})
        >>> plot = risk_coverage(table, {"test": "id"}, ax=Figure().subplots())
        >>> plot.artists["entropy"].get_ydata().astype(float).round(2).tolist()
        [0.0, 0.0, 0.33]
    """
    if task not in ("misclassification", "joint"):
        raise ValueError(f"task={task!r} has no risk; available: 'misclassification', 'joint'")
    chosen, curves = _counts(results, roles, scores, dataset, task, ood_share)
    axes = new_axes(ax)
    artists, base = {}, 0.0
    styles = score_styles(list(curves))
    for name, counts in curves.items():
        coverage, risk, _ = risk_coverage_curve_of_counts(counts)
        base = float(risk[-1])
        label = f"{literal(name)} {100 * float(aurc_of_counts(counts)):.2f}"
        is_point = coverage > 0  # lower scores belong to rows of other tasks only
        points = _distinct(coverage[is_point], risk[is_point])
        (artists[name],) = axes.plot(*points, label=label, **styles[name])
    axes.axhline(base, color="0.6", linewidth=0.8, linestyle=":")
    axes.set(xlabel="coverage", ylabel="error rate", xlim=(0, 1), ylim=(0, 1.3 * base or 1))
    axes.set_title(TITLES[chosen.task].format(dataset=literal(chosen.dataset)), fontsize="medium", y=TITLE_HEIGHT)
    axes.legend(title="AURC × 100", fontsize="small", title_fontsize="small", loc="upper left")
    return Plot(axes, artists)


def _counts(
    results: Any,
    roles: Mapping[str, str],
    scores: Sequence[str] | None,
    dataset: str | None,
    task: str | None,
    ood_share: float,
) -> tuple[DetectionTask, dict[str, Counts]]:
    """Return the chosen task, and the counts of each score on it."""
    table = as_table(results)
    names = list(scores) if scores is not None else list(score_columns(table))
    rows, _ = rows_of(table, names, roles)
    tasks, _ = tasks_of(rows, ood_share)
    chosen = _chosen(tasks, dataset, task)
    counts = {}
    for name in names:
        counts[name] = exact_counts(rank_rows(rows, name, with_positions=False), chosen)
    return chosen, counts


def _distinct(x: Tensor, y: Tensor) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the points of a curve ``(P,)`` without repeated points, which rows of other tasks cause."""
    changes = (x[1:] != x[:-1]) | (y[1:] != y[:-1])
    keep = torch.cat([changes.new_ones(1), changes])
    return x[keep].numpy(), y[keep].numpy()


def score_columns(table: pa.Table) -> Iterator[str]:
    """Yield the names of the score columns, which contain floating-point numbers."""
    for item in table.schema:
        if pa.types.is_floating(item.type) and item.name not in ("label", "prediction"):
            yield item.name


def _chosen(tasks: Sequence[DetectionTask], dataset: str | None, task: str | None) -> DetectionTask:
    """Return the only task that matches.

    Raises:
        ValueError: If none or several match.
    """
    names = (task,) if task is not None else ("misclassification", "ood")
    possible = [each for each in tasks if each.task in names and each.count_positive and each.count_negative]
    matching = [each for each in possible if dataset in (None, each.dataset)]
    if len(matching) == 1:
        return matching[0]
    choices = ", ".join(f"dataset={each.dataset!r} ({each.task})" for each in possible) or "none"
    problem = "no task matches" if not matching else f"{len(matching)} tasks match"
    empty = [each for each in tasks if each.task in names and dataset in (None, each.dataset) and each not in possible]
    raise ValueError(f"{problem} dataset={dataset!r}, task={task!r}; available: {choices}{_reason(empty)}")


def _reason(empty: Sequence[DetectionTask]) -> str:
    """Return why tasks have no curve, in words."""
    reasons = []
    for each in empty:
        counts = f"{each.count_positive} samples to find and {each.count_negative} others"
        reasons.append(f"{each.task} on {each.dataset!r} has {counts}")
    return f". A curve needs samples of both kinds, but {'; '.join(reasons)}" if reasons else ""

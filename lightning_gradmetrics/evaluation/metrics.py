"""The metrics of each task, as functions of counts: one value, or one a resample."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from lightning_gradmetrics.meters.functional.counts import Counts
from lightning_gradmetrics.meters.functional.ranking import (
    auroc_of_counts,
    average_precision_of_counts,
    fpr_at_tpr_of_counts,
)
from lightning_gradmetrics.meters.functional.selective import augrc_of_counts, aurc_of_counts, e_aurc_of_counts

__all__ = ["HIGHER_IS_BETTER", "TASKS", "logged_metrics", "metrics_of"]

HIGHER_IS_BETTER = {
    "auroc": True,
    "aupr": True,
    "aupr_in": True,
    "fpr95": False,
    "aurc": False,
    "e_aurc": False,
    "augrc": False,
}
"""Every metric, and whether more of it is better. ``fpr95`` is the false-positive rate at ``rate``, by default 0.95."""

TASKS = {
    "misclassification": ("auroc", "aurc", "e_aurc", "augrc", "fpr95", "aupr"),
    "ood": ("auroc", "fpr95", "aupr", "aupr_in"),
}
"""The metrics of each task."""


def metrics_of(task: str, counts: Counts, rate: float) -> dict[str, Tensor]:
    """Every metric of a task.

    Args:
        task: ``"misclassification"`` or ``"ood"``.
        counts: Counts with any leading dimensions ``(...)``.
        rate: The true-positive rate of ``fpr95``; the positives are the errors or the out-of-distribution samples.

    Returns:
        Each metric, ``(...)``; NaN where it is undefined.
    """
    area = aurc_of_counts(counts) if task == "misclassification" else None
    functions: dict[str, Callable[[Counts], Tensor]] = {
        "auroc": auroc_of_counts,
        "aupr": average_precision_of_counts,
        "aupr_in": lambda counts: average_precision_of_counts(counts, "in"),
        "fpr95": lambda counts: fpr_at_tpr_of_counts(counts, rate),
        "aurc": lambda counts: aurc_of_counts(counts) if area is None else area,
        "e_aurc": lambda counts: e_aurc_of_counts(counts, area),
        "augrc": augrc_of_counts,
    }
    return {name: functions[name](counts) for name in TASKS[task]}


def logged_metrics(metrics: Iterable[Mapping[str, Any]], prefix: str) -> dict[str, float]:
    """The defined metrics by their logged names, ``prefix/dataset/score/task_metric``; a group has its role for a data set.

    Args:
        metrics: Those of :class:`~lightning_gradmetrics.evaluation.Evaluation`.
        prefix: What the names begin with.
    """
    return {
        f"{prefix}/{r['dataset'] or r['group']}/{r['score']}/{r['task']}_{r['metric']}": r["value"]
        for r in metrics
        if r["value"] is not None
    }

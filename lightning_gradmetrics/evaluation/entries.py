"""The entries of an evaluation: one dict per score, task, dataset or group, and metric."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from lightning_gradmetrics.evaluation.bootstrap import Key, Replicates
from lightning_gradmetrics.evaluation.comparisons import key_of
from lightning_gradmetrics.evaluation.intervals import auroc_interval, enough_rows, fpr_interval, percentile_interval
from lightning_gradmetrics.evaluation.metrics import MISCLASSIFICATION, TASKS, metrics_of
from lightning_gradmetrics.evaluation.tasks import DetectionTask
from lightning_gradmetrics.meters.functional.counts import Counts

__all__ = ["Entry", "defined_values", "entries_of", "fill_interval", "with_groups"]

Entry = dict[str, Any]


def entries_of(
    counts: Counts, task: DetectionTask, score: str, rate: float, level: float | None, seed: int
) -> list[Entry]:
    """Return the metrics of one score on one task, with the intervals that need no resamples.

    Args:
        counts: The counts of the task ``(G,)``.
        task: The task.
        score: The name of the score.
        rate: The true-positive rate of ``fpr95``.
        level: The level of the intervals; ``None`` for no intervals.
        seed: The seed of the draws of the interval of ``fpr95``.
    """
    members = []
    for metric, value in metrics_of(TASKS[task.task], counts, rate).items():
        entry = _entry(task, score, metric, float(value))
        if level is not None and not task.weights and _has_interval(entry, rate):
            entry["low"], entry["high"] = _exact_interval(metric, counts, rate, level, seed)
        members.append(entry)
    return members


def _entry(task: DetectionTask, score: str, metric: str, value: float) -> Entry:
    return {
        "score": score,
        "task": task.task,
        "dataset": task.dataset,
        "group": task.group,
        "metric": metric,
        "value": None if math.isnan(value) else value,
        "low": None,
        "high": None,
        "count_positive": task.count_positive,
        "count_negative": task.count_negative,
        "count_ood": task.count_ood,
    }


def _has_interval(entry: Entry, rate: float) -> bool:
    return entry["value"] is not None and enough_rows(entry, rate)


def _exact_interval(
    metric: str, counts: Counts, rate: float, level: float, seed: int
) -> tuple[float | None, float | None]:
    if metric == "auroc":
        return auroc_interval(counts, level)
    if metric == "fpr95":
        return fpr_interval(counts, rate, level, seed)
    return None, None


def fill_interval(entry: Entry, replicates: Replicates, level: float, rate: float) -> None:
    """Fill in the interval from the resamples, unless there is one already."""
    if entry["low"] is None and key_of(entry) in replicates and _has_interval(entry, rate):
        entry["low"], entry["high"] = percentile_interval(replicates[key_of(entry)], level)


def defined_values(metrics: Sequence[Entry]) -> dict[Key, float]:
    """Return the value of every metric that is defined."""
    values = {}
    for entry in metrics:
        if entry["value"] is not None:
            values[key_of(entry)] = entry["value"]
    return values


def with_groups(metrics: Sequence[Entry], replicates: Replicates, rate: float) -> tuple[list[Entry], Replicates]:
    """Return the means over the datasets of each group with several, and all replicates including those of the means."""
    groups: dict[tuple[str, str, str, str], list[Entry]] = {}
    for entry in metrics:
        groups.setdefault((entry["task"], entry["group"], entry["score"], entry["metric"]), []).append(entry)
    means, all_replicates = [], dict(replicates)
    for members in groups.values():
        if len(members) > 1:
            mean = _mean_entry(members)
            means.append(mean)
            if replicates and all(enough_rows(member, rate) for member in members):
                total = torch.stack([replicates[key_of(member)] for member in members])
                all_replicates[key_of(mean)] = total.mean(0)
    return means, all_replicates


def _mean_entry(members: Sequence[Entry]) -> Entry:
    first, values = members[0], [member["value"] for member in members]
    negatives = [member["count_negative"] for member in members]
    ood = sum(member["count_ood"] or 0 for member in members) or None
    return {
        **first,
        "dataset": None,
        "value": None if None in values else sum(values) / len(values),
        "low": None,
        "high": None,
        "count_positive": sum(member["count_positive"] for member in members),
        "count_negative": sum(negatives) if first["task"] == MISCLASSIFICATION else negatives[0],
        "count_ood": ood,
    }

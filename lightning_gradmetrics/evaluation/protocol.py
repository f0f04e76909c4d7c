"""The protocol: what a table of per-sample scores says, with intervals, comparisons and words."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from lightning_gradmetrics.evaluation.bootstrap import Key, Replicates, interval, replicate
from lightning_gradmetrics.evaluation.comparisons import compare, statements_of
from lightning_gradmetrics.evaluation.metrics import HIGHER_IS_BETTER, TASKS, metrics_of
from lightning_gradmetrics.evaluation.tasks import DetectionTask, rows_of, tasks_of
from lightning_gradmetrics.evaluation.thresholds import Thresholds, apply_thresholds, fit_thresholds
from lightning_gradmetrics.meters.functional.counts import check_rate, count

__all__ = [
    "HIGHER_IS_BETTER",
    "TASKS",
    "Evaluation",
    "Thresholds",
    "apply_thresholds",
    "evaluate",
    "fit_thresholds",
]

FEW = 10
"""Below so many samples of a class, a note says that intervals are rough."""


@dataclass(frozen=True)
class Evaluation:
    """What a results table says about its scores.

    Args:
        metrics: One dict per number: ``score``, ``task`` (``"misclassification"`` or ``"ood"``), ``dataset`` (``None`` for
            a whole group), ``group`` (the role), ``metric``, ``value``, ``low`` and ``high`` (the bootstrap interval,
            ``None`` without one), ``count_positive``, ``count_negative``. An undefined value is ``None``.
        comparisons: One dict a score that is no baseline, place and metric: its difference to the best baseline with
            its interval and ``verdict``; see :func:`~lightning_gradmetrics.evaluation.comparisons.compare`.
        statements: For each task and data set or group, which scores beat the best baseline, which do not, and where
            the data cannot tell.
        datasets: One dict a data set: ``name``, ``role``, ``rows``, ``not_finite``, ``labelled``, ``accuracy``.
        notes: Sentences on what was left out or is undefined, and why.
        settings: The arguments that the numbers depend on.
    """

    metrics: list[dict[str, Any]]
    comparisons: list[dict[str, Any]]
    statements: list[str]
    datasets: list[dict[str, Any]]
    notes: list[str]
    settings: dict[str, Any] = field(default_factory=dict)

    def find(self, **where: Any) -> list[dict[str, Any]]:
        """The metrics that have all these values, such as ``score="entropy", metric="auroc"``."""
        return [record for record in self.metrics if all(record[key] == value for key, value in where.items())]

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, dicts, strings and numbers, ready for JSON."""
        return asdict(self)

    def to_json(self) -> str:
        """The evaluation as JSON text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Evaluation:
        """The evaluation that :meth:`to_dict` came from."""
        return cls(**values)


def evaluate(
    results: pa.Table,
    scores: Sequence[str],
    roles: Mapping[str, str],
    baselines: Sequence[str] = (),
    *,
    rate: float = 0.95,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> Evaluation:
    """Judge scores on a per-sample results table.

    Misclassification is judged on each in-distribution data set, errors being positive. Out-of-distribution detection is
    judged on every other data set, its rows being positive and the rows of all in-distribution data sets negative. A
    group with several data sets also gets the mean over them, each set weighing the same. Labels of
    out-of-distribution data are not used.

    Intervals are percentile bootstrap intervals: each data set is resampled with replacement, and all scores are
    judged on the same resamples. They say how much the numbers would vary with other test samples; not with another
    training run. The comparison with the best baseline chooses that baseline anew in each resample, which leans
    against the compared score (:func:`~lightning_gradmetrics.evaluation.comparisons.compare`). Nothing is corrected
    for the number of comparisons.

    Args:
        results: Columns ``dataset``, ``index``, ``prediction``, ``label`` (null where unknown), one a score, and
            ``finite`` (rows where it is false enter no metric).
        scores: The columns to judge, higher = more uncertain.
        roles: Each data set's role: ``"id"`` for in-distribution data, any other word for a group of
            out-of-distribution data.
        baselines: Those of ``scores`` that use no gradient.
        rate: The true-positive rate of ``fpr95``.
        resamples: The number of bootstrap resamples; 0 for no intervals and no comparisons.
        level: The level of the intervals.
        seed: The seed of the resamples.
        progress: Called with the share of the resamples that is done.

    Returns:
        Metrics, comparisons, statements, data sets and notes.

    Raises:
        ValueError: If a column, a role or a score is missing, an argument is out of range, or a row appears twice.

    Example:
        >>> columns = {"dataset": ["test"] * 3, "index": [0, 1, 2], "prediction": [0, 1, 1], "label": [0, 1, 0]}
        >>> table = pa.table({**columns, "entropy": [0.1, 0.3, 0.9], "finite": [True] * 3})
        >>> evaluation = evaluate(table, ["entropy"], {"test": "id"}, baselines=["entropy"])
        >>> evaluation.find(metric="auroc")[0]["value"]
        1.0
    """
    _check(scores, baselines, rate, resamples, level)
    rows, notes = rows_of(results, list(scores), roles)
    tasks, more = tasks_of(rows)
    records = []
    for task in tasks:
        for score in scores:
            counts = count(task.values(rows, score), task.target)
            for metric, value in metrics_of(task.task, counts, rate).items():
                records.append(_record(task, score, metric, value))
    replicates = replicate(rows, tasks, scores, rate, resamples, seed, progress) if resamples else {}
    means, replicates = _with_groups(records, replicates)
    records = [_with_interval(record, replicates, level) for record in (*records, *means)]
    comparisons = compare(records, replicates, baselines, level) if resamples else []
    settings = {
        "scores": list(scores),
        "baselines": list(baselines),
        "roles": dict(roles),
        "rate": rate,
        "resamples": resamples,
        "level": level,
        "seed": seed,
    }
    return Evaluation(
        metrics=records,
        comparisons=comparisons,
        statements=statements_of(comparisons, level),
        datasets=[part.summary() for part in rows.values()],
        notes=notes + more + _protocol_notes(tasks, scores, baselines, resamples),
        settings=settings,
    )


def _check(scores: Sequence[str], baselines: Sequence[str], rate: float, resamples: int, level: float) -> None:
    if isinstance(scores, str) or not scores:
        raise ValueError(f"scores must be a list of at least one column name, got {scores!r}")
    if unknown := [name for name in baselines if name not in scores]:
        raise ValueError(f"the baselines {unknown} are not among the scores: {', '.join(scores)}")
    if not isinstance(resamples, int) or isinstance(resamples, bool) or resamples < 0:
        raise ValueError(f"resamples must be a whole number of at least 0, got {resamples!r}")
    check_rate(rate, "rate")
    if check_rate(level, "level") == 1:
        raise ValueError("level must be below 1: an interval that always holds says nothing; try 0.95")


def _protocol_notes(
    tasks: Sequence[DetectionTask], scores: Sequence[str], baselines: Sequence[str], resamples: int
) -> list[str]:
    notes = []
    if not baselines:
        notes.append("no baselines were named: scores are not compared with any")
    elif not resamples and set(scores) - set(baselines):
        notes.append("no resamples were asked for: there are no intervals and no comparisons with the baselines")
    for task in tasks if resamples else []:
        positive = int(task.target.sum())
        fewest = min(positive, len(task.target) - positive)
        if 0 < fewest < FEW:
            side = "positive" if fewest == positive else "negative"
            notes.append(f'only {fewest} {side} samples for {task.task} on "{task.dataset}": intervals are rough')
    return notes


def _with_groups(
    records: Sequence[Mapping[str, Any]], replicates: Replicates
) -> tuple[list[dict[str, Any]], Replicates]:
    """The mean over the data sets of each group that has several: its records, and all replicates with its own."""
    gathered: dict[tuple[str, str, str, str], list[Mapping[str, Any]]] = {}
    for record in records:
        gathered.setdefault((record["task"], record["group"], record["score"], record["metric"]), []).append(record)
    gathered = {place: members for place, members in gathered.items() if len(members) > 1}
    means: Replicates = {
        (task, None, group, score, metric): torch.stack([replicates[_key(member)] for member in members]).mean(0)
        for (task, group, score, metric), members in gathered.items()
        if replicates
    }
    return [_mean_record(members) for members in gathered.values()], {**replicates, **means}


def _key(record: Mapping[str, Any]) -> Key:
    return record["task"], record["dataset"], record["group"], record["score"], record["metric"]


def _with_interval(record: Mapping[str, Any], replicates: Replicates, level: float) -> dict[str, Any]:
    if record["value"] is None or _key(record) not in replicates:
        return dict(record)
    low, high = interval(replicates[_key(record)], level)
    return {**record, "low": low, "high": high}


def _record(task: DetectionTask, score: str, metric: str, number: Tensor) -> dict[str, Any]:
    value, positive = float(number), int(task.target.sum())
    return {
        "score": score,
        "task": task.task,
        "dataset": task.dataset,
        "group": task.group,
        "metric": metric,
        "value": None if math.isnan(value) else value,
        "low": None,
        "high": None,
        "count_positive": positive,
        "count_negative": len(task.target) - positive,
    }


def _mean_record(members: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    first, values = members[0], [member["value"] for member in members]
    defined = None not in values
    return {
        **first,
        "dataset": None,
        "value": sum(values) / len(values) if defined else None,
        "count_positive": sum(member["count_positive"] for member in members),
        "count_negative": members[0]["count_negative"]
        if members[0]["task"] == "ood"
        else sum(m["count_negative"] for m in members),
    }

"""Evaluate a table of per-sample scores: metrics, intervals, comparisons and statements."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from lightning_gradmetrics.evaluation.bootstrap import CELLS, Replicates, method_of, most_cells, replicate
from lightning_gradmetrics.evaluation.cells import Cells, RankedRows, exact_counts, make_cells, rank_rows
from lightning_gradmetrics.evaluation.comparisons import compare, key_of
from lightning_gradmetrics.evaluation.intervals import (
    FEWEST,
    FEWEST_SPARE,
    auroc_interval,
    enough_rows,
    fpr_interval,
    percentile_interval,
)
from lightning_gradmetrics.evaluation.metrics import MISCLASSIFICATION, metrics_of
from lightning_gradmetrics.evaluation.record import Evaluation
from lightning_gradmetrics.evaluation.statements import statements_of
from lightning_gradmetrics.evaluation.tasks import KINDS, DetectionTask, Rows, rows_of, tasks_of
from lightning_gradmetrics.meters.functional.counts import Counts, check_rate

__all__ = ["evaluate"]

BASELINE = "max_softmax"
"""The default baseline that scores are compared with."""

Entry = dict[str, Any]


def evaluate(
    results: Any,
    scores: Sequence[str],
    roles: Mapping[str, str],
    baselines: Sequence[str] = (),
    *,
    baseline: str | None = None,
    rate: float = 0.95,
    ood_share: float = 0.5,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    cluster: str | None = None,
    progress: Callable[[float], None] | None = None,
) -> Evaluation:
    """Evaluate scores on a per-sample results table: metrics, intervals and comparisons.

    There are three tasks. *Misclassification*, on each in-distribution dataset: incorrect rows (positive) against
    correct ones. *OOD*, on every other dataset: its rows (positive) against all in-distribution rows. *Joint*, on every
    other dataset: its rows and the incorrect in-distribution rows (positive) against correct in-distribution rows, in a
    mixture with the fraction ``ood_share`` of out-of-distribution rows. A group of several datasets also gets the mean
    over them, with equal weights. Labels of out-of-distribution data are ignored.

    Intervals show how much the numbers would vary with other test samples, not with another training run. AUROC has
    DeLong's interval on the logit scale, ``fpr95`` an interval from order statistics, and everything else percentiles
    of bootstrap resamples, which all scores share. With too few rows, no interval is computed. Up to 5,000 rows the
    bootstrap is exact; above, rows get Poisson weights and scores are grouped into cells, as ``settings["bootstrap"]``
    states. There is no correction for the number of comparisons.

    Args:
        results: Columns ``dataset``, ``index``, ``prediction``, ``label`` (null where unknown), one per score, and
            ``finite`` (rows where it is false are left out of all metrics), as an Arrow table, record batches or
            dataset, or a
            pandas or Polars data frame.
        scores: The columns to evaluate, higher = more uncertain.
        roles: Each dataset's role: ``"id"`` for in-distribution data, any other word for a group of
            out-of-distribution data.
        baselines: The elements of ``scores`` that use no gradient.
        baseline: The score that all others are compared with; by default ``max_softmax`` if it is among the scores,
            else the first of ``baselines``.
        rate: The true-positive rate of ``fpr95``.
        ood_share: The fraction of out-of-distribution rows in the mixture of the joint task, in (0, 1).
        resamples: The number of bootstrap resamples; 0 for no intervals and no comparisons.
        level: The level of the intervals.
        seed: The seed of the resamples.
        progress: Called with the fraction of the resamples that is done.

    Returns:
        Metrics, comparisons, statements, datasets and notes.

    Raises:
        TypeError: If the results are of an unknown kind.
        ValueError: If a column, a role or a score is missing, an argument is out of range, or a row appears twice.

    Example:
        >>> import pyarrow as pa
        >>> columns = {"dataset": ["test"] * 3, "index": [0, 1, 2], "prediction": [0, 1, 1], "label": [0, 1, 0]}
        >>> table = pa.table({**columns, "entropy": [0.1, 0.3, 0.9], "finite": [True] * 3})
        >>> evaluation = evaluate(table, ["entropy"], {"test": "id"}, baselines=["entropy"])
        >>> evaluation.find(metric="auroc")[0]["value"]
        1.0

    Reference:
        Jaeger et al.: A Call to Reflect on Evaluation Practices for Failure Detection in Image Classification,
        ICLR 2023.
    """
    _check(scores, baselines, baseline, rate, ood_share, resamples, level)
    rows, notes = rows_of(results, list(scores), roles, cluster)
    tasks, more_notes = tasks_of(rows, ood_share)
    few = _few_clusters(rows)
    if few and resamples:
        resamples, more_notes = 0, [*more_notes, *few]
    metrics, cells = _metrics(rows, tasks, rate, level if resamples else None, seed)
    replicates: Replicates = {}
    if resamples:
        exact = _defined(metrics)
        replicates = replicate(rows, cells, tasks, rate, resamples, seed, exact, progress)
    means, replicates = _with_groups(metrics, replicates, rate)
    metrics += means
    for entry in metrics:
        _fill_interval(entry, replicates, level, rate)
    named = _baseline(scores, baselines, baseline)
    comparisons = []
    if resamples and named is not None:
        comparisons = compare(metrics, replicates, named, baselines, level, rate)
    settings = {
        "scores": list(scores),
        "baselines": list(baselines),
        "baseline": named,
        "roles": dict(roles),
        "rate": rate,
        "ood_share": ood_share,
        "resamples": resamples,
        "level": level,
        "seed": seed,
        "bootstrap": _bootstrap(len(rows.codes), cluster) if resamples else None,
    }
    return Evaluation(
        metrics=metrics,
        comparisons=comparisons,
        statements=statements_of(comparisons, level),
        datasets=rows.datasets,
        notes=notes + more_notes + _protocol_notes(tasks, scores, named, resamples, rate),
        settings=settings,
    )


def _check(
    scores: Sequence[str],
    baselines: Sequence[str],
    baseline: str | None,
    rate: float,
    ood_share: float,
    resamples: int,
    level: float,
) -> None:
    if isinstance(scores, str) or not scores:
        raise ValueError(f"scores must be a list of at least one column name, got {scores!r}")
    named = [*baselines, *([] if baseline is None else [baseline])]
    if unknown := [name for name in named if name not in scores]:
        raise ValueError(f"the baselines {unknown} are not among the scores: {', '.join(scores)}")
    if not isinstance(resamples, int) or isinstance(resamples, bool) or resamples < 0:
        raise ValueError(f"resamples must be a whole number of at least 0, got {resamples!r}")
    check_rate(rate, "rate")
    if check_rate(level, "level") == 1:
        raise ValueError("level must be between 0 and 1, e.g. 0.95")
    if check_rate(ood_share, "ood_share") == 1:
        raise ValueError("ood_share must be between 0 and 1, e.g. 0.5")


def _baseline(scores: Sequence[str], baselines: Sequence[str], baseline: str | None) -> str | None:
    """Return the score that all others are compared with."""
    if baseline is not None:
        return baseline
    if BASELINE in scores:
        return BASELINE
    return baselines[0] if baselines else None


def _few_clusters(rows: Rows) -> list[str]:
    """Return notes on the datasets that have too few clusters for intervals."""
    notes = []
    if rows.clusters is not None:
        for summary in rows.datasets:
            codes = torch.tensor(rows.codes_of(*KINDS, dataset=summary["name"]), dtype=torch.uint8)
            count = len(rows.clusters[torch.isin(rows.codes, codes)].unique())  # type: ignore[no-untyped-call]
            if 0 < count < FEWEST:
                notes.append(f'dataset "{summary["name"]}" has {count} clusters: no intervals below {FEWEST}')
    return notes


def _bootstrap(rows: int, cluster: str | None) -> str:
    if cluster is not None:
        return f"clusters: whole clusters ({cluster}) of each dataset resampled"
    if method_of(rows) == "exact":
        return "exact: each dataset resampled with replacement"
    return f"poisson: Poisson weights of the rows, scores grouped into {CELLS} cells"


def _metrics(
    rows: Rows, tasks: Sequence[DetectionTask], rate: float, level: float | None, seed: int
) -> tuple[list[Entry], dict[str, Cells]]:
    """Return the exact metrics with the intervals that need no resamples, and, given a level, each score's cells."""
    entries: dict[tuple[int, str], list[Entry]] = {}
    cells = {}
    most = most_cells(len(rows.codes))
    for score in rows.scores:
        ranked = rank_rows(rows, score)
        for number, task in enumerate(tasks):
            own_level = level if rows.clusters is None else None
            entries[number, score] = _exact_entries(ranked, task, score, rate, own_level, seed)
        if level is not None:
            cells[score] = make_cells(ranked, most, tasks, rate)
    ordered_entries = []
    for number in range(len(tasks)):
        for score in rows.scores:
            ordered_entries += entries[number, score]
    return ordered_entries, cells


def _exact_entries(
    ranked: RankedRows, task: DetectionTask, score: str, rate: float, level: float | None, seed: int
) -> list[Entry]:
    counts = exact_counts(ranked, task)
    members = []
    for metric, value in metrics_of(task.task, counts, rate).items():
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


def _fill_interval(entry: Entry, replicates: Replicates, level: float, rate: float) -> None:
    """Fill in the interval from the resamples, unless there is one already."""
    if entry["low"] is None and key_of(entry) in replicates and _has_interval(entry, rate):
        entry["low"], entry["high"] = percentile_interval(replicates[key_of(entry)], level)


def _defined(metrics: Sequence[Entry]) -> dict[Any, float]:
    values = {}
    for entry in metrics:
        if entry["value"] is not None:
            values[key_of(entry)] = entry["value"]
    return values


def _protocol_notes(
    tasks: Sequence[DetectionTask], scores: Sequence[str], baseline: str | None, resamples: int, rate: float
) -> list[str]:
    notes = []
    if baseline is None:
        notes.append("no baseline: scores are not compared; pass baseline=, or score max_softmax too")
    elif not resamples and len(scores) > 1:
        notes.append(f"resamples is 0: there are no intervals and no comparisons with {baseline}")
    for task in tasks if resamples else []:
        notes += _few_rows_notes(task, rate)
    return notes


def _few_rows_notes(task: DetectionTask, rate: float) -> list[str]:
    """Return notes on the intervals for which a task has too few rows."""
    positives, negatives = task.count_positive, task.count_negative
    side = "positive"
    if task.count_ood is not None and task.count_ood < positives:
        positives, side = task.count_ood, "out-of-distribution"
    if not min(positives, negatives):
        return []
    where = f'{task.task} on "{task.dataset}"'
    if negatives < min(positives, FEWEST):
        return [f"{where} has {negatives} negative samples: no intervals below {FEWEST}"]
    if positives < FEWEST:
        return [f"{where} has {positives} {side} samples: no intervals below {FEWEST}"]
    needed = math.ceil(FEWEST_SPARE / (1 - rate) - 1e-9) if rate < 1 else 0
    if positives < needed:
        return [f"{where} has {positives} {side} samples: no interval of fpr95 below {needed}"]
    return []


def _with_groups(metrics: Sequence[Entry], replicates: Replicates, rate: float) -> tuple[list[Entry], Replicates]:
    """Add the mean over the datasets of each group of several to the metrics and to the replicates."""
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

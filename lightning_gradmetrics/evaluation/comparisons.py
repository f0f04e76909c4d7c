"""Compares every score with one baseline, chosen in advance, by paired intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lightning_gradmetrics.evaluation.bootstrap import Key, Replicates
from lightning_gradmetrics.evaluation.intervals import enough_rows, percentile_interval
from lightning_gradmetrics.evaluation.metrics import HIGHER_IS_BETTER

__all__ = ["BETTER", "CANNOT_TELL", "WORSE", "compare", "key_of", "verdict_of"]

Entry = Mapping[str, Any]
BETTER, WORSE, CANNOT_TELL = "better", "worse", "cannot tell"
PLACE = ("task", "dataset", "group", "metric")


def compare(
    metrics: Sequence[Entry],
    replicates: Replicates,
    baseline: str,
    baselines: Sequence[str],
    level: float,
    rate: float,
) -> list[dict[str, Any]]:
    """Compare every other score with the baseline, for every task, dataset or group, and metric.

    The interval is computed from the paired differences in the resamples. Intervals are not corrected for the number of
    scores. A second, *max-adjusted* verdict compares each score that is not a baseline with the best of all baselines
    in each resample. It is biased against the score, and more so with more baselines: with 12 equally good baselines,
    it calls an equally good score worse in half of all runs.

    Args:
        metrics: The metrics of all scores, as in :class:`~lightning_gradmetrics.evaluation.record.Evaluation`.
        replicates: Their values in each resample.
        baseline: The score to compare with.
        baselines: All baselines, for the max-adjusted verdict.
        level: The level of the intervals.
        rate: The true-positive rate of ``fpr95``.

    Returns:
        One dict per comparison: ``score``, ``baseline``, ``task``, ``dataset``, ``group``, ``metric``, ``value``,
        ``baseline_value``, ``difference`` (``value - baseline_value`` for every metric), ``low`` and ``high``
        (the interval of the difference), ``verdict`` (``"better"``, ``"worse"`` or ``"cannot tell"``, from the interval
        and the metric's direction), ``best_baseline`` (the best on the data), ``max_adjusted_low``,
        ``max_adjusted_high`` and ``max_adjusted_verdict`` (``None`` for a baseline).
    """
    values: dict[Key, float] = {}
    for entry in metrics:
        if entry["value"] is not None:
            values[key_of(entry)] = entry["value"]
    comparisons = []
    for entry in metrics:
        key = key_of(entry)
        baseline_key = key_of({**entry, "score": baseline})
        if entry["score"] == baseline or key not in values or baseline_key not in values:
            continue
        low, high = _difference(entry, replicates, key, [baseline_key], level, rate)
        comparison = {
            "score": entry["score"],
            "baseline": baseline,
            **{name: entry[name] for name in PLACE},
            "value": values[key],
            "baseline_value": values[baseline_key],
            "difference": values[key] - values[baseline_key],
            "low": low,
            "high": high,
            "verdict": verdict_of(entry["metric"], low, high),
        }
        comparisons.append({**comparison, **_max_adjusted(entry, values, replicates, baselines, level, rate)})
    return comparisons


def _max_adjusted(
    entry: Entry,
    values: Mapping[Key, float],
    replicates: Replicates,
    baselines: Sequence[str],
    level: float,
    rate: float,
) -> dict[str, Any]:
    """Return the comparison with the best of the baselines in each resample."""
    sign = 1 if HIGHER_IS_BETTER[entry["metric"]] else -1
    rivals = {}
    for name in baselines:
        key = key_of({**entry, "score": name})
        if key in values:
            rivals[name] = key
    if not rivals or entry["score"] in baselines:
        names = ("best_baseline", "max_adjusted_low", "max_adjusted_high", "max_adjusted_verdict")
        return dict.fromkeys(names)
    best = max(rivals, key=lambda name: sign * values[rivals[name]])
    low, high = _difference(entry, replicates, key_of(entry), list(rivals.values()), level, rate)
    return {
        "best_baseline": best,
        "max_adjusted_low": low,
        "max_adjusted_high": high,
        "max_adjusted_verdict": verdict_of(entry["metric"], low, high),
    }


def _difference(
    entry: Entry, replicates: Replicates, key: Key, others: Sequence[Key], level: float, rate: float
) -> tuple[float | None, float | None]:
    """Return the interval of the difference to the best of the others; ``None`` with too few rows."""
    if key not in replicates or not enough_rows(entry, rate):
        return None, None
    sign = 1 if HIGHER_IS_BETTER[entry["metric"]] else -1
    best = sign * replicates[others[0]]
    for rival in others[1:]:
        best = torch.maximum(best, sign * replicates[rival])
    return percentile_interval(replicates[key] - sign * best, level)


def key_of(entry: Entry) -> Key:
    """Return the key of a metric in the replicates."""
    return entry["task"], entry["dataset"], entry["group"], entry["score"], entry["metric"]


def verdict_of(metric: str, low: float | None, high: float | None) -> str:
    """Return ``"better"``, ``"worse"`` or ``"cannot tell"`` from the interval of a difference of a metric.

    Example:
        >>> verdict_of("auroc", 0.01, 0.02), verdict_of("fpr95", 0.01, 0.02), verdict_of("fpr95", -0.01, 0.02)
        ('better', 'worse', 'cannot tell')
    """
    if low is None or high is None or low <= 0 <= high:
        return CANNOT_TELL
    return BETTER if (low > 0) == HIGHER_IS_BETTER[metric] else WORSE

"""Intervals of metrics: DeLong for AUROC, order statistics for FPR at TPR, percentiles of resamples for the rest."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_gradmetrics.meters.functional.counts import Counts, dot
from lightning_gradmetrics.meters.functional.ranking import auroc_of_counts

__all__ = ["FEWEST", "FEWEST_SPARE", "auroc_interval", "enough_rows", "fpr_interval", "percentile_interval"]

Interval = tuple[float | None, float | None]

FEWEST = 10
"""No interval is computed with fewer positives or negatives, because its coverage would be too low."""

FEWEST_SPARE = 3
"""An interval of the FPR at a TPR needs this number of positives below the threshold, which is 60 positives at 95 %."""

DRAWS = 4000


def enough_rows(entry: Mapping[str, Any], rate: float) -> bool:
    """Return whether there are enough rows for an interval of a metric.

    Args:
        entry: An entry of the evaluation's metrics.
        rate: The true-positive rate of ``fpr95``.

    Example:
        >>> entry = {"metric": "auroc", "count_positive": 20, "count_negative": 500, "count_ood": None}
        >>> enough_rows(entry, 0.95), enough_rows({**entry, "metric": "fpr95"}, 0.95)
        (True, False)
    """
    positives = entry["count_positive"]
    if entry["count_ood"] is not None:
        positives = min(positives, entry["count_ood"])
    if min(positives, entry["count_negative"]) < FEWEST:
        return False
    return entry["metric"] != "fpr95" or rate == 1 or positives * (1 - rate) > FEWEST_SPARE - 1e-9


def percentile_interval(values: Tensor, level: float) -> Interval:
    """Return the percentile interval of replicates ``(B,)``; ``None`` if fewer than half of them are defined.

    Example:
        >>> percentile_interval(torch.arange(101.0), 0.5)
        (25.0, 75.0)
    """
    defined = values[~torch.isnan(values)]
    if 2 * len(defined) < len(values) or not len(defined):
        return None, None
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.quantile(defined.double(), tails)
    return float(low), float(high)


def auroc_interval(counts: Counts, level: float) -> Interval:
    """Return DeLong's interval of the AUROC on the logit scale.

    If the classes do not overlap, the variance is 0. The lower end is then the AUROC at which ``min(n_1, n_0)``
    independent pairs are all ranked correctly with probability ``(1 - level) / 2``.

    Args:
        counts: Counts ``(G,)``.
        level: The level of the interval.

    Returns:
        The ends, or ``None`` if the AUROC is undefined.

    Example:
        >>> from lightning_gradmetrics.meters.functional.counts import count
        >>> scores, target = torch.arange(40.0), torch.arange(40) % 8 > 3
        >>> [round(end, 3) for end in auroc_interval(count(scores, target), 0.95)]
        [0.415, 0.76]

    Reference:
        DeLong, DeLong, Clarke-Pearson: Comparing the Areas under Two or More Correlated Receiver Operating
        Characteristic Curves, Biometrics 1988. Qin, Hotilovac: Comparison of Non-parametric Confidence Intervals for the
        Area under the ROC Curve of a Continuous-scale Diagnostic Test, Statistical Methods in Medical Research 2008.
    """
    area = float(auroc_of_counts(counts))
    if math.isnan(area):
        return None, None
    fewest = min(float(counts.positives), float(counts.negatives))
    if area in (0.0, 1.0):
        end = ((1 - level) / 2) ** (1 / fewest)
        return (end, 1.0) if area == 1 else (0.0, 1 - end)
    half = NormalDist().inv_cdf((1 + level) / 2) * math.sqrt(delong_variance(counts)) / (area * (1 - area))
    centre = math.log(area / (1 - area))
    return _sigmoid(centre - half), _sigmoid(centre + half)


def delong_variance(counts: Counts) -> float:
    """Return DeLong's estimate of the variance of the AUROC."""
    hits, false = counts.at_positives, counts.at_negatives
    positives, negatives = counts.positives, counts.negatives
    below = (hits.negatives_to - hits.negative / 2) / negatives
    above = (positives - false.positives_to + false.positive / 2) / positives
    return float(_variance(below, hits.positive) / positives + _variance(above, false.negative) / negatives)


def _variance(values: Tensor, number: Tensor) -> Tensor:
    """Return the unbiased variance of values, given how often each occurs."""
    total = number.sum()
    mean = dot(values, number) / total
    return dot((values - mean).square(), number) / (total - 1).clamp(min=1)


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value > -700 else 0.0


def fpr_interval(counts: Counts, rate: float, level: float, seed: int) -> Interval:
    """Return an interval of the false-positive rate at a true-positive rate.

    The number of positives below the true threshold is binomial, which yields draws of the threshold; given the
    threshold, the false-positive rate has Jeffreys' beta distribution. The interval is that of the draws.

    Args:
        counts: Counts ``(G,)``.
        rate: The true-positive rate.
        level: The level of the interval.
        seed: The seed of the draws.

    Returns:
        The ends, or ``None`` if a class is missing.

    Example:
        >>> from lightning_gradmetrics.meters.functional.counts import count
        >>> scores, target = torch.arange(400.0), torch.arange(400) % 8 > 3
        >>> low, high = fpr_interval(count(scores, target), 0.95, 0.95, 0)
        >>> low < 0.95 < high
        True
    """
    positives, negatives = int(counts.positives), int(counts.negatives)
    if not positives or not negatives:
        return None, None
    generator = np.random.default_rng(seed)
    spare = np.minimum(generator.binomial(positives, 1 - rate, DRAWS), positives - 1)
    index = np.searchsorted(counts.positives_to.numpy(), spare, side="right")
    false = counts.negatives_from.numpy()[index]
    draws = generator.beta(false + 0.5, negatives - false + 0.5)
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)

"""Metrics that measure how well scores rank positives above negatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import torch
from torch import Tensor

from lightning_gradmetrics.meters.functional.counts import (
    Counts,
    Positive,
    announce_undefined,
    check_rate,
    check_scores,
    check_target,
    count,
    dot,
    flip,
)

__all__ = [
    "BOTH",
    "auroc",
    "auroc_of_counts",
    "average_precision",
    "average_precision_of_counts",
    "check_positive",
    "fpr_at_tpr",
    "fpr_at_tpr_of_counts",
    "oscr",
    "oscr_of_counts",
    "oscr_samples",
]

BOTH = "at least one sample of each class"
TINY = torch.finfo(torch.float64).tiny


def check_positive(positive: Positive) -> Positive:
    """Return the name of the positive class, checked.

    Raises:
        ValueError: If it is neither ``"out"`` nor ``"in"``.
    """
    if positive not in get_args(Positive):
        raise ValueError(
            f"positive must be 'out' (target 1: error, out-of-distribution) or 'in' (target 0), got {positive!r}"
        )
    return positive


def auroc(scores: Tensor, target: Tensor) -> Tensor:
    r"""Area under the ROC curve: the probability that a positive scores above a negative, with ties counted as one half.

    Args:
        scores: ``(N,)``, higher = more uncertain, any scale and sign, including infinities; NaN is refused.
        target: ``(N,)``, 1 = an error or out-of-distribution, 0 = any other sample.

    Returns:
        A scalar in [0, 1]. NaN with a UserWarning if a class is missing.

    Raises:
        ValueError: If a shape or a value is wrong.

    Example:
        >>> auroc(torch.tensor([20.0, 60.0, -3.0, 20.0]), torch.tensor([0, 1, 0, 1]))
        tensor(0.8750)
    """
    return announce_undefined(auroc_of_counts(count(scores, target)), "AUROC", BOTH)


def auroc_of_counts(counts: Counts) -> Tensor:
    """Return the AUROC of counts, ``(...)``; NaN if a class is missing."""
    return counts.pairs / (counts.positives * counts.negatives)


def average_precision(scores: Tensor, target: Tensor, positive: Positive = "out") -> Tensor:
    r"""Average precision: ``sum_k (R_k - R_{k-1}) P_k`` over the distinct thresholds.

    Args:
        scores: ``(N,)``, higher = more uncertain, any scale and sign, including infinities; NaN is refused.
        target: ``(N,)``, 1 = an error or out-of-distribution, 0 = any other sample.
        positive: ``"out"``: target 1 is positive and is detected by high scores; ``"in"``: target 0 is positive and is
            detected by low scores.

    Returns:
        A scalar in [0, 1]. NaN with a UserWarning if there is no positive.

    Raises:
        ValueError: If a shape or a value is wrong.

    Example:
        >>> scores, target = torch.tensor([20.0, 60.0, -3.0]), torch.tensor([1, 0, 0])
        >>> average_precision(scores, target), average_precision(scores, target, positive="in")
        (tensor(0.5000), tensor(0.8333))
    """
    value = average_precision_of_counts(count(scores, target), check_positive(positive))
    return announce_undefined(value, "average precision", f"at least one positive sample (positive={positive!r})")


def average_precision_of_counts(counts: Counts, positive: Positive = "out") -> Tensor:
    """Return the average precision of counts, ``(...)``; NaN without a positive."""
    if positive == "in":
        return _once(counts, "precision_in", _precision_in) / counts.negatives
    return _once(counts, "precision", _precision) / counts.positives


def _once(counts: Counts, name: str, function: Callable[[Counts], Tensor]) -> Tensor:
    if name not in counts.known:
        counts.known[name] = function(counts)
    return counts.known[name]


def _precision(counts: Counts) -> Tensor:
    """Return the total over all positives of the precision at their scores."""
    sums = counts.at_positives
    hits = (counts.positives[..., None] - sums.positives_to).add_(sums.positive)
    false = (counts.negatives[..., None] - sums.negatives_to).add_(sums.negative)
    return dot(sums.positive, hits / false.add_(hits).clamp_(min=TINY))


def _precision_in(counts: Counts) -> Tensor:
    """Return the total over all negatives of the precision at their scores."""
    sums = counts.at_negatives
    return dot(sums.negative, sums.negatives_to / (sums.negatives_to + sums.positives_to).clamp_(min=TINY))


def fpr_at_tpr(scores: Tensor, target: Tensor, rate: float = 0.95, positive: Positive = "out") -> Tensor:
    """Return the lowest false-positive rate of all thresholds whose true-positive rate is at least ``rate``.

    Libraries differ in the positive class: OpenOOD, pytorch-ood and torch-uncertainty use out-of-distribution, like the
    default here; the original GradNorm code uses in-distribution, ``positive="in"``. Thresholds are scores of samples,
    without interpolation.

    Args:
        scores: ``(N,)``, higher = more uncertain, any scale and sign, including infinities; NaN is refused.
        target: ``(N,)``, 1 = an error or out-of-distribution, 0 = any other sample.
        rate: The true-positive rate, in (0, 1].
        positive: ``"out"``: target 1 is positive, flagged from above; ``"in"``: target 0 is positive, accepted from
            below.

    Returns:
        A scalar in [0, 1]. NaN with a UserWarning if a class is missing.

    Raises:
        ValueError: If a shape or a value is wrong.

    Example:
        >>> scores, target = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0, 1, 0, 1])
        >>> fpr_at_tpr(scores, target, rate=0.5), fpr_at_tpr(scores, target, rate=1.0)
        (tensor(0.), tensor(0.5000))
    """
    value = fpr_at_tpr_of_counts(count(scores, target), rate, check_positive(positive))
    return announce_undefined(value, f"FPR at {rate:g} TPR", BOTH)


def fpr_at_tpr_of_counts(counts: Counts, rate: float = 0.95, positive: Positive = "out") -> Tensor:
    """Return the FPR at a TPR of counts, ``(...)``; NaN if a class is missing."""
    check_rate(rate, "rate")
    if positive == "in":
        counts = flip(counts)
    value = _flagged(counts, rate) / counts.negatives
    return torch.where((counts.positives > 0) & (counts.negatives > 0), value, torch.nan)


def _flagged(counts: Counts, rate: float) -> Tensor:
    """Return the negatives at or above the highest threshold with enough positives at or above it, ``(...)``."""
    if (flagged := counts.known.get(f"flagged at {rate}")) is not None:
        return flagged
    distinct = counts.positives_to.shape[-1]
    if not distinct:
        return counts.negatives * torch.nan
    # At most the surplus of positives is below the threshold.
    spare = counts.positives * (1 - rate * (1 - _rounding(counts.positives)))
    if not counts.positives_to.is_floating_point():
        spare = spare.floor().to(counts.positives_to.dtype)
    positives_to = counts.positives_to.contiguous()
    index = torch.searchsorted(positives_to, spare[..., None], right=True).clamp(max=distinct - 1)
    return counts.negatives_above(index).squeeze(-1)


def _rounding(numbers: Tensor) -> float:
    """Return the relative error of the requested rate that counts as rounding."""
    return 8 * torch.finfo(numbers.dtype).eps


def oscr(scores: Tensor, target: Tensor, correct: Tensor) -> Tensor:
    r"""Open-set classification rate: area under the correct-classification rate over the false-positive rate.

    At a threshold, the correct-classification rate is the fraction of in-distribution samples that are accepted and
    correct, and the false-positive rate is the fraction of out-of-distribution samples that are accepted. The area is
    the accuracy times the AUROC of out-of-distribution samples against correct in-distribution samples.

    Args:
        scores: ``(N,)``, higher = more uncertain, any scale and sign, including infinities; NaN is refused.
        target: ``(N,)``, 1 = out-of-distribution, 0 = in-distribution.
        correct: ``(N,)``, 1 = the prediction is correct; ignored if the target is 1.

    Returns:
        A scalar in [0, 1], higher is better, at most the accuracy. 0 if no prediction is correct; NaN with a
        UserWarning if a class is missing.

    Raises:
        ValueError: If a shape or a value is wrong.

    Example:
        >>> oscr(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0, 0, 1, 1]), torch.tensor([1, 0, 0, 0]))
        tensor(0.5000)

    Reference:
        Dhamija, Guenther, Boult: Reducing Network Agnostophobia, NeurIPS 2018.
    """
    ranked_scores, is_ood, incorrect = oscr_samples(scores, target, correct)
    return announce_undefined(oscr_of_counts(count(ranked_scores, is_ood), incorrect), "OSCR", BOTH)


def oscr_samples(scores: Tensor, target: Tensor, correct: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Drop the incorrect in-distribution samples and count them.

    Args:
        scores: ``(N,)``, raw scores.
        target: ``(N,)``, 1 = out-of-distribution, 0 = in-distribution.
        correct: ``(N,)``, 1 = the prediction is correct; ignored if the target is 1.

    Returns:
        The scores ``(M,)`` and targets ``(M,)`` of the other samples, and the number of dropped samples.

    Example:
        >>> oscr_samples(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 0, 1]), torch.tensor([1, 0, 0]))
        (tensor([1., 3.]), tensor([False,  True]), tensor(1))
    """
    scores = check_scores(scores)
    is_ood, is_correct = check_target(target, scores), check_target(correct, scores)
    keep = is_ood | is_correct
    return scores[keep], is_ood[keep], (~keep).sum()


def oscr_of_counts(counts: Counts, incorrect: Tensor) -> Tensor:
    """Return OSCR from counts of correct (negative) and out-of-distribution (positive) samples and the number of incorrect ones."""
    correct = counts.negatives
    area = auroc_of_counts(counts) * correct / (correct + incorrect)
    none_correct = (correct == 0) & (incorrect > 0) & (counts.positives > 0)
    return torch.where(none_correct, torch.zeros_like(area), area)

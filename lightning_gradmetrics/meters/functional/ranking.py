"""How well scores rank positives above negatives.

torchmetrics computes these right for scores in [0, 1], and applies a sigmoid to a whole batch as soon as one score
lies outside, which merges well separated scores. So it is only ever given ranks, mapped to [0, 1]: the order and the
ties are all these metrics use.
"""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc, binary_average_precision

from lightning_gradmetrics.meters.functional.counts import (
    Counts,
    Positive,
    announce_undefined,
    check_rate,
    check_scores,
    check_target,
    count,
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
    "one_class",
    "oscr_samples",
    "ranked",
]

BOTH = "at least one sample of each class"


def check_positive(positive: Positive) -> Positive:
    """A word for the positive class.

    Raises:
        ValueError: If it is neither ``"out"`` nor ``"in"``.
    """
    if positive not in get_args(Positive):
        raise ValueError(
            f"positive must be 'out' (target 1: error, out-of-distribution) or 'in' (target 0), got {positive!r}"
        )
    return positive


def ranked(scores: Tensor, target: Tensor, positive: Positive = "out") -> tuple[Tensor, Tensor, Tensor]:
    """Ranks in [0, 1] with ties, the target as 0 and 1 with 1 = positive, and the distinct scores."""
    scores = check_scores(scores)
    target = check_target(target, scores)
    if check_positive(positive) == "in":
        scores, target = -scores, ~target
    distinct, ranks = torch.unique(scores, return_inverse=True)
    return ranks.double() / max(len(distinct) - 1, 1), target.long(), distinct


def one_class(target: Tensor) -> bool:
    """Whether all targets are the same, or there are none."""
    return bool((target == target[:1]).all())


def _nan(like: Tensor) -> Tensor:
    return torch.full((), torch.nan, device=like.device)


def auroc(scores: Tensor, target: Tensor) -> Tensor:
    r"""Area under the ROC curve: the chance that a positive scores above a negative, ties counting one half.

    Args:
        scores: ``(N,)``, higher = more uncertain, any scale and sign; infinities rank, NaN is refused.
        target: ``(N,)``, 1 = an error or out-of-distribution, 0 = any other sample.

    Returns:
        A scalar in [0, 1]. NaN with a UserWarning if a class is missing.

    Raises:
        ValueError: If a shape or a value is wrong.

    Example:
        >>> auroc(torch.tensor([20.0, 60.0, -3.0, 20.0]), torch.tensor([0, 1, 0, 1]))
        tensor(0.8750)
    """
    ranks, target, _ = ranked(scores, target)
    value = _nan(ranks) if one_class(target) else binary_auroc(ranks, target, validate_args=False)
    return announce_undefined(value, "AUROC", BOTH)


def auroc_of_counts(counts: Counts) -> Tensor:
    """AUROC of counts, ``(...)``; NaN where a class is missing."""
    below = counts.negatives_to - counts.negative / 2
    return (counts.positive * below).sum(-1) / (counts.positives * counts.negatives)


def average_precision(scores: Tensor, target: Tensor, positive: Positive = "out") -> Tensor:
    r"""Average precision: ``sum_k (R_k - R_{k-1}) P_k`` over the distinct thresholds.

    Args:
        scores: ``(N,)``, higher = more uncertain, any scale and sign; infinities rank, NaN is refused.
        target: ``(N,)``, 1 = an error or out-of-distribution, 0 = any other sample.
        positive: ``"out"``: target 1 is positive and high scores find it; ``"in"``: target 0 is positive and low
            scores find it.

    Returns:
        A scalar in [0, 1]. NaN with a UserWarning if there is no positive.

    Raises:
        ValueError: If a shape or a value is wrong.

    Example:
        >>> scores, target = torch.tensor([20.0, 60.0, -3.0]), torch.tensor([1, 0, 0])
        >>> average_precision(scores, target), average_precision(scores, target, positive="in")
        (tensor(0.5000), tensor(0.8333))
    """
    ranks, target, _ = ranked(scores, target, positive)
    value = binary_average_precision(ranks, target, validate_args=False) if bool(target.any()) else _nan(ranks)
    return announce_undefined(value, "average precision", f"at least one positive sample (positive={positive!r})")


def average_precision_of_counts(counts: Counts, positive: Positive = "out") -> Tensor:
    """Average precision of counts, ``(...)``; NaN without a positive."""
    if positive == "in":
        precision = counts.negatives_to / counts.samples_to.clamp(min=1)
        return (counts.negative * precision).sum(-1) / counts.negatives
    precision = counts.positives_from / (counts.positives_from + counts.negatives_from).clamp(min=1)
    return (counts.positive * precision).sum(-1) / counts.positives


def fpr_at_tpr(scores: Tensor, target: Tensor, rate: float = 0.95, positive: Positive = "out") -> Tensor:
    """The lowest false-positive rate of a threshold whose true-positive rate is at least ``rate``.

    Others differ in which class is positive: OpenOOD, pytorch-ood and torch-uncertainty take out-of-distribution, as
    the default here does; the original GradNorm code takes in-distribution, ``positive="in"``. A threshold is a score
    that occurs; there is no interpolation between them.

    Args:
        scores: ``(N,)``, higher = more uncertain, any scale and sign; infinities rank, NaN is refused.
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
    """FPR at a TPR of counts, ``(...)``; NaN where a class is missing."""
    check_rate(rate, "rate")
    if not len(counts.scores):
        return counts.negatives * torch.nan
    if positive == "in":
        enough = _enough(counts.negatives_to, counts.negatives, rate)
        place, false, total = (~enough).sum(-1, keepdim=True), counts.positives_to, counts.positives
    else:
        enough = _enough(counts.positives_from, counts.positives, rate)
        place, false, total = enough.sum(-1, keepdim=True) - 1, counts.negatives_from, counts.negatives
    value = false.gather(-1, place).squeeze(-1) / total
    return torch.where((counts.positives > 0) & (counts.negatives > 0), value, torch.nan)


def _enough(hits: Tensor, total: Tensor, rate: float) -> Tensor:
    """Whether hits make up the rate; a rounding error below it does not count."""
    return hits >= rate * (1 - 8 * torch.finfo(hits.dtype).eps) * total.unsqueeze(-1)


def oscr(scores: Tensor, target: Tensor, correct: Tensor) -> Tensor:
    r"""Open-set classification rate: area under the correct-classification rate over the false-positive rate.

    At a threshold, the correct-classification rate is the share of in-distribution samples that are accepted *and*
    classified rightly, the false-positive rate the share of out-of-distribution samples that are accepted. The area
    is the accuracy times the AUROC of out-of-distribution samples against rightly classified ones.

    Args:
        scores: ``(N,)``, higher = more uncertain, any scale and sign; infinities rank, NaN is refused.
        target: ``(N,)``, 1 = out-of-distribution, 0 = in-distribution.
        correct: ``(N,)``, 1 = the prediction is right; it is not used where the target is 1.

    Returns:
        A scalar in [0, 1], higher is better, at most the accuracy. 0 if no prediction is right; NaN with a
        UserWarning if a class is missing.

    Raises:
        ValueError: If a shape or a value is wrong.

    Example:
        >>> oscr(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0, 0, 1, 1]), torch.tensor([1, 0, 0, 0]))
        tensor(0.5000)

    Reference:
        Dhamija, Guenther, Boult: Reducing Network Agnostophobia, NeurIPS 2018.
    """
    kept, outside, wrong = oscr_samples(scores, target, correct)
    return announce_undefined(oscr_of_counts(count(kept, outside), wrong), "OSCR", BOTH)


def oscr_samples(scores: Tensor, target: Tensor, correct: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scores and targets without wrongly classified in-distribution samples, and the number of those."""
    scores = check_scores(scores)
    outside, right = check_target(target, scores), check_target(correct, scores)
    keep = outside | right
    return scores[keep], outside[keep], (~keep).sum()


def oscr_of_counts(counts: Counts, wrong: Tensor) -> Tensor:
    """OSCR from counts of rightly classified (negative) and out-of-distribution (positive) samples, and the rest."""
    right = counts.negatives
    area = auroc_of_counts(counts) * right / (right + wrong)
    nothing = (right == 0) & (wrong > 0) & (counts.positives > 0)
    return torch.where(nothing, torch.zeros_like(area), area)

"""AUAC and AUFC: areas under the accuracy and the F1 curve, over coverage or over a threshold."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_gradmetrics.meters.functional.counts import Counts, announce_undefined, count
from lightning_gradmetrics.meters.functional.selective import aurc_of_counts, harmonic

__all__ = ["Mode", "auac", "auac_of_counts", "aufc", "aufc_of_counts", "check_mode"]

Mode = Literal["coverage", "threshold"]
"""The x-axis: the fraction of accepted samples, or the threshold on scores scaled to [0, 1] by minimum and maximum."""

NEEDS = {"coverage": "at least one sample", "threshold": "at least two distinct scores"}


def check_mode(mode: Mode) -> Mode:
    """Return a mode, checked.

    Raises:
        ValueError: If it is neither ``"coverage"`` nor ``"threshold"``.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"mode must be 'coverage' or 'threshold', got {mode!r}")
    return mode


def auac(scores: Tensor, target: Tensor, mode: Mode = "coverage") -> Tensor:
    """Area under the accuracy curve: the accuracy of the accepted samples, over all coverages or all thresholds.

    Over coverage, it is the mean over ``k`` of the accuracy of the ``k`` most certain samples, ``1 - AURC``, and
    depends only on the order of the scores. Over thresholds, the scores are scaled to [0, 1] by their minimum and
    maximum, so of two scores with the same order, the one that separates errors further from the rest is better. The
    published table of the reference does not state its x-axis.

    Args:
        scores: ``(N,)``, higher = more uncertain; in threshold mode finite.
        target: ``(N,)``, 1 = the prediction is incorrect, 0 = it is correct.
        mode: ``"coverage"`` or ``"threshold"``.

    Returns:
        A scalar in [0, 1], higher is better. NaN with a UserWarning if there is no sample, or, over thresholds, only
        one distinct score.

    Raises:
        ValueError: If a shape or a value is wrong, or a score is infinite in threshold mode.

    Example:
        >>> scores, target = torch.tensor([0.0, 1.0, 10.0]), torch.tensor([0, 1, 1])
        >>> auac(scores, target), auac(scores, target, mode="threshold")
        (tensor(0.6111), tensor(0.5500))

    Reference:
        Prabhushankar, AlRegib: Counterfactual Gradients-based Quantification of Prediction Trust in Neural Networks,
        2024.
    """
    return announce_undefined(auac_of_counts(count(scores, target), mode), "AUAC", NEEDS[check_mode(mode)])


def auac_of_counts(counts: Counts, mode: Mode = "coverage") -> Tensor:
    """Return the AUAC of counts ``(G,)``, in float64; NaN if undefined."""
    if check_mode(mode) == "coverage":
        return 1 - aurc_of_counts(counts)
    return _over_threshold(counts, counts.negatives_to / counts.samples_to)


def aufc(scores: Tensor, target: Tensor, mode: Mode = "coverage") -> Tensor:
    r"""Area under the F1 curve, with acceptance as the positive decision and correct predictions as the positive class.

    With ``c`` correct predictions among ``k`` accepted, and ``C`` correct ones in all, ``F1 = 2 c / (k + C)``. Over
    coverage: the mean over ``k = 1..N``. Over thresholds: as for :func:`auac`.

    Args:
        scores: ``(N,)``, higher = more uncertain; in threshold mode finite.
        target: ``(N,)``, 1 = the prediction is incorrect, 0 = it is correct.
        mode: ``"coverage"`` or ``"threshold"``.

    Returns:
        A scalar in [0, 1], higher is better. 0 if no prediction is correct. NaN with a UserWarning as for :func:`auac`.

    Raises:
        ValueError: If a shape or a value is wrong, or a score is infinite in threshold mode.

    Example:
        >>> aufc(torch.tensor([0.0, 1.0]), torch.tensor([0, 1]))
        tensor(0.8333)

    Reference:
        Prabhushankar, AlRegib: Counterfactual Gradients-based Quantification of Prediction Trust in Neural Networks,
        2024.
    """
    return announce_undefined(aufc_of_counts(count(scores, target), mode), "AUFC", NEEDS[check_mode(mode)])


def aufc_of_counts(counts: Counts, mode: Mode = "coverage") -> Tensor:
    r"""Return the AUFC of counts ``(G,)``, in float64; NaN if undefined.

    A group of ``m`` ties, of which the fraction ``q`` is correct, after ``k`` samples of which ``c`` are correct, adds
    ``sum_{j<=m} 2 (c + j q) / (k + j + C) = 2 (m q + (c - q (k + C)) (H_{k+C+m} - H_{k+C}))``.
    """
    correct, all_correct, ends = counts.negative, counts.negatives, counts.samples_to
    if check_mode(mode) == "threshold":
        return _over_threshold(counts, 2 * counts.negatives_to / (ends + all_correct))
    size = correct + counts.positive
    share, start = correct / size.clamp(min=1), ends - size + all_correct
    steps = harmonic(ends + all_correct) - harmonic(start)
    group = correct + (counts.negatives_to - correct - share * start) * steps
    return 2 * group.sum() / size.sum()


def _over_threshold(counts: Counts, heights: Tensor) -> Tensor:
    """Return the area under a step curve over the threshold, with scores scaled to [0, 1]."""
    scores = counts.scores.double()
    if bool(torch.isinf(scores).any()):
        raise ValueError(
            "threshold mode scales scores by their minimum and maximum, and some are infinite: drop these samples"
        )
    # Halves, because the difference of two finite numbers can overflow to infinity.
    steps = (scores / 2).diff()
    return (heights[:-1] * steps).sum() / (steps.sum() if len(steps) else torch.nan)

"""ROC and precision-recall curves, with thresholds in the scores' own unit."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_precision_recall_curve, binary_roc

from lightning_gradmetrics.meters.functional.counts import Counts, Positive
from lightning_gradmetrics.meters.functional.ranking import BOTH, one_class, ranked

__all__ = ["precision_recall_curve", "precision_recall_curve_of_counts", "roc", "roc_of_counts"]


def roc(scores: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The ROC curve: a point for each distinct score, a sample being flagged where its score is at least the threshold.

    Args:
        scores: ``(N,)``, higher = more uncertain, any scale and sign; infinities rank, NaN is refused.
        target: ``(N,)``, 1 = an error or out-of-distribution, 0 = any other sample.

    Returns:
        False-positive rates, true-positive rates and thresholds, ``(G + 1,)`` each, from nothing flagged (threshold
        ``inf``) to all.

    Raises:
        ValueError: If a class is missing, or a shape or a value is wrong.

    Example:
        >>> roc(torch.tensor([20.0, 60.0, -3.0]), torch.tensor([0, 1, 0]))
        (tensor([0.0000, 0.0000, 0.5000, 1.0000]), tensor([0., 1., 1., 1.]), tensor([inf, 60., 20., -3.]))
    """
    ranks, target, distinct = ranked(scores, target)
    if one_class(target):
        raise ValueError(f"the ROC curve needs {BOTH}")
    fpr, tpr, _ = binary_roc(ranks, target, validate_args=False)
    return fpr, tpr, _above_all(distinct)


def _above_all(distinct: Tensor) -> Tensor:
    return torch.cat([distinct.new_full((1,), torch.inf), distinct.flip(0)])


def roc_of_counts(counts: Counts) -> tuple[Tensor, Tensor, Tensor]:
    """The ROC curve of counts, in float32; the same points as :func:`roc`."""
    if not bool((counts.negatives > 0) & (counts.positives > 0)):
        raise ValueError(f"the ROC curve needs {BOTH}")
    sides = ((counts.negatives_from, counts.negatives), (counts.positives_from, counts.positives))
    fpr, tpr = (torch.nn.functional.pad((hits / total).flip(0), (1, 0)).float() for hits, total in sides)
    return fpr, tpr, _above_all(counts.scores)


def precision_recall_curve(scores: Tensor, target: Tensor, positive: Positive = "out") -> tuple[Tensor, Tensor, Tensor]:
    """The precision-recall curve: a point for each distinct score, and the end point (1, 0) that has no threshold.

    Args:
        scores: ``(N,)``, higher = more uncertain, any scale and sign; infinities rank, NaN is refused.
        target: ``(N,)``, 1 = an error or out-of-distribution, 0 = any other sample.
        positive: ``"out"``: flagged where the score is at least the threshold; ``"in"``: accepted where it is at most
            the threshold.

    Returns:
        Precision and recall, ``(G + 1,)`` each, and thresholds in the scores' own unit, ``(G,)``, from all flagged to
        few.

    Raises:
        ValueError: If there is no positive, or a shape or a value is wrong.

    Example:
        >>> precision_recall_curve(torch.tensor([20.0, 60.0, -3.0]), torch.tensor([0, 1, 0]))
        (tensor([0.3333, 0.5000, 1.0000, 1.0000]), tensor([1., 1., 1., 0.]), tensor([-3., 20., 60.]))
    """
    ranks, target, distinct = ranked(scores, target, positive)
    if not bool(target.any()):
        raise ValueError(f"the precision-recall curve needs at least one positive sample (positive={positive!r})")
    precision, recall, _ = binary_precision_recall_curve(ranks, target, validate_args=False)
    return precision, recall, -distinct if positive == "in" else distinct


def precision_recall_curve_of_counts(counts: Counts) -> tuple[Tensor, Tensor, Tensor]:
    """The precision-recall curve of counts with target 1 as positive, in float32."""
    if not bool(counts.positives > 0):
        raise ValueError("the precision-recall curve needs at least one positive sample")
    hits = counts.positives_from
    precision = torch.nn.functional.pad(hits / (hits + counts.negatives_from), (0, 1), value=1.0).float()
    return precision, torch.nn.functional.pad(hits / hits[0], (0, 1)).float(), counts.scores

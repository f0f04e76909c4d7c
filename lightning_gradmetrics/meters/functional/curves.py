"""ROC and precision-recall curves, with thresholds in the scores' own unit."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_gradmetrics.meters.functional.counts import Counts, Positive, announce_undefined, count, flip
from lightning_gradmetrics.meters.functional.ranking import BOTH, check_positive

__all__ = ["precision_recall_curve", "precision_recall_curve_of_counts", "roc", "roc_of_counts"]


def roc(scores: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the ROC curve, one point per distinct score; a sample is flagged if its score is at least the threshold.

    Args:
        scores: ``(N,)``, higher = more uncertain, any scale and sign, including infinities; NaN is refused.
        target: ``(N,)``, 1 = an error or out-of-distribution, 0 = any other sample.

    Returns:
        False-positive rates, true-positive rates and thresholds, ``(G + 1,)`` each, from nothing flagged (threshold
        ``inf``) to all. The rates of a missing class are NaN, with a UserWarning.

    Raises:
        ValueError: If a shape or a value is wrong.

    Example:
        >>> roc(torch.tensor([20.0, 60.0, -3.0]), torch.tensor([0, 1, 0]))
        (tensor([0.0000, 0.0000, 0.5000, 1.0000]), tensor([0., 1., 1., 1.]), tensor([inf, 60., 20., -3.]))
    """
    return roc_of_counts(count(scores, target))


def roc_of_counts(counts: Counts) -> tuple[Tensor, Tensor, Tensor]:
    """Return the ROC curve of counts, in float32; the same points as :func:`roc`."""
    if not bool((counts.negatives > 0) & (counts.positives > 0)):
        announce_undefined(torch.tensor(torch.nan), "the ROC curve", BOTH)
    fpr = _descending(counts.negatives_from / counts.negatives)
    tpr = _descending(counts.positives_from / counts.positives)
    infinite = counts.scores.new_full((1,), torch.inf)
    return fpr, tpr, torch.cat([infinite, counts.scores.flip(0)])


def _descending(rates: Tensor) -> Tensor:
    """Return rates from the highest threshold to the lowest, starting with 0 for the threshold that flags nothing."""
    start = rates[:1] * 0 if len(rates) else rates.new_full((1,), torch.nan)
    return torch.cat([start, rates.flip(0)]).float()


def precision_recall_curve(scores: Tensor, target: Tensor, positive: Positive = "out") -> tuple[Tensor, Tensor, Tensor]:
    """Return the precision-recall curve: one point per distinct score, and the end point (1, 0) without a threshold.

    Args:
        scores: ``(N,)``, higher = more uncertain, any scale and sign, including infinities; NaN is refused.
        target: ``(N,)``, 1 = an error or out-of-distribution, 0 = any other sample.
        positive: ``"out"``: samples are flagged if their score is at least the threshold; ``"in"``: samples are
            accepted if their score is at most the threshold.

    Returns:
        Precision and recall, ``(G + 1,)`` each, and thresholds in the unit of the scores, ``(G,)``, starting with all
        samples flagged. Without a positive the recall is NaN, with a UserWarning.

    Raises:
        ValueError: If a shape or a value is wrong.

    Example:
        >>> precision_recall_curve(torch.tensor([20.0, 60.0, -3.0]), torch.tensor([0, 1, 0]))
        (tensor([0.3333, 0.5000, 1.0000, 1.0000]), tensor([1., 1., 1., 0.]), tensor([-3., 20., 60.]))
    """
    return precision_recall_curve_of_counts(count(scores, target), check_positive(positive))


def precision_recall_curve_of_counts(counts: Counts, positive: Positive = "out") -> tuple[Tensor, Tensor, Tensor]:
    """Return the precision-recall curve of counts, in float32; the same points as :func:`precision_recall_curve`."""
    if positive == "in":
        precision, recall, thresholds = precision_recall_curve_of_counts(flip(counts))
        return precision, recall, -thresholds
    if not bool(counts.positives > 0):
        announce_undefined(torch.tensor(torch.nan), "the precision-recall curve", "at least one positive sample")
    hits = counts.positives_from
    precision = torch.nn.functional.pad(hits / (hits + counts.negatives_from), (0, 1), value=1.0).float()
    recall = hits / counts.positives
    end = recall[:1] * 0 if len(recall) else recall.new_full((1,), torch.nan)
    return precision, torch.cat([recall, end]).float(), counts.scores

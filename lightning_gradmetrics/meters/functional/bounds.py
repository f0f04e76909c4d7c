"""The lowest and the highest value of a metric that the samples in a histogram can have."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_gradmetrics.meters.functional.counts import Counts
from lightning_gradmetrics.meters.functional.histogram import cell_ends, score_of_key
from lightning_gradmetrics.meters.functional.ranking import auroc_of_counts, fpr_at_tpr_of_counts

__all__ = ["CellEnds", "auroc_bounds"]

Bounds = tuple[Tensor, Tensor]
"""The lowest and the highest value, in float64."""


@dataclass(frozen=True)
class CellEnds:
    """The cells of a histogram by their lowest and highest scores, which are sorted once for all metrics and tasks.

    A metric is lowest if all positives are at the low ends of their cells and all negatives at the high ends, and
    highest in the opposite case.

    Args:
        scores: The scores at the ends of cells ``(G,)``, distinct and ascending.
        low: The position of each cell's lowest score among them ``(K,)``.
        high: The position of each cell's highest score ``(K,)``.
        counts: The number of samples of each class in each cell ``(C, K)``, float64.

    Example:
        >>> from lightning_gradmetrics.meters.functional.histogram import append, empty_table
        >>> table = append(empty_table(4), torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 1, 0]))
        >>> ends = CellEnds.of(table)
        >>> ends.auroc(*ends.counts)
        (tensor(0.5000, dtype=torch.float64), tensor(0.5000, dtype=torch.float64))
    """

    scores: Tensor
    low: Tensor
    high: Tensor
    counts: Tensor

    @classmethod
    def of(cls, table: Tensor) -> CellEnds:
        """Return the ends of the cells of a table ``(2 + C, 8 * bins)``."""
        low, high, counts = cell_ends(table)
        keys, positions = torch.unique(torch.cat([low, high]), return_inverse=True)
        low, high = positions.chunk(2)
        return cls(score_of_key(keys), low, high, counts.double())

    def auroc(self, negative: Tensor, positive: Tensor) -> Bounds:
        """Return the bounds of the AUROC.

        Args:
            negative: The weight of the negatives in each cell ``(K,)``.
            positive: The weight of the positives in each cell ``(K,)``.
        """
        worst = self._placed(self.high, negative, self.low, positive)
        best = self._placed(self.low, negative, self.high, positive)
        return auroc_of_counts(worst), auroc_of_counts(best)

    def fpr(self, negative: Tensor, positive: Tensor, rate: float = 0.95) -> Bounds:
        """Return the bounds of the false-positive rate at a true-positive rate; arguments as for :meth:`auroc`."""
        best = self._placed(self.low, negative, self.high, positive)
        worst = self._placed(self.high, negative, self.low, positive)
        return fpr_at_tpr_of_counts(best, rate), fpr_at_tpr_of_counts(worst, rate)

    def average_precision(self, negative: Tensor, positive: Tensor) -> Bounds:
        """Return the bounds of the average precision, with the positives above; arguments as for :meth:`auroc`."""
        last = len(self.scores) - 1
        return _precision_bounds(last - self.high, last - self.low, negative, positive, len(self.scores))

    def average_precision_in(self, negative: Tensor, positive: Tensor) -> Bounds:
        """Return the bounds of the average precision of the negatives, below; arguments as for :meth:`auroc`."""
        return _precision_bounds(self.low, self.high, positive, negative, len(self.scores))

    def _placed(self, negative_at: Tensor, negative: Tensor, positive_at: Tensor, positive: Tensor) -> Counts:
        """Return the counts of samples at these ends of their cells."""
        sums = negative.new_zeros(2, len(self.scores))
        sums[0].index_add_(0, negative_at, negative)
        sums[1].index_add_(0, positive_at, positive)
        return Counts.of(self.scores, sums[0], sums[1])


def auroc_bounds(table: Tensor) -> Bounds:
    """Return the lowest and the highest AUROC that the samples in a table can have, in float64.

    Args:
        table: ``(4, 8 * bins)``, with negatives and positives.
    """
    ends = CellEnds.of(table)
    return ends.auroc(ends.counts[0], ends.counts[1])


def _precision_bounds(first: Tensor, last: Tensor, negative: Tensor, positive: Tensor, ends: int) -> Bounds:
    """Return the bounds of an average precision whose positives come first.

    Args:
        first: The first position that a sample of each cell can have ``(K,)``.
        last: The last position ``(K,)``.
        negative: The weight of the negatives in each cell ``(K,)``.
        positive: The weight of the positives in each cell ``(K,)``.
        ends: The number of positions.
    """
    least_hits, most_hits = _up_to(last, positive, first, ends), _up_to(first, positive, last, ends)
    least_false, most_false = _up_to(last, negative, first, ends), _up_to(first, negative, last, ends)
    lowest = torch.where(most_false > 0, least_hits / (least_hits + most_false), 1.0)
    highest = most_hits / (most_hits + least_false)
    total = positive.sum()
    has_any = positive > 0
    return (positive * lowest)[has_any].sum() / total, (positive * highest)[has_any].sum() / total


def _up_to(places: Tensor, weights: Tensor, position: Tensor, ends: int) -> Tensor:
    """Return the weight of the samples whose place is at most each position ``(K,)``."""
    sums = weights.new_zeros(ends).index_add_(0, places, weights).cumsum(0)
    return sums[position]

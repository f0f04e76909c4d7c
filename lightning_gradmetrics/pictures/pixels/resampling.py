"""Bootstrap intervals over images in constant memory: groups of images, as histograms, are drawn with replacement."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_gradmetrics.evaluation.intervals import FEWEST

__all__ = ["GROUPS", "Estimate", "GroupedCells", "group_of", "quantile_edges", "weights_of_groups"]

GROUPS = 32
"""Number of groups of images that are resampled; up to this number of images, each image is a group."""

CELLS = 1024
"""Number of cells of a histogram."""

NAN = float("nan")


def group_of(index: int, prediction: Tensor) -> int:
    """Return the group of an image, which does not depend on its process or batch.

    Args:
        index: The index of the image in its dataset; if it is negative (unknown), the prediction determines the group.
        prediction: ``(H, W)``.

    Example:
        >>> group_of(35, torch.zeros(2, 2))
        3
    """
    if index >= 0:
        return index % GROUPS
    return zlib.crc32(prediction.cpu().contiguous().numpy().tobytes()) % GROUPS


def weights_of_groups(resamples: int) -> Tensor:
    """Return how often each group is drawn in each resample, ``(B, G)``; equal for all scores, so differences are paired."""
    generator = torch.Generator().manual_seed(0)
    return torch.poisson(torch.ones(resamples, GROUPS, dtype=torch.float64), generator=generator)


def quantile_edges(scores: Tensor) -> Tensor:
    """Return the inner edges of cells with equal numbers of scores, ``(CELLS - 1,)``, float64."""
    shares = torch.linspace(0, 1, CELLS + 1, dtype=torch.float64)[1:-1]
    ordered = scores.double().sort().values
    return ordered[(shares * (len(ordered) - 1)).round().long()].contiguous()


@dataclass(frozen=True)
class Estimate:
    """A metric and its values in the resamples.

    Args:
        value: The metric.
        replicates: Its value in each resample, followed by its value in the cells without resampling, ``(B + 1,)``; or
            ``None``.
    """

    value: float
    replicates: Tensor | None = None

    def interval(self) -> tuple[float, float]:
        """Return the ends of the 95 % interval over images; NaN without resamples."""
        return _ends(self.value, self.replicates)

    def minus(self, other: Estimate) -> tuple[float, float, float]:
        """Return the difference to another score's metric with the ends of its paired 95 % interval."""
        difference = self.value - other.value
        if self.replicates is None or other.replicates is None:
            return difference, NAN, NAN
        return difference, *_ends(difference, self.replicates - other.replicates)


def _ends(value: float, replicates: Tensor | None) -> tuple[float, float]:
    """Return the quantiles of the replicates, shifted by the difference between the exact value and that of the cells."""
    if replicates is None:
        return NAN, NAN
    moved = replicates[:-1] - replicates[-1] + value
    known = moved[moved.isfinite()]
    if not len(known):
        return NAN, NAN
    low, high = known.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


class GroupedCells:
    """Histograms of negatives and positives for each group of images, with several grids if processes used different edges.

    Args:
        edges: The inner edges of the cells.
    """

    def __init__(self, edges: Tensor) -> None:
        self.edges = [edges]
        self.counts = [torch.zeros(GROUPS, 2, len(edges) + 1, dtype=torch.int32)]

    def add(self, scores: Tensor, target: Tensor, groups: int | Tensor) -> None:
        """Add scores.

        Args:
            scores: ``(M,)``.
            target: ``(M,)``, bool.
            groups: One group for all scores, or the group of each ``(M,)``.
        """
        size = len(self.edges[0]) + 1
        cell = torch.bucketize(scores.double(), self.edges[0]) + size * (target.long() + 2 * groups)
        counted = torch.bincount(cell, minlength=GROUPS * 2 * size)
        self.counts[0] += counted.view(GROUPS, 2, size).int()

    def join(self, other: GroupedCells) -> None:
        """Add the histograms of another process."""
        self.edges += other.edges
        self.counts += other.counts

    @property
    def has_interval(self) -> bool:
        """Whether there are enough positives, negatives and groups for an interval: 10 of each."""
        by_kind = torch.cat(self.counts, 2).sum(2)
        groups = int((by_kind.sum(1) > 0).sum())
        return min(groups, int(by_kind.sum(0).min())) >= FEWEST

    def areas(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return the AUROC of each resample, NaN without pairs, and its number of pairs, ``(B + 1,)`` each.

        Args:
            weights: The result of :func:`weights_of_groups`; a row of ones is appended.
        """
        every = torch.cat([weights, torch.ones(1, GROUPS, dtype=weights.dtype)])
        counts = torch.cat(self.counts, 2)[:, :, _order(self.edges)].double()
        negatives, positives = every @ counts[:, 0], every @ counts[:, 1]
        below = negatives.cumsum(1) - negatives / 2
        pairs = positives.sum(1) * negatives.sum(1)
        return (positives * below).sum(1) / pairs, pairs


def _order(edges: Sequence[Tensor]) -> Tensor:
    """Return the cells of all grids in the order of their midpoints."""
    middles = []
    for grid in edges:
        middles.append(torch.cat([grid[:1], (grid[1:] + grid[:-1]) / 2, grid[-1:]]))
    return torch.cat(middles).argsort(stable=True)

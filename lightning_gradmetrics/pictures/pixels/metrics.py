"""Metrics of pixels in constant memory: pooled, averaged over images, and within the predicted class."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_gradmetrics.evaluation.intervals import FEWEST
from lightning_gradmetrics.meters.functional.counts import Counts, count
from lightning_gradmetrics.meters.functional.histogram import append, counts_of_table, empty_table, merge_tables
from lightning_gradmetrics.meters.functional.ranking import (
    auroc_of_counts,
    average_precision_of_counts,
    fpr_at_tpr_of_counts,
)
from lightning_gradmetrics.meters.functional.selective import aurc_of_counts
from lightning_gradmetrics.pictures.pixels.resampling import (
    GROUPS,
    Estimate,
    GroupedCells,
    quantile_edges,
    weights_of_groups,
)

__all__ = ["Meters", "PixelMeter", "joined", "sampled_pixels"]

MOST_PIXELS = 20_000
"""Largest number of labelled pixels per image that the metrics use with ``every="auto"``."""


def sampled_pixels(known: Tensor, every: int | str) -> Tensor:
    """Return the flat indices of the pixels that the metrics use, in row order, ``(M,)``.

    Args:
        known: Which pixels of an image are used, flat, bool.
        every: Use every n-th of them, or ``"auto"`` for at most 20,000, with a prime step.
    """
    positions = known.nonzero().flatten()
    step = every if isinstance(every, int) else -(-len(positions) // MOST_PIXELS)
    if every == "auto" and step > 1:
        step = _next_prime(step)
    return positions[:: max(1, step)]


def _next_prime(number: int) -> int:
    """Return the smallest prime that is at least the number; a prime step rarely divides the width of an image."""
    while any(number % divisor == 0 for divisor in range(2, math.isqrt(number) + 1)):
        number += 1
    return number


class _Pool:
    """Scores and targets of many pixels, in a table of fixed size or in full."""

    def __init__(self, bins: int | None) -> None:
        self.table = None if bins is None else empty_table(bins)
        self.kept: list[tuple[Tensor, Tensor]] = []

    def add(self, scores: Tensor, target: Tensor) -> None:
        if self.table is None:
            self.kept.append((scores.float(), target))
        else:
            self.table = append(self.table, scores.double(), target)

    def counts(self) -> Counts:
        if self.table is not None:
            return counts_of_table(self.table)
        scores = torch.cat([scores for scores, _ in self.kept])
        return count(scores, torch.cat([target for _, target in self.kept]).long())

    def join(self, other: _Pool) -> None:
        if self.table is None or other.table is None:
            self.kept += other.kept
        else:
            self.table = merge_tables(torch.stack([self.table, other.table]))


Estimates = dict[tuple[str, str], Estimate]
"""Estimates by metric and by pooling: over ``"all"`` pixels, within an ``"image"``, or within a ``"predicted class"``."""


@dataclass
class PixelMeter:
    """The metrics of one score on one dataset, for one binary target per pixel.

    Args:
        bins: The number of cells for the pooled metrics; ``None`` keeps every value.
        resamples: The number of bootstrap resamples of images; 0 for no intervals.

    Example:
        >>> meter = PixelMeter(None, 0)
        >>> meter.add(torch.tensor([0.1, 0.9, 0.5]), torch.tensor([False, True, False]), torch.tensor([0, 0, 1]), 0)
        >>> meter.estimates()["auroc", "all"].value
        1.0
    """

    bins: int | None
    resamples: int

    def __post_init__(self) -> None:
        self.pool = _Pool(self.bins)
        self.by_class: dict[int, _Pool] = {}
        self.edges: Tensor | None = None
        self.cells: GroupedCells | None = None
        self.class_cells: dict[int, GroupedCells] = {}
        self.images = torch.zeros(GROUPS, 2, dtype=torch.float64)  # sum and number of the AUROCs of images

    def add(self, scores: Tensor, target: Tensor, predicted: Tensor, group: int) -> None:
        """Add the pixels of one image.

        Args:
            scores: ``(M,)``, finite.
            target: ``(M,)``, bool.
            predicted: The predicted class ``(M,)``.
            group: The group of the image in the resamples.
        """
        if not len(scores):
            return
        self.pool.add(scores, target)
        if bool(target.any()) and not bool(target.all()):
            area = float(auroc_of_counts(count(scores, target.long())))
            self.images[group] += torch.tensor([area, 1.0], dtype=torch.float64)
        for number in torch.unique(predicted).tolist():
            inside = predicted == number
            if number not in self.by_class:
                self.by_class[number] = _Pool(None if self.bins is None else max(1024, self.bins // 8))
            self.by_class[number].add(scores[inside], target[inside])
        if self.resamples:
            self._add_cells(scores, target, predicted, group)

    def _add_cells(self, scores: Tensor, target: Tensor, predicted: Tensor, group: int) -> None:
        if self.edges is None:
            self.edges = quantile_edges(scores)
            self.cells = GroupedCells(self.edges)
        assert self.cells is not None
        self.cells.add(scores, target, group)
        for number in torch.unique(predicted).tolist():
            inside = predicted == number
            if number not in self.class_cells:
                self.class_cells[number] = GroupedCells(self.edges[1::2].contiguous())
            self.class_cells[number].add(scores[inside], target[inside], group)

    def join(self, other: PixelMeter) -> None:
        """Add the pixels of another process."""
        self.images += other.images
        self.pool.join(other.pool)
        for number, pool in other.by_class.items():
            if number in self.by_class:
                self.by_class[number].join(pool)
            else:
                self.by_class[number] = pool
        if self.cells is None or other.cells is None:
            self.cells = self.cells or other.cells
        else:
            self.cells.join(other.cells)
        for number, cells in other.class_cells.items():
            if number in self.class_cells:
                self.class_cells[number].join(cells)
            else:
                self.class_cells[number] = cells

    def estimates(self) -> Estimates:
        """Return all metrics; AUROCs include their values in the resamples."""
        if not self.by_class:
            return {}
        counts, weights = self.pool.counts(), weights_of_groups(self.resamples)
        areas = self.cells.areas(weights)[0] if self.cells is not None and self._has_interval else None
        return {
            ("auroc", "all"): Estimate(float(auroc_of_counts(counts)), areas),
            ("aupr", "all"): Estimate(float(average_precision_of_counts(counts))),
            ("fpr95", "all"): Estimate(float(fpr_at_tpr_of_counts(counts))),
            ("aurc", "all"): Estimate(float(aurc_of_counts(counts))),
            ("auroc", "image"): self._mean_over_images(weights),
            ("auroc", "predicted class"): self._within_class(weights),
        }

    @property
    def _has_interval(self) -> bool:
        return self.cells is not None and self.cells.has_interval

    def _mean_over_images(self, weights: Tensor) -> Estimate:
        total, number = self.images.sum(0).tolist()
        if not number:
            return Estimate(float("nan"))
        if number < FEWEST or not self._has_interval:
            return Estimate(total / number)
        every = torch.cat([weights, torch.ones(1, GROUPS, dtype=torch.float64)]) @ self.images
        return Estimate(total / number, every[:, 0] / every[:, 1])

    def _within_class(self, weights: Tensor) -> Estimate:
        """Return the mean of the AUROCs within each predicted class, weighted by the number of pairs."""
        total = pairs = 0.0
        for pool in self.by_class.values():
            counts = pool.counts()
            number = float(counts.positives) * float(counts.negatives)
            if number:
                total, pairs = total + number * float(auroc_of_counts(counts)), pairs + number
        if not pairs:
            return Estimate(float("nan"))
        if not self._has_interval:
            return Estimate(total / pairs)
        totals = torch.zeros(2, self.resamples + 1, dtype=torch.float64)
        for cells in self.class_cells.values():
            areas, weight = cells.areas(weights)
            totals += torch.stack([(areas * weight).nan_to_num(), weight])
        return Estimate(total / pairs, totals[0] / totals[1])


Meters = dict[tuple[str, str, str], PixelMeter]
"""Meters by dataset, task and score."""


def joined(parts: Sequence[Meters]) -> Meters:
    """Merge the meters of all processes."""
    total: Meters = {}
    for meters in parts:
        for key, meter in meters.items():
            if key in total:
                total[key].join(meter)
            else:
                total[key] = meter
    return total

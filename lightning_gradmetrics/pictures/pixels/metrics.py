"""Metrics of pixels in constant memory: pooled, averaged over images, and within the predicted class."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_gradmetrics.meters.functional.counts import Counts, count
from lightning_gradmetrics.meters.functional.histogram import append, counts_of_table, empty_table, merge_tables
from lightning_gradmetrics.meters.functional.ranking import (
    auroc_of_counts,
    average_precision_of_counts,
    fpr_at_tpr_of_counts,
)
from lightning_gradmetrics.meters.functional.selective import aurc_of_counts

__all__ = ["PixelMeter", "sampled_pixels"]

MOST_PIXELS = 20_000
"""Labelled pixels of an image that the metrics use with ``every="auto"``."""

CELLS = 1024
"""Cells of the resampled images."""


def sampled_pixels(known: Tensor, every: int | str) -> Tensor:
    """Return the places of the pixels that the metrics use, in row order, ``(M,)``.

    Args:
        known: Which pixels of an image are used, flat, bool.
        every: Every n-th of them, or ``"auto"``: at most 20,000, by a step that is prime to the number.
    """
    places = known.nonzero().flatten()
    step = every if isinstance(every, int) else -(-len(places) // MOST_PIXELS)
    if every == "auto" and 1 < step <= PRIMES[-1]:
        step = min(prime for prime in PRIMES if prime >= step)
    return places[:: max(1, step)]


PRIMES = (
    2,
    3,
    5,
    7,
    11,
    13,
    17,
    19,
    23,
    29,
    31,
    37,
    41,
    43,
    47,
    53,
    59,
    61,
    67,
    71,
    73,
    79,
    83,
    89,
    97,
    101,
    103,
    107,
    109,
)
"""A step that is a prime rarely divides the width of an image, so no column is preferred."""


class _Pool:
    """Scores and targets of many pixels: a table of fixed size, or all of them."""

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


class _Resamples:
    """Histograms of images drawn with replacement, by Poisson weights: the same memory for any number of images.

    The cells are quantiles of the first image.
    """

    def __init__(self, resamples: int) -> None:
        self.resamples = resamples
        self.edges: Tensor | None = None
        self.cells = torch.zeros(resamples, 2, CELLS)
        self.generator = torch.Generator().manual_seed(0)

    def add(self, scores: Tensor, target: Tensor) -> None:
        if not self.resamples:
            return
        if self.edges is None:
            shares = torch.linspace(0, 1, CELLS + 1, dtype=torch.float64)[1:-1]
            ordered = scores.double().sort().values
            self.edges = ordered[(shares * (len(ordered) - 1)).round().long()].contiguous()
        cell = torch.bucketize(scores.double(), self.edges)
        image = torch.bincount(cell + CELLS * target.long(), minlength=2 * CELLS).view(2, CELLS).float()
        weights = torch.poisson(torch.ones(self.resamples), generator=self.generator)
        self.cells += weights[:, None, None] * image

    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the AUROC over images; NaN without resamples."""
        if not self.resamples or self.edges is None:
            return float("nan"), float("nan")
        right, wrong = self.cells[:, 0].double(), self.cells[:, 1].double()
        below = right.cumsum(1) - right / 2
        areas = (wrong * below).sum(1) / (wrong.sum(1) * right.sum(1))
        known = areas[areas.isfinite()]
        if not len(known):
            return float("nan"), float("nan")
        low, high = known.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        return low, high


@dataclass
class PixelMeter:
    """The metrics of one score on one data set, for one binary target per pixel.

    Args:
        bins: Cells of the pooled metrics; ``None`` keeps every value.
        resamples: Resamples of images.

    Example:
        >>> meter = PixelMeter(None, 0)
        >>> meter.add(torch.tensor([0.1, 0.9, 0.5]), torch.tensor([False, True, False]), torch.tensor([0, 0, 1]))
        >>> {row["metric"]: row["value"] for row in meter.rows() if row["within"] == "all"}["auroc"]
        1.0
    """

    bins: int | None
    resamples: int
    images: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pool = _Pool(self.bins)
        self.by_class: dict[int, _Pool] = {}
        self.resampled = _Resamples(self.resamples)

    def add(self, scores: Tensor, target: Tensor, predicted: Tensor) -> None:
        """Add the pixels of one image.

        Args:
            scores: ``(M,)``, finite.
            target: ``(M,)``, bool.
            predicted: The predicted class ``(M,)``.
        """
        if not len(scores):
            return
        self.pool.add(scores, target)
        self.resampled.add(scores, target)
        if bool(target.any()) and not bool(target.all()):
            self.images.append(float(auroc_of_counts(count(scores, target.long()))))
        for number in torch.unique(predicted).tolist():
            inside = predicted == number
            if number not in self.by_class:
                self.by_class[number] = _Pool(None if self.bins is None else max(1024, self.bins // 8))
            self.by_class[number].add(scores[inside], target[inside])

    def join(self, other: PixelMeter) -> None:
        """Add the pixels of another process."""
        self.images += other.images
        self.pool.join(other.pool)
        for number, pool in other.by_class.items():
            if number in self.by_class:
                self.by_class[number].join(pool)
            else:
                self.by_class[number] = pool
        if other.resampled.edges is not None:
            self.resampled = _Resamples(0) if self.resampled.edges is not None else other.resampled

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield one row per metric: ``metric``, ``within``, ``value``, ``low`` and ``high``."""
        if not self.by_class:
            return
        counts = self.pool.counts()
        low, high = self.resampled.interval()
        nothing = float("nan")
        yield _row("auroc", "all", float(auroc_of_counts(counts)), low, high)
        yield _row("aupr", "all", float(average_precision_of_counts(counts)), nothing, nothing)
        yield _row("fpr95", "all", float(fpr_at_tpr_of_counts(counts)), nothing, nothing)
        yield _row("aurc", "all", float(aurc_of_counts(counts)), nothing, nothing)
        mean = sum(self.images) / len(self.images) if self.images else nothing
        yield _row("auroc", "image", mean, nothing, nothing)
        areas, pairs = self._areas_by_class()
        within = float((areas * pairs).sum() / pairs.sum()) if len(pairs) else nothing
        yield _row("auroc", "predicted class", within, nothing, nothing)

    def _areas_by_class(self) -> tuple[Tensor, Tensor]:
        """The AUROC within each predicted class that has both kinds of pixels, and the number of pairs."""
        areas, pairs = [], []
        for pool in self.by_class.values():
            counts = pool.counts()
            number = float(counts.positives) * float(counts.negatives)
            if number:
                areas.append(float(auroc_of_counts(counts)))
                pairs.append(number)
        return torch.tensor(areas, dtype=torch.float64), torch.tensor(pairs, dtype=torch.float64)


def _row(metric: str, within: str, value: float, low: float, high: float) -> dict[str, Any]:
    return {"metric": metric, "within": within, "value": value, "low": low, "high": high}


Meters = dict[tuple[str, str, str], PixelMeter]
"""By data set, task and score."""


def joined(parts: Sequence[Meters]) -> Meters:
    """Return the meters of all processes together."""
    total: Meters = {}
    for part in parts:
        for key, meter in part.items():
            if key in total:
                total[key].join(meter)
            else:
                total[key] = meter
    return total

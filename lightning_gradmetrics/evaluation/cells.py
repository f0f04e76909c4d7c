"""Scores sorted once for all tasks and all resamples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_gradmetrics.evaluation.tasks import DetectionTask
from lightning_gradmetrics.meters.functional.counts import Counts, sort_with_codes, sums_to

__all__ = ["Cells", "counts_of_task", "exact_counts", "make_cells"]


FEWEST_FINE = 64
"""The fewest fine cells around the threshold of a task."""


@dataclass(frozen=True)
class Cells:
    """The rows of one score, grouped by cells of neighbouring scores and by row class.

    Args:
        scores: ``(K,)``, the lowest score of each cell, ascending.
        order: ``(N,)``, the rows in the order of their cell and class.
        starts: ``(K * C,)``, the position in ``order`` of the first row of each cell and class.
        classes: ``C``, the number of row classes.
    """

    scores: Tensor
    order: Tensor
    starts: Tensor
    classes: int

    def counts(self, weights: Tensor) -> Tensor:
        """Sum the weights of the rows in each cell and class.

        Args:
            weights: ``(N, B)`` in float32, whole numbers.

        Returns:
            ``(C, B, K)`` in float64; sums are exact up to 2^24.
        """
        sums = torch.nn.functional.embedding_bag(self.order, weights, self.starts, mode="sum")
        return sums.view(len(self.scores), self.classes, -1).permute(1, 2, 0).double()


def make_cells(
    scores: Tensor, codes: Tensor, classes: int, most: int, tasks: Sequence[DetectionTask] = (), rate: float = 0.95
) -> Cells:
    """Group rows into about ``most`` cells of equal size, and finer cells where thresholds at a TPR vary.

    Tied rows stay together. With no more than ``most`` distinct scores, each is one cell and metrics of cells are exact.

    Args:
        scores: ``(N,)`` in float32 or float64.
        codes: ``(N,)`` in uint8, the class of each row.
        classes: ``C``, the number of classes.
        most: The number of cells of equal size.
        tasks: The tasks, for their thresholds.
        rate: The true-positive rate of the thresholds.
    """
    distinct, sorted_codes, ends = sort_with_codes(scores, codes)
    edges = distinct
    if len(distinct) > most:
        starts = torch.cat([ends.new_zeros(1), ends[:-1] + 1])
        first = _changes(starts * most // len(scores))
        for task in tasks:
            window = _threshold_window(task, sorted_codes, ends, rate)
            inside = starts[window] - starts[window.start]
            fine = max(FEWEST_FINE, most // (2 * len(tasks)))
            first[window] |= _changes(inside * fine // (inside[-1] + 1))
        edges = distinct[first]
    values = np.searchsorted(edges.numpy(), scores.numpy(), side="right") - 1
    flat = values * classes + codes.numpy()
    order = torch.from_numpy(np.argsort(flat, kind="stable"))
    sizes = torch.from_numpy(np.bincount(flat, minlength=len(edges) * classes))
    return Cells(edges, order, sizes.cumsum(0) - sizes, classes)


def _changes(values: Tensor) -> Tensor:
    """Whether each value differs from the one before it; true for the first."""
    changes = torch.ones(len(values), dtype=torch.bool)
    torch.ne(values[1:], values[:-1], out=changes[1:])
    return changes


def _threshold_window(task: DetectionTask, codes: Tensor, ends: Tensor, rate: float) -> slice:
    """The distinct scores among which the threshold of nearly every resample is: six standard deviations each way."""
    positives_to = _sums(task, codes, ends, task.positive).double()
    total = positives_to[-1]
    share, spread = 1 - rate, 6 * math.sqrt(rate * (1 - rate) / max(task.count_positive, 1))
    bounds = torch.stack([(share - spread) * total, (share + spread) * total])
    low, high = torch.searchsorted(positives_to, bounds).tolist()
    return slice(max(low - 1, 0), min(high + 2, len(ends)))


def counts_of_task(task: DetectionTask, scores: Tensor, counts: Tensor) -> Counts:
    """Return the counts ``(B, K)`` of one task from the counts ``(C, B, K)`` of all row classes."""
    return Counts.of(scores, _weighted(task, counts, task.negative), _weighted(task, counts, task.positive))


def _weighted(task: DetectionTask, counts: Tensor, codes: Sequence[int]) -> Tensor:
    total = torch.zeros_like(counts[0])
    for code in codes:
        total.add_(counts[code], alpha=task.weights.get(code, 1.0))
    return total


def exact_counts(ordered: tuple[Tensor, Tensor, Tensor], task: DetectionTask) -> Counts:
    """Return the exact counts ``(G,)`` of one task.

    Args:
        ordered: The distinct scores, sorted codes and ends of
            :func:`~lightning_gradmetrics.meters.functional.counts.sort_with_codes`.
        task: The task.
    """
    distinct, codes, ends = ordered
    return Counts(distinct, _sums(task, codes, ends, task.negative), _sums(task, codes, ends, task.positive))


def _sums(task: DetectionTask, codes: Tensor, ends: Tensor, chosen: Sequence[int]) -> Tensor:
    plain = tuple(code for code in chosen if code not in task.weights)
    sums = _flag_sums(codes, ends, plain)
    for code, weight in task.weights.items():
        if code in chosen:
            sums = sums + weight * _flag_sums(codes, ends, (code,)).double()
    return sums


def _flag_sums(codes: Tensor, ends: Tensor, chosen: Sequence[int]) -> Tensor:
    flags = np.zeros(256, dtype=np.uint8)
    flags[list(chosen)] = 1
    return sums_to(torch.from_numpy(flags[codes.numpy()]), ends)

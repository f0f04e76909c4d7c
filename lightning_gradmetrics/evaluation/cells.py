"""Sorts and groups scores once for all tasks and all resamples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_gradmetrics.evaluation.tasks import DetectionTask, Rows
from lightning_gradmetrics.meters.functional.counts import Counts
from lightning_gradmetrics.meters.functional.selective import TABLE_LIMIT, harmonic_table
from lightning_gradmetrics.meters.functional.sorting import Ranked, positions, rank, sort_with

__all__ = [
    "Cells",
    "RankedRows",
    "chosen_cells",
    "counts_of_task",
    "exact_counts",
    "make_cells",
    "rank_rows",
    "weighted_counts",
]


MANY_SCORES = 2**16
"""From this number of distinct scores on, compiled code computes what the metrics share; its first use takes a second."""

MOST_SUMMED = 2**20
"""The number of rows whose weights are summed in float32, which is exact up to 2^24."""

FEWEST_FINE = 64
"""The smallest number of fine cells around the threshold of a task."""


@dataclass(frozen=True)
class RankedRows:
    """The rows in ascending order of one score, sorted once for all tasks.

    Args:
        ranked: The rows in this order; its numbers are the row classes, or the positions of the rows if they are needed.
        codes: ``(N,)`` in uint8, the class of each row, in the order of the score.
        sums: For each class with rows, the number ``(G,)`` of its rows at or below each distinct score.
        classes: ``C``, the number of row classes.
    """

    ranked: Ranked
    codes: Tensor
    sums: Mapping[int, Tensor]
    classes: int

    def sums_of(self, task: DetectionTask, codes: Sequence[int]) -> Tensor:
        """Return the weighted number of rows of these classes at or below each distinct score, ``(G,)``."""
        present = [code for code in codes if code in self.sums]
        if not present:
            return torch.zeros_like(self.ranked.ends)
        total = self._weighted(task, present[0])
        for code in present[1:]:
            total = total + self._weighted(task, code)
        return total

    def _weighted(self, task: DetectionTask, code: int) -> Tensor:
        weight = task.weights.get(code)
        return self.sums[code] if weight is None else self.sums[code].double().mul_(weight)


def rank_rows(rows: Rows, score: str, with_positions: bool = True) -> RankedRows:
    """Sort the rows by one score.

    Args:
        rows: The rows.
        score: The score.
        with_positions: Whether to find the position of each row, which :func:`make_cells` needs.
    """
    if with_positions:
        ranked = rank(rows.scores[score])
        codes = rows.codes.index_select(0, ranked.numbers)
    else:
        ranked = sort_with(rows.scores[score], rows.codes)
        codes = ranked.numbers
    present = [code for code, row_class in enumerate(rows.classes) if row_class.rows]
    sums = {}
    for code in present[:-1]:
        sums[code] = ranked.sums_to(torch.from_numpy(codes.numpy() == code))
    if present:  # the rows that are of no other class
        rest = ranked.ends.add(1)
        for known in sums.values():
            rest -= known
        sums[present[-1]] = rest
    return RankedRows(ranked, codes, sums, len(rows.classes))


@dataclass(frozen=True)
class Cells:
    """The rows of one score, grouped by row class and by cells of adjacent scores.

    Args:
        scores: ``(K,)``, the lowest score of each cell, ascending.
        order: ``(N,)``, the rows in the order of their class and cell.
        present: ``(C, K)``, whether a class has rows in a cell.
        starts: ``(E,)``, the position in ``order`` of the first row of each class and cell with rows.
    """

    scores: Tensor
    order: Tensor
    present: Tensor
    starts: Tensor

    def counts(self, weights: Tensor) -> Tensor:
        """Sum the weights of the rows in each cell and class.

        Args:
            weights: ``(N, B)`` in float32, whole numbers.

        Returns:
            ``(E, B)`` in float64, for each class and cell with rows.
        """
        if len(self.order) <= MOST_SUMMED:
            return torch.nn.functional.embedding_bag(self.order, weights, self.starts, mode="sum").double()
        pieces = torch.arange(0, len(self.order), MOST_SUMMED, dtype=self.starts.dtype)
        starts = torch.cat([self.starts, pieces]).unique()  # type: ignore[no-untyped-call]
        sums = torch.nn.functional.embedding_bag(self.order, weights, starts, mode="sum").double()
        of_piece = torch.searchsorted(self.starts, starts, right=True) - 1
        return sums.new_zeros(len(self.starts), sums.shape[1]).index_add_(0, of_piece, sums)


def make_cells(rows: RankedRows, most: int, tasks: Sequence[DetectionTask] = (), rate: float = 0.95) -> Cells:
    """Group rows into about ``most`` cells of equal size, with finer cells around the thresholds at the TPR.

    Tied rows share a cell. With at most ``most`` distinct scores, each score is a cell, and the metrics of cells are
    exact.

    Args:
        rows: The rows of one score.
        most: The number of cells of equal size.
        tasks: The tasks, for their thresholds.
        rate: The true-positive rate of the thresholds.
    """
    starts = rows.ranked.starts

    def positives_to(task: DetectionTask) -> Tensor:
        return rows.sums_of(task, task.positive).double()

    first = chosen_cells(starts, len(rows.codes), most, tasks, positives_to, rate)
    cell_starts = starts[first]
    members, present, class_starts, number = [], [], [], 0
    for code in range(rows.classes):
        chosen = positions(rows.codes == code)
        members.append(chosen)
        bounds = torch.cat([torch.searchsorted(chosen, cell_starts), cell_starts.new_full((1,), len(chosen))])
        is_present = bounds.diff() > 0
        present.append(is_present)
        class_starts.append(bounds[:-1][is_present] + number)
        number += len(chosen)
    order = rows.ranked.numbers.index_select(0, torch.cat(members))
    return Cells(rows.ranked.scores[first], order, torch.stack(present), torch.cat(class_starts).to(order.dtype))


def chosen_cells(
    starts: Tensor,
    number: int,
    most: int,
    tasks: Sequence[DetectionTask],
    positives_to: Callable[[DetectionTask], Tensor],
    rate: float,
) -> Tensor:
    """Return which of the distinct scores ``(G,)`` start a cell, bool.

    Args:
        starts: The number of rows below each distinct score ``(G,)``.
        number: The number of rows.
        most: The number of cells of equal size.
        tasks: The tasks, for finer cells near their thresholds.
        positives_to: From a task to its positives at or below each distinct score ``(G,)``, float64.
        rate: The true-positive rate of the thresholds.
    """
    first = torch.ones(len(starts), dtype=torch.bool)
    if len(starts) <= most:
        return first
    first = _changes(starts * most // number)
    for task in tasks:
        window = _threshold_window(task, positives_to(task), rate)
        inside = starts[window] - starts[window.start]
        fine = max(FEWEST_FINE, most // (2 * len(tasks)))
        first[window] |= _changes(inside * fine // (inside[-1] + 1))
    return first


def _changes(values: Tensor) -> Tensor:
    """Return whether each value differs from the one before it; true for the first."""
    changes = torch.ones(len(values), dtype=torch.bool)
    torch.ne(values[1:], values[:-1], out=changes[1:])
    return changes


def _threshold_window(task: DetectionTask, positives_to: Tensor, rate: float) -> slice:
    """Return the distinct scores within six standard deviations of the threshold, which nearly every resample uses."""
    total = positives_to[-1]
    share, spread = 1 - rate, 6 * math.sqrt(rate * (1 - rate) / max(task.count_positive, 1))
    bounds = torch.stack([(share - spread) * total, (share + spread) * total])
    low, high = torch.searchsorted(positives_to, bounds).tolist()
    return slice(max(low - 1, 0), min(high + 2, len(positives_to)))


def counts_of_task(task: DetectionTask, scores: Tensor, counts: Tensor | Mapping[int, Tensor]) -> Counts:
    """Return the counts ``(..., K)`` of one task from the counts ``(..., K)`` of each of its row classes."""
    return Counts.of(scores, weighted_counts(task, counts, task.negative), weighted_counts(task, counts, task.positive))


def weighted_counts(task: DetectionTask, counts: Tensor | Mapping[int, Tensor], codes: Sequence[int]) -> Tensor:
    """Return the sum ``(..., K)`` of the counts ``(..., K)`` of some classes, one or more, weighted as in the task."""
    total = counts[codes[0]] * task.weights.get(codes[0], 1.0)
    for code in codes[1:]:
        total = total.add_(counts[code], alpha=task.weights.get(code, 1.0))
    return total


def exact_counts(rows: RankedRows, task: DetectionTask) -> Counts:
    """Return the exact counts ``(G,)`` of one task."""
    counts = Counts(rows.ranked.distinct, rows.sums_of(task, task.negative), rows.sums_of(task, task.positive))
    samples = float(counts.negatives + counts.positives)
    if len(counts.negatives_to) >= MANY_SCORES and samples < TABLE_LIMIT:
        counts.known.update(_totals(counts, samples))
    return counts


def _totals(counts: Counts, samples: float) -> dict[str, Tensor]:
    """Return what several metrics are computed from, by one compiled kernel; nothing if there is no kernel."""
    from lightning_gradmetrics.engine.kernels.ranking import ranking_totals

    harmonic = harmonic_table(int(samples) + 1, counts.negatives_to.device)
    totals = ranking_totals(counts.negatives_to, counts.positives_to, harmonic)
    if totals is None:
        return {}
    pairs, risk, precision, precision_in = torch.tensor(totals, dtype=torch.float64)
    return {"pairs": pairs, "aurc": risk / samples, "precision": precision, "precision_in": precision_in}

"""The counts that the metrics of each task read, as rows of one table of counts for all tasks and all resamples."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from lightning_gradmetrics.evaluation.metrics import METRICS, TASKS
from lightning_gradmetrics.evaluation.tasks import DetectionTask
from lightning_gradmetrics.meters.functional.counts import Counts, Reads
from lightning_gradmetrics.meters.functional.sorting import positions

__all__ = ["GroupTable", "TaskCells", "cells_of_tasks", "groups_of"]

Codes = tuple[int, ...]
"""A group of row classes whose rows a task counts together."""

Places = slice | Tensor
"""Rows of a table; a slice is read without a copy."""


def groups_of(task: DetectionTask, side: Codes) -> list[Codes]:
    """Return the groups of the classes of one side: all those without a weight, and each with one."""
    plain: Codes = ()
    weighted: list[Codes] = []
    for code in side:
        if code in task.weights:
            weighted.append((code,))
        else:
            plain = (*plain, code)
    return [plain, *weighted] if plain else weighted


@dataclass(frozen=True)
class GroupTable:
    """The layout of a table of counts: each group of row classes has a row of zeros, then one row per cell that it occupies.

    Args:
        rows: The rows ``(S,)`` of a table of class counts, by row of this table.
        starts: The position ``(R,)`` in ``rows`` of the first one of each row.
        first: The row of zeros of each group.
        present: Whether a group has rows in a cell ``(K,)``.
    """

    rows: Tensor
    starts: Tensor
    first: Mapping[Codes, int]
    present: Mapping[Codes, Tensor]

    @classmethod
    def of(cls, tasks: Sequence[DetectionTask], present: Tensor) -> GroupTable:
        """Return the table of all groups that the tasks count.

        Args:
            tasks: The tasks.
            present: ``(C, K)``, whether a class has rows in a cell.
        """
        groups: dict[Codes, None] = {}
        for task in tasks:
            for side in (task.negative, task.positive):
                groups.update(dict.fromkeys(groups_of(task, side)))
        row_of = (present.flatten().cumsum(0) - 1).view_as(present)
        rows, starts, first, of_group, number, row = [], [], {}, {}, 0, 0
        for codes in groups:
            classes = present[list(codes)].T
            of_group[codes] = classes.any(1)
            rows.append(row_of[list(codes)].T[classes])
            sizes = classes.sum(1)[of_group[codes]]
            starts += [sizes.new_full((1,), number), number + sizes.cumsum(0) - sizes]
            first[codes] = row
            number, row = number + len(rows[-1]), row + len(sizes) + 1
        return cls(torch.cat(rows), torch.cat(starts), first, of_group)

    def counts(self, of_classes: Tensor) -> Tensor:
        """Return the counts ``(R, B)`` from those of the classes, one row per class and cell in which it has rows."""
        return torch.nn.functional.embedding_bag(self.rows, of_classes, self.starts, mode="sum")

    def sums(self, counts: Tensor) -> Tensor:
        """Return the cumulative sums ``(R, B)`` of counts ``(R, B)``, which begin again at each group."""
        sums = torch.empty_like(counts)
        bounds = [*self.first.values(), len(counts)]
        for begin, end in pairwise(bounds):
            torch.cumsum(counts[begin:end], 0, out=sums[begin:end])
        return sums


@dataclass(frozen=True)
class _GroupRows:
    """The rows of one group in a table of counts or sums, at the ``M`` cells that some metrics read.

    Args:
        weight: The weight of each sample.
        here: The row of the count of each cell; ``None`` if all counts are zero.
        until: The row of the sum up to each cell.
        total: The row of the sum of all cells.
    """

    weight: float
    here: Places | None
    until: Places
    total: int


@dataclass(frozen=True)
class TaskCells:
    """The cells of one score that some metrics of one task read.

    Args:
        task: The task.
        metrics: The names of the metrics.
        reads: The classes whose scores the metrics read.
        scores: ``(M,)``, the lowest score of each of these cells, ascending.
        negative: The rows of each group of negatives.
        positive: The rows of each group of positives.
    """

    task: DetectionTask
    metrics: tuple[str, ...]
    reads: Reads
    scores: Tensor
    negative: tuple[_GroupRows, ...]
    positive: tuple[_GroupRows, ...]

    def counts(self, counts: Tensor, sums: Tensor) -> Counts:
        """Return the counts ``(B, M)`` of the task, float64.

        Args:
            counts: The table of counts ``(R, B)`` of the groups.
            sums: Its cumulative sums ``(R, B)``.
        """
        zero = counts.new_zeros(()).expand(counts.shape[1], len(self.scores))
        negative, positive = _weighted(counts, self.negative, "here"), _weighted(counts, self.positive, "here")
        known = {
            "negative": zero if negative is None else negative,
            "positive": zero if positive is None else positive,
            "negatives": _total(sums, self.negative),
            "positives": _total(sums, self.positive),
        }
        negatives_to, positives_to = _weighted(sums, self.negative, "until"), _weighted(sums, self.positive, "until")
        assert negatives_to is not None and positives_to is not None
        tied = negative is not None and positive is not None
        return Counts(self.scores, negatives_to, positives_to, self.reads, tied, known)


def _weighted(table: Tensor, groups: Sequence[_GroupRows], name: str) -> Tensor | None:
    """Return the weighted sum ``(B, M)`` of rows of several groups; ``None`` if it is zero everywhere."""
    total: Tensor | None = None
    for group in groups:
        places = getattr(group, name)
        if places is None:
            continue
        rows = table.index_select(0, places) if isinstance(places, Tensor) else table[places]
        if total is not None:
            total = torch.add(total, rows, alpha=group.weight)
        else:
            total = rows if group.weight == 1 else group.weight * rows
    return None if total is None else total.mT


def _total(sums: Tensor, groups: Sequence[_GroupRows]) -> Tensor:
    """Return the weighted number ``(B,)`` of the rows of several groups."""
    total = sums.new_zeros(sums.shape[1])
    for group in groups:
        total = torch.add(total, sums[group.total], alpha=group.weight)
    return total


def cells_of_tasks(
    tasks: Sequence[DetectionTask], scores: Tensor, table: GroupTable, names: Container[str]
) -> list[TaskCells]:
    """Return the cells of one score that the metrics of every task read.

    Args:
        tasks: The tasks.
        scores: ``(K,)``, the lowest score of each cell.
        table: The groups of the tasks.
        names: The names of the metrics.
    """
    chosen = []
    for task in tasks:
        for reads, metrics in _metrics_by_reads(task, names).items():
            chosen.append(_task_cells(task, metrics, reads, scores, table))
    return chosen


def _metrics_by_reads(task: DetectionTask, names: Container[str]) -> dict[Reads, tuple[str, ...]]:
    metrics: dict[Reads, tuple[str, ...]] = {}
    for name in TASKS[task.task]:
        if name not in names:
            continue
        reads = METRICS[name].reads
        metrics[reads] = (*metrics.get(reads, ()), name)
    return metrics


def _task_cells(
    task: DetectionTask, metrics: tuple[str, ...], reads: Reads, scores: Tensor, table: GroupTable
) -> TaskCells:
    negative, positive = groups_of(task, task.negative), groups_of(task, task.positive)
    read = {"positives": positive, "negatives": negative, "all": [*negative, *positive]}[reads]
    cells = positions(torch.stack([table.present[codes] for codes in read]).any(0))
    sides = []
    for groups in (negative, positive):
        sides.append(tuple(_group_rows(table, codes, task.weights.get(codes[0], 1.0), cells) for codes in groups))
    return TaskCells(task, metrics, reads, scores[cells], *sides)


def _group_rows(table: GroupTable, codes: Codes, weight: float, cells: Tensor) -> _GroupRows:
    """Return the rows of one group at some cells ``(M,)``."""
    first, number = table.first[codes], table.present[codes].cumsum(0)
    is_here = table.present[codes].index_select(0, cells)
    until = number.index_select(0, cells) + first
    here = _places(torch.where(is_here, until, first)) if bool(is_here.any()) else None
    total = first + (int(number[-1]) if len(number) else 0)
    return _GroupRows(weight, here, _places(until), total)


def _places(rows: Tensor) -> Places:
    """Return rows ``(M,)`` as a slice if each follows the one before."""
    if len(rows) and bool((rows.diff() == 1).all()):
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return rows

"""The cells that the metrics of a task depend on, found once for all resamples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_gradmetrics.evaluation.cells import counts_of_task
from lightning_gradmetrics.evaluation.metrics import METRICS, TASKS, Reads
from lightning_gradmetrics.evaluation.tasks import DetectionTask
from lightning_gradmetrics.meters.functional.counts import Counts
from lightning_gradmetrics.meters.functional.sorting import positions

__all__ = ["TaskCells", "cells_of_tasks"]


@dataclass(frozen=True)
class TaskCells:
    """The cells of one score for some metrics of one task. Adjacent cells whose rows these metrics do not read are merged.

    Args:
        task: The task.
        metrics: The names of the metrics.
        reads: The classes whose scores the metrics read.
        scores: ``(M,)``, the lowest score of each merged cell, ascending.
        rows: ``(S,)``, numbers of pairs of a row class and a cell that contain rows, sorted by class of the task and merged cell.
        starts: ``(T * M,)``, where the numbers of each class of the task and merged cell start in ``rows``.
        places: The merged cells that contain rows which the metrics read.
    """

    task: DetectionTask
    metrics: tuple[str, ...]
    reads: Reads
    scores: Tensor
    rows: Tensor
    starts: Tensor
    places: Tensor

    def counts(self, counts: Tensor) -> Counts:
        """Return the counts ``(B, M)`` of the merged cells from those ``(C, B, K)`` of all classes and cells, float64."""
        sums = counts.transpose(1, 2).reshape(-1, counts.shape[1])
        merged = torch.nn.functional.embedding_bag(self.rows, sums, self.starts, mode="sum")
        by_class = merged.view(-1, len(self.scores), counts.shape[1]).transpose(1, 2)
        codes = (*self.task.negative, *self.task.positive)
        of_task = counts_of_task(self.task, self.scores, dict(zip(codes, by_class, strict=True)))
        of_task.known[self.reads] = self.places
        return of_task


def cells_of_tasks(tasks: Sequence[DetectionTask], scores: Tensor, present: Tensor) -> list[TaskCells]:
    """Return the merged cells of one score for the metrics of every task.

    Args:
        tasks: The tasks.
        scores: ``(K,)``, the lowest score of each cell.
        present: ``(C, K)``, whether a class has rows in a cell.
    """
    merged = []
    for task in tasks:
        metrics: dict[Reads, tuple[str, ...]] = {}
        for name in TASKS[task.task]:
            reads = METRICS[name].reads
            metrics[reads] = (*metrics.get(reads, ()), name)
        for reads, names in metrics.items():
            merged.append(_merged(task, names, reads, scores, present))
    return merged


def _merged(task: DetectionTask, metrics: tuple[str, ...], reads: Reads, scores: Tensor, present: Tensor) -> TaskCells:
    codes = (*task.negative, *task.positive)
    read = {"positives": task.positive, "negatives": task.negative, "all": codes}[reads]
    is_read = present[list(read)].any(0)
    first = is_read.clone()
    first[1:] |= is_read[:-1]
    first[:1] = True
    begins = positions(first)
    rows, starts, number = [], [], 0
    for code in codes:
        cells = positions(present[code])
        rows.append(cells + code * len(scores))
        starts.append(torch.searchsorted(cells, begins) + number)
        number += len(cells)
    return TaskCells(
        task, metrics, reads, scores[begins], torch.cat(rows), torch.cat(starts), positions(is_read[begins])
    )

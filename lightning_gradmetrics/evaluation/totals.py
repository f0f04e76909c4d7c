"""The totals of every task in each resample, from which the protocol's metrics follow, by a compiled kernel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import torch
from torch import Tensor

from lightning_gradmetrics.engine.kernels.resampling import (
    PRECISION,
    PRECISION_IN,
    RISK,
    TOTALS,
    CellGroups,
    resampled_totals,
)
from lightning_gradmetrics.evaluation.metrics import METRICS, TASKS, metrics_of
from lightning_gradmetrics.evaluation.task_cells import groups_of
from lightning_gradmetrics.evaluation.tasks import DetectionTask
from lightning_gradmetrics.meters.functional.counts import Counts
from lightning_gradmetrics.meters.functional.selective import TABLE_LIMIT, harmonic_table

__all__ = ["TaskTotals"]

FEWEST_HARMONIC = 1024
"""Smallest length of the table of harmonic numbers."""

FLAGS = {"aurc": RISK, "e_aurc": RISK, "aupr": PRECISION, "aupr_in": PRECISION_IN}
"""The totals that a metric needs, beside those that cost nothing."""


@dataclass(frozen=True)
class TaskTotals:
    """The totals of all tasks for one score.

    Args:
        tasks: The tasks.
        rate: The true-positive rate of ``fpr95``.
        layout: The cells of the score.
        harmonic: Harmonic numbers.
        values: The totals ``(T, 7, B)``.
    """

    tasks: Sequence[DetectionTask]
    rate: float
    layout: CellGroups
    harmonic: Tensor
    values: Tensor

    @classmethod
    def of(cls, tasks: Sequence[DetectionTask], present: Tensor, rate: float, resamples: int) -> TaskTotals:
        """Return the totals of one score, not yet computed.

        Args:
            tasks: The tasks.
            present: ``(C, K)``, whether a class has rows in a cell.
            rate: The true-positive rate of ``fpr95``.
            resamples: ``B``.
        """
        values = torch.empty(len(tasks), len(TOTALS), resamples, dtype=torch.float64)
        return cls(tasks, rate, _layout(tasks, present), _harmonic(tasks), values)

    def add(self, start: int, counts: Tensor) -> None:
        """Compute the totals of ``b`` resamples.

        Args:
            start: The number of the first of these resamples.
            counts: ``(E, b)`` in float64, the rows of each class and cell in which it has rows, in this order.
        """
        self.values[..., start : start + counts.shape[1]] = resampled_totals(
            self.layout, counts, self.rate, self.harmonic
        )

    def metrics(self) -> Iterator[tuple[DetectionTask, str, Tensor]]:
        """Yield each task, the name of each metric that needs totals only, and its values ``(B,)``."""
        for task, values in zip(self.tasks, self.values, strict=True):
            names = [name for name in TASKS[task.task] if METRICS[name].totals]
            for name, replicates in metrics_of(names, self._counts(values), self.rate).items():
                yield task, name, replicates

    def _counts(self, values: Tensor) -> Counts:
        """Return counts ``(B, 0)`` without scores, whose totals ``(7, B)`` are known."""
        known = dict(zip(TOTALS, values.unbind(), strict=True))
        known["aurc"] = known.pop("risk") / (known["negatives"] + known["positives"])
        known[f"flagged at {self.rate}"] = known.pop("flagged")
        none = values.new_zeros(values.shape[1], 0)
        return Counts(none[0], none, none, known=known)


def _layout(tasks: Sequence[DetectionTask], present: Tensor) -> CellGroups:
    """Return the cells and groups of one score as the kernel reads them."""
    groups_by_class: list[list[int]] = [[] for _ in present]
    weights: list[float] = []
    sides = [0]
    for task in tasks:
        for side in (task.negative, task.positive):
            for codes in groups_of(task, side):
                for code in codes:
                    groups_by_class[code].append(len(weights))
                weights.append(task.weights.get(codes[0], 1.0))
            sides.append(len(weights))
    cells, classes = present.T.nonzero().unbind(1)  # in ascending order of cells
    row = (present.flatten().cumsum(0) - 1).view_as(present)
    sizes = torch.bincount(cells, minlength=present.shape[1])
    return CellGroups(
        cells=_integers([0, *sizes.cumsum(0).tolist()]),
        rows=row[classes, cells].int(),
        classes=classes.int(),
        of_class=_integers([0, *accumulate(map(len, groups_by_class))]),
        groups=_integers(list(chain.from_iterable(groups_by_class))),
        sides=_integers(sides),
        wanted=_integers([_flags(task) for task in tasks]),
        weights=torch.tensor(weights, dtype=torch.float64),
    )


def _integers(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _flags(task: DetectionTask) -> int:
    """Return the sum of the flags of the totals that the metrics of a task need."""
    flags = 0
    for name in TASKS[task.task]:
        flags |= FLAGS.get(name, 0)
    return flags


def _harmonic(tasks: Sequence[DetectionTask]) -> Tensor:
    """Return harmonic numbers up to the weighted number of samples of nearly every resample, or as far as memory allows."""
    largest = float(FEWEST_HARMONIC)
    for task in tasks:
        weight = max(task.weights.values(), default=1.0)
        samples = task.count_negative + task.count_positive + (weight - 1) * (task.count_ood or 0)
        largest = max(largest, 1.5 * samples)
    return harmonic_table(int(min(largest, TABLE_LIMIT)), torch.device("cpu"))

"""The totals that ranking metrics need, for several tasks and many resamples, by one compiled kernel."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_gradmetrics.engine.kernels.jobs import ResampledJob
from lightning_gradmetrics.engine.kernels.library import library_for

__all__ = ["PRECISION", "PRECISION_IN", "RISK", "TOTALS", "CellGroups", "has_kernel", "resampled_totals"]

LIBRARY = torch.float32
"""The library that is used: most processes have loaded it for gradients, and the code is the same in the other one."""

RISK, PRECISION, PRECISION_IN = 1, 2, 4
"""The totals that a task may want, beside those that cost nothing."""

TOTALS = ("pairs", "risk", "precision", "precision_in", "flagged", "negatives", "positives")
"""The totals of a task, in the order of the kernel."""


@dataclass(frozen=True)
class CellGroups:
    """The cells of one score and the groups of row classes that the tasks count, as the kernel reads them.

    An entry is a class and a cell in which it has rows. A group is a set of classes that one task counts on one side with
    one weight.

    Args:
        cells: ``(K + 1,)`` in int32, the first entry of each cell; entries are in ascending order of their cells.
        rows: ``(E,)`` in int32, the row of each entry in the counts.
        classes: ``(E,)`` in int32, the class of each entry.
        of_class: ``(C + 1,)`` in int32, the first place in ``groups`` of each class.
        groups: The groups of the classes, int32.
        sides: ``(2 T + 1,)`` in int32, the first group of the negatives and of the positives of each task.
        wanted: ``(T,)`` in int32, the sum of the flags of the totals that a task wants.
        weights: The weight of each group, float64.
    """

    cells: Tensor
    rows: Tensor
    classes: Tensor
    of_class: Tensor
    groups: Tensor
    sides: Tensor
    wanted: Tensor
    weights: Tensor


def has_kernel() -> bool:
    """Return whether there is a kernel; compiles it if that has not happened yet."""
    return library_for(LIBRARY) is not None


def resampled_totals(layout: CellGroups, counts: Tensor, rate: float, harmonic: Tensor) -> Tensor:
    """Return the totals of all tasks in each resample.

    Args:
        layout: The cells and the groups.
        counts: ``(E, B)`` in float64, the rows of each entry, whole numbers.
        rate: The true-positive rate of the threshold for ``flagged``.
        harmonic: The harmonic numbers from 0 to 1,023 or further, float64; the kernel computes larger ones itself.

    Returns:
        ``(T, 7, B)``, the totals of :data:`TOTALS`: the pairs of a positive and a lower negative, ties by half; over all
        positives, ``H_N - H_{k-1}`` of the ``k``-th of ``N`` samples, averaged over all orders of ties, and the precision
        at their scores; over all negatives, the precision if low scores are flagged; the negatives at or above the
        highest threshold that at least ``rate`` of the positives reach; the weighted numbers of negatives and positives.
        Totals that a task does not want are 0.

    Raises:
        ValueError: If there is no kernel, or the counts are not those of the entries.
    """
    library = library_for(LIBRARY)
    if library is None:
        raise ValueError(
            "the compiled kernel for resamples is not available; call this function only if has_kernel() returns True"
        )
    if counts.shape[0] != len(layout.rows) or counts.dtype != torch.float64 or counts.device.type != "cpu":
        raise ValueError(f"the counts must be ({len(layout.rows)}, B) in float64 on the CPU, got {tuple(counts.shape)}")
    counts = counts.contiguous()
    tasks, resamples = len(layout.wanted), counts.shape[1]
    out = torch.empty(tasks, len(TOTALS), resamples, dtype=torch.float64)
    scratch = torch.empty(library.resampled_scratch_bytes(tasks, len(layout.weights), 0), dtype=torch.uint8)
    job = ResampledJob(
        counts=counts.data_ptr(),
        harmonic=harmonic.data_ptr(),
        cells=layout.cells.data_ptr(),
        rows=layout.rows.data_ptr(),
        classes=layout.classes.data_ptr(),
        of_class=layout.of_class.data_ptr(),
        groups=layout.groups.data_ptr(),
        sides=layout.sides.data_ptr(),
        wanted=layout.wanted.data_ptr(),
        weights=layout.weights.data_ptr(),
        out=out.data_ptr(),
        scratch=scratch.data_ptr(),
        rate=rate,
        resamples=resamples,
        cell_count=len(layout.cells) - 1,
        class_count=len(layout.of_class) - 1,
        task_count=tasks,
        harmonics=len(harmonic),
    )
    library.resampled_totals(ctypes.byref(job), None, 1)
    return out

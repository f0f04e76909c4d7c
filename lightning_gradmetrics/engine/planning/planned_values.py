"""What a plan expects of values that change the course of a forward pass: those that Python reads, and masks that select rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning_gradmetrics.engine.tracing.dependence import SAMPLES, DependenceTrace, Operation
from lightning_gradmetrics.engine.tracing.host_reads import HostRead, PlannedRead
from lightning_gradmetrics.engine.tracing.layouts import Layout
from lightning_gradmetrics.engine.tracing.trace import CallTrace

__all__ = ["planned_masks", "planned_reads"]


def planned_reads(
    small: CallTrace, large: CallTrace, many: DependenceTrace, layouts: Mapping[int, Layout]
) -> tuple[PlannedRead, ...]:
    """Return the values that Python reads, and where the samples are in the tensors that they are computed from."""
    planned = []
    for number, read in enumerate(large.reads):
        by_samples = bool(many.depends(read.tensor) & SAMPLES)
        layout = None if read.reduction is None else layouts.get(many.serial(read.reduction.source))
        grows = _count_grows(small.reads[number], read) if len(small.reads) == len(large.reads) else None
        planned.append(PlannedRead(read.value, by_samples, layout, grows))
    return tuple(planned)


def _count_grows(two: HostRead, three: HostRead) -> bool | None:
    """Return whether a sum is compared with a multiple of the number of samples; ``None`` if that is not known."""
    small = None if two.reduction is None else two.reduction.count
    large = None if three.reduction is None else three.reduction.count
    if small is None or large is None or not (small == large or 3 * small == 2 * large):
        return None
    return small != large


def planned_masks(
    large: CallTrace, many: DependenceTrace, operations: Sequence[Operation]
) -> tuple[int | None, ...] | None:
    """Return for each mask that selects rows how many entries of each sample it marks, which a proof has found to be equal.

    Args:
        large: The calls with three samples.
        many: Their dependences.
        operations: Their operations.

    Returns:
        The numbers, ``None`` for masks that do not depend on the samples, and no numbers if that holds for all; or ``None`` if some masks
        are not seen.
    """
    marks = [operation.marks for operation in operations if operation.marks]
    planned: list[int | None] = []
    for mask in large.masks:
        if not many.depends(mask) & SAMPLES:
            planned.append(None)
        elif marks:
            planned.append(sum(marks.pop(0)) // 3)
        else:
            return None
    if marks:
        return None
    return tuple(planned) if any(planned) else ()

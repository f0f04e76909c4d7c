"""Removes detaches that autograd inserts from traced operations: their number depends on the version of torch."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch import Tensor

from lightning_gradmetrics.engine.tracing.dependence import DependenceTrace, Operation

__all__ = ["used_operations"]


def used_operations(
    trace: DependenceTrace, ends: Iterable[Tensor], unused: Collection[int] = frozenset()
) -> list[Operation]:
    """Return the operations with one detach instead of several in a row, and without detaches whose result nothing uses.

    Args:
        trace: The trace of a forward pass.
        ends: The results of the forward pass.
        unused: The numbers of other operations to leave out.
    """
    used, kept = set(map(trace.serial, ends)), []
    operations = [operation for number, operation in enumerate(trace.operations) if number not in unused]
    for operation in reversed(_merged(operations)):
        if operation.name != "detach" or not used.isdisjoint(operation.output_serials):
            used.update(operation.input_serials)
            kept.append(operation)
    return kept[::-1]


def _merged(operations: Iterable[Operation]) -> list[Operation]:
    """Return the operations, in which a detach of a tensor that was just detached has the first tensor as its argument."""
    merged: list[Operation] = []
    for operation in operations:
        before = merged[-1] if merged else operation
        if operation.name == before.name == "detach" and operation.input_serials == before.output_serials:
            operation = operation._replace(input_serials=before.input_serials)
        merged.append(operation)
    return merged

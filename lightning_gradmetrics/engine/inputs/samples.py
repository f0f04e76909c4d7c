"""The structure of the inputs, and comparison of logits row by row."""

from __future__ import annotations

import operator
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_gradmetrics.classifier.forward import tensors_in
from lightning_gradmetrics.engine.refusals import SampleAxisError, list_as_long_as_the_batch
from lightning_gradmetrics.engine.task import Task
from lightning_gradmetrics.engine.tracing.model_state import quiet_no_grad
from lightning_gradmetrics.gradients.precision import accumulator, rounding

__all__ = [
    "are_rows_of",
    "close_rows",
    "different_rows",
    "input_shapes",
    "input_structure",
    "logits_without_graph",
    "same_rows",
    "shared_list",
]


def input_structure(inputs: Any) -> Hashable:
    """Return the nesting of the inputs, with the number of axes, type and device of each tensor, without sizes."""
    if isinstance(inputs, Tensor):
        return (inputs.ndim, inputs.dtype, inputs.device)
    if isinstance(inputs, Mapping):
        return tuple((key, input_structure(value)) for key, value in inputs.items())
    if isinstance(inputs, (list, tuple)):
        return (type(inputs).__name__, *(input_structure(value) for value in inputs))
    return inputs if isinstance(inputs, (bool, int, float, str, type(None))) else type(inputs).__name__


def input_shapes(task: Task) -> Hashable:
    """Return the shapes of all tensors in the inputs, without the sample axis."""
    shapes = []
    for tensor, has_samples in zip(tensors_in(task.inputs), task.per_sample, strict=True):
        shapes.append(tuple(tensor.shape[1:] if has_samples else tensor.shape))
    return tuple(shapes)


def logits_without_graph(task: Task, quiet: bool) -> Tensor:
    """Return the logits, computed without gradients unless the forward pass itself computes some.

    Args:
        task: The batch.
        quiet: Whether reentrant checkpoints may warn that they run without gradients.
    """
    with quiet_no_grad(quiet):
        try:
            return task.forward()
        except RuntimeError as error:
            if not any(map(str(error).__contains__, _NEED_GRAPHS)):
                raise
            with torch.enable_grad():
                return task.forward().detach()


_NEED_GRAPHS = ("require grad", "not have been used in the graph")
"""Parts of the errors of ``torch.autograd.grad`` inside a forward pass that runs without gradients."""


def shared_list(task: Task) -> SampleAxisError | None:
    """Return the error for a list or an array that is as long as the batch, or ``None`` if the inputs contain none.

    Only tensors are split into samples. A list is passed unchanged, even with part of the batch.
    """
    waiting: list[Any] = [task.inputs]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Mapping):
            waiting.extend(value.values())
        elif isinstance(value, (list, tuple)) and next(tensors_in(value), None) is not None:
            waiting.extend(value)
        elif not isinstance(value, (str, bytes, Tensor)) and hasattr(value, "__len__") and len(value) == task.size:
            return list_as_long_as_the_batch(type(value).__name__, task.size)
    return None


FEW_ENTRIES = 64
"""Largest number of entries of a single row that Python compares, which is faster than several torch calls."""


def are_rows_of(logits: Tensor, parts: Iterable[tuple[Sequence[int], Tensor]]) -> bool:
    """Return whether the logits of some samples alone are those of a batch ``(N, C)``, up to rounding.

    Args:
        logits: The logits of the batch.
        parts: The numbers of some samples, and their logits without the others.
    """
    for samples, part in parts:
        expected = logits[list(samples)]
        if part.shape != expected.shape or not close_rows(part, expected):
            return False
    return True


def close_rows(found: Tensor, expected: Tensor, tolerance: float | None = None) -> bool:
    """Return whether two tensors are equal up to the rounding of a different batch size, relative to each row's largest entry.

    Args:
        found: The first tensor.
        expected: The second tensor.
        tolerance: The largest relative difference; by default that of rounding.
    """
    tolerance = rounding(expected) if tolerance is None else tolerance
    return _are_clearly_close(found, expected, tolerance) or not different_rows(found, expected, tolerance)


def _are_clearly_close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Return whether the largest difference is small beside the smallest row: a cheap test that settles most cases."""
    is_plain = found.dtype == expected.dtype and expected.dtype in (torch.float32, torch.float64)
    if not is_plain or found.shape != expected.shape or not expected.numel():
        return False
    if expected.is_cpu and len(expected) == 1 and expected.numel() <= FEW_ENTRIES:
        row = expected.flatten().tolist()
        allowed = tolerance * max(map(abs, row))
        differences = map(operator.sub, found.flatten().tolist(), row)
        return all(abs(difference) < allowed for difference in differences)  # false if anything is not finite
    error = (found - expected).abs().amax()
    smallest = expected.flatten(1).abs().amax(1).amin()
    return bool(error < tolerance * smallest)  # false if anything is infinite or not a number


def different_rows(found: Tensor, expected: Tensor, tolerance: float | None = None) -> list[int]:
    """Return the numbers of the rows in which two tensors differ by more than the rounding of a different batch size."""
    tolerance = rounding(expected) if tolerance is None else tolerance
    if expected.is_complex():
        found, expected = torch.view_as_real(found.resolve_conj()), torch.view_as_real(expected.resolve_conj())
    wide = accumulator(expected)
    found, expected = found.to(wide).flatten(1), expected.to(wide).flatten(1)
    finite = expected.isfinite()
    other = (found.isfinite() != finite).any(1)
    zero = torch.zeros((), dtype=wide, device=expected.device)
    level = torch.where(finite, expected, zero).abs().amax(1, keepdim=True)
    error = torch.where(finite, found - expected, zero).abs()
    other |= (error > tolerance * level + 1e-30).any(1)
    numbers: list[int] = other.nonzero().flatten().tolist()
    return numbers


def same_rows(found: Tensor, expected: Tensor, tight: bool) -> bool:
    """Return whether logits are equal up to the rounding of one kernel (``tight``) or of several."""
    if not tight:
        return close_rows(found, expected)
    step = 16 * torch.finfo(expected.dtype).eps
    level = expected.nan_to_num(0, 0, 0).abs().amax(1, keepdim=True)
    return bool(
        torch.isclose(found, expected, 0.0, 0.0, equal_nan=True)
        .logical_or((found - expected).abs() <= step * level)
        .all()
    )

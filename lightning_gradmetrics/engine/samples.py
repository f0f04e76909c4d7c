"""Decides which input tensors have one row per sample, and which are shared by all samples."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lightning_gradmetrics.classifier.forward import tensors_in
from lightning_gradmetrics.engine.model_state import ForwardState, quiet_no_grad
from lightning_gradmetrics.engine.refusals import SampleAxisError, list_as_long_as_the_batch
from lightning_gradmetrics.engine.task import Task
from lightning_gradmetrics.gradients.precision import accumulator, rounding

__all__ = [
    "check_rows",
    "close_rows",
    "different_rows",
    "input_shapes",
    "input_structure",
    "shared_list",
    "with_sample_axes",
]

_EQUAL_AT: WeakKeyDictionary[nn.Module, dict[Hashable, dict[int, int]]] = WeakKeyDictionary()
"""For each tensor, the batch size at which it was as long as the batch and found to be shared; 0 once its length differed."""

_DECIDED: WeakKeyDictionary[nn.Module, dict[Hashable, dict[int, bool]]] = WeakKeyDictionary()
"""The tensors with samples, by number, for each model and structure of its inputs."""

MOST_OPEN = 4
"""Largest number of ambiguous tensors for which all combinations are tried."""


def input_structure(inputs: Any) -> Hashable:
    """Return the nesting of the inputs, with the number of axes, type and device of each tensor, without sizes."""
    if isinstance(inputs, Tensor):
        return (inputs.ndim, inputs.dtype, inputs.device)
    if isinstance(inputs, Mapping):
        return tuple((key, input_structure(value)) for key, value in inputs.items())
    if isinstance(inputs, (list, tuple)):
        return (type(inputs).__name__, *(input_structure(value) for value in inputs))
    return inputs if isinstance(inputs, (bool, int, float, str, type(None))) else type(inputs).__name__


def input_shapes(inputs: Any, per_sample: Sequence[bool]) -> Hashable:
    """Return the shapes of all tensors in the inputs, without the sample axis."""
    shapes = []
    for tensor, has_samples in zip(tensors_in(inputs), per_sample, strict=True):
        shapes.append(tuple(tensor.shape[1:] if has_samples else tensor.shape))
    return tuple(shapes)


def with_sample_axes(task: Task) -> Task:
    """Return the task with ``per_sample`` filled in.

    A tensor that is as long as the batch may nevertheless be shared: class weights ``(C,)`` with ``N = C``, positions ``(T,)`` with
    ``N = T``. Running the model on parts of the batch decides, once for each structure of the inputs. If the tensor is as long as the
    batch at a second size too, it has samples, unless its length ever differed.

    Raises:
        SampleAxisError: If the model fails for every choice of the shared tensors.
    """
    tensors = list(tensors_in(task.inputs))
    if len(tensors) == 1:
        return replace(task, per_sample=(True,))
    flags = [tensor.ndim > 0 and len(tensor) == task.size for tensor in tensors]
    first = flags.index(True)
    decided = _DECIDED.setdefault(task.model, {}).setdefault(input_structure(task.inputs), {})
    equal_at = _EQUAL_AT.setdefault(task.model, {}).setdefault(input_structure(task.inputs), {})
    for number, tensor in enumerate(tensors):
        shared = not flags[number] and tensor.ndim > 0 and len(tensor) != 1
        if shared and decided.get(number, False):
            del decided[number]  # shared in some batches only: decide by a run whenever it is ambiguous
        elif shared:
            decided[number] = False
            equal_at[number] = 0
    ambiguous = []
    for number, flag in enumerate(flags):
        if flag and number != first and number not in decided:
            ambiguous.append(number)
        elif flag and number != first:
            if equal_at.get(number, 0) not in (0, task.size):
                decided[number] = True
            flags[number] = decided[number]
    if ambiguous and task.size:
        flags = _by_runs(task, flags, ambiguous)
        for number in ambiguous:
            decided[number] = flags[number]
            if not flags[number]:
                equal_at.setdefault(number, task.size)
    return replace(task, per_sample=tuple(flags))


def check_rows(task: Task) -> None:
    """Refuse a model whose logits for the batch do not have one row per sample.

    Raises:
        SampleAxisError: If the rows are not the samples.
    """
    if task.size:
        _logits(task)


def _by_runs(task: Task, flags: Sequence[bool], ambiguous: Sequence[int]) -> list[bool]:
    """Return which tensors have samples: the choice with equal logits in parts of the batch, or the only one that runs."""
    everything = _logits(replace(task, per_sample=tuple(flags)))
    runnable = []
    for choice in _choices(len(ambiguous)):
        reading = list(flags)
        for number, holds_samples in zip(ambiguous, choice, strict=True):
            reading[number] = holds_samples
        runs, agrees = _tried(replace(task, per_sample=tuple(reading)), everything)
        if agrees:
            return reading
        if runs:
            runnable.append(reading)
    if not runnable:
        raise SampleAxisError(
            f"{type(task.model).__name__} runs on the whole batch but not on 2 or 3 of its {task.size} samples, whichever "
            "inputs are split. The first axis of the first input must be the sample axis; inputs that all samples share must "
            "not depend on the size of the batch. Pass sample_axis= if the samples are on another axis"
        )
    return runnable[0]


def _choices(count: int) -> Sequence[tuple[bool, ...]]:
    if count > MOST_OPEN:
        return [(True,) * count, (False,) * count]
    return list(itertools.product((True, False), repeat=count))


def _tried(task: Task, everything: Tensor) -> tuple[bool, bool]:
    """Return whether the model runs on two and on three samples, and whether their logits equal those in the whole batch."""
    runs, agrees = True, True
    for count in (2, 3):
        samples = [number % task.size for number in range(count)]
        try:
            logits = _logits(task.picked(samples))
        except Exception:  # any error of the model means that the inputs were split in the wrong way
            return False, False
        runs = runs and logits.ndim > 0 and len(logits) == count
        agrees = agrees and runs and logits.shape[1:] == everything.shape[1:] and len(everything) == task.size
        agrees = agrees and close_rows(logits, everything[samples])
    return runs, agrees


def _logits(task: Task) -> Tensor:
    state = ForwardState(task.model)
    with quiet_no_grad(True):
        try:
            return task.forward()
        finally:
            state.restore()


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

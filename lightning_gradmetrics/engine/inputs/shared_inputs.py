"""Decides which input tensors have one row per sample, and which are shared by all samples."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from lightning_gradmetrics.classifier.forward import Inputs, tensors_in
from lightning_gradmetrics.classifier.sample_axis import SampleAxis, tensor_axes
from lightning_gradmetrics.engine.inputs.assumption import Assumption
from lightning_gradmetrics.engine.inputs.samples import close_rows, input_structure, logits_without_graph
from lightning_gradmetrics.engine.refusals import SampleAxisError, ambiguous_inputs, wrong_length
from lightning_gradmetrics.engine.task import Task
from lightning_gradmetrics.engine.tracing.model_state import ForwardState

__all__ = ["SampleForward", "sample_flags", "with_sample_axes"]

SampleForward = Callable[["Sequence[int] | None", Sequence[bool]], Tensor]
"""Returns the logits of some samples (``None`` for all), given which tensors have one row per sample."""

MOST_OPEN = 4
"""Largest number of ambiguous tensors for which all combinations are tried."""

EVERY_SIZE, NO_SIZE = 0, -1


@dataclass(frozen=True)
class _Known:
    """What is known of one tensor of a model's inputs.

    Args:
        has_samples: Whether it has one row per sample.
        equal_at: The only batch size for which that is known; ``EVERY_SIZE`` if it holds for all, ``NO_SIZE`` for none.
    """

    has_samples: bool
    equal_at: int = EVERY_SIZE


_KNOWN: WeakKeyDictionary[nn.Module, dict[Hashable, dict[int, _Known]]] = WeakKeyDictionary()
"""The known tensors by number, for each model and structure of its inputs."""


def with_sample_axes(task: Task, stated: SampleAxis = 0, may_assume: bool = False) -> Task:
    """Return the task with ``per_sample`` filled in.

    Args:
        task: The task.
        stated: For arguments, 0 if they have samples, ``None`` if all samples share them.
        may_assume: Whether to assume that tensors of unknown kind have one row per sample, if ``Task.decided`` is called later.

    Raises:
        SampleAxisError: If an input is ambiguous, or the model fails for every choice of the shared tensors.
    """
    if isinstance(task.inputs, Tensor):
        return task if task.per_sample else replace(task, per_sample=(True,))

    def forward(samples: Sequence[int] | None, flags: Sequence[bool]) -> Tensor:
        part = replace(task, per_sample=tuple(flags))
        return _logits(part if samples is None else part.picked(samples))

    flags, ambiguous, known = _flags(task.model, task.inputs, task.size, stated)

    def decide() -> tuple[bool, ...]:
        return sample_flags(task.model, task.inputs, task.size, forward, stated)

    def note() -> None:
        for number in ambiguous:
            _note_decision(known, number, True, task.size)

    if not ambiguous or not task.size:
        return replace(task, per_sample=tuple(flags))
    if may_assume:
        return replace(task, per_sample=tuple(flags), assumption=Assumption(decide, note))
    return replace(task, per_sample=decide())


def sample_flags(
    model: nn.Module, inputs: Inputs, size: int, forward: SampleForward, stated: SampleAxis = 0
) -> tuple[bool, ...]:
    """Return for each tensor of the inputs whether it has one row per sample.

    A tensor that is as long as the batch may nevertheless be shared: class weights ``(C,)`` with ``N = C``, positions ``(T,)`` with
    ``N = T``. It is shared if it had another length in an earlier batch, or if a call with fewer samples and as many of its rows fails
    or returns a different number of classes. If such calls work, but their logits equal those of the batch only without splitting
    the tensor, it is ambiguous: for example, a mask of which only the longest row counts.

    Args:
        model: The model.
        inputs: Its inputs.
        size: The number of samples ``N``.
        forward: Returns the logits of some samples.
        stated: For arguments, 0 if they have samples, ``None`` if all samples share them.

    Raises:
        SampleAxisError: If an input is ambiguous, or the model fails for every choice of the shared tensors.
    """
    flags, ambiguous, known = _flags(model, inputs, size, stated)
    if ambiguous and size:
        axes = tensor_axes(model, inputs, stated)
        flags = _decided(flags, ambiguous, size, forward, model, [axis.argument for axis in axes])
        for number in ambiguous:
            _note_decision(known, number, flags[number], size)
    return tuple(flags)


def _flags(
    model: nn.Module, inputs: Inputs, size: int, stated: SampleAxis
) -> tuple[list[bool], list[int], dict[int, _Known]]:
    """Return for each tensor whether it has one row per sample, the numbers of those that may be shared, and what is known.

    Tensors that may be shared are as long as the batch, and their flags are true.
    """
    tensors, axes = list(tensors_in(inputs)), tensor_axes(model, inputs, stated)
    flags = [tensor.ndim > 0 and len(tensor) == size for tensor in tensors]
    is_first = True
    known = _KNOWN.setdefault(model, {}).setdefault((input_structure(inputs), _key(stated)), {})
    ambiguous = []
    for number, (tensor, axis) in enumerate(zip(tensors, axes, strict=True)):
        if axis.is_stated:
            if axis.axis == 0 and not flags[number]:
                raise wrong_length(axis.argument, tuple(tensor.shape), size)
            flags[number] = axis.axis == 0
        elif flags[number] and not is_first:
            entry = known.get(number)
            if entry is None or entry.equal_at not in (EVERY_SIZE, size):
                ambiguous.append(number)
            else:
                flags[number] = entry.has_samples
        elif not flags[number] and tensor.ndim > 0 and len(tensor) != 1:
            _note_other_length(known, number)
        is_first = is_first and not flags[number]
    return flags, ambiguous, known


def _key(stated: SampleAxis) -> Hashable:
    return tuple(stated.items()) if isinstance(stated, Mapping) else stated


def _note_decision(known: dict[int, _Known], number: int, has_samples: bool, size: int) -> None:
    """Record the decision on a tensor that is as long as the batch."""
    entry = known.get(number)
    if entry is None or entry.equal_at != NO_SIZE:
        known[number] = _Known(has_samples, EVERY_SIZE if has_samples and size > 1 else size)


def _note_other_length(known: dict[int, _Known], number: int) -> None:
    """Record that a tensor is not as long as the batch, so all samples share it, at least in some batches."""
    entry = known.get(number)
    had_samples = entry is not None and entry.has_samples and entry.equal_at in (EVERY_SIZE, NO_SIZE)
    known[number] = _Known(had_samples, NO_SIZE if had_samples else EVERY_SIZE)


def _decided(
    flags: Sequence[bool],
    ambiguous: Sequence[int],
    size: int,
    forward: SampleForward,
    model: nn.Module,
    names: Sequence[object],
) -> list[bool]:
    """Return which tensors have samples: the choice with equal logits in parts of the batch, or the only one that runs.

    Raises:
        SampleAxisError: If it is ambiguous, or no choice runs.
    """
    everything = forward(None, flags)
    runnable = []
    readings = list(_readings(flags, ambiguous))
    for reading in readings if size > 1 else reversed(readings):  # for a single sample, nothing needs to be split
        runs, agrees = _tried(reading, size, forward, everything)
        if agrees:
            _check_unambiguous(reading, ambiguous, everything, forward, names)
            return reading
        if runs:
            runnable.append(reading)
    if not runnable:
        raise SampleAxisError(
            f"{type(model).__name__} runs on the whole batch but not on 2 or 3 of its {size} samples, whichever inputs are split. "
            "The first axis of the first input must be the sample axis; inputs that all samples share must not depend on the size "
            "of the batch. Pass sample_axis= if the samples are on another axis"
        )
    return runnable[0]


def _readings(flags: Sequence[bool], ambiguous: Sequence[int]) -> Iterator[list[bool]]:
    """Yield the choices of the tensors with samples, those with most of them first."""
    choices: list[tuple[bool, ...]] = [(True,) * len(ambiguous), (False,) * len(ambiguous)]
    if len(ambiguous) <= MOST_OPEN:
        choices = sorted(itertools.product((True, False), repeat=len(ambiguous)), key=sum, reverse=True)
    for choice in choices:
        reading = list(flags)
        for number, has_samples in zip(ambiguous, choice, strict=True):
            reading[number] = has_samples
        yield reading


def _check_unambiguous(
    reading: Sequence[bool],
    ambiguous: Sequence[int],
    everything: Tensor,
    forward: SampleForward,
    names: Sequence[object],
) -> None:
    """Refuse a reading with shared tensors if the model also runs with as many of their rows as samples.

    Rows that are classes, such as prototypes, are shared: otherwise the number of classes would be that of the samples.

    Raises:
        SampleAxisError: If it does.
    """
    if len(everything) == 1:  # both readings are the same
        return
    for other in _readings(reading, ambiguous):
        split = [number for number in ambiguous if other[number] and not reading[number]]
        keeps = all(other[number] for number in ambiguous if reading[number])
        if split and keeps and _runs_at_some_size(other, everything, forward):
            raise ambiguous_inputs([names[number] for number in split], len(everything))


def _runs_at_some_size(flags: Sequence[bool], everything: Tensor, forward: SampleForward) -> bool:
    """Return whether the model has the same classes with more or fewer samples; one sample, which is broadcast, does not count."""
    size = len(everything)
    for count in sorted({2, 3, size - 1, size + 1} - {0, 1, size}):
        try:
            logits = forward([number % size for number in range(count)], flags)
        except Exception:  # any error of the model
            continue
        if logits.shape == (count, *everything.shape[1:]):
            return True
    return False


def _tried(flags: Sequence[bool], size: int, forward: SampleForward, everything: Tensor) -> tuple[bool, bool]:
    """Return whether the model runs on two and on three samples, and whether their logits equal those in the whole batch."""
    runs, agrees = True, True
    for count in (2, 3):
        samples = [number % size for number in range(count)]
        try:
            logits = forward(samples, flags)
        except Exception:  # any error of the model means that the inputs were split in the wrong way
            return False, False
        runs = runs and logits.ndim > 0 and len(logits) == count
        agrees = agrees and runs and logits.shape[1:] == everything.shape[1:] and len(everything) == size
        agrees = agrees and close_rows(logits, everything[samples])
    return runs, agrees


def _logits(task: Task) -> Tensor:
    state = ForwardState(task.model)
    try:
        return logits_without_graph(task, True)
    finally:
        state.restore()

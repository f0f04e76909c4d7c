"""Records the calls of a forward pass one by one, so that a later batch can be compared with them as it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_gradmetrics.engine.axes import Axis
from lightning_gradmetrics.engine.calls import has_tensors, tensors_in
from lightning_gradmetrics.engine.graph import saves_through_hooks
from lightning_gradmetrics.engine.outline import Outline
from lightning_gradmetrics.engine.plan import Source, Step
from lightning_gradmetrics.engine.rules import Call, Rule
from lightning_gradmetrics.engine.task import Task

__all__ = ["MOST_BYTES", "HeldStep", "KnownCall", "KnownPath", "PathRecorder", "is_equal", "leaves_of"]

MOST_BYTES = 2**24
"""Largest size of all results of a known path, which are stored until its backward pass ends."""

_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format, type(...))


@dataclass(frozen=True)
class KnownCall:
    """A recorded call that returns one tensor.

    Args:
        function: The function.
        arguments: For each argument the number of the tensor and how often it was changed in place since it was made, or
            -1 and a constant.
        names: The names of the last arguments, which were passed by keyword.
        has_gradients: Whether gradients were enabled.
        dtype: The type of the result.
        shape: Its shape.
        has_sources: Whether the plan has steps for this call.
        held: How the parameters' gradients follow from that of the result; ``None`` if the ordinary step is repeated.
        tensors: The position, the number and the changes of each argument that is a tensor.
    """

    function: Any
    arguments: tuple[tuple[int, Any], ...]
    names: tuple[str, ...]
    has_gradients: bool
    dtype: torch.dtype
    shape: torch.Size
    has_sources: bool
    held: HeldStep | None
    tensors: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class HeldStep:
    """A step by a rule, whose gradients are computed after the backward pass.

    Args:
        step: The step.
        rule: The rule.
        slots: The parameters by the names of the arguments.
        axis: The sample axis of the input.
        out: The sample axis of the output.
        names: The names of the arguments.
        length: The length of the sample axis of the input.
    """

    step: Step
    rule: Rule
    slots: dict[str, str]
    axis: Axis
    out: Axis
    names: frozenset[str]
    length: int


@dataclass(frozen=True)
class KnownPath:
    """The calls of a forward pass on a batch of one size.

    Args:
        calls: The calls.
        end: The number of the tensor that is the logits, and how often it was changed in place.
        chosen: The numbers of the chosen parameters.
        leaves: The number of inputs, parameters, buffers and tensors among the attributes.
        held: The steps whose gradients are computed after the backward pass, by their positions in the plan.
        is_direct: Whether all steps of the plan are held, and each parameter has one step.
    """

    calls: tuple[KnownCall, ...]
    end: tuple[int, int]
    chosen: tuple[int, ...]
    leaves: int
    held: Mapping[int, HeldStep]
    is_direct: bool


def leaves_of(task: Task, inputs: Any = None) -> list[Tensor] | None:
    """Return the inputs, parameters, buffers and tensors among the attributes; ``None`` if two are the same tensor.

    Args:
        task: The batch.
        inputs: Other inputs than those of the batch.
    """
    if task.record is None:
        return None
    leaves = [*tensors_in(task.inputs if inputs is None else inputs), *task.record.parameters, *task.record.tensors()]
    return leaves if len(set(map(id, leaves))) == len(leaves) else None


def _chosen_leaves(task: Task, leaves: Sequence[Tensor]) -> tuple[int, ...]:
    """Return the numbers of the chosen parameters among the leaves."""
    numbers = dict(zip(map(id, leaves), range(len(leaves)), strict=True))
    chosen: list[int] = []
    for parameter in task.parameters.values():
        chosen.append(numbers.get(id(parameter), -1))
    return tuple(chosen)


class PathRecorder:
    """Records the calls of a forward pass that follows a plan.

    Args:
        task: The batch.
    """

    def __init__(self, task: Task) -> None:
        leaves = leaves_of(task)
        self._is_simple = leaves is not None
        self._count = len(leaves or ())
        self._end: tuple[int, int] | None = None
        self._chosen = _chosen_leaves(task, leaves or ())
        self._calls: list[KnownCall] = []
        self._held: dict[int, HeldStep] = {}
        self._steps = self._bytes = 0

    def path(self) -> KnownPath | None:
        """Return the path; ``None`` if a call has arguments or results that cannot be compared."""
        names: list[str] = []
        for held in self._held.values():
            names += held.slots.values()
        is_direct = len(self._held) == self._steps and len(set(names)) == len(names)
        if self._end is None or not self._is_simple:
            return None
        return KnownPath(tuple(self._calls), self._end, self._chosen, self._count, self._held, is_direct)

    def end(self, outline: Outline, logits: Tensor) -> None:
        """Note which tensor the logits are."""
        self._end = self._entry(outline, logits)

    def note_step(self, position: int, step: Step, rule: Rule, slots: Mapping[str, Source], call: Call) -> None:
        """Add a step of the plan that a rule covers, unless one of its parameters is a derived tensor."""
        names: dict[str, str] = {}
        for slot, source in slots.items():
            if isinstance(source, str):
                names[slot] = source
        if len(names) == len(slots):
            length = call.values["input"].shape[call.axis.dim]
            self._held[position] = HeldStep(step, rule, names, call.axis, call.out, call.slots, length)

    def add(
        self, outline: Outline, function: Any, args: Any, kwargs: Mapping[str, Any], result: Any, start: int, end: int
    ) -> None:
        """Add a call.

        Args:
            outline: The earlier calls, which number the results.
            function: The function.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
            result: What it returned.
            start: The position in the plan before the call.
            end: The position after it.
        """
        self._steps = end
        if not self._is_simple or _is_ignored(function, result):
            return
        entries: Any = tuple(map(partial(self._entry, outline), (*args, *kwargs.values())))
        has_gradients = torch.is_grad_enabled()
        self._is_simple = None not in entries and _is_comparable(outline, result) and (has_gradients or start == end)
        if not self._is_simple:
            return
        self._bytes += result.numel() * result.element_size()
        self._is_simple = self._bytes <= MOST_BYTES
        held = self._held.get(start) if end == start + 1 else None
        if held is not None and held.step.function != function:
            held = None  # the step is inside of the call
        compared = (function, entries, tuple(kwargs), has_gradients, result.dtype, result.shape)
        self._calls.append(KnownCall(*compared, end > start, held, _tensors(entries)))

    def _entry(self, outline: Outline, value: Any) -> tuple[int, Any] | None:
        """Return what an argument is compared with; ``None`` if that is not possible."""
        if not isinstance(value, Tensor):
            return (-1, deepcopy(value)) if _is_constant(value) else None  # the caller may change a list later
        origin = outline.origin(value)
        if isinstance(origin, int):
            return self._count + origin - 1, 0
        if not isinstance(origin, tuple):
            return None
        if isinstance(origin[0], int):  # the number of a result, and how often it was changed
            return self._count + origin[0] - 1, origin[1]
        return (origin[1], 0) if len(origin) == 2 else None  # a leaf, which no operator has changed


def _tensors(entries: Sequence[tuple[int, Any]]) -> tuple[tuple[int, int, int], ...]:
    """Return the position, the number and the changes of each argument that is a tensor."""
    tensors: list[tuple[int, int, int]] = []
    for position, (number, changes) in enumerate(entries):
        if number >= 0:
            tensors.append((position, number, changes))
    return tuple(tensors)


def _is_ignored(function: Any, result: Any) -> bool:
    """Return whether an outline ignores a call."""
    return not has_tensors(result) and (result is not None or getattr(function, "__name__", "") == "_assert")


def _is_comparable(outline: Outline, result: Any) -> bool:
    """Return whether a call can be compared: it returns one tensor, and autograd stores and computes as usual."""
    if type(result) is not Tensor or result.is_inference() or torch.is_inference_mode_enabled():
        return False
    return not (saves_through_hooks() or outline.has_hooks or outline.reads)


def _is_constant(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_constant, value))
    if type(value) is slice:
        return _is_constant((value.start, value.stop, value.step))
    return isinstance(value, _PLAIN)


def is_equal(value: Any, constant: Any) -> bool:
    """Return whether an argument is a constant; ``-0.0`` is not ``0.0``, and 1 is not ``True``.

    Example:
        >>> is_equal([3, 3], [3, 3]), is_equal(-0.0, 0.0)
        (True, False)
    """
    return value is constant or (type(value) is type(constant) and repr(value) == repr(constant))

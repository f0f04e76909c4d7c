"""Records the calls of a forward pass one by one, so that a later batch can be compared with them as it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_gradmetrics.engine.passes.inner_calls import HeldStep, InnerCall, InnerCalls, Picker, is_constant, picker
from lightning_gradmetrics.engine.passes.plan import Source, Step
from lightning_gradmetrics.engine.rules import Call, Rule
from lightning_gradmetrics.engine.task import Task
from lightning_gradmetrics.engine.tracing.calls import has_tensors, tensors_in
from lightning_gradmetrics.engine.tracing.graph import saves_through_hooks
from lightning_gradmetrics.engine.tracing.outline import Outline

__all__ = ["MOST_BYTES", "KnownCall", "KnownPath", "PathRecorder", "is_equal", "leaves_of"]

MOST_BYTES = 2**24
"""Largest size of all results of a known path, which are stored until its backward pass ends."""


@dataclass(frozen=True)
class KnownCall:
    """A recorded call that returns one tensor.

    Args:
        function: The function.
        numbers: The number of each argument among the entries of the path, see :class:`KnownPath`.
        pick: Returns the arguments from the entries.
        names: The names of the last arguments, which were passed by keyword.
        has_gradients: Whether gradients were enabled.
        dtype: The type of the result.
        shape: Its shape.
        has_sources: Whether the plan has steps for this call.
        held: How the parameters' gradients follow from that of the result; ``None`` if the ordinary step is repeated.
        inner: The calls inside a function that torch implements in Python, if they can be repeated without it.
        spare: The entries of the inner calls: ``None`` for each result, then the constants.
        tensors: The position and the number of each argument that is a tensor, and how often it was changed in place since it
            was made.
    """

    function: Any
    numbers: tuple[int, ...]
    pick: Picker
    names: tuple[str, ...]
    has_gradients: bool
    dtype: torch.dtype
    shape: torch.Size
    has_sources: bool
    held: HeldStep | None
    inner: tuple[InnerCall, ...]
    spare: tuple[Any, ...]
    tensors: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class KnownPath:
    """The calls of a forward pass on a batch of one size.

    Its entries are the leaves (inputs, parameters, buffers and tensors among the attributes), the result of each call, and the
    constants among the arguments, whose numbers are negative.

    Args:
        calls: The calls.
        constants: The constants, in the order of the entries.
        end: The number of the tensor that is the logits, and how often it was changed in place.
        chosen: The numbers of the chosen parameters.
        leaves: The number of leaves.
        held: The steps whose gradients are computed after the backward pass, by their positions in the plan.
        is_direct: Whether all steps of the plan are held and run without the plan, and each parameter has one step.
        is_pure: Whether no tensor was changed in place.
    """

    calls: tuple[KnownCall, ...]
    constants: tuple[Any, ...]
    end: tuple[int, int]
    chosen: tuple[int, ...]
    leaves: int
    held: Mapping[int, HeldStep]
    is_direct: bool
    is_pure: bool


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
        self._constants: list[Any] = []
        self._held: dict[int, HeldStep] = {}
        self._steps = self._bytes = 0
        self.inside = InnerCalls()

    def path(self) -> KnownPath | None:
        """Return the path; ``None`` if a call has arguments or results that cannot be compared."""
        if self._end is None or not self._is_simple:
            return None
        changes = self._end[1]
        for call in self._calls:
            changes += sum(count for *_, count in call.tensors)
        constants = tuple(reversed(self._constants))
        fixed = (self._end, self._chosen, self._count, self._held)
        return KnownPath(tuple(self._calls), constants, *fixed, self._is_direct(), changes == 0)

    def _is_direct(self) -> bool:
        """Return whether all steps of the plan are held and run without the plan, and each parameter has one step."""
        names: list[str] = []
        for held in self._held.values():
            names += held.slots.values()
        steps: list[HeldStep | None] = []
        for call in self._calls:
            steps += [call.held, *(inner.held for inner in call.inner)]
        run = len(steps) - steps.count(None)
        return run == len(self._held) == self._steps and len(set(names)) == len(names)

    def end(self, outline: Outline, logits: Tensor) -> None:
        """Note which tensor the logits are."""
        self._end = self._entry(outline, logits)

    def note_step(
        self,
        position: int,
        step: Step,
        rule: Rule,
        slots: Mapping[str, Source],
        call: Call,
        run: Callable[[dict[str, Any]], Tensor] | None,
    ) -> None:
        """Add a step of the plan that a rule covers, unless one of its parameters is a derived tensor.

        Args:
            position: Its position in the plan.
            step: The step.
            rule: The rule.
            slots: The parameters and derived tensors by the names of the arguments.
            call: The call.
            run: The function of the rule that has computed the result, if it was one.
        """
        names: dict[str, str] = {}
        for slot, source in slots.items():
            if isinstance(source, str):
                names[slot] = source
        if len(names) == len(slots):
            length = call.values["input"].shape[call.axis.dim]
            self._held[position] = HeldStep(step, rule, names, call.axis, call.out, call.slots, length, run)

    def add_inner(self, function: Any, args: Any, kwargs: Mapping[str, Any], result: Any, start: int, end: int) -> None:
        """Add a call inside a function that torch implements in Python; the arguments are those of :meth:`add`."""
        self.inside.add(function, args, kwargs, result, self._held.get(start), end - start)

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
        self._steps, inside, self.inside = end, self.inside, InnerCalls()
        if not self._is_simple or _is_ignored(function, result):
            return
        values = (*args, *kwargs.values())
        entries: Any = tuple(map(partial(self._entry, outline), values))
        has_gradients = torch.is_grad_enabled()
        self._is_simple = None not in entries and _is_comparable(outline, result) and (has_gradients or start == end)
        if not self._is_simple:
            return
        self._bytes += result.numel() * result.element_size()
        self._is_simple = self._bytes <= MOST_BYTES
        held = self._held.get(start) if end == start + 1 else None
        if held is not None and held.step.function != function:
            held = None  # the step is inside of the call
        inner, spare = inside.repeatable(function, values, result) if end > start and held is None else ((), ())
        numbers = tuple(number for number, _ in entries)
        compared = (function, numbers, picker(numbers), tuple(kwargs), has_gradients, result.dtype, result.shape)
        self._calls.append(KnownCall(*compared, end > start, held, inner, spare, _tensors(entries)))

    def _entry(self, outline: Outline, value: Any) -> tuple[int, int] | None:
        """Return the number of an argument, and how often it was changed in place; ``None`` if it cannot be compared."""
        if not isinstance(value, Tensor):
            if not is_constant(value):
                return None
            self._constants.append(deepcopy(value))  # the caller may change a list later
            return -len(self._constants), 0
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


def is_equal(value: Any, constant: Any) -> bool:
    """Return whether an argument is a constant; ``-0.0`` is not ``0.0``, and 1 is not ``True``.

    Example:
        >>> is_equal([3, 3], [3, 3]), is_equal(-0.0, 0.0)
        (True, False)
    """
    return value is constant or (type(value) is type(constant) and repr(value) == repr(constant))

"""Records the calls of a forward pass one by one, so that a later batch can be compared with them as it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_gradmetrics.engine.passes.in_place import in_place
from lightning_gradmetrics.engine.passes.inner_calls import (
    HeldNorm,
    HeldStep,
    InnerCalls,
    is_constant,
    picker,
)
from lightning_gradmetrics.engine.passes.known_calls import KnownCall, KnownPath, TensorList, described, releasing
from lightning_gradmetrics.engine.passes.plan import Fold, Source, Step
from lightning_gradmetrics.engine.rules import Call, Rule
from lightning_gradmetrics.engine.rules.folded import FOLDED
from lightning_gradmetrics.engine.task import Task
from lightning_gradmetrics.engine.tracing.axes import Axis
from lightning_gradmetrics.engine.tracing.calls import HOST_READS, has_tensors, tensors_in
from lightning_gradmetrics.engine.tracing.graph import saves_through_hooks
from lightning_gradmetrics.engine.tracing.masks import selecting_mask
from lightning_gradmetrics.engine.tracing.outline import Outline

__all__ = ["MOST_BYTES", "PathRecorder", "leaves_of"]

MOST_BYTES = 2**24
"""Largest size of all results of a path that are stored until its backward pass ends. On a large path, a result is released after its
last use, and gradients are collected as they arrive."""


def leaves_of(task: Task, inputs: Any = None) -> list[Tensor] | None:
    """Return the inputs, parameters, buffers and tensors among the attributes, each once; ``None`` if the model has no record.

    Args:
        task: The batch.
        inputs: Other inputs than those of the batch.
    """
    if task.record is None:
        return None
    leaves = [*tensors_in(task.inputs if inputs is None else inputs), *task.record.parameters, *task.record.tensors()]
    return list(dict(zip(map(id, leaves), leaves, strict=True)).values())


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
        is_large: Whether the path is a large one in any case.
        lays_out: Whether images are laid out channels last.
        reads: How often Python reads a value.
        changes: Whether calls on a large path may change results of layers in place.
    """

    def __init__(
        self, task: Task, is_large: bool = False, lays_out: bool = False, reads: int = 0, changes: bool = False
    ) -> None:
        leaves = leaves_of(task)
        self._is_simple = leaves is not None
        self._count = len(leaves or ())
        self._end: tuple[int, int] | None = None
        self._chosen = _chosen_leaves(task, leaves or ())
        self._calls: list[KnownCall] = []
        self._constants: list[Any] = []
        self._held: dict[int, HeldStep] = {}
        self._steps = self._bytes = self._made = 0
        self._norms: set[int] = set()
        self._marks: int | None = None
        self._reads = reads
        self._is_large, self._lays_out, self._in_place = is_large, lays_out, changes
        self.inside = InnerCalls()

    def path(self) -> KnownPath | None:
        """Return the path; ``None`` if a call has arguments or results that cannot be compared."""
        is_large, is_direct = self._is_large or self._bytes > MOST_BYTES, self._is_direct()
        reads = sum(_is_read(call.function) for call in self._calls)
        if self._end is None or not self._is_simple or reads != self._reads or (self._norms and not is_direct):
            return None
        changes = self._end[1]
        for call in self._calls:
            changes += sum(count for _, count in call.tensors)
        calls: Sequence[KnownCall] = self._calls
        if is_large:
            sizes = self._count, self._end[0]
            calls = releasing(in_place(calls, *sizes, self._flags()) if self._in_place and is_direct else calls, *sizes)
        constants = tuple(reversed(self._constants))
        fixed = (self._end, self._chosen, self._count, self._held)
        is_pure = changes == 0 and not is_large
        return KnownPath(tuple(calls), constants, *fixed, is_direct, is_pure, is_large, self._lays_out, self._made)

    def _flags(self) -> set[int]:
        """Return the numbers of the constants that are ``False``."""
        return {~place for place, constant in enumerate(self._constants) if constant is False}

    def _is_direct(self) -> bool:
        """Return whether all steps of the plan are held and run without the plan, and each parameter has one step."""
        names: list[str] = []
        for held in self._held.values():
            names += held.slots.values()
        steps: list[HeldStep | None] = []
        for call in self._calls:
            steps += [call.held, *(inner.held for inner in call.inner)]
        run = len(steps) - steps.count(None)
        norms = sum(call.is_norm for call in self._calls)
        is_run = run == len(self._held) == self._steps - norms and norms == len(self._norms)
        return is_run and len(set(names)) == len(names)

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

    def note_mask(self, marks: int | None) -> None:
        """Note how many rows of each sample the next call selects by a mask; ``None`` if that is not compared."""
        self._marks = marks

    def note_fold(
        self,
        outline: Outline,
        position: int,
        step: Step,
        axis: Axis,
        fold: Fold,
        slots: Mapping[str, Source],
        tensors: Any,
    ) -> None:
        """Add a convolution that returns the output of the batch norm after it.

        Args:
            outline: The earlier calls.
            position: Its position in the plan.
            step: Its step.
            axis: The sample axis of its input and output.
            fold: The norm.
            slots: The parameters of both by the names of the arguments.
            tensors: The parameters and statistics of the norm by the names of its arguments.
        """
        numbers: dict[str, int] = {}
        for key, tensor in tensors.items():
            number, changes = self._entry(outline, tensor) or (-1, 0)
            self._is_simple = self._is_simple and 0 <= number < self._count and changes == 0
            numbers[key] = number
        names = {slot: str(source) for slot, source in slots.items()}
        norm = HeldNorm(numbers, fold.eps)
        self._held[position] = HeldStep(step, FOLDED, names, axis, axis, frozenset(names), 0, None, norm)
        self._norms.add(fold.norm)

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
        marks, self._marks = self._marks, None
        if marks is not None and selecting_mask(function, args) is None:
            self._is_simple = False  # the mask is inside of the call
        if not self._is_simple or _is_ignored(function, result):
            return
        values = (*args, *kwargs.values())
        tensors: list[tuple[int, int]] = []
        numbers = [self._number(outline, value, tensors) for value in values]
        has_gradients = torch.is_grad_enabled()
        results = described(result)
        is_comparable = results is not None and None not in numbers and _is_comparable(outline, result)
        self._is_simple = is_comparable and (has_gradients or start == end)
        if not self._is_simple:
            return
        made = list(tensors_in(result))
        self._made += len(made)
        self._bytes += sum(tensor.numel() * tensor.element_size() for tensor in made)
        held = self._held.get(start) if end == start + 1 else None
        if held is not None and held.step.function != function:
            held = None  # the step is inside of the call
        inner, spare = inside.repeatable(function, values, result) if end > start and held is None else ((), ())
        dtype, shape = (result.dtype, result.shape) if isinstance(result, Tensor) else (None, None)
        compared = (function, tuple(numbers), picker(numbers), tuple(kwargs), has_gradients, dtype, shape)
        call = KnownCall(*compared, end > start, held, inner, spare, tuple(tensors))
        is_norm = end == start + 1 and start in self._norms
        self._calls.append(replace(call, is_norm=is_norm, results=results or (), marks=marks))

    def _number(self, outline: Outline, value: Any, tensors: list[tuple[int, int]]) -> Any:
        """Return the number of an argument, and add the tensors in it; ``None`` if it cannot be compared."""
        if type(value) in (list, tuple) and any(isinstance(item, Tensor) for item in value):
            numbers = [self._number(outline, item, tensors) for item in value]
            if None in numbers:
                return None
            self._constants.append(TensorList(type(value), tuple(numbers), picker(numbers)))
            return -len(self._constants)
        entry = self._entry(outline, value)
        if entry is None:
            return None
        if entry[0] >= 0:
            tensors.append(entry)
        return entry[0]

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


def _is_ignored(function: Any, result: Any) -> bool:
    """Return whether an outline ignores a call, and Python reads no value by it."""
    return (
        not _is_read(function)
        and not has_tensors(result)
        and (result is not None or getattr(function, "__name__", "") == "_assert")
    )


def _is_read(function: Any) -> bool:
    return getattr(function, "__name__", "") in HOST_READS


def _is_comparable(outline: Outline, result: Any) -> bool:
    """Return whether a call can be compared: autograd stores and computes as usual."""
    if torch.is_inference_mode_enabled() or any(map(Tensor.is_inference, tensors_in(result))):
        return False
    return not (saves_through_hooks() or outline.has_hooks)

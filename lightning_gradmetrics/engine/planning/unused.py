"""Finds operations whose results do not reach the logits, such as a load-balancing loss that a mixture of experts stores.

They may combine samples. An operation reaches the logits if a later or earlier operation that reaches them reads memory with its
result or memory that it changes in place. What Python, other threads or scripted code may read counts as reached.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_gradmetrics.engine.inputs.samples import close_rows
from lightning_gradmetrics.engine.planning.mixing import is_of_torch
from lightning_gradmetrics.engine.task import Task
from lightning_gradmetrics.engine.tracing.calls import tensors_in
from lightning_gradmetrics.engine.tracing.dependence import DependenceTrace, Operation
from lightning_gradmetrics.engine.tracing.model_state import ForwardState
from lightning_gradmetrics.engine.tracing.schema import schema_of
from lightning_gradmetrics.engine.tracing.trace import CallTrace

__all__ = ["do_not_matter", "unused_calls", "unused_operations"]

_REPLACEMENTS = (1e4, -1e4)
"""Values that replace unused results. They open a gate that the results themselves do not, whatever its sign."""


def unused_operations(
    two: DependenceTrace, three: DependenceTrace, ends: tuple[Tensor, Tensor], buffers: Sequence[Tensor]
) -> frozenset[int]:
    """Return the numbers of the operations that do not reach the logits; none if that is not clear.

    Args:
        two: The operations with two samples.
        three: The operations with three samples.
        ends: The logits of both.
        buffers: Tensors that an operation may change, because each forward pass starts with their first values.
    """
    if _names(two) != _names(three) or two.hides_memory or three.hides_memory:
        return frozenset()
    return _unreached(two, ends[0], buffers) & _unreached(three, ends[1], buffers)


def _names(trace: DependenceTrace) -> list[str]:
    return [operation.name for operation in trace.operations]


def _unreached(trace: DependenceTrace, end: Tensor, buffers: Sequence[Tensor]) -> frozenset[int]:
    """Return the numbers of the operations that do not reach a tensor."""
    open_ends, read = _required(trace, buffers), set(trace.memory_of([end]))
    waiting = dict(enumerate(trace.operations))
    while True:
        reached = [
            number
            for number, operation in waiting.items()
            if number in open_ends or not read.isdisjoint(operation.made) or not read.isdisjoint(operation.written)
        ]
        if not reached:
            return frozenset(waiting)
        for number in reached:
            read.update(waiting.pop(number).memory)


def _required(trace: DependenceTrace, buffers: Sequence[Tensor]) -> frozenset[int]:
    """Return the numbers of the operations that something else than the forward pass may see."""
    known = set(trace.memory_of(buffers))
    numbers: set[int] = set()
    for number, operation in enumerate(trace.operations):
        if _is_visible(operation) or not known.issuperset(operation.written):
            numbers.add(number)
        known.update(set(operation.made) - set(operation.memory))  # a view has the memory of its argument
    return frozenset(numbers)


def _is_visible(operation: Operation) -> bool:
    """Return whether Python, or code that is not traced, may read the result of an operation or its shape."""
    is_read = bool(operation.read or operation.by_data) or not operation.output_serials
    return is_read or operation.hidden or not is_of_torch(operation)


def unused_calls(trace: CallTrace, operations: DependenceTrace, unused: Collection[int]) -> frozenset[int]:
    """Return the numbers of the calls of torch functions whose results only unused operations make.

    Args:
        trace: The calls with three samples.
        operations: Their operations.
        unused: The numbers of the unused operations.
    """
    made: dict[bool, set[int]] = {True: set(), False: set()}
    for number, operation in enumerate(operations.operations):
        made[number in unused].update(operation.output_serials)
    only = made[True] - made[False]
    numbers: set[int] = set()
    for number, call in enumerate(trace.calls):
        if only.issuperset(map(operations.serial, tensors_in(call.result))):
            numbers.add(number)
    return frozenset(numbers)


def do_not_matter(
    task: Task,
    trace: CallTrace,
    operations: DependenceTrace,
    unused: Collection[int],
    logits: Tensor,
    state: ForwardState,
) -> bool:
    """Return whether the logits and the calls of a forward pass stay the same if unused results are replaced by large numbers.

    This finds readers that no operation shows, such as other threads. Results that the model stores outside itself get their own values
    back.

    Args:
        task: Three samples.
        trace: Their calls.
        operations: Their operations.
        unused: The numbers of the unused operations.
        logits: The logits.
        state: The state of the model before a forward pass.
    """
    originals: list[Tensor] = []
    for value in (None, *_REPLACEMENTS):
        state.restore()
        replaced = _Replaced(operations.operations, unused, value)
        calls = CallTrace(task.parameters, keep=False)
        calls.whole = trace.whole
        try:
            with replaced, calls:
                found = task.forward()
        except Exception:  # an operation may refuse such numbers
            return False
        finally:
            replaced.put_back(originals)
            state.restore()
        originals = originals or replaced.results
        is_complete = replaced.count == replaced.total and _functions(calls) == _functions(trace)
        if not is_complete or not close_rows(found.detach(), logits.detach()):
            return False
        if [read.value for read in calls.reads] != [read.value for read in trace.reads]:
            return False
    return True


def _functions(trace: CallTrace) -> list[Any]:
    """Return the function of each call and the shapes of its results."""
    functions: list[Any] = []
    for call in trace.calls:
        functions += (call.function, *(output.shape for output in call.outputs))
    return functions


class _Replaced(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Replaces the results of some operations of a forward pass.

    Args:
        operations: All operations.
        unused: The numbers of those.
        value: The entries of their results; ``None`` to copy the results and replace nothing.
    """

    def __init__(self, operations: Iterable[Operation], unused: Collection[int], value: float | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._names, self._unused, self._value = [], unused, value
        self.results: list[Tensor] = []
        self._numbers: list[int] = []
        for number, operation in enumerate(operations):
            if operation.name != "read":  # no operation, but a value that Python reads without one
                self._names.append(operation.name)
                self._numbers.append(number)
        self.total, self.count = len(self._names), 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Return False: torch would import its compiler, which takes a second, to keep it away from this class."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation, and replace its results."""
        result = func(*args, **(kwargs or {}))
        name = schema_of(func).name
        if self.count >= self.total or self._names[self.count] != name:
            raise RuntimeError("another operation")
        if self._numbers[self.count] in self._unused:
            for tensor in itertools.filterfalse(_is_kept, tensors_in(result)):
                self.results.append(tensor.clone() if self._value is None else tensor)
                if self._value is not None:
                    tensor.fill_(self._value)
        self.count += 1
        return result

    def put_back(self, originals: Iterable[Tensor]) -> None:
        """Write the original values into the replaced results, in the order of the operations that made them."""
        with torch.no_grad():
            for tensor, original in zip(self.results, originals, strict=False):
                if tensor.shape == original.shape:
                    tensor.detach().copy_(original)


def _is_kept(tensor: Tensor) -> bool:
    """Return whether a result keeps its values: indices must stay valid, and entries without memory or with shared memory cannot be set."""
    if not tensor.is_floating_point() or tensor._is_zerotensor() or tensor.is_meta:
        return True
    return torch._debug_has_internal_overlap(tensor) != 0

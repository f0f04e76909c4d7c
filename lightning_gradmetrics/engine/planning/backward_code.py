"""Finds custom autograd functions and hooks whose backward pass may combine samples, although the forward pass keeps them apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_gradmetrics.engine.planning.findings import Traced
from lightning_gradmetrics.engine.planning.mixing import mixed_results
from lightning_gradmetrics.engine.reference import loss_gradients
from lightning_gradmetrics.engine.tracing.backward_calls import recorded_backward
from lightning_gradmetrics.engine.tracing.dependence import SAMPLES, DependenceTrace, Operation
from lightning_gradmetrics.engine.tracing.graph import all_nodes, is_custom
from lightning_gradmetrics.engine.tracing.outline import Outline

__all__ = ["MAY_COMBINE", "BackwardPass", "BackwardRun", "backward_passes", "may_combine_samples"]

MAY_COMBINE = "a custom autograd function, or a hook on a module, may combine samples in the backward pass"


class BackwardRun(NamedTuple):
    """The backward pass of one custom function, with the hooks on it. Tensors are identified by their serial numbers.

    Args:
        operations: Its operations.
        results: The gradients that it returns, and their shapes.
        is_known: Whether these operations have made them.
        given: For each gradient that it gets the tensor of the forward pass; ``None`` if that is unknown.
        returned: The same for each gradient that it returns.
        stored: For each result of the function that autograd has stored the tensor of the forward pass.
        fresh: The memory that only its operations have made.
        own: Its operations, without those of autograd and of hooks before it.
        dependent: The tensors among their arguments that depend on the samples.
    """

    operations: Sequence[Operation]
    results: Sequence[tuple[int, tuple[int, ...]]]
    is_known: bool
    given: Mapping[int, int | None]
    returned: Mapping[int, int | None]
    stored: Mapping[int, int | None]
    fresh: set[int]
    own: Sequence[Operation]
    dependent: set[int]

    def names(self) -> list[str]:
        """Return the names of the operations."""
        return [operation.name for operation in self.operations]


class BackwardPass(NamedTuple):
    """The backward pass of a model.

    Args:
        runs: Those of its custom functions, in the order in which they run.
        calls: The calls of these functions.
    """

    runs: list[BackwardRun]
    calls: Outline


def backward_passes(
    two: Traced, three: Traced, parameters: Sequence[Tensor]
) -> tuple[BackwardPass, BackwardPass] | None:
    """Return the backward passes of two and of three samples; ``None`` if they may run only once.

    Args:
        two: The forward pass of two samples.
        three: That of three samples.
        parameters: The parameters of which the gradients are computed.
    """
    try:
        return _backward_pass(two, parameters), _backward_pass(three, parameters)
    except Exception:
        return None


def may_combine_samples(two: BackwardPass, three: BackwardPass, unknown: set[int]) -> bool:
    """Return whether code of the user may combine samples in the backward pass, whatever its gates.

    The sum over the samples that is the gradient of a weight does not count: its shape is that of the weight.

    Args:
        two: The backward pass of two samples.
        three: That of three samples.
        unknown: The serial numbers of tensors of unknown origin.
    """
    if len(two.runs) != len(three.runs):
        return True
    return any(_combines(before, after, unknown) for before, after in zip(two.runs, three.runs, strict=True))


def _combines(small: BackwardRun, large: BackwardRun, unknown: set[int]) -> bool:
    if small.names() != large.names() or len(small.results) != len(large.results) or not large.is_known:
        return True
    if any(operation.read or operation.by_data for operation in large.operations):
        return True
    mixed = mixed_results(small.operations, large.operations, unknown)
    of_samples = []
    for (_, before), (serial, after) in zip(small.results, large.results, strict=True):
        of_samples += [serial] if before != after else []
    return not mixed.isdisjoint(of_samples)


def _backward_pass(traced: Traced, parameters: Sequence[Tensor]) -> BackwardPass:
    """Return the backward pass of some samples; its operations are removed from the trace."""
    trace, handles = traced.operations, []
    recorder, count = _Recorder(trace, _places(trace)), len(trace.operations)
    with recorded_backward(traced.outline, traced.logits, trace.recording) as calls:
        for node in all_nodes(traced.logits):
            handles += recorder.hooks(node)
        try:
            with trace:
                loss_gradients(traced.logits.sum(), parameters)
        finally:
            for handle in handles:
                handle.remove()
            del trace.operations[count:]
    return BackwardPass(recorder.runs, calls)


def _places(trace: DependenceTrace) -> dict[tuple[Any, int], int]:
    """Return for each place in the graph the serial number of the tensor there."""
    places: dict[tuple[Any, int], int] = {}
    for tensor in list(trace.alive):
        if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
            places.setdefault((tensor.grad_fn, tensor.output_nr), trace.serial(tensor))
    return places


@dataclass
class _Recorder:
    """Divides the operations of a backward pass into those of its nodes.

    Args:
        trace: The operations.
        places: For each place in the graph the serial number of the tensor there.
    """

    trace: DependenceTrace
    places: Mapping[tuple[Any, int], int]
    runs: list[BackwardRun] = field(default_factory=list)
    _start: int = field(init=False)
    _begin: int = 0
    _alive: int = 0
    _old: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._start = len(self.trace.operations)

    def hooks(self, node: Any) -> list[Any]:
        """Return the handles of hooks that record the operations of a custom function, and that gradients depend on samples."""
        is_recorded = is_custom(node)

        def begin(gradients: Sequence[Tensor | None]) -> None:
            with torch._C.DisableTorchFunction():
                memory = self.trace.memory_of(_present(gradients))
                self._old, self._alive = {*self.trace.origins.made, *memory}, len(self.trace.alive)
                self._begin = len(self.trace.operations)

        def end(results: Sequence[Tensor | None], gradients: Sequence[Tensor | None]) -> None:
            with torch._C.DisableTorchFunction():
                if is_recorded:
                    self._add(node, results, gradients)
                self.trace.note_samples(_present(results))
                self._start = len(self.trace.operations)

        handles = [node.register_prehook(begin)] if is_recorded else []
        return [*handles, node.register_hook(end)]

    def _add(self, node: Any, results: Sequence[Tensor | None], gradients: Sequence[Tensor | None]) -> None:
        trace, places = self.trace, self.places
        made = _present(results)
        shapes = [(trace.serial(result), tuple(result.shape)) for result in made]
        is_known = trace.origins.made.issuperset(trace.memory_of(made))
        given: dict[int, int | None] = {}
        for number, gradient in enumerate(gradients):
            if gradient is not None:
                given[trace.serial(gradient)] = places.get((node, number))
        returned: dict[int, int | None] = {}
        for result, edge in zip(results, node.next_functions, strict=True):
            if result is not None:
                returned[trace.serial(result)] = places.get(edge)
        stored: dict[int, int | None] = {}
        for tensor in trace.alive[self._alive :]:
            if isinstance(tensor, Tensor) and tensor.grad_fn is node:
                stored[trace.serial(tensor)] = places.get((node, tensor.output_nr))
        operations = trace.operations[self._start :]
        own: list[Operation] = []
        for operation in trace.operations[self._begin :]:
            if operation.name != "detach" or not stored.keys() >= set(operation.output_serials):
                own.append(operation)  # autograd detaches a stored result
        fresh: set[int] = set()
        used, dependent = self._old, set[int]()
        for operation in own:
            used.update(set(operation.memory) - fresh)
            fresh.update(set(operation.made) - used)  # not the memory of a view of an older tensor
            for serial, key in zip(operation.input_serials, operation.memory, strict=True):
                if trace.bits_of([key]) & SAMPLES:
                    dependent.add(serial)
        self.runs.append(BackwardRun(operations, shapes, is_known, given, returned, stored, fresh, own, dependent))


def _present(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]

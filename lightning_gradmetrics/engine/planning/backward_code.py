"""Finds custom autograd functions and hooks whose backward pass may combine samples, although the forward pass keeps them apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from lightning_gradmetrics.engine.planning.findings import Traced
from lightning_gradmetrics.engine.planning.mixing import mixed_results
from lightning_gradmetrics.engine.reference import loss_gradients
from lightning_gradmetrics.engine.tracing.dependence import DependenceTrace, Operation
from lightning_gradmetrics.engine.tracing.graph import all_nodes, is_custom

__all__ = ["MAY_COMBINE", "may_combine_samples"]

MAY_COMBINE = "a custom autograd function, or a hook on a module, may combine samples in the backward pass"


class _Run(NamedTuple):
    """The backward pass of one custom function, with the hooks on it.

    Args:
        operations: Its operations.
        results: The serial numbers and shapes of the gradients that it returns.
        is_known: Whether these operations have made them.
    """

    operations: Sequence[Operation]
    results: Sequence[tuple[int, tuple[int, ...]]]
    is_known: bool

    def names(self) -> list[str]:
        """Return the names of the operations."""
        return [operation.name for operation in self.operations]


def may_combine_samples(two: Traced, three: Traced, parameters: Sequence[Tensor]) -> bool:
    """Return whether code of the user may combine samples in the backward pass, whatever its gates.

    The sum over the samples that is the gradient of a weight does not count: its shape is that of the weight.

    Args:
        two: The forward pass of two samples.
        three: That of three samples.
        parameters: The parameters of which the gradients are computed.
    """
    if not any(map(is_custom, all_nodes(three.logits))):
        return False
    try:
        small, large = _runs(two, parameters), _runs(three, parameters)
    except Exception:  # its backward pass may run only once
        return True
    if len(small) != len(large):
        return True
    strangers = set(three.operations.origins.strangers)
    return any(_combines(before, after, strangers) for before, after in zip(small, large, strict=True))


def _combines(small: _Run, large: _Run, strangers: set[int]) -> bool:
    if small.names() != large.names() or len(small.results) != len(large.results) or not large.is_known:
        return True
    if any(operation.read or operation.by_data for operation in large.operations):
        return True
    mixed = mixed_results(small.operations, large.operations, strangers)
    of_samples = []
    for (_, before), (serial, after) in zip(small.results, large.results, strict=True):
        of_samples += [serial] if before != after else []
    return not mixed.isdisjoint(of_samples)


def _runs(traced: Traced, parameters: Sequence[Tensor]) -> list[_Run]:
    """Return the backward passes of the custom functions, in the order in which they run."""
    trace, handles = traced.operations, []
    recorder, count = _Recorder(trace), len(trace.operations)
    for node in all_nodes(traced.logits):
        handles.append(node.register_hook(recorder.hook(is_custom(node))))
    try:
        with trace:
            loss_gradients(traced.logits.sum(), parameters)
    finally:
        for handle in handles:
            handle.remove()
        del trace.operations[count:]
    return recorder.runs


@dataclass
class _Recorder:
    """Divides the operations of a backward pass into those of its nodes.

    Args:
        trace: The operations.
    """

    trace: DependenceTrace
    runs: list[_Run] = field(default_factory=list)
    _start: int = field(init=False)

    def __post_init__(self) -> None:
        self._start = len(self.trace.operations)

    def hook(self, is_recorded: bool) -> Any:
        """Return a hook that runs after a node, whose operations are recorded or not."""

        def end(results: Sequence[Tensor | None], gradients: Sequence[Tensor | None]) -> None:
            made = [result for result in results if result is not None]
            if is_recorded:
                self._add(made)
            self.trace.note_samples(made)
            self._start = len(self.trace.operations)

        return end

    def _add(self, results: Sequence[Tensor]) -> None:
        shapes = [(self.trace.serial(result), tuple(result.shape)) for result in results]
        is_known = self.trace.origins.made.issuperset(self.trace.memory_of(results))
        self.runs.append(_Run(self.trace.operations[self._start :], shapes, is_known))

"""Finds operations that combine samples, even if their values do not show it on a probe.

A gate may hide such an operation: a threshold that no sample of the probe passes, or a similarity of which only duplicates
have some. The shapes of two traces reveal it without its values.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from lightning_gradmetrics.engine.tracing.calls import tensors_in
from lightning_gradmetrics.engine.tracing.dependence import SAMPLES, DependenceTrace, Operation
from lightning_gradmetrics.engine.tracing.layouts import Shape
from lightning_gradmetrics.engine.tracing.origins import FIRST_USES
from lightning_gradmetrics.engine.tracing.trace import TracedCall

__all__ = ["has_hidden_results", "is_of_torch", "mixed_results", "mixes_samples"]


def has_hidden_results(
    two: DependenceTrace, three: DependenceTrace, calls: Iterable[TracedCall], logits: Tensor
) -> bool:
    """Return whether code that is not traced, as that of another thread, computes a tensor of the forward pass.

    It is unknown whether such code combines samples. Constants that a model keeps are not results: they have the same memory in both
    forward passes, and their shape does not depend on the number of samples. Nor are tensors that a call of torch returns without an
    operation, as ``from_numpy`` does.

    Args:
        two: The operations with two samples.
        three: The operations with three samples.
        calls: The calls of torch functions with three samples.
        logits: The logits of three samples.
    """
    if three.origins.changed or not three.origins.made.issuperset(three.memory_of([logits])):
        return True
    strangers, kept = three.origins.strangers, set(two.origins.strangers.values())
    if strangers:
        kept.update(three.memory_of(tensors_in([call.result for call in calls])))
    if not kept.issuperset(strangers.values()):
        return True
    for small, large in zip(_without_detach(two), _without_detach(three), strict=False):
        for serial, before, after in zip(large.input_serials, small.inputs, large.inputs, strict=False):
            if serial in strangers and before != after:
                return True
    return False


def _without_detach(trace: DependenceTrace) -> list[Operation]:
    """Return the operations without those that only detach a tensor, of which one pass may have more than another."""
    return [operation for operation in trace.operations if operation.name != "detach"]


def mixes_samples(two: Sequence[Operation], three: Sequence[Operation], logits: int) -> bool:
    """Return whether the logits depend on an operation along the sample axis, such as a sum over the batch, or on an unknown one.

    Args:
        two: The operations with two samples.
        three: The same operations with three samples.
        logits: The serial number of the logits, in ``three``.
    """
    search = _Search()
    for small, large in zip(two, three, strict=True):
        search.add(small, large)
    return logits in search.mixed


def mixed_results(two: Sequence[Operation], three: Sequence[Operation], unknown: Collection[int]) -> set[int]:
    """Return the serial numbers of the results that depend on an operation along the sample axis, or on unknown tensors with samples.

    Args:
        two: Operations with two samples.
        three: The same operations with three samples.
        unknown: The serial numbers of tensors of unknown origin.
    """
    search = _Search()
    for small, large in zip(two, three, strict=True):
        for serial, before, after in zip(large.input_serials, small.inputs, large.inputs, strict=False):
            if serial in unknown and before != after:
                search.mixed.add(serial)
        search.add(small, large)
        if large.name in FIRST_USES and small.outputs != large.outputs:
            search.mixed.update(large.output_serials)
    return search.mixed


@dataclass
class _Search:
    """The tensors that depend on an operation along the sample axis.

    Args:
        mixed: Their serial numbers.
        memory: Memory that such tensors were written into.
    """

    mixed: set[int] = field(default_factory=set)
    memory: set[int] = field(default_factory=set)

    def add(self, small: Operation, large: Operation) -> None:
        """Follow the dependence through one operation."""
        is_reached = not self.mixed.isdisjoint(large.input_serials) or not self.memory.isdisjoint(large.memory)
        if is_reached or (large.depends & SAMPLES and _works_along(small, large)):
            self.mixed.update(large.output_serials)
            self.memory.update(large.written)
            return
        for serial, before, after in zip(large.output_serials, small.outputs, large.outputs, strict=False):
            if large.depends & SAMPLES and not _is_of_each_sample(large, before, after):
                self.mixed.add(serial)


def _is_of_each_sample(operation: Operation, two: Shape, three: Shape) -> bool:
    """Return whether a result may consist of equal parts for each sample, or is no result of an operation on such parts.

    A single number is examined elsewhere: Python may only read it.
    """
    if not three or not math.prod(three) or 3 * math.prod(two) == 2 * math.prod(three):
        return True
    return not any(math.prod(shape) % 3 == 0 for shape in operation.inputs)


_OF_TORCH = frozenset(["aten", "prim", "prims", "mkldnn", "onednn", "quantized", "quantized_decomposed"])
"""Namespaces of operations of torch; what others do is unknown, because the operations inside them are not traced."""


def is_of_torch(operation: Operation) -> bool:
    """Return whether torch defines an operation."""
    return "::" not in operation.name or operation.name.partition("::")[0] in _OF_TORCH


_NAMES = (
    "cumsum cumprod cummax cummin logcumsumexp _softmax _log_softmax softmax log_softmax sort argsort topk roll flip"
)
_ALONG = frozenset(_NAMES.split())
"""Operations along the axes that ``dim`` or ``dims`` name, whose results have as many positions as their argument."""

_WINDOWED = ("convolution", "_convolution", "max_pool", "avg_pool", "adaptive_", "_adaptive_", "upsample_", "im2col")
"""Operations on windows of all axes from the third one."""


def _works_along(small: Operation, large: Operation) -> bool:
    """Return whether an operation may combine positions of an axis that is longer with three samples than with two."""
    if not large.inputs or not small.inputs:
        return False
    before, after = small.inputs[0], large.inputs[0]
    grown = {dim for dim, (short, long) in enumerate(zip(before, after, strict=False)) if short != long}
    name, arguments = large.name.rstrip("_"), large.arguments
    if not is_of_torch(large):
        return True
    if name in _ALONG:
        dims = arguments.get("dims", arguments.get("dim", -1))
        axes = [dims] if isinstance(dims, int) else dims or range(len(after))
        return any(axis % max(len(after), 1) in grown for axis in axes)
    if name == "constant_pad_nd":
        padded = {len(after) - 1 - number // 2 for number, width in enumerate(arguments["pad"]) if width}
        return not grown.isdisjoint(padded)
    if name.startswith(_WINDOWED):
        return any(dim > 1 for dim in grown)
    if "normalized_shape" in arguments:
        return bool(arguments["normalized_shape"] != small.arguments["normalized_shape"])
    return bool(arguments.get("training", arguments.get("train", False))) and grown != {1}

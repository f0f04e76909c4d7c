"""Proves that custom autograd functions keep samples apart in the backward pass, and that they are linear in the gradient.

The engine scales losses, so a function such as one that clips gradients has no proof.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from lightning_gradmetrics.engine.planning.backward_code import (
    BackwardPass,
    BackwardRun,
    backward_passes,
    may_combine_samples,
)
from lightning_gradmetrics.engine.planning.findings import Traced
from lightning_gradmetrics.engine.planning.proof_facts import Facts, Samples
from lightning_gradmetrics.engine.planning.separability import Follower
from lightning_gradmetrics.engine.task import Task
from lightning_gradmetrics.engine.tracing.dependence import Operation
from lightning_gradmetrics.engine.tracing.layouts import UnprovenError
from lightning_gradmetrics.engine.tracing.model_state import ForwardState
from lightning_gradmetrics.engine.tracing.size_record import SizeRecord, size_record

__all__ = ["backward_findings"]

_VIEWS = "view _unsafe_view reshape _reshape_alias unsqueeze squeeze alias clone detach permute transpose t expand select slice"
_SUMS = "unbind split split_with_sizes sum mean neg cat stack add sub _to_copy"
_OF_ALL = frozenset([*_VIEWS.split(), *_SUMS.split()])
"""Operations that are linear in all their tensors together."""

_FORMULAS = ("threshold_backward", "tanh_backward", "sigmoid_backward", "gelu_backward", "silu_backward")
_OF_FIRST = frozenset([*_FORMULAS, "div", "_softmax_backward_data"])
"""Operations that are linear in the first tensor."""

_OF_ONE = frozenset(["mul", "mm", "bmm"])
"""Operations that are linear in each of two tensors."""

_CONVERTING = frozenset(["_to_copy", "sum", "mean"])
"""Operations whose argument ``dtype`` is the type of the result; that of ``view`` reinterprets the memory."""


def backward_findings(
    two: Traced, three: Traced, operations: tuple[Sequence[Operation], Sequence[Operation]], task: Task
) -> tuple[bool, SizeRecord | None]:
    """Return whether custom functions may combine samples, and what their calls must be in the backward pass of other batches.

    The second is ``None`` without a proof that they keep samples apart.

    Args:
        two: The forward pass of two samples.
        three: That of three samples.
        operations: The operations of both.
        task: Three samples.
    """
    before = ForwardState(task.model)
    passes = backward_passes(two, three, list(task.parameters.values()))
    if passes is None or may_combine_samples(*passes, set(three.operations.origins.strangers)):
        return True, None
    if before.random_numbers_drawn():
        return False, None
    return False, _record(operations, three.operations.samples, *passes)


def _record(
    operations: tuple[Sequence[Operation], Sequence[Operation]],
    inputs: Sequence[int],
    small: BackwardPass,
    large: BackwardPass,
) -> SizeRecord | None:
    """Return the record of a proof, with the sizes for one sample in place of the shapes of the inputs."""
    record = size_record(small.calls, large.calls, ())
    if record is None or small.calls.reads or large.calls.reads or not _are_linear(large.runs):
        return None
    follower = Follower.from_inputs(inputs)
    try:
        for before, after in zip(*operations, strict=True):
            follower.add(before, after)
        for run, other in zip(small.runs, large.runs, strict=True):
            _follow(follower, run, other)
    except (UnprovenError, IndexError, TypeError, ValueError):
        return None
    record.observed.clear()  # each shape of the inputs is added with one sample alone
    return record


def _follow(follower: Follower, small: BackwardRun, large: BackwardRun) -> None:
    """Follow the samples through the backward pass of one function: a gradient has them where its tensor has them.

    Raises:
        UnprovenError: If it may combine samples.
    """
    facts = follower.facts
    for serial, tensor in (*large.given.items(), *large.stored.items()):
        facts.tensors[serial] = _of_samples(facts, tensor)
    for before, after in zip(small.own, large.own, strict=True):
        if before.name != after.name or after.read or after.by_data:
            raise UnprovenError
        if not large.dependent.intersection(after.input_serials) <= facts.tensors.keys():
            raise UnprovenError  # an operation that the proof has left out made it
        follower.add(before, after)
    for serial, tensor in large.returned.items():
        if facts.tensors.get(serial) != _of_samples(facts, tensor):
            raise UnprovenError


def _of_samples(facts: Facts, tensor: int | None) -> Samples:
    """Return where the samples are in a tensor of the forward pass.

    Raises:
        UnprovenError: If that is unknown, or if they are in the order of a sort.
    """
    fact = None if tensor is None else facts.tensors.get(tensor)
    if not isinstance(fact, Samples) or fact.layout.order:
        raise UnprovenError
    return Samples(fact.layout)


def _are_linear(runs: Iterable[BackwardRun]) -> bool:
    """Return whether the gradients that functions return are linear in those that they get."""
    linear: set[int] = set()
    for run in runs:
        linear.update(run.given)
        for operation in run.own:
            if not run.fresh.issuperset(operation.written):
                return False
            flags = [serial in linear for serial in operation.input_serials]
            if any(flags):
                if not _is_linear_in(operation, flags):
                    return False
                linear.update(operation.output_serials)
        if not linear.issuperset(run.returned):
            return False
    return True


def _is_linear_in(operation: Operation, flags: Sequence[bool]) -> bool:
    """Return whether an operation is linear in some of its tensors together."""
    name = operation.name.removesuffix("_")
    if operation.written and not (flags[0] and operation.written == operation.memory[:1]):
        return False  # other tensors with this memory would depend on the gradient too
    if not _keeps_linear(name, operation.arguments):
        return False
    if name in _OF_ALL:
        return all(flags) and "other" not in operation.arguments
    if name in _OF_FIRST:
        return flags[0] and sum(flags) == 1
    if name in _OF_ONE:
        return sum(flags) == 1
    if name == "where":
        return list(flags) == [False, True, True]
    return name == "masked_fill" and flags[0] and sum(flags) == 1 and operation.arguments.get("value") == 0


def _keeps_linear(name: str, arguments: Mapping[str, Any]) -> bool:
    """Return whether the other arguments of an operation choose no rounding and no type of less precision than float32."""
    kind = arguments.get("dtype")
    if kind is not None and not (name in _CONVERTING and kind.is_floating_point and torch.finfo(kind).bits >= 32):
        return False
    return arguments.get("rounding_mode") is None

"""Proves from the basic operations of two traces that a forward pass treats each sample separately.

Each operation with a rule keeps the samples apart as long as it does not mix positions of the sample axis. If all operations of
a model have one, no batch can couple its samples, and batches need no check. Nothing in the proof depends on the number of
samples: layouts are the same with two and with three, and no constant that meets a sample changes with their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lightning_gradmetrics.engine.planning.constants import FILLING, Constants
from lightning_gradmetrics.engine.planning.proof_facts import (
    Facts,
    Number,
    Range,
    Samples,
    SortInteger,
    TensorFact,
    Varying,
    is_constant,
    layout_in,
)
from lightning_gradmetrics.engine.planning.result_layouts import fitting_results, result_layouts
from lightning_gradmetrics.engine.planning.row_orders import RowOrders
from lightning_gradmetrics.engine.tracing.dependence import SAMPLES, Operation, finds_one_value
from lightning_gradmetrics.engine.tracing.layouts import Layout, RegroupedError, UnprovenError

__all__ = ["Follower", "Proof", "proof_of"]


class Proof(NamedTuple):
    """What the operations of a forward pass show.

    Args:
        layouts: The layout of each tensor with samples, by serial number, if every operation keeps the samples apart and the logits are
            ``(N, C)``; ``None`` if that is not proven.
        regroups: Whether the first operation that is not proven takes entries of several samples for those of one, as
            ``x.view(T, N, D)`` of a tensor ``(N, T, D)`` does. Behind a gate, its values may not show it.
        sorted: The tensors with rows in the order of a sort: the number of its indices, by serial number.
    """

    layouts: dict[int, Layout] | None
    regroups: bool
    sorted: dict[int, int]


def proof_of(two: Sequence[Operation], three: Sequence[Operation], inputs: Sequence[int], logits: int) -> Proof:
    """Follow the samples through all operations.

    A number that is computed from all samples may only be read by Python. The proof holds for samples that give the same number
    alone: for most samples, the longest text in the batch is longer than their own.

    Args:
        two: The operations with two samples.
        three: The operations with three samples.
        inputs: The serial numbers of the tensors with samples, in ``three``.
        logits: The serial number of the logits, in ``three``.
    """
    follower = Follower.from_inputs(inputs)
    facts = follower.facts
    try:
        for small, large in zip(two, three, strict=True):
            follower.add(small, large)
    except RegroupedError:
        return Proof(None, True, {})
    except (UnprovenError, IndexError, TypeError):
        return Proof(None, False, {})
    if facts.tensors.get(logits) != Samples(Layout(0)):
        return Proof(None, False, {})
    in_place: dict[int, Layout] = {}
    in_order: dict[int, int] = {}
    for serial, fact in facts.tensors.items():
        if not isinstance(fact, Samples):
            continue
        if fact.layout.order:
            in_order[serial] = fact.layout.order
        else:
            in_place[serial] = fact.layout
    return Proof(in_place, False, in_order)


_REDUCING = frozenset(["all", "any", "max", "min", "amax", "amin", "sum", "count_nonzero"])


def _is_number_of_all(operation: Operation) -> bool:
    """Return whether an operation computes one number from all samples, or finds that all values are equal."""
    if finds_one_value(operation):
        return bool(operation.depends & SAMPLES)
    return operation.name in _REDUCING and operation.outputs == ((),) and bool(operation.depends & SAMPLES)


def _stays_a_number(operation: Operation, arguments: Sequence[TensorFact | None]) -> bool:
    """Return whether the results of an operation on samples, and on numbers computed from all of them, are such numbers."""
    is_number = finds_one_value(operation) or all(shape == () for shape in operation.outputs)
    return is_number and all(isinstance(fact, Number | Samples) for fact in arguments)


_READING = frozenset(["read", "_linalg_check_errors"])
"""Operations without a result."""

_SHAPE_ARGUMENTS = frozenset(["size", "shape", "sizes", "split_sizes", "repeats", "stride"])
"""Arguments that may depend on the number of samples; the shapes of the results show whether they grow as they must."""


@dataclass
class Follower:
    """Follows the samples through the operations of a forward pass.

    Args:
        facts: What is known of its tensors and memory so far.
        constants: The rules for tensors without samples.
        orders: The rules for sorts and sorted rows.
    """

    facts: Facts
    constants: Constants
    orders: RowOrders

    @classmethod
    def from_inputs(cls, inputs: Sequence[int]) -> Follower:
        """Return a follower at the begin of a forward pass.

        Args:
            inputs: The serial numbers of the tensors with samples.
        """
        facts = Facts(dict.fromkeys(inputs, Samples(Layout(0))))
        return cls(facts, Constants(facts), RowOrders(facts))

    def add(self, small: Operation, large: Operation) -> None:
        """Follow the samples through one operation.

        Raises:
            UnprovenError: If it may mix samples, or treats them differently in batches of different sizes.
        """
        if large.name in _READING:
            return
        if len(small.outputs) != len(large.outputs):  # the number of pieces depends on that of the samples
            raise UnprovenError
        varied = large.hidden or _varied(small, large)
        arguments = self.facts.of(large.input_serials)
        was_written = any(memory.written for memory in self.facts.memory(large.memory))
        has_samples = bool(large.depends & SAMPLES) and (was_written or not all(map(is_constant, arguments)))
        if self.orders.follow(small, large):
            self._require_constants(large)
        elif any(isinstance(fact, Number) for fact in arguments) or _is_number_of_all(large):
            self._note_number(large, arguments)
        elif large.name in FILLING and not varied:
            self.constants.fill(small, large)
        elif has_samples:
            if varied:
                raise UnprovenError
            self._place(small, large)
        else:
            self.constants.follow(small, large, varied or was_written)

    def _require_constants(self, operation: Operation) -> None:
        """Require that all but the rows and integers of an order are the same for any number of samples."""
        facts = self.facts.of(operation.input_serials)
        for fact, memory in zip(facts, self.facts.memory(operation.memory), strict=True):
            if isinstance(fact, SortInteger | Range | Samples):
                continue
            if isinstance(fact, Varying | Number) or memory.written:
                raise UnprovenError
        self.facts.note_written(operation)

    def _note_number(self, operation: Operation, arguments: Sequence[TensorFact | None]) -> None:
        """Note a number of all samples, which only Python may read, or which may lead to other such numbers."""
        results = self.facts.of(operation.output_serials)
        replaces_samples = bool(operation.written) and not all(isinstance(fact, Number) for fact in results)
        if operation.hidden or replaces_samples or not _stays_a_number(operation, arguments):
            raise UnprovenError
        self.facts.set(operation.output_serials, Number())

    def _place(self, small: Operation, large: Operation) -> None:
        """Find where the samples are in an operation's results."""
        layouts = result_layouts(self.facts, small, large)
        if large.written:
            self._write(large)
        for serial, layout in fitting_results(self.facts, layouts, small, large):
            self.facts.tensors[serial] = Samples(layout)

    def _write(self, operation: Operation) -> None:
        """Note the memory that samples are written into, and whether other tensors with this memory keep their layouts.

        Raises:
            UnprovenError: If the samples share this memory, or it gets another shape.
        """
        arguments = zip(operation.input_serials, operation.memory, operation.inputs, strict=True)
        for serial, key, shape in arguments:
            if key not in operation.written:
                continue
            memory = self.facts.memories[key]
            if memory.shared or not (operation.name.endswith("_") or shape in operation.outputs):
                raise UnprovenError
            is_placed = layout_in(self.facts.tensors.get(serial)) is not None
            memory.in_place = is_placed and (memory.in_place or not memory.written)
            memory.written = True
        self.facts.note_changed(operation)


def _varied(small: Operation, large: Operation) -> bool:
    """Return whether a plain argument differs between two and three samples, except for one that sets a shape."""
    if small.arguments == large.arguments:
        return False
    names = (small.arguments.keys() | large.arguments.keys()) - _SHAPE_ARGUMENTS
    differing = {name for name in names if small.arguments.get(name) != large.arguments.get(name)}
    if small.outputs != large.outputs:  # the end of a slice, the length of a piece or a range may grow with the samples
        differing -= {"end", "length", "split_size"}
    if small.name == "native_group_norm":
        differing.discard("N")  # the length of the first axis
    return bool(differing)

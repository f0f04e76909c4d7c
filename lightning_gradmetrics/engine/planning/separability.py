"""Proves from the basic operations of two traces that a forward pass treats each sample separately.

Each operation with a rule keeps the samples apart as long as it does not mix positions of the sample axis. If all operations of
a model have one, no batch can couple its samples, and batches need no check. Nothing in the proof depends on the number of
samples: layouts are the same with two and with three, and no constant that meets a sample changes with their number.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from typing import NamedTuple

from lightning_gradmetrics.engine.planning.row_orders import RowOrders
from lightning_gradmetrics.engine.tracing.dependence import SAMPLES, Operation, finds_one_value
from lightning_gradmetrics.engine.tracing.layout_rules import LAYOUT_RULES, aligned
from lightning_gradmetrics.engine.tracing.layouts import Layout, RegroupedError, Shape, Step, UnprovenError

__all__ = ["Proof", "proof_of"]


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
    samples = _Samples(dict.fromkeys(inputs, Layout(0)))
    try:
        for small, large in zip(two, three, strict=True):
            samples.add(small, large)
    except RegroupedError:
        return Proof(None, True, {})
    except (UnprovenError, IndexError, TypeError):
        return Proof(None, False, {})
    if samples.layouts.get(logits) != Layout(0):
        return Proof(None, False, {})
    in_place: dict[int, Layout] = {}
    in_order: dict[int, int] = {}
    for serial, layout in samples.layouts.items():
        if layout.order:
            in_order[serial] = layout.order
        else:
            in_place[serial] = layout
    return Proof(in_place, False, in_order)


_REDUCING = frozenset(["all", "any", "max", "min", "amax", "amin", "sum", "count_nonzero"])


def _is_number_of_all(operation: Operation) -> bool:
    """Return whether an operation computes one number from all samples, or finds that all values are equal."""
    if finds_one_value(operation):
        return bool(operation.depends & SAMPLES)
    return operation.name in _REDUCING and operation.outputs == ((),) and bool(operation.depends & SAMPLES)


def _stays_a_number(operation: Operation, known: Set[int]) -> bool:
    """Return whether numbers computed from all samples are only read by Python, or only lead to other such numbers."""
    is_number = finds_one_value(operation) or all(shape == () for shape in operation.outputs)
    return is_number and known >= set(operation.input_serials)


_READING = frozenset(["read", "_linalg_check_errors"])
"""Operations without a result."""

_FILLED = ("zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full")
_EMPTY = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "empty_permuted")
_CONSTANT = frozenset([*_FILLED, *_EMPTY])
"""Operations whose results are the same at all positions, or have no values before the model sets them."""

_CHOOSING = frozenset(
    ["view", "_unsafe_view", "unsqueeze", "squeeze", "select", "slice", "clone", "detach", "alias", "_to_copy"]
)
"""Operations whose results are some entries of their argument, in the same order."""

_MOVING = _CHOOSING.union(["expand", "repeat", "transpose", "t", "permute", "lift_fresh"])
"""Operations whose results are entries of their argument."""

_SHAPE_ARGUMENTS = frozenset(["size", "shape", "sizes", "split_sizes", "repeats", "stride"])
"""Arguments that may depend on the number of samples; the shapes of the results show whether they grow as they must."""


@dataclass
class _Samples:
    """What is known of the tensors of a forward pass, by serial number.

    Args:
        layouts: Where the samples are.
        repeated: Constants that are repeated for each sample, and where.
        uniform: Constants of the same shape for every number of samples, and tensors with equal entries.
        filled: Tensors whose shape grows with the number of samples, and whose entries are all equal.
        numbers: Numbers that are computed from all samples.
        sized: Tensors whose values may depend on the number of samples or on the place of a sample.
        counting: Tensors that contain ``0, 1, ..., N - 1``.
        written: Memory that samples were written into.
        kept: Such memory of repeated constants, if each sample was written to its own place.
        shared: Memory of constants that all samples share, as after ``expand``.
        spread: Memory of constants whose shape grows with the number of samples.
        uneven: Memory of such constants that was changed in place, in the same way for each sample.
        orders: Sorts, and what follows from them.
    """

    layouts: dict[int, Layout]
    repeated: dict[int, Layout] = field(default_factory=dict)
    uniform: set[int] = field(default_factory=set)
    filled: set[int] = field(default_factory=set)
    numbers: set[int] = field(default_factory=set)
    sized: set[int] = field(default_factory=set)
    counting: set[int] = field(default_factory=set)
    written: set[int] = field(default_factory=set)
    kept: set[int] = field(default_factory=set)
    shared: set[int] = field(default_factory=set)
    spread: set[int] = field(default_factory=set)
    uneven: set[int] = field(default_factory=set)
    orders: RowOrders = field(default_factory=RowOrders)

    def add(self, small: Operation, large: Operation) -> None:
        """Follow the samples through one operation.

        Raises:
            UnprovenError: If it may mix samples, or treats them differently in batches of different sizes.
        """
        depends = bool(large.depends & SAMPLES)
        serials = large.input_serials
        varied = large.hidden or _varied(small, large)
        if large.name in _READING:
            return
        if len(small.outputs) != len(large.outputs):  # the number of pieces depends on that of the samples
            raise UnprovenError
        if self.orders.follow(small, large, self.layouts):
            self._require_constants(large)
        elif self.numbers.intersection(serials) or _is_number_of_all(large):
            replaces_samples = bool(large.written) and not self.numbers.issuperset(large.output_serials)
            if large.hidden or replaces_samples or not _stays_a_number(large, self.numbers | self.layouts.keys()):
                raise UnprovenError
            self.numbers.update(large.output_serials)
        elif large.name in _CONSTANT and not varied:
            self._fill(small, large)
        elif depends and not (self._are_constants(serials) and self.written.isdisjoint(large.memory)):
            if varied:
                raise UnprovenError
            self._place(small, large)
        elif varied or self.sized.intersection(serials) or self.written.intersection(large.memory):
            self._note_sized(large)
        else:
            self._keep_constant(small, large)

    def _require_constants(self, operation: Operation) -> None:
        """Require that all but the rows and integers of an order are the same for any number of samples."""
        for serial, memory in zip(operation.input_serials, operation.memory, strict=True):
            if serial in self.orders.integers or serial in self.orders.ranges or serial in self.layouts:
                continue
            if serial in self.sized or serial in self.numbers or memory in self.written:
                raise UnprovenError
        self.written.update(operation.written)

    def _are_constants(self, serials: Sequence[int]) -> bool:
        return all(serial in self.uniform or serial in self.repeated for serial in serials)

    def _note_sized(self, operation: Operation) -> None:
        self.sized.update(operation.output_serials)
        self.written.update(operation.written)

    def _fill(self, small: Operation, large: Operation) -> None:
        """Note tensors with equal entries."""
        self.uniform.update(large.output_serials)
        for serial, before, after in zip(large.output_serials, small.outputs, large.outputs, strict=True):
            if before != after:
                self.filled.add(serial)
                layout = _only_layout(before, after)
                if layout is not None:
                    self.repeated[serial] = layout

    def _place(self, small: Operation, large: Operation) -> None:
        """Find the layouts of an operation's results."""
        layouts = self._layouts_of(small, large)
        if large.written:
            self._note_written(large)
        self._set(self.layouts, layouts, small, large)

    def _note_written(self, operation: Operation) -> None:
        """Note the memory that samples are written into, and whether other tensors with this memory keep their layouts.

        Raises:
            UnprovenError: If the samples share this memory, or it gets another shape.
        """
        arguments = zip(operation.input_serials, operation.memory, operation.inputs, strict=True)
        for serial, memory, shape in arguments:
            if memory not in operation.written:
                continue
            if memory in self.shared or not (operation.name.endswith("_") or shape in operation.outputs):
                raise UnprovenError
            is_placed = serial in self.layouts or serial in self.repeated
            if is_placed and (memory in self.kept or memory not in self.written):
                self.kept.add(memory)
            else:
                self.kept.discard(memory)
            self.written.add(memory)
        self.uneven.update(operation.written)

    def _set(self, found: dict[int, Layout], layouts: Sequence[Layout], small: Operation, large: Operation) -> None:
        shapes = zip(small.outputs, large.outputs, strict=True)
        for serial, layout, (before, after) in zip(large.output_serials, layouts, shapes, strict=True):
            if layout.fits(before, after):
                found[serial] = layout
            elif serial not in self.filled:
                self.sized.add(serial)  # such as the state of a generator

    def _layouts_of(self, small: Operation, large: Operation) -> Sequence[Layout]:
        known = []
        filled = self._filled(large)
        found = [self.layouts.get(serial, self.repeated.get(serial)) for serial in large.input_serials]
        varies = any(layout is not None and not same for layout, same in zip(found, filled, strict=True))
        for number, (serial, memory) in enumerate(zip(large.input_serials, large.memory, strict=True)):
            layout = found[number]
            if varies and filled[number] and memory not in large.written:
                layout = None  # it has every layout
            grown = small.inputs[number] != large.inputs[number]
            counts_up = large.name == "index" and number == 1 and serial in self.counting
            if layout is None and grown and serial not in self.uniform and not counts_up:
                raise UnprovenError
            is_kept = serial in self.layouts or (memory in self.kept and serial in self.repeated)
            is_overwritten = memory in self.written and not is_kept
            if serial in self.sized or is_overwritten:
                raise UnprovenError
            known.append(layout)
        step = Step(large, known, small)
        name = large.name.rstrip("_") if large.name not in LAYOUT_RULES else large.name
        if name not in LAYOUT_RULES and not large.pointwise:
            raise UnprovenError
        layouts = LAYOUT_RULES.get(name, aligned)(step)
        return [layouts] * len(large.outputs) if isinstance(layouts, Layout) else layouts

    def _filled(self, operation: Operation) -> list[bool]:
        """Return of each tensor argument whether all its entries are equal."""
        pairs = zip(operation.input_serials, operation.memory, strict=True)
        return [serial in self.filled and memory not in self.uneven for serial, memory in pairs]

    def _keep_constant(self, small: Operation, large: Operation) -> None:
        """Follow tensors that do not depend on the samples: they are the same for all of them, or may depend on their number."""
        pairs = zip(large.input_serials, large.memory, small.inputs, large.inputs, strict=True)
        grown = {serial: memory for serial, memory, before, after in pairs if before != after}
        shapes_stay = small.outputs == large.outputs
        self.spread.update(grown.values())
        if large.name == "arange" and not shapes_stay:
            self._count(small, large)
        elif not grown and shapes_stay:
            self._keep_uniform(large)
        elif self._keeps_counting(large, grown.keys(), shapes_stay):
            self.counting.update(large.output_serials)
        elif shapes_stay:
            self._choose(large, grown.keys())
        else:
            self._repeat(small, large, bool(grown))

    def _keep_uniform(self, operation: Operation) -> None:
        if self.spread.isdisjoint(operation.written):
            self.uniform.update(operation.output_serials)
        else:  # it changes the entries of some samples
            self._note_sized(operation)

    def _count(self, small: Operation, large: Operation) -> None:
        """Note a range that counts the samples."""
        start = large.arguments.get("start", 0), large.arguments.get("step", 1)
        if start == (0, 1) and (small.outputs, large.outputs) == (((2,),), ((3,),)):
            self.counting.update(large.output_serials)
        else:
            self._note_sized(large)

    def _keeps_counting(self, operation: Operation, grown: Set[int], shapes_stay: bool) -> bool:
        counts = bool(grown) and self.counting.issuperset(operation.input_serials)
        return counts and not shapes_stay and operation.name in _CHOOSING

    def _choose(self, operation: Operation, grown: Set[int]) -> None:
        """Note some entries of a constant that is repeated for each sample."""
        layouts = [self.repeated.get(serial) for serial in grown]
        stays = all(layout is not None and layout.outer == 1 for layout in layouts)
        if operation.name in _CHOOSING and (stays or all(self._filled(operation))):
            self.uniform.update(operation.output_serials)
        else:  # a sum of them would depend on their number
            self._note_sized(operation)

    def _repeat(self, small: Operation, large: Operation, grown: bool) -> None:
        """Find where a constant is repeated for each sample."""
        if self._stays_filled(large):
            self.uniform.update(large.output_serials)
            self.filled.update(large.output_serials)
        try:
            if grown:
                layouts = self._layouts_of(small, large)
            else:
                layouts = [_repeated(small, large)]
                self.shared.update(large.memory if large.name == "expand" else ())
            self._set(self.repeated, layouts, small, large)
            self.uneven.update(large.written)
        except (UnprovenError, IndexError, TypeError):
            if large.written or not self.filled.issuperset(large.output_serials):
                self._note_sized(large)

    def _stays_filled(self, operation: Operation) -> bool:
        if operation.name not in _MOVING and not operation.pointwise:
            return False
        filled = self._filled(operation)
        return any(filled) and all(same or shape == () for same, shape in zip(filled, operation.inputs, strict=True))


def _only_layout(small: Shape, large: Shape) -> Layout | None:
    """Return the layout of a tensor of which one axis grows with the samples, the positions of each sample together."""
    if len(small) != len(large):
        return None
    grown = [dim for dim, (before, after) in enumerate(zip(small, large, strict=True)) if before != after]
    layout = Layout(grown[0], inner=small[grown[0]] // 2)
    return layout if len(grown) == 1 and layout.fits(small, large) else None


def _repeated(small: Operation, large: Operation) -> Layout:
    """Return the layout of a constant that an operation repeats once for each sample.

    Raises:
        UnprovenError: If it does something else.
    """
    layout = _only_layout(small.outputs[0], large.outputs[0])
    if layout is None or large.name not in ("expand", "repeat"):
        raise UnprovenError
    before = len(large.outputs[0]) - len(large.inputs[0])
    length = 1 if layout.dim < before else large.inputs[0][layout.dim - before]
    if large.name == "repeat" and layout.inner != length:
        raise UnprovenError
    return layout


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

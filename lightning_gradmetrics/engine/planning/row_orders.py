"""Follows rows that are sorted by a key that each of them has, as mixtures of experts sort positions by expert.

The order of such rows depends on all samples, but what happens to a row does not: it keeps its sample and its key through operations
that treat each row separately, and the inverse of the sort puts it back. Groups of equal keys end where the numbers of the keys say.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from lightning_gradmetrics.engine.tracing.dependence import SAMPLES, Operation
from lightning_gradmetrics.engine.tracing.layout_rules import LAYOUT_RULES, aligned
from lightning_gradmetrics.engine.tracing.layouts import Layout, Step, UnprovenError

__all__ = ["GROUPED", "RowOrders"]

GROUPED = "_grouped_mm"
"""The operation that multiplies each group of rows by another matrix."""

_PER_ROW = frozenset(
    ["split", "split_with_sizes", "slice", "select", "unbind", "cat", "stack", "sum", "mean", "amax", "_softmax"]
)
"""Operations on the other axes of rows, with the rules of unsorted rows; element by element ones are known by their tag."""

_RESHAPING = frozenset(["view", "_unsafe_view", "unsqueeze", "squeeze", "_to_copy", "clone", "detach", "alias"])
"""Operations that keep the order of all entries."""

_LIKE = frozenset(["empty_like", "zeros_like", "ones_like", "new_empty", "new_zeros", "new_ones"])
"""Operations that use nothing but the shape and type of their argument."""


@dataclass
class RowOrders:
    """What is known of sorts and of the integers that are computed from them, by serial number.

    The number of an order is that of the indices that a sort returns.

    Args:
        sources: For each order the number of the sorted tensor, and its layout.
        ascending: The orders with ascending keys.
        keys: Sorted keys, with their order.
        places: Indices of an order, divided by an integer: order and integer.
        inverses: Indices that put rows back from an order.
        counts: The number of entries for each key in a tensor, whose number is given.
        ends: The same added up.
        ranges: Tensors that contain ``0, 1, ...``.
        memory: The memory of all of these integers.
    """

    sources: dict[int, tuple[int, Layout]] = field(default_factory=dict)
    ascending: set[int] = field(default_factory=set)
    keys: dict[int, int] = field(default_factory=dict)
    places: dict[int, tuple[int, int]] = field(default_factory=dict)
    inverses: dict[int, int] = field(default_factory=dict)
    counts: dict[int, int] = field(default_factory=dict)
    ends: dict[int, int] = field(default_factory=dict)
    ranges: set[int] = field(default_factory=set)
    memory: set[int] = field(default_factory=set)

    def follow(self, small: Operation, large: Operation, layouts: dict[int, Layout]) -> bool:
        """Follow one operation; return whether it is one on sorted rows or on integers that a sort returns.

        Args:
            small: The operation with two samples.
            large: The operation with three samples.
            layouts: The layouts of all tensors with samples, to which those of the results are added.

        Raises:
            UnprovenError: If it may treat a row differently because of others.
        """
        if not large.depends & SAMPLES:
            is_copy = large.name in ("detach", "alias", "clone") and self.ranges.issuperset(large.input_serials)
            if is_copy or (large.name == "arange" and _counts_from_zero(large)):
                self.ranges.update(large.output_serials)
            return False
        if large.name == "index_put_" and self._is_inverse(large):
            inverse, places, _ = large.input_serials
            self.inverses.update(dict.fromkeys((inverse, *large.output_serials), self.places[places][0]))
            self.memory.update(large.written)
            return True
        if large.name in _LIKE:
            return False
        if not self.memory.isdisjoint(large.written):
            raise UnprovenError
        if not self._is_known(large, layouts):
            return large.name == "sort" and self._sort(small, large, layouts)
        if large.hidden or (large.written and not self._changes_rows(large, layouts)):
            raise UnprovenError
        if not (self._is_special(large, layouts) or self._looks_up(small, large, layouts)):
            self._rows(small, large, layouts)
        return True

    @property
    def integers(self) -> set[int]:
        """The numbers of all tensors whose values depend on all samples."""
        return {*self.places, *self.inverses, *self.counts, *self.ends}

    def _is_known(self, operation: Operation, layouts: dict[int, Layout]) -> bool:
        """Return whether an argument is one of sorted rows, or of integers that a sort returns."""
        for serial in operation.input_serials:
            layout = layouts.get(serial)
            if layout is not None and layout.order:
                return True
        return operation.name in ("bincount", "histc") or not self.integers.isdisjoint(operation.input_serials)

    def _is_special(self, operation: Operation, layouts: dict[int, Layout]) -> bool:
        """Follow an operation on integers that a sort returns; return whether it is one."""
        name, arguments = operation.name, operation.arguments
        if name == "index":
            return self._index(operation, layouts)
        if name == "index_copy":
            return self._put_back(operation, layouts)
        if name == "floor_divide" or (name == "div" and arguments.get("rounding_mode") in ("floor", "trunc")):
            return self._divide(operation)
        if name in ("histc", "bincount"):
            return self._count(operation, layouts)
        if name in ("cumsum", "_to_copy"):
            return self._add_up(operation)
        return name == GROUPED and self._multiply(operation, layouts)

    def _keep(self, operation: Operation) -> int:
        """Return the number of the only result, whose memory must not be changed."""
        self.memory.update(operation.made)
        (serial,) = operation.output_serials
        return serial

    # -- sorts --------------------------------------------------------------------------------------------------------

    def _sort(self, small: Operation, large: Operation, layouts: dict[int, Layout]) -> bool:
        """Note a sort of all entries of a tensor with one axis."""
        source = large.input_serials[0]
        layout = layouts.get(source)
        if len(large.inputs[0]) != 1 or layout is None or layout.order or layout.outer != 1 or large.hidden:
            return False
        if large.written or small.arguments != large.arguments or len(large.input_serials) != 1:
            return False
        values, order = large.output_serials
        self.sources[order] = source, layout
        self.places[order], self.keys[values] = (order, 1), order
        if not large.arguments.get("descending"):
            self.ascending.add(order)
        layouts[values] = Layout(0, 1, layout.inner, order)
        self.memory.update(large.made, large.memory)
        return True

    def _divide(self, operation: Operation) -> bool:
        """Divide places: the row of a position that has several of the sorted entries."""
        known, other = self.places.get(operation.input_serials[0]), operation.arguments.get("other")
        if known is None or type(other) is not int or other < 1 or len(operation.input_serials) != 1:
            return False
        order, before = known
        if self.sources[order][1].inner % (before * other):
            return False
        self.places[self._keep(operation)] = order, before * other
        return True

    def _is_inverse(self, operation: Operation) -> bool:
        """Return whether ``inverse[places] = 0, 1, ...`` is assigned for all places."""
        if len(operation.inputs) != 3 or operation.hidden or operation.arguments.get("accumulate"):
            return False
        _, places, values = operation.input_serials
        is_whole = operation.inputs[0] == operation.inputs[1] == operation.inputs[2] and len(operation.inputs[0]) == 1
        return is_whole and self.places.get(places, (0, 0))[1] == 1 and values in self.ranges

    # -- rows ---------------------------------------------------------------------------------------------------------

    def _index(self, operation: Operation, layouts: dict[int, Layout]) -> bool:
        """Take rows in an order, or put them back."""
        if len(operation.input_serials) != 2 or [dim for _, dim in operation.chosen] != [0]:
            return False
        layout, index = layouts.get(operation.input_serials[0]), operation.input_serials[1]
        if layout is None or (layout.dim, layout.outer) != (0, 1) or len(operation.inputs[1]) != 1:
            return False
        (result,) = operation.output_serials
        if index in self.places and not layout.order:
            order, divisor = self.places[index]
            inner = self.sources[order][1].inner
            if layout.inner * divisor != inner:
                return False
            layouts[result] = Layout(0, 1, inner, order)
        elif index in self.inverses and layout.order == self.inverses[index]:
            layouts[result] = Layout(0, 1, layout.inner)
        else:
            return False
        return True

    def _looks_up(self, small: Operation, large: Operation, layouts: dict[int, Layout]) -> bool:
        """Take rows of a constant table by an integer of each row, such as its key."""
        if large.name != "index" or len(large.input_serials) != 2 or [dim for _, dim in large.chosen] != [0]:
            return False
        table, index = large.input_serials
        layout = layouts.get(index)
        is_table = table not in layouts and table not in self.integers and small.inputs[0] == large.inputs[0]
        if not is_table or layout is None or not layout.order or len(large.inputs[1]) != 1:
            return False
        layouts[large.output_serials[0]] = layout
        return True

    def _changes_rows(self, operation: Operation, layouts: dict[int, Layout]) -> bool:
        """Return whether an operation changes sorted rows in place, element by element."""
        layout, memory = layouts.get(operation.input_serials[0]), operation.memory[0]
        is_only = operation.pointwise and set(operation.written) == {memory}
        return is_only and layout is not None and bool(layout.order) and operation.outputs == operation.inputs[:1]

    def _put_back(self, operation: Operation, layouts: dict[int, Layout]) -> bool:
        """Copy all rows to the places that they came from, so that nothing of the target is left."""
        if len(operation.input_serials) != 3 or operation.arguments.get("dim"):
            return False
        _, index, rows = operation.input_serials
        layout, shapes = layouts.get(rows), operation.inputs
        if layout is None or not layout.order or self.places.get(index) != (layout.order, 1) or shapes[0] != shapes[2]:
            return False
        layouts[operation.output_serials[0]] = Layout(0, 1, layout.inner)
        return True

    def _rows(self, small: Operation, large: Operation, layouts: dict[int, Layout]) -> None:
        """Follow an operation that treats each row separately."""
        name, known = large.name.rstrip("_"), [layouts.get(serial) for serial in large.input_serials]
        present = {layout for layout in known if layout is not None}
        for serial, layout, before, after in zip(large.input_serials, known, small.inputs, large.inputs, strict=True):
            if serial in self.integers or (layout is None and before != after):
                raise UnprovenError
        if len(present) != 1 or large.hidden or small.arguments != large.arguments:
            raise UnprovenError
        rows = present.pop()
        results = [rows] * len(large.output_serials)
        if name in _RESHAPING:
            self._require_rows(large)
        elif large.pointwise or name in _PER_ROW:
            found = LAYOUT_RULES.get(name, aligned)(Step(large, known, small))
            results = [found] * len(results) if isinstance(found, Layout) else found
        else:
            raise UnprovenError
        shapes = zip(small.outputs, large.outputs, strict=True)
        for serial, result, (before, after) in zip(large.output_serials, results, shapes, strict=True):
            if result != rows or rows.dim or not result.fits(before, after):
                raise UnprovenError
            layouts[serial] = result
        if name == "_to_copy" and large.input_serials[0] in self.keys:
            self.keys[large.output_serials[0]] = self.keys[large.input_serials[0]]

    def _require_rows(self, operation: Operation) -> None:
        if operation.outputs[0][:1] != operation.inputs[0][:1] or not operation.outputs[0]:
            raise UnprovenError

    # -- groups -------------------------------------------------------------------------------------------------------

    def _count(self, operation: Operation, layouts: dict[int, Layout]) -> bool:
        """Count the keys of a tensor; every batch compares the ends of the groups with the keys."""
        counted, arguments = operation.input_serials[0], operation.arguments
        layout = layouts.get(counted)
        if operation.name == "histc":
            bins = arguments.get("bins")
            if type(bins) is not int or (arguments.get("min"), arguments.get("max")) != (0, bins - 1):
                raise UnprovenError
        if counted in self.keys:
            counted = self.sources[self.keys[counted]][0]
        elif layout is None or layout.order or len(operation.inputs[0]) != 1:
            raise UnprovenError
        if len(operation.input_serials) != 1:
            raise UnprovenError
        self.counts[self._keep(operation)] = counted
        self.memory.update(operation.memory)
        return True

    def _add_up(self, operation: Operation) -> bool:
        """Add up the numbers of entries, or convert them to another type."""
        first = operation.input_serials[0]
        if operation.name == "cumsum" and first in self.counts:
            self.ends[self._keep(operation)] = self.counts[first]
            return True
        for known in (self.counts, self.ends):
            if operation.name == "_to_copy" and first in known:
                known[self._keep(operation)] = known[first]
                return True
        return False

    def _multiply(self, operation: Operation, layouts: dict[int, Layout]) -> bool:
        """Multiply each group of rows by its own matrix, which is the same for all samples."""
        if len(operation.input_serials) != 3 or list(map(len, operation.inputs)) != [2, 3, 1]:
            return False
        rows, matrices, ends = operation.input_serials
        layout = layouts.get(rows)
        if layout is None or layout.order not in self.ascending or matrices in layouts:
            return False
        if self.ends.get(ends) != self.sources[layout.order][0]:
            return False
        layouts[operation.output_serials[0]] = layout
        return True


def _counts_from_zero(operation: Operation) -> bool:
    """Return whether a range starts at zero and has steps of one."""
    arguments = operation.arguments
    return (arguments.get("start", 0), arguments.get("step", 1)) == (0, 1) and not operation.input_serials

"""Follows rows that are sorted by a key that each of them has, as mixtures of experts sort positions by expert.

The order of such rows depends on all samples, but what happens to a row does not: it keeps its sample and its key through operations
that treat each row separately, and the inverse of the sort puts it back. Groups of equal keys end where the numbers of the keys say.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from lightning_gradmetrics.engine.planning.proof_facts import (
    Counts,
    Ends,
    Equal,
    Facts,
    Inverse,
    Places,
    Range,
    Samples,
    Sort,
    SortInteger,
)
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
    """The rules for sorts, for rows in the order of a sort, and for integers that are computed from a sort.

    Args:
        facts: What is known of the tensors and memory of a forward pass.
        sorts: Its sorts, by the serial number of their indices, which is the number of their order.
    """

    facts: Facts
    sorts: dict[int, Sort] = field(default_factory=dict)

    def follow(self, small: Operation, large: Operation) -> bool:
        """Follow one operation; return whether it is one on sorted rows or on integers that a sort returns.

        Args:
            small: The operation with two samples.
            large: The operation with three samples.

        Raises:
            UnprovenError: If it may treat a row differently because of others.
        """
        if not large.depends & SAMPLES:
            return False
        if large.name == "index_put_" and self._inverts(large):
            return True
        if large.name in _LIKE:
            return False
        if any(memory.fixed for memory in self.facts.memory(large.written)):
            raise UnprovenError
        if not self._is_known(large):
            return large.name == "sort" and self._sort(small, large)
        if large.hidden or (large.written and not self._changes_rows(large)):
            raise UnprovenError
        if not (self._is_special(large) or self._looks_up(small, large)):
            self._rows(small, large)
        return True

    def _is_known(self, operation: Operation) -> bool:
        """Return whether an argument is one of sorted rows, or of integers that a sort returns."""
        for fact in self.facts.of(operation.input_serials):
            if isinstance(fact, SortInteger) or (isinstance(fact, Samples) and fact.layout.order):
                return True
        return operation.name in ("bincount", "histc")

    def _is_special(self, operation: Operation) -> bool:
        """Follow an operation on integers that a sort returns; return whether it is one."""
        name, arguments = operation.name, operation.arguments
        if name == "index":
            return self._index(operation)
        if name == "index_copy":
            return self._put_back(operation)
        if name == "floor_divide" or (name == "div" and arguments.get("rounding_mode") in ("floor", "trunc")):
            return self._divide(operation)
        if name in ("histc", "bincount"):
            return self._count(operation)
        if name in ("cumsum", "_to_copy"):
            return self._add_up(operation)
        return name == GROUPED and self._multiply(operation)

    def _keep(self, operation: Operation, integer: SortInteger) -> None:
        """Note that the only result is an integer of a sort, whose memory must not be changed."""
        self._fix(operation.made)
        (serial,) = operation.output_serials
        self.facts.tensors[serial] = integer

    def _fix(self, keys: Iterable[int]) -> None:
        for memory in self.facts.memory(keys):
            memory.fixed = True

    def _place(self, operation: Operation, layout: Layout) -> None:
        """Note where the samples are in the first result."""
        self.facts.tensors[operation.output_serials[0]] = Samples(layout)

    # -- sorts --------------------------------------------------------------------------------------------------------

    def _sort(self, small: Operation, large: Operation) -> bool:
        """Note a sort of all entries of a tensor with one axis."""
        source = large.input_serials[0]
        layout = self.facts.samples([source])[0]
        if len(large.inputs[0]) != 1 or layout is None or layout.order or layout.outer != 1 or large.hidden:
            return False
        if large.written or small.arguments != large.arguments or len(large.input_serials) != 1:
            return False
        keys, order = large.output_serials
        sort = Sort(order, source, layout, ascending=not large.arguments.get("descending"))
        self.sorts[order] = sort
        self.facts.tensors[order] = Places(sort, 1)
        self.facts.tensors[keys] = Samples(Layout(0, 1, layout.inner, order), sort)
        self._fix((*large.made, *large.memory))
        return True

    def _divide(self, operation: Operation) -> bool:
        """Divide places: the row of a position that has several of the sorted entries."""
        places, other = self.facts.of(operation.input_serials)[0], operation.arguments.get("other")
        if not isinstance(places, Places) or type(other) is not int or other < 1 or len(operation.input_serials) != 1:
            return False
        divisor = places.divisor * other
        if places.sort.layout.inner % divisor:
            return False
        self._keep(operation, Places(places.sort, divisor))
        return True

    def _inverts(self, operation: Operation) -> bool:
        """Note an assignment ``inverse[places] = 0, 1, ...`` for all places; return whether it is one.

        Other tensors with the memory of the target get the same numbers, so it must be a new one without samples.
        """
        if len(operation.inputs) != 3 or operation.hidden or operation.arguments.get("accumulate"):
            return False
        inverse, places, values = self.facts.of(operation.input_serials)
        is_new = isinstance(inverse, Equal) and not any(
            memory.written for memory in self.facts.memory(operation.memory)
        )
        target, shape = operation.inputs[0], operation.inputs[2]
        if not is_new or not target == operation.inputs[1] == shape or len(shape) != 1:
            return False
        if not isinstance(places, Places) or places.divisor != 1 or not (isinstance(values, Range) and values.is_whole):
            return False
        for serial in (operation.input_serials[0], *operation.output_serials):
            self.facts.tensors[serial] = Inverse(places.sort)
        self._fix(operation.written)
        return True

    # -- rows ---------------------------------------------------------------------------------------------------------

    def _index(self, operation: Operation) -> bool:
        """Take rows in an order, or put them back."""
        if len(operation.input_serials) != 2 or [dim for _, dim in operation.chosen] != [0]:
            return False
        layout, _ = self.facts.samples(operation.input_serials)
        _, index = self.facts.of(operation.input_serials)
        if layout is None or (layout.dim, layout.outer) != (0, 1) or len(operation.inputs[1]) != 1:
            return False
        if isinstance(index, Places) and not layout.order:
            inner = index.sort.layout.inner
            if layout.inner * index.divisor != inner:
                return False
            self._place(operation, Layout(0, 1, inner, index.sort.order))
        elif isinstance(index, Inverse) and layout.order == index.sort.order:
            self._place(operation, Layout(0, 1, layout.inner))
        else:
            return False
        return True

    def _looks_up(self, small: Operation, large: Operation) -> bool:
        """Take rows of a constant table by an integer of each row, such as its key."""
        if large.name != "index" or len(large.input_serials) != 2 or [dim for _, dim in large.chosen] != [0]:
            return False
        table = self.facts.of(large.input_serials)[0]
        layout = self.facts.samples(large.input_serials)[1]
        is_table = not isinstance(table, Samples | SortInteger) and small.inputs[0] == large.inputs[0]
        if not is_table or layout is None or not layout.order or len(large.inputs[1]) != 1:
            return False
        self._place(large, layout)
        return True

    def _changes_rows(self, operation: Operation) -> bool:
        """Return whether an operation changes sorted rows in place, element by element."""
        layout, memory = self.facts.samples(operation.input_serials)[0], operation.memory[0]
        is_only = operation.pointwise and set(operation.written) == {memory}
        return is_only and layout is not None and bool(layout.order) and operation.outputs == operation.inputs[:1]

    def _put_back(self, operation: Operation) -> bool:
        """Copy all rows to the places that they came from, so that nothing of the target is left."""
        if len(operation.input_serials) != 3 or operation.arguments.get("dim"):
            return False
        _, index, _ = self.facts.of(operation.input_serials)
        layout, shapes = self.facts.samples(operation.input_serials)[2], operation.inputs
        if layout is None or not layout.order or shapes[0] != shapes[2]:
            return False
        if not isinstance(index, Places) or (index.sort.order, index.divisor) != (layout.order, 1):
            return False
        self._place(operation, Layout(0, 1, layout.inner))
        return True

    def _rows(self, small: Operation, large: Operation) -> None:
        """Follow an operation that treats each row separately."""
        facts, known = self.facts.of(large.input_serials), self.facts.samples(large.input_serials)
        for fact, layout, before, after in zip(facts, known, small.inputs, large.inputs, strict=True):
            if isinstance(fact, SortInteger) or (layout is None and before != after):
                raise UnprovenError
        present = {layout for layout in known if layout is not None}
        if len(present) != 1 or large.hidden or small.arguments != large.arguments:
            raise UnprovenError
        rows = present.pop()
        results = self._rows_of_results(small, large, known, rows)
        shapes = zip(small.outputs, large.outputs, strict=True)
        for serial, result, (before, after) in zip(large.output_serials, results, shapes, strict=True):
            if result != rows or rows.dim or not result.fits(before, after):
                raise UnprovenError
            keys = facts[0] if large.name == "_to_copy" else None
            self.facts.tensors[serial] = keys if isinstance(keys, Samples) and keys.keys_of else Samples(result)

    def _rows_of_results(
        self, small: Operation, large: Operation, known: Sequence[Layout | None], rows: Layout
    ) -> Sequence[Layout]:
        """Return where the samples are in the results of an operation on rows."""
        name = large.name.rstrip("_")
        if name in _RESHAPING:
            self._require_rows(large)
            return [rows] * len(large.outputs)
        if not large.pointwise and name not in _PER_ROW:
            raise UnprovenError
        found = LAYOUT_RULES.get(name, aligned)(Step(large, known, small))
        return [found] * len(large.outputs) if isinstance(found, Layout) else found

    def _require_rows(self, operation: Operation) -> None:
        if operation.outputs[0][:1] != operation.inputs[0][:1] or not operation.outputs[0]:
            raise UnprovenError

    # -- groups -------------------------------------------------------------------------------------------------------

    def _count(self, operation: Operation) -> bool:
        """Count the keys of a tensor; every batch compares the ends of the groups with the keys."""
        source, arguments = operation.input_serials[0], operation.arguments
        fact = self.facts.tensors.get(source)
        if operation.name == "histc":
            bins = arguments.get("bins")
            if type(bins) is not int or (arguments.get("min"), arguments.get("max")) != (0, bins - 1):
                raise UnprovenError
        if not isinstance(fact, Samples) or len(operation.input_serials) != 1:
            raise UnprovenError
        if fact.keys_of:
            source = fact.keys_of.source
        elif fact.layout.order or len(operation.inputs[0]) != 1:
            raise UnprovenError
        self._keep(operation, Counts(source))
        self._fix(operation.memory)
        return True

    def _add_up(self, operation: Operation) -> bool:
        """Add up the numbers of entries, or convert them to another type."""
        fact = self.facts.of(operation.input_serials)[0]
        if operation.name == "_to_copy" and isinstance(fact, Counts | Ends):
            self._keep(operation, fact)
        elif operation.name == "cumsum" and isinstance(fact, Counts):
            self._keep(operation, Ends(fact.source))
        else:
            return False
        return True

    def _multiply(self, operation: Operation) -> bool:
        """Multiply each group of rows by its own matrix, which is the same for all samples."""
        if len(operation.input_serials) != 3 or list(map(len, operation.inputs)) != [2, 3, 1]:
            return False
        layout, matrices, _ = self.facts.samples(operation.input_serials)
        ends = self.facts.of(operation.input_serials)[2]
        sort = None if layout is None else self.sorts.get(layout.order)
        if layout is None or sort is None or not sort.ascending or matrices is not None:
            return False
        if ends != Ends(sort.source):
            return False
        self._place(operation, layout)
        return True

"""Follows constants: tensors that do not depend on the samples, but whose shape or values may depend on their number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_gradmetrics.engine.planning.proof_facts import (
    Constant,
    Equal,
    Facts,
    Range,
    Repeated,
    TensorFact,
    Varying,
    layout_in,
    varies,
)
from lightning_gradmetrics.engine.planning.result_layouts import equal_arguments, fitting_results, result_layouts
from lightning_gradmetrics.engine.tracing.dependence import Operation
from lightning_gradmetrics.engine.tracing.layouts import Layout, Shape, UnprovenError

__all__ = ["FILLING", "Constants"]

_FILLED = ("zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full")
_EMPTY = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "empty_permuted")
FILLING = frozenset([*_FILLED, *_EMPTY])
"""Operations whose results are the same at all positions, or have no values before the model sets them."""

_CHOOSING = frozenset(
    ["view", "_unsafe_view", "unsqueeze", "squeeze", "select", "slice", "clone", "detach", "alias", "_to_copy"]
)
"""Operations whose results are some entries of their argument, in the same order."""

_COPYING = frozenset(["clone", "detach", "alias"])
"""Operations whose result equals their argument."""

_MOVING = _CHOOSING.union(["expand", "repeat", "transpose", "t", "permute", "lift_fresh"])
"""Operations whose results are entries of their argument."""


@dataclass
class Constants:
    """The rules for constants.

    Args:
        facts: What is known of the tensors and memory of a forward pass.
    """

    facts: Facts

    def fill(self, small: Operation, large: Operation) -> None:
        """Note tensors with equal entries."""
        for serial, before, after in zip(large.output_serials, small.outputs, large.outputs, strict=True):
            grows = before != after
            self.facts.tensors[serial] = Equal(_only_layout(before, after)) if grows else Constant()

    def follow(self, small: Operation, large: Operation, varied: bool) -> None:
        """Find whether results are the same for all samples, or may depend on their number.

        Args:
            small: The operation with two samples.
            large: The operation with three samples.
            varied: Whether its arguments or the memory of its tensors may differ.
        """
        arguments = self.facts.of(large.input_serials)
        if not varied and large.name in _COPYING and isinstance(arguments[0], Range):
            self.facts.set(large.output_serials, arguments[0])
        elif varied or any(map(varies, arguments)):
            self._note_varying(large)
        else:
            self._follow_shapes(small, large)

    def _note_varying(self, operation: Operation) -> None:
        """Note results that may depend on the number of samples."""
        self.facts.set(operation.output_serials, Varying())
        self.facts.note_written(operation)

    def _follow_shapes(self, small: Operation, large: Operation) -> None:
        """Follow constants, of which the shapes of arguments and results show whether they grow with the samples."""
        grown = []
        arguments = zip(large.input_serials, large.memory, small.inputs, large.inputs, strict=True)
        for serial, key, before, after in arguments:
            if before != after:
                self.facts.memories[key].grows = True
                grown.append(self.facts.tensors.get(serial))
        shapes_stay = small.outputs == large.outputs
        if large.name == "arange" and not shapes_stay:
            self._count(small, large)
        elif not grown and shapes_stay:
            self._keep_shape(large)
        elif grown and not shapes_stay and self._keeps_range(large):
            self.facts.set(large.output_serials, Range(True, False))
        elif shapes_stay:
            self._choose(large, grown)
        else:
            self._repeat(small, large, bool(grown))

    def _keep_shape(self, operation: Operation) -> None:
        changes_some = any(memory.grows for memory in self.facts.memory(operation.written))
        if changes_some:  # the entries of some samples
            self._note_varying(operation)
        else:
            self.facts.set(operation.output_serials, Constant())

    def _count(self, small: Operation, large: Operation) -> None:
        """Note a range, which may count the samples."""
        start = large.arguments.get("start", 0), large.arguments.get("step", 1)
        if start != (0, 1) or large.input_serials:
            self._note_varying(large)
        else:
            self.facts.set(large.output_serials, Range((small.outputs, large.outputs) == (((2,),), ((3,),)), True))

    def _keeps_range(self, operation: Operation) -> bool:
        arguments = self.facts.of(operation.input_serials)
        return operation.name in _CHOOSING and all(isinstance(fact, Range) for fact in arguments)

    def _choose(self, operation: Operation, grown: Sequence[TensorFact | None]) -> None:
        """Note some entries of a constant that is repeated for each sample."""
        layouts = list(map(layout_in, grown))
        stays = all(layout is not None and layout.outer == 1 for layout in layouts)
        if operation.name in _CHOOSING and (stays or all(equal_arguments(self.facts, operation))):
            self.facts.set(operation.output_serials, Constant())
        else:  # a sum of them would depend on their number
            self._note_varying(operation)

    def _repeat(self, small: Operation, large: Operation, grown: bool) -> None:
        """Find where a constant is repeated for each sample."""
        if self._stays_equal(large):
            for serial in large.output_serials:
                self.facts.tensors[serial] = Equal(layout_in(self.facts.tensors.get(serial)))
        try:
            layouts = result_layouts(self.facts, small, large) if grown else [_repeated(small, large)]
        except (UnprovenError, IndexError, TypeError):
            results = self.facts.of(large.output_serials)
            if large.written or not all(isinstance(fact, Equal) for fact in results):
                self._note_varying(large)
            return
        if not grown and large.name == "expand":
            for memory in self.facts.memory(large.memory):
                memory.shared = True
        for serial, layout in fitting_results(self.facts, layouts, small, large):
            is_equal = isinstance(self.facts.tensors.get(serial), Equal)
            self.facts.tensors[serial] = Equal(layout) if is_equal else Repeated(layout)
        self.facts.note_changed(large)

    def _stays_equal(self, operation: Operation) -> bool:
        if operation.name not in _MOVING and not operation.pointwise:
            return False
        equal = equal_arguments(self.facts, operation)
        return any(equal) and all(same or shape == () for same, shape in zip(equal, operation.inputs, strict=True))


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

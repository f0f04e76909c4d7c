"""Where the samples are in the results of an operation, from what is known of its arguments."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lightning_gradmetrics.engine.planning.proof_facts import (
    Constant,
    Equal,
    Facts,
    Range,
    Samples,
    Varying,
    layout_in,
    varies,
)
from lightning_gradmetrics.engine.tracing.dependence import Operation
from lightning_gradmetrics.engine.tracing.layout_rules import LAYOUT_RULES, aligned
from lightning_gradmetrics.engine.tracing.layouts import Layout, Step, UnprovenError

__all__ = ["equal_arguments", "fitting_results", "result_layouts"]


def fitting_results(
    facts: Facts, layouts: Sequence[Layout], small: Operation, large: Operation
) -> Iterator[tuple[int, Layout]]:
    """Yield the results whose shapes grow as in their layouts; the others vary, such as the state of a generator."""
    shapes = zip(small.outputs, large.outputs, strict=True)
    for serial, layout, (before, after) in zip(large.output_serials, layouts, shapes, strict=True):
        if layout.fits(before, after):
            yield serial, layout
        elif not isinstance(facts.tensors.get(serial), Equal):
            facts.tensors[serial] = Varying()


def result_layouts(facts: Facts, small: Operation, large: Operation) -> Sequence[Layout]:
    """Return where the samples are in each result, from where they are in the arguments."""
    known = []
    equal = equal_arguments(facts, large)
    arguments = facts.of(large.input_serials)
    several = any(layout_in(fact) is not None and not same for fact, same in zip(arguments, equal, strict=True))
    for number, (fact, key) in enumerate(zip(arguments, large.memory, strict=True)):
        memory, layout = facts.memories[key], layout_in(fact)
        if several and equal[number] and key not in large.written:
            layout = None  # it has every layout
        grown = small.inputs[number] != large.inputs[number]
        counts_up = large.name == "index" and number == 1 and isinstance(fact, Range)
        if layout is None and grown and not (isinstance(fact, Constant | Equal) or counts_up):
            raise UnprovenError
        is_placed = isinstance(fact, Samples) or (memory.in_place and layout_in(fact) is not None)
        is_overwritten = memory.written and not is_placed
        if varies(fact) or is_overwritten:
            raise UnprovenError
        known.append(layout)
    step = Step(large, known, small)
    name = large.name.rstrip("_") if large.name not in LAYOUT_RULES else large.name
    if name not in LAYOUT_RULES and not large.pointwise:
        raise UnprovenError
    layouts = LAYOUT_RULES.get(name, aligned)(step)
    return [layouts] * len(large.outputs) if isinstance(layouts, Layout) else layouts


def equal_arguments(facts: Facts, operation: Operation) -> list[bool]:
    """Return of each tensor argument whether it grows and all its entries are equal."""
    pairs = zip(facts.of(operation.input_serials), facts.memory(operation.memory), strict=True)
    return [isinstance(fact, Equal) and not memory.changed for fact, memory in pairs]

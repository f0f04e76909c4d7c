"""Plans each call that involves a chosen parameter, from traces with two and with three samples."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from typing import Any

from torch import Tensor

from lightning_gradmetrics.classifier.tensor_records import version_of
from lightning_gradmetrics.engine.passes.plan import BROADCAST, Plan, PlanError, Source, Step
from lightning_gradmetrics.engine.planning.step_layouts import Changes, with_layouts
from lightning_gradmetrics.engine.rules import RULES, Call, bind
from lightning_gradmetrics.engine.tracing.axes import Axis, axis_between
from lightning_gradmetrics.engine.tracing.calls import tensors_in
from lightning_gradmetrics.engine.tracing.graph import reached_parameters
from lightning_gradmetrics.engine.tracing.sorts import GROUPED_PRODUCTS
from lightning_gradmetrics.engine.tracing.trace import CallTrace, TensorState, TracedCall

__all__ = ["make_plan"]


def make_plan(
    two: CallTrace,
    three: CallTrace,
    loss: Callable[[], Tensor | None],
    changes: Changes = (),
    unused: Collection[int] = frozenset(),
    sorts: Mapping[int, int] | None = None,
) -> Plan:
    """Return the plan for a model, from its calls with two and with three samples.

    Args:
        two: The trace with two samples.
        three: The trace with three samples, with its graph.
        loss: Returns the loss of the first sample, for layouts that replacing samples does not reveal.
        changes: For each call with three samples, and each of its tensor arguments and results: which positions on the
            sample axis change with each sample, ``(3, L)``; ``None`` where it is not known.
        unused: The numbers of calls whose results do not reach the loss.
        sorts: For each product of sorted rows and each look-up by them, the number of the sort whose order they have.

    Raises:
        PlanError: If the two runs made different calls.
    """
    if _functions(two) != _functions(three):
        raise PlanError("the model makes different calls for three samples than for two")
    builder = _Builder(three.names)
    for number, (small, large) in enumerate(zip(two.calls, three.calls, strict=True)):
        if number in unused:
            builder.add_unused(number, large)
        elif sorts and number in sorts:
            builder.add_sorted(number, large, sorts[number])
        else:
            builder.add(number, small, large, changes[number] if changes else None)
    builder.give_up_assigned(three.assigned)
    builder.give_up_hidden(two, three)
    steps, undecided = with_layouts(builder.steps, builder.changes, builder.results, loss)
    groups = [sort for number, sort in (sorts or {}).items() if three.calls[number].function in GROUPED_PRODUCTS]
    return Plan(
        tuple(steps), builder.uncovered, builder.roots, undecided, calls=tuple(builder.numbers), sorts=tuple(groups)
    )


def _functions(trace: CallTrace) -> list[Any]:
    return [call.function for call in trace.calls]


_READS_TYPE = frozenset([Tensor.to, Tensor.type_as])
"""Functions that read only the type and the device of their second argument, which may have samples."""


class _Builder:
    """Builds the steps by following parameters, and tensors derived from them, through the calls."""

    def __init__(self, names: dict[int, str]) -> None:
        self.sources: dict[int, Source] = dict(names)
        self.roots: dict[Source, frozenset[str]] = {name: frozenset([name]) for name in names.values()}
        self.steps: list[Step] = []
        self.numbers: list[int] = []
        self.results: list[Any] = []
        self.changes: list[Sequence[Tensor | None] | None] = []
        self.uncovered: dict[str, str] = {}

    def add(self, number: int, small: TracedCall, large: TracedCall, changes: Sequence[Tensor | None] | None) -> None:
        """Add the step for the call with a number, if it involves parameters."""
        sources = _sources_of(large.inputs, self.sources)
        if not sources:
            return
        try:
            step = self._step(small, large, sources)
        except ValueError as error:
            step = Step(large.function, sources, "uncovered")
            self._give_up(sources, f"{_name(large.function)}: {error}")
        self._note(number, step, large, changes)

    def add_unused(self, number: int, large: TracedCall) -> None:
        """Add the step for a call whose result does not reach the loss, if it involves parameters."""
        sources = _sources_of(large.inputs, self.sources)
        if sources:
            self._note(number, Step(large.function, sources, "plain"), large, None)

    def add_sorted(self, number: int, large: TracedCall, sort: int) -> None:
        """Add the step for a product of sorted rows with one matrix for each group, or for a look-up by a number of each row.

        Raises:
            PlanError: If other arguments than the matrices or the table are parameters.
        """
        is_grouped = large.function in GROUPED_PRODUCTS
        sources = _sources_of(large.inputs, self.sources)
        if _sources_of(large.inputs[is_grouped : is_grouped + 1], self.sources) != sources:
            raise PlanError("no step covers sorted rows with these parameters")
        if sources:
            kind = "grouped" if is_grouped else "looked_up"
            self._note(number, Step(large.function, sources, kind, sort=sort), large, None)

    def _note(self, number: int, step: Step, large: TracedCall, changes: Sequence[Tensor | None] | None) -> None:
        self.steps.append(step)
        self.numbers.append(number)
        self.results.append(large.result)
        self.changes.append(changes)

    def give_up_assigned(self, assigned: Sequence[TensorState]) -> None:
        """Leave parameters to other engines that are assigned to a part of a tensor, as in ``x[:, 0] = p``."""
        self._give_up(_sources_of(assigned, self.sources), "it is assigned to a part of a tensor")

    def give_up_hidden(self, two: CallTrace, three: CallTrace) -> None:
        """Leave parameters to other engines whose way into a tensor is not seen, such as a view that is changed in place."""
        for tensor, state in _made_without_samples(two, three):
            known = self.roots.get(self.sources.get(state.serial, ""), frozenset())
            reached = frozenset(reached_parameters(tensor, three.parameters))
            if not reached <= known or version_of(tensor) != state.version:
                reason = "a tensor that is made from it is changed in place"
                self.uncovered.update(dict.fromkeys(sorted(reached | known), reason))

    def _give_up(self, sources: Sequence[Source], reason: str) -> None:
        for source in sources:
            for name in self.roots[source]:
                self.uncovered.setdefault(name, reason)

    def _step(self, small: TracedCall, large: TracedCall, sources: tuple[Source, ...]) -> Step:
        if len(small.inputs) != len(large.inputs) or len(small.outputs) != len(large.outputs):
            raise ValueError("different tensors for three samples than for two")
        inputs, outputs = _axes(small.inputs, large.inputs), _axes(small.outputs, large.outputs)
        has_graph = any(output.requires_grad for output in large.outputs)
        if not large.differentiable or (not any(inputs) and not has_graph):
            return Step(large.function, sources, "plain")
        if not any(outputs) and (not any(inputs) or large.function in _READS_TYPE):
            return self._derive(large, sources)
        if len(outputs) != 1 or outputs[0] is None:
            raise ValueError("it mixes parameters and samples in a way that no rule covers")
        step = Step(large.function, sources, "rule", inputs, outputs[0], root=_is_root(large, inputs))
        if _rule_covers(large, step, self.sources.keys()):
            return step
        return replace(step, kind="broadcast" if _name(large.function) in BROADCAST else "vmap")

    def _derive(self, large: TracedCall, sources: tuple[Source, ...]) -> Step:
        new = []
        roots: frozenset[str] = frozenset().union(*map(self.roots.__getitem__, sources))
        for index, traced in enumerate(large.outputs):
            if traced.requires_grad and traced.serial not in self.sources:
                source = (len(self.steps), index)
                self.sources[traced.serial] = source
                new.append(index)
                self.roots[source] = roots
        return Step(large.function, sources, "derive", derived=tuple(new))


def _made_without_samples(two: CallTrace, three: CallTrace) -> Iterator[tuple[Tensor, TensorState]]:
    """Yield the tensors with a graph that are made without samples and meet samples in a call, and their states then."""
    varying: set[int] = set()
    for small, large in zip(two.calls, three.calls, strict=True):
        tensors = tensors_in((large.args, large.kwargs))
        constant: list[tuple[Tensor, TensorState]] = []
        for before, after, tensor in zip(small.inputs, large.inputs, tensors, strict=False):
            if before.shape == after.shape and after.serial not in varying:
                constant.append((tensor, after))
        shapes_stay = [state.shape for state in small.outputs] == [state.shape for state in large.outputs]
        if shapes_stay and (len(constant) == len(large.inputs) or large.function in _READS_TYPE):
            continue
        varying.update(state.serial for state in large.outputs)
        for tensor, state in constant:
            if state.requires_grad and state.serial not in three.names:
                yield tensor, state


def _sources_of(tensors: Sequence[TensorState], known: Mapping[int, Source]) -> tuple[Source, ...]:
    """Return the sources among tensors, repeats included."""
    return tuple(known[traced.serial] for traced in tensors if traced.serial in known)


def _axes(small: Sequence[TensorState], large: Sequence[TensorState]) -> tuple[Axis | None, ...]:
    """Return the sample axis of each tensor, from its shapes with two and with three samples."""
    axes = []
    for two, three in zip(small, large, strict=True):
        axes.append(axis_between(two.shape, three.shape))
    return tuple(axes)


def _is_root(call: TracedCall, axes: Sequence[Axis | None]) -> bool:
    """Return whether no input with samples requires a gradient."""
    return not any(axis and traced.requires_grad for traced, axis in zip(call.inputs, axes, strict=True))


def _name(function: Any) -> str:
    return getattr(function, "__name__", str(function))


def _rule_covers(record: TracedCall, step: Step, tracked: Set[int]) -> bool:
    """Return whether a rule handles the call: each tracked argument is one of its weights, and it accepts the axes."""
    rule = RULES.get(record.function)
    values = bind(rule, record.args, record.kwargs) if rule else None
    if rule is None or values is None or not isinstance(values.get("input"), Tensor):
        return False
    arguments = list(map(id, tensors_in((record.args, record.kwargs))))
    serials = dict(zip(arguments, record.inputs, strict=True))
    axes = dict(zip(arguments, step.inputs, strict=True))
    slots, others_have_samples = set(), False
    for name, value in values.items():
        if isinstance(value, Tensor):
            if serials[id(value)].serial in tracked:
                slots.add(name)
            others_have_samples |= name != "input" and axes[id(value)] is not None
    axis = axes[id(values["input"])]
    if axis is None or others_have_samples or not slots <= rule.weights or step.output is None:
        return False
    return rule.accepts(Call(values, axis, step.output, frozenset(slots)))

"""Plans each call that involves a chosen parameter, from traces with two and with three samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradmetrics.engine.rules import RULES, Call, bind
from lightning_gradmetrics.engine.tracing.axes import Axis, axis_between
from lightning_gradmetrics.engine.tracing.calls import tensors_in
from lightning_gradmetrics.engine.tracing.host_reads import PlannedRead
from lightning_gradmetrics.engine.tracing.trace import CallTrace, TensorState, TracedCall

__all__ = ["BROADCAST", "Changes", "Fold", "Plan", "PlanError", "Source", "Step", "layout", "make_plan"]

Source = str | tuple[int, int]
"""A parameter by name, or an output of an earlier step that depends on parameters and not on the samples."""


Changes = Sequence[Sequence[Tensor | None]]
"""For each call and each of its tensors, the positions on the sample axis that change with each sample."""


class PlanError(Exception):
    """The model did not follow the plan, or a step failed.

    Args:
        message: The reason.
        step: The number of the failed step, or ``None``.
        names: The parameters concerned, if the failed step has no number.

    Attributes:
        sample: The number of the sample for which the results are wrong, if it is known.
    """

    sample: int | None = None

    def __init__(self, message: str, step: int | None = None, names: frozenset[str] = frozenset()) -> None:
        super().__init__(message)
        self.step, self.names = step, names


@dataclass(frozen=True)
class Step:
    """The plan for one call whose arguments include parameters or tensors derived from them.

    Args:
        function: The function called.
        sources: The parameters and derived tensors among its arguments, in order.
        kind: ``"derive"``: no argument depends on the samples, run it with a graph; ``"rule"``: a rule covers it;
            ``"broadcast"``: give each sample a copy, aligned to the output; ``"vmap"``: give each sample its own
            copy and map over the samples; ``"plain"``: run it, nothing differentiable is returned; ``"uncovered"``: run
            it, these parameters need another engine.
        inputs: The sample axis of each tensor argument.
        output: The sample axis of the output.
        derived: Which outputs are derived tensors.
        root: Whether its inputs with samples do not depend on a chosen parameter.
    """

    function: Any
    sources: tuple[Source, ...]
    kind: str
    inputs: tuple[Axis | None, ...] = ()
    output: Axis | None = None
    derived: tuple[int, ...] = ()
    root: bool = False


@dataclass(frozen=True)
class Fold:
    """A batch norm whose input is the output of a convolution that nothing else uses.

    Args:
        norm: The number of the norm's step in the plan.
        weight: The name of the norm's weight.
        bias: The name of its bias.
        mean: The name of the buffer with the running mean.
        variance: The name of the buffer with the running variance.
        eps: Added to the variance.
    """

    norm: int
    weight: str
    bias: str
    mean: str
    variance: str
    eps: float


@dataclass(frozen=True)
class Plan:
    """The steps in the order of the calls.

    Args:
        steps: The steps.
        uncovered: Parameters that no step can handle, and why.
        roots: The parameters behind each source.
        reads: What Python reads from tensors, in order; ``None`` if that is not compared.
        undecided: Whether the layout of an axis with several positions per sample is unknown.
        calls: For each step, the number of its call in the trace with three samples.
        folds: The batch norms that can be folded into convolutions, by the numbers of the convolutions' steps.
        selects: Whether the model reads several entries of one tensor along its first axis.
        lays_out: Whether images can be laid out channels last from the first convolution on, although there are group norms.
    """

    steps: tuple[Step, ...]
    uncovered: Mapping[str, str] = field(default_factory=dict)
    roots: Mapping[Source, frozenset[str]] = field(default_factory=dict)
    undecided: bool = False
    reads: tuple[PlannedRead, ...] | None = None
    calls: tuple[int, ...] = ()
    folds: Mapping[int, Fold] = field(default_factory=dict)
    selects: bool = False
    lays_out: bool = False

    @property
    def changes_layers(self) -> bool:
        """Whether layers of a large batch run in another way than in the model."""
        return bool(self.folds) or self.lays_out

    @cached_property
    def _names(self) -> frozenset[str]:
        """The names of the parameters that it was made for."""
        alone = [root for root in self.roots.values() if len(root) == 1]
        return frozenset().union(*alone)

    def known_parameters(self, model: nn.Module, chosen: Mapping[str, nn.Parameter]) -> Mapping[str, nn.Parameter]:
        """Return the parameters of a model that the plan was made for, by name, which may be the chosen ones."""
        if self._names == chosen.keys():
            return chosen
        known = {}
        for name, parameter in model.named_parameters():
            if name in self._names:
                known[name] = parameter
        return known

    def without(self, number: int, reason: str) -> Plan:
        """Return the plan without one step, whose parameters are left to other engines."""
        step = self.steps[number]
        names: frozenset[str] = frozenset().union(*map(self.roots.__getitem__, step.sources))
        steps = (*self.steps[:number], replace(step, kind="uncovered"), *self.steps[number + 1 :])
        return replace(
            self, steps=steps, uncovered={**dict.fromkeys(names, reason), **self.uncovered}, folds={}, lays_out=False
        )


_ARITHMETIC = ("add", "sub", "subtract", "mul", "multiply", "div", "divide", "true_divide", "pow")
_WITH_IN_PLACE_FORM = (*_ARITHMETIC, "lerp", "addcmul", "addcdiv")
_OPERATORS = ("add", "sub", "mul", "truediv", "pow")
_OTHERS = ("rsub", "where", "maximum", "minimum", "fmax", "fmin")
_SHAPES = ("expand", "expand_as", "broadcast_to", "repeat", "tile")


def _broadcasting() -> frozenset[str]:
    names = {*_OTHERS, *_SHAPES}
    for name in _WITH_IN_PLACE_FORM:
        names |= {name, f"{name}_"}
    for name in _OPERATORS:
        names |= {f"__{name}__", f"__r{name}__", f"__i{name}__"}
    return frozenset(names)


BROADCAST = _broadcasting()
"""Functions that only broadcast their tensor arguments."""


def make_plan(two: CallTrace, three: CallTrace, loss: Callable[[], Tensor | None], changes: Changes = ()) -> Plan:
    """Return the plan for a model, from its calls with two and with three samples.

    Args:
        two: The trace with two samples.
        three: The trace with three samples, with its graph.
        loss: Returns the loss of the first sample, for layouts that replacing samples does not reveal.
        changes: For each call with three samples, and each of its tensor arguments and results: which positions on the
            sample axis change with each sample, ``(3, L)``; ``None`` where it is not known.

    Raises:
        PlanError: If the two runs made different calls.
    """
    if _functions(two) != _functions(three):
        raise PlanError("the model makes different calls for three samples than for two")
    builder = _Builder(three.names)
    for number, (small, large) in enumerate(zip(two.calls, three.calls, strict=True)):
        builder.add(number, small, large, changes[number] if changes else None)
    steps, undecided = _with_layouts(builder, loss)
    return Plan(tuple(steps), builder.uncovered, builder.roots, undecided, calls=tuple(builder.numbers))


def _functions(trace: CallTrace) -> list[Any]:
    return [call.function for call in trace.calls]


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
        sources = self._sources_of(large)
        if not sources:
            return
        try:
            step = self._step(small, large, sources)
        except ValueError as error:
            step = Step(large.function, sources, "uncovered")
            self._give_up(sources, f"{_name(large.function)}: {error}")
        self.steps.append(step)
        self.numbers.append(number)
        self.results.append(large.result)
        self.changes.append(changes)

    def _sources_of(self, call: TracedCall) -> tuple[Source, ...]:
        """Return the sources of a call's inputs, repeats included."""
        sources = []
        for traced in call.inputs:
            if traced.serial in self.sources:
                sources.append(self.sources[traced.serial])
        return tuple(sources)

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
        if not any(inputs) and not any(outputs):
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


def _with_layouts(builder: _Builder, loss: Callable[[], Tensor | None]) -> tuple[list[Step], bool]:
    """Return the steps with ``minor`` set where the sample index varies fastest, and whether a layout is undecided."""
    steps, open_steps, undecided = list(builder.steps), [], False
    for number, step in enumerate(steps):
        changes = builder.changes[number]
        if step.output is None:
            continue
        minors = []
        axes = (*step.inputs, step.output)
        for axis, changed in zip(axes, changes or (None,) * len(axes), strict=True):
            minors.append(None if axis is None or changed is None else layout(changed, axis.times))
        known = [minor for minor in minors if minor is not None]
        if not known and any(axis is not None and axis.times > 1 for axis in axes):
            open_steps.append(number)
        elif known:
            steps[number] = _laid_out(step, minors, known[-1])
    results = list(map(builder.results.__getitem__, open_steps))
    for number, minor in zip(open_steps, _minors_by_gradient(steps, open_steps, results, loss), strict=True):
        undecided = undecided or minor is None
        if minor:
            steps[number] = _laid_out(steps[number], (None,) * (len(steps[number].inputs) + 1), True)
    return steps, undecided


def _laid_out(step: Step, minors: Sequence[bool | None], default: bool) -> Step:
    """Return the step with the layout of each axis; unknown layouts are replaced by the default."""
    axes = []
    for axis, minor in zip((*step.inputs, step.output), minors, strict=True):
        if axis is None or axis.times == 1:
            axes.append(axis)
        else:
            axes.append(replace(axis, minor=default if minor is None else minor))
    return replace(step, inputs=tuple(axes[:-1]), output=axes[-1])


def layout(changed: Tensor, times: int) -> bool | None:
    """Return whether the sample index varies fastest on an axis, from the positions that change with each sample.

    Args:
        changed: ``(3, 3 * times)``.
        times: Positions of each sample.

    Returns:
        ``True`` for position ``t N + n``, ``False`` for ``n times + t``, ``None`` if both fit.

    Raises:
        ValueError: If neither fits.

    Example:
        >>> layout(torch.eye(3, dtype=torch.bool).repeat(1, 2), 2)
        True
    """
    positions = torch.arange(changed.shape[1], device=changed.device)
    samples = torch.arange(3, device=changed.device)[:, None]
    major = not bool((changed & (positions // times != samples)).any())
    minor = not bool((changed & (positions % 3 != samples)).any())
    if not major and not minor:
        raise ValueError("the rows of the samples have no fixed order")
    return None if major and minor else minor


def _minors_by_gradient(
    steps: Sequence[Step], numbers: Sequence[int], results: Sequence[Any], loss: Callable[[], Tensor | None]
) -> list[bool | None]:
    """Return the layout of each step's output from one sample's gradient; ``None`` where that is zero."""
    minors: list[bool | None] = [None] * len(numbers)
    live = []
    for position, number in enumerate(numbers):
        output = steps[number].output
        if output is not None and output.times > 1 and results[position].requires_grad:
            live.append(position)
    total = loss() if live else None
    if total is None or not total.requires_grad:
        return minors
    outputs = [results[position] for position in live]
    gradients = torch.autograd.grad(total, outputs, retain_graph=True, allow_unused=True)
    for position, gradient in zip(live, gradients, strict=True):
        axis = steps[numbers[position]].output
        if gradient is not None and axis is not None:
            minors[position] = _minor_by_gradient(gradient, axis)
    return minors


def _minor_by_gradient(gradient: Tensor, axis: Axis) -> bool | None:
    """Return whether the gradient of the first sample's loss is zero for other samples in the layout ``t N + n`` only."""
    foreign = {}
    for minor in (False, True):
        rows = replace(axis, minor=minor).split(gradient)
        foreign[minor] = bool((rows[1:] != 0).any())
    return None if foreign[False] == foreign[True] else foreign[False]

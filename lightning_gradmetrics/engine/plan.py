"""From two recordings, with two and with three samples, to what to do at each call that involves a chosen parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lightning_gradmetrics.engine.axes import Axis, axis_between
from lightning_gradmetrics.engine.calls import tensors_in
from lightning_gradmetrics.engine.record import Record, Recorder
from lightning_gradmetrics.engine.rules import RULES, Call, bind

__all__ = ["Plan", "PlanError", "Source", "Step", "make_plan"]

Source = str | tuple[int, int]
"""A parameter by name, or an output of an earlier step that depends on parameters and not on the samples."""


class PlanError(Exception):
    """The model did not do what the plan expects, or a step failed.

    Args:
        message: What went wrong.
        step: The number of the step that failed, if it is one.
    """

    def __init__(self, message: str, step: int | None = None) -> None:
        super().__init__(message)
        self.step = step


@dataclass(frozen=True)
class Step:
    """What to do at one call with parameters, or with tensors derived from them, among its arguments.

    Args:
        function: The function called.
        sources: The parameters and derived tensors among its arguments, in order.
        kind: ``"derive"``: no argument depends on the samples, run it with a graph; ``"rule"``: a rule covers it;
            ``"broadcast"``:
            give each sample its own copy, aligned to the output; ``"vmap"``: give each sample its own copy and map
            over the
            samples; ``"plain"``: run it, nothing differentiable is returned; ``"uncovered"``: run it, these
            parameters need
            another engine.
        inputs: The sample axis of each tensor argument.
        output: The sample axis of the output.
        derived: Which outputs are derived tensors.
        root: Whether no chosen parameter comes before it on the samples' way.
    """

    function: Any
    sources: tuple[Source, ...]
    kind: str
    inputs: tuple[Axis | None, ...] = ()
    output: Axis | None = None
    derived: tuple[int, ...] = ()
    root: bool = False


@dataclass(frozen=True)
class Plan:
    """The steps in the order of the calls.

    Args:
        steps: The steps.
        uncovered: Parameters that no step can handle, and why.
        roots: The parameters behind each source.
    """

    steps: tuple[Step, ...]
    uncovered: Mapping[str, str] = field(default_factory=dict)
    roots: Mapping[Source, frozenset[str]] = field(default_factory=dict)

    def without(self, number: int, reason: str) -> Plan:
        """The plan with one step given up, its parameters left to other engines."""
        step = self.steps[number]
        names = frozenset().union(*(self.roots[source] for source in step.sources))
        steps = (*self.steps[:number], replace(step, kind="uncovered"), *self.steps[number + 1 :])
        return replace(self, steps=steps, uncovered={**dict.fromkeys(names, reason), **self.uncovered})


_PLAIN = [
    "add",
    "sub",
    "subtract",
    "mul",
    "multiply",
    "div",
    "divide",
    "true_divide",
    "pow",
    "lerp",
    "addcmul",
    "addcdiv",
]
_OPERATORS = ["add", "sub", "mul", "truediv", "pow"]
BROADCAST = frozenset(
    [name + end for name in _PLAIN for end in ("", "_")]
    + [f"__{kind}{name}__" for name in _OPERATORS for kind in ("", "r", "i")]
    + ["rsub", "where", "maximum", "minimum", "fmax", "fmin", "expand", "expand_as", "broadcast_to", "repeat", "tile"]
)
"""Functions that broadcast their tensor arguments, and nothing else."""


def make_plan(two: Recorder, three: Recorder, loss: Tensor | None) -> Plan:
    """The plan for a model, from its calls with two and with three samples.

    Args:
        two: The recording with two samples.
        three: The recording with three samples, with its graph.
        loss: The loss of the first of the three samples, to tell the layout of axes that hold several positions a
            sample.

    Raises:
        PlanError: If the two runs made different calls.
    """
    if [r.function for r in two.records] != [r.function for r in three.records]:
        raise PlanError("the model makes other calls for three samples than for two")
    builder = _Builder(three.names)
    for small, large in zip(two.records, three.records, strict=True):
        builder.add(small, large)
    return Plan(tuple(_with_layouts(builder.steps, builder.results, loss)), builder.uncovered, builder.roots)


class _Builder:
    """Follows parameters, and what is derived from them, through the calls."""

    def __init__(self, names: dict[int, str]) -> None:
        self.sources: dict[int, Source] = dict(names)
        self.roots: dict[Source, frozenset[str]] = {name: frozenset([name]) for name in names.values()}
        self.steps: list[Step] = []
        self.results: list[Any] = []
        self.uncovered: dict[str, str] = {}

    def add(self, small: Record, large: Record) -> None:
        """Add the step for one call, if it involves parameters."""
        sources = tuple(self.sources[seen.serial] for seen in large.inputs if seen.serial in self.sources)
        if not sources:
            return
        try:
            step = self._step(small, large, sources)
        except ValueError as error:
            step = Step(large.function, sources, "uncovered")
            self._give_up(sources, f"{_name(large.function)}: {error}")
        self.steps.append(step)
        self.results.append(large.result)

    def _give_up(self, sources: Sequence[Source], reason: str) -> None:
        for source in sources:
            for name in self.roots[source]:
                self.uncovered.setdefault(name, reason)

    def _step(self, small: Record, large: Record, sources: tuple[Source, ...]) -> Step:
        if len(small.inputs) != len(large.inputs) or len(small.outputs) != len(large.outputs):
            raise ValueError("other tensors for three samples than for two")
        inputs = tuple(axis_between(a.shape, b.shape) for a, b in zip(small.inputs, large.inputs, strict=True))
        outputs = [axis_between(a.shape, b.shape) for a, b in zip(small.outputs, large.outputs, strict=True)]
        if not large.differentiable or (not any(inputs) and not any(o.requires_grad for o in large.outputs)):
            return Step(large.function, sources, "plain")
        if not any(inputs) and not any(outputs):
            return self._derive(large, sources)
        if len(outputs) != 1 or outputs[0] is None:
            raise ValueError("it mixes parameters and samples in a way that no rule covers")
        root = not any(seen.requires_grad for seen, axis in zip(large.inputs, inputs, strict=True) if axis)
        step = Step(large.function, sources, "rule", inputs, outputs[0], root=root)
        if _rule_covers(large, step, {s.serial for s in large.inputs if s.serial in self.sources}):
            return step
        return replace(step, kind="broadcast" if _name(large.function) in BROADCAST else "vmap")

    def _derive(self, large: Record, sources: tuple[Source, ...]) -> Step:
        new = []
        for index, seen in enumerate(large.outputs):
            if seen.requires_grad and seen.serial not in self.sources:
                source = (len(self.steps), index)
                self.sources[seen.serial] = source
                new.append(index)
                self.roots[source] = frozenset().union(*(self.roots[s] for s in sources))
        return Step(large.function, sources, "derive", derived=tuple(new))


def _name(function: Any) -> str:
    return getattr(function, "__name__", str(function))


def _rule_covers(record: Record, step: Step, tracked: set[int]) -> bool:
    """Whether a rule handles the call: every tracked argument is one of the rule's weights, and the axes suit it."""
    found = RULES.get(record.function)
    values = bind(found, record.args, record.kwargs) if found else None
    if found is None or values is None or not isinstance(values.get("input"), Tensor):
        return False
    tensors = [(name, value) for name, value in values.items() if isinstance(value, Tensor)]
    serials = dict(zip((id(t) for t in tensors_in((record.args, record.kwargs))), record.inputs, strict=True))
    axes = dict(zip((id(t) for t in tensors_in((record.args, record.kwargs))), step.inputs, strict=True))
    slots = frozenset(name for name, value in tensors if serials[id(value)].serial in tracked)
    axis = axes[id(values["input"])]
    others = any(axes[id(value)] is not None for name, value in tensors if name != "input")
    if axis is None or others or not slots <= found.weights or step.output is None:
        return False
    return found.accepts(Call(values, axis, step.output, slots))


def _with_layouts(steps: Sequence[Step], results: Sequence[Any], loss: Tensor | None) -> list[Step]:
    """The steps with ``minor`` set on axes where one sample's gradient is spread out."""
    open_steps = [
        i for i, s in enumerate(steps) if s.output is not None and s.output.times > 1 and results[i].requires_grad
    ]
    out = list(steps)
    if not open_steps or loss is None or not loss.requires_grad:
        return out
    gradients = torch.autograd.grad(loss, [results[i] for i in open_steps], retain_graph=True, allow_unused=True)
    for i, gradient in zip(open_steps, gradients, strict=True):
        axis = steps[i].output
        if gradient is not None and axis is not None and _is_minor(gradient, axis):
            inputs = tuple(a and (replace(a, minor=True) if a.times == axis.times else a) for a in steps[i].inputs)
            out[i] = replace(steps[i], output=replace(axis, minor=True), inputs=inputs)
    return out


def _is_minor(gradient: Tensor, axis: Axis) -> bool:
    """Whether the gradient of the first sample's loss vanishes for the others only in the layout ``t N + n``."""
    major, minor = (bool((replace(axis, minor=m).split(gradient)[1:] != 0).any()) for m in (False, True))
    return major and not minor

"""Plans the calls of a watched module by trial runs on a few samples, without side effects."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradmetrics.classifier.forward import gradients_enabled
from lightning_gradmetrics.classifier.preservation import preserved
from lightning_gradmetrics.classifier.tensor_records import first_pass_watched
from lightning_gradmetrics.compat.gradient_metrics.verification import Record
from lightning_gradmetrics.engine.passes.plan import Plan, PlanError
from lightning_gradmetrics.engine.planning.replaced_samples import changed_positions, outline
from lightning_gradmetrics.engine.planning.step_layouts import Changes
from lightning_gradmetrics.engine.planning.steps import make_plan
from lightning_gradmetrics.engine.tracing.axes import Axis, axis_between
from lightning_gradmetrics.engine.tracing.calls import map_arguments, tensors_in
from lightning_gradmetrics.engine.tracing.dependence import DependenceTrace, choice_by_data
from lightning_gradmetrics.engine.tracing.detaches import used_operations
from lightning_gradmetrics.engine.tracing.host_reads import PlannedRead
from lightning_gradmetrics.engine.tracing.model_state import ForwardState, attribute_key, note_volatile
from lightning_gradmetrics.engine.tracing.trace import CallTrace

__all__ = ["COMPILED", "ModulePlan", "plan_module", "samples_in"]

COUPLED = "the samples of a batch depend on each other in the watched module"
COMPILED = "the calls inside a compiled module or function are hidden"
SCRIPTED = "the calls inside a scripted module are hidden"
ROUNDING = 64
"""Differences up to this multiple of the machine precision count as rounding."""


@dataclass
class ModulePlan:
    """The plan of a module's calls, for one structure of arguments.

    Args:
        plan: The plan of each call of a torch function; ``None`` if there is no fast method.
        outputs: The sample axis of each tensor in the module's output.
        reason: The reason if there is no fast method.
        records: For each set of forward passes that occur together, the parameters whose gradients agreed with
            autograd.
        autocast: Whether the calls run under autocast.
    """

    plan: Plan | None
    outputs: tuple[Axis | None, ...] = ()
    reason: str = ""
    records: dict[Any, Record] = field(default_factory=dict)
    autocast: bool = False


def samples_in(arguments: Any) -> int | None:
    """Return the length of the first axis of the first tensor in a module's arguments; ``None`` without one."""
    first = next(tensors_in(arguments), None)
    return None if first is None or first.ndim == 0 else len(first)


def plan_module(module: nn.Module, args: Any, kwargs: Any, parameters: Mapping[str, Tensor]) -> ModulePlan:
    """Plan calls of a module with such arguments.

    Two runs, on two and on three samples, reveal the sample axes. Three more, each with one sample replaced, reveal
    which positions of the output belong to which sample, and whether samples depend on each other.

    Args:
        module: The module.
        args: Its positional arguments, with the samples along the first axis of each tensor.
        kwargs: Its keyword arguments.
        parameters: The chosen parameters of the module, by name.
    """
    for submodule in module.modules():
        if isinstance(submodule, torch.jit.ScriptModule):
            return ModulePlan(None, reason=SCRIPTED)
        if type(submodule).__name__ == "OptimizedModule":
            return ModulePlan(None, reason=COMPILED)
    before = attribute_key(module)
    with preserved(module), gradients_enabled():
        for parameter in module.parameters():
            parameter.requires_grad_(False)
        for chosen in parameters.values():
            chosen.requires_grad_(True)
        runs = _Runs(module, args, kwargs, parameters)
        try:
            return _planned(runs)
        except (PlanError, ValueError) as error:
            return ModulePlan(None, reason=str(error))
        finally:
            note_volatile(module, before, attribute_key(module))
            runs.restore()


class _Runs:
    """Runs a module on synthetic batches, each from the same state of the module and the random generators."""

    def __init__(self, module: nn.Module, args: Any, kwargs: Any, parameters: Mapping[str, Tensor]) -> None:
        self._module, self._arguments, self._parameters = module, (args, kwargs), parameters
        self._size = samples_in(self._arguments) or 0
        self._state = ForwardState(module)

    def traced(self, count: int, guide: CallTrace | None = None) -> _Run:
        """Run on the first samples, repeated if there are too few."""
        arguments, samples = self._batch(count)
        trace = CallTrace(self._parameters, guide.calls if guide else None)
        dependence = DependenceTrace(samples, self._module.parameters())
        self.restore()
        with dependence, trace:
            output = self._run(arguments)
        return _Run(trace, list(tensors_in(output)), dependence)

    def replaced(self, number: int, guide: CallTrace) -> _Run:
        """Run on three samples with one of them replaced."""
        arguments, _ = self._batch(3, number)
        trace = CallTrace(self._parameters, guide.calls, keep=False)
        self.restore()
        with trace:
            output = self._run(arguments)
        return _Run(trace, list(map(Tensor.detach, tensors_in(output))))

    def restore(self) -> None:
        """Restore the module."""
        self._state.restore()

    def _run(self, arguments: Any) -> Any:
        with first_pass_watched(self._module):
            return self._module.forward(*arguments[0], **arguments[1])

    def _batch(self, count: int, other: int | None = None) -> tuple[Any, list[Tensor]]:
        """Return arguments with ``count`` samples, number ``other`` replaced, and the samples."""
        rows = (list(range(self._size)) * count)[:count]
        samples = []

        def take(tensor: Tensor) -> Tensor:
            if not tensor.ndim or len(tensor) != self._size:
                return tensor.detach().clone()
            picked = tensor.detach()[rows].clone()
            if other is not None:
                picked[other] = _another(picked[other])
            samples.append(picked)
            return picked

        return map_arguments(take, self._arguments), samples


@dataclass
class _Run:
    """The calls of a run, the tensors in its output, and the operations."""

    trace: CallTrace
    outputs: list[Tensor]
    dependence: DependenceTrace | None = None


def _another(sample: Tensor) -> Tensor:
    """Return a changed sample: floating-point numbers rescaled by up to a tenth, integers in reverse order."""
    if sample.is_floating_point() or sample.is_complex():
        factors = torch.linspace(0.9, 1.1, max(1, sample.numel()), device=sample.device)
        return sample * factors.reshape(sample.shape).to(sample.dtype)
    return sample.flip(-1) if sample.ndim else sample


def _planned(runs: _Runs) -> ModulePlan:
    """Return the plan.

    Raises:
        PlanError: If there is no fast method.
    """
    small = runs.traced(2)
    large = runs.traced(3, small.trace)
    assert small.dependence is not None and large.dependence is not None
    if len(small.outputs) != len(large.outputs):
        raise PlanError("the output contains different tensors for three samples and for two")
    changed = [runs.replaced(number, small.trace) for number in range(3)]
    axes, outputs = [], []
    for index, (before, after) in enumerate(zip(small.outputs, large.outputs, strict=True)):
        axis = axis_between(before.shape, after.shape)
        axes.append(axis)
        others = [run.outputs[index] for run in changed]
        outputs.append(None if axis is None else _layout(after.detach(), others, axis))
    operations = used_operations(small.dependence, small.outputs), used_operations(large.dependence, large.outputs)
    reason = choice_by_data(*operations)
    if reason:
        raise PlanError(reason)
    plan = make_plan(small.trace, large.trace, partial(_first_sample, large.outputs, axes), _changes(large, changed))
    if plan.uncovered:
        raise PlanError(f"no fast rule for {', '.join(plan.uncovered)}")
    if plan.undecided:
        raise PlanError("no trial run shows the order of the samples inside the watched module")
    reads = tuple(PlannedRead(read.value) for read in large.trace.reads)
    return ModulePlan(replace(plan, reads=reads), tuple(outputs))


def _changes(base: _Run, others: Sequence[_Run]) -> Changes:
    """Return the positions that change with each sample, for each call.

    Raises:
        PlanError: If a different sample leads to different calls.
    """
    expected = outline(base.trace)
    traces = []
    for changed_run in others:
        if outline(changed_run.trace) != expected:
            raise PlanError("the watched module makes different calls for different samples")
        traces.append(changed_run.trace)
    return changed_positions(base.trace, traces)


def _first_sample(outputs: Sequence[Tensor], axes: Sequence[Axis | None]) -> Tensor | None:
    """Return a number that depends on the first sample only."""
    for tensor, axis in zip(outputs, axes, strict=True):
        if axis is not None and tensor.requires_grad:
            return axis.split(tensor * torch.rand_like(tensor))[0].sum()
    return None


def _layout(output: Tensor, changed: Sequence[Tensor], axis: Axis) -> Axis:
    """Return the axis with the order of its positions, in which each sample changes only its own positions.

    Raises:
        PlanError: If a sample changes another sample's positions, or the order cannot be determined.
    """
    fitting = []
    for choice in _choices(axis):
        if _separates(output, changed, choice):
            fitting.append(choice)
    if not fitting:
        raise PlanError(COUPLED)
    if len(fitting) > 1:
        raise PlanError("no sample changes the output of the watched module")
    return fitting[0]


def _choices(axis: Axis) -> Iterator[Axis]:
    yield replace(axis, minor=False)
    if axis.times > 1:
        yield replace(axis, minor=True)


def _separates(output: Tensor, changed: Sequence[Tensor], axis: Axis) -> bool:
    """Return whether each sample changes only the positions that the axis assigns to it."""
    level = output.nan_to_num(0, 0, 0).abs().amax() if output.numel() else 0
    precision = torch.finfo(output.dtype).eps if output.is_floating_point() else 0
    for number, changed_output in enumerate(changed):
        difference = (changed_output - output).abs() > ROUNDING * precision * level
        moved = axis.split(difference | (changed_output.isnan() != output.isnan())).flatten(1).any(1)
        moved[number] = False
        if bool(moved.any()):
            return False
    return True

"""A look at a model before the first batch: runs on two and on three samples, and with each sample replaced in turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_gradmetrics.classifier.forward import map_tensors, tensors_in
from lightning_gradmetrics.engine.dependence import DependenceTrace, choice_by_data, reads_activations
from lightning_gradmetrics.engine.model_state import ForwardState, attribute_key, note_volatile, quiet_no_grad
from lightning_gradmetrics.engine.plan import Changes, Plan, PlanError, make_plan
from lightning_gradmetrics.engine.refusals import coupled_model
from lightning_gradmetrics.engine.samples import close_rows
from lightning_gradmetrics.engine.separability import keeps_samples_apart
from lightning_gradmetrics.engine.task import Task
from lightning_gradmetrics.engine.trace import CallTrace, TracedCall

__all__ = ["Probe", "call_outline", "changed_positions", "probe_model"]


@dataclass(frozen=True)
class Probe:
    """What the probe found.

    Args:
        task: Three samples of the batch.
        losses: For each objective the scaled losses ``(3,)`` with their graph, and the factors that undo the scale.
        plan: What to do at each call; ``None`` if the calls or the order of rows depend on the data.
        reason: Why there is no plan.
        reads_activations: Whether Python reads values that depend on samples and parameters.
        separable: Whether every operation is known to keep the samples apart.
        random: Whether it draws random numbers.
        pauses_gradients: Whether a part of it runs without gradients, as reentrant activation checkpoints do.
        bytes: About the memory that one sample's activations take.
    """

    task: Task
    losses: Sequence[tuple[Tensor, Tensor]]
    plan: Plan | None
    reason: str
    reads_activations: bool
    separable: bool
    random: bool
    pauses_gradients: bool
    bytes: int


def probe_model(task: Task) -> Probe:
    """The probe of a model on some samples of a batch.

    Raises:
        CoupledSamplesError: If the samples depend on each other.
    """
    state, before = ForwardState(task.model), attribute_key(task.model)
    three = _three_samples(task)
    small, _, few = _traced(three.picked([0, 1]), state, None)
    large, logits, many = _traced(three, state, small.calls)
    note_volatile(task.model, before, attribute_key(task.model))
    state.restore()
    reason = choice_by_data(few.operations, many.operations)
    traces = _replaced_traces(three, small, large, logits, state, bool(reason))
    same = [trace for trace in traces if trace is not None]
    changes: Changes = changed_positions(large, same) if len(same) == 3 else ()
    reason = reason or ("" if changes else "it makes other calls for other samples")
    if not reason:
        _check_coupling(three, small, large, changes, state)
    apart = not reason and keeps_samples_apart(few.operations, many.operations, many.samples, many.serial(logits))
    plan = None
    losses = [three.unit_losses(index, logits) for index in range(len(three.losses))]
    if not reason:
        try:
            plan = make_plan(small, large, losses[0][0][0], changes)
        except (PlanError, ValueError) as error:
            reason = str(error)
    if plan is not None and plan.undecided:
        plan, reason = None, "no probe shows the order of rows on an axis with several positions per sample"
    reads = tuple(read.value for read in large.reads)
    activations = reads_activations(many.operations)
    if plan is not None:
        plan = replace(plan, reads=reads)
    return Probe(
        three, losses, plan, reason, activations, apart, many.random, large.pauses_gradients, large.bytes() // 3 + 1
    )


def _traced(
    task: Task, state: ForwardState, guide: Sequence[TracedCall] | None
) -> tuple[CallTrace, Tensor, DependenceTrace]:
    """A traced forward pass with its graph, its logits, and the operations in it."""
    _require_gradients(task)
    state.restore()
    samples = [t for t, flag in zip(tensors_in(task.inputs), task.per_sample, strict=True) if flag]
    dependence = DependenceTrace(samples, task.model.parameters())
    trace = CallTrace(task.parameters, guide, on_read=dependence.note_read)
    with dependence, trace:
        logits = task.forward()
    return trace, logits, dependence


def _require_gradients(task: Task) -> None:
    for parameter in task.model.parameters():
        parameter.requires_grad_(False)
    for parameter in task.parameters.values():
        parameter.requires_grad_(True)


# -- the samples ------------------------------------------------------------------------------------------------------


def _three_samples(task: Task) -> Task:
    """Three samples, if possible without NaN or Inf in their inputs; repeated ones are perturbed."""
    finite = torch.ones(task.size, dtype=torch.bool)
    for tensor, flag in zip(tensors_in(task.inputs), task.per_sample, strict=True):
        if flag and tensor.is_floating_point():
            finite &= tensor.isfinite().reshape(task.size, -1).all(1).cpu()
    good = finite.nonzero().flatten()[:3].tolist() or list(range(min(3, task.size)))
    three = task.picked((good * 3)[:3])
    for number in range(len(good), 3):
        three = _with_row(three, number, number, 0.1)
    return three


def _with_row(task: Task, number: int, source: int, noise: float) -> Task:
    """The task with one sample replaced by another one; its floating-point numbers are scaled at random.

    Whole numbers stay valid: they are those of the other sample, or the sample's own in another order.
    """
    generator = torch.Generator().manual_seed(number)
    flags = iter(task.per_sample)

    def replaced(tensor: Tensor) -> Tensor:
        if not next(flags):
            return tensor
        row = tensor[source].clone()
        if row.is_floating_point():
            factor = torch.randn(row.shape, generator=generator, dtype=torch.float32).mul_(noise).exp_()
            row = row * factor.to(row.device, row.dtype)
        elif source == number and row.ndim:
            row = row.roll(1 + number, -1)
        tensor = tensor.clone()
        tensor[number] = row
        return tensor

    return replace(task, inputs=map_tensors(task.inputs, replaced))


# -- replacing each sample --------------------------------------------------------------------------------------------


def _replaced_traces(
    task: Task, small: CallTrace, base: CallTrace, logits: Tensor, state: ForwardState, irregular: bool
) -> list[CallTrace | None]:
    """For each sample the trace of a run with that sample replaced; ``None`` if no such run makes the same calls.

    Raises:
        CoupledSamplesError: If the logits of a sample change with another sample.
    """
    traces = []
    for number in range(3):
        others = [other for other in range(3) if other != number]
        trace = None
        for source, noise in (((number + 1) % 3, 0.3), (number, 0.01)):
            trace, changed = _replaced(_with_row(task, number, source, noise), small, base, state)
            tight = trace is not None and not irregular
            if changed is not None and not _same_rows(changed[others], logits.detach()[others], tight):
                raise coupled_model(_culprit(task, small, base, trace, number, state))
            if trace is not None:
                break
        traces.append(trace)
    return traces


def _replaced(
    task: Task, small: CallTrace, base: CallTrace, state: ForwardState
) -> tuple[CallTrace | None, Tensor | None]:
    """The trace of a run with a sample replaced, ``None`` if its calls are not those of the base; and its logits."""
    state.restore()
    trace = CallTrace(task.parameters, small.calls, keep=False)
    try:
        with quiet_no_grad(True), trace:
            logits = task.forward()
    except Exception:  # a made-up sample may be one that the model refuses
        return None, None
    finally:
        state.restore()
    same = [call_outline(call) for call in trace.calls] == [call_outline(call) for call in base.calls]
    return trace if same else None, logits


def call_outline(call: TracedCall) -> tuple[Any, ...]:
    """A call's function and the shapes of its tensors."""
    return call.function, *(state.shape for state in (*call.inputs, *call.outputs))


def _same_rows(found: Tensor, expected: Tensor, tight: bool) -> bool:
    """Whether logits are equal: up to the rounding of one kernel, or of several."""
    if not tight:
        return close_rows(found, expected)
    step = 16 * torch.finfo(expected.dtype).eps
    level = expected.nan_to_num(0, 0, 0).abs().amax(1, keepdim=True)
    return bool(
        torch.isclose(found, expected, 0.0, 0.0, equal_nan=True)
        .logical_or((found - expected).abs() <= step * level)
        .all()
    )


def changed_positions(base: CallTrace, traces: Sequence[CallTrace]) -> Changes:
    """For each call and each of its tensors, the positions that change with each sample, ``(3, L)``."""
    changes = []
    for number, call in enumerate(base.calls):
        rows = []
        for place, marks in enumerate(call.marks):
            others = [trace.calls[number].marks[place] for trace in traces]
            rows.append(None if marks is None else _differences(marks, others))
        changes.append(rows)
    return changes


def _differences(marks: Tensor, others: Sequence[Tensor | None]) -> Tensor | None:
    rows = []
    step = 16 * torch.finfo(marks.dtype).eps
    for other in others:
        if other is None:
            return None
        rows.append((other - marks).abs() > step * marks.abs())
    return torch.stack(rows)


def _check_coupling(task: Task, small: CallTrace, base: CallTrace, changes: Changes, state: ForwardState) -> None:
    """Refuse a model in which a row that meets a parameter changes with two samples.

    Raises:
        CoupledSamplesError: If there is one.
    """
    for call, rows in zip(base.calls, changes, strict=True):
        if not _meets_parameter(call, base):
            continue
        for changed in rows:
            if changed is not None and int(changed.sum(0).max()) > 1:
                raise coupled_model(_first_coupling(task, small, base, changes, state))


def _meets_parameter(call: TracedCall, trace: CallTrace) -> bool:
    """Whether a parameter, or a tensor made from parameters alone, is among the arguments of a call."""
    for number, state in enumerate(call.inputs):
        alone = state.requires_grad and call.marks[number] is None
        if alone or state.serial in trace.names:
            return True
    return False


# -- naming what couples the samples ----------------------------------------------------------------------------------


def _culprit(
    task: Task, small: CallTrace, base: CallTrace, trace: CallTrace | None, number: int, state: ForwardState
) -> str:
    if trace is None:
        return f"a decision of {type(task.model).__name__} for the whole batch"
    return _first_coupling(task, small, base, changed_positions(base, [trace]), state, number)


def _first_coupling(
    task: Task, small: CallTrace, base: CallTrace, changes: Changes, state: ForwardState, first: int = 0
) -> str:
    """The first call of a forward pass whose result has rows that change with a foreign sample, and its module."""
    for number, (call, rows) in enumerate(zip(base.calls, changes, strict=True)):
        for changed in rows[len(call.inputs) :]:
            if changed is not None and _foreign(changed, first):
                state.restore()
                watching = CallTrace(task.parameters, keep=False)
                watching.watched = number
                with quiet_no_grad(True), watching:
                    task.forward()
                state.restore()
                name = getattr(call.function, "__name__", "a function")
                return f"{name!r} in {watching.where or type(task.model).__name__}"
    return type(task.model).__name__


def _foreign(changed: Tensor, first: int) -> bool:
    """Whether rows change with samples that they do not belong to, in either order of rows."""
    positions = torch.arange(changed.shape[1], device=changed.device)
    samples = torch.arange(first, first + len(changed), device=changed.device)[:, None]
    times = max(1, changed.shape[1] // 3)
    major = bool((changed & (positions // times != samples)).any())
    return major and bool((changed & (positions % 3 != samples)).any())

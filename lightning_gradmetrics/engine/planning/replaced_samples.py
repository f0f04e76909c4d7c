"""Runs a model with each sample of a probe replaced in turn, to find the positions that belong to it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_gradmetrics.engine.inputs.samples import close_rows, same_rows
from lightning_gradmetrics.engine.planning.probe_samples import with_row
from lightning_gradmetrics.engine.planning.step_layouts import Changes
from lightning_gradmetrics.engine.refusals import coupled_model, not_reproducible
from lightning_gradmetrics.engine.task import Task
from lightning_gradmetrics.engine.tracing.model_state import ForwardState, quiet_no_grad
from lightning_gradmetrics.engine.tracing.trace import CallTrace, TracedCall

__all__ = ["Runs", "changed_positions", "changes_by_sample", "outline"]


@dataclass(frozen=True)
class Runs:
    """Runs with a sample replaced, and the traces to compare them with.

    Args:
        task: Three samples.
        small: The trace of two of them.
        large: The trace of all three.
        state: The state of the model before a run.
    """

    task: Task
    small: CallTrace
    large: CallTrace
    state: ForwardState

    def run(self, task: Task, only: Collection[int] | None) -> tuple[CallTrace | None, Tensor | None]:
        """Return the trace of a run, or ``None`` if its calls differ from the large trace, and its logits."""
        self.state.restore()
        trace = CallTrace(task.parameters, self.small.calls, only, keep=False)
        try:
            with quiet_no_grad(True), trace:
                logits = task.forward()
        except Exception:  # the model may refuse a synthetic sample
            return None, None
        finally:
            self.state.restore()
        same_calls = outline(trace) == outline(self.large)
        return trace if same_calls else None, logits

    def coupling(self, other: Task, number: int, logits: Tensor) -> ValueError:
        """Return the error for a model in which replacing one sample changes the logits ``(3, C)`` of other samples."""
        base, again = self.run(self.task, None)
        if again is not None and not close_rows(again, logits):
            return not_reproducible(self.task.model)
        return coupled_model(self._coupling_call(base, other, number))

    def _coupling_call(self, base: CallTrace | None, other: Task, number: int) -> str:
        """Return the first call in which replacing one sample changes rows of other samples, and its module."""
        trace, _ = self.run(other, None)
        if base is None or trace is None:
            return f"a decision of {type(self.task.model).__name__} for the whole batch"
        for call_number, (call, rows) in enumerate(zip(base.calls, changed_positions(base, [trace]), strict=True)):
            for changed in rows[len(call.inputs) :]:
                if changed is not None and _foreign(changed, number):
                    return f"{getattr(call.function, '__name__', 'a function')!r} in {self._module(call_number)}"
        return type(self.task.model).__name__

    def _module(self, call: int) -> str:
        """Return the type of the module that makes a call."""
        watching = CallTrace(self.task.parameters, keep=False)
        watching.watched = call
        with quiet_no_grad(True), watching:
            self.task.forward()
        self.state.restore()
        return watching.where or type(self.task.model).__name__


def changes_by_sample(runs: Runs, logits: Tensor, is_by_data: bool, meeting: Collection[int]) -> Changes | None:
    """Return the positions that change with each sample, for calls with parameters; ``None`` if other samples change the calls.

    Raises:
        CoupledSamplesError: If the logits of a sample, or a row that meets a parameter, change with another sample.
    """
    only = set() if is_by_data else meeting
    base, _ = runs.run(runs.task, only)
    traces, others = [], []
    for number in range(3):
        trace, other = _replaced(runs, number, logits.detach(), only, is_by_data or base is None)
        traces.append(trace)
        others.append(other)
    same = [trace for trace in traces if trace is not None]
    if base is None or len(same) < 3:
        return None
    changes = changed_positions(base, same)
    for rows in changes:
        for changed in rows:
            if changed is not None and int(changed.sum(0).max()) > 1:
                number = _first_foreign(changed)
                raise runs.coupling(others[number], number, logits.detach())
    return changes


def _first_foreign(changed: Tensor) -> int:
    """Return the first sample that changes rows of other samples; 0 if there is none."""
    for number in range(3):
        if _foreign(changed[number : number + 1], number):
            return number
    return 0


def _replaced(
    runs: Runs, number: int, logits: Tensor, only: Collection[int], irregular: bool
) -> tuple[CallTrace | None, Task]:
    """Return the trace of a run with one sample replaced by another, or by a similar one if that changes the calls."""
    rest = [(number + 1) % 3, (number + 2) % 3]
    trace, task = None, runs.task
    for source, noise in (((number + 1) % 3, 0.3), (number, 0.01)):
        task = with_row(runs.task, number, source, noise)
        trace, changed_logits = runs.run(task, only)
        tight = trace is not None and not irregular
        if changed_logits is not None and not same_rows(changed_logits[rest], logits[rest], tight):
            raise runs.coupling(task, number, logits)
        if trace is not None:
            break
    return trace, task


def outline(trace: CallTrace) -> list[tuple[Any, ...]]:
    """Return each call's function and the shapes of its tensors."""
    return [_call_outline(call) for call in trace.calls]


def _call_outline(call: TracedCall) -> tuple[Any, ...]:
    """Return a call's function and the shapes of its tensors."""
    return call.function, *(state.shape for state in (*call.inputs, *call.outputs))


def changed_positions(base: CallTrace, traces: Sequence[CallTrace]) -> Changes:
    """Return the positions ``(3, L)`` that change with each sample, for each call and each of its tensors."""
    changes = []
    for number, call in enumerate(base.calls):
        rows = []
        for tensor_number, marks in enumerate(call.marks):
            others = [trace.calls[number].marks[tensor_number] for trace in traces]
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


def _foreign(changed: Tensor, first: int) -> bool:
    """Return whether rows change with samples that they do not belong to, whichever layout they have."""
    positions = torch.arange(changed.shape[1], device=changed.device)
    samples = torch.arange(first, first + len(changed), device=changed.device)[:, None]
    times = max(1, changed.shape[1] // 3)
    major = bool((changed & (positions // times != samples)).any())
    return major and bool((changed & (positions % 3 != samples)).any())

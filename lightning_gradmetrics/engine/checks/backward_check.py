"""Compares the calls of custom autograd functions in the backward passes of a batch with those of a proof."""

from __future__ import annotations

from lightning_gradmetrics.engine.inputs.samples import input_shapes
from lightning_gradmetrics.engine.reference import loss_gradients
from lightning_gradmetrics.engine.refusals import raise_if_out_of_memory
from lightning_gradmetrics.engine.task import Task
from lightning_gradmetrics.engine.tracing.backward_calls import recorded_backward
from lightning_gradmetrics.engine.tracing.model_state import ForwardState
from lightning_gradmetrics.engine.tracing.outline import Outline, Recording
from lightning_gradmetrics.engine.tracing.size_record import SizeRecord

__all__ = ["covers_backward"]


def covers_backward(record: SizeRecord, outline: Outline, task: Task, state: ForwardState) -> bool:
    """Return whether a proof covers all backward passes of a batch.

    For new shapes of the inputs, one sample alone shows the sizes.

    Args:
        record: The sizes for which the proof holds; new shapes are added.
        outline: The forward pass of the batch, with the calls in its backward passes.
        task: The batch.
        state: The state of the model before the batch.
    """
    shapes = input_shapes(task)
    alone = None
    for calls in outline.backward:
        if calls.reads or calls.has_hooks:
            return False
        if record.covers(calls, task.size, shapes) or record.continues(calls, task.size, shapes):
            continue
        alone = _calls_alone(task, state) if alone is None else alone
        if alone is None or shapes in record.units or not record.learn(calls, task.size, alone, shapes):
            return False
    return bool(outline.backward)


def _calls_alone(task: Task, state: ForwardState) -> Outline | None:
    """Return the calls in the backward pass of one sample alone; ``None`` if the model does not run on it."""
    for parameter in task.parameters.values():
        parameter.requires_grad_(True)
    number = task.size // 2
    alone, now = task.rows(number, number + 1), ForwardState(task.model)
    outline = Outline(alone.leaves())
    outline.places = {}
    state.restore()
    try:
        with Recording(outline):
            logits = alone.forward()
        outline.end(logits)
        with recorded_backward(outline, logits) as calls:
            loss_gradients(logits.sum(), list(task.parameters.values()))
    except Exception as error:  # the batch is then checked without the proof
        raise_if_out_of_memory(error)
        return None
    finally:
        now.restore()
    return calls

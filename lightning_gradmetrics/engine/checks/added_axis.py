"""Shows that logits of one sample without a sample axis are a row of the logits of several samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from lightning_gradmetrics.engine.inputs.samples import logits_without_graph
from lightning_gradmetrics.engine.refusals import rows_not_samples
from lightning_gradmetrics.engine.task import Task
from lightning_gradmetrics.engine.tracing.model_state import ForwardState

__all__ = ["check_added_axis", "noting_shapes"]


def noting_shapes(task: Task, shapes: list[Sequence[int]]) -> Task:
    """Return a task whose forward passes append to a list the shape of the logits as the model returns them."""

    def noted(output: Any) -> Tensor:
        logits = task.logits(output)
        shapes.append(getattr(logits, "shape", ()))
        return logits

    return replace(task, logits=noted)


def check_added_axis(task: Task, shape: Sequence[int], state: ForwardState) -> None:
    """Require logits ``(2, C)`` of two copies of a sample whose logits are ``(C,)``; nothing is required of logits ``(1, C)``.

    Args:
        task: A batch of one sample.
        shape: The shape of its logits.
        state: The state of the model before the batch.

    Raises:
        SampleAxisError: If the copies have other logits.
    """
    if len(shape) != 1:
        return
    pair = logits_without_graph(task.picked([0, 0]), True)
    state.restore()
    if pair.shape[1:] != shape:
        raise rows_not_samples(tuple(shape), 1)

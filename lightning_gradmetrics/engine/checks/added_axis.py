"""Shows that logits of one sample without a sample axis are a row of the logits of several samples."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from lightning_gradmetrics.engine.inputs.samples import logits_without_graph
from lightning_gradmetrics.engine.refusals import rows_not_samples
from lightning_gradmetrics.engine.task import Task
from lightning_gradmetrics.engine.tracing.model_state import ForwardState

__all__ = ["check_added_axis"]


def check_added_axis(task: Task, state: ForwardState) -> None:
    """Require logits ``(2, C)`` of two copies of a sample whose logits are ``(C,)``; nothing is required of logits ``(1, C)``.

    Args:
        task: A batch of one sample.
        state: The state of the model before the batch.

    Raises:
        SampleAxisError: If the copies have other logits.
    """
    shapes: list[tuple[int, ...]] = []

    def noted(output: Any) -> Tensor:
        logits = task.logits(output)
        shapes.append(tuple(logits.shape))
        return logits

    logits_without_graph(replace(task, logits=noted), True)
    state.restore()
    if len(shapes[0]) == 1:
        pair = logits_without_graph(task.picked([0, 0]), True)
        state.restore()
        if pair.shape[1:] != shapes[0]:
            raise rows_not_samples(shapes[0], 1)

"""Refuses a model whose logits have no gradient: its statistics would be zero for every sample."""

from __future__ import annotations

from collections.abc import Iterable
from weakref import WeakSet

from torch import Tensor, nn

from lightning_gradmetrics.engine.refusals import no_gradient, raise_if_out_of_memory
from lightning_gradmetrics.engine.task import Task
from lightning_gradmetrics.engine.tracing.model_state import ForwardState
from lightning_gradmetrics.gradients.statistics import Moments

__all__ = ["check_gradients"]

_DIFFERENTIABLE: WeakSet[nn.Module] = WeakSet()
"""Models on a GPU with a gradient that is not zero; their later batches are not read."""


def check_gradients(task: Task, moments: Iterable[Moments]) -> None:
    """Refuse a model whose forward pass runs without gradients; only moments that are all zero lead to another forward pass.

    Args:
        task: The batch.
        moments: The moments of each objective.

    Raises:
        ValueError: If the logits depend on no parameter.
    """
    for of_objective in moments:
        values = next(iter(of_objective.values()))
        if not values.numel() or (not values.is_cpu and task.model in _DIFFERENTIABLE):
            return
        if bool(values.any()):
            if not values.is_cpu:
                _DIFFERENTIABLE.add(task.model)
            return
    logits = _logits_of_first(task)
    if logits is not None and not logits.requires_grad:
        raise no_gradient(task.model)


def _logits_of_first(task: Task) -> Tensor | None:
    """Return the logits of the first sample, with every parameter requiring a gradient; ``None`` if the model does not run on it."""
    state = ForwardState(task.model, task.record)
    for parameter in task.model.parameters():
        parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
    try:
        return task.rows(0, 1).forward()
    except Exception as error:  # the model may need several samples
        raise_if_out_of_memory(error)
        return None
    finally:
        state.restore()

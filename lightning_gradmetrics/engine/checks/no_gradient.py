"""Refuses logits and losses without a gradient: the statistics would be zero for every sample."""

from __future__ import annotations

from collections.abc import Iterable
from weakref import WeakSet

from torch import nn

from lightning_gradmetrics.engine.refusals import no_gradient, no_gradient_of_loss, raise_if_out_of_memory
from lightning_gradmetrics.engine.task import Task
from lightning_gradmetrics.engine.tracing.model_state import ForwardState
from lightning_gradmetrics.gradients.statistics import Moments

__all__ = ["check_gradients"]

_DIFFERENTIABLE: WeakSet[nn.Module] = WeakSet()
"""Models on a GPU with a gradient that is not zero; their later batches are not read."""


def check_gradients(task: Task, moments: Iterable[Moments]) -> None:
    """Refuse a forward pass or an objective without gradients; only moments that are all zero lead to another forward pass.

    Args:
        task: The batch.
        moments: The moments of each objective.

    Raises:
        ValueError: If the logits depend on no parameter, or the losses of an objective do not depend on the logits.
    """
    without = []
    for index, of_objective in enumerate(moments):
        values = next(iter(of_objective.values()))
        if not values.numel() or (not values.is_cpu and task.model in _DIFFERENTIABLE):
            return
        if values.is_cpu and values[(0,) * values.ndim].item():
            continue  # the first entry is seldom zero, and is read in a fraction of the time of a reduction
        if not bool(values.any()):
            without.append(index)
        elif not values.is_cpu:
            _DIFFERENTIABLE.add(task.model)
    if without:
        _check_first(task.rows(0, 1), without, ForwardState(task.model, task.record))


def _check_first(first: Task, objectives: Iterable[int], state: ForwardState) -> None:
    """Refuse a sample without gradients while every parameter requires one, if the model runs on the sample.

    Raises:
        ValueError: If its logits have no gradient, or its loss has none.
    """
    for parameter in first.model.parameters():
        parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
    try:
        logits = first.forward()
    except Exception as error:  # the model may need several samples
        raise_if_out_of_memory(error)
        return
    finally:
        state.restore()
    if not logits.requires_grad:
        raise no_gradient(first.model)
    for index in objectives:
        if not first.loss(index, logits).requires_grad:
            raise no_gradient_of_loss(first.objectives[index].name)

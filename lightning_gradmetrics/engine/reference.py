"""The slow reference, ``torch.autograd.grad`` on one sample at a time, against which every faster rule is tested."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_gradmetrics.engine.refusals import SampleAxisError, not_without_others
from lightning_gradmetrics.engine.task import Task, empty_moments, joined
from lightning_gradmetrics.engine.tracing.graph import ends_of_group_norms
from lightning_gradmetrics.engine.tracing.model_state import ForwardState
from lightning_gradmetrics.gradients.scaling import rescaled_moments
from lightning_gradmetrics.gradients.statistics import Moments, gradient_moments, stacked_moments

__all__ = ["loss_gradients", "moments_of_draw", "reference_moments"]


def reference_moments(task: Task, check: Callable[[int, Tensor], None] | None = None) -> list[Moments]:
    """Return the moments ``(N, P)`` of each objective's gradient, one sample and one objective at a time.

    Args:
        task: The batch.
        check: Called with the number of each sample and its logits ``(1, C)``.
    """
    for parameter in task.parameters.values():
        parameter.requires_grad_(True)
    parts, state = [empty_moments(task)], ForwardState(task.model)
    for number in range(task.size):
        sample = task.rows(number, number + 1)
        logits = _forward_alone(task, number)
        if check is not None:
            check(number, logits)
        parts.append(_sample_moments(sample, logits))
        state.restore_attributes()  # not before: the graph may hold attributes that the forward pass has changed in place
    return joined(parts)


def moments_of_draw(task: Task) -> tuple[list[Moments], Tensor]:
    """Return the moments ``(N, P)`` of each objective's gradient in one forward pass of the batch, and its logits.

    For a model that draws random numbers: each sample has those that it gets in the batch. One backward pass per sample.
    """
    for parameter in task.parameters.values():
        parameter.requires_grad_(True)
    logits, parts = task.forward(), [empty_moments(task)]
    for number in range(task.size):
        rows = slice(number, number + 1)
        parts.append(_sample_moments(task.rows(number, number + 1), logits[rows]))
    return joined(parts), logits.detach()


def _sample_moments(task: Task, logits: Tensor) -> list[Moments]:
    """Return the moments ``(1, P)`` of each objective's gradient."""
    moments = []
    for index in range(len(task.losses)):
        losses, undo = task.unit_losses(index, logits, only_tiny=True)
        gradients = loss_gradients(losses.sum(), list(task.parameters.values()))
        rows = [gradient_moments(gradient[None], task.wanted) for gradient in gradients]
        moments.append(rescaled_moments(stacked_moments(rows), undo))
    return moments


def _forward_alone(task: Task, number: int) -> Tensor:
    """Return the logits ``(1, C)`` of one sample alone, with their graph.

    Raises:
        SampleAxisError: If the model runs on the batch but not on one sample.
    """
    try:
        return task.rows(number, number + 1).forward()
    except SampleAxisError:
        raise
    except Exception as error:
        with torch.no_grad():
            task.forward()  # raises the model's own error if it does not run at all
        raise not_without_others(task.model, 1, task.size, error) from error


def loss_gradients(loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradient of a scalar for each parameter: dense, zero if the scalar does not depend on it; keeps the graph.

    Reentrant activation checkpoints allow ``backward`` only, so there the parameters' ``.grad`` is used and left
    ``None``.
    """
    if not loss.requires_grad:
        return list(map(torch.zeros_like, parameters))
    ends = [*parameters, *ends_of_group_norms(loss)]
    try:
        reached: Sequence[Tensor | None] = torch.autograd.grad(loss, ends, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        if "checkpoint" not in str(error).lower():
            raise
        reached = _backward_gradients(loss, parameters)
    gradients = []
    for parameter, gradient in zip(parameters, reached[: len(parameters)], strict=True):
        gradients.append(torch.zeros_like(parameter) if gradient is None else gradient.to_dense())
    return gradients


def _backward_gradients(loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor | None]:
    for parameter in parameters:
        parameter.grad = None
    loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    gradients = []
    for parameter in parameters:
        gradients.append(parameter.grad)
        parameter.grad = None
    return gradients

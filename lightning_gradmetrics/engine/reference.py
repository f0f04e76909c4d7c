"""The slow reference: a batch of one at a time, ``torch.autograd.grad``. Every faster rule is tested against it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_gradmetrics.engine.model_state import ForwardState
from lightning_gradmetrics.engine.task import Task, empty_moments, joined
from lightning_gradmetrics.gradients.scaling import rescaled_moments
from lightning_gradmetrics.gradients.statistics import Moments, gradient_moments, stacked_moments

__all__ = ["loss_gradients", "reference_moments"]


def reference_moments(task: Task, check: Callable[[int, Tensor], None] | None = None) -> list[Moments]:
    """The moments ``(N, P)`` of each objective's gradient, one sample and one objective at a time.

    Args:
        task: The batch.
        check: Called with the number of each sample and its logits ``(1, C)``.
    """
    for parameter in task.parameters.values():
        parameter.requires_grad_(True)
    parts, state = [empty_moments(task)], ForwardState(task.model)
    for number in range(task.size):
        one = task.rows(number, number + 1)
        logits = one.forward()
        state.restore_attributes()
        if check is not None:
            check(number, logits)
        parts.append(_sample_moments(one, logits))
    return joined(parts)


def _sample_moments(task: Task, logits: Tensor) -> list[Moments]:
    """The moments ``(1, P)`` of each objective's gradient."""
    found = []
    for index in range(len(task.losses)):
        losses, undo = task.unit_losses(index, logits)
        gradients = loss_gradients(losses.sum(), list(task.parameters.values()))
        rows = [gradient_moments(gradient[None], task.wanted) for gradient in gradients]
        found.append(rescaled_moments(stacked_moments(rows), undo))
    return found


def loss_gradients(loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """The gradient of a scalar for each parameter, dense, zero where it does not reach; its graph is kept.

    Reentrant activation checkpoints allow ``backward`` only, so there the parameters' ``.grad`` is used and left
    ``None``.
    """
    if not loss.requires_grad:
        return [torch.zeros_like(p) for p in parameters]
    try:
        found: Sequence[Tensor | None] = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        if "checkpoint" not in str(error).lower():
            raise
        found = _backward_gradients(loss, parameters)
    return [torch.zeros_like(p) if g is None else g.to_dense() for p, g in zip(parameters, found, strict=True)]


def _backward_gradients(loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor | None]:
    for parameter in parameters:
        parameter.grad = None
    loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    found = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    return found

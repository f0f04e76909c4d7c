"""Loss scales: one power of two per sample, so that squares of small gradient entries do not underflow.

The gradient of a confident sample has entries around ``exp(-gap)``; at a logit gap of 60 their squares are zero in float32.
Multiplying a floating-point number by a power of two is exact, so scaling the loss and undoing it in the moments is
too.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_gradmetrics.gradients.objectives import Loss, Objective
from lightning_gradmetrics.gradients.precision import accumulator, at_least_float32
from lightning_gradmetrics.gradients.statistics import Moment, Moments

__all__ = ["logit_gradient", "rescaled_moments", "rescaled_rows", "unit_gradient", "unit_losses", "unit_scale"]


def logit_gradient(loss: Loss, logits: Tensor) -> Tensor:
    """Return the gradient of an objective with respect to the logits, ``(N, C)``; zero where the losses are constant.

    Args:
        loss: The objective.
        logits: ``(N, C)``; their graph is not used.
    """
    leaf = at_least_float32(logits.detach()).detach().requires_grad_()
    losses = loss(leaf)
    if not losses.requires_grad:
        return torch.zeros_like(leaf)
    return torch.autograd.grad(losses.sum(), leaf)[0]


def unit_scale(gradient: Tensor, tiny_in: torch.dtype | None = None) -> Tensor:
    """Return the power of two ``(N,)`` that scales each row's largest absolute entry to [1/2, 1); 1 for zero and NaN.

    Args:
        gradient: The rows, ``(N, C)``.
        tiny_in: If given, 1 for rows whose squares do not underflow in this type.
    """
    largest = gradient.detach().abs().amax(1)
    usable = largest.isfinite() & (largest > 0)
    if tiny_in is not None:
        usable &= largest < torch.finfo(tiny_in).tiny ** 0.5 * 2.0**20
    largest = torch.where(usable, largest, 0.5)
    return torch.frexp(largest).mantissa / largest


def unit_losses(loss: Loss, logits: Tensor, only_tiny: bool = False) -> tuple[Tensor, Tensor]:
    """Return losses with the objective's gradient, scaled per sample by a power of two to a largest entry in [1/2, 1).

    Args:
        loss: The objective.
        logits: ``(N, C)``, with a graph.
        only_tiny: Whether to scale only samples whose gradient might underflow. The backward pass of all others then
            has its original scale, which matters if a hook or a custom function clips it.

    Returns:
        Losses ``(N,)``, linear in the logits, with the scaled gradient; and factors ``(N,)``. The factor times the
        gradient of these losses is the objective's gradient.

    Example:
        >>> logits = torch.tensor([[60.0, 0.0]], requires_grad=True)
        >>> losses, undo = unit_losses(lambda z: torch.nn.functional.softplus(z[:, 1] - z[:, 0]), logits)
        >>> torch.autograd.grad(losses.sum(), logits)[0] * undo[:, None]
        tensor([[-8.7565e-27,  8.7565e-27]], dtype=torch.float64)
    """
    gradient = logit_gradient(loss, logits).to(accumulator(logits))
    scale = unit_scale(gradient, logits.dtype if only_tiny else None)
    scaled = (gradient * scale[:, None]).to(logits.dtype)
    return (logits * scaled).sum(1), 1 / scale


def unit_gradient(objective: Objective, targets: Tensor | None, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient of the losses of :func:`unit_losses` with respect to the logits, ``(N, C)``, and their factors.

    Args:
        objective: The objective.
        targets: True labels ``(N,)``, if there are any.
        logits: ``(N, C)``.
    """
    loss = objective.loss(targets)
    with torch.no_grad():
        gradient = objective.gradient(logits, targets)
    if gradient is None:
        gradient = logit_gradient(loss, logits)
    with torch.no_grad():
        wide = gradient.to(accumulator(logits))
        scale = unit_scale(wide)
        return (wide * scale[:, None]).to(logits.dtype), 1 / scale


def rescaled_rows(rows: Tensor, undo: Tensor) -> Tensor:
    """Return rows ``(N, ...)`` times the factors ``(N,)``."""
    return rows * undo.to(rows.dtype).view(len(undo), *[1] * (rows.ndim - 1))


def rescaled_moments(moments: Mapping[Moment, Tensor], undo: Tensor) -> Moments:
    """Return the moments of gradients times positive factors.

    Args:
        moments: Moments of the gradients, ``(N,)`` or ``(N, P)``.
        undo: The factors, ``(N,)``.
    """
    rescaled: Moments = {}
    for key, value in moments.items():
        factor = undo if isinstance(key, str) else undo.pow(key)
        rescaled[key] = rescaled_rows(value, factor)  # type: ignore[index]
    return rescaled

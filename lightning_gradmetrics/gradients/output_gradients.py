"""Gradients of objectives with respect to the logits, in closed form for built-in objectives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lightning_gradmetrics.classifier.forward import gradients_enabled
from lightning_gradmetrics.gradients.objectives import Loss, Objective
from lightning_gradmetrics.gradients.precision import accumulator
from lightning_gradmetrics.gradients.softmax import Softmax
from lightning_gradmetrics.gradients.statistics import Moment, Moments, axis_moments

__all__ = ["LogitGradient", "lazy_output_gradient", "output_gradient"]

Softmaxes = Callable[[float], Softmax]
"""A function from a temperature to the softmax of the logits."""


def output_gradient(objective: Objective, logits: Tensor, softmax: Softmaxes, targets: Tensor | None = None) -> Tensor:
    """Return the gradient of each position's loss with respect to its logits, ``(N, C, *P)``.

    A custom objective is a function of rows ``(M, C)``, so it receives the positions as rows and is differentiated by
    autograd.

    Args:
        objective: The objective.
        logits: ``(N, C, *P)``.
        softmax: A function from a temperature to the softmax of the logits.
        targets: True labels ``(N, *P)``, for objectives that need them; negative labels have the gradient zero.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0]])
        >>> output_gradient(Objective.of("uniform"), logits, lambda temperature: Softmax(logits, temperature))
        tensor([[ 0.3808, -0.3808]])
    """
    if objective.function is not None or objective.name not in CLOSED_FORMS:
        return _by_rows(objective.loss(None if targets is None else _rows_of_map(targets)), logits)
    objective.check_classes(logits)
    arguments = dict(objective.arguments)
    if objective.needs_targets:
        objective.loss(targets)  # raises without targets
        arguments["targets"] = targets
    return CLOSED_FORMS[objective.name](logits, softmax, **arguments)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class LogitGradient:
    """A gradient with respect to the logits, which is computed only where its moments are not known.

    Args:
        like: A tensor with the shape, the type and the device of the logits, ``(N, C, *P)``; its values are not read.
        compute: Returns the gradient ``(N, C, *P)``.
        known: Functions that return moments over the classes, ``(N, *P)``, without the gradient.
    """

    like: Tensor
    compute: Callable[[], Tensor]
    known: Mapping[Moment, Callable[[], Tensor]] = field(default_factory=dict)

    @cached_property
    def tensor(self) -> Tensor:
        """The gradient ``(N, C, *P)``."""
        return self.compute()

    def moments(self, wanted: Iterable[Moment]) -> Moments:
        """Return moments over the classes, ``(N, *P)``.

        Args:
            wanted: The moments.
        """
        moments: Moments = {}
        for key in wanted:
            if key in self.known:
                moments[key] = self.known[key]().to(accumulator(self.like))
            else:
                moments |= axis_moments(self.tensor, [key])
        return moments


def lazy_output_gradient(
    objective: Objective,
    like: Tensor,
    logits: Callable[[], Tensor],
    softmax: Softmaxes,
    targets: Tensor | None = None,
) -> LogitGradient:
    """Return the gradient of :func:`output_gradient`, which is computed only where its moments are not known.

    Args:
        objective: The objective.
        like: A tensor with the shape, the type and the device of the logits, ``(N, C, *P)``; its values are not read.
        logits: Returns the logits.
        softmax: A function from a temperature to the softmax of the logits.
        targets: True labels ``(N, *P)``, for objectives that need them.

    Example:
        >>> logits, uniform = torch.tensor([[[2.0], [0.0]]]), Objective.of("uniform")
        >>> gradient = lazy_output_gradient(uniform, logits, lambda: logits, lambda temperature: Softmax(logits, temperature))
        >>> gradient.moments([1.0])[1.0]
        tensor([[0.7616]], dtype=torch.float64)
    """
    known = _known_moments(objective, like, softmax)
    return LogitGradient(like, lambda: output_gradient(objective, logits(), softmax, targets), known)


def _known_moments(objective: Objective, like: Tensor, softmaxes: Softmaxes) -> dict[Moment, Callable[[], Tensor]]:
    """Return the moments that are functions of few numbers of each position's softmax."""
    if objective.function is not None or like.shape[1] < 2 or objective.name not in ("uniform", "pseudo_label"):
        return {}
    temperature = dict(objective.arguments).get("temperature", 1.0)
    softmax = softmaxes(temperature)
    if objective.name == "uniform":
        return {1.0: lambda: softmax.distance_to_uniform / temperature}
    return {
        1.0: lambda: 2 * softmax.error / temperature,
        2.0: lambda: (softmax.error.square() + softmax.other_squares) / temperature**2,
        "max": lambda: softmax.second / temperature,
        "min": lambda: -softmax.error / temperature,
    }


def _rows_of_map(values: Tensor) -> Tensor:
    return values.reshape(-1)


def _by_rows(loss: Loss, logits: Tensor) -> Tensor:
    """Return the gradient by autograd, of the positions as rows ``(M, C)``."""
    last = logits.detach().movedim(1, -1)
    with gradients_enabled():
        rows = last.reshape(-1, logits.shape[1]).clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss(rows).sum(), rows)
    return gradient.reshape(last.shape).movedim(-1, 1)


def _pseudo_label(logits: Tensor, softmax: Softmaxes, temperature: float = 1.0) -> Tensor:
    return _divided(softmax(temperature).predicted_residual, temperature)


def _uniform(logits: Tensor, softmax: Softmaxes, temperature: float = 1.0) -> Tensor:
    return _divided(softmax(temperature).probabilities - 1 / logits.shape[1], temperature)


def _confounding(logits: Tensor, softmax: Softmaxes) -> Tensor:
    return logits.shape[1] * softmax(1.0).probabilities - 1


def _confounding_logits(logits: Tensor, softmax: Softmaxes) -> Tensor:
    return -torch.sigmoid(-logits.detach())


def _label(logits: Tensor, softmax: Softmaxes, targets: Tensor) -> Tensor:
    known = targets >= 0
    return softmax(1.0).residual(targets.where(known, 0)).where(known.unsqueeze(1), 0)


def _class(logits: Tensor, softmax: Softmaxes, index: int | Tensor, temperature: float = 1.0) -> Tensor:
    shape = (len(logits), *logits.shape[2:])
    classes = torch.as_tensor(index, device=logits.device).long().expand(shape)
    return _divided(softmax(temperature).residual(classes), temperature)


def _ranked_class(logits: Tensor, softmax: Softmaxes, rank: int) -> Tensor:
    order = logits.detach().argsort(dim=1, descending=True, stable=True)
    return softmax(1.0).residual(order[:, rank])


def _divided(gradient: Tensor, temperature: float) -> Tensor:
    return gradient if temperature == 1 else gradient / temperature


CLOSED_FORMS: dict[str, Callable[..., Any]] = {
    "pseudo_label": _pseudo_label,
    "uniform": _uniform,
    "confounding": _confounding,
    "confounding_logits": _confounding_logits,
    "label": _label,
    "class": _class,
    "ranked_class": _ranked_class,
}
"""The gradients by the name of the objective."""

"""What an engine is asked to do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradmetrics.forward import Inputs, call, map_tensors
from lightning_gradmetrics.objectives import Loss
from lightning_gradmetrics.statistics import Moment, Moments, accumulator

__all__ = ["Task", "empty_moments"]


@dataclass(frozen=True)
class Task:
    """One batch's work. Runs with gradients enabled, on inputs that are no inference tensors, inside ``forward.preserved``.

    Args:
        model: The model.
        inputs: Its inputs, ``size`` samples along the first axis of each tensor.
        size: Number of samples ``N``.
        losses: For each objective, from the true labels (or ``None``) to the loss on logits.
        targets: True labels ``(N,)``, if there are any.
        parameters: The chosen parameters by name, in the order of the result's columns.
        wanted: The moments to compute.
        logits: From the model's output to its logits ``(N, C)``.
    """

    model: nn.Module
    inputs: Inputs
    size: int
    losses: tuple[Callable[[Tensor | None], Loss], ...]
    targets: Tensor | None
    parameters: Mapping[str, nn.Parameter]
    wanted: frozenset[Moment]
    logits: Callable[[Any], Tensor]

    def rows(self, start: int, stop: int) -> Task:
        """The same task for the samples ``start`` to ``stop``."""

        def take(tensor: Tensor) -> Tensor:
            return tensor[start:stop] if tensor.ndim and len(tensor) == self.size else tensor

        targets = None if self.targets is None else self.targets[start:stop]
        size = len(range(self.size)[start:stop])
        return Task(self.model, map_tensors(self.inputs, take), size, self.losses, targets, self.parameters, self.wanted, self.logits)

    def forward(self) -> Tensor:
        """The model's logits ``(N, C)``."""
        return self.logits(call(self.model, self.inputs))


def empty_moments(task: Task) -> list[Moments]:
    """The moments of no samples, ``(0, P)`` for each objective."""
    parameter = next(iter(task.parameters.values()))
    shape = (0, len(task.parameters))
    return [{key: torch.empty(shape, dtype=accumulator(parameter), device=parameter.device) for key in task.wanted} for _ in task.losses]

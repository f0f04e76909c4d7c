"""The softmax of logits in parts that keep their digits, for samples and for maps of positions."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from lightning_gradmetrics.gradients.precision import at_least_float32

__all__ = ["Softmax"]

FARTHEST = 1e4
"""Distances of logits beyond this have weight zero in every precision."""


class Softmax:
    """The softmax over axis 1 of logits ``(N, C, *P)``, computed once and shared by all scores of a batch.

    Nothing is computed as ``1 - p`` where ``p`` may round to 1: the error probability is the sum of all other
    probabilities. Each part is computed on first use.

    Args:
        logits: ``(N, C, *P)``.
        temperature: Divides the logits.

    Example:
        >>> softmax = Softmax(torch.tensor([[50.0, 0.0, 0.0]]))
        >>> softmax.error, softmax.entropy
        (tensor([3.8575e-22]), tensor([1.9673e-20]))
    """

    def __init__(self, logits: Tensor, temperature: float = 1.0) -> None:
        logits = at_least_float32(logits.detach())
        self.logits = logits if temperature == 1 else logits / temperature
        self.temperature = temperature

    @cached_property
    def top(self) -> Tensor:
        """The largest logit, ``(N, *P)``."""
        return self.logits.amax(1)

    @cached_property
    def is_top(self) -> Tensor:
        """Which class is predicted, the first of equal ones: ``(N, C, *P)``, bool."""
        found = self.logits == self.top.unsqueeze(1)
        if int(torch.count_nonzero(found)) == self.top.numel() and not bool(self.top.isnan().any()):
            return found
        first = self.logits.argmax(1, keepdim=True)
        return torch.zeros_like(found).scatter(1, first, True)

    @cached_property
    def distances(self) -> Tensor:
        """How far each logit is below the largest, ``(N, C, *P)``."""
        return (self.top.unsqueeze(1) - self.logits).clamp_(max=FARTHEST)

    @cached_property
    def _weights(self) -> Tensor:
        return (-self.distances).exp_()

    @cached_property
    def odds(self) -> Tensor:
        """The odds against the predicted class, ``(1 - p_y) / p_y``: ``(N, *P)``."""
        return self._weights.masked_fill(self.is_top, 0).sum(1)

    @cached_property
    def probabilities(self) -> Tensor:
        """``(N, C, *P)``."""
        return self._weights / (1 + self.odds).unsqueeze(1)

    @cached_property
    def error(self) -> Tensor:
        """One minus the largest probability, ``(N, *P)``."""
        return self.odds / (1 + self.odds)

    @cached_property
    def complements(self) -> Tensor:
        """``1 - p`` of every class, ``(N, C, *P)``."""
        return torch.where(self.is_top, self.error.unsqueeze(1), 1 - self.probabilities)

    @cached_property
    def entropy(self) -> Tensor:
        """The entropy in nats, ``(N, *P)``: a sum of terms that are not negative."""
        return self.odds.log1p() + (self.probabilities * self.distances).sum(1)

    @cached_property
    def log_partition(self) -> Tensor:
        """``log sum_c exp(z_c)``, ``(N, *P)``."""
        return self.top + self.odds.log1p()

    @cached_property
    def second(self) -> Tensor:
        """The second largest probability, ``(N, *P)``."""
        return self.probabilities.masked_fill(self.is_top, 0).amax(1)

    @property
    def predicted_residual(self) -> Tensor:
        """``p - e_y`` for the predicted class y, ``(N, C, *P)``."""
        return torch.where(self.is_top, -self.error.unsqueeze(1), self.probabilities)

    def residual(self, classes: Tensor) -> Tensor:
        """Return ``p - e_c`` for a class per position, ``(N, C, *P)``.

        Args:
            classes: ``(N, *P)``, class indices.
        """
        index = classes.long().unsqueeze(1)
        return self.probabilities.scatter(1, index, -self.complements.gather(1, index))

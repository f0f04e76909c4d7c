"""Quantities of the softmax that stay accurate for confident predictions, for samples and for maps of positions."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from lightning_gradmetrics.gradients.precision import wide_dtype

__all__ = ["Softmax"]

FARTHEST = 1e4
"""Logits further than this below the largest have weight zero in every precision."""


class Softmax:
    """The softmax over axis 1 of logits ``(N, C, *P)``, computed once and shared by all scores of a batch.

    Nothing is computed as ``1 - p`` if ``p`` may round to 1; the error probability is the sum of all other
    probabilities. Each quantity is computed on first use.

    Args:
        logits: ``(N, C, *P)``.
        temperature: Divides the logits.
        dtype: The type of all quantities; by default that of the logits, at least float32.

    Example:
        >>> softmax = Softmax(torch.tensor([[50.0, 0.0, 0.0]]))
        >>> softmax.error, softmax.entropy
        (tensor([3.8575e-22]), tensor([1.9673e-20]))
    """

    def __init__(self, logits: Tensor, temperature: float = 1.0, dtype: torch.dtype | None = None) -> None:
        self.given = logits.detach()
        self.temperature = temperature
        self.dtype = wide_dtype(logits.dtype) if dtype is None else dtype

    @cached_property
    def logits(self) -> Tensor:
        """The logits divided by the temperature, ``(N, C, *P)``."""
        logits = self.given.to(self.dtype)
        return logits if self.temperature == 1 else logits / self.temperature

    @cached_property
    def _largest(self) -> tuple[Tensor, Tensor]:
        """The largest logit and the first class with that logit, ``(N, *P)`` each."""
        largest = self.logits.max(1)
        return largest.values, largest.indices

    @property
    def top(self) -> Tensor:
        """The largest logit, ``(N, *P)``."""
        is_known = "_top_of_map" in self.__dict__ or self.logits.ndim > 2
        return self._top_of_map if is_known else self._largest[0]

    @cached_property
    def _top_of_map(self) -> Tensor:
        """The largest logit without its class, because the argmax over a strided axis takes longer than all scores."""
        return self.logits.amax(1)

    @cached_property
    def _is_other(self) -> Tensor | None:
        """For maps, 0 for the predicted class and 1 for the others, ``(N, C, *P)`` in the type of the logits.

        ``None`` for samples, and if classes tie or a logit is NaN, which requires an argmax.
        """
        if self.logits.ndim == 2:
            return None
        others = self.distances.sign()
        is_certain = int(torch.count_nonzero(others)) == others.numel() - self.top.numel()
        return others if is_certain else None

    @cached_property
    def _other_weights(self) -> Tensor:
        """The weights of a map with 0 for the predicted class."""
        assert self._is_other is not None
        return self._weights * self._is_other

    @property
    def _other_probabilities(self) -> Tensor:
        """The probabilities with 0 for the predicted class, ``(N, C, *P)``."""
        if self._is_other is None:
            return self.probabilities.scatter(1, self._largest[1].unsqueeze(1), 0)
        return self._other_weights / (1 + self.odds).unsqueeze(1)

    @cached_property
    def is_top(self) -> Tensor:
        """Which class is predicted (the first one if several tie), ``(N, C, *P)``, bool."""
        if self._is_other is not None:
            return self._is_other == 0
        nowhere = torch.zeros_like(self.logits, dtype=torch.bool)
        return nowhere.scatter_(1, self._largest[1].unsqueeze(1), True)

    @cached_property
    def distances(self) -> Tensor:
        """The difference between the largest logit and each logit, ``(N, C, *P)``."""
        return (self.top.unsqueeze(1) - self.logits).clamp_(max=FARTHEST)

    @cached_property
    def _weights(self) -> Tensor:
        """``exp(z_c - z_y)``, which is 1 for the predicted class y; :attr:`probabilities` reuses its memory."""
        return (self.logits - self.top.unsqueeze(1)).clamp_(min=-FARTHEST).exp_()

    @cached_property
    def odds(self) -> Tensor:
        """The odds against the predicted class, ``(1 - p_y) / p_y``: ``(N, *P)``."""
        if self._is_other is not None:
            return self._other_weights.sum(1)
        # In place, because allocating memory costs more than the arithmetic.
        weights, index = self._weights, self._largest[1].unsqueeze(1)
        own = weights.gather(1, index)
        odds = weights.scatter_(1, index, 0).sum(1)
        weights.scatter_(1, index, own)
        return odds

    @cached_property
    def probabilities(self) -> Tensor:
        """The probabilities, ``(N, C, *P)``."""
        size = (1 + self.odds).unsqueeze(1)
        weights: Tensor = self._weights
        del self.__dict__["_weights"]
        return weights.div_(size)

    @cached_property
    def error(self) -> Tensor:
        """One minus the largest probability, ``(N, *P)``."""
        return self.odds / (1 + self.odds)

    @cached_property
    def other_squares(self) -> Tensor:
        """The sum of the squared probabilities of all classes but the predicted one, ``(N, *P)``."""
        return self._other_probabilities.square().sum(1)

    @cached_property
    def impurity(self) -> Tensor:
        """``1 - sum_c p_c^2``, ``(N, *P)``, computed without cancellation."""
        return self.error * (2 - self.error) - self.other_squares

    @cached_property
    def distance_to_uniform(self) -> Tensor:
        """``sum_c |p_c - 1/C|``, ``(N, *P)``."""
        return (self.probabilities - 1 / self.logits.shape[1]).abs_().sum(1)

    @cached_property
    def complements(self) -> Tensor:
        """``1 - p`` of every class, ``(N, C, *P)``."""
        complements = 1 - self.probabilities
        if self._is_other is not None:
            return torch.where(self.is_top, self.error.unsqueeze(1), complements)
        return complements.scatter_(1, self._largest[1].unsqueeze(1), self.error.unsqueeze(1))

    @cached_property
    def entropy(self) -> Tensor:
        """The entropy in nats, ``(N, *P)``, as a sum of non-negative terms."""
        return self.odds.log1p() + (self.probabilities * self.distances).sum(1)

    @cached_property
    def log_partition(self) -> Tensor:
        """``log sum_c exp(z_c)``, ``(N, *P)``."""
        return self.top + self.odds.log1p()

    @cached_property
    def second(self) -> Tensor:
        """The second largest probability, ``(N, *P)``."""
        return self._other_probabilities.amax(1)

    @cached_property
    def squared_entropy_gradient(self) -> Tensor:
        """``sum_c (p_c (log p_c + H))^2`` with the entropy H: the gradient of the negative entropy, ``(N, *P)``."""
        return self.entropy_gradient.square().sum(1)

    @property
    def entropy_gradient(self) -> Tensor:
        """The gradient of the negative entropy with respect to the logits, ``p_c (log p_c + H)``: ``(N, C, *P)``."""
        # log p + H, both computed from the distances to the largest logit, so that the log-partition cancels.
        shifted = (self.probabilities * self.distances).sum(1, keepdim=True) - self.distances
        return self.probabilities * shifted

    def powers_of_others(self, power: float, complement: float = 0.0) -> Tensor:
        """Return ``sum_c p_c^a (1 - p_c)^b`` over all classes but the predicted one, ``(N, *P)``.

        Args:
            power: The exponent ``a``, above 0.
            complement: The exponent ``b``, at least 0.
        """
        others = self._other_probabilities
        terms = others.pow(power)
        return (terms * (1 - others).pow(complement) if complement else terms).sum(1)

    @property
    def predicted_residual(self) -> Tensor:
        """``p - e_y`` for the predicted class y, ``(N, C, *P)``."""
        if self._is_other is not None:
            return torch.addcmul(self._other_probabilities, self.error.unsqueeze(1), 1 - self._is_other, value=-1)
        return self.probabilities.scatter(1, self._largest[1].unsqueeze(1), -self.error.unsqueeze(1))

    def residual(self, classes: Tensor) -> Tensor:
        """Return ``p - e_c`` for a class per position, ``(N, C, *P)``.

        Args:
            classes: ``(N, *P)``, class indices.
        """
        index = classes.long().unsqueeze(1)
        return self.probabilities.scatter(1, index, -self.complements.gather(1, index))

"""Gradients as scores read them: statistics of the entries, and the head's gradient from its two factors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lightning_gradmetrics.gradients.head_features import Block, HeadFeatures, merged_moments
from lightning_gradmetrics.gradients.output_gradients import LogitGradient
from lightning_gradmetrics.gradients.statistics import (
    GradientStatistics,
    Moment,
    Moments,
    axis_moments,
    factors_moments_for,
    moments_for,
    product_moments,
    result_dtype,
)

__all__ = ["Gradient", "HeadGradient", "ParameterGradients"]


class Gradient(Protocol):
    """Statistics of a gradient's entries: ``(N,)``, or ``(N, P)`` for each of P parameters."""

    def statistic(self, name: str) -> Tensor:
        """Return a statistic by name: ``max``, ``min``, ``mean``, ``std``, ``l1``, ``l2``, ``linf`` or any ``l<p>``."""
        ...

    def norm(self, p: float = 2.0) -> Tensor:
        """Return the p-norm."""
        return self.statistic(f"l{p:g}")

    @property
    def max(self) -> Tensor:
        """The largest entry."""
        return self.statistic("max")

    @property
    def min(self) -> Tensor:
        """The smallest entry."""
        return self.statistic("min")

    @property
    def mean(self) -> Tensor:
        """The mean entry."""
        return self.statistic("mean")

    @property
    def std(self) -> Tensor:
        """The unbiased standard deviation of the entries."""
        return self.statistic("std")


class ParameterGradients(Gradient, Protocol):
    """Statistics of the gradients of P parameters, ``(N, P)`` each."""

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters' names."""
        ...

    def by_layer(self) -> ParameterGradients:
        """Merge the parameters of each layer."""
        ...

    def merged(self) -> Gradient:
        """Merge all parameters."""
        ...


@dataclass(frozen=True)
class HeadGradient(Gradient):
    """The gradient of the head's weight, ``g h^T``, from its factors: no backward pass and no gradient tensor.

    Args:
        given: The gradient of the logits ``g``, ``(N, C, *P)``, or an object that computes it or its moments.
        features: The head's input ``h``, ``(N, D, *P)``.
    """

    given: Tensor | LogitGradient
    features: Tensor | HeadFeatures

    @property
    def output(self) -> Tensor:
        """The gradient of the logits, ``(N, C, *P)``."""
        return self.given if isinstance(self.given, Tensor) else self.given.tensor

    def moments(self, wanted: Iterable[Moment]) -> GradientStatistics:
        """Return the statistics that can be computed from the wanted moments."""
        features = self.features if isinstance(self.features, HeadFeatures) else HeadFeatures.of(self.features)
        needed = factors_moments_for(wanted)
        parts: list[Moments] = []
        count = 0
        for block, right in zip(features.blocks, features.block_moments(needed), strict=True):
            left, classes = self._left(block, needed)
            parts.append(product_moments(left, right, wanted))
            count += classes * block.width
        dtype = result_dtype(self._logits.dtype)
        return GradientStatistics(
            ("head",), torch.scalar_tensor(count, dtype=torch.int64), merged_moments(parts), dtype
        )

    def _left(self, block: Block, needed: Iterable[Moment]) -> tuple[Moments, int]:
        """Return the moments of the block's part of the logits' gradient, and its number of classes."""
        if block.group is None and not isinstance(self.given, Tensor):
            return self.given.moments(needed), self._logits.shape[1]
        output = block.of_output(self.output)
        return axis_moments(output, needed), output.shape[1]

    @property
    def _logits(self) -> Tensor:
        """A tensor with the shape and the type of the logits."""
        return self.given if isinstance(self.given, Tensor) else self.given.like

    def statistic(self, name: str) -> Tensor:
        """Return a statistic by name, ``(N, *P)``."""
        return self.moments(moments_for([name])).statistic(name)


@dataclass(frozen=True)
class HeadColumn(ParameterGradients):
    """The gradient of the head's weight as a target with one parameter: statistics ``(N, 1, *P)``.

    Args:
        head: The gradient.
    """

    head: HeadGradient

    @property
    def names(self) -> tuple[str, ...]:
        """The name of the only parameter."""
        return ("head",)

    def statistic(self, name: str) -> Tensor:
        """Return a statistic by name, ``(N, 1, *P)``."""
        return self.head.statistic(name).unsqueeze(1)

    def by_layer(self) -> HeadColumn:
        """Return itself: one parameter is one layer."""
        return self

    def merged(self) -> HeadGradient:
        """Return the head's gradient."""
        return self.head

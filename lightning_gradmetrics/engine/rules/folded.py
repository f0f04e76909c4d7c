"""A convolution and the batch norm after it as one layer: the factors of the norm are part of the weight.

The layer is ``y = s (x * W) + t`` with ``s = w / sqrt(v + eps)``. So the gradient of ``W`` is ``s`` times that of a convolution
whose output has the gradient of ``y``, and the gradient of ``w`` needs the convolution's output only in a sum over all positions,
``sum_p g_p (x * W)_p``, which is the product of ``W`` with its gradient before it is scaled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lightning_gradmetrics.engine.kernels.lanes import native_convolution
from lightning_gradmetrics.engine.kernels.native import ChannelScale
from lightning_gradmetrics.engine.rules.base import Call, Rule, first_axis
from lightning_gradmetrics.engine.rules.convolution import padded_input
from lightning_gradmetrics.engine.rules.sums import of_convolution
from lightning_gradmetrics.engine.uses import ConvUse, RowsUse, Use
from lightning_gradmetrics.gradients.statistics import Moment, Moments

__all__ = ["FOLDED", "run_folded"]


def run_folded(
    function: Callable[..., Tensor], values: dict[str, Any], norm: Mapping[str, Tensor], eps: float
) -> Tensor:
    """Return the output of the norm, and add ``scale``, ``centre`` and ``per_deviation`` to the arguments of the convolution.

    Args:
        function: The convolution.
        values: Its arguments by name.
        norm: The ``weight``, ``bias``, ``running_mean`` and ``running_var`` of the norm, ``(C,)`` each.
        eps: Added to the variance.
    """
    weight, bias, mean = values["weight"], values.get("bias"), norm["running_mean"]
    per_deviation = torch.rsqrt(norm["running_var"] + eps)
    scale = norm["weight"] * per_deviation
    centre = -mean if bias is None else bias - mean
    folded_weight = weight * scale.view(-1, *[1] * (weight.ndim - 1))
    shift = norm["bias"] + centre * scale
    output = function(**{**values, "weight": folded_weight, "bias": shift})
    values["scale"], values["centre"], values["per_deviation"] = scale, centre, per_deviation
    return output


@dataclass(frozen=True)
class _ScaledConvUse:
    """The weight gradient of a convolution whose output channels are scaled.

    Args:
        unscaled: The gradient before it is scaled, which is that of one convolution per sample.
        weight: The weight.
        scale: The factors, ``(C_out,)``.
    """

    unscaled: ConvUse
    weight: Tensor
    scale: Tensor
    _sums: list[ChannelScale] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.unscaled.shape

    def __len__(self) -> int:
        return len(self.unscaled)

    def _scaled(self) -> ConvUse:
        scale = self.scale.view(-1, *[1] * (self.unscaled.g.ndim - 3))
        return replace(self.unscaled, g=self.unscaled.g * scale)

    def rows(self, start: int, stop: int) -> ConvUse:
        return self._scaled().rows(start, stop)

    def gradient(self) -> Tensor:
        return self._scaled().gradient()

    def moments(self, wanted: Iterable[Moment]) -> Moments:
        joined = self.unscaled.joined(self.unscaled.x, self.unscaled.g)
        assert joined is not None  # otherwise scaling does not pay
        sums = ChannelScale.for_samples(len(self), self.weight, self.scale)
        self._sums[:] = [sums]
        return native_convolution(*joined, wanted, sums)

    def sums(self) -> ChannelScale:
        """Return the sums of each channel, which any computation of moments returns as well."""
        if not self._sums:
            self.moments([2.0])
        return self._sums[0]


def _folded(call: Call, g: Tensor) -> Iterator[tuple[str, Use]]:
    """Yield the uses of the convolution's parameters and of the norm's, from the gradient of the norm's output."""
    x, geometry = padded_input(call)
    values = call.values
    use = _ScaledConvUse(ConvUse(x, g, call.shape("weight"), geometry), values["weight"], values["scale"])
    yield "weight", use
    sums = use.sums()
    if "bias" in call.slots:
        yield "bias", RowsUse((sums.totals * values["scale"]).to(g.dtype))
    yield "norm_bias", RowsUse(sums.totals.to(g.dtype))
    yield (
        "norm_weight",
        RowsUse(((sums.products + sums.totals * values["centre"]) * values["per_deviation"]).to(g.dtype)),
    )


def _sums(call: Call, g: Tensor) -> dict[str, Tensor]:
    """Return the sums for all parameters but the norm's weight."""
    return {**of_convolution(call, g, call.values["scale"]), "norm_bias": g.sum(tuple(range(1, g.ndim)))}


FOLDED = Rule(
    _folded,
    ("input", "weight", "bias"),
    frozenset(["weight", "bias", "norm_weight", "norm_bias"]),
    first_axis,
    sums=_sums,
)
"""The rule of a folded layer. Its call also has ``scale``, ``centre``, which is the convolution's bias minus the mean, and
``per_deviation``, ``1 / sqrt(v + eps)``."""

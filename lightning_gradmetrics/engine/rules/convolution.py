"""Convolutions and transposed convolutions in one, two and three dimensions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_gradmetrics.engine.kernels import ConvGeometry
from lightning_gradmetrics.engine.rules.base import Call, first_axis, rule, summed
from lightning_gradmetrics.engine.uses import ConvUse, RowsUse, Use

__all__ = ["convolution", "transposed_convolution"]


def _tuple(value: Any, dims: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values


def _batched(call: Call) -> bool:
    return first_axis(call) and call.axis == call.out and call.values["input"].ndim == call.values["weight"].ndim


def _padded(
    call: Call, x: Tensor, kernel: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[Tensor, tuple[int, ...]]:
    """The input and its padding as whole numbers; padding that is one wider on the right is added to the input."""
    padding = call.get("padding", 0)
    if padding == "valid":
        return x, (0,) * len(kernel)
    if padding != "same":
        return x, _tuple(padding, len(kernel))
    total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if any(t % 2 for t in total):
        wider = F.pad(x.flatten(0, 1), [s for t in reversed(total) for s in (0, t % 2)])
        x = wider.reshape(*x.shape[:2], *wider.shape[1:])
    return x, tuple(t // 2 for t in total)


def _bias(g: Tensor) -> RowsUse:
    """``(N, times, C, *S)`` summed over everything but samples and channels."""
    return RowsUse(summed(g.transpose(1, 2)))


@rule(
    torch.conv1d,
    torch.conv2d,
    torch.conv3d,
    arguments="input weight bias stride padding dilation groups",
    weights="weight bias",
    accepts=_batched,
)
def convolution(call: Call, g: Tensor) -> Iterator[tuple[str, Use]]:
    """``y = x * W + b``: a kernel entry meets a shift of the input, and its gradient is that shift times ``g``."""
    if "bias" in call.slots:
        yield "bias", _bias(g)
    if "weight" in call.slots:
        shape = call.shape("weight")
        kernel = shape[2:]
        stride, dilation = (_tuple(call.get(name, 1), len(kernel)) for name in ("stride", "dilation"))
        x, padding = _padded(call, call.x, kernel, dilation)
        geometry = ConvGeometry(kernel, stride, padding, dilation, call.get("groups", 1))
        yield "weight", ConvUse(x.to(g.dtype), g, shape, geometry)


@rule(
    torch.conv_transpose1d,
    torch.conv_transpose2d,
    torch.conv_transpose3d,
    arguments="input weight bias stride padding output_padding groups dilation",
    weights="weight bias",
    accepts=_batched,
)
def transposed_convolution(call: Call, g: Tensor) -> Iterator[tuple[str, Use]]:
    """The gradient of a convolution's weight, with input and output gradient in each other's place."""
    if "bias" in call.slots:
        yield "bias", _bias(g)
    if "weight" in call.slots:
        shape = call.shape("weight")
        dims = len(shape) - 2
        stride, dilation = (_tuple(call.get(name, 1), dims) for name in ("stride", "dilation"))
        padding = _tuple(call.get("padding", 0), dims)
        geometry = ConvGeometry(shape[2:], stride, padding, dilation, call.get("groups", 1))
        yield "weight", ConvUse(g, call.x.to(g.dtype), shape, geometry)

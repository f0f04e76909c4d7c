"""Sums of the entries of each sample's gradient from a second formula, which checks a rule for every row of a batch.

Each function takes the arguments of a rule and returns the sums ``(N,)`` by the slot of the parameter. Slots without such a formula
are left out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_gradmetrics.engine.kernels import position_sums
from lightning_gradmetrics.engine.rules.base import Call, Rule
from lightning_gradmetrics.gradients.precision import at_least_float32, rounding

__all__ = [
    "of_batch_norm",
    "of_convolution",
    "of_embedding",
    "of_norm",
    "of_product",
    "of_transposed_convolution",
    "sums_of",
    "window_sums",
]


def _per_sample(terms: Tensor) -> Tensor:
    """Return the sum of the terms of each sample, ``(N,)``."""
    return at_least_float32(terms).sum(tuple(range(1, terms.ndim))) if terms.ndim > 1 else terms


def of_product(call: Call, g: Tensor) -> dict[str, Tensor]:
    """``sum_t (sum_o g_to) (sum_i a_ti)`` for the weight of ``y = a W^T + b``."""
    outputs = at_least_float32(g).sum(-1)
    sums = {"bias": _per_sample(outputs)} if "bias" in call.slots else {}
    if "weight" in call.slots:
        x = call.values["input"] if g.ndim == 2 else call.x
        sums["weight"] = _per_sample(at_least_float32(x).sum(-1).mul_(outputs))
    return sums


def of_embedding(call: Call, g: Tensor) -> dict[str, Tensor]:
    """The sum of the gradients of all rows that are looked up, without the padding."""
    padding = call.get("padding_idx", -1)
    outputs = at_least_float32(g).sum(-1)
    return {"weight": _per_sample(outputs if padding < 0 else outputs * (call.x != padding))}


def of_norm(call: Call, g: Tensor) -> dict[str, Tensor]:
    """The sums of ``g`` and of ``g x^``; the normalised input ``x^`` is the output of the layer without weight and bias."""
    sums = {"bias": _per_sample(g)} if "bias" in call.slots else {}
    if "weight" in call.slots:
        x, eps = at_least_float32(call.values["input"]), call.get("eps", 1e-5)
        if "normalized_shape" in call.values:
            normalised = torch.layer_norm(x, list(call.values["normalized_shape"]), None, None, eps)
        else:
            x = x.contiguous()  # torch's variance is not exact in the channels-last layout
            normalised = torch.group_norm(x, call.values["num_groups"], None, None, eps)
        sums["weight"] = _per_sample(call.axis.split(normalised).mul_(g))
    return sums


def of_batch_norm(call: Call, g: Tensor) -> dict[str, Tensor]:
    """The sums of ``g`` and of ``g (x - m) / sqrt(v + eps)``, with running statistics."""
    x, mean, variance, eps = map(call.values.__getitem__, ("input", "running_mean", "running_var", "eps"))
    if g.ndim == 2:
        total = at_least_float32(g)
        product = (x - mean) * total
    else:  # another kernel than that of the rule, in float64
        total, products = position_sums(g.transpose(1, 2), call.x.transpose(1, 2))
        assert products is not None
        product = products - total * mean
    return {"bias": total.sum(1), "weight": (product * torch.rsqrt(variance + eps)).sum(1)}


def of_convolution(call: Call, g: Tensor, factors: Tensor | None = None) -> dict[str, Tensor]:
    """``sum_p (sum_o g_po) (x * 1)_p`` for the weight: all output channels of a convolution with a weight of ones are equal.

    Args:
        call: The call.
        g: The gradient of its output, ``(N, times, C, *S)``.
        factors: Factors of its channels, ``(C,)``.
    """
    return _of_convolution(call, at_least_float32(g).flatten(0, 1), _FORWARD, factors)


def of_transposed_convolution(call: Call, g: Tensor) -> dict[str, Tensor]:
    """The same for a transposed convolution."""
    return _of_convolution(call, at_least_float32(g).flatten(0, 1), _TRANSPOSED, None)


_FORWARD = (torch.conv1d, torch.conv2d, torch.conv3d)
_TRANSPOSED = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)
_OPTIONS = ("stride", "padding", "output_padding", "dilation")


def _of_convolution(call: Call, g: Tensor, functions: tuple[Any, ...], factors: Tensor | None) -> dict[str, Tensor]:
    groups, kernel = call.get("groups", 1), call.shape("weight")[2:]
    x = call.x
    size, outputs, sums = len(x), _sum_of_groups(g, groups, factors), {}
    if "weight" in call.slots:
        inputs = _sum_of_groups(at_least_float32(x).flatten(0, 1), groups, None)
        options = {name: call.values[name] for name in _OPTIONS if name in call.values}
        if _is_pointwise(kernel, options):
            products = inputs * outputs
        else:
            products = window_sums(functions[len(kernel) - 1], inputs, kernel, options).mul_(outputs)
        sums["weight"] = _per_sample(products).reshape(size, -1).sum(1)
    if "bias" in call.slots:
        sums["bias"] = _per_sample(outputs).reshape(size, -1).sum(1)
    return sums


def window_sums(function: Any, inputs: Tensor, kernel: tuple[int, ...], options: Mapping[str, Any]) -> Tensor:
    """Return the convolution of each channel of ``(N, groups, *S)`` with a weight of ones; ``function`` is torch's convolution."""
    if function is torch.conv2d and inputs.is_cpu:
        stride, padding, dilation = (options.get(name, usual) for name, usual in _USUAL)
        if inputs.shape[1] == 1 and _is_pooling(inputs.shape[2:], kernel, padding, dilation):
            return F.avg_pool2d(inputs, kernel, stride, padding, divisor_override=1)
        inputs = inputs.contiguous(memory_format=torch.channels_last)  # otherwise small images take ten times as long
    ones = inputs.new_ones((inputs.shape[1], 1, *kernel))
    return function(inputs, ones, None, groups=inputs.shape[1], **options)  # type: ignore[no-any-return]


FEW_CHANNELS = 16
"""Largest number of channels of which a product with ones sums faster than torch's sum, if they are the last axis in memory."""

_USUAL = ("stride", 1), ("padding", 0), ("dilation", 1)


def _is_pooling(shape: Sequence[int], kernel: Sequence[int], padding: Any, dilation: Any) -> bool:
    """Return whether a pooling computes the same sums; for one channel it takes a tenth of the time of a convolution."""
    pads = (padding, padding) if isinstance(padding, int) else padding
    if isinstance(pads, str) or len(pads) != 2 or dilation not in (1, (1, 1), [1, 1]):
        return False
    return all(2 * pad <= width <= side + 2 * pad for pad, width, side in zip(pads, kernel, shape, strict=True))


def _is_pointwise(kernel: tuple[int, ...], options: Mapping[str, Any]) -> bool:
    """Return whether a convolution multiplies the channels of each position."""
    for name, usual in (("stride", 1), ("padding", 0), ("output_padding", 0)):
        value = options.get(name, usual)
        if {*value} != {usual} if isinstance(value, (tuple, list)) else value != usual:
            return False
    return math.prod(kernel) == 1


def _sum_of_groups(tensor: Tensor, groups: int, factors: Tensor | None) -> Tensor:
    """Return ``(N, groups, *S)``, the sums of the channels of each group times factors, from ``(N, C, *S)``."""
    if groups == 1:
        if factors is None and (tensor.shape[1] > FEW_CHANNELS or tensor.is_contiguous()):
            return tensor.sum(1, keepdim=True)
        return _over_channels(tensor, tensor.new_ones(tensor.shape[1]) if factors is None else factors.to(tensor.dtype))
    if factors is not None:
        tensor = tensor * factors.view(-1, *[1] * (tensor.ndim - 2))
    if groups == tensor.shape[1]:
        return tensor
    return tensor.unflatten(1, (groups, -1)).sum(2)  # type: ignore[no-untyped-call, no-any-return]


def _over_channels(tensor: Tensor, factors: Tensor) -> Tensor:
    """Return ``(N, 1, *S)``, the sum of the channels times factors ``(C,)``, from ``(N, C, *S)``."""
    if tensor.ndim == 2 or not tensor.is_contiguous():
        return (tensor.movedim(1, -1) @ factors).unsqueeze(1)
    return (factors @ tensor.flatten(2)).reshape(len(tensor), 1, *tensor.shape[2:])


def sums_of(rule: Rule, call: Call, g: Tensor) -> dict[str, Tensor]:
    """Return the sums of the entries of each sample's gradient for any rule; without a formula, by the function itself.

    Args:
        rule: The rule.
        call: The call.
        g: The gradient of its output, in the form that the rule takes.

    Returns:
        The sums ``(N,)`` by slot; slots for which they are unknown are left out.
    """
    if rule.sums is not None:
        return rule.sums(call, g)
    sums: dict[str, Tensor] = {}
    for slot in call.slots if rule.function is not None else ():
        slope = _slope(rule, call, slot)
        if slope is not None:
            sums[slot] = (call.out.split(slope).reshape(g.shape) * g).flatten(1).sum(1)
    return sums


def _slope(rule: Rule, call: Call, slot: str) -> Tensor | None:
    """Return how a call's output changes if all entries of one parameter grow by one; ``None`` if it is not linear in it."""
    values = {**call.values}
    given = list(itertools.takewhile(values.__contains__, rule.arguments))
    others = [name for name in rule.arguments[len(given) :] if name in values]
    outputs: list[Tensor] = []
    for step in (-1, 0, 1):
        values[slot] = call.values[slot] + step
        result = rule.function(*map(values.__getitem__, given), **{name: values[name] for name in others})
        outputs.append(at_least_float32(result))
    before, after = outputs[1] - outputs[0], outputs[2] - outputs[1]
    is_linear = bool((after - before).abs().amax() <= rounding(after) * after.abs().amax())
    return after if is_linear else None

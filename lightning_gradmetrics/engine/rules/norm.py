"""Normalisation layers: ``y = x^ w + b`` with the normalised input ``x^``."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_gradmetrics.classifier.frozen_norm import EarlyProduct, frozen_batch_norm
from lightning_gradmetrics.engine.kernels import (
    covers_channels_last,
    native_group_norm,
    native_group_norm_gradients,
    native_layer_norm,
    native_norm,
    norm_weight_rows,
    position_sums,
)
from lightning_gradmetrics.engine.kernels.native import supports
from lightning_gradmetrics.engine.rules.base import Call, first_axis, rule, wide
from lightning_gradmetrics.engine.rules.sums import of_batch_norm, of_norm
from lightning_gradmetrics.engine.uses import RowsUse, Use

__all__ = ["batch_norm", "channels_last_group_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm"]


FULL_PRECISION = (torch.float32, torch.float64)


def _channels(call: Call, normalised: Tensor, g: Tensor) -> Iterator[tuple[str, Use]]:
    """Yield the uses of ``w`` and ``b`` with one entry per channel, from ``(N, times, C, *S)``."""
    total, product = position_sums(g.transpose(1, 2), normalised.transpose(1, 2) if "weight" in call.slots else None)
    if "bias" in call.slots:
        yield "bias", RowsUse(total.to(wide(g.dtype)))
    if product is not None:
        yield "weight", RowsUse(product.to(wide(g.dtype)))


def _frozen_statistics(call: Call) -> bool:
    return first_axis(call) and not call.get("training", False)


def _run_frozen(values: dict[str, Any]) -> Tensor:
    x = values["input"]
    if x.ndim == 2 and len(x) > 1:  # without positions, torch's own backward pass is faster than a custom function
        return torch.batch_norm(**values)
    names = ("weight", "bias", "running_mean", "running_var", "eps", "cudnn_enabled")
    weight, bias, mean, variance, eps, cudnn = map(values.__getitem__, names)
    if x.requires_grad:
        values["early"] = EarlyProduct()
    return frozen_batch_norm(x, weight, bias, mean, variance, eps, cudnn, values.get("early"))


@rule(
    torch.batch_norm,
    arguments="input weight bias running_mean running_var training momentum eps cudnn_enabled",
    weights="weight bias",
    accepts=_frozen_statistics,
    run=_run_frozen,
    takes_rows=True,
    sums=of_batch_norm,
)
def batch_norm(call: Call, g: Tensor) -> Iterator[tuple[str, Use]]:
    """``sum (x - m) g / sqrt(v + eps)``, from two sums over the positions, without the normalised input."""
    if g.ndim == 2:
        yield from _without_positions(call, g)
        return
    rows = _by_kernel(call, g)
    if rows is not None:
        yield from rows.items()
        return
    total, product = position_sums(g.transpose(1, 2), call.x.transpose(1, 2) if "weight" in call.slots else None)
    if "bias" in call.slots:
        yield "bias", RowsUse(total.to(wide(g.dtype)))
    if product is not None:
        mean, variance = call.values["running_mean"], call.values["running_var"]
        scale = torch.rsqrt(variance + call.values["eps"])
        yield "weight", RowsUse(((product - total * mean) * scale).to(wide(g.dtype)))


def _by_kernel(call: Call, g: Tensor) -> dict[str, Use] | None:
    """Return the uses, computed in one pass together with the gradient of the input; ``None`` if the kernel does not cover the call."""
    values = call.values
    if call.slots != {"weight", "bias"} or call.axis.minor or values["input"].ndim < 3 or not supports(g, ()):
        return None
    gradient, early = _base(g.flatten(0, 1)), values.get("early")
    is_early = early is not None and not early.is_late and gradient is g._base
    statistics = (values["running_mean"], values["running_var"], values["eps"])
    found = native_norm(values["input"], gradient, *statistics, values["weight"] if is_early else None)
    if found is None:
        return None
    if early is not None and found.product is not None:
        early.set(gradient, found.product)
    return {"bias": RowsUse(_over_inputs(found.bias, g)), "weight": RowsUse(_over_inputs(found.weight, g))}


def _over_inputs(rows: Tensor, g: Tensor) -> Tensor:
    """Return the sum of ``(N times, C)`` over the inputs of each sample, for a gradient ``(N, times, C, *S)``."""
    return rows if g.shape[1] == 1 else rows.unflatten(0, g.shape[:2]).sum(1)  # type: ignore[no-untyped-call]


def _base(view: Tensor) -> Tensor:
    """Return the tensor of which a tensor is a view, if both are the same; otherwise the view."""
    base = view._base
    if base is None or base.shape != view.shape or base.stride() != view.stride() or base.dtype != view.dtype:
        return view
    return base if base.data_ptr() == view.data_ptr() else view


def _without_positions(call: Call, g: Tensor) -> Iterator[tuple[str, Use]]:
    """Yield the uses for inputs ``(N, C)``, where there is nothing to sum."""
    g = g.to(wide(g.dtype))
    if "bias" in call.slots:
        yield "bias", RowsUse(g)
    if "weight" in call.slots:
        x, mean, variance, eps = map(call.values.__getitem__, ("input", "running_mean", "running_var", "eps"))
        product = norm_weight_rows(x, g, mean, variance, eps)
        if product is None:
            product = (((x.to(g.dtype) - mean) * torch.rsqrt(variance + eps)) * g).to(g.dtype)
        yield "weight", RowsUse(product)


class _GroupNorm(torch.autograd.Function):
    """A group norm whose parameters are constant; a hook of its output may compute the gradient of its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: dict[str, Any]) -> Tensor:
        weight, bias, groups, eps = (values[name] for name in ("weight", "bias", "num_groups", "eps"))
        sizes = len(x), x.shape[1], x[0, 0].numel()
        y, mean, scale = torch.native_group_norm(x, weight, bias, *sizes, groups, eps)
        values["mean"], values["scale"], ctx.early = mean, scale, values["early"]
        ctx.save_for_backward(x, mean, scale, weight)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None]:  # type: ignore[override]
        product = ctx.early.taken(gradient)
        if product is None:
            x, mean, scale, weight = ctx.saved_tensors
            sizes = len(x), x.shape[1], x[0, 0].numel(), mean.shape[1]
            arguments = gradient.contiguous(), x, mean, scale, weight, *sizes, [True, False, False]
            product = torch.ops.aten.native_group_norm_backward(*arguments)[0]
        return product, None


def _run_group_norm(values: dict[str, Any]) -> Tensor:
    """Return the output of a group norm, and add the ``mean`` and ``scale`` ``(N, groups)`` of each group to the arguments."""
    x = values["input"]
    is_dense = x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))
    if not is_dense or x.dtype not in FULL_PRECISION or torch.is_autocast_enabled(x.device.type):
        return torch.group_norm(**values)
    weight, bias = values.setdefault("weight", None), values.setdefault("bias", None)
    groups, eps = values["num_groups"], values.setdefault("eps", 1e-5)
    if x.requires_grad and weight is not None and x.numel() and x.is_contiguous() and supports(x, ()):
        values["early"] = EarlyProduct()
        return _GroupNorm.apply(x, values)  # type: ignore[no-untyped-call, no-any-return]
    sizes = len(x), x.shape[1], x[0, 0].numel()
    y, values["mean"], values["scale"] = torch.native_group_norm(x, weight, bias, *sizes, groups, eps)
    return y


class _ChannelsLastGroupNorm(torch.autograd.Function):
    """A group norm in the channels-last layout; a hook of its output may compute the gradient of its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, values: dict[str, Any]) -> Tensor:
        y, values["mean"], values["scale"] = native_group_norm(x, values["num_groups"], weight, bias, values["eps"])
        ctx.early = values["early"]
        ctx.save_for_backward(x, values["mean"], values["scale"], weight)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        product = ctx.early.taken(gradient)
        if product is not None and not any(ctx.needs_input_grad[1:]):
            return product, None, None, None
        x, mean, scale, weight = ctx.saved_tensors
        rows = native_group_norm_gradients(x, gradient, mean, scale, weight, True)
        assert rows is not None
        return rows.product, rows.weight.sum(0), rows.bias.sum(0), None


def channels_last_group_norm(values: dict[str, Any]) -> Tensor | None:
    """Return the output of a group norm in the channels-last layout, where that of torch is not exact.

    Adds the ``mean`` and ``scale`` ``(N, groups)`` of each group to the arguments.

    Args:
        values: The arguments by name.

    Returns:
        The output, which is differentiable; ``None`` if the kernel does not cover the call.
    """
    x, weight, bias = values["input"], values.get("weight"), values.get("bias")
    if weight is None or bias is None or torch.is_autocast_enabled("cpu") or x.is_contiguous():
        return None
    if not covers_channels_last(x, weight, bias):
        return None
    values["early"], values["eps"] = EarlyProduct(), values.get("eps", 1e-5)
    return _ChannelsLastGroupNorm.apply(x, weight, bias, values)  # type: ignore[no-untyped-call, no-any-return]


def _group_norm_by_kernel(call: Call, g: Tensor) -> dict[str, Use] | None:
    """Return the uses, computed together with the gradient of the input; ``None`` if the kernel does not cover the call."""
    values = call.values
    if call.slots != {"weight", "bias"} or call.axis.times != 1:
        return None
    gradient, early = _base(g.squeeze(1)), values.get("early")
    is_early = early is not None and not early.is_late and gradient is g._base
    mean, scale, weight = map(values.__getitem__, ("mean", "scale", "weight"))
    found = native_group_norm_gradients(values["input"], gradient, mean, scale, weight, is_early)
    if found is None:
        return None
    if early is not None and found.product is not None:
        early.set(gradient, found.product)
    return {"bias": RowsUse(found.bias), "weight": RowsUse(found.weight)}


@rule(
    torch.group_norm,
    arguments="input num_groups weight bias eps cudnn_enabled",
    weights="weight bias",
    run=_run_group_norm,
    sums=of_norm,
)
def group_norm(call: Call, g: Tensor) -> Iterator[tuple[str, Use]]:
    """Group norm: ``sum (x - m) g s`` over the positions, with mean ``m`` and scale ``s`` of a group of channels of one sample.

    The two sums of ``x g`` and of ``g`` need no normalised input, as in the backward pass of torch.
    """
    groups = call.values["num_groups"]
    if "mean" not in call.values:
        normalised = F.group_norm(call.values["input"].to(wide(g.dtype)), groups, eps=call.get("eps", 1e-5))
        yield from _channels(call, call.axis.split(normalised), g)
        return
    uses = _group_norm_by_kernel(call, g)
    if uses is not None:
        yield from uses.items()
        return
    rows = g.flatten(0, 1)
    total, product = position_sums(rows, call.values["input"] if "weight" in call.slots else None)
    if "bias" in call.slots:
        yield "bias", RowsUse(total.reshape(*g.shape[:3]).sum(1).to(wide(g.dtype)))
    if product is not None:
        per_channel = rows.shape[1] // groups
        mean, scale = (call.values[name].repeat_interleave(per_channel, 1) for name in ("mean", "scale"))
        yield "weight", RowsUse(((product - total * mean) * scale).reshape(*g.shape[:3]).sum(1).to(wide(g.dtype)))


@rule(
    torch.instance_norm,
    arguments="input weight bias running_mean running_var use_input_stats momentum eps cudnn_enabled",
    weights="weight bias",
)
def instance_norm(call: Call, g: Tensor) -> Iterator[tuple[str, Use]]:
    """Instance norm: normalises over the positions of one channel of one sample, or by the running statistics."""
    x = call.values["input"].to(wide(g.dtype))
    if call.get("use_input_stats", True):
        normalised = F.instance_norm(x, eps=call.values["eps"])
    else:  # the forward pass of torch loses digits where the mean is much larger than the deviation
        mean, variance = (call.values[name].view(-1, *[1] * (x.ndim - 2)) for name in ("running_mean", "running_var"))
        normalised = (x - mean) * torch.rsqrt(variance + call.values["eps"])
    yield from _channels(call, call.axis.split(normalised), g)


def _before_shape(values: dict[str, Any]) -> int:
    return int(values["input"].ndim) - len(values["normalized_shape"])


def _outside(call: Call) -> bool:
    """Return whether the samples are not on a normalised axis."""
    ndim = call.values["input"].ndim - len(call.values["normalized_shape"])
    return call.axis == call.out and call.axis.dim < ndim


def _trailing(call: Call, normalised: Tensor, g: Tensor) -> Iterator[tuple[str, Use]]:
    """Yield the uses of ``w`` and ``b`` over the last axes, from ``(N, times, *positions, *shape)``."""
    shape = tuple(call.values["normalized_shape"])
    columns = _positions(call, normalised).mT if "weight" in call.slots else None
    total, product = position_sums(_as_positions(g, shape).mT, columns)
    if "bias" in call.slots:
        yield "bias", RowsUse(total.to(wide(g.dtype)).reshape(-1, *shape))
    if product is not None:
        yield "weight", RowsUse(product.to(wide(g.dtype)).reshape(-1, *shape))


def _as_positions(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Return ``(N, times, *positions, *shape)`` as ``(N, P, D)``."""
    entries = math.prod(shape)
    return tensor.reshape(len(tensor), tensor[0].numel() // entries, entries)


def _positions(call: Call, tensor: Tensor) -> Tensor:
    """Return a tensor with the shape of the input as ``(N, P, D)``."""
    return _as_positions(call.axis.split(tensor), call.values["normalized_shape"])


@rule(
    torch.layer_norm,
    arguments="input normalized_shape weight bias eps cudnn_enable",
    weights="weight bias",
    accepts=_outside,
    row_axes=_before_shape,
    sums=of_norm,
)
def layer_norm(call: Call, g: Tensor) -> Iterator[tuple[str, Use]]:
    """Layer norm: normalises over the last axes."""
    shape, eps = list(call.values["normalized_shape"]), call.get("eps", 1e-5)
    rows = native_layer_norm(_positions(call, call.values["input"]), _as_positions(g, shape), eps)
    if rows is not None:
        for slot, row in zip(("bias", "weight"), rows, strict=True):
            if slot in call.slots:
                yield slot, RowsUse(row.reshape(-1, *shape))
        return
    normalised = F.layer_norm(call.values["input"].to(wide(g.dtype)), shape, eps=eps)
    yield from _trailing(call, normalised, g)


@rule(
    torch.rms_norm,
    arguments="input normalized_shape weight eps",
    weights="weight",
    accepts=_outside,
    row_axes=_before_shape,
)
def rms_norm(call: Call, g: Tensor) -> Iterator[tuple[str, Use]]:
    """RMS norm: divides by the root mean square over the last axes."""
    shape = list(call.values["normalized_shape"])
    yield from _trailing(call, F.rms_norm(call.values["input"].to(wide(g.dtype)), shape, eps=call.get("eps")), g)

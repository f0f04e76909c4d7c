"""Convolutions and transposed convolutions in one, two and three dimensions."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_gradmetrics.engine.kernels import ConvGeometry, PositionTotals
from lightning_gradmetrics.engine.kernels.convolution import scaled_products_pay
from lightning_gradmetrics.engine.kernels.native import supports
from lightning_gradmetrics.engine.rules.base import Call, first_axis, rule, summed
from lightning_gradmetrics.engine.rules.sums import of_convolution, of_transposed_convolution
from lightning_gradmetrics.engine.tracing.axes import Axis
from lightning_gradmetrics.engine.uses import ConvUse, RowsUse, Use
from lightning_gradmetrics.gradients.statistics import Moment

__all__ = ["convolution", "padded_input", "scaling_pays", "transposed_convolution", "weight_dominates"]

WEIGHT_ENTRIES_PER_INPUT_ENTRY = 32
"""Smallest ratio of a weight's entries to those of one sample's input at which the layout of the weight decides the time; measured."""

_FUNCTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)
_FULL_PRECISION = (torch.float32, torch.float64)


def _tuple(value: Any, dims: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values


def _batched(call: Call) -> bool:
    return first_axis(call) and call.axis == call.out and call.values["input"].ndim == call.values["weight"].ndim


def _padded(
    call: Call, x: Tensor, kernel: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[Tensor, tuple[int, ...]]:
    """Return the input and its padding as integers; asymmetric padding on the right is added to the input."""
    padding = call.get("padding", 0)
    if padding == "valid":
        return x, (0,) * len(kernel)
    if padding != "same":
        return x, _tuple(padding, len(kernel))
    padding_on_both_sides: list[int] = []
    extra_on_the_right: list[int] = []  # of the last axis first, as F.pad takes it
    for step, length in zip(dilation, kernel, strict=True):
        half, odd = divmod(step * (length - 1), 2)
        padding_on_both_sides.append(half)
        extra_on_the_right = [0, odd, *extra_on_the_right]
    if any(extra_on_the_right):
        wider = F.pad(x.flatten(0, 1), extra_on_the_right)
        x = wider.reshape(*x.shape[:2], *wider.shape[1:])
    return x, tuple(padding_on_both_sides)


def weight_dominates(values: dict[str, Any]) -> bool:
    """Return whether a convolution on the CPU takes less time with a contiguous input, because its weight is contiguous and large.

    For an input in the channels-last layout, torch copies the weight to that layout in the forward and in the backward pass.
    The decision does not depend on the number of samples, so a probe runs in the same layouts as a batch.
    """
    x, weight = values["input"], values["weight"]
    if x.ndim != weight.ndim or not x.is_cpu or weight.shape[2:].numel() == 1 or not weight.is_contiguous():
        return False
    return bool(weight.numel() >= WEIGHT_ENTRIES_PER_INPUT_ENTRY * x.shape[1:].numel())


def _run(values: dict[str, Any]) -> Tensor:
    """Return the output; that of images with one position on a CPU is a product, for which torch does not copy the weight."""
    x, weight = values["input"], values["weight"]
    if not _is_product(x, weight, values):
        output: Tensor = _FUNCTIONS[weight.ndim - 3](**values)
        return output
    rows = F.linear(x.flatten(1), weight.flatten(1), values.get("bias"))
    if x.ndim == 4 and x.stride(3) == x.shape[1]:  # as in the channels-last layout
        return rows.view(len(x), 1, 1, -1).permute(0, 3, 1, 2)
    return rows.view(*rows.shape, *x.shape[2:])


def _is_product(x: Tensor, weight: Tensor, values: Mapping[str, Any]) -> bool:
    if weight.shape[2:].numel() > 1 or x.ndim != weight.ndim or x.shape[2:].numel() != 1 or not x.is_cpu:
        return False
    padding = values.get("padding", 0)
    is_padded = padding not in ("valid", "same") and any(_tuple(padding, weight.ndim - 2))
    return values.get("groups", 1) == 1 and not is_padded and x.dtype == weight.dtype in _FULL_PRECISION


@rule(
    torch.conv1d,
    torch.conv2d,
    torch.conv3d,
    arguments="input weight bias stride padding dilation groups",
    weights="weight bias",
    accepts=_batched,
    run=_run,
    dense=weight_dominates,
    sums=of_convolution,
)
def convolution(call: Call, g: Tensor) -> Iterator[tuple[str, Use]]:
    """``y = x * W + b``: a kernel entry multiplies a shifted input, and its gradient is that input times ``g``."""
    totals = PositionTotals() if "bias" in call.slots else None
    if "weight" in call.slots:
        x, geometry = padded_input(call)
        yield "weight", ConvUse(x.to(g.dtype), g, call.shape("weight"), geometry, totals)
    if totals is not None:
        yield "bias", RowsUse(totals.rows(g.transpose(1, 2)))


def padded_input(call: Call) -> tuple[Tensor, ConvGeometry]:
    """Return the input ``(N, times, C, *S)`` of a convolution, padded if the geometry cannot describe that, and the geometry."""
    kernel = call.shape("weight")[2:]
    stride = _tuple(call.get("stride", 1), len(kernel))
    dilation = _tuple(call.get("dilation", 1), len(kernel))
    x, padding = _padded(call, call.x, kernel, dilation)
    return x, _geometry(kernel, stride, padding, dilation, call.get("groups", 1))


@functools.lru_cache(maxsize=512)
def _geometry(
    kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...], dilation: tuple[int, ...], groups: int
) -> ConvGeometry:
    """Return the same geometry for the same fields."""
    return ConvGeometry(kernel, stride, padding, dilation, groups)


def scaling_pays(values: Mapping[str, Any], axis: Axis, wanted: Collection[Moment]) -> bool:
    """Return whether to scale the output of a convolution in the kernel of its weight gradient; see :func:`.scaled_products_pay`.

    Args:
        values: The arguments by name.
        axis: The sample axis of the input.
        wanted: The moments to compute.
    """
    x, keys = values["input"], frozenset(wanted)
    fields: list[Any] = []
    for name in ("stride", "padding", "dilation", "groups"):
        value = values.get(name)
        fields.append(tuple(value) if isinstance(value, list) else value)
    shapes = x.shape, values["weight"].shape
    return supports(x, keys) and _scaling_pays(*shapes, axis, x.dtype, tuple(fields), keys, torch.get_num_threads())


@functools.lru_cache(maxsize=4096)
def _scaling_pays(
    shape: torch.Size,
    weight_shape: torch.Size,
    axis: Axis,
    dtype: torch.dtype,
    fields: tuple[Any, ...],
    keys: frozenset[Moment],
    threads: int,
) -> bool:
    """Return the same for a type that the kernels support and a number of threads."""
    with torch._C.DisableTorchFunction(), torch.no_grad():
        x, weight = (torch.empty(1, dtype=dtype).expand(size) for size in (shape, weight_shape))
        values = dict(zip(("stride", "padding", "dilation", "groups"), fields, strict=True))
        padded, geometry = padded_input(Call({"input": x, "weight": weight, **values}, axis, axis, frozenset()))
        joined = geometry.joined(padded)
        return joined is not None and scaled_products_pay(joined[0], len(weight), joined[1], keys)


@rule(
    torch.conv_transpose1d,
    torch.conv_transpose2d,
    torch.conv_transpose3d,
    arguments="input weight bias stride padding output_padding groups dilation",
    weights="weight bias",
    accepts=_batched,
    sums=of_transposed_convolution,
)
def transposed_convolution(call: Call, g: Tensor) -> Iterator[tuple[str, Use]]:
    """The gradient of a convolution's weight, with input and output gradient exchanged."""
    if "bias" in call.slots:
        yield "bias", RowsUse(summed(g.transpose(1, 2)))
    if "weight" in call.slots:
        shape = call.shape("weight")
        dims = len(shape) - 2
        stride = _tuple(call.get("stride", 1), dims)
        dilation = _tuple(call.get("dilation", 1), dims)
        padding = _tuple(call.get("padding", 0), dims)
        geometry = ConvGeometry(shape[2:], stride, padding, dilation, call.get("groups", 1))
        yield "weight", ConvUse(g, call.x.to(g.dtype), shape, geometry)

"""Convolutions of one to three spatial dimensions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from operator import mul

import torch
from torch import Tensor

from lightning_gradmetrics.engine.kernels.fused import fused_depthwise, fused_products, fused_rows, fused_supports
from lightning_gradmetrics.engine.kernels.geometry import ConvGeometry
from lightning_gradmetrics.engine.kernels.gram import conv_gram_pays, conv_square
from lightning_gradmetrics.engine.kernels.lanes import native_convolution
from lightning_gradmetrics.engine.kernels.native import supports
from lightning_gradmetrics.engine.kernels.operators import operator
from lightning_gradmetrics.engine.kernels.reduction import chosen_moments, chunked_moments
from lightning_gradmetrics.engine.kernels.totals import PositionTotals, empty_results, operator_results
from lightning_gradmetrics.engine.kernels.traced import in_graph, key_names, keys_of, named_moments
from lightning_gradmetrics.gradients.precision import at_least_float32
from lightning_gradmetrics.gradients.statistics import Moment, Moments, accumulator

__all__ = ["conv_gradient", "conv_moments", "scaled_products_pay"]

MOST_ENTRIES_PER_POSITION = 16
"""Largest ratio of entries of an output channel's weight to output positions for which scaling the output in the kernel pays."""


def conv_gradient(x: Tensor, g: Tensor, geometry: ConvGeometry) -> Tensor:
    """Return per-sample weight gradients of a convolution.

    ``G_n[o, i, k] = sum_p g_n[o, p] x_n[i, stride p + dilation k - padding]``

    A transposed convolution's weight ``(C_in, C_out / groups, *k)`` has the same gradient with the roles swapped: pass
    the gradient of its output as ``x`` and its input as ``g``.

    Args:
        x: The layer's input, ``(N, C_in, *S)`` with one to three spatial dimensions. For any padding other
            than symmetric zeros, pad it first and use a geometry without padding.
        g: The gradient of its output, ``(N, C_out, *S')``.
        geometry: Kernel size, stride, padding, dilation and groups.

    Returns:
        ``(N, C_out, C_in / groups, *kernel_size)``.

    Example:
        >>> geometry = ConvGeometry((2,), (1,), (0,), (1,))
        >>> conv_gradient(torch.ones(1, 1, 4), torch.ones(1, 1, 3), geometry)
        tensor([[[[3., 3.]]]])
    """
    (samples, outputs), groups = g.shape[:2], geometry.groups
    x = x.to(g.dtype)
    if _is_depthwise(x, g, geometry) and _covers(x, g, geometry):
        return _depthwise_gradient(x, g, geometry)
    inputs, positions = x.shape[1] // groups, g.shape[2:].numel()
    patches = _patches(x, g.shape[2:], geometry).reshape(samples, groups, inputs * geometry.entries, positions)
    gradient = g.reshape(samples, groups, outputs // groups, positions) @ patches.mT
    return gradient.reshape(samples, outputs, inputs, *geometry.kernel_size)


def _is_depthwise(x: Tensor, g: Tensor, geometry: ConvGeometry) -> bool:
    """Return whether each channel has one filter."""
    return geometry.groups == g.shape[1] == x.shape[1]


def _covers(x: Tensor, g: Tensor, geometry: ConvGeometry) -> bool:
    """Return whether ``g`` has all output positions of ``x`` (not always so if roles are swapped), in a supported type."""
    full = geometry.output_size(x.shape[2:])
    return g.numel() > 0 and full == tuple(g.shape[2:]) and g.dtype in (torch.float32, torch.float64)


def _depthwise_gradient(x: Tensor, g: Tensor, geometry: ConvGeometry) -> Tensor:
    """Return the weight gradients by one depthwise convolution whose groups are the samples."""
    (samples, channels), dims = g.shape[:2], len(geometry.kernel_size)
    groups = samples * channels
    x, g = x.reshape(1, groups, *x.shape[2:]), g.reshape(1, groups, *g.shape[2:])
    weight = x.new_empty(groups, 1, *geometry.kernel_size)
    where = (list(geometry.stride), list(geometry.padding), list(geometry.dilation), False, [0] * dims, groups)
    gradient = torch.ops.aten.convolution_backward(g, x, weight, None, *where, [False, True, False])[1]
    return gradient.reshape(samples, channels, 1, *geometry.kernel_size)  # type: ignore[no-any-return]


def _patches(x: Tensor, size: Sequence[int], geometry: ConvGeometry) -> Tensor:
    """Return the input at each kernel entry and output position: a view ``(N, C, *k, *S')`` of the padded input."""
    x = geometry.pad(x)
    strides = list(x.stride()[:2])
    for moves in (geometry.dilation, geometry.stride):
        strides += map(mul, x.stride()[2:], moves)
    return x.as_strided((*x.shape[:2], *geometry.kernel_size, *size), strides)


def conv_moments(
    x: Tensor, g: Tensor, geometry: ConvGeometry, wanted: Iterable[Moment], totals: PositionTotals | None = None
) -> Moments:
    """Return moments of the per-sample weight gradients of a convolution; see :func:`conv_gradient` for the other arguments.

    Args:
        x: The layer's input.
        g: The gradient of its output.
        geometry: Kernel size, stride, padding, dilation and groups.
        wanted: The moments to compute.
        totals: Receives the sums of ``g`` over the positions, if they are computed in the same call.

    Returns:
        Each moment of the weight's entries, ``(N,)``.

    Example:
        >>> geometry = ConvGeometry((2,), (1,), (0,), (1,))
        >>> conv_moments(torch.ones(1, 1, 4), torch.ones(1, 1, 3), geometry, ["sum"])
        {'sum': tensor([6.], dtype=torch.float64)}
    """
    keys = frozenset(wanted)
    if g.numel() and keys != {"sum"} and fused_supports(g, keys) and x.dtype == g.dtype:
        return _fused(x, g, geometry, keys)
    if in_graph(g):
        names = key_names(keys)
        rows, *sums = _conv_moments(x, g, geometry.numbers(), names, totals is not None)
        if totals is not None:
            totals.value = sums[0]
        return named_moments(rows, names)
    return _unfused(x, g, geometry, keys, totals)


@operator(
    "(Tensor x, Tensor g, int[] geometry, str names, bool with_totals) -> Tensor[]",
    lambda x, g, geometry, names, with_totals: empty_results(g, len(keys_of(names)), g.shape[1] if with_totals else 0),
)
def _conv_moments(x: Tensor, g: Tensor, geometry: Sequence[int], names: str, with_totals: bool) -> list[Tensor]:
    totals = PositionTotals() if with_totals else None
    found = _unfused(x, g, ConvGeometry.of_numbers(tuple(geometry)), frozenset(keys_of(names)), totals)
    return operator_results(found, names, totals, g)


def _unfused(
    x: Tensor, g: Tensor, geometry: ConvGeometry, keys: frozenset[Moment], totals: PositionTotals | None = None
) -> Moments:
    """Return the moments on a CPU, or by plain torch."""
    g = at_least_float32(g)
    x = x.to(g.dtype)
    if keys == {"sum"}:
        return {"sum": _total(x, g, geometry)}
    gram = 2.0 in keys and keys <= {"sum", 2.0} and g.numel() > 0
    if gram and conv_gram_pays(x, g, geometry):
        return _by_gram(x, g, geometry, keys)
    return _by_products(x, g, geometry, keys, totals)


def scaled_products_pay(x: Tensor, outputs: int, geometry: ConvGeometry, wanted: Iterable[Moment]) -> bool:
    """Return whether scaling the output of a convolution in the kernel of its weight gradient saves time.

    The kernel must run anyway, and few of its operations should be those that every entry of the gradient costs.

    Args:
        x: ``(N, C_in, *S)``.
        outputs: The number of output channels.
        geometry: Kernel size, stride, padding, dilation and groups.
        wanted: The moments to compute.
    """
    keys = frozenset(wanted)
    size = geometry.output_size(x.shape[2:])
    g = torch.empty(1, dtype=x.dtype).expand(len(x), outputs, *size)
    if keys == {"sum"} or not supports(x, keys) or 0 in size:
        return False
    if keys <= {"sum", 2.0} and conv_gram_pays(x, g, geometry):
        return False
    return x.shape[1] // geometry.groups * geometry.entries <= MOST_ENTRIES_PER_POSITION * math.prod(size)


def _fused(x: Tensor, g: Tensor, geometry: ConvGeometry, keys: frozenset[Moment]) -> Moments:
    """Return the moments on a CUDA device."""
    if _is_depthwise(x, g, geometry):
        return fused_rows(fused_depthwise(x, g, geometry).flatten(1), keys)
    return fused_products(x, g, geometry, keys)


def _by_gram(x: Tensor, g: Tensor, geometry: ConvGeometry, keys: frozenset[Moment]) -> Moments:
    """Return the sum of squares, and the sum if it is wanted, from Gram matrices."""

    def direct(rows: Tensor) -> Tensor:
        return _by_products(x[rows], g[rows], geometry, frozenset({2.0}))[2.0]

    moments = conv_square(x, g, geometry, direct, "sum" in keys)
    if keys > moments.keys():
        moments["sum"] = _total(x, g, geometry)
    return chosen_moments(moments, keys)


def _by_products(
    x: Tensor, g: Tensor, geometry: ConvGeometry, keys: frozenset[Moment], totals: PositionTotals | None = None
) -> Moments:
    """Return moments from the products; the compiled kernels never write the weight gradients to memory."""
    if g.numel() and supports(g, keys):
        return native_convolution(x, g, geometry, keys, totals=totals)
    entries = g.shape[1] * x.shape[1] // geometry.groups * geometry.entries
    return chunked_moments(lambda rows: conv_gradient(x[rows], g[rows], geometry), g, entries, keys)


def _total(x: Tensor, g: Tensor, geometry: ConvGeometry) -> Tensor:
    """Return the sum of a weight gradient's entries, from the sums over channels."""
    inputs, gradients = _channel_sums(x, geometry.groups), _channel_sums(g, geometry.groups)
    return conv_gradient(inputs, gradients, geometry).flatten(1).sum(1)


def _channel_sums(t: Tensor, groups: int) -> Tensor:
    """Return sum ``(N, C, *S)`` over the channels of each group, to ``(N, groups, *S)``."""
    return t.reshape(len(t), groups, t.shape[1] // groups, *t.shape[2:]).sum(2, dtype=accumulator(t))

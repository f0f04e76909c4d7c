"""Convolutions of one to three spatial dimensions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_gradmetrics.engine.kernels.fused import fused_depthwise, fused_products, fused_rows, fused_supports
from lightning_gradmetrics.engine.kernels.gram import conv_gram_pays, conv_square, form
from lightning_gradmetrics.engine.kernels.native import native_products, supports
from lightning_gradmetrics.engine.kernels.reduction import chunked_moments
from lightning_gradmetrics.gradients.statistics import Moment, Moments, accumulator

__all__ = ["conv_gradient", "conv_moments"]

DEPTHWISE_ENTRIES = 16
"""Kernel entries below which torch's depthwise gradients, reduced afterwards, beat the fused product: measured."""


def conv_gradient(
    x: Tensor,
    g: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
) -> Tensor:
    """Per-sample weight gradients of a convolution.

    ``G_n[o, i, k] = sum_p g_n[o, p] x_n[i, stride p + dilation k - padding]``

    A transposed convolution's weight ``(C_in, C_out / groups, *k)`` has the same gradient with the roles swapped: pass
    the gradient of its output as ``x`` and its input as ``g``.

    Args:
        x: The layer's input, ``(N, C_in, *S)`` with one to three spatial dimensions. Pad it beforehand for other
            paddings than symmetric zeros, and give ``padding`` zeros.
        g: The gradient of its output, ``(N, C_out, *S')``.
        kernel_size: One integer a spatial dimension.
        stride: The same.
        padding: The same: zeros added on both sides.
        dilation: The same.
        groups: Number of groups.

    Returns:
        ``(N, C_out, C_in / groups, *kernel_size)``.

    Example:
        >>> conv_gradient(torch.ones(1, 1, 4), torch.ones(1, 1, 3), [2], [1], [0], [1])
        tensor([[[[3., 3.]]]])
    """
    n, channels = g.shape[:2]
    x = x.to(g.dtype)
    if groups == channels == x.shape[1] and _fits(x, g, kernel_size, stride, padding, dilation):
        return _depthwise_gradient(x, g, kernel_size, stride, padding, dilation)
    patches = _patches(x, g.shape[2:], kernel_size, stride, padding, dilation)
    patches = patches.reshape(n, groups, x.shape[1] // groups * math.prod(kernel_size), math.prod(g.shape[2:]))
    flat = g.reshape(n, groups, channels // groups, patches.shape[-1])
    return (flat @ patches.mT).reshape(n, channels, x.shape[1] // groups, *kernel_size)


def _fits(
    x: Tensor,
    g: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> bool:
    """Whether ``g`` covers all that ``x`` allows (with swapped roles it may cover less), in a type every backend takes."""
    spec = zip(x.shape[2:], kernel_size, stride, padding, dilation, strict=True)
    full = tuple((s + 2 * p - d * (k - 1) - 1) // t + 1 for s, k, t, p, d in spec)
    return g.numel() > 0 and full == tuple(g.shape[2:]) and g.dtype in (torch.float32, torch.float64)


def _depthwise_gradient(
    x: Tensor,
    g: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """The samples as groups of one depthwise convolution."""
    n, channels = g.shape[:2]
    weight = x.new_empty(n * channels, 1, *kernel_size)
    x, g = (t.reshape(1, n * channels, *t.shape[2:]) for t in (x, g))
    options = ([*stride], [*padding], [*dilation], False, [0] * len(kernel_size), n * channels, [False, True, False])
    gradient = torch.ops.aten.convolution_backward(g, x, weight, None, *options)[1]
    return gradient.reshape(n, channels, 1, *kernel_size)  # type: ignore[no-any-return]


def _patches(
    x: Tensor,
    size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """What each kernel entry meets at each output position: a view ``(N, C, *k, *S')`` of the padded input."""
    if any(padding):
        x = F.pad(x, [p for pad in reversed(padding) for p in (pad, pad)])
    steps = x.stride()[2:]
    strides = (
        *x.stride()[:2],
        *(s * d for s, d in zip(steps, dilation, strict=True)),
        *(s * d for s, d in zip(steps, stride, strict=True)),
    )
    return x.as_strided((*x.shape[:2], *kernel_size, *size), strides)


def conv_moments(
    x: Tensor,
    g: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    wanted: Iterable[Moment],
) -> Moments:
    """Moments of the per-sample weight gradients of a convolution; see :func:`conv_gradient` for the arguments.

    Returns:
        Each moment of the weight's entries, ``(N,)``.

    Example:
        >>> conv_moments(torch.ones(1, 1, 4), torch.ones(1, 1, 3), [2], [1], [0], [1], 1, ["sum"])
        {'sum': tensor([6.], dtype=torch.float64)}
    """
    keys, spec = frozenset(wanted), (kernel_size, stride, padding, dilation)
    if g.numel() and keys != {"sum"} and fused_supports(g, keys) and x.dtype == g.dtype:
        return _fused(x, g, *spec, groups, keys)
    if g.dtype in (torch.float16, torch.bfloat16):
        g = g.float()
    x = x.to(g.dtype)
    channels, outputs = x.shape[1] // groups, g.shape[1] // groups
    if keys == {"sum"}:
        return {"sum": _total(x, g, *spec, groups)}
    gram = 2.0 in keys and keys <= {"sum", 2.0} and g.numel() > 0
    if gram and conv_gram_pays(channels, outputs, x.shape[2:], g.shape[2:], kernel_size, padding, *form(g, groups)):

        def direct(rows: Tensor) -> Tensor:
            return _products(x[rows], g[rows], *spec, groups, frozenset({2.0}))[2.0]

        found = conv_square(x, g, *spec, groups, direct)
        if keys > found.keys():
            found["sum"] = _total(x, g, *spec, groups)
        return {key: found[key] for key in keys}
    return _products(x, g, *spec, groups, keys)


def _fused(
    x: Tensor,
    g: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    keys: frozenset[Moment],
) -> Moments:
    """The moments on a CUDA device."""
    if groups == g.shape[1] == x.shape[1]:
        gradients = fused_depthwise(x, g, kernel_size, stride, padding, dilation)
        return fused_rows(gradients.flatten(1), keys)
    return fused_products(x, g, kernel_size, stride, padding, dilation, groups, keys)


def _products(
    x: Tensor,
    g: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    keys: frozenset[Moment],
) -> Moments:
    spec = (kernel_size, stride, padding, dilation, groups)
    small = groups == g.shape[1] == x.shape[1] and math.prod(kernel_size) < DEPTHWISE_ENTRIES
    if g.numel() and supports(g, keys) and not small:
        return native_products(x, g, *spec, keys)
    entries = g.shape[1] * x.shape[1] // groups * math.prod(kernel_size)
    return chunked_moments(lambda rows: conv_gradient(x[rows], g[rows], *spec), g, entries, keys)


def _total(
    x: Tensor,
    g: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The sum of a weight gradient's entries, from the sums over channels."""
    xs, gs = (
        t.reshape(len(t), groups, t.shape[1] // groups, *t.shape[2:]).sum(2, dtype=accumulator(g)) for t in (x, g)
    )
    return conv_gradient(xs, gs, kernel_size, stride, padding, dilation, groups).flatten(1).sum(1)

"""Moments of the rows of a matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from lightning_gradmetrics.engine.kernels.fused import fused_rows, fused_sums, fused_supports
from lightning_gradmetrics.engine.kernels.native import native_rows, supports
from lightning_gradmetrics.engine.kernels.sums import native_sums
from lightning_gradmetrics.gradients.precision import wide_dtype
from lightning_gradmetrics.gradients.statistics import Moment, Moments, accumulator, gradient_moments

__all__ = ["CHUNK_ENTRIES", "chunked_moments", "position_sums", "row_moments"]

CHUNK_ENTRIES = 1_500_000
"""Number of gradient entries computed at a time, so that they stay in the cache for the reductions."""

DEVICE_CHUNK_ENTRIES = 2**26
"""The same number for other devices, which need larger pieces of work."""


def row_moments(flat: Tensor, wanted: Iterable[Moment]) -> Moments:
    """Return moments of each row.

    Args:
        flat: ``(N, D)``.
        wanted: The moments to compute.

    Returns:
        Each moment, ``(N,)``, in the precision of :func:`lightning_gradmetrics.gradients.statistics.accumulator`.

    Example:
        >>> import torch
        >>> row_moments(torch.tensor([[1.0, -2.0]]), ["min"])
        {'min': tensor([-2.], dtype=torch.float64)}
    """
    keys = frozenset(wanted)
    if flat.numel() and supports(flat, keys):
        return native_rows(flat, keys)
    if flat.numel() and fused_supports(flat, keys):
        return fused_rows(flat, keys)
    return gradient_moments(flat, keys)


def chunked_moments(
    gradients: Callable[[slice], Tensor], samples: Tensor, entries: int, wanted: Iterable[Moment]
) -> Moments:
    """Return moments of gradients that are computed for a cache-sized chunk of samples at a time.

    Args:
        gradients: The gradients ``(n, ...)`` of a slice of samples.
        samples: A tensor of all samples, ``(N, ...)``, for their number and device.
        entries: Gradient entries of one sample.
        wanted: The moments to compute.

    Returns:
        Each moment, ``(N,)``.
    """
    keys = frozenset(wanted)
    limit = CHUNK_ENTRIES if samples.device.type == "cpu" else DEVICE_CHUNK_ENTRIES
    size = max(1, limit // max(entries, 1))
    chunks = []
    for start in range(0, max(1, len(samples)), size):
        chunks.append(row_moments(gradients(slice(start, start + size)).flatten(1), keys))
    moments: Moments = {}
    for key in keys:
        moments[key] = torch.cat([chunk[key] for chunk in chunks])
    return moments


def chosen_moments(moments: Moments, keys: Iterable[Moment]) -> Moments:
    """Return some of the moments."""
    return {key: moments[key] for key in keys}


def position_sums(g: Tensor, x: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Return sums over positions of ``g`` and of ``x g``: the gradients of a bias and of a norm layer's weight, in one pass.

    Args:
        g: ``(N, C, *S)``, of any strides.
        x: The same shape, or ``None``.

    Returns:
        Both sums, ``(N, C)``, in float64 if the device has it; ``None`` for the second without ``x``.

    Example:
        >>> position_sums(torch.ones(1, 2, 3), torch.full((1, 2, 3), 2.0))
        (tensor([[3., 3.]], dtype=torch.float64), tensor([[6., 6.]], dtype=torch.float64))
    """
    if g.numel() and fused_supports(g, ()):
        return fused_sums(g.flatten(2), None if x is None else x.flatten(2))
    dtype = wide_dtype(torch.promote_types(g.dtype, g.dtype if x is None else x.dtype))
    g, x = g.to(dtype), None if x is None else x.to(dtype)
    shape = (*g.shape[:2], g.shape[2:].numel())
    flat_g, flat_x = g.reshape(shape), None if x is None else x.reshape(shape)
    if shape[2] == 1:  # nothing to sum
        flat_g, flat_x = flat_g.squeeze(2), None if flat_x is None else flat_x.squeeze(2)
        return flat_g.to(accumulator(g)), None if flat_x is None else (flat_x * flat_g).to(accumulator(g))
    if g.numel() and supports(g, (), in_graph=True):
        total, product = native_sums(flat_g, flat_x).unbind()
        return total, None if x is None else product
    total = flat_g.sum(2, dtype=accumulator(g))
    return total, None if flat_x is None else (flat_x * flat_g).sum(2, dtype=accumulator(g))

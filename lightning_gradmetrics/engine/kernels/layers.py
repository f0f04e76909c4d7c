"""The gradients of an embedding's rows and of the weight of a batch norm, each in one call of a compiled kernel.

Plain torch needs five to eight calls for each, which take longer than the forward pass of a small model.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from lightning_gradmetrics.engine.kernels.jobs import LookupJob, NormJob
from lightning_gradmetrics.engine.kernels.library import library_for

__all__ = ["LARGEST", "looked_up_rows", "norm_weight_rows"]

LARGEST = 2**18
"""Largest number of entries of a gradient; for more, several threads of torch are faster."""

MOST_POSITIONS = 512
"""Largest number of indices per sample, which are compared with each other."""


def looked_up_rows(indices: Tensor, g: Tensor, padding: int | None) -> Tensor | None:
    """Return what :func:`~lightning_gradmetrics.engine.kernels.linear.touched_rows` returns; ``None`` if torch must compute it.

    Args:
        indices: Rows of the table ``(N, T)``.
        g: The gradient of the layer's output, ``(N, T, D)``.
        padding: The row without a gradient, or ``None``.
    """
    samples, positions, width = g.shape
    is_small = g.numel() <= LARGEST or torch.get_num_threads() == 1
    is_small = is_small and 0 < positions <= MOST_POSITIONS and g.numel() > 0
    if not (is_small and g.is_cpu and g.stride(2) == 1 and indices.dtype == torch.int64 and indices.is_contiguous()):
        return None
    library = library_for(g.dtype)
    if library is None:
        return None
    rows = torch.empty(samples, positions + 1, width, dtype=g.dtype)
    job = LookupJob(
        indices=indices.data_ptr(),
        g=g.data_ptr(),
        rows=rows.data_ptr(),
        samples=samples,
        positions=positions,
        width=width,
        g_sample=g.stride(0),
        g_position=g.stride(1),
        padding=-1 if padding is None else padding,
    )
    library.looked_up_rows(ctypes.byref(job), None, 1)
    return rows


def norm_weight_rows(x: Tensor, g: Tensor, mean: Tensor, variance: Tensor, eps: float) -> Tensor | None:
    """Return each sample's gradient of a batch norm's weight, ``(x - mean) / sqrt(variance + eps) * g``.

    Args:
        x: The layer's input ``(N, C)``.
        g: The gradient of its output ``(N, C)``.
        mean: The running mean ``(C,)``.
        variance: The running variance ``(C,)``.
        eps: The constant of the layer.

    Returns:
        ``(N, C)``; ``None`` if torch must compute it.
    """
    samples, channels = g.shape
    if not (g.is_cpu and 0 < g.numel() <= LARGEST and x.dtype == mean.dtype == variance.dtype == g.dtype):
        return None
    is_dense = x.stride(1) == 1 == g.stride(1) and mean.is_contiguous() and variance.is_contiguous()
    library = library_for(g.dtype) if is_dense else None
    if library is None:
        return None
    out = torch.empty(samples, channels, dtype=g.dtype)
    job = NormJob(
        x=x.data_ptr(),
        g=g.data_ptr(),
        mean=mean.data_ptr(),
        variance=variance.data_ptr(),
        out=out.data_ptr(),
        eps=eps,
        samples=samples,
        channels=channels,
        x_sample=x.stride(0),
        g_sample=g.stride(0),
    )
    library.norm_weight_rows(ctypes.byref(job), None, 1)
    return out

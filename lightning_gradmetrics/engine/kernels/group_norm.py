"""Group norms by compiled kernels: their gradients, and their output for images in the channels-last layout."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_gradmetrics.engine.kernels.jobs import GroupNormJob, GroupNormLastJob
from lightning_gradmetrics.engine.kernels.library import library_for
from lightning_gradmetrics.engine.kernels.native import run_job, supports, threads_for
from lightning_gradmetrics.engine.kernels.sums import NormRows

__all__ = ["covers_channels_last", "native_group_norm", "native_group_norm_gradients"]

WIDEST = 2048
"""Largest number of channels in the channels-last layout: ``WIDEST`` of ``group_norm_last.c``."""


def covers_channels_last(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """Return whether :func:`native_group_norm` covers these types and this order in memory."""
    is_covered = _is_last(x) and supports(x, ()) and {weight.dtype, bias.dtype} == {x.dtype}
    return is_covered and weight.is_contiguous() and bias.is_contiguous()


def native_group_norm(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output of a group norm in the channels-last layout, with an exact variance.

    The variance that torch computes in this layout on CPUs is ``E[x^2] - E[x]^2``, which cancels.

    Args:
        x: The input, ``(N, C, H, W)``, in the channels-last layout; see :func:`covers_channels_last`.
        groups: The number of groups of channels.
        weight: ``(C,)``.
        bias: ``(C,)``.
        eps: Added to the variance.

    Returns:
        The output in the same layout, and the mean and one over the deviation of each group, ``(N, groups)`` in float64.
    """
    y, statistics = torch.empty_like(x), torch.empty(2, len(x), groups, dtype=torch.float64)
    job = _last_job(x, weight, statistics[0], statistics[1])
    job.bias, job.y, job.eps = bias.data_ptr(), y.data_ptr(), eps
    run_job(job, library_for(x.dtype).group_norm_last, threads_for(x.numel()))
    return y, statistics[0], statistics[1]


def _is_last(x: Tensor) -> bool:
    """Return whether a tensor is an image in the channels-last layout that the kernel covers."""
    is_image = x.ndim == 4 and 0 < x.shape[1] <= WIDEST and x.numel() > 0
    return is_image and x.is_contiguous(memory_format=torch.channels_last)


def _last_job(x: Tensor, weight: Tensor, mean: Tensor, scale: Tensor) -> GroupNormLastJob:
    return GroupNormLastJob(
        x=x.data_ptr(),
        weight=weight.data_ptr(),
        mean=mean.data_ptr(),
        scale=scale.data_ptr(),
        samples=len(x),
        groups=mean.shape[1],
        channels=x.shape[1],
        positions=x.shape[2:].numel(),
    )


def _last_gradients(
    x: Tensor, g: Tensor, mean: Tensor, scale: Tensor, weight: Tensor, with_product: bool
) -> NormRows | None:
    """Return the same as :func:`native_group_norm_gradients` after :func:`native_group_norm`."""
    if x.dtype != g.dtype or not covers_channels_last(x, weight, weight):
        return None
    g = g.contiguous(memory_format=torch.channels_last)
    rows = torch.empty(2, *g.shape[:2], dtype=g.dtype)
    product = torch.empty_like(g) if with_product else None
    job = _last_job(x, weight, mean, scale)
    job.g, job.rows = g.data_ptr(), rows.data_ptr()
    job.y = None if product is None else product.data_ptr()
    run_job(job, library_for(g.dtype).group_norm_last, threads_for(g.numel()))
    return NormRows(rows[0], rows[1], product)


def native_group_norm_gradients(
    x: Tensor, g: Tensor, mean: Tensor, scale: Tensor, weight: Tensor, with_product: bool
) -> NormRows | None:
    """Return the gradients of a group norm, from two passes over its input and the gradient of its output.

    After :func:`native_group_norm`, mean and scale are in float64.

    Args:
        x: The layer's input, ``(N, C, *S)``.
        g: The gradient of its output, of the same shape.
        mean: The mean of each group of channels, ``(N, groups)``.
        scale: One over the deviation of each group, ``(N, groups)``.
        weight: ``(C,)``.
        with_product: Whether the gradient of the input is wanted.

    Returns:
        The gradients; ``None`` if the kernel does not cover these types or this order in memory.
    """
    if mean.dtype is torch.float64 and not x.is_contiguous():
        return _last_gradients(x, g, mean, scale, weight, with_product)
    tensors = (x, g, mean, scale, weight)
    if not (g.numel() and supports(g, ()) and {t.dtype for t in tensors} == {g.dtype}):
        return None
    if not all(t.is_contiguous() for t in tensors):
        return None
    rows = torch.empty(2, *g.shape[:2], dtype=g.dtype)
    product = torch.empty_like(g) if with_product else None
    job = GroupNormJob(
        x=x.data_ptr(),
        g=g.data_ptr(),
        mean=mean.data_ptr(),
        scale=scale.data_ptr(),
        weight=weight.data_ptr(),
        rows=rows.data_ptr(),
        product=None if product is None else product.data_ptr(),
        samples=len(g),
        groups=mean.shape[1],
        channels=g.shape[1] // mean.shape[1],
        positions=g.shape[2:].numel(),
    )
    run_job(job, library_for(g.dtype).group_norm_gradients, threads_for(g.numel()))
    return NormRows(rows[0], rows[1], product)

"""The gradients of a group norm, by a compiled kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_gradmetrics.engine.kernels.jobs import GroupNormJob
from lightning_gradmetrics.engine.kernels.library import library_for
from lightning_gradmetrics.engine.kernels.native import run_job, supports, threads_for
from lightning_gradmetrics.engine.kernels.sums import NormRows

__all__ = ["native_group_norm_gradients"]


def native_group_norm_gradients(
    x: Tensor, g: Tensor, mean: Tensor, scale: Tensor, weight: Tensor, with_product: bool
) -> NormRows | None:
    """Return the gradients of a group norm, from two passes over its input and the gradient of its output.

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

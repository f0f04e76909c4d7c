"""Sums over positions, by a compiled kernel: the gradients of biases and of norm layers."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_gradmetrics.engine.kernels.jobs import SumJob
from lightning_gradmetrics.engine.kernels.library import library_for
from lightning_gradmetrics.engine.kernels.native import run_job, supports, threads_for
from lightning_gradmetrics.engine.kernels.operators import operator

__all__ = ["NormRows", "native_layer_norm", "native_norm", "native_sums"]


@operator("(Tensor g, Tensor? x) -> Tensor", lambda g, x: g.new_empty(2, *g.shape[:2], dtype=torch.float64))
def native_sums(g: Tensor, x: Tensor | None) -> Tensor:
    """Return sums over the last axis of ``g`` and of ``x g``, ``(N, C, P)`` each, in one pass: ``(2, N, C)``; zeros without ``x``."""
    if not _share_unit_stride(g, g if x is None else x):
        g, x = g.contiguous(), None if x is None else x.contiguous()
    out = torch.empty(2, *g.shape[:2], dtype=torch.float64)
    _run(_job(g, x, out=out.data_ptr()), g)
    return out


@dataclass(frozen=True)
class NormRows:
    """The gradients of a batch norm with running statistics.

    Args:
        bias: Each sample's gradient of the bias, ``(N, C)``.
        weight: Each sample's gradient of the weight, ``(N, C)``.
        product: The gradient of the input, with the shape and the strides of that of the output; ``None`` without factors.
    """

    bias: Tensor
    weight: Tensor
    product: Tensor | None


def native_norm(
    x: Tensor, g: Tensor, mean: Tensor, variance: Tensor, eps: float, weight: Tensor | None
) -> NormRows | None:
    """Return the gradients of a batch norm with running statistics, in one pass over both tensors.

    Args:
        x: The layer's input, ``(N, C, *S)``.
        g: The gradient of its output, of the same shape.
        mean: The running mean, ``(C,)``.
        variance: The running variance, ``(C,)``.
        eps: Added to the variance.
        weight: The weight, ``(C,)``; ``None`` if the gradient of the input is not wanted.

    Returns:
        The gradients; ``None`` if the kernel does not cover these types or this order in memory.
    """
    dtype = g.dtype
    if not supports(g, ()) or x.dtype != dtype or not _are_vectors(dtype, mean, variance):
        return None
    if weight is not None and not _are_vectors(dtype, weight):
        return None
    plan = _norm_plan(g.shape, x.stride(), g.stride())
    if plan is None:
        return None
    product = None if weight is None else torch.empty_like(g)
    if product is not None and product.stride() != g.stride():
        return None
    rows = torch.empty(2, *g.shape[:2], dtype=dtype)
    job = SumJob.from_buffer_copy(plan)
    job.g, job.x, job.rows = g.data_ptr(), x.data_ptr(), rows.data_ptr()
    job.mean, job.variance, job.eps = mean.data_ptr(), variance.data_ptr(), eps
    if weight is not None and product is not None:
        job.weight, job.scaled = weight.data_ptr(), product.data_ptr()
    _run(job, g)
    bias_row, weight_row = rows.unbind()
    return NormRows(bias_row, weight_row, product)


def _are_vectors(dtype: torch.dtype, *tensors: Tensor) -> bool:
    return all(tensor.dtype == dtype and tensor.is_contiguous() for tensor in tensors)


@functools.lru_cache(maxsize=512)
def _norm_plan(shape: torch.Size, x_stride: tuple[int, ...], g_stride: tuple[int, ...]) -> SumJob | None:
    """Return the arguments without addresses for tensors ``(N, C, *S)`` with these strides; ``None`` if the kernel does not cover them."""
    if not shape.numel():
        return None
    with torch._C.DisableTorchFunction():
        x, g = (torch.empty_strided(shape, stride, device="meta") for stride in (x_stride, g_stride))
        if x.flatten(2)._base is not x or g.flatten(2)._base is not g:
            return None
        x, g = x.flatten(2), g.flatten(2)
        return _job(g, x) if _share_unit_stride(g, x) else None


WIDEST = 4096
"""Largest number of entries that a layer norm normalises over: ``WIDEST`` of ``sums.c``."""


def native_layer_norm(x: Tensor, g: Tensor, eps: float) -> tuple[Tensor, Tensor] | None:
    """Return the gradients of a layer norm's bias and weight, ``(N, D)`` each, in one pass over both tensors.

    Args:
        x: The layer's input, ``(N, P, D)``.
        g: The gradient of its output, of the same shape and type.
        eps: Added to the variance.

    Returns:
        The gradients; ``None`` if the kernel does not cover these types or this width.
    """
    if not (g.numel() and g.shape[2] <= WIDEST and x.dtype == g.dtype and supports(g, ())):
        return None
    x, g = map(_with_adjacent_channels, (x, g))
    rows = torch.empty(2, len(g), g.shape[2], dtype=g.dtype)
    _run(_job(g.mT, x.mT, rows=rows.data_ptr(), eps=eps, normalised=1), g)
    return rows[0], rows[1]


def _with_adjacent_channels(rows: Tensor) -> Tensor:
    """Return ``(N, P, D)`` with the entries of each position adjacent in memory."""
    return rows if _has_unit_stride(rows, 2) else rows.contiguous()


def _job(g: Tensor, x: Tensor | None, **fields: float) -> SumJob:
    """Return the arguments of the kernel for ``(N, C, P)``."""
    samples, channels, positions = g.shape
    job = SumJob(g=g.data_ptr(), samples=samples, channels=channels, positions=positions, **fields)
    job.g_sample, job.g_channel, job.g_position = _strides(g)
    if x is not None:
        job.x = x.data_ptr()
        job.x_sample, job.x_channel, job.x_position = _strides(x)
    return job


def _run(job: SumJob, g: Tensor) -> None:
    run_job(job, library_for(g.dtype, in_graph=True).position_statistics, threads_for(g.numel()))


def _share_unit_stride(g: Tensor, x: Tensor) -> bool:
    """Return whether channels, or positions, are adjacent in the memory of both ``(N, C, P)``."""
    return any(_has_unit_stride(g, dim) and _has_unit_stride(x, dim) for dim in (1, 2))


def _has_unit_stride(t: Tensor, dim: int) -> bool:
    return t.shape[dim] == 1 or t.stride(dim) == 1


def _strides(t: Tensor) -> tuple[int, int, int]:
    """Return the strides of ``(N, C, P)``; a single position gets stride one."""
    return t.stride(0), t.stride(1), 1 if t.shape[2] == 1 else t.stride(2)

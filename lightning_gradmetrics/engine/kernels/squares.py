"""Sums of squares of weight gradients from Gram matrices, by a compiled kernel."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_gradmetrics.engine.kernels.geometry import ConvGeometry, three
from lightning_gradmetrics.engine.kernels.jobs import GramJob, LinearGramJob, Triple
from lightning_gradmetrics.engine.kernels.library import library_for
from lightning_gradmetrics.engine.kernels.native import TensorLayout, run_job, scratch_address, threads_for

__all__ = ["GramSums", "native_linear_squares", "native_squares"]


class GramSums(NamedTuple):
    """Sums of each sample's and each group's weight gradients.

    Args:
        sums: The sum, the sum of squares and an upper bound of the latter, ``(N, groups, 3)``. The bound is
            ``(sum_p |g_p| |x_p|)^2``, which would be reached without any cancellation.
        has_lost: Whether a sum of squares is too small a fraction of its bound.
    """

    sums: Tensor
    has_lost: bool


def native_squares(x: Tensor, g: Tensor, geometry: ConvGeometry, cancelled: float) -> GramSums:
    """Return sums of a convolution's weight gradients, by Gram matrices.

    Args:
        x: The layer's input; see :func:`.native_products`.
        g: The gradient of its output.
        geometry: Kernel size, stride, padding, dilation and groups.
        cancelled: The fraction of its upper bound below which a sum of squares has lost precision.
    """
    pixels, gradients = _neighbours(x.flatten(2)), _neighbours(g.flatten(2))
    threads, layouts = threads_for(), (TensorLayout.of(pixels), TensorLayout.of(gradients))
    job = GramJob.from_buffer_copy(_gram_job(*layouts, x.shape[2:], g.shape[2:], geometry, g.dtype))
    out = torch.empty(len(g), geometry.groups, 3, dtype=torch.float64)
    job.x, job.g, job.out, job.cancelled = pixels.data_ptr(), gradients.data_ptr(), out.data_ptr(), cancelled
    job.scratch = scratch_address(job.scratch_bytes * threads)
    run_job(job, library_for(g.dtype).squares, threads)
    return GramSums(out, job.lost > 0)


def native_linear_squares(
    a: Tensor, g: Tensor, with_sums: bool, cancelled: float, bias: Tensor | None = None
) -> GramSums:
    """Return sums of a linear layer's weight gradients, by Gram matrices of rows that are read where they are.

    Args:
        a: The layer's input ``(N, T, I)``, whose channels are adjacent in memory and fill a vector at least.
        g: The gradient of its output ``(N, T, O)``, likewise.
        with_sums: Whether to compute the sums, not only the sums of squares.
        cancelled: See :func:`native_squares`. The bound of such a sum of squares, or of one out of range, is infinite.
        bias: Receives the sums of ``g`` over the positions, ``(N, O)``, of the type of ``g``.
    """
    out = torch.empty(len(g), 1, 3, dtype=torch.float64)
    job = LinearGramJob(
        a=a.data_ptr(),
        g=g.data_ptr(),
        out=out.data_ptr(),
        samples=len(g),
        positions=g.shape[1],
        inputs=a.shape[2],
        outputs=g.shape[2],
        a_sample=a.stride(0),
        a_position=a.stride(1),
        g_sample=g.stride(0),
        g_position=g.stride(1),
        with_sums=with_sums,
        cancelled=cancelled,
    )
    job.bias = None if bias is None else bias.data_ptr()
    run_job(job, library_for(g.dtype).linear_squares, threads_for())
    return GramSums(out, job.lost > 0)


@functools.lru_cache(maxsize=512)
def _gram_job(
    pixels: TensorLayout,
    gradients: TensorLayout,
    size: tuple[int, ...],
    out_size: tuple[int, ...],
    geometry: ConvGeometry,
    dtype: torch.dtype,
) -> GramJob:
    """Return the arguments without the addresses of tensors."""
    solid, groups = geometry.in_three_dimensions(), geometry.groups
    masks = (geometry.kernel_size[-1] + 1) * out_size[-1]
    job = GramJob(
        scratch_bytes=library_for(dtype).gram_scratch_bytes(pixels.shape[2], gradients.shape[2], masks),
        samples=gradients.shape[0],
        groups=groups,
        channels=pixels.shape[1] // groups,
        columns=gradients.shape[1] // groups,
        size=Triple(*three(size, 1)),
        out_size=Triple(*three(out_size, 1)),
        kernel=Triple(*solid.kernel_size),
        stride=Triple(*solid.stride),
        pad=Triple(*solid.padding),
        dilation=Triple(*solid.dilation),
    )
    job.x_sample, job.x_channel, job.x_position = pixels.stride
    job.g_sample, job.g_channel, job.g_position = gradients.stride
    return job


def _neighbours(flat: Tensor) -> Tensor:
    """Return ``(N, C, P)`` with channels or positions adjacent in memory."""
    return flat if 1 in flat.stride()[1:] else flat.contiguous()

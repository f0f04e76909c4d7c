"""Convolutions with many groups, whose channels are the lanes of the compiled kernels' vectors."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_gradmetrics.engine.kernels.geometry import ConvGeometry, ceil_div, three
from lightning_gradmetrics.engine.kernels.jobs import LaneJob, Triple
from lightning_gradmetrics.engine.kernels.library import library_for
from lightning_gradmetrics.engine.kernels.native import (
    ChannelScale,
    TensorLayout,
    kernel_mode,
    kernel_offsets,
    native_products,
    run_job,
    scratch_address,
    threads_for,
)
from lightning_gradmetrics.engine.kernels.partial import ORDER, checked_moments
from lightning_gradmetrics.engine.kernels.totals import PositionTotals, new_totals
from lightning_gradmetrics.gradients.statistics import Moment, Moments

__all__ = ["native_convolution", "native_depthwise", "native_grouped"]

FEWEST_ENTRIES = 3
"""Smallest number of kernel entries for which the kernel of grouped convolutions has enough sums in the registers."""


def native_convolution(
    x: Tensor,
    g: Tensor,
    geometry: ConvGeometry,
    wanted: Iterable[Moment],
    scaled: ChannelScale | None = None,
    totals: PositionTotals | None = None,
) -> Moments:
    """Return moments of a convolution's per-sample weight gradients by the kernel that takes the least time.

    Args:
        x: The layer's input; see :func:`.native_products`.
        g: The gradient of its output.
        geometry: Kernel size, stride, padding, dilation and groups.
        wanted: The moments to compute.
        scaled: Factors of the gradients of each output channel, and where to write the sums of each channel.
        totals: Receives the sums of ``g`` over the positions, if they are computed in the same call.
    """
    if geometry.groups == g.shape[1] == x.shape[1]:
        return native_depthwise(x, g, geometry, wanted, scaled)
    kernel = native_grouped if _has_short_groups(x.shape[1], g, geometry) else native_products
    return kernel(x, g, geometry, wanted, scaled, new_totals(totals, g))


def _has_short_groups(channels: int, g: Tensor, geometry: ConvGeometry) -> bool:
    """Return whether the input channels of whole groups fill a vector better than the output channels of one group."""
    groups = geometry.groups
    if groups == 1 or geometry.entries < FEWEST_ENTRIES:
        return False
    width, inputs, outputs = library_for(g.dtype).lane_width(), channels // groups, g.shape[1] // groups
    if inputs > width:
        return False
    together = min(width // inputs, groups) * inputs
    apart = outputs * width / (ceil_div(outputs, width) * width)
    return bool(together > apart)


def native_depthwise(
    x: Tensor, g: Tensor, geometry: ConvGeometry, wanted: Iterable[Moment], scaled: ChannelScale | None = None
) -> Moments:
    """Return the moments for a depthwise convolution, ``C_in = C_out = groups``; see :func:`native_convolution`."""
    return _native(_depthwise_plan, x, g, geometry, frozenset(wanted), scaled, None)


def native_grouped(
    x: Tensor,
    g: Tensor,
    geometry: ConvGeometry,
    wanted: Iterable[Moment],
    scaled: ChannelScale | None = None,
    bias: Tensor | None = None,
) -> Moments:
    """Return the moments for a convolution whose groups have at most as many input channels as a vector has lanes.

    Args:
        x: The layer's input; see :func:`.native_products`.
        g: The gradient of its output.
        geometry: Kernel size, stride, padding, dilation and groups.
        wanted: The moments to compute.
        scaled: Factors of the gradients of each output channel, and where to write the sums of each channel.
        bias: Receives the sums of ``g`` over the positions, ``(N, C_out)``, of the type of ``g``.
    """
    return _native(_grouped_plan, x, g, geometry, frozenset(wanted), scaled, bias)


class _Plan(NamedTuple):
    """What calls of a kernel with tensors of the same shapes and strides share.

    Args:
        job: The arguments without the addresses of tensors.
        kernel: The name of the kernel.
        offsets: The tensors whose addresses are among the arguments.
        blocks: The number of blocks of channels.
        scaling: The number of entries of the scale and the weight in the order of the lanes.
    """

    job: LaneJob
    kernel: str
    offsets: tuple[Tensor, Tensor]
    blocks: int
    scaling: int


def _native(
    planned: functools._lru_cache_wrapper[_Plan],
    x: Tensor,
    g: Tensor,
    geometry: ConvGeometry,
    keys: frozenset[Moment],
    scaled: ChannelScale | None,
    bias: Tensor | None,
) -> Moments:
    """Run the kernel of a plan."""
    library, threads = library_for(g.dtype), threads_for()
    plan = planned(TensorLayout.of(x), TensorLayout.of(g), geometry, kernel_mode(keys), g.dtype)
    out = torch.empty(len(g), plan.blocks, len(ORDER), dtype=torch.float64)
    job = LaneJob.from_buffer_copy(plan.job)
    job.x, job.g, job.out = x.data_ptr(), g.data_ptr(), out.data_ptr()
    job.scratch = scratch_address(job.scratch_bytes * threads)
    if bias is not None:
        job.bias = bias.data_ptr()
    if scaled is not None:
        packed = g.new_empty(plan.scaling)  # alive until the kernel ends
        scaled.describe(job, packed)
    run_job(job, getattr(library, plan.kernel), threads)

    def wide(rows: Tensor) -> Moments:
        own = None
        if scaled is not None:
            own = ChannelScale.for_samples(len(rows), scaled.weight.double(), scaled.scale.double())
        # A vector has half as many lanes, which may be too few for this kernel.
        return native_convolution(x[rows].double(), g[rows].double(), geometry, keys, own)

    return checked_moments(out, g, keys, job.lost > 0, wide)


@functools.lru_cache(maxsize=512)
def _depthwise_plan(x: TensorLayout, g: TensorLayout, geometry: ConvGeometry, mode: int, dtype: torch.dtype) -> _Plan:
    library, channels = library_for(dtype), g.shape[1]
    lanes = library.tile_columns()
    job, offsets, plane = _described(x, g, geometry, mode, lanes)
    job.blocks = ceil_div(channels, lanes)
    job.scratch_bytes = library.depthwise_scratch_bytes(plane, len(offsets[1]), 0)
    return _Plan(job, "depthwise", offsets, job.blocks, job.blocks * lanes * (1 + geometry.entries))


@functools.lru_cache(maxsize=512)
def _grouped_plan(x: TensorLayout, g: TensorLayout, geometry: ConvGeometry, mode: int, dtype: torch.dtype) -> _Plan:
    library = library_for(dtype)
    lanes = library.lane_width()
    job, offsets, plane = _described(x, g, geometry, mode, lanes)
    together = lanes // job.inputs
    columns = ceil_div(together * job.outputs, lanes) * lanes
    tiles = ceil_div(job.outputs, 2) * ceil_div(geometry.entries, library.tile_rows())
    job.blocks = ceil_div(job.groups, together)
    job.scratch_bytes = library.grouped_scratch_bytes(plane, len(offsets[1]) * columns, tiles)
    return _Plan(job, "grouped", offsets, job.blocks, job.blocks * job.outputs * lanes * (1 + geometry.entries))


def _described(
    x: TensorLayout, g: TensorLayout, geometry: ConvGeometry, mode: int, lanes: int
) -> tuple[LaneJob, tuple[Tensor, Tensor], int]:
    """Return the arguments that both kernels have, the tensors with offsets, and the size of a padded plane of the input.

    Args:
        x: The layer's input.
        g: The gradient of its output.
        geometry: The convolution.
        mode: The statistics to compute.
        lanes: Channels that are interleaved.
    """
    solid, groups = geometry.in_three_dimensions(), geometry.groups
    size, out_size = three(x.shape[2:], 1), three(g.shape[2:], 1)
    offsets = kernel_offsets(1, lanes, size, out_size, solid)
    job = LaneJob(samples=g.shape[0], groups=groups, inputs=x.shape[1] // groups, outputs=g.shape[1] // groups)
    job.mode, job.entry_count = mode, geometry.entries
    job.entries, job.positions = offsets[0].data_ptr(), offsets[1].data_ptr()
    job.size, job.pad, job.out_size = Triple(*size), Triple(*solid.padding), Triple(*out_size)
    job.x_sample, job.x_channel, job.x_step = x.stride[0], x.stride[1], Triple(*three(x.stride[2:], 0))
    job.g_sample, job.g_channel, job.g_step = g.stride[0], g.stride[1], Triple(*three(g.stride[2:], 0))
    return job, offsets, math.prod(solid.padded_size(size))

"""Calls the compiled kernels; the results equal those of plain torch."""

from __future__ import annotations

import ctypes
import functools
import math
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_gradmetrics.engine.kernels.geometry import ConvGeometry, ceil_div, three
from lightning_gradmetrics.engine.kernels.jobs import ProductJob, RowJob, Triple
from lightning_gradmetrics.engine.kernels.library import library_for, parallel_runner
from lightning_gradmetrics.engine.kernels.partial import ORDER, checked_moments, joined_moments
from lightning_gradmetrics.gradients.statistics import Moment, Moments

__all__ = [
    "ChannelScale",
    "TensorLayout",
    "kernel_mode",
    "kernel_offsets",
    "native_products",
    "native_rows",
    "run_job",
    "scratch_address",
    "supports",
    "threads_for",
]

TASKS = 4
"""Smallest number of work pieces per thread when there are few samples."""

TILE_MULTIPLE = 12
"""A common multiple of the tile heights of all machines."""

ONE_THREAD_ENTRIES = 16384
"""Largest number of entries that one thread handles alone."""

ROW_PIECE = 4096
"""Smallest number of columns when a row is split into pieces."""

ALIGNMENT = 64
"""Alignment in bytes: the size of a cache line and of the widest vector."""

Sizes = tuple[int, ...]
_KNOWN = frozenset(ORDER)


class _Scratch(threading.local):
    """The scratch memory of the current thread."""

    memory: Tensor | None = None
    size, address = -1, 0


_scratch = _Scratch()


def supports(tensor: Tensor, wanted: Iterable[Moment], in_graph: bool = False) -> bool:
    """Return whether the compiled kernels return these moments of tensors like this one.

    Args:
        tensor: A tensor of the type and on the device in question.
        wanted: The moments to compute.
        in_graph: Whether the kernel is called by an operator; see :func:`.library_for`.
    """
    is_possible = tensor.is_cpu and _KNOWN.issuperset(wanted)
    return is_possible and library_for(tensor.dtype, in_graph) is not None


def threads_for(entries: int | None = None) -> int:
    """Return the number of threads for work on this number of entries."""
    alone = parallel_runner() is None or (entries is not None and entries <= ONE_THREAD_ENTRIES)
    return 1 if alone else torch.get_num_threads()


def run_job(job: ctypes.Structure, function: object, threads: int) -> None:
    """Run a kernel."""
    function(ctypes.byref(job), parallel_runner(), threads)  # type: ignore[operator]


def scratch_address(size: int) -> int:
    """Return the aligned address of scratch memory for packed operands; reused, because new pages cost more than packing."""
    if size > _scratch.size:
        _scratch.memory = torch.empty(size + ALIGNMENT, dtype=torch.uint8)
        _scratch.size, _scratch.address = size, ceil_div(_scratch.memory.data_ptr(), ALIGNMENT) * ALIGNMENT
    return _scratch.address


def kernel_mode(wanted: Iterable[Moment]) -> int:
    """Return 0 if the sum and the sum of squares are enough, else 1."""
    return int(not set(wanted) <= {"sum", 2.0})


def native_rows(flat: Tensor, wanted: Iterable[Moment]) -> Moments:
    """Return moments of the rows of ``(N, D)``, in one pass over them. See :func:`supports`."""
    keys = frozenset(wanted)
    flat = flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()
    (samples, columns), threads = flat.shape, threads_for()
    pieces = 1 if samples >= TASKS * threads else max(1, min(TASKS * threads, columns // ROW_PIECE))
    out = torch.empty(samples, pieces, len(ORDER), dtype=torch.float64)
    job = RowJob(
        x=flat.data_ptr(),
        out=out.data_ptr(),
        samples=samples,
        pieces=pieces,
        columns=columns,
        x_sample=flat.stride(0),
        mode=kernel_mode(keys),
    )
    run_job(job, library_for(flat.dtype).row_statistics, threads_for(flat.numel()))
    return joined_moments(out, keys)


@functools.lru_cache(maxsize=512)
def kernel_offsets(
    channels: int, lanes: int, size: Sizes, out_size: Sizes, geometry: ConvGeometry
) -> tuple[Tensor, Tensor]:
    """Return where each row (channel, kernel entry) and each output position starts in the input as the kernel reads it.

    Args:
        channels: Input channels of a group.
        lanes: Channels that are interleaved.
        size: The input's spatial size, in three dimensions.
        out_size: The output's.
        geometry: The convolution.
    """
    plane = geometry.padded_size(size)
    entries = lanes * _grid(geometry.kernel_size, geometry.dilation, plane)
    channel = torch.arange(channels)
    starts = channel // lanes * lanes * math.prod(plane) + channel % lanes
    # Rows of a tile should be adjacent in memory: kernel entries of a plane, or channels of interleaved planes.
    table = starts[:, None] + entries if lanes == 1 else entries[:, None] + starts
    rows = table.flatten()
    rows = torch.cat([rows, rows[:1].expand(-len(rows) % TILE_MULTIPLE)])
    return rows.int(), (lanes * _grid(out_size, geometry.stride, plane)).int()


def _grid(size: Sizes, step: Sizes, plane: Sizes) -> Tensor:
    """Return the offset in a plane of every point of a grid with one step per axis."""
    depth, height, width = map(torch.arange, size)
    z, y, x = depth * step[0] * plane[1] * plane[2], height * step[1] * plane[2], width * step[2]
    return (z[:, None, None] + y[:, None] + x).flatten()


def _layout(x: TensorLayout, padded: bool) -> int:
    """Return the layout: 0 for the input as given, 1 for one plane per channel, 2 for planes of interleaved channels."""
    if x.is_contiguous and not padded:
        return 0
    return 2 if x.stride[1] == 1 and math.prod(x.shape[2:]) > 1 else 1


class TensorLayout(NamedTuple):
    """Where the entries of a tensor are in memory."""

    shape: Sizes
    stride: Sizes
    is_contiguous: bool

    @staticmethod
    def of(tensor: Tensor) -> TensorLayout:
        """Return the layout of a tensor."""
        return TensorLayout(tuple(tensor.shape), tensor.stride(), tensor.is_contiguous())


def _pieces(tasks: int, panels: int, threads: int) -> int:
    """Return the number of pieces for the panels of a sample's group, so that every thread has work."""
    if tasks >= TASKS * threads:
        return 1
    return max(1, min(panels, ceil_div(TASKS * threads, tasks)))


@dataclass(frozen=True)
class ChannelScale:
    """A factor for each output channel of a convolution, and two sums for each sample and channel.

    Args:
        scale: The factors, ``(C_out,)``, contiguous.
        weight: The weight, ``(C_out, C_in / groups, *k)``, likewise.
        products: Is set to the sum of the weight times its gradient over the entries of each channel, before it is scaled,
            ``(N, C_out)``, float64. This is the sum over the positions of the output, without a bias, times its gradient.
        totals: Is set to the sum over the positions of the gradient of the output, likewise.
    """

    scale: Tensor
    weight: Tensor
    products: Tensor
    totals: Tensor

    @staticmethod
    def for_samples(samples: int, weight: Tensor, scale: Tensor) -> ChannelScale:
        """Return the factors, with room for the sums."""
        products, totals = torch.zeros(2, samples, len(weight), dtype=torch.float64)
        return ChannelScale(scale.contiguous(), weight.detach().contiguous(), products, totals)

    def describe(self, job: Any, packed: Tensor) -> None:
        """Write the addresses to the arguments of a kernel. The tensors must be alive until the kernel ends.

        Args:
            job: The arguments.
            packed: Memory for the factors and the weight in the order of the kernel.
        """
        job.scale, job.weight, job.packed = self.scale.data_ptr(), self.weight.data_ptr(), packed.data_ptr()
        job.products, job.totals = self.products.data_ptr(), self.totals.data_ptr()


def native_products(
    x: Tensor,
    g: Tensor,
    geometry: ConvGeometry,
    wanted: Iterable[Moment],
    scaled: ChannelScale | None = None,
    bias: Tensor | None = None,
) -> Moments:
    """Return moments of a convolution's per-sample weight gradients, without writing any of them to memory. See :func:`supports`.

    Args:
        x: The layer's input, ``(N, C_in, *S)``, with any strides.
        g: The gradient of its output, ``(N, C_out, *S')``, of the same type, with at least one position.
        geometry: Kernel size, stride, padding, dilation and groups.
        wanted: The moments to compute.
        scaled: Factors of the gradients of each output channel, and where to write the sums of each channel.
        bias: Receives the sums of ``g`` over the positions, ``(N, C_out)``, of the type of ``g``.
    """
    keys, library, threads = frozenset(wanted), library_for(g.dtype), threads_for()
    plan = _product_plan(TensorLayout.of(x), TensorLayout.of(g), geometry, kernel_mode(keys), g.dtype, threads)
    out = torch.empty(plan.out_shape, dtype=torch.float64)
    job = ProductJob.from_buffer_copy(plan.job)
    job.x, job.g, job.out = x.data_ptr(), g.data_ptr(), out.data_ptr()
    job.scratch = scratch_address(job.scratch_bytes * threads)
    job.bias = None if bias is None else bias.data_ptr()
    if scaled is not None:
        packed = g.new_empty(plan.scaling)  # alive until the kernel ends
        scaled.describe(job, packed)
    run_job(job, library.products, threads)

    def wide(rows: Tensor) -> Moments:
        own = None
        if scaled is not None:
            own = ChannelScale.for_samples(len(rows), scaled.weight.double(), scaled.scale.double())
        return native_products(x[rows].double(), g[rows].double(), geometry, keys, own)

    return checked_moments(out, g, keys, job.lost > 0, wide)


class _ProductPlan(NamedTuple):
    """What calls of the product kernel with tensors of the same shapes and strides share.

    Args:
        job: The arguments without the addresses of tensors.
        offsets: The tensors whose addresses are among the arguments.
        out_shape: The shape of the partial statistics.
        scaling: The number of entries of the factors and the weight in the order of the kernel.
    """

    job: ProductJob
    offsets: tuple[Tensor, Tensor]
    out_shape: Sizes
    scaling: int


@functools.lru_cache(maxsize=512)
def _product_plan(
    x: TensorLayout, g: TensorLayout, geometry: ConvGeometry, mode: int, dtype: torch.dtype, threads: int
) -> _ProductPlan:
    library, solid = library_for(dtype), geometry.in_three_dimensions()
    samples, groups = g.shape[0], geometry.groups
    size, out_size = three(x.shape[2:], 1), three(g.shape[2:], 1)
    channels, columns = x.shape[1] // groups, g.shape[1] // groups
    layout = _layout(x, any(geometry.padding))
    lanes = library.tile_rows() if layout == 2 else 1
    rows, positions = kernel_offsets(channels, lanes, size, out_size, solid)
    panels = ceil_div(columns, library.tile_columns())
    pieces = _pieces(samples * groups, panels, threads)
    packed = ceil_div(channels, lanes) * lanes * math.prod(solid.padded_size(size)) if layout else 0
    job = ProductJob(
        rows=rows.data_ptr(),
        positions=positions.data_ptr(),
        scratch_bytes=library.scratch_bytes(ceil_div(panels, pieces), len(positions), packed),
        samples=samples,
        groups=groups,
        pieces=pieces,
        mode=mode,
        threads=threads,
        row_count=channels * geometry.entries,
        columns=columns,
        channels=channels,
        layout=layout,
        size=Triple(*size),
        pad=Triple(*solid.padding),
        out_size=Triple(*out_size),
    )
    job.x_sample, job.x_channel, job.x_step = x.stride[0], x.stride[1], Triple(*three(x.stride[2:], 0))
    job.g_sample, job.g_channel, job.g_step = g.stride[0], g.stride[1], Triple(*three(g.stride[2:], 0))
    out_shape = (samples, groups * pieces, len(ORDER))
    scaling = groups * (1 + job.row_count) * panels * library.tile_columns()
    return _ProductPlan(job, (rows, positions), out_shape, scaling)

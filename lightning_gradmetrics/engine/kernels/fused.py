"""Fused kernels for CUDA devices: moments of per-sample weight gradients that are never written to memory.

A program computes one tile of one sample's gradient in registers and reduces it there to its sum, sum of squares, sum
of magnitudes, largest and smallest entry. Half precision is multiplied on the tensor cores and added in float32.
float32 is multiplied as TF32 if torch allows that, otherwise as three TF32 products, which keep the precision of
float32.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_gradmetrics.engine.kernels.geometry import ConvGeometry, ceil_div
from lightning_gradmetrics.engine.kernels.operators import noted, operator
from lightning_gradmetrics.gradients.precision import allows_tf32
from lightning_gradmetrics.gradients.statistics import Moment, Moments

__all__ = [
    "fused_depthwise",
    "fused_products",
    "fused_rows",
    "fused_segments",
    "fused_sums",
    "fused_supports",
]

STATISTICS: tuple[Moment, ...] = ("sum", 2.0, 1.0, "max", "min")
"""The moments in the order in which the kernels write them."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SMALLEST_TILE, LARGEST_TILE = 16, 128
ROW_PIECE = 4096
"""Number of columns that one program reduces."""

SWITCH = "LIGHTNING_GRADMETRICS_TRITON"
"""Environment variable that switches these kernels off with the value ``0``."""


@functools.cache
def _available() -> bool:
    return importlib.util.find_spec("triton") is not None and os.environ.get(SWITCH, "1") != "0"


def _interpreted() -> bool:
    """Return whether Triton interprets its kernels on the CPU, as in the tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def fused_supports(tensor: Tensor, wanted: Iterable[Moment]) -> bool:
    """Return whether the fused kernels compute these moments of tensors like this one.

    Args:
        tensor: A tensor of the type and on the device in question.
        wanted: The moments to compute.
    """
    on_device = tensor.device.type == "cuda" or _interpreted()
    return on_device and tensor.dtype in DTYPES and set(wanted) <= set(STATISTICS) and _available()


@functools.cache
def _kernels() -> Any:
    from lightning_gradmetrics.engine.kernels import triton_kernels

    return triton_kernels


def _tile(size: int, largest: int = LARGEST_TILE) -> int:
    """Return the smallest power of two that covers ``size``, between the smallest and the largest tile."""
    return min(largest, max(SMALLEST_TILE, 1 << max(size - 1, 0).bit_length()))


def _empty_statistics(like: Tensor, *shape: int) -> Tensor:
    """Return room for the statistics ``(*shape, 5)``."""
    return like.new_empty(*shape, len(STATISTICS), dtype=torch.float64)


def _merged(partial: Tensor, extremes: bool) -> Tensor:
    """Return the statistics of every sample, ``(N, 5)``, from those of every tile, ``(N, tiles, 5)``, by one more kernel."""
    samples, tiles = partial.shape[:2]
    merged = _empty_statistics(partial, samples)
    _kernels().merge_tiles_kernel[(samples,)](partial, merged, tiles, TILES=_tile(tiles), EXTREMES=extremes)
    return merged


def _by_name(columns: Sequence[Tensor], keys: Iterable[Moment]) -> Moments:
    """Return the chosen moments among the columns of all statistics."""
    return {key: columns[STATISTICS.index(key)] for key in keys}


def _needs_extremes(wanted: Iterable[Moment]) -> bool:
    return not set(wanted) <= {"sum", 2.0}


def _precision(dtype: torch.dtype, convolution: bool) -> str:
    """Return the precision of ``tl.dot`` that matches torch's setting on this device."""
    if dtype != torch.float32:
        return "tf32"
    return "tf32" if allows_tf32(convolution) else "tf32x3"


def _grid_offsets(
    size: tuple[int, ...], steps: tuple[int, ...], device: torch.device, first: tuple[int, int] = (1, 0)
) -> Tensor:
    """Return the flat int32 offsets of every point of a grid; ``first = (number, step)`` is its leading axis."""
    return noted(_stored_offsets(size, steps, device, first))


@functools.lru_cache(maxsize=1024)
def _stored_offsets(
    size: tuple[int, ...], steps: tuple[int, ...], device: torch.device, first: tuple[int, int]
) -> Tensor:
    offsets = torch.arange(first[0]) * first[1]
    for length, step in zip(size, steps, strict=True):
        offsets = (offsets[:, None] + torch.arange(length) * step).flatten()
    return offsets.to(device=device, dtype=torch.int32)


def _merged_positions(g: Tensor) -> Tensor:
    """Return ``(N, C, *S)`` as ``(N, C, P)``, a view if the strides allow it."""
    return g.flatten(2) if g.ndim > 3 else g


def fused_products(
    x: Tensor,
    g: Tensor,
    geometry: ConvGeometry,
    wanted: Iterable[Moment],
    convolution: bool = True,
) -> Moments:
    """Return moments of a convolution's per-sample weight gradients, without writing any of them to memory.

    A linear layer is a convolution of one-dimensional inputs with a kernel of one entry. See :func:`fused_supports`.

    Args:
        x: The layer's input, ``(N, C_in, *S)``.
        g: The gradient of its output, ``(N, C_out, *S')``, of the same type, with at least one position.
        geometry: Kernel size, stride, padding, dilation and groups.
        wanted: The moments to compute.
        convolution: Whether to use torch's TF32 setting for convolutions instead of that for matrix products.

    Returns:
        Each moment of the weight's entries, ``(N,)``, float64.
    """
    keys = frozenset(wanted)
    merged = _products(x, g, *geometry.lists(), geometry.groups, _needs_extremes(keys), convolution)
    return _by_name(merged.unbind(1), keys)


@operator(
    "(Tensor x, Tensor g, int[] kernel_size, int[] stride, int[] padding, int[] dilation, int groups, "
    "bool extremes, bool convolution) -> Tensor",
    lambda x, g, *_: _empty_statistics(g, len(g)),
)
def _products(
    x: Tensor,
    g: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    extremes: bool,
    convolution: bool,
) -> Tensor:
    """Return all statistics of each sample's weight gradient, ``(N, 5)``; see :func:`fused_products`."""
    geometry, samples = _geometry(kernel_size, stride, padding, dilation, groups), len(g)
    out_size, flat_g = tuple(g.shape[2:]), _merged_positions(g)
    x, entries = geometry.pad(x), geometry.entries
    channels, outputs, positions = x.shape[1] // groups, g.shape[1] // groups, flat_g.shape[2]
    adjacent = channels >= SMALLEST_TILE or entries == 1
    if adjacent and x.stride(1) != 1 and x.shape[1] > 1:
        x = _channels_last(x)
    entry_steps = _scaled(x.stride()[2:], geometry.dilation)
    position_offsets = _grid_offsets(out_size, _scaled(x.stride()[2:], geometry.stride), x.device)
    first = (1, 0) if adjacent else (channels, x.stride(1))
    row_offsets = _grid_offsets(geometry.kernel_size, entry_steps, x.device, first)
    limit = channels if adjacent else channels * entries
    tiling = _tiling(g.dtype, outputs, limit, positions)
    channel_tiles, output_tiles = ceil_div(limit, tiling.rows), ceil_div(outputs, tiling.outputs)
    row_tiles = channel_tiles * (entries if adjacent else 1)
    out = torch.empty(samples * groups, row_tiles * output_tiles, len(STATISTICS), device=g.device)
    _kernels().products_kernel[(row_tiles * output_tiles, samples * groups)](
        *(x, flat_g, row_offsets, position_offsets, out),
        *(x.stride(0), channels * x.stride(1)),
        *(flat_g.stride(0), outputs * flat_g.stride(1), flat_g.stride(1), flat_g.stride(2)),
        *(groups, limit, outputs, positions, channel_tiles, output_tiles),
        OUTPUTS=tiling.outputs,
        ROWS=tiling.rows,
        POSITIONS=tiling.positions,
        ADJACENT=adjacent,
        FULL=limit % tiling.rows == 0 and outputs % tiling.outputs == 0,
        EXTREMES=extremes,
        PRECISION=_precision(g.dtype, convolution),
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )
    return _merged(out.view(samples, -1, len(STATISTICS)), extremes)


def _geometry(
    kernel_size: list[int], stride: list[int], padding: list[int], dilation: list[int], groups: int
) -> ConvGeometry:
    return ConvGeometry(tuple(kernel_size), tuple(stride), tuple(padding), tuple(dilation), groups)


class Tiling(NamedTuple):
    """How a weight gradient is divided among the programs of a kernel: entries of a tile, positions per step, and resources."""

    outputs: int
    rows: int
    positions: int
    warps: int
    stages: int


def _tiling(dtype: torch.dtype, outputs: int, rows: int, positions: int) -> Tiling:
    """Return the tiling for weight gradients ``(outputs, rows)`` that are sums over positions."""
    if dtype == torch.float32:
        # Two warps multiply by instructions that take operands in any order; those of more warps would need TF32 transposed.
        return Tiling(_tile(outputs), _tile(rows, 64), _tile(positions, 32), 2, 2)
    columns, lines = _tile(outputs), _tile(rows)
    return Tiling(columns, lines, _tile(positions, 64), 8 if columns * lines >= LARGEST_TILE**2 else 4, 3)


def _channels_last(x: Tensor) -> Tensor:
    """Return the same values with the channels adjacent in memory."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def _scaled(steps: Sequence[int], factors: Sequence[int]) -> tuple[int, ...]:
    return tuple(step * factor for step, factor in zip(steps, factors, strict=True))


def fused_depthwise(x: Tensor, g: Tensor, geometry: ConvGeometry) -> Tensor:
    """Return per-sample weight gradients of a depthwise convolution, ``(N, C, entries)``, float32.

    Args:
        x: The layer's input, ``(N, C, *S)``.
        g: The gradient of its output, ``(N, C, *S')``, of the same type.
        geometry: Kernel size, stride, padding, dilation and groups.
    """
    return _depthwise(x, g, *geometry.lists(), geometry.groups)


@operator(
    "(Tensor x, Tensor g, int[] kernel_size, int[] stride, int[] padding, int[] dilation, int groups) -> Tensor",
    lambda x, g, kernel_size, *_: g.new_empty(*g.shape[:2], math.prod(kernel_size), dtype=torch.float32),
)
def _depthwise(
    x: Tensor,
    g: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    geometry = _geometry(kernel_size, stride, padding, dilation, groups)
    out_size, flat_g = tuple(g.shape[2:]), _merged_positions(g)
    x, entries, (samples, channels, positions) = geometry.pad(x), geometry.entries, flat_g.shape
    out = torch.empty(samples, channels, entries, device=g.device)
    block = 32 if x.stride(1) == 1 else 4
    grid = (entries * ceil_div(channels, block), samples)
    _kernels().depthwise_kernel[grid](
        *(x, flat_g, _grid_offsets(geometry.kernel_size, _scaled(x.stride()[2:], geometry.dilation), x.device)),
        *(_grid_offsets(out_size, _scaled(x.stride()[2:], geometry.stride), x.device), out),
        *(x.stride(0), x.stride(1), *flat_g.stride(), channels, positions, entries),
        CHANNELS=block,
        POSITIONS=_tile(positions, 64 if block == 32 else 256),
    )
    return out


def fused_sums(g: Tensor, x: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return sums over the last axis of ``g`` and of ``x g``, ``(N, C)`` each, float32, in one pass over both.

    Args:
        g: ``(N, C, P)``.
        x: The same shape, or ``None``.
    """
    sums = _position_sums(g, x)
    return sums[0], None if x is None else sums[1]


@operator(
    "(Tensor g, Tensor? x) -> Tensor",
    lambda g, x: g.new_empty(1 if x is None else 2, *g.shape[:2], dtype=torch.float32),
)
def _position_sums(g: Tensor, x: Tensor | None) -> Tensor:
    """Return the sums of ``g``, and those of ``x g`` if there is ``x``, along a new first axis."""
    samples, channels, positions = g.shape
    sums = torch.empty(1 if x is None else 2, samples, channels, device=g.device)
    block = 4 if g.stride(2) == 1 and positions > 1 else 32
    _kernels().position_sums_kernel[(ceil_div(channels, block), samples)](
        *(g, g if x is None else x, sums[0], sums[-1]),
        *(*g.stride(), *(g if x is None else x).stride(), channels, positions),
        CHANNELS=block,
        POSITIONS=_tile(positions, 256 if block == 4 else 32),
        WITH_PRODUCT=x is not None,
    )
    return sums


def fused_rows(flat: Tensor, wanted: Iterable[Moment]) -> Moments:
    """Return moments of the rows of ``(N, D)``, in one pass over them, ``(N,)`` each, float64."""
    keys = frozenset(wanted)
    return _by_name(_row_statistics(flat, _needs_extremes(keys)).unbind(1), keys)


@operator("(Tensor flat, bool extremes) -> Tensor", lambda flat, _: _empty_statistics(flat, len(flat)))
def _row_statistics(flat: Tensor, extremes: bool) -> Tensor:
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    rows, columns = flat.shape
    piece = _tile(columns, ROW_PIECE)
    out = torch.empty(rows, ceil_div(columns, piece), len(STATISTICS), device=flat.device)
    _kernels().row_statistics_kernel[(out.shape[1], rows)](
        *(flat, out, flat.stride(0), columns), COLUMNS=piece, EXTREMES=extremes
    )
    return _merged(out, extremes)


@functools.lru_cache(maxsize=256)
def _stored_starts(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    starts = torch.tensor([0, *sizes]).cumsum(0)
    return starts.to(device=device, dtype=torch.int32)


def fused_segments(rows: Sequence[Tensor], wanted: Iterable[Moment]) -> list[Moments]:
    """Return moments of the rows of several matrices ``(N, D_i)`` of one type, in one pass over all of them.

    Args:
        rows: The matrices.
        wanted: The moments to compute.

    Returns:
        For each matrix its moments, ``(N,)`` each, float64.
    """
    keys, sizes = frozenset(wanted), [matrix.shape[1] for matrix in rows]
    out = _segment_statistics(torch.cat(list(rows), 1), sizes, _needs_extremes(keys))
    results = []
    for columns in out.unbind(1):
        results.append(_by_name(columns.unbind(1), keys))
    return results


@operator(
    "(Tensor flat, int[] sizes, bool extremes) -> Tensor",
    lambda flat, sizes, _: _empty_statistics(flat, len(flat), len(sizes)),
)
def _segment_statistics(flat: Tensor, sizes: list[int], extremes: bool) -> Tensor:
    """Return all statistics of each segment of each row, ``(N, segments, 5)``."""
    starts = noted(_stored_starts(tuple(sizes), flat.device))
    out = _empty_statistics(flat, len(flat), len(sizes))
    _kernels().segment_statistics_kernel[(len(sizes), len(flat))](
        *(flat, starts, out, flat.stride(0)), COLUMNS=256, EXTREMES=extremes
    )
    return out

"""Fused kernels for CUDA devices: moments of per-sample weight gradients that are never written to memory.

A program computes one tile of one sample's gradient in registers and reduces it there to its sum, sum of squares, sum
of magnitudes, largest and smallest entry. Half precision is multiplied on the tensor cores and added in float32.
float32 is multiplied as TF32 if torch allows that, otherwise as three TF32 products, which keep the precision of
float32.
"""

from __future__ import annotations

import functools
import importlib.util
import operator
import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_gradmetrics.engine.kernels.geometry import ConvGeometry, ceil_div
from lightning_gradmetrics.gradients.statistics import Moment, Moments

__all__ = ["fused_depthwise", "fused_products", "fused_rows", "fused_segments", "fused_sums", "fused_supports"]

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


def _moments(partial: Tensor, keys: frozenset[Moment]) -> Moments:
    """Return moments ``(N,)`` from the statistics of every tile, ``(N, tiles, 5)``, by one more kernel."""
    samples, tiles = partial.shape[:2]
    merged = torch.empty(samples, len(STATISTICS), dtype=torch.float64, device=partial.device)
    block = _tile(tiles)
    _kernels().merge_tiles_kernel[(samples,)](partial, merged, tiles, TILES=block, EXTREMES=_needs_extremes(keys))
    columns = merged.unbind(1)
    return _by_name(columns, keys)


def _by_name(columns: Sequence[Tensor], keys: Iterable[Moment]) -> Moments:
    """Return the chosen moments among the columns of all statistics."""
    return {key: columns[STATISTICS.index(key)] for key in keys}


def _needs_extremes(wanted: Iterable[Moment]) -> bool:
    return not set(wanted) <= {"sum", 2.0}


def _precision(dtype: torch.dtype, convolution: bool) -> str:
    """Return the precision of ``tl.dot`` that matches torch's setting on this device."""
    if dtype != torch.float32:
        return "tf32"
    allowed = torch.backends.cudnn.allow_tf32 if convolution else torch.backends.cuda.matmul.allow_tf32
    return "tf32" if allowed else "tf32x3"


@functools.lru_cache(maxsize=1024)
def _grid_offsets(
    size: tuple[int, ...], steps: tuple[int, ...], device: torch.device, first: tuple[int, int] = (1, 0)
) -> Tensor:
    """Return the flat int32 offsets of every point of a grid; ``first = (number, step)`` is its leading axis."""
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
    keys, samples = frozenset(wanted), len(g)
    out_size, flat_g = tuple(g.shape[2:]), _merged_positions(g)
    x, groups, entries = geometry.pad(x), geometry.groups, geometry.entries
    channels, outputs, positions = x.shape[1] // groups, g.shape[1] // groups, flat_g.shape[2]
    adjacent = channels >= SMALLEST_TILE or entries == 1
    if adjacent and x.stride(1) != 1 and x.shape[1] > 1:
        x = _channels_last(x)
    entry_steps = _scaled(x.stride()[2:], geometry.dilation)
    position_offsets = _grid_offsets(out_size, _scaled(x.stride()[2:], geometry.stride), x.device)
    if adjacent:
        row_offsets = _grid_offsets(geometry.kernel_size, entry_steps, x.device)
        rows = _tile(channels)
        channel_tiles, limit = ceil_div(channels, rows), channels
        row_tiles = entries * channel_tiles
    else:
        row_offsets = _grid_offsets(geometry.kernel_size, entry_steps, x.device, (channels, x.stride(1)))
        limit = channels * entries
        rows = _tile(limit, 64)
        channel_tiles, row_tiles = 1, ceil_div(limit, rows)
    columns = _tile(outputs)
    output_tiles = ceil_div(outputs, columns)
    out = torch.empty(samples * groups, row_tiles * output_tiles, len(STATISTICS), device=g.device)
    depth = _tile(positions, 64 if g.dtype != torch.float32 else 32)
    _kernels().products_kernel[(row_tiles * output_tiles, samples * groups)](
        *(x, flat_g, row_offsets, position_offsets, out),
        *(x.stride(0), channels * x.stride(1)),
        *(flat_g.stride(0), outputs * flat_g.stride(1), flat_g.stride(1), flat_g.stride(2)),
        *(groups, limit, outputs, positions, channel_tiles, output_tiles),
        OUTPUTS=columns,
        ROWS=rows,
        POSITIONS=depth,
        ADJACENT=adjacent,
        EXTREMES=_needs_extremes(keys),
        PRECISION=_precision(g.dtype, convolution),
        num_warps=8 if columns * rows >= 128 * 128 else 4,
        num_stages=3,
    )
    return _moments(out.view(samples, -1, len(STATISTICS)), keys)


def _channels_last(x: Tensor) -> Tensor:
    """Return the same values with the channels adjacent in memory."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def _scaled(steps: Sequence[int], factors: Sequence[int]) -> tuple[int, ...]:
    return tuple(map(operator.mul, steps, factors))


def fused_depthwise(x: Tensor, g: Tensor, geometry: ConvGeometry) -> Tensor:
    """Return per-sample weight gradients of a depthwise convolution, ``(N, C, entries)``, float32.

    Args:
        x: The layer's input, ``(N, C, *S)``.
        g: The gradient of its output, ``(N, C, *S')``, of the same type.
        geometry: Kernel size, stride, padding, dilation and groups.
    """
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
    samples, channels, positions = g.shape
    total = torch.empty(samples, channels, device=g.device)
    product = None if x is None else torch.empty_like(total)
    block = 4 if g.stride(2) == 1 and positions > 1 else 32
    _kernels().position_sums_kernel[(ceil_div(channels, block), samples)](
        *(g, g if x is None else x, total, total if product is None else product),
        *(*g.stride(), *(g if x is None else x).stride(), channels, positions),
        CHANNELS=block,
        POSITIONS=_tile(positions, 256 if block == 4 else 32),
        WITH_PRODUCT=x is not None,
    )
    return total, product


def fused_rows(flat: Tensor, wanted: Iterable[Moment]) -> Moments:
    """Return moments of the rows of ``(N, D)``, in one pass over them, ``(N,)`` each, float64."""
    keys = frozenset(wanted)
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    rows, columns = flat.shape
    piece = _tile(columns, ROW_PIECE)
    out = torch.empty(rows, ceil_div(columns, piece), len(STATISTICS), device=flat.device)
    _kernels().row_statistics_kernel[(out.shape[1], rows)](
        *(flat, out, flat.stride(0), columns), COLUMNS=piece, EXTREMES=_needs_extremes(keys)
    )
    return _moments(out, keys)


@functools.lru_cache(maxsize=256)
def _segment_starts(sizes: tuple[int, ...], device: torch.device) -> Tensor:
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
    keys, flat = frozenset(wanted), torch.cat(list(rows), 1)
    starts = _segment_starts(tuple(matrix.shape[1] for matrix in rows), flat.device)
    out = torch.empty(len(flat), len(rows), len(STATISTICS), dtype=torch.float64, device=flat.device)
    _kernels().segment_statistics_kernel[(len(rows), len(flat))](
        *(flat, starts, out, flat.stride(0)), COLUMNS=256, EXTREMES=_needs_extremes(keys)
    )
    results = []
    for columns in out.unbind(1):
        results.append(_by_name(columns.unbind(1), keys))
    return results

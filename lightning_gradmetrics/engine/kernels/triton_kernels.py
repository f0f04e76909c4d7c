"""Triton kernels for CUDA devices: per-sample weight gradients are computed and reduced in registers.

Imported only where Triton is installed. :mod:`lightning_gradmetrics.engine.kernels.fused` calls these kernels; it
chooses all layouts and shapes.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "depthwise_kernel",
    "merge_tiles_kernel",
    "position_sums_kernel",
    "products_kernel",
    "row_statistics_kernel",
    "segment_statistics_kernel",
]

# Annotations are left out: Triton evaluates them when it compiles a kernel.


@triton.jit
def _store_statistics(out, values, valid, EXTREMES: tl.constexpr, FULL: tl.constexpr):
    """Write sum, sum of squares, sum of magnitudes, max and min of the valid values of a tile; all are with ``FULL``."""
    finite = values if FULL else tl.where(valid, values, 0.0)
    tl.store(out, tl.sum(finite))
    tl.store(out + 1, tl.sum(finite * finite))
    if EXTREMES:
        tl.store(out + 2, tl.sum(tl.abs(finite)))
        tl.store(out + 3, tl.max(values if FULL else tl.where(valid, values, float("-inf"))))
        tl.store(out + 4, tl.min(values if FULL else tl.where(valid, values, float("inf"))))


@triton.jit
def products_kernel(
    x,
    g,
    row_offsets,
    position_offsets,
    out,
    x_sample,
    x_group,
    g_sample,
    g_group,
    g_output,
    g_position,
    groups,
    channels,
    outputs,
    positions,
    channel_tiles,
    output_tiles,
    OUTPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    POSITIONS: tl.constexpr,
    ADJACENT: tl.constexpr,
    FULL: tl.constexpr,
    EXTREMES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Statistics of one tile of one sample's weight gradient, ``sum_p g[o, p] x[r, p]``.

    The grid is (tiles of a group, samples x groups). With ``ADJACENT``, a tile's rows are adjacent channels of one
    kernel entry, and ``row_offsets`` contains the offset of the first; otherwise it contains the offset of every row.
    With ``FULL``, no tile is cut off at an edge.
    """
    tile = tl.program_id(0)
    member = tl.program_id(1).to(tl.int64)
    sample = member // groups
    group = member % groups
    output_tile = tile % output_tiles
    row_tile = tile // output_tiles
    o = output_tile * OUTPUTS + tl.arange(0, OUTPUTS)
    if ADJACENT:
        channel = (row_tile % channel_tiles) * ROWS + tl.arange(0, ROWS)
        valid_row = channel < channels
        rows = tl.load(row_offsets + row_tile // channel_tiles) + channel
    else:
        row = row_tile * ROWS + tl.arange(0, ROWS)
        valid_row = row < channels
        rows = tl.load(row_offsets + row, mask=valid_row, other=0)
    valid_output = o < outputs
    g += sample * g_sample + group * g_group
    x += sample * x_sample + group * x_group
    total = tl.zeros((OUTPUTS, ROWS), dtype=tl.float32)
    for start in range(0, positions, POSITIONS):
        p = start + tl.arange(0, POSITIONS)
        valid = p < positions
        of_g, of_x = valid[None, :], valid[:, None]
        if not FULL:
            of_g, of_x = of_g & valid_output[:, None], of_x & valid_row[None, :]
        left = tl.load(g + o[:, None] * g_output + p[None, :] * g_position, mask=of_g, other=0.0)
        offsets = tl.load(position_offsets + p, mask=valid, other=0)
        right = tl.load(x + offsets[:, None] + rows[None, :], mask=of_x, other=0.0)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    out += (member * tl.num_programs(0) + tile) * 5
    _store_statistics(out, total, valid_output[:, None] & valid_row[None, :], EXTREMES, FULL)


@triton.jit
def depthwise_kernel(
    x,
    g,
    entry_offsets,
    position_offsets,
    out,
    x_sample,
    x_channel,
    g_sample,
    g_channel,
    g_position,
    channels,
    positions,
    entries,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    """One kernel entry of a block of channels of one sample's depthwise weight gradient.

    The grid is (kernel entries x channel blocks, samples). ``out`` is ``(N, C, entries)``.
    """
    entry = tl.program_id(0) % entries
    c = (tl.program_id(0) // entries) * CHANNELS + tl.arange(0, CHANNELS)
    sample = tl.program_id(1).to(tl.int64)
    valid_channel = c < channels
    g += sample * g_sample
    x += sample * x_sample + tl.load(entry_offsets + entry)
    total = tl.zeros((CHANNELS, POSITIONS), dtype=tl.float32)
    for start in range(0, positions, POSITIONS):
        p = start + tl.arange(0, POSITIONS)
        valid = valid_channel[:, None] & (p < positions)[None, :]
        offsets = tl.load(position_offsets + p, mask=p < positions, other=0)
        left = tl.load(g + c[:, None] * g_channel + p[None, :] * g_position, mask=valid, other=0.0)
        right = tl.load(x + c[:, None] * x_channel + offsets[None, :], mask=valid, other=0.0)
        total += left.to(tl.float32) * right.to(tl.float32)
    tl.store(out + (sample * channels + c) * entries + entry, tl.sum(total, 1), mask=valid_channel)


@triton.jit
def position_sums_kernel(
    g,
    x,
    total,
    product,
    g_sample,
    g_channel,
    g_position,
    x_sample,
    x_channel,
    x_position,
    channels,
    positions,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
    WITH_PRODUCT: tl.constexpr,
):
    """Sums over positions of ``g`` and of ``x g``, for a block of channels of one sample."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    sample = tl.program_id(1).to(tl.int64)
    valid_channel = c < channels
    g += sample * g_sample
    x += sample * x_sample
    sums = tl.zeros((CHANNELS, POSITIONS), dtype=tl.float32)
    products = tl.zeros((CHANNELS, POSITIONS), dtype=tl.float32)
    for start in range(0, positions, POSITIONS):
        p = start + tl.arange(0, POSITIONS)
        valid = valid_channel[:, None] & (p < positions)[None, :]
        left = tl.load(g + c[:, None] * g_channel + p[None, :] * g_position, mask=valid, other=0.0).to(tl.float32)
        sums += left
        if WITH_PRODUCT:
            right = tl.load(x + c[:, None] * x_channel + p[None, :] * x_position, mask=valid, other=0.0)
            products += left * right.to(tl.float32)
    offset = sample * channels + c
    tl.store(total + offset, tl.sum(sums, 1), mask=valid_channel)
    if WITH_PRODUCT:
        tl.store(product + offset, tl.sum(products, 1), mask=valid_channel)


@triton.jit
def row_statistics_kernel(flat, out, row_stride, columns, COLUMNS: tl.constexpr, EXTREMES: tl.constexpr):
    """Statistics of one piece of one row. The grid is (pieces, rows)."""
    piece = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    column = piece * COLUMNS + tl.arange(0, COLUMNS)
    valid = column < columns
    values = tl.load(flat + row * row_stride + column, mask=valid, other=0.0).to(tl.float32)
    out += (row * tl.num_programs(0) + piece) * 5
    _store_statistics(out, values, valid, EXTREMES, False)


@triton.jit
def merge_tiles_kernel(partial, merged, tiles, TILES: tl.constexpr, EXTREMES: tl.constexpr):
    """Merge the statistics of one sample's tiles, ``(N, tiles, 5)`` float32 to ``(N, 5)`` float64."""
    sample = tl.program_id(0).to(tl.int64)
    partial += sample * tiles * 5
    merged += sample * 5
    total = tl.zeros((TILES,), dtype=tl.float64)
    square = tl.zeros((TILES,), dtype=tl.float64)
    magnitude = tl.zeros((TILES,), dtype=tl.float64)
    high = tl.full((TILES,), float("-inf"), dtype=tl.float32)
    low = tl.full((TILES,), float("inf"), dtype=tl.float32)
    for start in range(0, tiles, TILES):
        tile = start + tl.arange(0, TILES)
        valid = tile < tiles
        total += tl.load(partial + tile * 5, mask=valid, other=0.0).to(tl.float64)
        square += tl.load(partial + tile * 5 + 1, mask=valid, other=0.0).to(tl.float64)
        if EXTREMES:
            magnitude += tl.load(partial + tile * 5 + 2, mask=valid, other=0.0).to(tl.float64)
            high = tl.maximum(high, tl.load(partial + tile * 5 + 3, mask=valid, other=float("-inf")))
            low = tl.minimum(low, tl.load(partial + tile * 5 + 4, mask=valid, other=float("inf")))
    tl.store(merged, tl.sum(total))
    tl.store(merged + 1, tl.sum(square))
    if EXTREMES:
        tl.store(merged + 2, tl.sum(magnitude))
        tl.store(merged + 3, tl.max(high).to(tl.float64))
        tl.store(merged + 4, tl.min(low).to(tl.float64))


@triton.jit
def segment_statistics_kernel(flat, starts, out, row_stride, COLUMNS: tl.constexpr, EXTREMES: tl.constexpr):
    """Statistics of one segment of one row. The grid is (segments, rows); ``out`` is ``(N, segments, 5)`` float64."""
    segment = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    begin = tl.load(starts + segment)
    end = tl.load(starts + segment + 1)
    flat += row * row_stride
    total = tl.zeros((COLUMNS,), dtype=tl.float64)
    square = tl.zeros((COLUMNS,), dtype=tl.float64)
    magnitude = tl.zeros((COLUMNS,), dtype=tl.float64)
    high = tl.full((COLUMNS,), float("-inf"), dtype=tl.float32)
    low = tl.full((COLUMNS,), float("inf"), dtype=tl.float32)
    for start in range(begin, end, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        valid = column < end
        values = tl.load(flat + column, mask=valid, other=0.0).to(tl.float32)
        wide = values.to(tl.float64)
        total += wide
        square += wide * wide
        if EXTREMES:
            magnitude += tl.abs(wide)
            high = tl.maximum(high, tl.where(valid, values, float("-inf")))
            low = tl.minimum(low, tl.where(valid, values, float("inf")))
    out += (row * tl.num_programs(0) + segment) * 5
    tl.store(out, tl.sum(total))
    tl.store(out + 1, tl.sum(square))
    if EXTREMES:
        tl.store(out + 2, tl.sum(magnitude))
        tl.store(out + 3, tl.max(high).to(tl.float64))
        tl.store(out + 4, tl.min(low).to(tl.float64))

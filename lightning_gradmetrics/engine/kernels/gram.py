"""Sums of squares of weight gradients from Gram matrices over positions; cheap if there are few positions.

For ``G = sum_p g_p a_p^T``: ``|G|_2^2 = sum_{p,q} (g_p . g_q)(a_p . a_q)``.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_gradmetrics.engine.kernels.geometry import POINTWISE, ConvGeometry, ceil_div
from lightning_gradmetrics.engine.kernels.library import library_for
from lightning_gradmetrics.engine.kernels.native import supports
from lightning_gradmetrics.engine.kernels.squares import GramSums, native_linear_squares, native_squares
from lightning_gradmetrics.engine.kernels.totals import PositionTotals, new_totals
from lightning_gradmetrics.gradients.lost_digits import LEAST
from lightning_gradmetrics.gradients.statistics import Moments, accumulator

__all__ = ["conv_gram_pays", "conv_square", "linear_gram_pays", "linear_square"]

CANCELLED = 1e-3
"""A Gram sum below this fraction of its upper bound has lost precision to cancellation and is computed directly."""

GAIN = 2.8
"""Ratio of multiplications (fused product to plain Gram form) above which the Gram form is faster; measured."""

COMPILED_GAIN = 1.2
"""The same ratio for the compiled Gram form, which computes half of each symmetric matrix and no border."""

ROW_GAIN = 1.1
"""The same ratio for the Gram form that reads rows where they are, whose operands come from a slower cache; measured."""

ROW_PAIR_COST = 90
"""Cost of a pair of positions in that form, in multiplications; measured."""

PRODUCT_COST = 9
"""Cost of the statistics of a gradient's entry in the product kernel, in multiplications; measured."""

ROW_BLOCK = 4
"""Positions of a block of that form: ``SIDE`` of ``linear_gram.c``."""

TILE_WASTE = 1.3
"""Extra multiplications of the compiled form, because its tiles cover more than half of the matrix; measured."""

PAIR_COST = 12.0
"""Cost of one kernel entry for a pair of positions in the compiled form, in multiplications; measured."""

MOST_ENTRIES = 64
"""Kernel entries that the compiled form supports: ``ENTRIES_MAX`` of ``gram.c``."""

MOST_PADDING = 256
"""Largest padding that the compiled form supports: the width of its border of zeros."""


def linear_gram_pays(a: Tensor, g: Tensor) -> bool:
    """Return whether :func:`linear_square` is cheaper than the product, by multiplications."""
    if not _has_rows(a, g):
        return conv_gram_pays(a.mT, g.mT, POINTWISE)
    (samples, positions, outputs), inputs = g.shape, a.shape[2]
    covered = ceil_div(positions, ROW_BLOCK) * ROW_BLOCK
    pairs = covered * (covered + ROW_BLOCK) / 2
    gram = ROW_GAIN * pairs * (inputs + outputs + ROW_PAIR_COST)
    return gram * _idle(samples) < (positions + PRODUCT_COST) * inputs * outputs


def _has_rows(a: Tensor, g: Tensor) -> bool:
    """Return whether the compiled form for rows covers these operands."""
    if not supports(g, {2.0}) or a.stride(2) != 1 or g.stride(2) != 1:
        return False
    lanes: int = library_for(g.dtype).tile_columns() // 2
    return min(a.shape[2], g.shape[2]) >= lanes


def _idle(tasks: int) -> float:
    """Return the factor by which threads without a task prolong a Gram form, of which one thread computes a task."""
    return max(1.0, torch.get_num_threads() / tasks)


def conv_gram_pays(x: Tensor, g: Tensor, geometry: ConvGeometry) -> bool:
    """Return whether :func:`conv_square` is cheaper than the product, by multiplications within a group.

    Args:
        x: ``(N, C_in, *S)``.
        g: ``(N, C_out, *S')``.
        geometry: Kernel size, stride, padding, dilation and groups.
    """
    rows = _rows_of_images(x, g, geometry)
    if rows is not None:
        return linear_gram_pays(*rows)
    inputs, outputs = x.shape[1] // geometry.groups, g.shape[1] // geometry.groups
    positions, entries = g.shape[2:].numel(), geometry.entries
    product = positions * inputs * entries * outputs
    if not supports(g, {2.0}):
        volume = math.prod(geometry.padded_size(x.shape[2:]))
        return GAIN * (volume**2 * inputs + positions**2 * (outputs + 4 * entries)) < product
    if not _compiled_form_covers(geometry):
        return False
    matrices = (x.shape[2:].numel() ** 2 * inputs + positions**2 * outputs) / 2
    gram = COMPILED_GAIN * (TILE_WASTE * matrices + PAIR_COST * entries * positions**2)
    return gram * _idle(len(g) * geometry.groups) < product


def _rows_of_images(x: Tensor, g: Tensor, geometry: ConvGeometry) -> tuple[Tensor, Tensor] | None:
    """Return the operands of a convolution with one kernel entry as those of a linear layer, ``(N, P, C)`` each.

    Returns:
        The operands; ``None`` for other convolutions, and if the compiled form for rows does not cover them.
    """
    if geometry.groups != 1 or x.shape[2:] != g.shape[2:] or {*geometry.kernel_size, *geometry.stride} != {1}:
        return None
    a, gradients = x.flatten(2).mT, g.flatten(2).mT
    return (a, gradients) if _has_rows(a, gradients) else None


def _compiled_form_covers(geometry: ConvGeometry) -> bool:
    return geometry.entries <= MOST_ENTRIES and max(geometry.padding) <= MOST_PADDING


def _gram(t: Tensor) -> Tensor:
    """Return the Gram matrices ``(B, V, V)`` of ``(B, C, V)``."""
    return t.mT @ t


def _summed(left: Tensor, right: Tensor, direct: Callable[[Tensor], Tensor]) -> Moments:
    """Return ``sum_{p,q} left right`` for each sample ``(N, B, P, P)``; computed directly where it cancels."""
    dtype = accumulator(left)
    norms = (left.diagonal(dim1=2, dim2=3) * right.diagonal(dim1=2, dim2=3)).clamp(min=0).sqrt()
    bound = norms.sum(2, dtype=dtype).square()
    return {2.0: _reliable((left * right).sum((1, 2, 3), dtype=dtype), bound.sum(1), direct)}


def _checked(found: GramSums, direct: Callable[[Tensor], Tensor]) -> Moments:
    """Return the sums of squares and the sums of the compiled kernels; computed directly where digits are lost."""
    sums, has_lost = found
    total, square, bound = (sums[:, 0] if sums.shape[1] == 1 else sums.sum(1)).unbind(1)
    if has_lost:
        bound = bound.where((bound != 0) | (total == 0), torch.inf)
        square = _reliable(square, bound, direct)
    return {"sum": total, 2.0: square}


def _reliable(square: Tensor, bound: Tensor, direct: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the sums of squares ``(N,)``, computed directly where cancellation lost digits."""
    in_range = (bound == 0) | ((bound >= LEAST) & bound.isfinite())
    lost = (square < CANCELLED * bound) | ~in_range
    if bool(lost.any()):
        square = square.clone()
        square[lost] = direct(lost).to(square.dtype)
    return square


def linear_square(a: Tensor, g: Tensor, with_sums: bool = False, totals: PositionTotals | None = None) -> Moments:
    """Return sums of squares of a linear layer's per-sample weight gradients, and their sums if those cost nothing extra.

    Args:
        a: ``(N, T, I)``.
        g: ``(N, T, O)``.
        with_sums: Whether the sums are wanted.
        totals: Receives the sums of ``g`` over the positions if they cost little.

    Returns:
        ``(N,)`` each.
    """

    def direct(rows: Tensor) -> Tensor:
        return (g[rows].mT @ a[rows]).double().square().sum((1, 2))

    if _has_rows(a, g):
        moments = _checked(native_linear_squares(a, g, with_sums, CANCELLED, new_totals(totals, g.mT)), direct)
        return moments if with_sums else {2.0: moments[2.0]}
    if supports(g, {2.0}):
        return _checked(native_squares(a.mT, g.mT, POINTWISE, CANCELLED), direct)
    return _summed(_gram(a.mT)[:, None], _gram(g.mT)[:, None], direct)


def conv_square(
    x: Tensor, g: Tensor, geometry: ConvGeometry, direct: Callable[[Tensor], Tensor], with_sums: bool = False
) -> Moments:
    """Return sums of squares of a convolution's per-sample weight gradients, and their sums if those cost nothing extra.

    The Gram matrix of the patches is a sum of the pixels' Gram matrix, shifted by each kernel entry.

    Args:
        x: ``(N, C_in, *S)``.
        g: ``(N, C_out, *S')``.
        geometry: Kernel size, stride, padding, dilation and groups.
        direct: Computes the sums of squares by products for the samples that a mask ``(N,)`` selects.
        with_sums: Whether the sums are wanted, if they cost little.

    Returns:
        ``(N,)`` each.
    """
    rows = _rows_of_images(x, g, geometry)
    if rows is not None:
        return linear_square(*rows, with_sums)
    if supports(g, {2.0}) and _compiled_form_covers(geometry):
        return _checked(native_squares(x, g, geometry, CANCELLED), direct)
    samples, groups, positions = len(g), geometry.groups, g.shape[2:].numel()
    gradients = _gram(g.reshape(samples * groups, g.shape[1] // groups, positions))
    shape = (samples, groups, positions, positions)
    return _summed(_patch_gram(x, g, geometry).view(shape), gradients.view(shape), direct)


def _patch_gram(x: Tensor, g: Tensor, geometry: ConvGeometry) -> Tensor:
    """Return the Gram matrices of the patches, ``(N groups, *S', *S')``."""
    x, groups, out_size = geometry.pad(x), geometry.groups, g.shape[2:]
    size = x.shape[2:]
    volume = math.prod(size)
    pixels = _gram(x.reshape(len(x) * groups, x.shape[1] // groups, volume))
    pitch = [math.prod(size[axis + 1 :]) for axis in range(len(size))]
    # A kernel entry shifts both axes of the pixels' Gram matrix, which is a shift along its diagonal.
    steps = list(map(operator.mul, pitch, geometry.stride))
    strides = (volume**2, *(step * volume for step in steps), *steps)
    patches = torch.zeros(len(pixels), *out_size, *out_size, dtype=x.dtype, device=x.device)
    moves = list(map(operator.mul, geometry.dilation, pitch))
    for entry in itertools.product(*map(range, geometry.kernel_size)):
        shift = sum(map(operator.mul, entry, moves))
        patches += pixels.as_strided((len(pixels), *out_size, *out_size), strides, shift * (volume + 1))
    return patches

"""Sums of squares from Gram matrices over positions: no weight gradient is formed, and few positions make it cheap.

For ``G = sum_p g_p a_p^T``: ``|G|_2^2 = sum_{p,q} (g_p . g_q)(a_p . a_q)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_gradmetrics.engine.kernels.native import native_squares, supports
from lightning_gradmetrics.gradients.statistics import Moments, accumulator

__all__ = ["conv_gram_pays", "conv_square", "form", "linear_gram_pays", "linear_square"]

GAIN = 2.8
"""How many times fewer multiplications make a Gram form worth it: measured, against the fused product."""

CANCELLED = 1e-3
"""Below this part of its largest possible value a Gram sum has lost digits to cancellation: it is computed directly."""


COMPILED_GAIN, TILES, SHIFT = 1.2, 1.3, 12.0
"""The same for the compiled form; what its tiles multiply in vain; and what a kernel entry of a pair of positions costs,
in multiplications: measured."""

LARGEST = {"entries": 64, "padding": 256}
"""What the compiled form takes."""


def linear_gram_pays(positions: int, inputs: int, outputs: int, compiled: bool = False, idle: float = 1.0) -> bool:
    """Whether :func:`linear_square` is cheaper than the product, by multiplications."""
    return conv_gram_pays(inputs, outputs, [positions], [positions], [1], [0], compiled, idle)


def conv_gram_pays(
    channels: int,
    outputs: int,
    size: Sequence[int],
    out_size: Sequence[int],
    kernel_size: Sequence[int],
    padding: Sequence[int],
    compiled: bool = False,
    idle: float = 1.0,
) -> bool:
    """Whether :func:`conv_square` is cheaper than the product, by multiplications within a group.

    Args:
        channels: Input channels of a group.
        outputs: Output channels of a group.
        size: Of the input.
        out_size: Of the output.
        kernel_size: One integer a spatial dimension.
        padding: The same.
        compiled: Whether the compiled form is to be had; it computes half of each symmetric matrix, and no border.
        idle: Threads for each sample and group: a sample's Gram form is the work of one, so above 1 some do nothing.
    """
    positions, entries = math.prod(out_size), math.prod(kernel_size)
    product = positions * channels * entries * outputs
    if not compiled:
        volume = math.prod(s + 2 * p for s, p in zip(size, padding, strict=True))
        return GAIN * (volume**2 * channels + positions**2 * (outputs + 4 * entries)) < product
    if entries > LARGEST["entries"] or max(padding) > LARGEST["padding"]:
        return False
    matrices = (math.prod(size) ** 2 * channels + positions**2 * outputs) / 2
    return COMPILED_GAIN * max(1.0, idle) * (TILES * matrices + SHIFT * entries * positions**2) < product


def form(g: Tensor, groups: int = 1) -> tuple[bool, float]:
    """Whether the compiled form is to be had for an output gradient, and the threads for each sample and group of it."""
    return supports(g, {2.0}), torch.get_num_threads() / (len(g) * groups)


def _gram(t: Tensor) -> Tensor:
    """``(B, V, V)`` from ``(B, C, V)``."""
    return t.mT @ t


def _summed(left: Tensor, right: Tensor, direct: Callable[[Tensor], Tensor]) -> Moments:
    """``sum_{p,q} left right`` for each sample ``(N, B, P, P)``, direct where it cancels."""
    dtype = accumulator(left)
    norms = (left.diagonal(dim1=2, dim2=3) * right.diagonal(dim1=2, dim2=3)).clamp(min=0).sqrt()
    bound = norms.sum(2, dtype=dtype).square()
    return {2.0: _kept((left * right).sum((2, 3), dtype=dtype), bound, direct)}


def _compiled(x: Tensor, g: Tensor, *arguments: Any) -> Moments:
    """The same by the compiled form."""
    *spec, direct = arguments
    total, square, bound = native_squares(x, g, *spec)
    return {"sum": total.sum(1), 2.0: _kept(square, bound, direct)}


def _kept(square: Tensor, bound: Tensor, direct: Callable[[Tensor], Tensor]) -> Tensor:
    """Sums ``(N, B)`` over groups, direct where they are so far below their bounds that digits were lost."""
    total, most = square.sum(1), bound.sum(1)
    lost = (total < CANCELLED * most) & most.isfinite()
    if bool(lost.any()):
        total[lost] = direct(lost).to(total.dtype)
    return total


def linear_square(a: Tensor, g: Tensor) -> Moments:
    """Sums of squares of a linear layer's per-sample weight gradients, and their sums where those come for nothing.

    Args:
        a: ``(N, T, I)``.
        g: ``(N, T, O)``.

    Returns:
        ``(N,)`` each.
    """

    def direct(rows: Tensor) -> Tensor:
        return (g[rows].mT @ a[rows]).double().square().sum((1, 2))

    if supports(g, {2.0}):
        return _compiled(a.mT, g.mT, [1], [1], [0], [1], 1, direct)
    return _summed(_gram(a.mT)[:, None], _gram(g.mT)[:, None], direct)


def conv_square(
    x: Tensor,
    g: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    direct: Callable[[Tensor], Tensor],
) -> Moments:
    """Sums of squares of a convolution's per-sample weight gradients, and their sums where those come for nothing.

    The Gram matrix of the patches is a sum of the pixels' Gram matrix, shifted by each kernel entry.

    Args:
        x: ``(N, C_in, *S)``.
        g: ``(N, C_out, *S')``.
        kernel_size: One integer a spatial dimension.
        stride: The same.
        padding: The same.
        dilation: The same.
        groups: Number of groups.
        direct: The sums of squares of the samples that a mask ``(N,)`` selects, by products.

    Returns:
        ``(N,)`` each.
    """
    if supports(g, {2.0}) and math.prod(kernel_size) <= LARGEST["entries"] and max(padding) <= LARGEST["padding"]:
        return _compiled(x, g, kernel_size, stride, padding, dilation, groups, direct)
    if any(padding):
        x = F.pad(x, [p for pad in reversed(padding) for p in (pad, pad)])
    n, plane, out = len(g), x.shape[2:], g.shape[2:]
    volume, positions = math.prod(plane), math.prod(out)
    pixels = _gram(x.reshape(n * groups, x.shape[1] // groups, volume))
    pitch = [math.prod(plane[d + 1 :]) for d in range(len(plane))]
    steps = [p * s for p, s in zip(pitch, stride, strict=True)]
    # Both axes of the pixels' Gram matrix move with the output positions, and along its diagonal with the kernel entry.
    strides = (volume**2, *(s * volume for s in steps), *steps)
    patches = torch.zeros(n * groups, *out, *out, dtype=x.dtype, device=x.device)
    for entry in _entries(kernel_size):
        shift = sum(e * d * p for e, d, p in zip(entry, dilation, pitch, strict=True)) * (volume + 1)
        patches += pixels.as_strided((n * groups, *out, *out), strides, shift)
    gradients = _gram(g.reshape(n * groups, g.shape[1] // groups, positions))
    shape = (n, groups, positions, positions)
    return _summed(patches.view(shape), gradients.view(shape), direct)


def _entries(kernel_size: Sequence[int]) -> list[tuple[int, ...]]:
    grids = torch.meshgrid(*(torch.arange(k) for k in kernel_size), indexing="ij")
    return [tuple(row) for row in torch.stack([grid.flatten() for grid in grids], 1).tolist()]

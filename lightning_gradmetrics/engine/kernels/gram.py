"""Sums of squares from Gram matrices over positions: no weight gradient is formed, and few positions make it cheap.

For ``G = sum_p g_p a_p^T``: ``|G|_2^2 = sum_{p,q} (g_p . g_q)(a_p . a_q)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_gradmetrics.statistics import accumulator

__all__ = ["conv_gram_pays", "conv_square", "linear_gram_pays", "linear_square"]

GAIN = 2.8
"""How many times fewer multiplications make a Gram form worth it: measured, against the fused product."""

CANCELLED = 1e-3
"""Below this part of its largest possible value a Gram sum has lost digits to cancellation: it is computed directly."""


def linear_gram_pays(positions: int, inputs: int, outputs: int) -> bool:
    """Whether :func:`linear_square` is cheaper than the product, by multiplications."""
    return GAIN * positions * (inputs + outputs + 2) < inputs * outputs


def conv_gram_pays(
    channels: int,
    outputs: int,
    size: Sequence[int],
    out_size: Sequence[int],
    kernel_size: Sequence[int],
    padding: Sequence[int],
) -> bool:
    """Whether :func:`conv_square` is cheaper than the product, by multiplications within a group."""
    volume = math.prod(s + 2 * p for s, p in zip(size, padding, strict=True))
    positions, entries = math.prod(out_size), math.prod(kernel_size)
    gram = volume**2 * channels + positions**2 * (outputs + 4 * entries)
    return GAIN * gram < positions * channels * entries * outputs


def _gram(t: Tensor) -> Tensor:
    """``(B, V, V)`` from ``(B, C, V)``."""
    return t.mT @ t


def _checked(left: Tensor, right: Tensor, direct: Callable[[Tensor], Tensor]) -> Tensor:
    """``sum_{p,q} left right`` for each sample ``(N, B, P, P)``, direct where it cancels."""
    dtype = accumulator(left)
    total = (left * right).sum((1, 2, 3), dtype=dtype)
    norms = (left.diagonal(dim1=2, dim2=3) * right.diagonal(dim1=2, dim2=3)).clamp(min=0).sqrt()
    bound = norms.sum(2, dtype=dtype).square().sum(1)
    lost = (total < CANCELLED * bound) & bound.isfinite()
    if bool(lost.any()):
        total[lost] = direct(lost).to(dtype)
    return total


def linear_square(a: Tensor, g: Tensor) -> Tensor:
    """Sums of squares of a linear layer's per-sample weight gradients.

    Args:
        a: ``(N, T, I)``.
        g: ``(N, T, O)``.

    Returns:
        ``(N,)``.
    """
    return _checked(
        _gram(a.mT)[:, None], _gram(g.mT)[:, None], lambda rows: (g[rows].mT @ a[rows]).double().square().sum((1, 2))
    )


def conv_square(
    x: Tensor,
    g: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    direct: Callable[[Tensor], Tensor],
) -> Tensor:
    """Sums of squares of a convolution's per-sample weight gradients.

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
        ``(N,)``.
    """
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
    return _checked(patches.view(shape), gradients.view(shape), direct)


def _entries(kernel_size: Sequence[int]) -> list[tuple[int, ...]]:
    grids = torch.meshgrid(*(torch.arange(k) for k in kernel_size), indexing="ij")
    return [tuple(row) for row in torch.stack([grid.flatten() for grid in grids], 1).tolist()]

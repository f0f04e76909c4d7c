"""Sums of powers of gradient entries."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lightning_gradmetrics.gradients.blocks import by_blocks

__all__ = ["power_sum", "sums_of_normal_roots"]

MOST_MULTIPLIED = 16
"""Larger whole powers are not computed by multiplication."""


def power_sum(entries: Tensor, p: float, dtype: torch.dtype | None = None) -> Tensor:
    """Return ``sum_c |x_c|^p`` over axis 1; whole powers by multiplication, which is several times faster.

    Args:
        entries: ``(N, C, *P)``.
        p: A number above 0.
        dtype: The type of the computation and of the result; by default that of the entries. Only a block at a time is
            converted.

    Example:
        >>> power_sum(torch.tensor([[1.0, -2.0]]), 5.0)
        tensor([33.])
    """
    return by_blocks(lambda block: _power_sums(block.to(dtype or block.dtype), p), entries)


def _power_sums(entries: Tensor, p: float) -> Tensor:
    if p == 0.5:
        return _sums_of_roots(entries)
    if float(p).is_integer() and 2 <= p <= MOST_MULTIPLIED:
        return _sums_of_whole_powers(entries, int(p))
    return entries.abs().pow(p).sum(1)


def _sums_of_roots(entries: Tensor) -> Tensor:
    # The square root of torch takes ten times longer for zeros, such as those of a ReLU.
    # Other numbers below the smallest normal one have the root of this number times that of their share of it.
    magnitudes = entries.abs()
    limits = torch.finfo(magnitudes.dtype)
    roots = magnitudes.clamp(min=limits.tiny).sqrt_()
    roots.mul_((magnitudes * (1 / limits.tiny)).clamp_(limits.eps, 1).sqrt_())
    return roots.mul_(magnitudes.sign()).sum(1)


def sums_of_normal_roots(entries: Tensor) -> Tensor:
    """Return the sums over axis 1 of roots of magnitudes, without a graph, and overwrite the entries.

    Args:
        entries: ``(N, C, *P)``; every magnitude must be zero or a normal number.
    """
    magnitudes = entries.abs_()
    if entries.device.type == "cpu":  # the square root of NumPy takes no longer for zeros
        np.sqrt(magnitudes.numpy(), out=magnitudes.numpy())
        return magnitudes.sum(1)
    return magnitudes.sqrt_().sum(1)


def _sums_of_whole_powers(entries: Tensor, p: int) -> Tensor:
    square, product, rest = entries.abs(), None, p
    in_place = not square.requires_grad  # new memory takes as long as the arithmetic
    while rest > 1:
        if rest % 2:
            product = square if product is None else product * square
        square = square.mul_(square) if in_place and square is not product else square * square
        rest //= 2
    if product is not None:
        square = square.mul_(product) if in_place else square * product
    return square.sum(1)

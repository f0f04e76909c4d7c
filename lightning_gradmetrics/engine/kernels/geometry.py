"""The geometry of a convolution: kernel, stride, padding, dilation and groups."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import repeat

import torch.nn.functional as F
from torch import Tensor

__all__ = ["DIMENSIONS", "POINTWISE", "ConvGeometry", "ceil_div", "three"]

Sizes = tuple[int, ...]
DIMENSIONS = 3
"""Largest number of spatial dimensions of a convolution."""


def ceil_div(numerator: int, denominator: int) -> int:
    """Return ``ceil(numerator / denominator)`` for integers."""
    return -(-numerator // denominator)


@dataclass(frozen=True)
class ConvGeometry:
    """Kernel size, stride, padding, dilation and groups of a convolution.

    Args:
        kernel_size: One integer per spatial dimension.
        stride: The same.
        padding: The same; the number of zeros added on each side.
        dilation: The same.
        groups: Number of groups.

    Raises:
        ValueError: If the four sequences differ in length, or their length is not 1, 2 or 3.

    Example:
        >>> ConvGeometry((3, 3), (2, 2), (1, 1), (1, 1)).output_size((8, 8))
        (4, 4)
    """

    kernel_size: Sizes
    stride: Sizes
    padding: Sizes
    dilation: Sizes
    groups: int = 1

    def __post_init__(self) -> None:
        lengths = {len(self.kernel_size), len(self.stride), len(self.padding), len(self.dilation)}
        if len(lengths) != 1 or not lengths <= set(range(1, DIMENSIONS + 1)):
            raise ValueError(f"a convolution has 1 to {DIMENSIONS} spatial dimensions, the same in each field: {self}")

    def lists(self) -> tuple[list[int], ...]:
        """Return kernel size, stride, padding and dilation as lists, as torch's operators take them."""
        return tuple(map(list, (self.kernel_size, self.stride, self.padding, self.dilation)))

    def numbers(self) -> list[int]:
        """Return all fields in one list, as an argument of an operator."""
        return [*self.kernel_size, *self.stride, *self.padding, *self.dilation, self.groups]

    @staticmethod
    @lru_cache
    def of_numbers(numbers: Sizes) -> ConvGeometry:
        """Return the geometry from the list of its fields."""
        d = len(numbers) // 4
        return ConvGeometry(numbers[:d], numbers[d : 2 * d], numbers[2 * d : 3 * d], numbers[3 * d : -1], numbers[-1])

    @property
    def entries(self) -> int:
        """Number of kernel entries of one channel."""
        return math.prod(self.kernel_size)

    def padded_size(self, size: Iterable[int]) -> Sizes:
        """Return the spatial size of an input with its padding."""
        return tuple(length + 2 * pad for length, pad in zip(size, self.padding, strict=True))

    def output_size(self, size: Iterable[int]) -> Sizes:
        """Return the spatial size of the output for an input size."""
        lengths = []
        fields = zip(self.padded_size(size), self.kernel_size, self.stride, self.dilation, strict=True)
        for length, kernel, stride, dilation in fields:
            lengths.append((length - dilation * (kernel - 1) - 1) // stride + 1)
        return tuple(lengths)

    def pad(self, x: Tensor) -> Tensor:
        """Return the input with zeros around it."""
        if not any(self.padding):
            return x
        sides: list[int] = []
        for amount in reversed(self.padding):  # F.pad starts at the last dimension
            sides += (amount, amount)
        return F.pad(x, sides)

    def joined(self, x: Tensor) -> tuple[Tensor, ConvGeometry] | None:
        """Return one input of each sample, and its convolution: several inputs are stacked along a new first spatial dimension.

        Args:
            x: The inputs, ``(N, times, C, *S)``.

        Returns:
            The input ``(N, C, *S)`` or ``(N, C, times, *S)``, a view, and its geometry; ``None`` if there would be four dimensions.
        """
        if x.shape[1] == 1:
            return x[:, 0], self
        return None if len(self.kernel_size) == DIMENSIONS else (x.transpose(1, 2), self._over_inputs())

    def _over_inputs(self) -> ConvGeometry:
        """Return the convolution of several inputs that are stacked along a new first spatial dimension."""
        return ConvGeometry(
            (1, *self.kernel_size), (1, *self.stride), (0, *self.padding), (1, *self.dilation), self.groups
        )

    def in_three_dimensions(self) -> ConvGeometry:
        """Return the same convolution with leading spatial dimensions of size one."""
        return ConvGeometry(
            three(self.kernel_size, 1),
            three(self.stride, 1),
            three(self.padding, 0),
            three(self.dilation, 1),
            self.groups,
        )


def three(values: Iterable[int], fill: int) -> Sizes:
    """Return values for three spatial dimensions, with ``fill`` for the missing leading ones."""
    sizes = tuple(values)
    return (*repeat(fill, DIMENSIONS - len(sizes)), *sizes)


POINTWISE = ConvGeometry((1,), (1,), (0,), (1,))
"""A linear layer over positions."""

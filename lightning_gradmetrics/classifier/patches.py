"""Patches of a convolutional head: the inputs that each weight multiplies at every output position."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["CONVOLUTIONS", "TRANSPOSED", "Patches", "patches_of"]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Patches:
    """The geometry of a convolution, a transposed convolution, or a linear layer over the last axis.

    A *tap* is one kernel position. It maps the layer's input to the values that the weight at this position multiplies,
    one per output position, with zeros outside the input.

    Args:
        kernel: The size of the kernel along every spatial axis; ``()`` for a linear layer.
        stride: The stride along every spatial axis.
        dilation: The dilation along every spatial axis.
        padding: The number of zeros around the input, for a convolution as :func:`torch.nn.functional.pad` takes it.
        mode: The padding mode.
        output_padding: The output padding of a transposed convolution; ``None`` for any other layer.
        groups: The number of groups of channels.

    Example:
        >>> layer = nn.Conv2d(3, 5, 3, padding=1)
        >>> [tuple(tap.shape) for tap in patches_of(layer).taps(torch.zeros(2, 3, 4, 4))][:2]
        [(2, 3, 4, 4), (2, 3, 4, 4)]
    """

    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    mode: str = "constant"
    output_padding: tuple[int, ...] | None = None
    groups: int = 1

    @property
    def count(self) -> int:
        """The number of taps."""
        total = 1
        for size in self.kernel:
            total *= size
        return total

    def taps(self, x: Tensor) -> Iterator[Tensor]:
        """Yield the map ``(N, D, *P)`` of every tap for an input ``(N, D, *Q)``, in the order of the kernel."""
        if not self.kernel:
            yield x
        elif self.output_padding is None:
            yield from self._gathered(x)
        else:
            yield from self._scattered(x)

    def stacked(self, x: Tensor) -> Tensor:
        """Return the patches ``(N, D * taps, *P)``, in the order of the entries of the weight."""
        maps = torch.stack(list(self.taps(x)), 2)
        return maps.flatten(1, 2)

    def _places(self) -> Iterator[tuple[int, ...]]:
        return itertools.product(*(range(size) for size in self.kernel))

    def _gathered(self, x: Tensor) -> Iterator[Tensor]:
        padded = F.pad(x, self.padding, self.mode) if any(self.padding) else x
        sizes = []
        for axis, kernel in enumerate(self.kernel):
            reach = self.dilation[axis] * (kernel - 1) + 1
            sizes.append((padded.shape[2 + axis] - reach) // self.stride[axis] + 1)
        for offsets in self._places():
            tap = padded
            for axis, offset in enumerate(offsets):
                start, stride = offset * self.dilation[axis], self.stride[axis]
                stop = start + stride * (sizes[axis] - 1) + 1
                tap = tap[(slice(None),) * (2 + axis) + (slice(start, stop, stride),)]
            yield tap

    def _scattered(self, x: Tensor) -> Iterator[Tensor]:
        assert self.output_padding is not None
        full, inside = [], []
        for axis, kernel in enumerate(self.kernel):
            reach = self.dilation[axis] * (kernel - 1)
            end = self.stride[axis] * (x.shape[2 + axis] - 1) + reach + self.output_padding[axis] + 1
            full.append(end)
            inside.append(slice(self.padding[axis], end - self.padding[axis]))
        for offsets in self._places():
            tap = x.new_zeros((*x.shape[:2], *full))
            target = tap
            for axis, offset in enumerate(offsets):
                start, stride = offset * self.dilation[axis], self.stride[axis]
                stop = start + stride * (x.shape[2 + axis] - 1) + 1
                target = target[(slice(None),) * (2 + axis) + (slice(start, stop, stride),)]
            target.copy_(x)
            yield tap[(slice(None), slice(None), *inside)]

    def weight_matrix(self, weight: Tensor) -> Tensor:
        """Return the layer's weight as a matrix ``(C, D / groups * taps)`` that multiplies the patches."""
        if self.output_padding is None:
            return weight.flatten(1)
        inside = weight.shape[0] // self.groups
        by_group = weight.unflatten(0, (self.groups, inside)).transpose(1, 2)  # type: ignore[no-untyped-call]
        return by_group.flatten(0, 1).flatten(1)  # type: ignore[no-any-return]


def patches_of(layer: nn.Module) -> Patches | None:
    """Return the geometry of a layer, or ``None`` if it is not a convolution and not linear.

    Args:
        layer: ``nn.Linear``, ``nn.Conv*d`` or ``nn.ConvTranspose*d``.
    """
    if isinstance(layer, nn.Linear):
        return Patches()
    if isinstance(layer, TRANSPOSED):
        return Patches(
            layer.kernel_size,
            layer.stride,
            layer.dilation,
            tuple(layer.padding),  # type: ignore[arg-type]
            output_padding=tuple(layer.output_padding),
            groups=layer.groups,
        )
    if isinstance(layer, CONVOLUTIONS):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        around = tuple(layer._reversed_padding_repeated_twice)
        return Patches(layer.kernel_size, layer.stride, layer.dilation, around, mode, groups=layer.groups)
    return None

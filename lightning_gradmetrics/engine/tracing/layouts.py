"""Describes the positions of the samples in the tensors of a traced forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_gradmetrics.engine.tracing.dependence import Operation

__all__ = ["Layout", "RegroupedError", "Shape", "Step", "UnprovenError"]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """The positions of the samples in a tensor: sample ``n`` has the indices ``(o N + n) inner + i`` on an axis.

    Args:
        dim: The axis.
        outer: Positions before the sample's index.
        inner: Positions after it.
        order: The number of the indices by which a sort has reordered these positions; zero if they are in place.
    """

    dim: int
    outer: int = 1
    inner: int = 1
    order: int = 0

    def moved(self, dim: int) -> Layout:
        """Return the layout on another axis."""
        return replace(self, dim=dim)

    def positions(self, tensor: Tensor) -> Tensor:
        """Return for each of three samples which positions on the axis of a tensor belong to it, ``(3, L)``."""
        positions = torch.arange(tensor.shape[self.dim], device=tensor.device)
        return positions // self.inner % 3 == torch.arange(3, device=tensor.device)[:, None]

    def fits(self, small: Shape, large: Shape) -> bool:
        """Return whether the shapes with two and with three samples differ on this axis only, as in the layout."""
        if not self.dim < len(small) == len(large):
            return False
        positions = self.outer * self.inner
        others = small[: self.dim] == large[: self.dim] and small[self.dim + 1 :] == large[self.dim + 1 :]
        return others and small[self.dim] == 2 * positions and large[self.dim] == 3 * positions


class UnprovenError(Exception):
    """An operation may mix samples."""


class RegroupedError(UnprovenError):
    """An operation takes entries of several samples for those of one."""


@dataclass(frozen=True)
class Step:
    """An operation with the layouts of its tensor arguments; ``None`` for those that do not depend on the samples.

    Args:
        operation: The operation with three samples.
        layouts: The layouts of its tensor arguments.
        small: The operation with two samples.
    """

    operation: Operation
    layouts: Sequence[Layout | None]
    small: Operation

    @property
    def first(self) -> Layout:
        """The layout of the first argument, which must be the only one with samples."""
        layout = self.layouts[0]
        if layout is None or any(other is not None for other in self.layouts[1:]):
            raise UnprovenError
        return layout

    @property
    def shape(self) -> Shape:
        """The shape of the first argument."""
        return self.operation.inputs[0]

    def dims(self, name: str = "dim") -> set[int]:
        """Return the axes that an argument names."""
        value = self.operation.arguments.get(name)
        if value is None or value == []:
            raise UnprovenError
        axes = [value] if isinstance(value, int) else value
        return {axis % len(self.shape) for axis in axes}

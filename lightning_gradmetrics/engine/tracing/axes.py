"""Finds the sample axis of a tensor by comparing shapes for two and for three samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_gradmetrics.engine.tracing.calls import tensors_in

__all__ = ["Axis", "axis_between", "axis_of"]


@dataclass(frozen=True)
class Axis:
    """The sample axis of a tensor, with ``times`` positions per sample (windows, frames, tokens).

    Args:
        dim: The axis.
        times: Number of positions of one sample.
        minor: Whether the sample index varies fastest (position ``t N + n`` instead of ``n times + t``).
    """

    dim: int
    times: int = 1
    minor: bool = False

    def size(self, tensor: Tensor) -> int | None:
        """Return the number of samples in ``tensor``, or ``None`` if its axis is not a multiple of ``times``."""
        if tensor.ndim <= self.dim or tensor.shape[self.dim] % self.times:
            return None
        return tensor.shape[self.dim] // self.times

    def unflatten(self, tensor: Tensor) -> tuple[Tensor, int]:
        """Split the axis into samples and positions; return the result and its sample axis."""
        sizes = (self.times, -1) if self.minor else (-1, self.times)
        if tensor.shape[self.dim] == 0:
            sizes = (self.times, 0) if self.minor else (0, self.times)
        return tensor.unflatten(self.dim, sizes), self.dim + self.minor  # type: ignore[no-untyped-call]

    def split(self, tensor: Tensor) -> Tensor:
        """Return ``(N, times, *others)``: samples, their positions, then the other axes in order."""
        if self.times == 1 and self.dim == 0:
            return tensor.unsqueeze(1)
        if self.times == 1:
            return tensor.movedim(self.dim, 0).unsqueeze(1)
        cut, sample = self.unflatten(tensor)
        return cut.movedim((sample, self.dim + (not self.minor)), (0, 1))


def axis_between(two: Sequence[int], three: Sequence[int]) -> Axis | None:
    """Return the sample axis of a tensor with shape ``two`` for two samples and ``three`` for three; ``None`` if it has none.

    Raises:
        ValueError: If the shapes differ in any other way than one axis that grows with the samples.

    Example:
        >>> axis_between((8, 2, 5), (8, 3, 5)), axis_between((98, 7), (147, 7)), axis_between((3,), (3,))
        (Axis(dim=1, times=1, minor=False), Axis(dim=0, times=49, minor=False), None)
    """
    if tuple(two) == tuple(three):
        return None
    grown = [i for i, (a, b) in enumerate(zip(two, three, strict=False)) if a != b]
    if len(two) != len(three) or len(grown) != 1 or two[grown[0]] * 3 != three[grown[0]] * 2:
        raise ValueError(f"a shape changes from {tuple(two)} to {tuple(three)} between two and three samples")
    return Axis(grown[0], two[grown[0]] // 2)


def axis_of(chosen: Tensor, axes: Sequence[Axis | None], args: Any, kwargs: Any) -> Axis | None:
    """Return the axis of one of a call's arguments, from those of all its tensors."""
    if args and args[0] is chosen:
        return axes[0]
    for tensor, axis in zip(tensors_in((args, kwargs)), axes, strict=True):
        if tensor is chosen:
            return axis
    return None

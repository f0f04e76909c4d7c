"""Shows that forward passes differ between batches only by the number of samples.

A proof that a model keeps its samples apart is made from runs with two and with three samples. It holds for another batch if
the forward pass makes the same calls with the same tensors and constants, and if every size in them is that of the proof:
constant, or proportional to the number of samples.

For other shapes of the inputs, such as another length, one sample alone shows the sizes. If the sizes of three shapes are on a line, as
linear functions of a length are, a fourth shape on that line needs no such run: two sizes that are equal for several lengths, as the proof
requires, are then equal for all.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from lightning_gradmetrics.engine.tracing.outline import Outline

__all__ = ["SizeRecord", "size_record"]

MOST_SHAPES = 256
"""Largest number of input shapes whose sizes are kept."""

MOST_COMPARED = 8
"""Largest number of input shapes with which those of a new batch are compared."""

ON_LINE = 3
"""Number of known shapes on a line that show the sizes of others on it."""


@dataclass(frozen=True)
class SizeRecord:
    """The sizes for which a proof is known to hold.

    Args:
        path: The number of the calls, their tensors and their constants.
        grows: For each size, whether it is proportional to the number of samples.
        units: For each shape of the inputs, the sizes for one sample.
        observed: The first shapes whose sizes come from the proof or from one sample alone, with these sizes.
        backward: The sizes in the backward passes of custom autograd functions, if there are any.
    """

    path: int
    grows: tuple[bool, ...]
    units: dict[Hashable, tuple[int, ...]] = field(default_factory=dict)
    observed: list[tuple[int, ...]] = field(default_factory=list)
    backward: SizeRecord | None = None

    def covers(self, outline: Outline, samples: int, shapes: Hashable) -> bool:
        """Return whether a forward pass of a batch is covered by the proof, for shapes of the inputs that are known."""
        known = self.units.get(shapes)
        return known is not None and outline.path == self.path and _units(outline, self.grows, samples) == known

    def is_unit(self, alone: Outline, shapes: Hashable) -> bool:
        """Return whether the sizes of one sample alone are those for known shapes of the inputs.

        Two and three samples do not show an end such as ``x[:, :4 * len(x)]`` on an axis of length 8.
        """
        return _units(alone, self.grows, 1) == self.units.get(shapes)

    def is_squeezed_unit(self, alone: Outline, outline: Outline, shapes: Hashable) -> bool:
        """Return whether one sample alone differs from a batch by axes of length 1 only, for known shapes of the inputs.

        ``squeeze()`` without an axis removes the sample axis of one sample alone. Its calls, and its sizes other than 1, must be
        those of the batch.

        Args:
            alone: The forward pass of one sample of the batch.
            outline: The forward pass of the batch.
            shapes: The shapes of the inputs.
        """
        known = self.units.get(shapes)
        return known is not None and alone.path != self.path and self._has_units(alone, outline, known)

    def _has_units(self, alone: Outline, outline: Outline, units: tuple[int, ...]) -> bool:
        """Return whether the sizes of one sample alone are those, apart from axes of length 1 if it has not the axes of the batch."""
        if alone.path == self.path:
            return _units(alone, self.grows, 1) == units
        return alone.has_calls_of(outline) and _others(alone.sizes) == _others(units)

    def learn(self, outline: Outline, samples: int, alone: Outline, shapes: Hashable) -> bool:
        """Add new shapes of the inputs, if one sample alone shows that the sizes of a batch grow as in the proof.

        Axes of length 1, which torch broadcasts, must be those of the proof. One sample alone may lack some, as after ``squeeze()``.

        Args:
            outline: The forward pass of a batch.
            samples: Its number of samples.
            alone: The forward pass of one of its samples.
            shapes: The shapes of the inputs.
        """
        units = _units(outline, self.grows, samples)
        known = next(iter(self.units.values()))
        if outline.path != self.path or units is None or _ones(units) != _ones(known):
            return False
        if not self._has_units(alone, outline, units):
            return False
        self._add(shapes, units)
        if len(self.observed) < MOST_COMPARED:
            self.observed.append((*_lengths(shapes), *units))
        return True

    def continues(self, outline: Outline, samples: int, shapes: Hashable) -> bool:
        """Add new shapes of the inputs, if they and the sizes of a batch are on a line through those of known shapes.

        Args:
            outline: The forward pass of a batch.
            samples: Its number of samples.
            shapes: The shapes of the inputs.
        """
        units = _units(outline, self.grows, samples)
        if units is None or outline.path != self.path or len(self.observed) < ON_LINE:
            return False
        first, new = self.observed[0], (*_lengths(shapes), *units)
        if _ones(units) != _ones(next(iter(self.units.values()))):
            return False
        count = 1
        for known in self.observed[1:]:
            count += _are_on_a_line(first, known, new)
        if count < ON_LINE:
            return False
        self._add(shapes, units)
        return True

    def _add(self, shapes: Hashable, units: tuple[int, ...]) -> None:
        while len(self.units) >= MOST_SHAPES:
            del self.units[next(reversed(self.units))]
        self.units[shapes] = units


def _units(outline: Outline, grows: Iterable[bool], samples: int) -> tuple[int, ...] | None:
    """Return the sizes for one sample; ``None`` if a size that grows with the samples is not a multiple of their number."""
    units = []
    for size, is_proportional in zip(outline.sizes, grows, strict=False):
        if is_proportional and size % samples:
            return None
        units.append(size // samples if is_proportional else size)
    return tuple(units) if len(units) == len(outline.sizes) else None


def _lengths(shapes: Hashable) -> Iterator[int]:
    """Yield the lengths of all axes of the inputs."""
    for shape in shapes:  # type: ignore[attr-defined]
        yield from shape


def _are_on_a_line(first: Sequence[int], second: Sequence[int], third: Sequence[int]) -> bool:
    """Return whether three vectors of integers, of which the first two differ, are on a line.

    Example:
        >>> _are_on_a_line([1, 4, 8], [1, 6, 12], [1, 3, 6]), _are_on_a_line([1, 4, 8], [1, 6, 12], [2, 3, 6])
        (True, False)
    """
    if not len(first) == len(second) == len(third):
        return False
    step, other = 0, 0
    for a, b, c in zip(first, second, third, strict=True):
        if not step:
            step, other = b - a, c - a
            if other and not step:
                return False
        elif (b - a) * other != (c - a) * step:
            return False
    return True


def _others(sizes: Iterable[int]) -> list[int]:
    """Return the sizes other than 1."""
    return [size for size in sizes if size != 1]


def _ones(sizes: Iterable[int]) -> list[bool]:
    return [size == 1 for size in sizes]


def size_record(two: Outline, three: Outline, shapes: Hashable) -> SizeRecord | None:
    """Return the record of a proof from its runs with two and with three samples; ``None`` if sizes grow in another way.

    Args:
        two: The run with two samples.
        three: The run with three samples.
        shapes: The shapes of the inputs.
    """
    if two.path != three.path or len(two.sizes) != len(three.sizes) or two.has_hooks or three.has_hooks:
        return None
    grows = tuple(small != large for small, large in zip(two.sizes, three.sizes, strict=True))
    units = _units(three, grows, 3)
    if units is None or units != _units(two, grows, 2):
        return None
    return SizeRecord(three.path, grows, {shapes: units}, [(*_lengths(shapes), *units)])

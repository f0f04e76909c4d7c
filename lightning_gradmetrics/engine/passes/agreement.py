"""Compares two computations of the same gradients, up to rounding."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from lightning_gradmetrics.engine.passes.expected import Expected
from lightning_gradmetrics.engine.tracing.axes import Axis
from lightning_gradmetrics.gradients.precision import at_least_float32
from lightning_gradmetrics.gradients.statistics import Moments

__all__ = [
    "SampleNotes",
    "VerificationNotes",
    "agreeing",
    "agreeing_within",
    "are_close",
    "gradient_norms",
    "largest_norm",
    "random_sample",
]


@dataclass
class VerificationNotes:
    """Notes of a run that verifies a plan.

    Args:
        scales: For each parameter, the magnitude of the terms whose sum is its gradient.
        failures: Parameters whose gradients could not be collected, with reasons.
    """

    scales: defaultdict[str, float] = field(default_factory=partial(defaultdict, float))
    failures: dict[str, str] = field(default_factory=dict)
    finds_uses: ClassVar[bool] = True
    """Whether the run finds parameters that are used outside of torch functions."""

    def add_scale(self, names: Iterable[str], x: Tensor, g: Tensor, axis: Axis) -> None:
        """Add the magnitude of a gradient's terms, because rounding errors are relative to the terms, not to their sum."""
        factor = max(1.0, x.double().norm().item()) if x.is_floating_point() and x is not g else 1.0
        size = factor * (g.abs() if g.is_complex() else g).double().norm().item()
        for name in names:
            self.scales[name] += size

    @contextmanager
    def guarding(self, names: Iterable[str]) -> Iterator[None]:
        """Attribute an error inside the block to the parameters that it concerns."""
        try:
            yield
        except Exception as error:
            for name in names:
                self.failures[name] = f"{type(error).__name__}: {error}"


class SampleNotes(VerificationNotes):
    """Notes of a run of a batch, of which some samples verify a plan, a random one first.

    The plan has a proof, so all uses of parameters are known.

    Args:
        size: The number of samples.

    Attributes:
        sample: The number of the first one.
        unseen: The numbers of objectives, and the parameters whose gradients are zero for the samples compared so far.
    """

    finds_uses = False

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.sample = size, random_sample(size)
        self.unseen: set[tuple[int, str]] = set()
        self._norms: list[tuple[set[str], Tensor]] = []
        self._compared: set[tuple[int, str]] = set()

    def add_scale(self, names: Iterable[str], x: Tensor, g: Tensor, axis: Axis) -> None:
        """Add the magnitude of the sample's gradient of a result, a lower bound of that of the terms."""
        own = axis.split(g)[self.sample]
        self._norms.append((set(names), at_least_float32(own.abs() if own.is_complex() else own).norm()))

    def avoid(self, numbers: Collection[int]) -> None:
        """Choose another first sample if it is one of these, unless they are all samples."""
        if self.sample in numbers:
            self.sample = random_sample(self.size, numbers)

    def scales_of(self, names: Iterable[str], largest: Sequence[float], factor: float) -> list[float]:
        """Return the scales of some parameters, times a factor; none exceeds the given ones."""
        for concerned, norm in self._norms:
            for name in concerned:
                self.scales[name] += float(norm)
        self._norms = []
        return [min(factor * self.scales[name], limit) for name, limit in zip(names, largest, strict=True)]

    def add_gradients(self, objective: int, names: Iterable[str], norms: Sequence[float]) -> None:
        """Record which gradients of a compared sample are zero."""
        for name, norm in zip(names, norms, strict=True):
            key = objective, name
            if norm:
                self._compared.add(key)
                self.unseen.discard(key)
            elif key not in self._compared:
                self.unseen.add(key)


_GENERATOR = torch.Generator().manual_seed(0)
"""Chooses samples, without advancing the user's generators."""


def random_sample(size: int, avoided: Collection[int] = ()) -> int:
    """Return the number of a random sample, not one of the avoided samples unless all are."""
    numbers = [number for number in range(size) if number not in avoided] or list(range(size))
    return numbers[int(torch.randint(len(numbers), (), generator=_GENERATOR))]


def gradient_norms(gradients: Iterable[Tensor]) -> list[float]:
    """Return the norms of some gradients."""
    norms: list[float] = torch.stack(list(map(torch.linalg.vector_norm, gradients))).tolist()
    return norms


def largest_norm(gradients: Iterable[Tensor]) -> float:
    """Return the largest norm of some gradients."""
    return max(gradient_norms(gradients))


def agreeing(
    moments: Moments, gradients: Iterable[Tensor], scales: Sequence[float], tolerance: float | None = None
) -> Tensor:
    """Return for each parameter whether a sample's moments are those of its gradient, up to rounding, ``(P,)``.

    Args:
        moments: The moments, ``(1, P)``.
        gradients: The gradient of each parameter. An iterator may delete each one before it yields the next.
        scales: For each parameter, the magnitude of the terms whose sum is the gradient; rounding errors are relative to it.
        tolerance: The largest relative difference; by default that of rounding.
    """
    return agreeing_within(moments, Expected.of(gradients, moments), scales, [tolerance])[0]


def agreeing_within(
    moments: Moments, expected: Expected, scales: Sequence[float], tolerances: Sequence[float | None]
) -> list[Tensor]:
    """Return the same as :func:`agreeing` for each of several tolerances in ascending order."""
    level = expected.moments[2.0].sqrt()
    level = level + level.new_tensor(scales)
    entries = level.new_tensor(expected.entries)
    agrees: list[Tensor] = []
    rows: Moments = {key: value[0] for key, value in moments.items()}
    for tolerance in tolerances:
        if agrees and bool(agrees[-1].all()):  # by a smaller tolerance
            agrees.append(agrees[-1])
            continue
        allowed = level.new_tensor(expected.rounding) if tolerance is None else torch.full_like(level, tolerance)
        agrees.append(are_close(rows, expected.moments, level, entries, allowed))
    return agrees


def are_close(moments: Moments, expected: Moments, level: Tensor, entries: Tensor, allowed: Tensor) -> Tensor:
    """Return for each parameter whether its moments differ by at most the allowed fraction of their levels.

    Args:
        moments: The moments, ``(P,)`` or ``(N, P)``.
        expected: The moments to compare them with, of the same shape, and possibly others.
        level: The magnitude of the gradient, of the same shape.
        entries: The number of entries, ``(P,)``.
        allowed: The fractions, ``(P,)``.
    """
    agrees = torch.ones_like(level, dtype=torch.bool)
    for key, found in moments.items():
        # The moment of a gradient whose norm is ``level``: an error in it is at most about ``allowed`` times this.
        if key in ("max", "min", "sum"):
            largest = level * entries**0.5 if key == "sum" else level
        else:
            p = float(key)
            largest = expected[key] + level**p * entries ** max(0.0, 1 - p / 2) * allowed ** max(0.0, p - 1)
        error = (found - expected[key]).abs()
        is_close = error <= allowed * largest + torch.finfo(error.dtype).tiny
        agrees &= is_close | ~expected[key].isfinite()
    return agrees

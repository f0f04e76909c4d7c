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

from lightning_gradmetrics.engine.tracing.axes import Axis
from lightning_gradmetrics.engine.uses import merge_rows
from lightning_gradmetrics.gradients.precision import at_least_float32, rounding
from lightning_gradmetrics.gradients.statistics import (
    Moment,
    Moments,
    gradient_moments,
    merged_moments,
    stacked_moments,
)

__all__ = [
    "Expected",
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


BLOCK = 2**17
"""Number of entries of which moments are computed at once: temporary tensors of this size stay in the processor's caches."""


def _moments_by_blocks(gradient: Tensor, wanted: Iterable[Moment]) -> Moments:
    """Return the moments ``(1,)`` of one gradient, without temporary tensors of its size."""
    flat = _in_memory_order(gradient).reshape(1, gradient.numel())
    if gradient.numel() <= BLOCK:
        return gradient_moments(flat, wanted)
    parts = [gradient_moments(block, wanted) for block in torch.split(flat, BLOCK, 1)]
    return merged_moments(stacked_moments(parts))


def _moments_of_each(gradients: Iterable[Tensor], wanted: Collection[Moment]) -> Moments:
    """Return the moments ``(P,)`` of some gradients; those of small ones are computed together."""
    parts: list[Moments] = []
    order: list[int] = []
    small: defaultdict[torch.dtype, dict[int, Tensor]] = defaultdict(dict)
    for number, gradient in enumerate(gradients):
        if not _is_small(gradient, wanted):
            parts.append(_moments_by_blocks(gradient, wanted))
            order.append(number)
            continue
        together = small[gradient.dtype]
        together[number] = gradient
        if len(together) == MOST_TOGETHER:
            parts.append(_moments_of_small(list(together.values()), wanted))
            order += together
            together.clear()
    for together in small.values():
        if together:
            parts.append(_moments_of_small(list(together.values()), wanted))
            order += together
    positions = torch.tensor(order).argsort()
    return {key: value[positions] for key, value in merge_rows(parts).items()}


SMALL = 2**13
"""Largest number of entries of a gradient whose moments are computed together with those of others."""

MOST_TOGETHER = 64
"""Largest number of such gradients."""

_SEGMENTED = frozenset[Moment](["sum", "max", "min", 1.0, 2.0])


def _is_small(gradient: Tensor, wanted: Collection[Moment]) -> bool:
    is_plain = gradient.is_cpu and gradient.layout is torch.strided and gradient.dtype in (torch.float32, torch.float64)
    return is_plain and 0 < gradient.numel() <= SMALL and _SEGMENTED.issuperset(wanted)


def _moments_of_small(gradients: Sequence[Tensor], wanted: Iterable[Moment]) -> Moments:
    """Return the moments ``(P,)`` of small gradients of one type, by a few calls for all of them."""
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients]).double()
    lengths = torch.tensor(list(map(Tensor.numel, gradients)))
    entries: dict[Moment, Tensor] = {1.0: flat.abs(), 2.0: flat * flat}
    moments: Moments = {}
    for key in wanted:
        kind = key if isinstance(key, str) else "sum"
        moments[key] = torch.segment_reduce(entries.get(key, flat), kind, lengths=lengths, unsafe=True)
    return moments


def _in_memory_order(tensor: Tensor) -> Tensor:
    """Return the tensor with its axes in the order of its memory, so that flattening a transposed one needs no copy."""
    if tensor.is_contiguous():
        return tensor
    return tensor.permute(sorted(range(tensor.ndim), key=tensor.stride, reverse=True))


@dataclass(frozen=True)
class Expected:
    """The moments of autograd's gradients of one sample.

    Args:
        moments: Those of each parameter, ``(P,)``.
        entries: The number of entries of each parameter.
        rounding: The relative rounding error of each parameter.
    """

    moments: Moments
    entries: list[int]
    rounding: list[float]

    @classmethod
    def of(cls, gradients: Iterable[Tensor], wanted: Iterable[Moment]) -> Expected:
        """Return the moments of each gradient, with the squares; an iterator may delete each gradient before it yields the next."""
        entries: list[int] = []
        by_rounding: list[float] = []

        def noted() -> Iterator[Tensor]:
            for gradient in gradients:
                entries.append(max(gradient.numel(), 1))
                by_rounding.append(rounding(gradient))
                yield gradient

        moments = _moments_of_each(noted(), {*wanted, 2.0})
        return cls(moments, entries, by_rounding)

    def norms(self) -> list[float]:
        """Return the norm of each gradient."""
        norms: list[float] = self.moments[2.0].sqrt().tolist()
        return norms


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

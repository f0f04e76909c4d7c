"""Compares two computations of the same gradients, up to rounding."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from lightning_gradmetrics.gradients.precision import rounding
from lightning_gradmetrics.gradients.statistics import Moments, accumulator, gradient_moments, stacked_moments

__all__ = ["VerificationNotes", "agreeing", "largest_norm"]


@dataclass
class VerificationNotes:
    """Notes of a run that verifies a plan.

    Args:
        scales: For each parameter, the magnitude of the terms whose sum is its gradient.
        failures: Parameters whose gradients could not be collected, with reasons.
    """

    scales: defaultdict[str, float] = field(default_factory=partial(defaultdict, float))
    failures: dict[str, str] = field(default_factory=dict)

    def add_scale(self, names: Iterable[str], x: Tensor, g: Tensor) -> None:
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


def largest_norm(gradients: Iterable[Tensor]) -> float:
    """Return the largest norm of some gradients."""
    norms = [gradient.norm() for gradient in gradients]
    largest: float = max(torch.stack(norms).tolist())
    return largest


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
    columns, norms, counts, tolerances = [], [], [], []
    for gradient in gradients:
        flat = gradient.reshape(1, gradient.numel())
        columns.append(gradient_moments(flat, moments))
        norms.append(flat.norm(dim=1).to(accumulator(flat)))
        counts.append(max(gradient.numel(), 1))
        tolerances.append(rounding(gradient) if tolerance is None else tolerance)
    level = torch.cat(norms)
    level = level + level.new_tensor(scales)
    entries, allowed = level.new_tensor(counts), level.new_tensor(tolerances)
    agrees = torch.ones(len(level), dtype=torch.bool, device=level.device)
    for key, expected in stacked_moments(columns).items():
        # The moment of a gradient whose norm is ``level``: an error in it is at most about ``tolerance`` times this.
        if key in ("max", "min", "sum"):
            largest = level * entries**0.5 if key == "sum" else level
        else:
            p = float(key)
            largest = expected[0] + level**p * entries ** max(0.0, 1 - p / 2) * allowed ** max(0.0, p - 1)
        error = (moments[key] - expected)[0].abs()
        is_close = error <= allowed * largest + torch.finfo(error.dtype).tiny
        agrees &= is_close | ~expected[0].isfinite()
    return agrees

"""Compares two computations of the same gradients, up to rounding."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from lightning_gradmetrics.gradients.precision import rounding
from lightning_gradmetrics.gradients.statistics import Moments, accumulator, gradient_moments

__all__ = ["VerificationNotes", "agree"]


@dataclass
class VerificationNotes:
    """Notes of a run that verifies a plan.

    Args:
        scales: For each parameter, the magnitude of the terms whose sum is its gradient.
        failures: Parameters whose gradients could not be collected, with reasons.
    """

    scales: defaultdict[str, float] = field(default_factory=partial(defaultdict, float))
    failures: dict[str, str] = field(default_factory=dict)


def agree(moments: Moments, gradient: Tensor, scale: float, tolerance: float | None = None) -> bool:
    """Return whether moments ``(N,)`` are those of a gradient, up to rounding.

    Args:
        moments: The moments, of ``N`` samples.
        gradient: ``(N, ...)``.
        scale: The magnitude of the terms whose sum is the gradient; rounding errors are relative to it.
        tolerance: The largest relative difference; by default that of rounding.
    """
    if tolerance is None:
        tolerance = rounding(gradient)
    flat = gradient.reshape(len(gradient), gradient[:1].numel())
    expected = gradient_moments(flat, moments)
    level = flat.norm(dim=1).to(accumulator(flat)) + scale
    entries = max(flat.shape[1], 1)
    for key, value in moments.items():
        # The moment of a gradient whose norm is ``level``: an error in it is at most about ``tolerance`` times this.
        if key in ("max", "min", "sum"):
            largest = level * entries**0.5 if key == "sum" else level
        else:
            p = float(key)
            largest = expected[key] + level**p * entries ** max(0.0, 1 - p / 2) * tolerance ** max(0.0, p - 1)
        error = (value - expected[key]).abs()
        if not bool((error <= tolerance * largest + torch.finfo(error.dtype).tiny)[expected[key].isfinite()].all()):
            return False
    return True

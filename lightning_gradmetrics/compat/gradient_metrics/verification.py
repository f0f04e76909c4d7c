"""Compares collected gradients with autograd the first time that a parameter occurs."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lightning_gradmetrics.engine.kernels.reduction import CHUNK_ENTRIES
from lightning_gradmetrics.engine.passes.plan import DisagreementError
from lightning_gradmetrics.engine.uses import Use
from lightning_gradmetrics.gradients.statistics import accumulator

__all__ = ["Record", "Verification"]

TOLERANCES = {torch.float64: 1e-7, torch.float32: 1e-3}
HALF_TOLERANCE = 5e-2
FLOOR = 1e-3
"""Errors below this fraction of the largest gradient, times the tolerance, count as rounding."""

TRIALS = 3
"""Number of comparisons after which a gradient that consists of rounding errors counts as verified."""


class Record:
    """The parameters whose gradients agreed with autograd's, and the norms of these gradients."""

    def __init__(self) -> None:
        self._norms: dict[int, float] = {}
        self._trials: Counter[int] = Counter()

    def open(self, keys: Iterable[int]) -> set[int]:
        """Return the parameters to compare, plus the one with the largest gradient as a scale; empty if all have agreed."""
        missing = set(keys) - self._norms.keys()
        if missing and self._norms:
            missing.add(max(self._norms, key=self._norms.__getitem__))
        return missing

    def note(self, key: int, norm: float, exact: bool) -> None:
        """Record a comparison; ``exact`` is false if the gradient consisted of rounding errors."""
        if not norm:
            return
        self._trials[key] += 1
        if exact or self._trials[key] >= TRIALS:
            self._norms[key] = max(norm, self._norms.get(key, 0.0))


class Verification:
    """Compares the weighted sum of all samples' gradients with autograd's gradient of the weighted losses.

    Args:
        references: Autograd's gradients, by the parameter's identity.
        weights: The weights of the losses, ``(M,)``.
        half: Whether the forward pass ran in half precision.
        record: Stores the comparisons.
    """

    def __init__(self, references: Mapping[int, Tensor], weights: Tensor, half: bool, record: Record) -> None:
        self._references: dict[int, Tensor] = {}
        for key, gradient in references.items():
            self._references[key] = gradient.to_dense() if gradient.is_sparse else gradient
        self._weights, self._half, self._record = weights.double(), half, record
        self._sums: dict[int, Tensor] = {}
        self._sizes: defaultdict[int, float] = defaultdict(float)

    def __call__(self, key: int, use: Use, numbers: Tensor) -> None:
        """Add one use of a parameter; ``numbers`` are the losses of its samples."""
        reference = self._references.get(key)
        if reference is None:
            return
        device = self._weights.device
        weights = self._weights[numbers.to(device)].masked_fill((numbers < 0).to(device), 0)
        total = self._sums.setdefault(key, torch.zeros_like(reference, dtype=accumulator(reference)))
        step = max(1, CHUNK_ENTRIES // max(1, math.prod(use.shape)))
        for start in range(0, len(use), step):
            gradients = use.rows(start, start + step).gradient().detach().reshape(-1, reference.numel())
            own = weights[start : start + step].to(gradients.dtype)
            total += (own @ gradients).reshape(total.shape)
            self._sizes[key] += float((own * gradients.norm(dim=1)).sum())

    def finish(self) -> None:
        """Compare the sums with autograd's gradients.

        Raises:
            DisagreementError: If a parameter's gradients disagree with autograd's.
        """
        norms = {key: float(reference.double().norm()) for key, reference in self._references.items()}
        largest = max(norms.values(), default=0.0)
        if not math.isfinite(largest):
            return
        for key, reference in self._references.items():
            total = self._sums.get(key, torch.zeros_like(reference))
            level = max(norms[key], self._sizes[key])
            tolerance = HALF_TOLERANCE if self._half else TOLERANCES.get(reference.dtype, HALF_TOLERANCE)
            error = float((total.double() - reference.double()).norm())
            if not error <= tolerance * max(level, FLOOR * largest):
                raise DisagreementError("the fast method disagrees with autograd")
            self._record.note(key, norms[key], error <= tolerance * level)

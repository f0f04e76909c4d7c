"""The map from a language model's head to its logits: the identity, a scaling, or a soft cap."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["IDENTITY", "LogitMap", "recognised_map"]

ROUNDINGS = 16
"""Largest difference between a recognised map and the model's logits, in rounding errors of the largest logit."""


@dataclass(frozen=True)
class LogitMap:
    """An elementwise map from the head's output ``a`` to the logits: ``scale a``, or ``cap tanh(a / cap)``.

    Args:
        scale: The factor.
        cap: The soft cap, or ``None``.

    Example:
        >>> LogitMap(scale=0.5)(torch.tensor([4.0])), LogitMap(cap=2.0).slope(torch.tensor([0.0, 4.0]))
        (tensor([2.]), tensor([1.0000, 0.0707]))
    """

    scale: float = 1.0
    cap: float | None = None

    @property
    def is_identity(self) -> bool:
        """Whether the logits are the head's output."""
        return self.scale == 1.0 and self.cap is None

    def __call__(self, output: Tensor) -> Tensor:
        """Return the logits for outputs of the head."""
        if self.cap is None:
            return self.scale * output
        return self.cap * torch.tanh(output / self.cap)

    def holds(self, output: Tensor, logits: Tensor) -> bool:
        """Return whether the logits are those of the outputs, up to rounding; outputs that are not finite are left out.

        Args:
            output: The head's output, any shape.
            logits: The model's logits, the same shape.
        """
        a, z = _finite(output, logits)
        if not len(a):
            return True
        if not bool(z.isfinite().all()):  # a mask of -inf stops the gradient of its entries
            return False
        tolerance = ROUNDINGS * torch.finfo(output.dtype).eps * float(z.abs().max())
        return bool(((self(a) - z).abs() <= tolerance).all())

    def slope(self, output: Tensor) -> Tensor | float:
        """Return the derivative of the logits with respect to the head's output: the scale, or one entry per output."""
        if self.cap is None:
            return self.scale
        return torch.cosh(output / self.cap).square().reciprocal()


IDENTITY = LogitMap()


def recognised_map(output: Tensor, logits: Tensor) -> LogitMap | None:
    """Return the map from the head's output to the logits, or ``None`` if it is not of a known form.

    The scale and the cap are estimated from the values and then checked on all of them.

    Args:
        output: The head's output, any shape.
        logits: The model's logits, the same shape.

    Example:
        >>> output = torch.tensor([1.0, -20.0, 40.0], dtype=torch.float64)
        >>> found = recognised_map(output, 30 * torch.tanh(output / 30))
        >>> round(found.cap, 6)
        30.0
    """
    output, logits = output.detach(), logits.detach()
    if torch.equal(output.to(logits.dtype), logits):
        return IDENTITY
    a, z = _finite(output, logits)
    if not len(a) or not a.any() or not bool(z.isfinite().all()):
        return None
    for candidate in (_scaling(a, z), _capping(a, z)):
        if candidate is not None and candidate.holds(output, logits):
            return candidate
    return None


def _finite(output: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the finite outputs and their logits, in float64."""
    is_finite = output.isfinite()
    return output[is_finite].double(), logits[is_finite].double()


def _scaling(a: Tensor, z: Tensor) -> LogitMap | None:
    scale = float((a * z).sum() / a.square().sum())
    return LogitMap(scale=scale) if scale > 0 else None


def _capping(a: Tensor, z: Tensor) -> LogitMap | None:
    """Return the cap that maps the largest output to its logit, by bisection: ``c tanh(a / c)`` increases with c."""
    largest = int(a.abs().argmax())
    size, capped = abs(float(a[largest])), abs(float(z[largest]))
    if not 0 < capped < size:
        return None
    low, high = capped, 2 * capped
    while high * math.tanh(size / high) < capped:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        if middle * math.tanh(size / middle) < capped:
            low = middle
        else:
            high = middle
    return LogitMap(cap=(low + high) / 2)

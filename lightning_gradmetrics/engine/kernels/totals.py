"""Sums over the positions of a layer's output gradient, which a kernel computes beside the moments of the weight's gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["PositionTotals", "new_totals"]


@dataclass
class PositionTotals:
    """The gradients of a bias, ``sum_t g_t``, if the kernel of the weight's gradient has computed them.

    Args:
        value: ``(N, O)``, float64; ``None`` if no kernel has computed them.
    """

    value: Tensor | None = None


def new_totals(totals: PositionTotals | None, g: Tensor) -> Tensor | None:
    """Return zeros to which a kernel adds the sums, and store them in ``totals``; ``None`` if they are not wanted.

    Args:
        totals: Receives the sums.
        g: The gradient of the layer's output, ``(N, T, O)``.
    """
    if totals is None:
        return None
    totals.value = torch.zeros(g.shape[0], g.shape[2], dtype=torch.float64)
    return totals.value

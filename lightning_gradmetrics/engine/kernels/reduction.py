"""Moments of the rows of a matrix."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from lightning_gradmetrics.statistics import Moment, Moments, gradient_moments

__all__ = ["row_moments"]


def row_moments(flat: Tensor, wanted: Iterable[Moment]) -> Moments:
    """Moments of each row.

    Args:
        flat: ``(N, D)``.
        wanted: The moments to compute.

    Returns:
        Each moment, ``(N,)``, in the precision of :func:`lightning_gradmetrics.statistics.accumulator`.

    Example:
        >>> import torch
        >>> row_moments(torch.tensor([[1.0, -2.0]]), ["min"])
        {'min': tensor([-2.], dtype=torch.float64)}
    """
    return gradient_moments(flat, wanted)

"""Sums of squares and of higher powers in single precision, of entries whose powers overflow or vanish."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["LEAST", "lost_rows", "may_have_lost", "noted_ranges", "squares_in_graph"]

LEAST = 1e-28
"""Smaller sums may lack entries below 1e-19, whose squares have few digits in float32, or none. ``kernels.h`` has the same number."""


def may_have_lost(powers: Tensor) -> bool:
    """Return whether sums of powers, computed in float32, may be wrong: infinite, or without their small entries.

    Example:
        >>> may_have_lost(torch.tensor([1.0, 2.0])), may_have_lost(torch.tensor([1.0, 0.0]))
        (False, True)
    """
    if not powers.numel():
        return False
    low, high = torch.aminmax(powers)
    return not (float(low) >= LEAST and float(high) < math.inf)  # a comparison with NaN is False


def lost_rows(powers: Tensor, factor: Tensor) -> Tensor | None:
    """Return the numbers of the samples for which that may be so; ``None`` if there are none.

    Args:
        powers: The sums of powers, ``(N,)``.
        factor: A factor of all entries, ``(N, ...)``: where it is zero, they are. Their sum may also be zero where they are not.

    Example:
        >>> lost_rows(torch.tensor([1.0, 0.0, torch.inf]), torch.tensor([[1.0], [0.0], [2.0]]))
        tensor([2])
    """
    if not may_have_lost(powers):
        return None
    rows = (~((powers >= LEAST) & (powers < math.inf))).nonzero()[:, 0]
    rows = rows[_are_not_zero(factor if len(rows) == len(factor) else factor[rows])]
    return rows if len(rows) else None


class _OfThread(threading.local):
    """What the current thread notes while it traces a graph."""

    ranges: list[Tensor] | None = None


_THREAD = _OfThread()


@contextmanager
def noted_ranges() -> Iterator[list[Tensor]]:
    """Collect, for sums of squares in a graph, whether they are right, ``(N, ...)``, in a list.

    Without this block, a graph computes squares in double precision, which takes longer.
    """
    before, _THREAD.ranges = _THREAD.ranges, []
    try:
        yield _THREAD.ranges
    finally:
        _THREAD.ranges = before


def squares_in_graph(entries: Tensor) -> Tensor:
    """Return the sums of squares over axis 1 of entries in single precision whose values cannot be read.

    Args:
        entries: ``(N, A, *P)``.
    """
    if _THREAD.ranges is None:
        entries = entries.double()
    squares: Tensor = torch.linalg.vecdot(entries, entries, dim=1)
    if _THREAD.ranges is not None:
        is_zero = entries.abs().sum(1) == 0
        _THREAD.ranges.append(((squares >= LEAST) & (squares < math.inf)) | is_zero)
    return squares


def _are_not_zero(rows: Tensor) -> Tensor:
    """Return whether any entry of each row ``(N, ...)`` is not zero; ``any`` takes two to five times as long."""
    if not rows.numel():
        return rows.flatten(1).any(1)
    axes = tuple(range(1, rows.ndim))
    return (rows.amax(axes) != 0) | (rows.amin(axes) != 0)

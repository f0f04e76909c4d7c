"""The statistics that the compiled kernels return for pieces of each sample's gradient."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

import torch
from torch import Tensor

from lightning_gradmetrics.engine.kernels.library import library_for
from lightning_gradmetrics.gradients.lost_digits import lost_rows
from lightning_gradmetrics.gradients.statistics import Moment, Moments

__all__ = ["ORDER", "checked_moments", "joined_moments"]

ORDER: tuple[Moment, ...] = ("sum", 2.0, 1.0, "max", "min")
"""The moments in the order in which the kernels return them."""


def joined_moments(out: Tensor, wanted: Iterable[Moment]) -> Moments:
    """Return the moments from statistics of pieces ``(N, pieces, 5)``."""
    columns = out.squeeze(1).unbind(-1)
    moments: Moments = {}
    for key in wanted:
        pieces = columns[ORDER.index(key)]
        if pieces.ndim == 1:
            moments[key] = pieces
        elif key == "max":
            moments[key] = pieces.amax(1)
        elif key == "min":
            moments[key] = pieces.amin(1)
        else:
            moments[key] = pieces.sum(1)
    return moments


def checked_moments(
    out: Tensor, g: Tensor, wanted: Collection[Moment], may_have_lost: bool, wide: Callable[[Tensor], Moments]
) -> Moments:
    """Return the same, in double precision for samples whose squares overflow or vanish in single precision.

    Args:
        out: Statistics of pieces, ``(N, pieces, 5)``.
        g: The gradient of the layer's output, ``(N, ...)``, of the type of the entries.
        wanted: The wanted moments.
        may_have_lost: Whether the kernel has found a sum of squares out of range.
        wide: Computes the moments of the samples with these numbers in double precision.
    """
    moments = joined_moments(out, wanted)
    if not may_have_lost or 2.0 not in moments or g.dtype != torch.float32 or library_for(torch.float64) is None:
        return moments
    rows = lost_rows(moments[2.0], g)
    if rows is not None:
        for key, values in wide(rows).items():
            moments[key][rows] = values
    return moments

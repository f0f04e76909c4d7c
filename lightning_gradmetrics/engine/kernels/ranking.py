"""The totals that ranking metrics need, by one compiled kernel; they equal those of plain torch up to rounding."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from lightning_gradmetrics.engine.kernels.jobs import RankingJob
from lightning_gradmetrics.engine.kernels.library import library_for

__all__ = ["ranking_totals"]

TYPES = (torch.int32, torch.float64)


def ranking_totals(
    negatives_to: Tensor, positives_to: Tensor, harmonic: Tensor
) -> tuple[float, float, float, float] | None:
    """Return the totals over all samples that ranking metrics need; ``None`` if plain torch must compute them.

    Args:
        negatives_to: ``(G,)`` in int32 or float64, the negatives at or below each distinct score, in ascending order.
        positives_to: ``(G,)`` in int32 or float64, the positives.
        harmonic: The harmonic numbers from 0 to the total number (or weight) of samples, float64.

    Returns:
        The pairs of a positive and a lower negative, ties by half; over all positives, ``H_N - H_{k-1}`` of the ``k``-th
        of ``N`` samples, averaged over all orders of ties; over all positives, the precision at their scores; over all
        negatives, the precision at their scores if low scores are flagged.

    Example:
        >>> negatives_to = torch.arange(1, 100_001, dtype=torch.int32)
        >>> totals = ranking_totals(negatives_to, torch.zeros_like(negatives_to), torch.zeros(100_001).double())
        >>> totals is None or totals == (0.0, 0.0, 0.0, 100_000.0)
        True
    """
    sides = negatives_to, positives_to
    for side in sides:
        if not len(side) or side.device.type != "cpu" or side.dtype not in TYPES or not side.is_contiguous():
            return None
    library = library_for(torch.float64)
    if library is None:
        return None
    out = torch.empty(4, dtype=torch.float64)
    job = RankingJob(
        negatives=negatives_to.data_ptr(),
        positives=positives_to.data_ptr(),
        harmonic=harmonic.data_ptr(),
        out=out.data_ptr(),
        scores=len(negatives_to),
        negatives_are_real=negatives_to.is_floating_point(),
        positives_are_real=positives_to.is_floating_point(),
    )
    library.ranking_totals(ctypes.byref(job), None, 1)
    pairs, risk, precision, precision_in = out.tolist()
    return pairs, risk, precision, precision_in

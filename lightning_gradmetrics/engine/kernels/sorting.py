"""Counts of the samples of each class at or below each distinct score, by compiled kernels around NumPy's sort."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_gradmetrics.engine.kernels.jobs import SortingJob
from lightning_gradmetrics.engine.kernels.library import library_for

__all__ = ["SortedCounts", "sorted_counts"]

UNSIGNED = {torch.float32: np.uint32, torch.float64: np.uint64}
"""The type of the integers that are sorted, by the type of the scores."""

MOST_SAMPLES = 2**31 - 1
"""The counts are in int32."""


class SortedCounts(NamedTuple):
    """Distinct scores and the samples up to each of them.

    Args:
        distinct: ``(G,)``, the distinct scores in ascending order.
        negatives_to: ``(G,)`` in int32, the samples with target 0 at or below each score.
        positives_to: ``(G,)`` in int32, the samples with target 1 at or below each score.
        pairs: The pairs of a positive and a negative with a lower score, ties by half.
    """

    distinct: Tensor
    negatives_to: Tensor
    positives_to: Tensor
    pairs: float


def sorted_counts(scores: Tensor, target: Tensor) -> SortedCounts | None:
    """Return the counts of each distinct score; ``None`` if no kernel supports the type or device of the scores.

    The class of each sample is sorted with its score, in one integer that has all bits of the score.

    Args:
        scores: ``(N,)`` in float32 or float64, without NaN.
        target: ``(N,)``, bool.

    Example:
        >>> counts = sorted_counts(torch.tensor([2.0, -1.0, 2.0]), torch.tensor([True, False, False]))
        >>> counts is None or (counts.distinct.tolist(), counts.pairs) == ([-1.0, 2.0], 1.5)
        True
    """
    if scores.device.type != "cpu" or scores.dtype not in UNSIGNED or len(scores) > MOST_SAMPLES:
        return None
    library = library_for(scores.dtype)
    if library is None:
        return None
    scores, positive = scores.contiguous(), target.contiguous()
    words = torch.empty_like(scores)
    negatives_to, positives_to = torch.empty(2, len(scores), dtype=torch.int32).unbind()
    job = SortingJob(
        scores=scores.data_ptr(),
        positive=positive.data_ptr(),
        words=words.data_ptr(),
        negatives=negatives_to.data_ptr(),
        positives=positives_to.data_ptr(),
        samples=len(scores),
    )
    library.words_to_sort(ctypes.byref(job), None, 1)
    integers = words.numpy().view(UNSIGNED[scores.dtype])
    integers[: job.below].sort()
    integers[job.below :].sort()
    library.counts_of_sorted(ctypes.byref(job), None, 1)
    groups = job.groups
    return SortedCounts(words[:groups], negatives_to[:groups], positives_to[:groups], job.pairs)

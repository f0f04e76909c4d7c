"""Sorts samples by score; on a CPU with NumPy's vectorised integer sort, which is several times faster than torch.sort."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Ranked", "positions", "rank", "sort_with", "sums_at"]

MOST_POSITIONS = 2**31
"""Up to this number of samples, a position fits into 31 bits."""

UPPER = 1 if sys.byteorder == "little" else 0
"""The place of the upper 32 bits of a 64-bit integer among its two halves."""


@dataclass(frozen=True)
class Ranked:
    """Samples in the order of their scores.

    Args:
        scores: ``(G,)``, the distinct scores, ascending.
        order: ``(N,)`` in int32 or int64, the position of each sample, from the lowest score to the highest; tied
            samples are in any order.
        ends: ``(G,)``, the position in ``order`` of the last sample of each distinct score.
    """

    scores: Tensor
    order: Tensor
    ends: Tensor

    @property
    def starts(self) -> Tensor:
        """``(G,)``, the position in ``order`` of the first sample of each distinct score."""
        return torch.cat([self.ends.new_zeros(1), self.ends + 1])[: len(self.ends)]

    def sums_to(self, flags: Tensor) -> Tensor:
        """Return the sums of flags up to and including each distinct score.

        Args:
            flags: ``(N,)`` in bool or uint8, in the order of ``order``.

        Returns:
            ``(G,)`` in int32, or int64 if there are 2^31 samples or more.
        """
        return sums_at(flags, self.ends)


def sums_at(flags: Tensor, ends: Tensor) -> Tensor:
    """Return the cumulative sums ``(G,)`` of flags ``(N,)`` in bool or uint8, at the given positions."""
    # An int32 sum takes a tenth of the time of an int64 sum.
    dtype = torch.int32 if len(flags) < MOST_POSITIONS else torch.int64
    sums = flags.cumsum(0, dtype=dtype)
    return sums if len(ends) == len(sums) else sums.index_select(0, ends)


def rank(scores: Tensor) -> Ranked:
    """Sort samples by score.

    Args:
        scores: ``(N,)`` in float32 or float64, without NaN.
    """
    dtype = torch.int32 if len(scores) < MOST_POSITIONS else torch.int64
    return Ranked(*sort_with(scores, torch.arange(len(scores), dtype=dtype, device=scores.device)))


def sort_with(scores: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sort samples by score, together with a number per sample.

    Args:
        scores: ``(N,)`` in float32 or float64, without NaN.
        numbers: ``(N,)``, whole numbers of at least 0.

    Returns:
        The distinct scores ``(G,)`` in ascending order, the numbers ``(N,)`` in the order of the scores, and the
        position ``(G,)`` of each distinct score's last sample.
    """
    if scores.device.type != "cpu":
        return _sorted(*torch.sort(scores), numbers)
    if scores.dtype == torch.float32 and numbers.dtype != torch.int64:
        return _sort_bits(scores, numbers)
    if scores.dtype == torch.float64:
        narrow = scores.float()
        if torch.equal(narrow.double(), scores):
            distinct, in_order, ends = sort_with(narrow, numbers)
            return distinct.double(), in_order, ends
    order = torch.from_numpy(np.argsort(scores.numpy()))
    return _sorted(scores.index_select(0, order), order, numbers)


def _sorted(ordered: Tensor, order: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    ends = _run_ends(ordered)
    return ordered[ends], numbers.index_select(0, order), ends


def _sort_bits(scores: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sort integers whose upper half is the bits of a float32 score and whose lower half is the number."""
    keys = np.empty(len(scores), dtype=np.int64)
    halves = keys.view(np.int32).reshape(-1, 2)
    upper, lower = halves[:, UPPER], halves[:, 1 - UPPER]
    # Adding 0 turns -0.0 into 0.0, which is equal but has different bits.
    _flip_negative((scores + 0.0).numpy().view(np.int32), upper)
    lower[:] = numbers.numpy()
    keys.sort()
    in_order = torch.from_numpy(lower.astype(numbers.numpy().dtype))
    ends = _run_ends(torch.from_numpy(upper))
    bits = upper[ends.numpy()]
    distinct: Any = _flip_negative(bits, bits).view(np.float32)
    return torch.from_numpy(distinct), in_order, ends


def _flip_negative(bits: Any, result: Any) -> Any:
    """Map the bits of float32 numbers to integers in the same order, or such integers back to bits; return ``result``."""
    mask = bits >> 31
    mask &= 0x7FFFFFFF
    return np.bitwise_xor(bits, mask, out=result)


def _run_ends(ordered: Tensor) -> Tensor:
    """Return the position of the last sample of each run of equal scores."""
    changes = torch.ones(len(ordered), dtype=torch.bool, device=ordered.device)
    torch.ne(ordered[1:], ordered[:-1], out=changes[:-1])
    return positions(changes)


def positions(flags: Tensor) -> Tensor:
    """Return the positions ``(M,)`` of true flags ``(N,)``; NumPy finds them several times faster than torch."""
    if flags.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(flags.numpy()))
    return flags.nonzero().squeeze(1)

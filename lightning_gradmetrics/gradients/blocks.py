"""Computations in blocks of samples whose intermediate results stay in the processor's cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["by_blocks"]

CACHED_ENTRIES = 2**15
"""The number of entries of one block."""


def by_blocks(function: Callable[[Tensor], Tensor], entries: Tensor) -> Tensor:
    """Return a function of each sample, ``(N, *P)``, computed for a few samples at a time.

    New memory for all samples would take longer than the arithmetic.

    Args:
        function: Returns ``(M, *P)`` for entries ``(M, C, *P)``.
        entries: ``(N, C, *P)``.

    Example:
        >>> by_blocks(lambda block: block.square().sum(1), torch.ones(3, 4))
        tensor([4., 4., 4.])
    """
    if entries.device.type != "cpu":
        return function(entries)
    samples = max(1, CACHED_ENTRIES // max(1, entries[0].numel())) if len(entries) else 1
    if 0 < len(entries) <= samples:
        return function(entries)
    blocks = [function(block) for block in torch.split(entries, samples)]  # type: ignore[no-untyped-call]
    return torch.cat(blocks)

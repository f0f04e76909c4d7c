"""Masks that select rows, such as the last token of each text: each sample must have the same number of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["MaskWatch", "mask_marks", "marks_so_many", "selecting_mask"]

_SELECTING = Tensor.__getitem__


def selecting_mask(function: Any, args: Sequence[Any]) -> Tensor | None:
    """Return the mask with which a call selects entries along the first axes of a tensor, as in ``x[mask, :]``.

    Args:
        function: The function.
        args: Its positional arguments.

    Returns:
        The mask; ``None`` for other calls.
    """
    if function != _SELECTING or len(args) < 2:
        return None
    index = args[1]
    first = index[0] if type(index) is tuple and index else index
    return first if isinstance(first, Tensor) and first.dtype is torch.bool and first.ndim else None


def mask_marks(name: str, arguments: Mapping[str, Any]) -> tuple[int, ...]:
    """Return how many entries a mask like ``x[mask, :]`` selects at each position of the first axis; empty for other operations.

    Args:
        name: The name of the operation.
        arguments: Its arguments.
    """
    indices = arguments.get("indices")
    if name != "index" or not indices or indices[0] is None or any(index is not None for index in indices[1:]):
        return ()
    return _marks_of(indices[0]) if indices[0].dtype is torch.bool and indices[0].ndim else ()


def _marks_of(mask: Tensor) -> tuple[int, ...]:
    """Return how many entries of a mask ``(L, ...)`` are true at each position of its first axis, ``(L,)``."""
    counts: list[int] = mask.reshape(len(mask), -1).sum(1).tolist()
    return tuple(counts)


def marks_so_many(mask: Tensor, count: int, samples: int) -> bool:
    """Return whether a mask marks a number of entries of each sample.

    Args:
        mask: The mask, whose first axis begins with all positions of the first sample.
        count: The number of entries.
        samples: The number of samples.
    """
    with torch._C.DisableTorchFunction(), torch.no_grad():
        if len(mask) % samples:
            return False
        return bool((mask.reshape(samples, -1).sum(1) == count).all())


class MaskWatch:
    """Compares the masks that select rows with a plan.

    Args:
        planned: How many entries of each sample each mask must mark, in order; ``None`` for a mask that does not depend on the samples.
        size: The number of samples.

    Attributes:
        seen: The number of masks so far.
    """

    def __init__(self, planned: Sequence[int | None], size: int) -> None:
        self.planned, self.size, self.seen = planned, size, 0

    def matches(self, mask: Tensor) -> bool:
        """Return whether a mask marks the next planned number of entries of each sample."""
        if self.seen >= len(self.planned):
            return False
        count = self.planned[self.seen]
        if count is not None and not marks_so_many(mask, count, self.size):
            return False
        self.seen += 1
        return True

    @property
    def last(self) -> int | None:
        """The planned number of the last mask."""
        return self.planned[self.seen - 1]

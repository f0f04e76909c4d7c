"""Finds sorts among the calls of a model, whose indices show which sample owns each of the sorted rows."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

__all__ = ["GROUPED_PRODUCTS", "SortedKeys", "keys_of_sort"]

_SORTS = frozenset([torch.sort, Tensor.sort])
_ARGSORTS = frozenset([torch.argsort, Tensor.argsort])

GROUPED_PRODUCTS = frozenset([torch._grouped_mm]) if hasattr(torch, "_grouped_mm") else frozenset()
"""The functions that multiply each group of rows by another matrix."""


class SortedKeys(NamedTuple):
    """The result of a sort of a tensor with one axis.

    Args:
        indices: Where each of the sorted entries was, ``(R,)``.
        keys: The sorted entries, ``(R,)``.
    """

    indices: Tensor
    keys: Tensor

    def owners(self, size: int) -> Tensor:
        """Return the sample of each entry, ``(R,)``, if all samples have the same number of entries, those of a sample together."""
        return self.indices // (len(self.indices) // size)

    def ends_at(self, ends: Tensor) -> bool:
        """Return whether group ``e`` ends after all keys up to ``e``, and the last group at the last key."""
        numbers = torch.arange(len(ends), device=ends.device, dtype=self.keys.dtype)
        expected = torch.searchsorted(self.keys, numbers, right=True)
        return bool((expected == ends).all()) and bool(ends[-1] == len(self.keys))


def keys_of_sort(function: Any, args: Any, result: Any) -> SortedKeys | None:
    """Return what a call has sorted; ``None`` for other calls, and for tensors with several axes."""
    if function not in _SORTS and function not in _ARGSORTS:
        return None
    indices = result[1] if function in _SORTS else result
    if not args or not isinstance(args[0], Tensor) or args[0].ndim != 1:
        return None
    with torch._C.DisableTorchFunction(), torch.no_grad(), _disable_current_modes():
        return SortedKeys(indices, args[0].detach()[indices])

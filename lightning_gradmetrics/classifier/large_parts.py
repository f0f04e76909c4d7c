"""Fingerprints and lasting copies of large arrays and tensors, so that they are not copied in every call."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["ArrayRecord", "Fingerprint", "fingerprint", "recorded_copy"]

LARGE = 2**20
"""The size in bytes from which an array or a tensor is not copied in every call."""

_ROWS = 2**8
"""The entries of 8 bytes are summed in square blocks of this width, which fit in a cache."""

Fingerprint = tuple[int, int, int]

_COPIES: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""The copy of each large array and tensor, with its fingerprint."""


def fingerprint(part: Tensor | np.ndarray[Any, Any]) -> Fingerprint | None:
    """Return checksums of the bytes of a large array or tensor on the CPU, ``None`` for others.

    The checksums weight rows and columns of blocks, so that they change if entries are swapped or sorted. Reading takes a
    fraction of the time of a copy.

    Example:
        >>> table = np.ones(2**18)
        >>> before = fingerprint(table)
        >>> table[7] = 2
        >>> fingerprint(table) == before, fingerprint(table[:9])
        (False, None)
    """
    if isinstance(part, Tensor):
        return _checksums(part.detach().reshape(-1).view(torch.uint8)) if _is_readable(part) else None
    if part.nbytes < LARGE or not (part.flags.c_contiguous and part.flags.writeable) or part.dtype.hasobject:
        return None
    return _checksums(torch.from_numpy(part.reshape(-1).view(np.uint8)))


def _is_readable(tensor: Tensor) -> bool:
    """Return whether the bytes of a tensor are large and in one piece."""
    if tensor.device.type != "cpu" or tensor.layout != torch.strided or type(tensor) not in (Tensor, nn.Parameter):
        return False
    is_plain = not (tensor.is_quantized or tensor.is_conj() or tensor.is_neg())
    return is_plain and tensor.nbytes >= LARGE and tensor.is_contiguous()


def _checksums(content: Tensor) -> Fingerprint | None:
    """Return the checksums of a vector of bytes; ``None`` if they are not aligned."""
    if content.data_ptr() % 8:
        return None
    size = content.numel() // (8 * _ROWS * _ROWS) * (8 * _ROWS * _ROWS)
    columns, rows = torch.zeros(_ROWS, dtype=torch.int64), []
    for block in content[:size].view(torch.int64).view(-1, _ROWS, _ROWS):
        columns += block.sum(0)
        rows.append(block.sum(1))
    numbers = torch.cat(rows)
    return _weighted(numbers), _weighted(columns), _weighted(content[size:].long())


def _weighted(numbers: Tensor) -> int:
    return int((numbers * torch.arange(1, len(numbers) + 1)).sum())


def recorded_copy(part: Any, mark: Fingerprint | None) -> Any:
    """Return a copy of an array or a tensor that must not be changed; for a large one, the copy of an earlier call.

    Args:
        part: The array or the tensor.
        mark: Its fingerprint.
    """
    known = None if mark is None else _COPIES.get(part)  # type: ignore[no-untyped-call]
    if known is not None and known[0] == mark and known[1].shape == part.shape and known[1].dtype == part.dtype:
        return known[1]
    if isinstance(part, Tensor):
        made: Any = part.detach().clone() if part.requires_grad else part.clone()
    else:
        made = part.copy()
    if mark is not None:
        _COPIES[part] = (mark, made)
    return made


class ArrayRecord:
    """The entries of an array.

    Args:
        array: The array.
    """

    __slots__ = ("_before", "_mark", "array")

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self.array, self._mark = array, fingerprint(array)
        self._before = recorded_copy(array, self._mark)

    def restore(self) -> None:
        """Set the entries to the recorded ones, if they have changed."""
        array = self.array
        if self._mark is not None and fingerprint(array) == self._mark:
            return
        if self._mark is not None or array.dtype.hasobject or array.tobytes() != self._before.tobytes():
            array[...] = self._before

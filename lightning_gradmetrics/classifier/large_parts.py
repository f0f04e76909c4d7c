"""Fingerprints and lasting copies of large arrays and tensors, so that they are not copied in every call."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["ArrayRecord", "Fingerprint", "fingerprint", "recorded_copy"]

LARGE = 2**20
"""The size in bytes from which an array or a tensor is not copied in every call."""

Fingerprint = tuple[int, int]

_COPIES: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""The copy of each large array and tensor, with its fingerprint."""


def fingerprint(part: Tensor | np.ndarray[Any, Any]) -> Fingerprint | None:
    """Return a checksum (CRC-32) of the bytes of a large array or tensor on the CPU and their number, ``None`` for others.

    Sums of the entries do not suffice: they overflow, so that doubled or negated entries may have the same sums.

    Example:
        >>> table = np.ones(2**18)
        >>> before = fingerprint(table)
        >>> table[7] = 2
        >>> fingerprint(table) == before, fingerprint(table[:9])
        (False, None)
    """
    if isinstance(part, Tensor):
        return _checksum(part.detach().reshape(-1).view(torch.uint8).numpy()) if _is_readable(part) else None
    if part.nbytes < LARGE or not part.flags.c_contiguous or part.dtype.hasobject or type(part) not in _ARRAYS:
        return None
    return _checksum(part.reshape(-1).view(np.uint8))


_ARRAYS = (np.ndarray, np.memmap)
"""Types of arrays without further content, such as a mask."""


def _checksum(content: np.ndarray[Any, Any]) -> Fingerprint:
    return zlib.crc32(content.data), content.nbytes


def _is_readable(tensor: Tensor) -> bool:
    """Return whether the bytes of a tensor are large and in one piece."""
    if tensor.device.type != "cpu" or tensor.layout != torch.strided or type(tensor) not in (Tensor, nn.Parameter):
        return False
    is_plain = not (tensor.is_quantized or tensor.is_conj() or tensor.is_neg())
    return is_plain and tensor.nbytes >= LARGE and tensor.is_contiguous()


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

"""Finds missing and repeated rows in a stream, with one bit of memory per row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from lightning_gradmetrics.results.reading import IncompleteResultsError, indices_by_dataset, named_indices

__all__ = ["SeenRows"]

LARGEST_INDEX = 2**34
"""Larger indices would need more than 2 GB of bits."""

BITS_TOGETHER = 2**20
"""The number of bits that are compared at once, a multiple of 8."""

Bits = np.ndarray[Any, np.dtype[np.uint8]]


class SeenRows:
    """The indices of the rows that a stream has returned so far, one bit each; rows without an index are not compared.

    Args:
        where: The name of the results, for messages.

    Example:
        >>> seen = SeenRows("results")
        >>> seen.add(pa.table({"dataset": ["val", "val"], "index": [2, 0]}))
        >>> seen.add(pa.table({"dataset": ["val"], "index": [2]}))
        Traceback (most recent call last):
        ...
        lightning_gradmetrics.results.reading.IncompleteResultsError: results has rows of 'val' more than once: indices 2
    """

    def __init__(self, where: str) -> None:
        self.where = where
        self.unknown: dict[str, int] = {}
        self._bits: dict[str, Bits] = {}

    def add(self, table: pa.Table) -> None:
        """Add rows.

        Args:
            table: With the columns ``dataset`` and ``index``.

        Raises:
            IncompleteResultsError: If a row appears twice.
            ValueError: If an index is negative or too large for this check.
        """
        for name, column in indices_by_dataset(table):
            self.unknown[name] = self.unknown.get(name, 0) + column.null_count
            indices = np.sort(column.drop_null().to_numpy())
            if not len(indices):
                continue
            if indices[0] < 0 or indices[-1] >= LARGEST_INDEX:
                raise ValueError(
                    f"{self.where} has the index {indices[0] if indices[0] < 0 else indices[-1]} in {name!r}; expected 0 to "
                    f"{LARGEST_INDEX - 1}, the sample's position in the dataset"
                )
            repeated = indices[1:][indices[1:] == indices[:-1]]
            if not len(repeated):
                repeated = self._mark(name, indices)
            if len(repeated):
                named = named_indices(np.unique(repeated))
                raise IncompleteResultsError(f"{self.where} has rows of {name!r} more than once: {named}")

    def _mark(self, name: str, indices: Any) -> Any:
        """Set the bits of sorted distinct indices, and return those that were set before."""
        byte, bit = indices >> 3, np.left_shift(1, indices & 7).astype(np.uint8)
        bits = self._bits.get(name, np.zeros(0, dtype=np.uint8))
        if byte[-1] >= len(bits):
            grown = np.zeros(max(int(byte[-1]) + 1, 2 * len(bits)), dtype=np.uint8)
            grown[: len(bits)] = bits
            self._bits[name] = bits = grown
        repeated = indices[(bits[byte] & bit) > 0]
        first = np.flatnonzero(np.diff(byte, prepend=-1))
        bits[byte[first]] |= np.bitwise_or.reduceat(bit, first)
        return repeated

    def check(self, sizes: Mapping[str, int | None]) -> None:
        """Refuse gaps.

        Args:
            sizes: The number of samples of each dataset, ``None`` where it is unknown.

        Raises:
            IncompleteResultsError: If rows of a dataset are missing.
        """
        for name, size in sizes.items():
            if size is None or self.unknown.get(name):
                continue
            bits = self._bits.get(name, np.zeros(0, dtype=np.uint8))
            missing = _unset(bits, size)
            if len(missing):
                raise IncompleteResultsError(f"{self.where} lacks rows of {name!r}: {named_indices(missing)}")


def _unset(bits: Bits, size: int) -> Any:
    """Return the indices below ``size`` whose bits are not set."""
    missing: list[Any] = []
    for start in range(0, size, BITS_TOGETHER):
        stop = min(start + BITS_TOGETHER, size)
        present = np.unpackbits(bits[start >> 3 : (stop + 7) >> 3], bitorder="little")[: stop - start]
        present = np.pad(present, (0, stop - start - len(present)))
        missing.append(start + np.flatnonzero(present == 0))
    return np.concatenate(missing) if missing else np.zeros(0, dtype=np.int64)

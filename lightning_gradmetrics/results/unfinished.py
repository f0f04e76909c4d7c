"""The remaining batches of an interrupted run's dataloader."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
from torch.utils.data import BatchSampler, IterableDataset, Sampler

__all__ = ["RestOfStream", "UnfinishedBatches", "unfinished_batches", "unfinished_list"]

Mask = np.ndarray[Any, np.dtype[np.bool_]]


class UnfinishedBatches(BatchSampler):
    """The batches of a batch sampler without those whose rows are all committed; at least one batch remains.

    The remaining batches equal those of an uninterrupted run, so their scores are the same to the last bit. Lightning
    re-creates a batch sampler from its class with another sampler, so the committed rows are an attribute of the class.
    """

    committed: ClassVar[Mask]

    def rows(self, order: np.ndarray[Any, Any]) -> Mask:
        """Return which rows ``(N,)``, bool, of the whole order are in the remaining batches.

        Args:
            order: The indices of all rows, in the order of the sampler.
        """
        count = len(order) - len(order) % self.batch_size if self.drop_last else len(order)
        batch = np.arange(count) // self.batch_size
        is_left = np.zeros(int(batch[-1]) + 1 if count else 0, dtype=bool)
        is_left[batch[~self.committed[order[:count]]]] = True
        if count and not is_left.any():
            is_left[-1] = True  # Lightning skips a run without batches, and the manifest would be missing
        is_remaining = np.zeros(len(order), dtype=bool)
        is_remaining[:count] = is_left[batch]
        return is_remaining

    def _order(self) -> np.ndarray[Any, Any]:
        return np.fromiter(self.sampler, dtype=np.int64)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the indices of each remaining batch."""
        order = self._order()
        remaining = order[self.rows(order)]
        for start in range(0, len(remaining), self.batch_size):
            yield remaining[start : start + self.batch_size].tolist()

    def __len__(self) -> int:
        """Return the number of remaining batches."""
        return math.ceil(int(self.rows(self._order()).sum()) / self.batch_size)


def unfinished_batches(sampler: Sampler[int], batch_size: int, drop_last: bool, committed: Mask) -> UnfinishedBatches:
    """Return the batches of a sampler that are not committed.

    Args:
        sampler: A sampler whose order is always the same.
        batch_size: The number of rows of a batch.
        drop_last: Whether an incomplete last batch is dropped.
        committed: Which rows ``(N,)`` of the dataset are committed, bool.

    Example:
        >>> from torch.utils.data import SequentialSampler
        >>> committed = np.array([True, True, False, True, True])
        >>> list(unfinished_batches(SequentialSampler(range(5)), 2, False, committed))
        [[2, 3]]
    """
    kind = type("UnfinishedBatches", (UnfinishedBatches,), {"committed": committed})
    return kind(sampler, batch_size, drop_last)  # type: ignore[no-any-return]


class UnfinishedList(list[list[int]]):
    """The remaining batches of a list.

    Attributes:
        whole: All batches of an uninterrupted run.
    """

    whole: list[list[int]]


def unfinished_list(batches: Sequence[Sequence[int]], committed: Mask) -> UnfinishedList:
    """Return the batches of a list that contain rows that are not committed; at least one batch.

    Args:
        batches: The indices of each batch.
        committed: Which rows ``(N,)`` of the dataset are committed, bool.
    """
    whole = [list(batch) for batch in batches]
    left = [batch for batch in whole if not committed[batch].all()]
    remaining = UnfinishedList(left or whole[-1:])
    remaining.whole = whole
    return remaining


class RestOfStream(IterableDataset[Any]):
    """The samples of an iterable dataset after its first rows.

    Args:
        whole: A dataset with a method ``skip(rows)`` that returns the dataset without its first rows, as in the library
            ``datasets``.
        rows: The number of rows to skip.
    """

    def __init__(self, whole: Any, rows: int) -> None:
        self.whole, self.rows = whole, rows

    def __iter__(self) -> Iterator[Any]:
        """Yield the samples after the skipped ones."""
        return iter(self.whole.skip(self.rows))

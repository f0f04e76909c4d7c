"""Determines the index of each row in its dataset from the dataloader."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, SequentialSampler

from lightning_gradmetrics.results.unfinished import UnfinishedBatches

__all__ = [
    "REPEATED",
    "UNKNOWN",
    "Indices",
    "SampleIndex",
    "keeps_order",
    "known_order",
    "sample_indices",
    "whole_numbers",
]

REPEATED = -1
"""The index of a row that is left out because a distributed sampler repeats it or it is already committed."""

UNKNOWN = -2
"""The index of a row whose position in the dataset is unknown."""

Indices = Sequence[int] | np.ndarray[Any, Any]
"""Indices in a dataset."""


def batch_sampler_of(loader: Any) -> Any:
    """Return the loader's batch sampler, without the wrapper that Lightning adds for ``predict``."""
    batches = getattr(loader, "batch_sampler", None)
    return getattr(batches, "_batch_sampler", batches)


def sampler_of(loader: DataLoader[Any]) -> Any:
    """Return the sampler whose order the loader follows; ``None`` if a batch sampler changes the order."""
    batches = batch_sampler_of(loader)
    follows = type(batches) is BatchSampler or isinstance(batches, UnfinishedBatches)
    return batches.sampler if follows else None


def keeps_order(loader: Any) -> bool:
    """Return whether a dataloader returns its batches in the order in which its sampler draws them.

    Workers with ``in_order=False`` do not keep the order, and a class that overrides ``__iter__`` may not.
    """
    is_unordered = getattr(loader, "num_workers", 0) > 0 and not getattr(loader, "in_order", True)
    return type(loader).__iter__ is DataLoader.__iter__ and not is_unordered


def whole_numbers(draw: Any, loader: Any) -> np.ndarray[Any, Any] | range | None:
    """Return the indices of a draw ``(N,)``, counted from the start of the dataset; a range if they are consecutive.

    Returns None if the draw contains anything else, such as keys or pairs.
    """
    if not isinstance(draw, (list, tuple)) or not draw:
        return None
    has_size = hasattr(loader.dataset, "__len__")
    if type(draw) is list and type(draw[0]) is int and draw[0] >= 0:  # that of a sequential sampler costs little
        consecutive = range(draw[0], draw[0] + len(draw))
        if draw == list(consecutive) and (not has_size or consecutive.stop <= len(loader.dataset)):
            return consecutive
    try:
        numbers = np.asarray(draw)
    except (TypeError, ValueError):  # entries of different lengths
        return None
    if numbers.ndim != 1 or numbers.dtype.kind not in "iu":
        return None
    if has_size and int(numbers.max()) >= len(loader.dataset):
        return None  # keys
    if int(numbers.min()) >= 0:
        return numbers
    return np.where(numbers >= 0, numbers, numbers + len(loader.dataset) if has_size else UNKNOWN)


def known_order(loader: Any) -> Indices | None:
    """Return the order in which one process reads a dataset, if it is known in advance and always the same.

    Args:
        loader: A dataloader.

    Returns:
        The indices in the dataset, in the order of the sampler or of the list of batches, or ``None``.
    """
    if not isinstance(loader, DataLoader) or not hasattr(loader.dataset, "__len__") or not keeps_order(loader):
        return None
    batches = batch_sampler_of(loader)
    if isinstance(batches, (list, tuple)):
        return whole_numbers(list(chain.from_iterable(getattr(batches, "whole", batches))), loader)
    sampler = sampler_of(loader)
    if isinstance(sampler, SequentialSampler):
        return range(len(sampler))
    # Lightning wraps the user's sampler; only a sequential sampler returns the same order when it is read twice.
    wrapped = getattr(getattr(sampler, "dataset", None), "_sampler", None)
    in_order = wrapped is None or isinstance(wrapped, SequentialSampler)
    if not isinstance(sampler, DistributedSampler) or not in_order:
        return None
    return np.fromiter(sampler, dtype=np.int64)


def sample_indices(loader: Any, rank: int = 0, world_size: int = 1) -> Indices | None:
    """Return the dataset index of each row that this process will receive, in order; ``None`` if unknown.

    A distributed sampler repeats rows so that all processes receive the same number; repeated rows get the index -1.
    """
    order = known_order(loader)
    if order is None:
        return None
    known, sampler, batches = order, sampler_of(loader), batch_sampler_of(loader)
    if isinstance(batches, (list, tuple)):
        drawn = whole_numbers(list(chain.from_iterable(batches)), loader)
        return drawn if drawn is not None and len(np.unique(drawn)) == len(drawn) else None
    if isinstance(sampler, DistributedSampler):
        position = rank + np.arange(len(order)) * world_size
        known = np.where(position < len(sampler.dataset), order, REPEATED)  # type: ignore[arg-type]
    if isinstance(batches, UnfinishedBatches):
        return np.asarray(known)[batches.rows(np.asarray(order))]
    return known


@dataclass
class SampleIndex:
    """Yields the indices of a loader's rows, batch by batch.

    Args:
        known: The index of each row in order, or ``None``.
        batch_size: Rows of each batch except the last; ``None`` if unknown.
        position: The number of rows returned so far.
        committed: Whether an earlier run committed each index ``(N,)``, bool, or ``None``; committed rows are left out.

    Example:
        >>> index = SampleIndex(list(range(5)), 3)
        >>> index.take(3), index.take(2), SampleIndex().take(2)
        (tensor([0, 1, 2]), tensor([3, 4]), tensor([-2, -2]))
    """

    known: Indices | None = None
    batch_size: int | None = None
    position: int = 0
    committed: np.ndarray[Any, Any] | None = None

    @classmethod
    def of(cls, loader: Any, rank: int = 0, world_size: int = 1) -> SampleIndex:
        """Return the index of a loader's rows, for one of several processes."""
        batches = batch_sampler_of(loader)
        size = batches.batch_size if isinstance(batches, UnfinishedBatches) else getattr(loader, "batch_size", None)
        return cls(sample_indices(loader, rank, world_size), size)

    def take(self, rows: int, seen: Indices | None = None, moved: Tensor | None = None) -> Tensor:
        """Return the indices of the next batch ``(rows,)``: -1 for a row that is left out, -2 for an unknown index.

        Args:
            rows: The number of rows that the step received.
            seen: The indices that the loader drew for this batch, if it recorded them.
            moved: The position in the loader's batch of each row ``(rows,)``, -1 if unknown; ``None`` if no row moved.

        Raises:
            ValueError: If some rows are left out and it is unknown which.
        """
        indices = self._next(rows, seen)
        if seen is None:
            self.position += len(indices)
        drawn = torch.from_numpy(indices) if len(indices) == rows else torch.full((rows,), UNKNOWN)
        return drawn if moved is None else _moved(drawn, moved)

    def skip(self, rows: int, seen: Indices | None = None) -> bool:
        """Skip the next batch and return True if an earlier run committed all its rows; otherwise return False.

        Args:
            rows: The number of rows of the batch.
            seen: The indices that the loader drew for this batch, if it recorded them.
        """
        if self.committed is None:
            return False
        indices = self._next(rows, seen)
        if len(indices) != rows or bool((indices != REPEATED).any()):
            return False
        self.take(rows, seen)
        return True

    def _next(self, rows: int, seen: Indices | None) -> np.ndarray[Any, Any]:
        """Return the indices of the next batch; -1 for the rows that are left out."""
        following: Indices = ()
        if seen is not None:
            following = seen
        elif self.known is not None:
            following = self.known[self.position : self.position + (self.batch_size or rows)]
        indices = np.asarray(following, dtype=np.int64)
        if self.committed is None:
            return indices
        is_done = (indices >= 0) & self.committed[np.maximum(indices, 0)]
        return np.where(is_done, REPEATED, indices)


def _moved(indices: Tensor, order: Tensor) -> Tensor:
    """Return the indices of rows that moved; unknown if their order is."""
    if bool((order >= 0).all()):
        return indices[order]
    if bool((indices == REPEATED).any()):
        raise ValueError(
            "some rows of a batch are left out, because a distributed sampler repeats them or they are already stored, and a "
            "hook such as on_after_batch_transfer changes the batch so that it is unknown which: keep the order and the "
            "labels of the batch in the hook"
        )
    return torch.full_like(indices, UNKNOWN)

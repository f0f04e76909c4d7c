"""The index of each row in its data set, as far as the dataloader tells it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, SequentialSampler

__all__ = ["REPEATED", "UNKNOWN", "SampleIndex", "sample_indices"]

REPEATED = -1
"""The index of a row that a distributed sampler repeats to give all processes the same number of rows."""

UNKNOWN = -2
"""The index of a row whose place in the data set is not known."""


def sample_indices(loader: Any, rank: int = 0, world_size: int = 1) -> list[int] | None:
    """The data set's index of each row that this process will receive, in order; ``None`` if it is not known beforehand.

    A distributed sampler repeats rows so that all processes receive the same number: a repeated row has the index -1.
    """
    if not isinstance(loader, DataLoader) or not hasattr(loader.dataset, "__len__"):
        return None
    sampler = _sampler(loader)
    if isinstance(sampler, SequentialSampler):
        return list(range(len(sampler)))
    # Lightning wraps the user's own sampler; only a sequential one returns the same order when it is read twice.
    wrapped = getattr(getattr(sampler, "dataset", None), "_sampler", None)
    in_order = wrapped is None or isinstance(wrapped, SequentialSampler)
    if not isinstance(sampler, DistributedSampler) or not in_order:
        return None
    size = len(sampler.dataset)  # type: ignore[arg-type]
    return [index if rank + row * world_size < size else REPEATED for row, index in enumerate(sampler)]


def _sampler(loader: DataLoader[Any]) -> Any:
    """The sampler whose order the loader follows; ``None`` behind a batch sampler that may follow another order."""
    batches = getattr(loader.batch_sampler, "_batch_sampler", loader.batch_sampler)
    return batches.sampler if type(batches) is BatchSampler else None


@dataclass
class SampleIndex:
    """The indices of a loader's rows, batch by batch.

    Args:
        known: The index of each row in order, or ``None``.
        batch_size: Rows of each batch but the last; ``None`` if it is not known.
        position: Rows that were taken so far.

    Example:
        >>> index = SampleIndex(list(range(5)), 3)
        >>> index.take(3), index.take(2), SampleIndex().take(2)
        (tensor([0, 1, 2]), tensor([3, 4]), tensor([-2, -2]))
    """

    known: Sequence[int] | None = None
    batch_size: int | None = None
    position: int = 0
    last: Tensor | None = None
    """The indices of the last batch."""

    @classmethod
    def of(cls, loader: Any, rank: int = 0, world_size: int = 1) -> SampleIndex:
        """The index of a loader's rows, for one of several processes."""
        return cls(sample_indices(loader, rank, world_size), getattr(loader, "batch_size", None))

    def take(self, rows: int, seen: Sequence[int] | None = None) -> Tensor:
        """The indices of the next batch ``(rows,)``: -1 for a repeated row, -2 for an unknown one.

        Args:
            rows: The number of rows that the model returned.
            seen: The indices that the loader drew for this batch, if it noted them.
        """
        if seen is not None:
            indices: Sequence[int] = seen
        elif self.known is None:
            indices = ()
        else:
            indices = self.known[self.position : self.position + (self.batch_size or rows)]
            self.position += len(indices)
        is_known = len(indices) == rows
        self.last = torch.tensor(list(indices)) if is_known else torch.full((rows,), UNKNOWN)
        return self.last

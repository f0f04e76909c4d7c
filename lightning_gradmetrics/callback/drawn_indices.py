"""Records the indices that dataloaders draw in a run, for loaders whose order is not known in advance."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from lightning_gradmetrics.results.sample_index import (
    REPEATED,
    keeps_order,
    sample_indices,
    sampler_of,
    whole_numbers,
)

Indices = np.ndarray[Any, Any]

__all__ = ["DrawnIndices", "LoaderRecorder", "RecordedSampler", "noted_indices"]


@dataclass
class Pass:
    """The draws of one pass over a sampler that have not been read yet.

    Args:
        draws: The indices that the sampler yielded for each batch.
        batch: The number of the first batch in ``draws``.
        rows: The number of rows before that batch.
    """

    draws: deque[Any] = field(default_factory=deque)
    batch: int = 0
    rows: int = 0

    def take(self, batch: int) -> tuple[Any, int]:
        """Return the draw of a batch, or ``None``, and the number of rows before it; that draw and all earlier ones are removed."""
        draw, before = None, self.rows
        while self.draws and self.batch <= batch:
            draw, before = self.draws.popleft(), self.rows
            self.rows += len(draw) if isinstance(draw, list) else 1
            self.batch += 1
        return (draw, before) if self.batch == batch + 1 else (None, before)


class RecordedIterator(Iterator[Any]):
    """Yields the items of an iterator, and appends each to the recorded passes."""

    def __init__(self, iterator: Iterator[Any], passes: Sequence[Pass]) -> None:
        self._iterator, self._passes = iterator, passes

    def __next__(self) -> Any:
        """Return the next draw."""
        draw = next(self._iterator)
        draw_copy = list(draw) if isinstance(draw, (list, tuple, Tensor, np.ndarray)) else draw
        for each in self._passes:
            each.draws.append(draw_copy)
        return draw


class RecordedSampler:
    """Wraps a sampler or a batch sampler and records each pass over it; attributes are those of the original.

    Args:
        original: The sampler.

    Example:
        >>> sampler, recorder = RecordedSampler([[3, 1], [2]]), LoaderRecorder(None)
        >>> sampler._recorders.append(recorder)
        >>> list(sampler), len(sampler), recorder.passes[0].draws
        ([[3, 1], [2]], 2, deque([[3, 1], [2]]))
    """

    _batch_sampler: Any
    _recorders: list[LoaderRecorder]

    def __init__(self, original: Any) -> None:
        vars(self).update(_batch_sampler=original, _recorders=[])

    def __iter__(self) -> Iterator[Any]:
        """Start a pass; random numbers are drawn at the same moment as without the recorder."""
        iterator = iter(self._batch_sampler)
        return RecordedIterator(iterator, [recorder.new_pass() for recorder in self._recorders])

    def __len__(self) -> int:
        """Return the length of the original."""
        return len(self._batch_sampler)

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the original."""
        if "_batch_sampler" not in vars(self):  # while a copy is made
            raise AttributeError(name)
        return getattr(self._batch_sampler, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute of the original."""
        setattr(self._batch_sampler, name, value)


class LoaderRecorder:
    """Records the draws of one dataloader.

    Args:
        loader: A dataloader.
    """

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self.passes: list[Pass] = []
        self._read: Pass | None = None
        self._is_decided = False

    @property
    def _key(self) -> str:
        return "batch_sampler" if self.loader.batch_sampler is not None else "sampler"

    def install(self) -> None:
        """Start recording if the loader's order is determined by its sampler and not known in advance."""
        is_read = isinstance(self.loader, DataLoader) and not isinstance(self.loader.dataset, IterableDataset)
        if not is_read or not keeps_order(self.loader) or sample_indices(self.loader) is not None:
            return
        sampler = getattr(self.loader, self._key)
        if hasattr(sampler, "seen_batch_indices"):  # Lightning records them
            return
        if not isinstance(sampler, RecordedSampler):
            sampler = RecordedSampler(sampler)
            self._replace(sampler)
        sampler._recorders.append(self)

    def remove(self) -> None:
        """Stop recording, and restore the loader if nothing else records it."""
        sampler = getattr(self.loader, self._key, None) if isinstance(self.loader, DataLoader) else None
        if isinstance(sampler, RecordedSampler) and self in sampler._recorders:
            sampler._recorders.remove(self)
            if not sampler._recorders:
                self._replace(sampler._batch_sampler)

    def _replace(self, sampler: Any) -> None:
        """Replace the sampler of the loader, and of the iterator that persistent workers keep."""
        vars(self.loader)[self._key] = sampler
        iterator = vars(self.loader).get("_iterator")
        if hasattr(iterator, "_index_sampler"):
            iterator._index_sampler = sampler

    def new_pass(self) -> Pass:
        """Start the record of a new pass and return it."""
        self.passes.append(Pass())
        return self.passes[-1]

    def read(self, batch: int, is_first: bool) -> tuple[Any, int]:
        """Return the draw of a batch, or ``None`` if it is not certain which pass the batch belongs to.

        Args:
            batch: The batch's number.
            is_first: Whether the loader is the first of the run, whose pass Lightning starts before any hook.
        """
        if not self._is_decided:
            drawn = [
                each for each in self.passes if each.draws
            ]  # a loader with workers starts one pass that it never reads
            if drawn and (is_first or len(drawn) == 1):
                self._read = drawn[0]
            self._is_decided = True
        self.passes.clear()
        return (None, 0) if self._read is None else self._read.take(batch)


class DrawnOnce:
    """Identifies samples that were drawn before.

    Example:
        >>> drawn = DrawnOnce()
        >>> drawn.first(np.array([3, 1, 3])), drawn.first(np.array([1, 0])), drawn.repeated
        (array([ 3,  1, -1]), array([-1,  0]), 2)
        >>> drawn.first(range(1, 3)), drawn.first(range(4, 6))
        (array([-1,  2]), array([4, 5]))
    """

    def __init__(self) -> None:
        self._is_drawn = np.zeros(0, dtype=bool)
        self.repeated = 0

    def first(self, numbers: Indices | range) -> Indices:
        """Return the indices of a batch, -1 for those that were drawn before."""
        if isinstance(numbers, range):
            self._grow(numbers.stop)
            is_drawn = self._is_drawn[numbers.start : numbers.stop]
            numbers = np.arange(numbers.start, numbers.stop)
            if not is_drawn.any():
                is_drawn[:] = True
                return numbers
        is_rising = numbers[0] >= 0 and bool((numbers[1:] > numbers[:-1]).all())
        self._grow(max(int(numbers[-1] if is_rising else numbers.max()) + 1, 1))
        if is_rising and not self._is_drawn[numbers].any():
            self._is_drawn[numbers] = True
            return numbers
        is_first = np.zeros(len(numbers), dtype=bool)
        is_first[np.unique(numbers, return_index=True)[1]] = True
        is_known = numbers >= 0
        is_again = is_known & (~is_first | self._is_drawn[np.maximum(numbers, 0)])
        self._is_drawn[numbers[is_known]] = True
        self.repeated += int(is_again.sum())
        return np.where(is_again, REPEATED, numbers)

    def _grow(self, size: int) -> None:
        if size > len(self._is_drawn):
            self._is_drawn = np.append(self._is_drawn, np.zeros(size, dtype=bool))


class DrawnIndices:
    """The indices that the dataloaders of a run draw.

    Args:
        loaders: The dataloaders, in the order of the run.
        rank: The number of this process.
        world_size: The number of processes.
    """

    def __init__(self, loaders: Sequence[Any], rank: int = 0, world_size: int = 1) -> None:
        self.loaders, self.rank, self.world_size = loaders, rank, world_size
        self._recorders = [LoaderRecorder(loader) for loader in loaders]
        self._drawn = [DrawnOnce() for _ in loaders]

    def install(self) -> None:
        """Record from now on."""
        for recorder in self._recorders:
            recorder.install()

    def remove(self) -> None:
        """Stop recording, and restore the dataloaders."""
        for recorder in self._recorders:
            recorder.remove()

    def of_batch(self, place: int, batch: int) -> Indices | None:
        """Return the indices of a batch, -1 for a sample drawn before; ``None`` if they are unknown or known in advance.

        Args:
            place: The dataloader's number.
            batch: The batch's number in its dataloader.
        """
        loader = self.loaders[place]
        indices = noted_indices(loader, batch)
        if indices is None:
            draw, before = self._recorders[place].read(batch, place == 0)
            indices = whole_numbers(draw, loader)
            if indices is not None and self.world_size > 1:
                indices = self._without_added(indices, before, loader)
        return None if indices is None else self._drawn[place].first(indices)

    def repeats(self, place: int) -> bool:
        """Return whether a dataloader drew a sample again."""
        return self._drawn[place].repeated > 0

    def _without_added(self, indices: Indices | range, before: int, loader: Any) -> Indices | None:
        """Return the indices, -1 for rows that a distributed sampler adds as padding; ``None`` for any other wrapping sampler."""
        sampler = sampler_of(loader)
        if not isinstance(sampler, DistributedSampler):
            return None
        rows = before + np.arange(len(indices))
        is_added = self.rank + rows * self.world_size >= len(sampler.dataset)  # type: ignore[arg-type]
        return np.where(is_added, REPEATED, indices)


def noted_indices(loader: Any, batch: int) -> Indices | range | None:
    """Return the indices of a batch if Lightning records them, as it does in ``predict``."""
    noted = getattr(getattr(loader, "batch_sampler", None), "seen_batch_indices", None)
    if not isinstance(noted, list) or batch >= len(noted):
        return None
    if batch:
        noted[batch - 1] = []  # Lightning would keep the indices of all batches
    return whole_numbers(noted[batch], loader) if keeps_order(loader) else None

"""Starts and ends the recording of indices in the loops of a trainer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lightning_gradmetrics.callback.dataloaders import loader_list
from lightning_gradmetrics.callback.drawn_indices import DrawnIndices
from lightning_gradmetrics.callback.listening import after_each_call
from lightning_gradmetrics.callback.module import evaluation_loop, is_side_by_side, processes_of
from lightning_gradmetrics.callback.transfers import Transfers

__all__ = ["IndexRecording"]


class IndexRecording:
    """Records the indices that the dataloaders of a trainer's evaluation loop draw, starting before their first batch."""

    def __init__(self) -> None:
        self._drawn: DrawnIndices | None = None
        self._undo: Callable[[], None] | None = None
        self._transfers: Transfers | None = None

    def watch(self, trainer: Trainer) -> None:
        """Record in each run of the trainer's evaluation loop until :meth:`stop`."""
        self.stop()
        renew = functools.partial(self._renew, trainer)
        self._undo = after_each_call(evaluation_loop(trainer), "setup_data", renew)

    def _renew(self, trainer: Trainer, _: Any) -> None:
        """Record the dataloaders that a loop has set up and will read next."""
        self.pause()
        combined = getattr(evaluation_loop(trainer), "_combined_loader", None)
        if combined is None:
            return
        processes = processes_of(trainer)
        loaders = loader_list(combined.iterables, not is_side_by_side(trainer))
        self._drawn = DrawnIndices(loaders, processes.rank, processes.count)
        self._drawn.install()

    def of_loaders(self, loaders: Sequence[Any]) -> DrawnIndices:
        """Return the recorded indices of the dataloaders of a run."""
        drawn = self._drawn
        if drawn is None or list(map(id, drawn.loaders)) != list(map(id, loaders)):
            return DrawnIndices(loaders)
        return drawn

    def transfers(self, trainer: Trainer, module: LightningModule) -> Transfers:
        """Return the comparison of the batches of a run before and after the hooks that transfer them."""
        self._transfers = Transfers(trainer, module)
        return self._transfers

    def pause(self) -> None:
        """Restore the dataloaders and the hooks, until the loop runs again."""
        if self._transfers is not None:
            self._transfers.stop()
            self._transfers = None
        if self._drawn is not None:
            self._drawn.remove()
            self._drawn = None

    def stop(self) -> None:
        """Restore the dataloaders and the loop."""
        self.pause()
        if self._undo is not None:
            self._undo()
            self._undo = None

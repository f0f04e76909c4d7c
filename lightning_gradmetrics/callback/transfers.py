"""Detects whether hooks of the user move the rows of a batch between its dataloader and the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_gradmetrics.callback.listening import after_each_call
from lightning_gradmetrics.callback.pytorch_lightning import is_of_lightning
from lightning_gradmetrics.classifier.batches import BatchCopy
from lightning_gradmetrics.classifier.row_order import CERTAIN_BITS
from lightning_gradmetrics.classifier.transferred_order import RowMarks, row_marks, transferred_order

__all__ = ["HOOKS", "Transfers"]

HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


class Transfers:
    """Compares each batch before and after the hooks that transfer it; does nothing if the user overrides none of them.

    Args:
        trainer: The trainer.
        module: The user's module.
    """

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        self._before: list[RowMarks] | None = None
        self._after: list[RowMarks] = []
        self._bits = 0.0  # evidence, in bits, that the hooks keep the order of batches with changed values
        self._undo: Callable[[], None] | None = None
        if _overridden(trainer, module):
            self._undo = after_each_call(trainer.precision_plugin, "convert_input", self._leaves_loader)

    def _leaves_loader(self, batch: Any) -> None:
        self._before = _marks(batch)

    def reaches_step(self, batch: Any) -> None:
        """Read the batch before the step.

        Args:
            batch: The batch that the step will receive.
        """
        self._after = [] if self._before is None else _marks(batch)

    def moved(self, size: int) -> Tensor | None:
        """Return the position in the loader's batch of each row that the step received; ``None`` if no row moved.

        Args:
            size: The number of samples ``N``.

        Returns:
            The positions ``(N,)``, or -1 for every row if they are unknown.
        """
        before, self._before = self._before, None
        if before is None:
            return None
        detected = transferred_order(before, self._after, size)
        self._after = []
        if detected is None:
            self._bits = 0.0
            return torch.full((size,), -1)
        if detected.order is not None:
            return detected.order
        if math.isinf(detected.bits):  # certain for this batch, but no evidence on others
            return None
        self._bits += detected.bits
        return None if self._bits >= CERTAIN_BITS else torch.full((size,), -1)

    def stop(self) -> None:
        """Stop reading batches."""
        if self._undo is not None:
            self._undo()
            self._undo = None


def _marks(batch: Any) -> list[RowMarks]:
    """Return the marks of a batch; of an object, those of its attributes."""
    is_object = hasattr(batch, "__dict__") and not isinstance(batch, (Tensor, Mapping, list, tuple))
    return row_marks(BatchCopy(dict(vars(batch)) if is_object else batch).tensors())


def _overridden(trainer: Trainer, module: LightningModule) -> bool:
    """Return whether the module or the data module overrides a hook that transfers batches."""
    owners = [module, getattr(trainer, "datamodule", None)]
    for owner in owners:
        for name in HOOKS:
            if owner is not None and not is_of_lightning(owner, name):
                return True
    return False

"""The step that a module runs while scores are fitted."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule
from torchmetrics import Metric

from lightning_gradmetrics.callback.labels import SplitBatch
from lightning_gradmetrics.callback.pytorch_lightning import is_of_lightning
from lightning_gradmetrics.classifier.forward import call

__all__ = ["fitting_step"]


@contextmanager
def fitting_step(module: LightningModule, split: SplitBatch) -> Iterator[None]:
    """Make ``predict_step`` run a step that the module defines, inside the block.

    A module with a ``predict_step`` runs that step. Otherwise it runs its ``test_step`` or ``validation_step``, which
    prepares the batch as during scoring; it logs nothing and updates none of its torchmetrics. A module without any of
    these is called with the inputs of the batch.

    Args:
        module: The user's module.
        split: Returns the inputs and labels of a batch.
    """
    if not is_of_lightning(module, "predict_step"):
        yield
        return
    replaced = {"predict_step": _step_of(module, split), "log": _nothing, "log_dict": _nothing}
    before = {name: vars(module).get(name) for name in replaced}
    metrics = {metric: _state(metric) for metric in module.modules() if isinstance(metric, Metric)}
    vars(module).update(replaced)
    try:
        yield
    finally:
        for name, value in before.items():
            del vars(module)[name]
            if value is not None:
                vars(module)[name] = value
        for metric, state in metrics.items():
            vars(metric).update(state)


def _state(metric: Metric) -> dict[str, Any]:
    """Return a copy of the state that an update of a metric changes."""
    names = [*metric._defaults, "_update_count", "_computed", "_forward_cache"]
    return {name: copy.deepcopy(vars(metric)[name]) for name in names if name in vars(metric)}


def _step_of(module: LightningModule, split: SplitBatch) -> Callable[..., Any]:
    for name in ("test_step", "validation_step"):
        if not is_of_lightning(module, name):
            return _accepting(getattr(module, name))

    def predict_step(batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return call(module, split(batch)[0])

    return predict_step


def _accepting(step: Callable[..., Any]) -> Callable[..., Any]:
    """Return the step as a function of Lightning's arguments; it receives those that it accepts."""
    names = list(inspect.signature(step).parameters)

    def predict_step(batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        numbers = {"batch_idx": batch_idx, "dataloader_idx": dataloader_idx}
        return step(batch, **{name: value for name, value in numbers.items() if name in names})

    return predict_step


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Log nothing, because ``predict`` cannot log."""

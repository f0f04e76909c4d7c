"""Reads the state of a trainer and a module."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lightning_gradmetrics.callback.processes import Processes
from lightning_gradmetrics.callback.pytorch_lightning import is_of_lightning

__all__ = ["is_side_by_side", "processes_of", "scored_model"]


def processes_of(trainer: Trainer) -> Processes:
    """Return the trainer's processes."""
    return Processes(trainer.world_size, trainer.global_rank)


def is_side_by_side(trainer: Trainer) -> bool:
    """Return whether the running loop draws one batch from all its dataloaders at once (``CombinedLoader``)."""
    loop: Any = trainer._active_loop
    if hasattr(loop, "epoch_loop"):
        loop = loop.epoch_loop.val_loop
    combined = getattr(loop, "_combined_loader", None)
    return combined is not None and combined._mode != "sequential"


def scored_model(module: LightningModule, name: str | None = None, head: str | None = None) -> nn.Module:
    """Return the named submodule, or the module itself, or its only child if the module has no forward.

    Args:
        module: The user's module.
        name: The name of the submodule to score, or ``None``.
        head: The name of the head in the module, or ``None``.

    Raises:
        ValueError: If there is no such submodule, or the choice is not clear.
    """
    children = []
    for key, child in module.named_children():
        if next(child.parameters(), None) is not None:
            children.append(key)
    kind = type(module).__name__
    if name is not None:
        if name not in dict(module.named_modules()):
            raise ValueError(f"{kind} has no submodule {name!r}; its children are: {', '.join(children) or 'none'}")
        return module.get_submodule(name)
    if not is_of_lightning(module, "forward") or (head is not None and head in dict(module.named_modules())):
        return module
    if len(children) != 1:
        raise ValueError(
            f"{kind} has no forward, and {len(children)} children with parameters ({', '.join(children)}): name the one to "
            f"score, as in GradientMetrics(submodule={(children or ['net'])[0]!r})"
        )
    return module.get_submodule(children[0])

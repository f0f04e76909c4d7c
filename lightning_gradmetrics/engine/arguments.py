"""Checks the arguments of the engine's public function, whose types Python does not enforce."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

from torch import nn

from lightning_gradmetrics.classifier.labels import described
from lightning_gradmetrics.gradients.objectives import Objective

__all__ = ["check_arguments"]


def check_arguments(model: Any, objective: Any, parameters: Any, logits: Any, memory: Any) -> None:
    """Refuse arguments of a wrong type, or a limit of memory below one byte.

    Raises:
        TypeError: If the model is not a module, an objective is neither a name nor a callable of the logits, or something is not callable.
        ValueError: If the limit of memory is not a whole number of at least 1.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {described(model)}")
    if parameters is not None and not callable(parameters):
        raise TypeError(
            f"parameters= must be a predicate on names, as in parameters=lambda name: name in {{'fc.weight'}}, got {described(parameters)}"
        )
    if not callable(logits):
        raise TypeError(f"logits= must be a callable from the model's output to logits (N, C), got {described(logits)}")
    if isinstance(objective, nn.modules.loss._Loss):
        raise TypeError(
            f"{type(objective).__name__} needs labels: use the objective 'label' and targets=, or a callable from logits (N, C) to "
            "losses (N,)"
        )
    if not (isinstance(objective, str) or callable(objective) or isinstance(objective, (Iterable, Objective))):
        raise TypeError(
            f"an objective is a name, such as 'pseudo_label', or a callable from logits (N, C) to losses (N,); got {described(objective)}"
        )
    if memory is not None and not _is_positive(memory):
        raise ValueError(f"memory= must be a whole number of bytes of at least 1, or None, got {memory!r}")


def _is_positive(number: Any) -> bool:
    """Return whether a number is of an integral type, such as one of NumPy, and at least 1."""
    try:
        return operator.index(number) >= 1
    except TypeError:
        return False

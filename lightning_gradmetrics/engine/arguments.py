"""Checks of the engine's arguments, whose types Python does not enforce."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradmetrics.classifier.labels import class_numbers, described
from lightning_gradmetrics.gradients.objectives import Objective

__all__ = ["check_arguments", "checked_targets", "detached"]

_WHOLE = (torch.int64, torch.int32, torch.int16, torch.uint8)


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


def detached(tensor: Tensor) -> Tensor:
    """Return the tensor without its graph; a copy if it is an inference tensor."""
    return tensor.detach().clone() if tensor.is_inference() else tensor.detach()


def checked_targets(targets: Any, size: int) -> Tensor | None:
    """Return the class numbers of the samples, ``(N,)``.

    Raises:
        ValueError: If the labels are anything else.
    """
    if targets is None:
        return None  # the objective raises the error
    if isinstance(targets, Tensor) and targets.shape == (size,) and targets.dtype in _WHOLE:
        return detached(targets)
    labels = class_numbers(targets, size)
    if labels is None:
        raise ValueError(f"targets= must be the class numbers ({size},) of the samples, got {described(targets)}")
    return labels

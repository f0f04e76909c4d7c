"""Taking a dataloader's batch apart: inputs and labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_gradmetrics.classifier.forward import Inputs, tensors_in

__all__ = ["LABEL_KEYS", "split_batch"]

LABEL_KEYS = ("label", "labels", "target", "targets", "y")
"""The entries of a mapping that are taken for labels."""


def split_batch(batch: Any) -> tuple[Inputs, Tensor | None]:
    """Inputs and true labels of a batch.

    A tensor is the inputs; of a sequence the first entry is the inputs and the second the labels, if it holds one
    whole number a sample; of a mapping the labels are the entry called ``label``, ``labels``, ``target``, ``targets``
    or ``y``, and what is left is the inputs: keyword arguments, or a tensor where only one is left.

    Args:
        batch: What the dataloader gave.

    Returns:
        The inputs, and the labels ``(N,)`` or ``None``.

    Raises:
        TypeError: If it is none of these.

    Example:
        >>> import torch
        >>> split_batch({"image": torch.zeros(2, 3), "label": torch.tensor([0, 1])})
        (tensor([[0., 0., 0.],
                [0., 0., 0.]]), tensor([0, 1]))
    """
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, Mapping):
        key = next((key for key in LABEL_KEYS if key in batch), None)
        inputs = {k: v for k, v in batch.items() if k != key}
        tensors = [v for v in inputs.values() if isinstance(v, Tensor)]
        return (tensors[0] if len(inputs) == len(tensors) == 1 else inputs), _labels(batch[key], batch) if key else None
    if isinstance(batch, (list, tuple)) and batch and any(True for _ in tensors_in(batch[0])):
        return batch[0], _labels(batch[1], batch) if len(batch) > 1 else None
    raise TypeError(
        f"cannot find the inputs in a batch of type {type(batch).__name__}; allowed: a tensor, (inputs, labels), or a mapping; for "
        "anything else pass split_batch=, a callable from the batch to (inputs, labels)"
    )


def _labels(value: Any, batch: Any) -> Tensor | None:
    """The labels, if they are one class index a sample."""
    if isinstance(value, Tensor) and value.ndim == 1 and not value.is_floating_point() and not value.is_complex():
        return value
    return None

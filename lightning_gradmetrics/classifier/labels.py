"""Converts the labels of a batch to one class number per sample, if their meaning is unambiguous."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["MULTI_LABEL", "class_numbers", "described", "is_like_labels", "map_numbers", "token_numbers"]

MULTI_LABEL = (
    "the scores are those of a softmax over classes of which one is true, and a multi-label model has a sigmoid per class. Score "
    "one class at a time as a binary classifier, with logits_fn=lambda output: output[:, k:k + 1] and split_batch="
)
"""Why multi-label models are refused, and what to do."""


def class_numbers(value: Any, size: int, classes: int | None = None) -> Tensor | None:
    """Return the class number of every sample, ``(N,)``, int64; ``None`` if the value may be something else.

    Accepts integers of any type ``(N,)`` or ``(N, 1)``, booleans, one-hot rows ``(N, C)``, lists of integers, floats with
    integer values, and a single number for one sample.

    Args:
        value: An entry of the batch.
        size: The number of samples ``N``.
        classes: The number of classes ``C``; ``None`` if it is unknown.

    Raises:
        ValueError: If the value is multi-label: rows ``(N, C)`` of 0 and 1 with several ones.

    Example:
        >>> class_numbers(torch.tensor([[1.0], [0.0]]), 2), class_numbers(torch.tensor([[0, 1], [1, 0]]), 2, 2)
        (tensor([1, 0]), tensor([1, 0]))
        >>> class_numbers(torch.tensor([0.5, 1.0]), 2) is None
        True
    """
    labels = _tensor(value)
    if labels is None or labels.is_complex():
        return None
    if labels.ndim == 0 and size == 1:
        labels = labels[None]
    if labels.shape == (size, 1):
        labels = labels[:, 0]
    if labels.ndim == 2 and len(labels) == size and _is_one_hot(labels, classes):
        return labels.long().argmax(1)
    if classes is not None and classes > 1 and labels.shape == (size, classes):
        _refuse_several_classes(labels)
    if labels.shape != (size,) or not _is_whole(labels):
        return None
    return labels.long()


def _refuse_several_classes(labels: Tensor) -> None:
    """Refuse rows of 0 and 1 with more than one 1."""
    is_binary = bool(((labels == 0) | (labels == 1)).all())
    if is_binary and bool((labels.sum(1) > 1).any()):
        raise ValueError(f"the labels {tuple(labels.shape)} mark several classes of one sample: {MULTI_LABEL}")


def map_numbers(value: Any, size: int, classes: int | None = None) -> Tensor | None:
    """Return the class number of every pixel, ``(N, H, W)``, int64; ``None`` if the value may be something else.

    Accepts integers of any type ``(N, H, W)`` or ``(N, 1, H, W)``, and one-hot maps ``(N, C, H, W)``.

    Args:
        value: An entry of the batch.
        size: The number of images ``N``.
        classes: The number of classes ``C``; ``None`` if it is unknown.

    Example:
        >>> map_numbers(torch.ones(2, 1, 4, 5), 2).shape
        torch.Size([2, 4, 5])
    """
    labels = _tensor(value)
    if labels is None or labels.is_complex() or labels.ndim not in (3, 4) or len(labels) != size:
        return None
    if labels.ndim == 4 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim == 4:
        is_binary = labels.shape[1] == classes and bool(((labels == 0) | (labels == 1)).all())
        if not is_binary or not bool((labels.sum(1) == 1).all()):
            return None
        return labels.long().argmax(1)
    return labels.long() if _is_whole(labels) else None


def token_numbers(value: Any, size: int, classes: int | None = None) -> Tensor | None:
    """Return the label of every token ``(N, T)``, int64; ``None`` if the value may be something else.

    Args:
        value: An entry of the batch.
        size: The number of texts ``N``.
        classes: Unused; labels of tokens are compared with the tokens instead.

    Example:
        >>> token_numbers(torch.tensor([[5, 7], [3, -100]]), 2)
        tensor([[   5,    7],
                [   3, -100]])
    """
    labels = _tensor(value)
    is_table = labels is not None and labels.ndim == 2 and len(labels) == size
    if (
        labels is None
        or not is_table
        or labels.dtype == torch.bool
        or labels.is_floating_point()
        or labels.is_complex()
    ):
        return None
    return labels.long()


def _tensor(value: Any) -> Tensor | None:
    """Return the value as a tensor if it contains numbers."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, (str, bytes, Mapping)) or value is None:
        return None
    if isinstance(value, (list, tuple)) and not all(isinstance(item, (bool, int)) for item in value):
        return None
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        return None


def _is_one_hot(labels: Tensor, classes: int | None) -> bool:
    if labels.shape[1] < 2 or (classes is not None and labels.shape[1] != classes):
        return False
    is_binary = bool(((labels == 0) | (labels == 1)).all())
    return is_binary and bool((labels.sum(1) == 1).all())


def _is_whole(labels: Tensor) -> bool:
    if not labels.is_floating_point():
        return True
    return bool(labels.isfinite().all()) and bool((labels == labels.round()).all())


def is_like_labels(value: Any) -> bool:
    """Return whether the value is a tensor of one integer per sample.

    Example:
        >>> is_like_labels(torch.tensor([3, 1])), is_like_labels(torch.zeros(2)), is_like_labels(torch.zeros(2, 4))
        (True, False, False)
    """
    if not isinstance(value, Tensor) or value.is_floating_point() or value.is_complex():
        return False
    return value.ndim == 1 or (value.ndim == 2 and value.shape[1] == 1)


def described(value: Any) -> str:
    """Return the kind of a value in a few words, for messages.

    Example:
        >>> described(torch.zeros(2, 3)), described("a")
        ('a tensor (2, 3) of float32', 'a str')
    """
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {len(value)} entries"
    return f"a {type(value).__name__}"

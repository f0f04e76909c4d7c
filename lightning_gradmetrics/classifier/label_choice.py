"""Finds a second entry of a batch that could be the labels, so that a warning can name it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_gradmetrics.classifier.batch_copy import LABEL_KEYS, Entry, is_view, items_of, value_of
from lightning_gradmetrics.classifier.labels import class_numbers, is_like_labels

__all__ = ["LABEL_ARGUMENTS", "are_classes", "is_received", "ordinal", "second_choice"]

LABEL_ARGUMENTS = ("label", "labels", "target", "targets")
"""Names of arguments by which models receive the labels, for their own loss."""


def ordinal(position: int) -> str:
    """Return the position of an entry as a word.

    Example:
        >>> ordinal(0), ordinal(5)
        ('first', '6th')
    """
    return ("first", "second", "third", "fourth")[position] if position < 4 else f"{position + 1}th"


def is_received(entry: Any, received: Sequence[Tensor]) -> bool:
    """Return whether the model received a tensor of an entry of the batch."""
    if isinstance(entry, Entry):
        return any(is_view(tensor, entry.given) for tensor in received)
    return any(is_received(item, received) for item in items_of(entry))


def are_classes(value: Tensor, size: int, classes: int | None) -> bool:
    """Return whether every number is one of the classes."""
    numbers = class_numbers(value, size, classes)
    return numbers is not None and classes is not None and bool(((numbers >= 0) & (numbers < classes)).all())


def second_choice(entries: Any, size: int, classes: int, received: Sequence[Tensor]) -> tuple[str, str] | None:
    """Return the entry that could be the labels ``(N,)`` too and the one that is used, in words; ``None`` if only one could.

    Args:
        entries: The copied batch.
        size: The number of samples ``N``.
        classes: The number of classes.
        received: The tensors that the model received as inputs.
    """
    if isinstance(entries, list):
        return _second_position(entries, size, classes, received)
    return _second_name(entries, size, classes, received) if isinstance(entries, dict) else None


def _second_position(entries: list[Any], size: int, classes: int, received: Sequence[Tensor]) -> tuple[str, str] | None:
    last = None
    for position, entry in enumerate(entries):
        if is_received(entry, received):
            last = position
    if last is None:
        return None
    for position in range(last + 2, len(entries)):
        value = value_of(entries[position])
        if is_like_labels(value) and are_classes(value, size, classes):
            return f"{ordinal(position)} entry", "entry after the inputs"
    return None


def _second_name(
    entries: dict[str, Any], size: int, classes: int, received: Sequence[Tensor]
) -> tuple[str, str] | None:
    """Return another entry with a name of labels; if the model received the used one, any other integers that it did not."""
    used = next((key for key in LABEL_KEYS if key in entries), None)
    chosen = None if used is None else class_numbers(value_of(entries[used]), size, classes)
    if used is None or chosen is None:
        return None
    is_argument = is_received(entries[used], received)
    for name, entry in entries.items():
        value = value_of(entry)
        is_candidate = name in LABEL_KEYS or is_argument
        if name == used or not is_candidate or not is_like_labels(value) or is_received(entry, received):
            continue
        numbers = class_numbers(value, size, classes)
        if numbers is not None and are_classes(value, size, classes) and not torch.equal(numbers, chosen):
            return f"entry {name!r}", f"entry {used!r}"
    return None

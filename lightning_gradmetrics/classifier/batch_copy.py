"""Copies a batch before the step: its containers, and the tensors that may be labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_gradmetrics.classifier.row_order import some_entries

__all__ = ["LABEL_KEYS", "Entry", "copied", "entry_of", "is_view", "items_of", "value_of"]

LABEL_KEYS = ("label", "labels", "target", "targets", "y")
"""Names of mapping entries and object attributes that contain labels."""


@dataclass(frozen=True)
class Entry:
    """A tensor of the batch.

    Args:
        given: The tensor.
        kept: A copy if it may contain labels, otherwise the tensor.
        entries: Some entries of each row before the step ``(N, K)``, if the tensor is not copied.
    """

    given: Tensor
    kept: Tensor
    entries: Tensor | None = None

    @classmethod
    def of(cls, value: Tensor) -> Entry:
        """Return the entry of a tensor of the batch."""
        if _may_be_labels(value):
            return cls(value, value.detach().clone())
        entries = some_entries(value.detach()).clone() if _has_rows(value) else None
        return cls(value, value, entries)

    def equals(self, values: Tensor) -> bool:
        """Return whether the tensor was copied before the step, and the copy has these values."""
        is_copy = self.entries is None and self.kept is not self.given and _has_rows(self.kept)
        return is_copy and self.kept.dtype == values.dtype and torch.equal(self.kept, values)

    def before(self) -> Tensor | None:
        """Return some entries of each row before the step ``(N, K)``, or ``None`` if it has no rows of real numbers."""
        if self.entries is not None or not _has_rows(self.kept):
            return self.entries
        return some_entries(self.kept)


def _has_rows(value: Tensor) -> bool:
    is_dense = not value.is_nested and value.layout == torch.strided
    return is_dense and value.ndim > 0 and value.numel() > 0 and not value.is_complex()


def copied(value: Any, depth: int = 0) -> Any:
    """Return the batch with its containers copied, and each tensor as an :class:`Entry`."""
    if isinstance(value, Tensor):
        return Entry.of(value)
    if isinstance(value, Mapping):
        return _copied_items(value, depth)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return _copied_items(dict(zip(value._fields, value, strict=True)), depth)
    if isinstance(value, (list, tuple)):
        return [copied(item, depth + 1) for item in value]
    if depth == 0:
        attributes = _attributes(value)
        if any(isinstance(attribute, Tensor) for attribute in attributes.values()):
            return _copied_items(attributes, depth)
    return value


def _copied_items(mapping: Mapping[str, Any], depth: int) -> dict[str, Any]:
    return {key: copied(item, depth + 1) for key, item in mapping.items()}


def _attributes(value: Any) -> dict[str, Any]:
    """Return the attributes of an object by name: those that may be labels, and all fields of a dataclass."""
    attributes = {}
    if is_dataclass(value):
        for field in fields(value):
            attributes[field.name] = getattr(value, field.name, None)
        return attributes
    for key in LABEL_KEYS:
        attribute = getattr(value, key, None)
        if attribute is not None:
            attributes[key] = attribute
    return attributes


def _may_be_labels(value: Tensor) -> bool:
    """Return whether a tensor may hold labels of samples or of pixels; if so, it is copied before the step."""
    is_map = value.ndim == 3 or (value.ndim == 4 and value.shape[1] == 1)
    return value.ndim <= 2 or is_map or not value.is_floating_point()


def value_of(entry: Any) -> Any:
    """Return the tensor of an entry, copied if it may contain labels; any other value unchanged."""
    return entry.kept if isinstance(entry, Entry) else entry


def is_view(received: Tensor, given: Tensor) -> bool:
    """Return whether a tensor that the model received starts at the same address as one of the batch."""
    if received is given:
        return True
    same_place = received.device == given.device and received.numel() == given.numel() > 0
    return same_place and received.data_ptr() == given.data_ptr()


def items_of(entry: Any) -> list[Any]:
    """Return the entries of a dict or list; an empty list for any other value."""
    if isinstance(entry, dict):
        return list(entry.values())
    return entry if isinstance(entry, list) else []


def entry_of(entries: Any, tensor: Tensor) -> Entry | None:
    """Return the entry of a tensor that the model received, or ``None``."""
    if isinstance(entries, Entry):
        return entries if is_view(tensor, entries.given) else None
    for item in items_of(entries):
        entry = entry_of(item, tensor)
        if entry is not None:
            return entry
    return None

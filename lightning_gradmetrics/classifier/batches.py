"""Splits a dataloader's batch into inputs and labels."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_gradmetrics.classifier.batch_copy import (
    LABEL_KEYS,
    Entry,
    copied,
    entry_of,
    items_of,
    value_of,
)
from lightning_gradmetrics.classifier.forward import Inputs, tensors_in
from lightning_gradmetrics.classifier.label_choice import are_classes, is_received, ordinal, second_choice
from lightning_gradmetrics.classifier.labels import class_numbers, described, is_like_labels, map_numbers
from lightning_gradmetrics.classifier.row_order import some_entries

__all__ = [
    "LABEL_KEYS",
    "REMEDY",
    "BatchCopy",
    "Converter",
    "LabelsNotUnderstoodError",
    "batch_inputs",
    "labels_in",
    "shallow_copy",
    "split_batch",
]

MASK_KEYS = ("mask", "masks", "segmentation")
"""Entries of a mapping that hold label maps if another entry holds images."""

REMEDY = "pass split_batch=, a callable from the batch to (inputs, labels or None)"


class LabelsNotUnderstoodError(ValueError):
    """The batch may contain labels, but it is ambiguous which entry they are or what they mean."""


def split_batch(batch: Any) -> tuple[Inputs, Tensor | None]:
    """Return inputs and true labels of a batch.

    A tensor is taken as the inputs. In a sequence the first entry is the inputs and the second the labels; in ``(index,
    inputs, labels)`` they are the second and the third. In a mapping the labels are the entry ``label``, ``labels``,
    ``target``, ``targets`` or ``y``, or ``mask`` if there are images. The remaining entries are the inputs: keyword
    arguments, or a tensor if only one remains.

    Args:
        batch: A batch of the dataloader.

    Returns:
        The inputs, and the labels ``(N,)`` or ``(N, H, W)``, or ``None`` if the batch has none or they are ambiguous.

    Raises:
        TypeError: If the inputs cannot be found.

    Example:
        >>> import torch
        >>> split_batch({"image": torch.zeros(2, 3), "label": torch.tensor([0, 1])})
        (tensor([[0., 0., 0.],
                [0., 0., 0.]]), tensor([0, 1]))
    """
    inputs = batch_inputs(batch)
    return inputs, labels_in(batch, _first_length(inputs))


def labels_in(batch: Any, size: int) -> Tensor | None:
    """Return the labels ``(N,)`` or ``(N, H, W)`` in a batch, or ``None`` if it has none or they are ambiguous.

    Args:
        batch: A batch of the dataloader.
        size: The number of samples.
    """
    copied = BatchCopy(batch)
    for read in (class_numbers, map_numbers):
        with suppress(LabelsNotUnderstoodError):
            return copied.labels(size, None, (), read)
    return None


def _first_length(inputs: Inputs) -> int:
    """Return the length of the first tensor that has axes, or 0."""
    for tensor in tensors_in(inputs):
        if tensor.ndim:
            return len(tensor)
    return 0


def batch_inputs(batch: Any) -> Inputs:
    """Return the inputs of a batch, as :func:`split_batch` returns them."""
    if isinstance(batch, Tensor):
        return batch
    if isinstance(batch, Mapping):
        key = _label_key(batch)
        others = dict(batch)
        if key is not None:
            del others[key]
        values = list(others.values())
        return values[0] if len(values) == 1 and isinstance(values[0], Tensor) else others
    if isinstance(batch, (list, tuple)) and batch:
        first = batch[1] if _begins_with_index(batch) else batch[0]
        if next(tensors_in(first), None) is not None:
            return first  # type: ignore[no-any-return]
    raise TypeError(
        f"cannot find the inputs in a batch of type {type(batch).__name__}; allowed: a tensor, (inputs, labels), "
        f"(index, inputs, labels), or a mapping. For anything else {REMEDY}"
    )


def _label_key(batch: Mapping[str, Any]) -> str | None:
    for key in LABEL_KEYS:
        if key in batch:
            return key
    for key in MASK_KEYS:
        if key in batch and _is_mask(batch, key):
            return key
    return None


def _is_mask(batch: Mapping[str, Any], key: str) -> bool:
    """Return whether an entry has three axes or more, ``(N, H, W)`` or ``(N, 1, H, W)``, beside images ``(N, D, H, W)``."""
    mask = _given(batch[key])
    if mask is None or mask.ndim < 3:
        return False
    for name, value in batch.items():
        image = _given(value)
        if name != key and image is not None and image.ndim == 4:
            return True
    return False


def _given(value: Any) -> Tensor | None:
    value = value.given if isinstance(value, Entry) else value
    return value if isinstance(value, Tensor) else None


def _begins_with_index(batch: Sequence[Any]) -> bool:
    """Return whether a batch looks like ``(index, inputs, labels)``."""
    if len(batch) < 3 or not is_like_labels(batch[0]) or is_like_labels(batch[1]):
        return False
    return isinstance(batch[1], Tensor) and is_like_labels(batch[2])


Converter = Callable[[Any, int, "int | None"], "Tensor | None"]
"""Converts a value, given N and C, to class numbers, or returns ``None``."""


class BatchCopy:
    """A copy of a batch made before the step: its containers, and the tensors that may be labels.

    Args:
        batch: A batch of the dataloader.

    Example:
        >>> import torch
        >>> batch = {"features": torch.zeros(2, 3), "labels": torch.tensor([0, 1])}
        >>> kept = BatchCopy(batch)
        >>> _ = batch.pop("labels")
        >>> kept.labels(2, 3, [batch["features"]])
        tensor([0, 1])
    """

    def __init__(self, batch: Any) -> None:
        self._entries = copied(batch)
        self.size = _size(self._entries)
        """The length of the batch's first tensor, or ``None``."""

    def tensors(self) -> list[Tensor]:
        """Return the tensors of the batch; for those that may be labels, their copies."""
        return list(_tensors(self._entries))

    def holds(self, received: Sequence[Tensor]) -> bool:
        """Return whether one of the tensors that the model received is a tensor of the batch."""
        return is_received(self._entries, received)

    def changed(self, received: Sequence[Tensor], copies: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return some entries of the tensors that were changed in place before the call, as received and as in the batch.

        Args:
            received: The tensors that the model received.
            copies: Their copies from the time of the call.
        """
        after, before = [], []
        for tensor, copy_of_call in zip(received, copies, strict=True):
            entry = entry_of(self._entries, tensor)
            if entry is None or entry.given.shape != copy_of_call.shape or entry.equals(copy_of_call):
                continue
            original = entry.before()
            if original is None:
                continue
            now = some_entries(copy_of_call)
            if not torch.equal(now, original):
                after.append(now)
                before.append(original)
        return after, before

    def second_choice(self, size: int, classes: int, received: Sequence[Tensor]) -> tuple[str, str] | None:
        """Return the entry that could be the labels too and the one that is used, in words; ``None`` if only one could."""
        return second_choice(self._entries, size, classes, received)

    def labels(
        self, size: int, classes: int | None, received: Sequence[Tensor], read: Converter = class_numbers
    ) -> Tensor | None:
        """Return the labels ``(N,)``, or ``None`` if the batch contains nothing that could be labels.

        Args:
            size: The number of samples ``N``.
            classes: The number of classes, or ``None`` if it is unknown.
            received: The tensors that the model received, which identify the entries that are inputs.

        Raises:
            LabelsNotUnderstoodError: If it is ambiguous whether an entry is the labels.
        """
        return _labels(self._entries, _Search(size, classes, received, read), "the batches")


@dataclass(frozen=True)
class _Search:
    """A search for labels: the number of samples and classes, and the inputs."""

    size: int
    classes: int | None
    received: Sequence[Tensor]
    read: Converter = class_numbers

    def convert(self, entry: Any, where: str) -> Tensor:
        labels = self.read(value_of(entry), self.size, self.classes)
        if labels is None:
            raise LabelsNotUnderstoodError(
                f"{where} contains {described(value_of(entry))}, which is not one class per sample"
            )
        return labels

    def is_input(self, entry: Any) -> bool:
        """Return whether the model received a tensor of this entry."""
        return is_received(entry, self.received)


def _tensors(entry: Any) -> Iterator[Tensor]:
    if isinstance(entry, Entry):
        yield entry.kept
    for value in items_of(entry):
        yield from _tensors(value)


def _containers(entries: list[Any], positions: Iterable[int]) -> list[int]:
    """Return the positions whose entries are dicts or lists."""
    return [position for position in positions if isinstance(entries[position], (dict, list))]


def _size(entries: Any) -> int | None:
    if isinstance(entries, Entry):
        return len(entries.given) if entries.given.ndim else None
    for value in items_of(entries):
        size = _size(value)
        if size is not None:
            return size
    return None


def _labels(entries: Any, search: _Search, where: str) -> Tensor | None:
    if isinstance(entries, dict):
        return _labels_in_mapping(entries, search, where)
    if isinstance(entries, list):
        return _labels_in_sequence(entries, search, where)
    return None


def _labels_in_mapping(entries: dict[str, Any], search: _Search, where: str) -> Tensor | None:
    key = _label_key(entries)
    if key is not None:
        if isinstance(entries[key], dict):
            return _labels(entries[key], search, f"the entry {key!r} of {where}")
        return search.convert(entries[key], f"the entry {key!r} of {where}")
    apart = _labels_apart(entries)
    if len(apart) == 1:
        return _labels(entries[apart[0]], search, f"the entry {apart[0]!r} of {where}")
    inner = []
    for name, value in entries.items():
        if isinstance(value, (dict, list)) and search.is_input(value):
            inner.append(name)
    if len(inner) == 1:  # batches of several loaders side by side
        return _labels(entries[inner[0]], search, f"the entry {inner[0]!r} of {where}")
    for name, value in entries.items():
        holds_several = isinstance(value, (dict, list)) and len(value) > 1
        may_be_labels = is_like_labels(value_of(value)) and not search.is_input(value)
        if holds_several or (may_be_labels and search.received):
            raise LabelsNotUnderstoodError(f"{where} have no entry {' or '.join(LABEL_KEYS)}, but an entry {name!r}")
    return None


def _labels_apart(entries: dict[str, Any]) -> list[str]:
    """Return the names of the mappings that hold labels and no inputs."""
    names = []
    for name, value in entries.items():
        key = _label_key(value) if isinstance(value, dict) else None
        if key is not None and all(tensor.ndim < 2 for tensor in _tensors(value)):
            names.append(name)
    return names


def _labels_in_sequence(entries: list[Any], search: _Search, where: str) -> Tensor | None:
    inputs = [position for position, entry in enumerate(entries) if search.is_input(entry)]
    start = _position_of_labels(entries, inputs)
    if start >= len(entries):
        return _labels_before(entries, inputs, search, where)
    number = ordinal(start)
    if isinstance(entries[start], dict) and _label_key(entries[start]) is not None:
        return _labels(entries[start], search, f"the {number} entry of {where}")
    try:
        return search.convert(entries[start], f"the {number} entry of {where}")
    except LabelsNotUnderstoodError:
        inner = _containers(entries, inputs)
        labels = _labels(entries[inner[0]], search, where) if len(inner) == 1 else None
        if labels is None:
            raise
        return labels


def _position_of_labels(entries: list[Any], inputs: list[int]) -> int:
    """Return the position of the labels: after the entries that the model received, or from the types of the entries."""
    if inputs:
        return max(inputs) + 1
    return 2 if _begins_with_index(list(map(value_of, entries))) else 1


def _labels_before(entries: list[Any], inputs: list[int], search: _Search, where: str) -> Tensor | None:
    """Return the labels if nothing follows the inputs: those inside the entry that contains the inputs, if any."""
    labels = _labels_of_flat_text(entries, inputs, search)
    if labels is not None:
        return labels
    for position, entry in enumerate(entries):
        if position not in inputs and is_like_labels(value_of(entry)):
            raise LabelsNotUnderstoodError(f"in {where} integers come before the inputs, and nothing follows them")
    if len(entries) > 1 and search.read(value_of(entries[-1]), search.size, search.classes) is not None:
        raise LabelsNotUnderstoodError(f"the model received the last entry of {where}, so it may not be the labels")
    inner = _containers(entries, inputs)
    return _labels(entries[inner[0]], search, where) if len(inner) == 1 else None


def _labels_of_flat_text(entries: list[Any], inputs: list[int], search: _Search) -> Tensor | None:
    """Return the labels of ``(labels, text, offsets)``, with all texts in one row; ``None`` for any other batch."""
    if len(entries) != 3 or inputs != [1, 2]:
        return None
    first, text, offsets = map(value_of, entries)
    are_numbers = all(is_like_labels(value) and value.ndim == 1 for value in (first, text, offsets))
    if not are_numbers or len(offsets) not in (search.size, search.size + 1):
        return None
    is_rising = bool((offsets.diff() >= 0).all()) and int(offsets[0]) == 0 and int(offsets[-1]) <= len(text)
    is_index = len(first) > 2 and bool((first.diff() == 1).all())
    if not is_rising or is_index or not are_classes(first, search.size, search.classes):
        return None
    return search.read(first, search.size, search.classes)


def shallow_copy(batch: Any) -> Any:
    """Return the batch in a new container, so that a callable may pop entries from it."""
    return copy.copy(batch) if isinstance(batch, (list, Mapping)) else batch

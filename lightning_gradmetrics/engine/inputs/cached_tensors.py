"""Removes tensors that depend on parameters but have no graph, because a forward pass without gradients cached them.

A step under ``torch.no_grad`` may compute a tensor from parameters once and keep it in an attribute. Later forward passes read
it, and gradients no longer reach these parameters. Without the tensor, the forward passes of the engine compute it again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lightning_gradmetrics.classifier.model_layout import INTERNAL
from lightning_gradmetrics.classifier.mutable_parts import has_settings, module_of
from lightning_gradmetrics.classifier.preservation import ModelRecord
from lightning_gradmetrics.engine.inputs.samples import close_rows
from lightning_gradmetrics.engine.refusals import raise_if_out_of_memory
from lightning_gradmetrics.engine.task import Task

__all__ = ["without_cached_tensors"]

Path = tuple[Any, ...]

MOST_PLACES = 32
"""Largest number of places that are examined one by one."""

DELETED, SET_TO_NONE = "deleted", "set to None"

_EXAMINED: WeakKeyDictionary[nn.Module, dict[Path, str | None]] = WeakKeyDictionary()
"""For each place of a model how a cached tensor is removed; ``None`` if the place is no cache."""


@dataclass(frozen=True, eq=False)
class _Place:
    """An attribute, or all entries of a container, with tensors without a graph.

    Args:
        path: The number of the module, and the names that lead to the place.
        owner: The dictionary of attributes, or the container.
        name: The name of the attribute; ``None`` for all entries of a container.
    """

    path: Path
    owner: Any
    name: str | None = None

    def remove(self, way: str | None) -> None:
        """Remove the tensors."""
        if self.name is None:
            self.owner.clear()
        elif way == DELETED:
            self.owner.pop(self.name, None)
        else:
            self.owner[self.name] = None

    def graphs(self) -> list[bool]:
        """Return for each tensor whether it has a graph."""
        value = self.owner if self.name is None else self.owner.get(self.name)
        return [tensor.grad_fn is not None for tensor in _tensors(value)]


def without_cached_tensors(task: Task) -> Task:
    """Return the task for its model without tensors that depend on parameters and have no graph.

    The model runs on one sample without an attribute. If it computes the attribute again, from parameters, and returns the
    same logits, the attribute is such a cache. The caller restores the model.
    """
    record = ModelRecord(task.model) if task.record is None else task.record
    places = list(_places(record))
    if not places or not task.size:
        return task
    task = task.decided()
    examined = _EXAMINED.setdefault(task.model, {})
    unknown = [place for place in places if place.path not in examined]
    if not unknown and not any(examined[place.path] for place in places):
        return task
    try:
        for parameter in record.parameters:
            parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
        expected, graphs = _run_without(task, {}, record, unknown)
        if expected is not None:
            _examine(task, _not_overwritten(unknown, graphs, examined), examined, expected, record)
        caches = {place: examined[place.path] for place in places if examined.get(place.path)}
        logits = _run_without(task, caches, record, [])[0] if caches else None
    finally:
        record.restore()
        record.hide_gradients()
    if not _are_same(logits, expected):  # there are none, or the weights have changed since
        return task
    for place, way in caches.items():
        place.remove(way)
    return replace(task, record=ModelRecord(task.model)) if task.record is not None else task


def _places(record: ModelRecord) -> Iterator[_Place]:
    """Yield the places of floating-point tensors without a graph, except in modules of torch."""
    seen: set[int] = set()
    for number, module in enumerate(record.modules):
        if module_of(type(module)).startswith("torch."):
            continue
        if module._buffers:
            yield from _among((number, "buffers"), module._buffers)
        if record.has_attribute_tensors:
            yield from _among_attributes(number, module, seen)


def _among_attributes(number: int, module: nn.Module, seen: set[int]) -> Iterator[_Place]:
    """Yield the places among the attributes of a module and of the objects in them."""
    waiting: list[tuple[Path, Any]] = [((number,), vars(module))]
    while waiting:
        path, value = waiting.pop()
        is_of_module = len(path) == 1
        if is_of_module or has_settings(value):
            attributes = value if is_of_module else vars(value)
            yield from _among(path, attributes)
            entries = list(attributes.items())
        elif isinstance(value, (dict, list)):
            if _has_tensors(value):
                yield _Place(path, value)
            entries = list(value.items() if isinstance(value, dict) else enumerate(value))
        else:
            continue
        for name, entry in entries if len(entries) <= MOST_ENTRIES else ():
            if not (is_of_module and name in INTERNAL) and id(entry) not in seen:
                seen.add(id(entry))
                waiting.append(((*path, name), entry))


MOST_ENTRIES = 1000
"""Objects and containers with more entries are not searched for others."""


def _among(path: Path, attributes: dict[str, Any]) -> Iterator[_Place]:
    """Yield the attributes that are tensors without a graph, or tuples of them."""
    for name, value in attributes.items():
        if isinstance(value, (Tensor, tuple)) and _has_tensors(value):
            yield _Place((*path, name), attributes, name)


def _has_tensors(value: Any) -> bool:
    return any(tensor.grad_fn is None for tensor in _tensors(value))


def _tensors(value: Any) -> list[Tensor]:
    """Return the floating-point tensors that a value is or contains, except parameters."""
    entries = [value]
    if isinstance(value, (dict, list, tuple)):
        entries = list(value.values() if isinstance(value, dict) else value)
    tensors = []
    for entry in entries:
        for tensor in entry if isinstance(entry, tuple) else (entry,):
            is_other = isinstance(tensor, Tensor) and not isinstance(tensor, nn.Parameter)
            if is_other and (tensor.is_floating_point() or tensor.is_complex()):
                tensors.append(tensor)
    return tensors


def _not_overwritten(
    places: Sequence[_Place], graphs: Sequence[list[bool]], examined: dict[Path, str | None]
) -> list[_Place]:
    """Return the places except those whose tensors a forward pass has replaced, which it did not need, and record these."""
    left = []
    for place, flags in zip(places, graphs, strict=True):
        if flags and all(flags):
            examined[place.path] = None
        else:
            left.append(place)
    return left


def _examine(
    task: Task,
    places: Sequence[_Place],
    examined: dict[Path, str | None],
    expected: Tensor,
    record: ModelRecord,
) -> None:
    """Record for each place whether the model computes its tensors again from parameters, with the same logits."""
    for place in places:
        examined[place.path] = None
    if not places or _is_examined(task, places, examined, expected, record):
        return
    for place in places[:MOST_PLACES]:  # the model needs one of them
        _is_examined(task, [place], examined, expected, record)


def _is_examined(
    task: Task,
    places: Sequence[_Place],
    examined: dict[Path, str | None],
    expected: Tensor,
    record: ModelRecord,
) -> bool:
    """Return whether the model returns the same logits without some places, and record those that have a graph then."""
    for way in (DELETED, SET_TO_NONE):
        logits, graphs = _run_without(task, dict.fromkeys(places, way), record, places)
        if _are_same(logits, expected):
            for place, flags in zip(places, graphs, strict=True):
                examined[place.path] = way if any(flags) else None
            return True
    return False


def _are_same(logits: Tensor | None, expected: Tensor | None) -> bool:
    if logits is None or expected is None or logits.shape != expected.shape:
        return False
    return close_rows(logits, expected)


def _run_without(
    task: Task, removed: Mapping[_Place, str | None], record: ModelRecord, places: Sequence[_Place]
) -> tuple[Tensor | None, list[list[bool]]]:
    """Return the logits of one sample without removed places, and which tensors of some places have a graph after that.

    The logits are ``None`` if the model needs one of the removed places.
    """
    for place, way in removed.items():
        place.remove(way)
    try:
        with torch.enable_grad():
            logits = task.picked([0]).forward().detach()
        graphs = [place.graphs() for place in places]
    except Exception as error:  # any error of the model
        raise_if_out_of_memory(error)
        return None, []
    finally:
        record.restore_for_forward()
        record.generators.restore()
    return logits, graphs

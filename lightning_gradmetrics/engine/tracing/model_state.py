"""The state of a forward pass besides its inputs: random number generators and attributes of modules."""

from __future__ import annotations

import itertools
import warnings
from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from functools import lru_cache
from operator import attrgetter
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn

from lightning_gradmetrics.classifier.large_parts import fingerprint
from lightning_gradmetrics.classifier.model_layout import INTERNAL
from lightning_gradmetrics.classifier.mutable_parts import has_settings, module_of
from lightning_gradmetrics.classifier.preservation import ModelRecord
from lightning_gradmetrics.engine.tracing.attribute_reads import are_reads_visible

__all__ = ["ForwardState", "attribute_key", "note_read", "note_volatile", "quiet_no_grad"]

_INTERNAL = INTERNAL - {"training"}
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device, Enum)

_SIMPLE = frozenset([bool, int, float, str, type(None)])

_VOLATILE: WeakKeyDictionary[nn.Module, set[tuple[int, str]]] = WeakKeyDictionary()
"""Attributes that a forward pass changes, such as counters, as pairs of module number and name."""

_READ: WeakKeyDictionary[nn.Module, frozenset[str]] = WeakKeyDictionary()
"""The names of the attributes that forward passes of a model read; a model without an entry may read any."""


class ForwardState:
    """The generators, attributes, parameters and buffers of a model before a forward pass.

    Restoring the state makes several forward passes draw the same random numbers, and start without caches that an
    earlier pass has filled.

    Args:
        model: The model.
        record: The record of its state, if there is one.
    """

    def __init__(self, model: nn.Module, record: ModelRecord | None = None) -> None:
        self._record = ModelRecord(model) if record is None else record

    def restore(self) -> None:
        """Set generators, attributes, parameters and buffers to this state."""
        torch.clear_autocast_cache()  # so that autocast casts the weights again
        self.restore_attributes()
        self._record.generators.restore()

    def random_numbers_drawn(self) -> bool:
        """Return whether a forward pass has drawn random numbers since."""
        return not self._record.generators.is_current()

    def restore_attributes(self) -> None:
        """Set attributes, hooks, parameters and buffers to this state, but not the random number generators."""
        self._record.restore_for_forward()

    def restore_tensors(self) -> None:
        """Set parameters, buffers and tensors among the attributes to this state, as a graph needs that contains them."""
        self._record.restore_tensors()


@contextmanager
def quiet_no_grad(quiet: bool) -> Iterator[None]:
    """Disable gradients; if ``quiet``, also silence the warning of reentrant checkpoints about that."""
    with torch.no_grad():
        if not quiet:
            yield
            return
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "None of the inputs have requires_grad")
            yield


def attribute_key(model: nn.Module, record: ModelRecord | None = None) -> Hashable:
    """Return the plain attributes of all modules and of their configurations, which a forward pass may branch on.

    Attributes that no forward pass read during planning, such as counters of the user's step, are left out.

    Args:
        model: The model.
        record: The record of its present state, if there is one.
    """
    volatile, read = _VOLATILE.get(model), _READ.get(model)
    modules = tuple(model.modules()) if record is None else record.modules
    known = None if record is None else record.layout.attribute_entries
    if known is None or known[0] is not read:  # a layout that is compared in each call has the same values again
        known = (read, tuple(_attributes(modules, read)))
        if record is not None and record.layout.is_compared:
            record.layout.attribute_entries = known
    entries = (*known[1], *_class_attributes(modules))
    if not volatile:
        return entries
    return tuple(entry for entry in entries if entry[:2] not in volatile)


def note_read(model: nn.Module, names: set[str]) -> None:
    """Record the names of all attributes that the forward passes of a plan read; later keys contain them."""
    if "__dict__" not in names and are_reads_visible(model):
        _READ[model] = _READ.get(model, frozenset()) | names
    else:
        _READ.pop(model, None)


def note_volatile(model: nn.Module, before: Hashable, after: Hashable) -> None:
    """Exclude attributes that differ between two keys from later keys, because a forward pass changes them."""
    changed = set(before) ^ set(after)  # type: ignore[call-overload]
    volatile = _VOLATILE.setdefault(model, set())
    for number, name, _ in changed:
        volatile.add((number, name))


def _attributes(modules: Sequence[nn.Module], read: frozenset[str] | None) -> Iterator[tuple[int, str, Hashable]]:
    """Yield the number of the module, the name and the value of every plain attribute whose name is read."""
    seen: set[int] = set()
    for number, module in enumerate(modules):
        attributes = vars(module)
        for name in _sorted_names(tuple(attributes)):
            if read is not None and name not in read:
                continue
            value = attributes[name]
            kind = type(value)
            if _SIMPLE.issuperset(map(type, value)) if kind is tuple else kind in _SIMPLE:
                yield number, name, value
            else:
                yield from _plain_parts(number, name, value, seen)


def _class_attributes(modules: Sequence[nn.Module]) -> Iterator[tuple[int, str, Hashable]]:
    """Yield a negative number for the class, the name and the value of every plain attribute of a class."""
    for number, kind in _classes(tuple(map(_BASES, dict.fromkeys(map(type, modules))))):
        yield from _plain_entries(number, kind.__name__, vars(kind))


@lru_cache(maxsize=1024)
def _sorted_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of the attributes that not all modules have, in alphabetical order."""
    return tuple(sorted(itertools.filterfalse(_INTERNAL.__contains__, names)))


def _plain_parts(number: int, name: str, value: Any, seen: set[int]) -> Iterator[tuple[int, str, Hashable]]:
    """Yield the plain values in an attribute, with those of nested containers; each configuration once."""
    waiting = [(name, value)]
    while waiting:  # no recursion: a linked list may be longer than the limit of Python's stack
        name, value = waiting.pop()
        if isinstance(value, _PLAIN):
            yield number, name, value
        elif isinstance(value, np.ndarray):
            yield number, name, fingerprint(value) or value.tobytes()
        elif isinstance(value, (list, tuple, set, frozenset, deque)) and all(
            isinstance(entry, _PLAIN) for entry in value
        ):
            yield number, name, frozenset(value) if isinstance(value, (set, frozenset)) else tuple(value)
        elif isinstance(value, dict) and len(value) > MOST_SEPARATE and _is_plain(value):
            yield number, name, tuple(value.items())
        elif id(value) not in seen:
            seen.add(id(value))
            for key, entry in _entries(value):
                waiting.append((f"{name}.{key}", entry))


MOST_SEPARATE = 64
"""Dictionaries of plain values with more entries are one entry of the key."""


def _is_plain(values: Mapping[Any, Any]) -> bool:
    return all(isinstance(key, _PLAIN) and isinstance(value, _PLAIN) for key, value in values.items())


def _entries(value: Any) -> Iterable[tuple[Any, Any]]:
    """Return the names and values in a container or in a configuration."""
    if isinstance(value, dict):
        return value.items()
    if isinstance(value, (list, tuple, deque)):
        return enumerate(value)
    return vars(value).items() if has_settings(value) else ()


_BASES = attrgetter("__mro__")


@lru_cache(maxsize=64)
def _classes(bases: tuple[tuple[type, ...], ...]) -> tuple[tuple[int, type], ...]:
    """Return all classes with negative numbers, without ``object`` and those of torch.

    Args:
        bases: The classes of the modules, each with its bases.
    """
    classes = dict.fromkeys(itertools.chain.from_iterable(bases))
    classes.pop(object, None)
    numbered: list[tuple[int, type]] = []
    for number, kind in enumerate(classes, 1):
        if not module_of(kind).startswith("torch."):
            numbered.append((-number, kind))
    return tuple(numbered)


def _plain_entries(number: int, name: str, entries: Mapping[Any, Any]) -> Iterator[tuple[int, str, Hashable]]:
    for key, value in entries.items():
        if isinstance(value, _PLAIN) and not str(key).startswith("__"):
            yield number, f"{name}.{key}", value

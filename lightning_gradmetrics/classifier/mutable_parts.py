"""Finds the containers, arrays and tensors in an attribute of a module, and restores their entries."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Collection, Iterable, Iterator, MutableMapping, Sequence
from enum import Enum
from functools import lru_cache
from operator import is_
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["ContainerRecord", "SlotValues", "has_settings", "module_of", "mutable_parts", "sort_entries"]

_PLAIN = (
    bool,
    int,
    float,
    str,
    bytes,
    type(None),
    torch.dtype,
    torch.device,
    Enum,
    type,
    ModuleType,
    nn.Module,
    nn.Parameter,
)
"""Types whose values a forward pass cannot change in place, or that are restored in another way."""

_CONTAINERS = (dict, list, set, deque)

_DATA_PACKAGES = {"torch", "lightning", "lightning_fabric", "pytorch_lightning", "torchmetrics"}
"""Packages whose classes, and classes derived from them, are neither searched nor restored, such as a dataset or a trainer."""

_FOREIGN = (sys.stdlib_module_names - {"types", "argparse"}) | _DATA_PACKAGES
"""Packages whose objects are neither searched nor restored, such as a logger or a lock."""

MOST_ENTRIES = 1000
"""Containers with more entries are restored, but not searched for other containers."""


def has_settings(value: Any) -> bool:
    """Return whether a value is an object with attributes, such as a configuration or a namespace.

    Example:
        >>> from types import SimpleNamespace
        >>> has_settings(SimpleNamespace(step=1)), has_settings(3)
        (True, False)
    """
    return hasattr(value, "__dict__") and _is_searched(value)


def _is_searched(value: Any) -> bool:
    """Return whether a value is an object whose attributes are searched and restored."""
    if isinstance(value, (*_PLAIN, Tensor, np.ndarray, *_CONTAINERS)) or callable(value):
        return False
    if _package(type(value)) in _FOREIGN:
        return False
    return _DATA_PACKAGES.isdisjoint(map(_package, type(value).__mro__))


@lru_cache(maxsize=1024)
def _slots_of(kind: Any) -> tuple[str, ...]:
    """Return the names of the attributes that a class has in place of a ``__dict__``, as a dataclass with ``slots=True``."""
    names: list[str] = []
    for base in kind.__mro__:
        slots = vars(base).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else tuple(slots):
            is_private = name.startswith("__") and not name.endswith("__")
            names.append(f"_{base.__name__.lstrip('_')}{name}" if is_private else name)
    return tuple(name for name in dict.fromkeys(names) if not name.startswith("__"))


class SlotValues(MutableMapping[str, Any]):
    """The attributes of an object in its ``__slots__``, as a dictionary.

    Args:
        owner: The object.

    Example:
        >>> class Step:
        ...     __slots__ = ("number", "unset")
        >>> step = Step()
        >>> step.number = 3
        >>> dict(SlotValues(step))
        {'number': 3}
    """

    def __init__(self, owner: Any) -> None:
        self._owner = owner

    def __getitem__(self, name: str) -> Any:
        """Return the value of an attribute."""
        return getattr(self._owner, name)

    def __setitem__(self, name: str, value: Any) -> None:
        """Set an attribute, also that of a frozen dataclass."""
        object.__setattr__(self._owner, name, value)

    def __delitem__(self, name: str) -> None:
        """Delete an attribute."""
        object.__delattr__(self._owner, name)

    def __iter__(self) -> Iterator[str]:
        """Yield the names of the attributes that have a value."""
        kind: Any = type(self._owner)
        for name in _slots_of(kind):
            if hasattr(self._owner, name):
                yield name

    def __len__(self) -> int:
        """Return the number of attributes that have a value."""
        return sum(1 for _ in self)


def module_of(kind: type) -> str:
    """Return the name of the module that defines a class; empty if it is unknown, as for a class that ``type()`` has made.

    Example:
        >>> module_of(nn.Linear)
        'torch.nn.modules.linear'
    """
    return str(getattr(kind, "__module__", ""))


def _package(kind: type) -> str:
    return module_of(kind).partition(".")[0]


def mutable_parts(value: Any, seen: set[int]) -> Iterator[Any]:
    """Yield every container, array and tensor in a value, and the attributes of objects with settings, outermost first.

    Args:
        value: The value.
        seen: The identities of the parts that were found before; parts that are found are added.

    Example:
        >>> list(mutable_parts({"steps": [1, 2]}, set()))
        [{'steps': [1, 2]}, [1, 2]]
    """
    waiting = [value]
    while waiting:  # no recursion: a linked list may be longer than the limit of Python's stack
        part = waiting.pop()
        if isinstance(part, _PLAIN) or id(part) in seen:
            continue
        entries: Collection[Any] = ()
        if isinstance(part, (Tensor, np.ndarray)):
            seen.add(id(part))
            yield part
        elif isinstance(part, tuple):
            entries = part
        elif isinstance(part, _CONTAINERS):
            seen.add(id(part))
            yield part
            entries = part.values() if isinstance(part, dict) else part
        elif _is_searched(part):
            seen.add(id(part))
            if hasattr(part, "__dict__"):
                waiting.append(vars(part))
            kind: Any = type(part)
            if _slots_of(kind):
                slots = SlotValues(part)
                yield slots
                entries = slots.values()
        if 0 < len(entries) <= MOST_ENTRIES:
            waiting.extend(reversed(list(entries)))


def sort_entries(entries: dict[str, Any], names: Sequence[str]) -> None:
    """Put the entries of a dictionary in the order of some names; entries without a name here stay behind them.

    Example:
        >>> entries = {"b": 2, "c": 3, "a": 1}
        >>> sort_entries(entries, ["a", "b"])
        >>> entries
        {'a': 1, 'b': 2, 'c': 3}
    """
    ordered = {name: entries[name] for name in names if name in entries} | entries
    entries.clear()
    entries.update(ordered)


class ContainerRecord:
    """The entries of a dictionary, a list, a set or a deque.

    Args:
        container: The container.
    """

    __slots__ = ("_before", "container")

    def __init__(self, container: Any) -> None:
        self.container = container
        if isinstance(container, (dict, SlotValues)):
            self._before: Any = dict(container)
        else:
            self._before = set(container) if isinstance(container, set) else list(container)

    def has_changed(self) -> bool:
        """Return whether the container has other objects as entries, or another order of them."""
        return not _has_entries(self.container, self._before)

    def restore(self) -> None:
        """Set the entries to the recorded ones, if they have changed."""
        container, before = self.container, self._before
        if _has_entries(container, before):
            return
        container.clear()
        if isinstance(container, (list, deque)):
            container.extend(before)
        else:
            container.update(before)


def _has_entries(container: Any, before: Any) -> bool:
    """Return whether a container has the same objects as entries, in the same order."""
    if len(container) != len(before):
        return False
    if isinstance(container, set):
        return bool(container == before)
    if isinstance(container, SlotValues):
        return list(container) == list(before) and _are_same(container.values(), before.values())
    if isinstance(container, dict):
        return _are_same(container, before) and _are_same(container.values(), before.values())
    return _are_same(container, before)


def _are_same(entries: Iterable[Any], before: Iterable[Any]) -> bool:
    return all(map(is_, entries, before))

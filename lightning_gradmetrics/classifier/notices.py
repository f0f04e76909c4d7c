"""Warnings that are issued once."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Hashable
from typing import Any

__all__ = ["RANDOM", "first_time", "warn_once"]

RANDOM = "random numbers"
"""The key of all warnings that a model draws random numbers, of which one is enough."""

_given: weakref.WeakKeyDictionary[Any, set[Hashable]] = weakref.WeakKeyDictionary()


def first_time(owner: Any, key: Hashable) -> bool:
    """Return whether this is the first call with this owner and key.

    Args:
        owner: The object that a warning is about, such as a model; it is not kept alive.
        key: The text of the warning, or anything else that identifies it.

    Example:
        >>> from torch import nn
        >>> model = nn.Linear(2, 2)
        >>> first_time(model, "no dropout"), first_time(model, "no dropout")
        (True, False)
    """
    keys = _given.setdefault(owner, set())
    if key in keys:
        return False
    keys.add(key)
    return True


def warn_once(owner: Any, text: str, stacklevel: int = 2) -> None:
    """Warn, unless the same warning was issued for this owner before.

    Args:
        owner: The object that the warning is about, such as a model.
        text: The warning.
        stacklevel: As in :func:`warnings.warn`, counted from the caller.
    """
    if first_time(owner, text):
        warnings.warn(text, stacklevel=stacklevel + 1)

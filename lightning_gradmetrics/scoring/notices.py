"""Warnings that a user gets once per model."""

from __future__ import annotations

import warnings
import weakref

from torch import nn

__all__ = ["warn_once"]

_given: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()


def warn_once(model: nn.Module, text: str) -> None:
    """Warn, unless the same text was given for this model before.

    Args:
        model: The model that the warning is about.
        text: The warning.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> with warnings.catch_warnings(record=True) as given:
        ...     warnings.simplefilter("always")
        ...     warn_once(model, "no dropout"), warn_once(model, "no dropout")
        (None, None)
        >>> len(given)
        1
    """
    texts = _given.setdefault(model, set())
    if text not in texts:
        texts.add(text)
        warnings.warn(text, stacklevel=3)

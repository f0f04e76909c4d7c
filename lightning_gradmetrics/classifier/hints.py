"""Hints in messages about unknown names."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

__all__ = ["did_you_mean"]


def did_you_mean(name: Any, names: Iterable[Any]) -> str:
    """Return a question with up to three similar names, ``""`` if none is similar. It starts with a space.

    Args:
        name: The unknown name.
        names: The known names.

    Example:
        >>> did_you_mean("gradnrom", ["gradnorm", "energy"])
        " did you mean 'gradnorm'?"
        >>> did_you_mean("vim", ["gradnorm", "energy"])
        ''
    """
    similar = get_close_matches(str(name), list(map(str, names)), 3, 0.6)
    return f" did you mean {' or '.join(map(repr, similar))}?" if similar else ""

"""Calls listeners after a method of an object."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

__all__ = ["after_each_call"]


def after_each_call(owner: Any, name: str, listener: Callable[[Any], None]) -> Callable[[], None]:
    """Call a listener with the result of each call of an object's method.

    Args:
        owner: The object.
        name: The name of its method.
        listener: The listener; several may listen to one method.

    Returns:
        A function that undoes this.

    Example:
        >>> class Loop:
        ...     def run(self):
        ...         return 3
        >>> loop = Loop()
        >>> undo = after_each_call(loop, "run", lambda result: print("listened to", result))
        >>> loop.run()
        listened to 3
        3
        >>> undo()
        >>> vars(loop)
        {}
    """
    listeners = getattr(vars(owner).get(name), "gradmetrics_listeners", None)
    if listeners is None:
        listeners = _wrapped(owner, name)
    listeners.append(listener)
    own = listeners

    def undo() -> None:
        own.remove(listener)
        if not own and getattr(vars(owner).get(name), "gradmetrics_listeners", None) is own:
            del vars(owner)[name]

    return undo


def _wrapped(owner: Any, name: str) -> list[Callable[[Any], None]]:
    """Replace a method of an object; returns the list of its listeners."""
    listeners: list[Callable[[Any], None]] = []
    method = getattr(owner, name)

    @functools.wraps(method)
    def heard(*args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        for listener in list(listeners):
            listener(result)
        return result

    heard.gradmetrics_listeners = listeners  # type: ignore[attr-defined]
    vars(owner)[name] = heard
    return listeners

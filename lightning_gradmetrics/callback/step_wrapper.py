"""Runs code around the next call of a module's step, and only that call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from torch import nn

__all__ = ["around_next_call"]

Context = Callable[[], AbstractContextManager[Any]]


def around_next_call(module: nn.Module, name: str, context: Context) -> Callable[[], None]:
    """Enter a context around the next call of a method, for that call only.

    Several callbacks may do this at the same time. The module's method is restored before it runs.

    Args:
        module: The module.
        name: The name of its method.
        context: Creates the context.

    Returns:
        A function that undoes this if the method was not called; it may be called at any time.

    Example:
        >>> from contextlib import contextmanager
        >>> @contextmanager
        ... def spoken():
        ...     print("before")
        ...     yield
        ...     print("after")
        >>> module = nn.Linear(2, 1)
        >>> remove = around_next_call(module, "extra_repr", spoken)
        >>> text = module.extra_repr()
        before
        after
        >>> text, "extra_repr" in vars(module)
        ('in_features=2, out_features=1, bias=True', False)
    """
    contexts = getattr(vars(module).get(name), "gradmetrics_contexts", None)
    if contexts is None:
        contexts = _wrapped(module, name)
    contexts.append(context)
    own = contexts

    def remove() -> None:
        if context in own:
            own.remove(context)
        if not own and getattr(vars(module).get(name), "gradmetrics_contexts", None) is own:
            vars(module)[name].restore()

    return remove


def _wrapped(module: nn.Module, name: str) -> list[Context]:
    """Replace a method until its next call; returns the list of contexts of that call."""
    contexts: list[Context] = []
    replaced = vars(module).get(name)
    method = getattr(module, name)

    def restore() -> None:
        del vars(module)[name]
        if replaced is not None:
            vars(module)[name] = replaced

    @functools.wraps(method)
    def observed(*args: Any, **kwargs: Any) -> Any:
        restore()
        with ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context())
            return method(*args, **kwargs)

    observed.gradmetrics_contexts = contexts  # type: ignore[attr-defined]
    observed.restore = restore  # type: ignore[attr-defined]
    vars(module)[name] = observed
    return contexts

"""Checks the guards of a traced function without a call of ``torch.compile``.

A call of a compiled function compares the same guards, but what ``torch.compile`` does around them takes ten times as long.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

__all__ = ["CheckedTrace"]


class CheckedTrace:
    """The only trace of a function that ``torch.compile`` has traced.

    Args:
        function: The function.

    Raises:
        LookupError: If ``torch.compile`` has stored no trace of the function, or several, or stores them in an unknown way.
    """

    def __init__(self, function: FunctionType) -> None:
        entries = _stored_traces(function)
        if len(entries) != 1:
            raise LookupError(f"{len(entries)} traces of {function.__qualname__}")
        code = function.__code__
        self._names = code.co_varnames[: code.co_argcount]
        cells = function.__closure__ or ()
        self._enclosed = {name: cell.cell_contents for name, cell in zip(code.co_freevars, cells, strict=True)}
        # The entry itself must not be stored: torch frees it with the code of the function.
        self._guards: Any = entries[0].guard_manager
        self._run: Callable[..., Any] = FunctionType(
            entries[0].code, function.__globals__, closure=function.__closure__
        )

    def holds(self, *arguments: Any) -> bool:
        """Return whether all guards hold for the arguments of a call.

        ``torch.compile`` invalidates the trace when an object is freed that a guard identifies by its address.
        """
        if self._guards.cache_entry is None:
            return False
        is_same: bool = self._guards.check({**self._enclosed, **dict(zip(self._names, arguments, strict=True))})
        return is_same

    def run(self, *arguments: Any) -> Any:
        """Run the code of the trace, whose guards must hold; it calls the function of the backend."""
        return self._run(*arguments)


def _stored_traces(function: FunctionType) -> Sequence[Any]:
    with contextlib.suppress(ImportError, AttributeError):
        from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list

        entries: Sequence[Any] = _debug_get_cache_entry_list(function.__code__)
        if all(hasattr(entry.guard_manager, "cache_entry") for entry in entries):
            return entries
    return ()

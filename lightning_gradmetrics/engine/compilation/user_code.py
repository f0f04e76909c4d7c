"""Which Python code a forward pass runs, and whether the guards of ``torch.compile`` see all that this code can see."""

from __future__ import annotations

import _weakrefset
import abc
import contextlib
import dis
import functools
import itertools
import os
import sys
import weakref
from collections.abc import Callable, Iterable
from operator import attrgetter
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FrameType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradmetrics.classifier.mutable_parts import module_of

__all__ = ["CALLERS", "FUNCTION_FILES", "UserCode", "function_in"]

_CALLED = frozenset([len, isinstance, abs, max, min, sum, round, all, any, divmod, pow])
"""Built-in functions that code may call; others, such as ``sys.getrecursionlimit``, may read what has no guard."""

_NAMESPACES: tuple[Any, ...] = (torch._C._nn, *map(vars(torch._C).get, ("_linalg", "_fft", "_special")))
"""Modules of the built-in functions of tensors."""

_KNOWN_FILES = (
    f"{Path(torch.__file__).parent}{os.sep}",
    f"{Path(__file__).parents[2]}{os.sep}",
    abc.ABCMeta.__instancecheck__.__code__.co_filename,
    *map(attrgetter("__file__"), (_weakrefset, weakref, contextlib)),
)
"""The folders of torch and of this package, and the files of Python that ``isinstance`` and blocks use."""

_TORCH = str(Path(torch.__file__).parent)

FUNCTION_FILES = tuple(f"{_TORCH}{os.sep}{name}" for name in ("nn", "functional.py", "_tensor.py", "_jit_internal.py"))
"""Files of torch with functions of tensors, and not of settings such as ``torch.compiler.is_compiling``."""

_QUERIES = frozenset(
    ["hasattr", "getattr", "vars", "globals", "locals", "dir", "eval", "exec", "__dict__", "__import__"]
)
"""Names by which code can ask whether another name exists."""

CALLERS: frozenset[Any] = frozenset(
    [map, filter, functools.partial, functools.partialmethod, functools.reduce, itertools.starmap, itertools.accumulate]
)
"""Functions that call others out of a profiler's sight: these may be built-in functions that read settings."""

_CALLER_NAMES = frozenset(caller.__name__ for caller in CALLERS)

_HANDLERS = frozenset(["PUSH_EXC_INFO", "SETUP_FINALLY", "SETUP_WITH", "IMPORT_NAME"])
"""Instructions of exception handlers, which may catch the error of an absent name, and of imports."""


class UserCode:
    """The Python code that a forward pass runs, besides that of torch and of this package.

    Args:
        forward: The forward pass, which runs once.

    Attributes:
        codes: The code of each function.
        all_codes: The same, with that of torch and of this package.
    """

    def __init__(self, forward: Callable[[], Any]) -> None:
        self.codes: set[CodeType] = set()
        self.all_codes: set[CodeType] = set()
        self._called: dict[int, Any] = {}
        self._is_visible = True
        self._globals: dict[int, tuple[dict[str, Any], set[str]]] = {}
        if sys.getprofile() is not None:  # a profiler of the user, which Python cannot always set again
            self._is_visible = False
            return
        sys.setprofile(self._note)
        try:
            forward()
        finally:
            sys.setprofile(None)

    def _note(self, frame: FrameType, event: str, function: Any) -> None:
        code = frame.f_code
        is_known = code.co_filename.startswith(_KNOWN_FILES)
        if event == "c_call" and not is_known:
            self._is_visible &= _is_function_of_tensors(function)
        if event != "call":
            return
        self.all_codes.add(code)
        first = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        if isinstance(first, nn.Module):
            self._called[id(first)] = first
        if is_known:
            caller = frame.f_back
            is_direct = caller is not None and caller.f_code in self.codes
            self._is_visible &= not is_direct or code.co_filename.startswith(FUNCTION_FILES)
        elif code not in self.codes:
            self.codes.add(code)
            names = self._globals.setdefault(id(frame.f_globals), (frame.f_globals, set()))[1]
            names.update(itertools.filterfalse(frame.f_globals.__contains__, code.co_names))

    def is_guarded(self, modules: Iterable[nn.Module]) -> bool:
        """Return whether guards see each change that the code can see.

        That is so for methods of modules and for functions in the same files, without questions for names that may be absent.
        They may call functions of tensors, and modules of the model, whose hooks are compared.

        Args:
            modules: The modules of the model.
        """
        modules = list(modules)
        is_visible = self._is_visible and self._called.keys() <= set(map(id, modules))
        self._called.clear()  # a stored module would keep its model in memory
        if not is_visible:
            return False
        for entries, _ in self._globals.values():
            if entries is not vars(sys.modules.get(entries.get("__name__", ""), object)):
                return False  # torch.compile finds globals by the name of their module
        return self.codes <= _codes_of(modules) and not any(map(_may_hide_changes, self.codes))

    def has_same_builtins(self) -> bool:
        """Return whether no global has the name of a built-in function since."""
        return all(names.isdisjoint(entries) for entries, names in self._globals.values())


def _is_function_of_tensors(function: Any) -> bool:
    """Return whether a built-in function computes with its arguments only."""
    owner = getattr(function, "__self__", None)
    if owner is None or isinstance(owner, type):
        return type(function) is BuiltinFunctionType and getattr(torch, function.__name__, None) is function
    is_method = isinstance(owner, (Tensor, tuple, list, dict, str))
    return is_method or owner in _NAMESPACES or function in _CALLED


def _may_hide_changes(code: CodeType) -> bool:
    """Return whether code can notice that a name is absent, import one, or call built-in functions out of sight."""
    if not (_QUERIES | _CALLER_NAMES).isdisjoint(code.co_names):
        return True
    has_key = any(isinstance(value, tuple) and "key" in value for value in code.co_consts)
    if has_key:  # such as max(values, key=function)
        return True
    return any(instruction.opname in _HANDLERS for instruction in dis.get_instructions(code))


def _codes_of(modules: Iterable[nn.Module]) -> set[CodeType]:
    """Return the code of the methods of modules, of functions in the same files, and of functions inside of them."""
    waiting: list[Any] = []
    for kind in dict.fromkeys(itertools.chain.from_iterable(type(module).__mro__ for module in modules)):
        waiting += (*vars(kind).values(), *vars(sys.modules.get(module_of(kind), kind)).values())
    codes: set[CodeType] = set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, FunctionType) and not hasattr(value, "_dynamo_marked_constant"):
            waiting += (value.__code__, getattr(value, "__wrapped__", None))
        elif isinstance(value, (staticmethod, classmethod, property)):
            waiting.append(function_in(value))
        elif isinstance(value, CodeType) and value not in codes:
            codes.add(value)
            waiting += value.co_consts
    return codes


def function_in(value: Any) -> Any:
    """Return the function in an attribute of a class, such as a class method or a property; otherwise the attribute."""
    if isinstance(value, (staticmethod, classmethod)):
        return value.__func__
    return value.fget if isinstance(value, property) else value

"""Tells without running a forward pass whether it would still be the one that was compiled.

``torch.compile`` traces the forward pass and stores what it depends on: attributes, globals, modules, and the types and
shapes of tensors. It compares these guards in microseconds. It does not compare the methods of classes, nor hooks that
are registered later; those of modules are compared here. Other code, such as a method of a helper object or a read of the
environment, is refused.
"""

from __future__ import annotations

import _weakrefset
import abc
import builtins
import contextlib
import dis
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import is_, methodcaller
from pathlib import Path
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as torch_module

from lightning_gradmetrics.classifier.model_layout import HOOKS

__all__ = ["ForwardGuards", "ReachedGraph", "Trace", "TraceRefused", "UserCode"]

MOST_TRACES = 4
"""Largest number of traces of one function; its guards are given up after more."""

_GLOBAL_HOOKS = (
    torch_module._global_forward_hooks,
    torch_module._global_forward_pre_hooks,
    torch_module._global_backward_hooks,
    torch_module._global_backward_pre_hooks,
)


_KNOWN_FILES = (
    f"{Path(torch.__file__).parent}{os.sep}",
    f"{Path(__file__).parents[1]}{os.sep}",
    abc.ABCMeta.__instancecheck__.__code__.co_filename,
    _weakrefset.__file__,
    contextlib.__file__,
)
"""The folders of torch and of this package, and the files of Python that ``isinstance`` and blocks use."""

_QUERIES = frozenset(
    ["hasattr", "getattr", "vars", "globals", "locals", "dir", "eval", "exec", "__dict__", "__import__"]
)
"""Names by which code can ask whether another name exists."""

_HANDLERS = frozenset(["PUSH_EXC_INFO", "SETUP_FINALLY", "SETUP_WITH", "IMPORT_NAME"])
"""Instructions of exception handlers, which may catch the error of an absent name, and of imports."""

_VALUES = methodcaller("values")


class TraceRefused(Exception):
    """A forward pass cannot be traced in one piece, or changes too often."""


class Trace:
    """A traced forward pass.

    Args:
        graph: The graph of its torch calls, from parameters, buffers and inputs to the logits.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        self.graph = graph


class ReachedGraph(BaseException):
    """Ends a forward pass where its graph would run. It is no :class:`Exception`, so no model catches it.

    Args:
        trace: The traced forward pass.
        tensors: The arguments of its graph: parameters, buffers and inputs.
    """

    def __init__(self, trace: Trace, tensors: Sequence[Tensor]) -> None:
        self.trace, self.tensors = trace, tensors


class UserCode:
    """The Python code that a forward pass runs, besides that of torch and of this package.

    Args:
        forward: The forward pass, which runs once.

    Attributes:
        codes: The code of each function.
    """

    def __init__(self, forward: Callable[[], Any]) -> None:
        self.codes: set[CodeType] = set()
        self._globals: dict[int, tuple[dict[str, Any], set[str]]] = {}
        before = sys.getprofile()
        sys.setprofile(self._note)
        try:
            forward()
        finally:
            sys.setprofile(before)

    def _note(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code not in self.codes and not code.co_filename.startswith(_KNOWN_FILES):
            self.codes.add(code)
            names = self._globals.setdefault(id(frame.f_globals), (frame.f_globals, set()))[1]
            names.update(itertools.filterfalse(frame.f_globals.__contains__, code.co_names))

    def is_guarded(self, modules: Iterable[nn.Module]) -> bool:
        """Return whether guards see each change that the code can see.

        That is so for methods of modules and for functions in the same files, without questions for names that may be absent.

        Args:
            modules: The modules of the model.
        """
        for entries, _ in self._globals.values():
            if entries is not vars(sys.modules.get(entries.get("__name__", ""), object)):
                return False  # torch.compile finds globals by the name of their module
        return self.codes <= _codes_of(modules) and not any(map(_asks_for_names, self.codes))

    def has_same_builtins(self) -> bool:
        """Return whether no global has the name of a built-in function since."""
        return all(names.isdisjoint(entries) for entries, names in self._globals.values())


def _asks_for_names(code: CodeType) -> bool:
    """Return whether code can notice that a name is absent, or import one."""
    if not _QUERIES.isdisjoint(code.co_names):
        return True
    return any(instruction.opname in _HANDLERS for instruction in dis.get_instructions(code))


def _codes_of(modules: Iterable[nn.Module]) -> set[CodeType]:
    """Return the code of the methods of modules, of functions in the same files, and of functions inside of them."""
    waiting: list[Any] = []
    for kind in dict.fromkeys(itertools.chain.from_iterable(type(module).__mro__ for module in modules)):
        waiting += vars(kind).values()
        waiting += vars(sys.modules.get(kind.__module__, kind)).values()
    codes: set[CodeType] = set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, FunctionType):
            waiting += (value.__code__, getattr(value, "__wrapped__", None))
        elif isinstance(value, (staticmethod, classmethod)):
            waiting.append(value.__func__)
        elif isinstance(value, property):
            waiting.append(value.fget)
        elif isinstance(value, CodeType) and value not in codes:
            codes.add(value)
            waiting += value.co_consts
    return codes


class ForwardGuards:
    """The guards of a model's forward pass. The model itself is not stored.

    Args:
        modules: The model's modules.
        logits: Returns the logits ``(N, C)`` from the model's output.
        code: The code that the forward pass runs.
    """

    def __init__(self, modules: Iterable[nn.Module], logits: Callable[[Any], Tensor], code: UserCode) -> None:
        def forward(model: nn.Module, inputs: Tensor) -> Tensor:
            return logits(model(inputs))

        # torch.compile stores traces with the code of a function and compiled functions in its globals, so each model gets
        # its own.
        self._names: dict[str, Any] = {"__builtins__": builtins}
        own = FunctionType(forward.__code__.replace(), self._names, closure=forward.__closure__)
        self._forward = torch.compile(own, backend=self._ending, fullgraph=True, dynamic=False)
        self._code = code
        self._count = 0
        self._hooks: list[Any] = []
        kinds: dict[type, None] = {}
        for module in modules:
            self._hooks += map(vars(module).get, HOOKS)
            kinds.update(dict.fromkeys(type(module).__mro__))
        self._classes = list(map(vars, kinds))
        self._methods: list[list[Any]] = []

    def reached(self, model: nn.Module, inputs: Tensor) -> ReachedGraph | None:
        """Return the graph that a forward pass would run, by the guards or by a new trace; nothing of it runs.

        It is ``None`` while there are hooks, or other methods of modules or built-in functions than before.

        Args:
            model: The model.
            inputs: Its inputs ``(N, ...)``.

        Raises:
            TraceRefused: If the forward pass cannot be traced, or changes too often.
        """
        if any(self._hooks) or any(_GLOBAL_HOOKS) or not self._code.has_same_builtins():
            return None
        if self._count and not all(map(_are_same, self._classes, self._methods)):
            return None
        count = self._count
        try:
            with torch.enable_grad(), torch.compiler.set_stance("default"):  # type: ignore[no-untyped-call]
                self._forward(model, inputs)
        except ReachedGraph as reached:
            if self._count != count:  # torch.compile itself replaces methods when it traces a class for the first time
                self._methods = list(map(list, map(_VALUES, self._classes)))
                if not all(map(_is_current, self._names.values())):
                    raise TraceRefused from None
            return reached.with_traceback(None)
        except Exception as error:  # torch.compile raises many kinds of errors
            raise TraceRefused from error
        raise TraceRefused("torch.compile is disabled")

    def _ending(self, graph: fx.GraphModule, _: Any) -> Callable[..., Any]:
        """Return a function that ends the forward pass, in place of a compiled graph."""
        self._count += 1
        results: Any = graph.graph.output_node().args[0]
        if self._count > MOST_TRACES or len(results) != 1:
            raise TraceRefused
        trace = Trace(graph)

        def end(*tensors: Tensor) -> Any:
            raise ReachedGraph(trace, tensors)

        return end


def _are_same(entries: Mapping[str, Any], before: Sequence[Any]) -> bool:
    """Return whether a class has the same attributes as before."""
    return len(entries) == len(before) and all(map(is_, entries.values(), before))


def _is_current(value: Any) -> bool:
    """Return whether a value is the present module of its name, or another object; ``torch.compile`` may know an earlier one."""
    return not isinstance(value, ModuleType) or sys.modules.get(value.__name__) is value

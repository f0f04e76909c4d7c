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
import functools
import itertools
import os
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter, is_, methodcaller
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FrameType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as torch_module

from lightning_gradmetrics.classifier.model_layout import HOOKS
from lightning_gradmetrics.classifier.mutable_parts import module_of
from lightning_gradmetrics.engine.compilation.checked_trace import CheckedTrace
from lightning_gradmetrics.engine.compilation.stance import compiling

__all__ = ["ForwardGuards", "ReachedGraph", "Trace", "TraceRefused", "UserCode"]

_CONSTANTS = (bool, int, float, str, type(None), torch.device, torch.dtype)

_TYPES: frozenset[type] = frozenset(
    (
        *_CONSTANTS,
        tuple,
        list,
        dict,
        type,
        Tensor,
        nn.Parameter,
        ModuleType,
        FunctionType,
        BuiltinFunctionType,
        MethodType,
    )
)
"""Types of the values that code may read, whose guards notice each change. Those of other objects are incomplete."""

_CALLED = frozenset([len, isinstance, abs, max, min, sum, round, all, any, divmod, pow])
"""Built-in functions that code may call; others, such as ``sys.getrecursionlimit``, may read what has no guard."""

_OWN = ("G['__import_lightning_gradmetrics_dot_", "G['__import_torch_dot_nn_dot_modules_dot_module']._global_")
"""Beginnings of the names of guards for this package and for the hooks of all modules, which are compared here."""

_NAMESPACES: tuple[Any, ...] = (torch._C._nn, *map(vars(torch._C).get, ("_linalg", "_fft", "_special")))
"""Modules of the built-in functions of tensors."""

_GLOBAL_HOOKS = (
    torch_module._global_forward_hooks,
    torch_module._global_forward_pre_hooks,
    torch_module._global_backward_hooks,
    torch_module._global_backward_pre_hooks,
)

_KNOWN_FILES = (
    f"{Path(torch.__file__).parent}{os.sep}",
    f"{Path(__file__).parents[2]}{os.sep}",
    abc.ABCMeta.__instancecheck__.__code__.co_filename,
    *map(attrgetter("__file__"), (_weakrefset, weakref, contextlib)),
)
"""The folders of torch and of this package, and the files of Python that ``isinstance`` and blocks use."""

_TORCH = str(Path(torch.__file__).parent)

_FUNCTIONS = tuple(f"{_TORCH}{os.sep}{name}" for name in ("nn", "functional.py", "_tensor.py", "_jit_internal.py"))
"""Files of torch with functions of tensors, and not of settings such as ``torch.compiler.is_compiling``."""

_QUERIES = frozenset(
    ["hasattr", "getattr", "vars", "globals", "locals", "dir", "eval", "exec", "__dict__", "__import__"]
)
"""Names by which code can ask whether another name exists."""

_CALLERS: frozenset[Any] = frozenset(
    [map, filter, functools.partial, functools.partialmethod, functools.reduce, itertools.starmap, itertools.accumulate]
)
"""Functions that call others out of a profiler's sight: these may be built-in functions that read settings."""

_CALLER_NAMES = frozenset(caller.__name__ for caller in _CALLERS)

_HANDLERS = frozenset(["PUSH_EXC_INFO", "SETUP_FINALLY", "SETUP_WITH", "IMPORT_NAME"])
"""Instructions of exception handlers, which may catch the error of an absent name, and of imports."""

_VALUES = methodcaller("values")
_CODE, _ORDER = attrgetter("__code__"), attrgetter("__mro__")


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
            self._is_visible &= not is_direct or code.co_filename.startswith(_FUNCTIONS)
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
    if any(
        isinstance(value, tuple) and "key" in value for value in code.co_consts
    ):  # such as max(values, key=function)
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
            waiting.append(_function_in(value))
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
        self._own = FunctionType(forward.__code__.replace(), self._names, closure=forward.__closure__)
        self._checked: CheckedTrace | None = None
        self._forward = torch.compile(
            self._own, backend=self._ending, fullgraph=True, dynamic=False, options={"guard_filter_fn": self._all}
        )
        self._code = code
        self._count, self._is_complete = 0, True
        self._hooks: list[Any] = []
        kinds: dict[type, None] = dict.fromkeys((Tensor, nn.Parameter))
        for module in modules:
            self._hooks += map(vars(module).get, HOOKS)
            kinds.update(dict.fromkeys(type(module).__mro__))
        self._kinds, self._orders = list(kinds), list(map(_ORDER, kinds))
        self._classes = list(map(vars, kinds))
        self._methods: list[list[Any]] = []
        self._functions: list[FunctionType] = []
        for function in map(_function_in, itertools.chain.from_iterable(map(_VALUES, self._classes))):
            if isinstance(function, FunctionType) and function.__code__ in code.all_codes:
                self._functions.append(function)
        self._codes: list[CodeType] = []

    def reached(self, model: nn.Module, inputs: Tensor) -> ReachedGraph | None:
        """Return the graph that a forward pass would run, by the guards or by a new trace; nothing of it runs.

        It is ``None`` while there are hooks, or other methods of modules or built-in functions than before, or, if there is no trace
        yet, while another thread needs uncompiled modules.

        Args:
            model: The model.
            inputs: Its inputs ``(N, ...)``.

        Raises:
            TraceRefused: If the forward pass cannot be traced, or changes too often.
        """
        if any(self._hooks) or any(_GLOBAL_HOOKS) or not self._code.has_same_builtins():
            return None
        if self._count and not (
            all(map(is_, map(_ORDER, self._kinds), self._orders))
            and all(map(_are_same, self._classes, self._methods))
            and all(map(is_, map(_CODE, self._functions), self._codes))
        ):
            return None
        with torch.enable_grad():
            if self._checked is not None and self._checked.holds(model, inputs):
                return _reached_by(self._checked.run, model, inputs)
            return self._reached_by_compiler(model, inputs)

    def _reached_by_compiler(self, model: nn.Module, inputs: Tensor) -> ReachedGraph | None:
        """Return the graph that a forward pass would run; ``torch.compile`` compares the guards, or traces the function."""
        count = self._count
        with compiling(model) as is_possible:
            if not is_possible:
                return None
            reached = _reached_by(self._forward, model, inputs)
        if self._count != count:  # torch.compile itself replaces methods when it traces a class for the first time
            self._methods = list(map(list, map(_VALUES, self._classes)))
            self._codes = list(map(_CODE, self._functions))
            if not self._is_complete or not all(map(_is_current, self._names.values())):
                raise TraceRefused
            self._checked = self._checked_trace(model, inputs, reached)
        return reached

    def _checked_trace(self, model: nn.Module, inputs: Tensor, reached: ReachedGraph) -> CheckedTrace | None:
        """Return the new trace if its guards can be compared without ``torch.compile``, with the same result."""
        try:
            checked = CheckedTrace(self._own)
        except LookupError:
            return None
        if not checked.holds(model, inputs) or checked.holds(model, inputs[1:]):
            return None
        found = _reached_by(checked.run, model, inputs)
        is_same = found.trace is reached.trace and all(map(is_, found.tensors, reached.tensors))
        return checked if is_same else None

    def _ending(self, graph: fx.GraphModule, _: Any) -> Callable[..., Any]:
        """Return a function that ends the forward pass, in place of a compiled graph."""
        self._count += 1
        results: Any = graph.graph.output_node().args[0]
        # the hooks, classes and code of a second trace may be others
        if self._count > 1 or len(results) != 1 or not all(map(_is_of_torch, graph.graph.nodes)):
            raise TraceRefused
        trace = Trace(graph)

        def end(*tensors: Tensor) -> Any:
            raise ReachedGraph(trace, tensors)

        return end

    def _all(self, guards: Sequence[Any]) -> Sequence[bool]:
        """Keep all guards, and note whether one of them compares a value incompletely."""
        for guard in guards:
            value = guard.value if guard.has_value else None
            is_known = type(value) in _TYPES or isinstance(value, nn.Module)
            if isinstance(value, (type, BuiltinFunctionType)) and value in _CALLERS:
                is_known = False
            if type(value) is float and value == 0:  # a guard does not tell 0.0 from -0.0
                is_known = False
            is_own = guard.guard_type == "EMPTY_NN_MODULE_HOOKS_DICT" or guard.name.startswith(_OWN)
            self._is_complete &= is_known or is_own
        return [True] * len(guards)


def _reached_by(forward: Callable[..., Any], model: nn.Module, inputs: Tensor) -> ReachedGraph:
    """Return the graph that a traced forward pass reaches.

    Raises:
        TraceRefused: If it reaches none.
    """
    try:
        forward(model, inputs)
    except ReachedGraph as reached:
        return reached.with_traceback(None)
    except Exception as error:  # torch.compile raises many kinds of errors
        raise TraceRefused from error
    raise TraceRefused("torch.compile is disabled")


def _function_in(value: Any) -> Any:
    """Return the function in an attribute of a class, such as a class method or a property; otherwise the attribute."""
    if isinstance(value, (staticmethod, classmethod)):
        return value.__func__
    return value.fget if isinstance(value, property) else value


def _is_of_torch(node: fx.Node) -> bool:
    """Return whether a node is traced: not a function that ``torch.compile`` calls untraced, nor a user's operator."""
    target: Any = node.target
    if node.op == "call_function":
        is_traced = not isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket))
        is_traced &= not isinstance(target, torch._ops.HigherOrderOperator)
        return is_traced and (
            not isinstance(target, FunctionType) or target.__code__.co_filename.startswith(_FUNCTIONS)
        )
    return node.op in ("placeholder", "output", "call_method")


def _are_same(entries: Mapping[str, Any], before: Sequence[Any]) -> bool:
    """Return whether a class has the same attributes as before."""
    return len(entries) == len(before) and all(map(is_, entries.values(), before))


def _is_current(value: Any) -> bool:
    """Return whether a value is the present module of its name, or another object; ``torch.compile`` may know an earlier one."""
    return not isinstance(value, ModuleType) or sys.modules.get(value.__name__) is value

"""Tells without running a forward pass whether it would still be the one that was compiled.

``torch.compile`` traces the forward pass and stores what it depends on: attributes, globals, modules, and the types and
shapes of tensors. It compares these guards in microseconds. It does not compare the methods of classes, nor hooks that
are registered later; those of modules are compared here. Other code, such as a method of a helper object or a read of the
environment, is refused.
"""

from __future__ import annotations

import builtins
import itertools
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter, is_, methodcaller
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as torch_module

from lightning_gradmetrics.classifier.model_layout import HOOKS
from lightning_gradmetrics.engine.compilation.checked_trace import CheckedTrace
from lightning_gradmetrics.engine.compilation.stance import compiling
from lightning_gradmetrics.engine.compilation.user_code import CALLERS, FUNCTION_FILES, UserCode, function_in

__all__ = ["ForwardGuards", "ReachedGraph", "Trace", "TraceRefused"]

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

_OWN = ("G['__import_lightning_gradmetrics_dot_", "G['__import_torch_dot_nn_dot_modules_dot_module']._global_")
"""Beginnings of the names of guards for this package and for the hooks of all modules, which are compared here."""

_GLOBAL_HOOKS = (
    torch_module._global_forward_hooks,
    torch_module._global_forward_pre_hooks,
    torch_module._global_backward_hooks,
    torch_module._global_backward_pre_hooks,
)

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
        for function in map(function_in, itertools.chain.from_iterable(map(_VALUES, self._classes))):
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
            if isinstance(value, (type, BuiltinFunctionType)) and value in CALLERS:
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


def _is_of_torch(node: fx.Node) -> bool:
    """Return whether a node is traced: not a function that ``torch.compile`` calls untraced, nor a user's operator."""
    target: Any = node.target
    if node.op == "call_function":
        is_traced = not isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket))
        is_traced &= not isinstance(target, torch._ops.HigherOrderOperator)
        return is_traced and (
            not isinstance(target, FunctionType) or target.__code__.co_filename.startswith(FUNCTION_FILES)
        )
    return node.op in ("placeholder", "output", "call_method")


def _are_same(entries: Mapping[str, Any], before: Sequence[Any]) -> bool:
    """Return whether a class has the same attributes as before."""
    return len(entries) == len(before) and all(map(is_, entries.values(), before))


def _is_current(value: Any) -> bool:
    """Return whether a value is the present module of its name, or another object; ``torch.compile`` may know an earlier one."""
    return not isinstance(value, ModuleType) or sys.modules.get(value.__name__) is value

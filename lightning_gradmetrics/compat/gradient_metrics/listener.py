"""Records the user's forward pass to collect per-sample gradients later; the user's graph stays intact."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from lightning_gradmetrics.compat.gradient_metrics.planning import COMPILED, ModulePlan
from lightning_gradmetrics.engine.passes.plan import PlanError, Step
from lightning_gradmetrics.engine.passes.tracer import Tracer
from lightning_gradmetrics.engine.tracing.calls import opened
from lightning_gradmetrics.engine.uses import Use

__all__ = ["HEARD", "Listener", "listen"]


_COUNT = itertools.count()


class _Through(torch.autograd.Function):
    """Returns the tensor itself and connects it to the anchor's graph."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, anchor: Tensor) -> Tensor:
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient, None


class Listener(Tracer):
    """A tracer for the user's forward pass: parameters keep their gradients, and collecting starts on request.

    The recorded graph keeps the listener alive.

    Args:
        module_plan: The plan of the module's calls.
        parameters: The chosen parameters by name.
        size: The number of samples.
    """

    may_reenter = False

    def __init__(self, module_plan: ModulePlan, parameters: Mapping[str, Tensor], size: int) -> None:
        assert module_plan.plan is not None
        super().__init__(module_plan.plan, parameters, size, self._drop)
        self.module_plan, self.number = module_plan, next(_COUNT)
        self._listening = False
        self.heard = False
        self.broken = ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one call; an unplanned call ends the recording but does not affect the user's forward pass."""
        if torch.compiler.is_compiling():  # torch.compile traces this function, and leaves out hooks on tensors
            self.broken = COMPILED
        if self.broken:
            return func(*args, **(kwargs or {}))
        try:
            return super().__torch_function__(func, types, args, kwargs)
        except PlanError as error:
            self.broken = str(error)
            return func(*args, **(kwargs or {}))

    @staticmethod
    def _drop(name: str, use: Use) -> None:
        pass

    def _cut(self, arguments: Any) -> Any:
        return arguments

    def _new_leaf(self, parameter: Tensor) -> Tensor:
        return parameter if parameter.requires_grad else super()._new_leaf(parameter)

    def _rooted(self, step: Step, result: Tensor) -> Tensor:
        if not step.root and result.requires_grad:
            return result
        return _Through.apply(result, self.anchor)  # type: ignore[no-untyped-call, no-any-return]

    def _arrive(self, source: Any, use: Use) -> None:
        if self._listening:
            self.heard = True
            super()._arrive(source, use)

    def _rule_gradient(self, *args: Any) -> None:
        if self._listening:
            super()._rule_gradient(*args)

    def start(self, sink: Callable[[str, Use], None], retain_graph: bool) -> None:
        """Start to collect in the next backward pass; ``sink`` receives each reached parameter's use."""
        self._listening, self.heard, self.sink, self._last = True, False, sink, not retain_graph
        self._pending.clear()

    def stop(self) -> None:
        """Stop collecting."""
        self._listening, self.sink = False, self._drop

    def begin_backward(self) -> None:
        """Treat the following calls as repeated by activation checkpoints in a backward pass."""
        self._backward = True

    def end_backward(self) -> None:
        """End a backward pass and send the remaining uses to the sink."""
        self._backward, self._collecting = False, True
        if self._listening:
            for name in list(self._pending):
                self._finish(name)


HEARD: WeakSet[Listener] = WeakSet()
"""The listeners of forward passes whose graphs still exist."""


def listen(
    losses: Tensor, listeners: Sequence[Listener], sinks: Sequence[Callable[[str, Use], None]], retain_graph: bool
) -> None:
    """Backpropagate all losses ``(M,)`` at once; each sink receives its listener's uses.

    Raises:
        PlanError: If the losses do not come from the recorded forward passes.
    """
    for listener in listeners:
        if listener.broken:
            raise PlanError(listener.broken)
    if len(listeners) == 1 or _share_parameters(listeners):
        for number, (listener, sink) in enumerate(zip(listeners, sinks, strict=True)):
            _listen_alone(losses, listener, sink, retain_graph or number < len(listeners) - 1)
    else:
        _listen_together(losses, listeners, sinks, retain_graph)
    for listener in listeners:
        if not listener.heard:
            raise PlanError("the losses do not come from the last forward pass")


def _share_parameters(listeners: Sequence[Listener]) -> bool:
    earlier: set[int] = set()
    for listener in listeners:
        own = set(map(id, listener.parameters.values()))
        if own & earlier:
            return True
        earlier |= own
    return False


def _listen_alone(losses: Tensor, listener: Listener, sink: Callable[[str, Use], None], retain_graph: bool) -> None:
    listener.start(sink, retain_graph)
    try:
        listener.backward(losses.sum(), last=not retain_graph)
    finally:
        listener.stop()


def _listen_together(
    losses: Tensor, listeners: Sequence[Listener], sinks: Sequence[Callable[[str, Use], None]], retain_graph: bool
) -> None:
    """Run one backward pass for several listeners."""
    total, anchors = losses.sum(), [listener.anchor for listener in listeners]
    try:
        for listener, sink in zip(listeners, sinks, strict=True):
            listener.start(sink, retain_graph)
            listener.begin_backward()
        with ExitStack() as stack:
            for listener in listeners:
                stack.enter_context(listener)
            stack.enter_context(torch.autograd.set_multithreading_enabled(False))
            opened(torch.autograd.grad)(total, anchors, retain_graph=retain_graph, allow_unused=True)
        for listener in listeners:
            listener.end_backward()
    finally:
        for listener in listeners:
            listener.stop()
            listener.end_backward()

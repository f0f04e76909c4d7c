"""Repeats a known forward pass with less work per call: calls are compared with recorded ones as they are made.

A batch of a known size makes the same calls with the same tensors as an earlier one, unless the model has changed. The
ordinary way records all calls and compares them at the end. Here each call is compared with the recorded one, whose step
of the plan, slots and axes are known. The first difference raises :class:`PathChanged`, and the batch runs in the
ordinary way.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd.graph import GradientEdge

from lightning_gradmetrics.engine.passes.collecting_pass import Sink
from lightning_gradmetrics.engine.passes.image_calls import result_for_images
from lightning_gradmetrics.engine.passes.inner_calls import HeldStep
from lightning_gradmetrics.engine.passes.known_calls import KnownCall, KnownPath
from lightning_gradmetrics.engine.passes.path_check import PathChanged, PathCheck, PathFollower
from lightning_gradmetrics.engine.passes.path_record import leaves_of
from lightning_gradmetrics.engine.passes.plan import Plan, PlanError, Step
from lightning_gradmetrics.engine.passes.tracer import Tracer
from lightning_gradmetrics.engine.rules import Call, bind
from lightning_gradmetrics.engine.task import Task
from lightning_gradmetrics.engine.tracing.calls import Silence
from lightning_gradmetrics.engine.tracing.graph import gradients_at, with_graph

__all__ = ["DirectPass", "KnownTracer"]


def _known_leaves(path: KnownPath, task: Task) -> list[Tensor]:
    """Return the leaves of a batch.

    Raises:
        PathChanged: If the model has other leaves, or other parameters are chosen.
    """
    leaves = leaves_of(task)
    if leaves is None or len(leaves) != path.leaves:
        raise PathChanged
    if not all(map(is_, map(leaves.__getitem__, path.chosen), task.parameters.values())):
        raise PathChanged
    return leaves


class DirectPass(PathCheck):
    """A forward pass on a known path that runs without the plan: each parameter has one step, by a rule.

    Args:
        path: The path.
        task: The batch.
        sink: Called once per parameter and backward pass.

    Raises:
        PathChanged: If the model has other leaves.
    """

    def __init__(self, path: KnownPath, task: Task, sink: Sink) -> None:
        super().__init__(path, _known_leaves(path, task))
        self._sink = sink
        self._device = next(iter(task.parameters.values())).device
        self._held: list[tuple[HeldStep, dict[str, Any], int]] = []
        self._ends: list[Any] = []

    @cached_property
    def _anchor(self) -> Tensor:
        return torch.zeros((), device=self._device, requires_grad=True)

    def _run(self, known: KnownCall, values: Sequence[Any], args: Any, kwargs: Any) -> Any:
        """Return the result of a recorded call, and note the steps in it."""
        if known.held is not None:
            return self._hold(known.held, args, kwargs)
        return self._inside(known, values) if known.inner else result_for_images(known.function, args, kwargs)

    def _inside(self, known: KnownCall, values: Sequence[Any]) -> Any:
        """Return the result of the calls inside a function."""
        entries = [*values, *known.spare]
        for place, call in enumerate(known.inner, len(values)):
            args, kwargs = call.pick(entries), {}
            if call.names:
                count = len(args) - len(call.names)
                args, kwargs = args[:count], dict(zip(call.names, args[count:], strict=True))
            held = call.held
            entries[place] = call.function(*args, **kwargs) if held is None else self._hold(held, args, kwargs)
        return entries[place]

    def _hold(self, held: HeldStep, args: Any, kwargs: Any) -> Tensor:
        """Run a step, and note the edge of the graph at its result."""
        values = bind(held.rule, args, kwargs) or {}
        version = values["input"]._version
        result = self._computed(held, values, args, kwargs)
        self._held.append((held, values, version))
        if self._path.is_pure:  # a result that is changed in place must not be a leaf
            self._ends.append(result if result.requires_grad else result.requires_grad_())
            return result
        result = with_graph(result, self._anchor)
        node: Any = result.grad_fn
        self._ends.append(GradientEdge(node, result.output_nr))
        return result

    def _computed(self, held: HeldStep, values: dict[str, Any], args: Any, kwargs: Any) -> Tensor:
        """Return the result of a step."""
        if held.run is not None:
            return held.run(held.rule.dense_values(values))
        args, kwargs = held.rule.made_dense(values, args, kwargs)
        result: Tensor = held.step.function(*args, **kwargs)
        return result

    def collect(self, logits: Tensor, gradient: Tensor, last: bool) -> None:
        """Collect the gradients of an objective from its gradient with respect to the logits, ``(N, C)``.

        The graph is freed after the last objective's.

        Raises:
            PlanError: If the input of a layer was changed in place after its use.
        """
        if not (logits.requires_grad and self._ends):
            return
        with torch.autograd.set_multithreading_enabled(False):
            gradients = gradients_at(logits, self._ends, gradient, not last)
        with Silence(self._device.type):
            for (held, values, version), of_result in zip(self._held, gradients, strict=True):
                if of_result is not None:
                    self._send(held, values, version, of_result)

    def _send(self, held: HeldStep, values: dict[str, Any], version: int, g: Tensor) -> None:
        """Pass the uses of a step's parameters to the sink, from the gradient of its result."""
        if values["input"]._version != version:
            raise PlanError("a layer's input was changed in place after its use")
        call = Call(values, held.axis, held.out, held.names)
        for slot, use in held.rule.uses(call, held.rule.split(held.out, g)):
            self._sink(held.slots[slot], use)


class KnownTracer(PathFollower, Tracer):
    """A tracer for a known path.

    Args:
        plan: The plan of the calls.
        sink: Called once per parameter and backward pass.
        path: The path.
        task: The batch.
        free: Whether axes may have a different number of positions per sample than planned.

    Raises:
        PathChanged: If the model has other leaves.
    """

    def __init__(self, plan: Plan, sink: Sink, path: KnownPath, task: Task, free: bool) -> None:
        super().__init__(plan, plan.known_parameters(task.model, task.parameters), task.size, sink, free)
        self.follow(path, _known_leaves(path, task))
        self._held: list[tuple[HeldStep, Call, int]] = []
        self._edges: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one call, which must be the recorded one."""
        if self._backward or self._open or self._silence.depth or type(func) is OpOverload:
            return super().__torch_function__(func, types, args, kwargs)
        kwargs = kwargs or {}
        values = (*args, *kwargs.values()) if kwargs else args
        known = self._next_call(func, values, kwargs)
        if known is None:
            return self._harmless(func, args, kwargs)
        if known.held is not None:
            self.position += 1
            result = self._hold(known.held, args, kwargs)
        else:
            result = self._run(func, args, kwargs) if known.has_sources else func(*args, **kwargs)
        self._note(known, result)
        return result

    def _rule(self, step: Step, args: Any, kwargs: Any) -> Any:
        """Run a step inside of a composite function."""
        held = self._path.held.get(self.position - 1)
        values = {} if held is None else bind(held.rule, args, kwargs) or {}
        if held is None or self._slots(values) != held.slots or values["input"].shape[held.axis.dim] != held.length:
            return super()._rule(step, args, kwargs)
        return self._hold(held, args, kwargs)

    def _hold(self, held: HeldStep, args: Any, kwargs: Any) -> Tensor:
        """Run a call by a rule, and note the edge of the graph at its result."""
        values = bind(held.rule, args, kwargs) or {}
        result = self._run_rule(held.step, held.rule, values, args, kwargs)
        for name in held.slots.values():
            self._expect(name)
        call, version = Call(values, held.axis, held.out, held.names), values["input"]._version
        if self._path.is_large:
            result.register_hook(partial(self._rule_gradient, held.rule, call, held.slots, version))  # type: ignore[no-untyped-call]
            return result
        self._held.append((held, call, version))
        node: Any = result.grad_fn
        self._edges.append(GradientEdge(node, result.output_nr))
        return result

    def backward(self, total: Tensor, last: bool = True, gradient: Tensor | None = None) -> None:
        """Run the backward pass, which returns the gradients of the held results, or calls the hooks of a large path."""
        if not total.requires_grad:
            return
        if self._path.is_large:
            super().backward(total, last, gradient)
            return
        self._backward, self._last = True, last
        try:
            with torch.autograd.set_multithreading_enabled(False):
                gradients = gradients_at(total, [*self._edges, self.anchor], gradient, not last)
            with self._silence:
                for (held, call, version), of_result in zip(self._held, gradients, strict=False):
                    if of_result is not None:
                        self._rule_gradient(held.rule, call, held.slots, version, of_result)
        finally:
            self._backward = False
        for name in list(self._pending):
            self._finish(name)

"""Repeats a known forward pass with less work per call: calls are compared with recorded ones as they are made.

A batch of a known size makes the same calls with the same tensors as an earlier one, unless the model has changed. The
ordinary way records all calls and compares them at the end. Here each call is compared with the recorded one, whose step
of the plan, slots and axes are known. The first difference raises :class:`PathChanged`, and the batch runs in the
ordinary way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd.graph import GradientEdge

from lightning_gradmetrics.engine.graph import gradients_at
from lightning_gradmetrics.engine.path_check import PathChanged, PathFollower
from lightning_gradmetrics.engine.path_record import HeldStep, KnownPath, leaves_of
from lightning_gradmetrics.engine.plan import Plan, PlanError, Source, Step
from lightning_gradmetrics.engine.rules import Call, Rule, bind
from lightning_gradmetrics.engine.task import Task
from lightning_gradmetrics.engine.tracer import Sink, Tracer

__all__ = ["KnownTracer"]


def _are_at(chosen: Sequence[int], leaves: Sequence[Tensor], task: Task) -> bool:
    """Return whether the chosen parameters have these numbers among the leaves."""
    return all(map(is_, map(leaves.__getitem__, chosen), task.parameters.values()))


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
        leaves = leaves_of(task)
        if leaves is None or len(leaves) != path.leaves or not _are_at(path.chosen, leaves, task):
            raise PathChanged
        self.follow(path, leaves)
        self._is_direct = path.is_direct
        self._held: list[tuple[HeldStep, Call, int]] = []
        self._edges: list[Any] = []
        self._inner = path.held

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
        self._note(known, values, result)
        return result

    def _rule(self, step: Step, args: Any, kwargs: Any) -> Any:
        """Run a step inside of a composite function."""
        held = self._inner.get(self.position - 1)
        values = {} if held is None else bind(held.rule, args, kwargs) or {}
        if held is None or self._slots(values) != held.slots or values["input"].shape[held.axis.dim] != held.length:
            if self._is_direct:
                self._lose()
            return super()._rule(step, args, kwargs)
        return self._hold(held, args, kwargs)

    def _hold(self, held: HeldStep, args: Any, kwargs: Any) -> Tensor:
        """Run a call by a rule, and note the edge of the graph at its result."""
        values = bind(held.rule, args, kwargs) or {}
        x = values["input"]
        if self._is_direct and args and x is args[0] and not x.requires_grad and x.is_floating_point():
            # The backward pass ends at the edge of the result, so the result only needs some graph.
            args = (x.detach().requires_grad_(), *args[1:])
            run_with = {**values, "input": args[0]}
        else:
            run_with = values
        result = self._run_rule(held.step, held.rule, run_with, args, kwargs)
        if not self._is_direct:
            for name in held.slots.values():
                self._expect(name)
        self._held.append((held, Call(values, held.axis, held.out, held.names), x._version))
        node: Any = result.grad_fn
        self._edges.append(GradientEdge(node, result.output_nr))
        return result

    def backward(self, total: Tensor, last: bool = True, gradient: Tensor | None = None) -> None:
        """Run the backward pass, which returns the gradients of the held results."""
        ends = self._edges if self._is_direct else [*self._edges, self.anchor]
        if not total.requires_grad or not ends:
            return
        self._backward, self._last = True, last
        collect = self._send if self._is_direct else self._rule_gradient
        try:
            with torch.autograd.set_multithreading_enabled(False):
                gradients = gradients_at(total, ends, gradient, not last)
            with self._silence:
                for (held, call, version), of_result in zip(self._held, gradients, strict=False):
                    if of_result is not None:
                        collect(held.rule, call, held.slots, version, of_result)
        finally:
            self._backward = False
        for name in list(self._pending):
            self._finish(name)

    def _send(self, found: Rule, call: Call, slots: Mapping[str, Source], version: int, g: Tensor) -> None:
        """Send the gradients of a step's parameters, which no other step uses, to the sink."""
        if call.values["input"]._version != version:
            raise PlanError("a layer's input was changed in place after its use")
        for slot, use in found.uses(call, found.split(call.out, g)):
            self.sink(str(slots[slot]), use)

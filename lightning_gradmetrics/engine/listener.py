"""Collecting per-sample gradients from a forward pass that the user runs, with the user's graph left whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradmetrics.classifier.forward import gradients_enabled, preserved
from lightning_gradmetrics.engine.axes import axis_between
from lightning_gradmetrics.engine.calls import map_arguments, tensors_in
from lightning_gradmetrics.engine.plan import Plan, PlanError, Step, make_plan
from lightning_gradmetrics.engine.trace import CallTrace
from lightning_gradmetrics.engine.tracer import Tracer
from lightning_gradmetrics.engine.uses import Use

__all__ = ["Listener", "plan_module", "samples_in"]


class _Through(torch.autograd.Function):
    """The tensor itself, as a part of the anchor's graph too."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, anchor: Tensor) -> Tensor:
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient, None


class Listener(Tracer):
    """A tracer in the user's own forward pass: parameters keep their gradients, collecting waits to be asked for.

    It is kept alive by the graph that it listens to.

    Args:
        plan: What to do at each call.
        parameters: The chosen parameters by name.
        size: The number of samples.
    """

    def __init__(self, plan: Plan, parameters: Mapping[str, Tensor], size: int) -> None:
        super().__init__(plan, parameters, size, self._drop)
        self._listening = False
        self.heard = False
        self.broken = ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one call; what was not planned ends the listening and never disturbs the user's forward pass."""
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

    def listen(self, losses: Tensor, sink: Callable[[str, Use], None], retain_graph: bool) -> None:
        """Send the gradients of all losses ``(N,)`` back at once; ``sink`` gets each reached parameter's use.

        Raises:
            PlanError: If the losses do not come from the forward pass listened to.
        """
        if self.broken:
            raise PlanError(self.broken)
        self._listening, self.heard, self.sink = True, False, sink
        self._pending.clear()
        try:
            self.backward(losses.sum(), last=not retain_graph)
        finally:
            self._listening, self.sink = False, self._drop
        if not self.heard:
            raise PlanError("the losses do not come from the last forward pass")


def samples_in(arguments: Any) -> int | None:
    """The length of the first axis of the first tensor in a module's arguments, if there is one."""
    first = next(tensors_in(arguments), None)
    return None if first is None or first.ndim == 0 else len(first)


def plan_module(module: nn.Module, args: Any, kwargs: Any, parameters: Mapping[str, Tensor]) -> Plan:
    """A plan for calls of a module with such arguments, from two runs on a few of their samples.

    Args:
        module: The module.
        args: Its positional arguments, the samples along the first axis of each tensor.
        kwargs: Its keyword arguments.
        parameters: The chosen parameters of the module, by name.

    Raises:
        PlanError: If the runs differ in more than their shapes.
    """
    size = samples_in((args, kwargs)) or 0
    with preserved(module), gradients_enabled():
        for parameter in module.parameters():
            parameter.requires_grad_(False)
        for chosen in parameters.values():
            chosen.requires_grad_(True)
        (two, small), (three, large) = (_recorded(module, args, kwargs, parameters, size, count) for count in (2, 3))
        return make_plan(two, three, _first_sample(small, large))


def _recorded(
    module: nn.Module, args: Any, kwargs: Any, parameters: Mapping[str, Tensor], size: int, count: int
) -> Any:
    rows = (list(range(size)) * count)[:count]

    def take(tensor: Tensor) -> Tensor:
        picked = tensor[rows] if tensor.ndim and len(tensor) == size else tensor
        return picked.detach().clone()

    recorder, state = CallTrace(parameters), torch.random.get_rng_state()
    with recorder:
        output = module.forward(*map_arguments(take, args), **map_arguments(take, kwargs))
    torch.random.set_rng_state(state)
    return recorder, output


def _first_sample(small: Any, large: Any) -> Tensor | None:
    """A number that depends on the first sample of the larger output only."""
    for two, three in zip(tensors_in(small), tensors_in(large), strict=True):
        axis = axis_between(two.shape, three.shape)
        if axis is not None and three.requires_grad:
            return axis.split(three * torch.rand_like(three))[0].sum()
    return None

"""Repeats a compiled plan without a look at the model, as long as the guards of ``torch.compile`` hold.

Otherwise every call records the model, and compares one sample's forward pass with the graph. On a small model, this takes
longer than the graph.
"""

from __future__ import annotations

import atexit
import itertools
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch.nn.utils import parametrize

from lightning_gradmetrics.classifier.forward import Inputs
from lightning_gradmetrics.classifier.preservation import ModelRecord
from lightning_gradmetrics.engine.compilation.forward_guards import ForwardGuards, ReachedGraph, Trace, TraceRefused
from lightning_gradmetrics.engine.compilation.program import (
    OutOfRange,
    Program,
    ProgramState,
    is_transformed,
    settings_of,
)
from lightning_gradmetrics.engine.compilation.user_code import UserCode
from lightning_gradmetrics.engine.inputs.samples import close_rows
from lightning_gradmetrics.engine.task import Task
from lightning_gradmetrics.engine.tracing.model_state import ForwardState
from lightning_gradmetrics.gradients.objectives import Objective
from lightning_gradmetrics.gradients.statistics import Moment, Moments

__all__ = ["Request", "guard_program", "guarded_moments", "is_guarded"]

MOST_REQUESTS = 8
"""Largest number of requests for one model that are repeated by guards."""


@dataclass(frozen=True)
class Request:
    """What a call asks for.

    Args:
        objectives: The objectives.
        wanted: The moments.
        names: The names of the chosen parameters.
        inputs: The type and the layout of the inputs.
        labels: The type and the layout of the labels; ``None`` without labels.
        settings: The settings of torch that a graph depends on.
    """

    objectives: tuple[Objective, ...]
    wanted: frozenset[Moment]
    names: tuple[str, ...]
    inputs: Hashable
    labels: Hashable
    settings: Hashable

    @classmethod
    def of(
        cls,
        objectives: Iterable[Objective],
        wanted: frozenset[Moment],
        parameters: Mapping[str, nn.Parameter],
        inputs: Inputs,
        targets: Tensor | None,
    ) -> Request:
        """Return the request of a call."""
        placed, labels = _layout(inputs), _layout(targets)
        settings = settings_of(next(iter(parameters.values())).device)
        return cls(tuple(objectives), wanted, tuple(parameters), placed, labels, settings)


def _layout(tensor: Any) -> Hashable:
    """Return the type and the layout of a tensor; ``None`` for anything else."""
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
        return None
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.device


@dataclass(frozen=True)
class _Placed:
    """A compiled plan whose arguments are those of a trace.

    Args:
        program: The plan.
        places: For each parameter, each buffer and the inputs, its position among the arguments of the trace; or the tensor
            itself, if the forward pass does not use it.
    """

    program: Program
    places: tuple[tuple[int | Tensor, ...], ...]

    def moments(self, tensors: Sequence[Tensor], targets: Tensor | None, per_parameter: bool) -> list[Moments]:
        """Return the moments of each objective, ``(N, P)`` for each parameter or ``(N,)``.

        Args:
            tensors: The arguments of the trace.
            targets: The labels.
            per_parameter: Whether to return one value per parameter.
        """
        parameters, buffers, inputs = ([], [], [])  # type: tuple[list[Tensor], list[Tensor], list[Tensor]]
        for arguments, places in zip((parameters, buffers, inputs), self.places, strict=True):
            for place in places:
                arguments.append(tensors[place] if isinstance(place, int) else place)
        moments, merged, _ = self.program.run_on(parameters, buffers, inputs, targets)
        return moments if per_parameter else merged


class _Guarded:
    """The compiled plans of one request.

    Args:
        guards: The guards of the model's forward pass; ``None`` if they cannot be used.
        logits: Returns the logits ``(N, C)`` from the model's output.
        unguarded: What the guards overlook.
    """

    def __init__(self, guards: ForwardGuards | None, logits: Callable[[Any], Tensor], unguarded: Hashable) -> None:
        self.guards, self.logits, self._unguarded = guards, logits, unguarded
        self.plans: dict[Trace, _Placed] = {}

    def moments(
        self, model: nn.Module, inputs: Tensor, targets: Tensor | None, per_parameter: bool
    ) -> list[Moments] | None:
        """Return the moments, or ``None`` if the model is not as it was in a call with a plan."""
        if not self.plans:
            return None
        reached = self._reached(model, inputs)
        plan = None if reached is None else self.plans.get(reached.trace)
        if reached is None or plan is None or any(map(_HOOKS, reached.tensors)):
            return None
        try:
            with torch.no_grad():
                return plan.moments(reached.tensors, targets, per_parameter)
        except OutOfRange:
            return None
        except RuntimeError:  # the eager engine explains which labels are wrong
            if targets is None:
                raise
            return None

    def add(self, task: Task, state: ProgramState, program: Program, logits: Tensor) -> None:
        """Add the plan of a batch, if the trace computes the same logits ``(N, C)``."""
        inputs = task.inputs
        assert isinstance(inputs, Tensor)
        reached = self._reached(task.model, inputs)
        if reached is None:
            return
        numbers = dict(zip(map(id, reached.tensors), itertools.count()))
        groups = state.parameters, state.buffers, [inputs]
        known = set(map(id, itertools.chain(*groups)))
        if known.issuperset(numbers) and close_rows(_logits_of(reached), logits):
            self.plans[reached.trace] = _Placed(program, tuple(_places(numbers, group) for group in groups))
        else:
            self.guards = None

    def _reached(self, model: nn.Module, inputs: Tensor) -> ReachedGraph | None:
        """Return the graph that the forward pass would run; ``None`` if that is not known."""
        if self.guards is None or self._unguarded != _unguarded(model):
            return None
        try:
            return self.guards.reached(model, inputs)
        except TraceRefused:
            self.guards = None
            return None


def _places(numbers: Mapping[int, int], tensors: Sequence[Tensor]) -> tuple[int | Tensor, ...]:
    """Return the positions of tensors by their identity; a tensor without a position itself."""
    return tuple(numbers.get(id(tensor), tensor) for tensor in tensors)


_GUARDED: WeakKeyDictionary[nn.Module, dict[Request, _Guarded]] = WeakKeyDictionary()
atexit.register(_GUARDED.clear)  # before Python clears the modules that torch.compile needs to forget a trace

_HOOKS = attrgetter("_backward_hooks")


def is_guarded(model: nn.Module) -> bool:
    """Return whether a model has compiled plans with guards."""
    return model in _GUARDED


def guarded_moments(
    model: nn.Module,
    inputs: Inputs,
    request: Request,
    targets: Tensor | None,
    logits: Callable[[Any], Tensor],
    per_parameter: bool,
) -> list[Moments] | None:
    """Return the moments of each objective; ``None`` if a guard does not hold, or if there are none.

    Args:
        model: The model.
        inputs: Its inputs.
        request: What the call asks for.
        targets: The labels.
        logits: Returns the logits ``(N, C)`` from the model's output.
        per_parameter: Whether to return one value per parameter, ``(N, P)``, instead of ``(N,)``.
    """
    known = _GUARDED.get(model, {}).get(request)
    if (
        known is None
        or known.logits is not logits
        or type(inputs) is not Tensor
        or inputs.is_inference()
        or _is_watched()
    ):
        return None
    with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
        labels = None if targets is None else targets.detach()
        plain = inputs.detach() if inputs.requires_grad else inputs
        return known.moments(model, plain, labels, per_parameter)


def guard_program(task: Task, state: ProgramState, program: Program, logits: Tensor) -> None:
    """Let later calls repeat a plan that has run on a batch, as long as the model does not change.

    Args:
        task: The batch.
        state: Its tensors and those of the model.
        program: The plan.
        logits: The logits ``(N, C)`` of the plan.
    """
    is_simple = type(task.inputs) is Tensor and program.calls is not None and not hasattr(task.logits, "seen")
    if not is_simple or task.record is None or _is_watched():
        return
    known = _GUARDED.setdefault(task.model, {})
    request = Request.of(task.objectives, task.wanted, task.parameters, task.inputs, task.targets)
    if request not in known:
        if len(known) >= MOST_REQUESTS:
            return
        known[request] = _Guarded(_guards(task, task.record), task.logits, _unguarded(task.model))
    if known[request].logits is task.logits:
        known[request].add(task, state, program, logits)


def _guards(task: Task, record: ModelRecord) -> ForwardGuards | None:
    """Return the guards of a model; ``None`` if its forward pass runs code that may change without their notice."""
    state = ForwardState(task.model, record)
    state.restore()
    try:
        code = UserCode(partial(task.forward, repairs_norms=False))
    finally:
        state.restore()
    return ForwardGuards(record.modules, task.logits, code) if code.is_guarded(record.modules) else None


def _unguarded(model: nn.Module) -> Hashable:
    """Return what guards overlook: with torch 2.8, that a module has an attribute with the name of a method."""
    return tuple(map(tuple, map(vars, model.modules()))) if _OVERLOOKS_ATTRIBUTES else ()


_OVERLOOKS_ATTRIBUTES = torch.__version__ < "2.9"


def _logits_of(reached: ReachedGraph) -> Tensor:
    """Return the logits ``(N, C)`` of a graph, whose arguments are not changed."""
    with torch.no_grad():
        logits: Tensor = reached.trace.graph(*map(Tensor.clone, reached.tensors))[0]
    return logits


def _is_watched() -> bool:
    """Return whether something must see all operators, or computes parametrised weights in another way.

    Inside a function that ``torch.compile`` compiles, code may be traced instead of run; the eager engine refuses such calls.
    """
    modes = torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack()
    is_compiled = get_eval_frame_callback() not in (None, False)
    return bool(modes or parametrize._cache_enabled) or is_compiled or is_transformed()

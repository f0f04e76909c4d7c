"""Compiled plans: a planned batch is traced once into a graph of torch operators, which inductor compiles."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import stateless

from lightning_gradmetrics.classifier.forward import map_tensors, tensors_in
from lightning_gradmetrics.classifier.preservation import ModelRecord
from lightning_gradmetrics.engine.auto import auto_moments, verified_strategy
from lightning_gradmetrics.engine.gather import MomentTable
from lightning_gradmetrics.engine.kernels.library import plain_kernels
from lightning_gradmetrics.engine.model_state import ForwardState, attribute_key
from lightning_gradmetrics.engine.plan import PlanError
from lightning_gradmetrics.engine.samples import close_rows, input_structure
from lightning_gradmetrics.engine.strategy import Strategy, collect_fast
from lightning_gradmetrics.engine.task import Task
from lightning_gradmetrics.engine.tracer import Tracer
from lightning_gradmetrics.gradients.precision import rounding
from lightning_gradmetrics.gradients.statistics import Moments

__all__ = ["compiled_moments"]

MOST_PROGRAMS = 8
"""Largest number of programs that are stored for one model."""


@dataclass(frozen=True)
class Program:
    """A compiled plan.

    Args:
        run: A function from parameters, buffers, inputs and labels to the moments of all objectives, in the order of
            ``keys``, and the logits.
        keys: The moments of one objective.
        size: The number of samples in the batch.
        logits: The function from the model's output to the logits.
    """

    run: Callable[..., tuple[Tensor, ...]]
    keys: tuple[Any, ...]
    size: int
    logits: Callable[[Any], Tensor]

    def fits(self, task: Task) -> bool:
        """Return whether the program was made for batches of this size."""
        return self.size == task.size and self.logits == _logits_function(task)

    def moments(self, task: Task) -> list[Moments]:
        """Return the moments ``(N, P)`` of each objective.

        Raises:
            PlanError: If the model's own forward pass returns different logits than the graph.
        """
        with torch.no_grad(), torch.compiler.set_stance("default"):
            *values, logits = self.run(*_tensors(task))
        if hasattr(task.logits, "seen"):  # an observer that compares them with the logits of another forward pass
            task.logits.seen = logits
        else:
            _check_forward(task, logits)
        count = len(self.keys)
        moments = []
        for start in range(0, len(values), count):
            moments.append(dict(zip(self.keys, values[start : start + count], strict=True)))
        return moments


_PROGRAMS: WeakKeyDictionary[nn.Module, dict[Hashable, Program | None]] = WeakKeyDictionary()
"""The program of each kind of batch; ``None`` if the engine runs eagerly."""


def compiled_moments(task: Task) -> list[Moments]:
    """Return the moments ``(N, P)`` of each objective's gradient by a compiled plan.

    The first batch runs eagerly, and its result is compared with that of the newly compiled plan. Smaller batches, and
    models that cannot be compiled, run eagerly.
    """
    programs = _PROGRAMS.setdefault(task.model, {})
    key = _key(task)
    program = programs.get(key)
    if program is not None and program.fits(task):
        try:
            return program.moments(task)
        except PlanError as error:
            programs[key] = None
            _warn_eager(task, str(error))
    expected = auto_moments(task)
    key = _key(task)  # the first batch shows which attributes the model reads; only those are in the key
    is_new = key not in programs or (program is not None and program.size < task.size)
    if is_new and task.size > 0 and len(programs) < MOST_PROGRAMS:
        programs[key] = _checked_program(task, expected)
    return expected


def _key(task: Task) -> Hashable:
    """Return everything that a graph depends on, except the values of tensors and the number of samples."""
    modules: list[Hashable] = []
    record = ModelRecord(task.model) if task.record is None else task.record
    for module in record.modules:
        modules.append((id(module), type(module), vars(module).get("forward"), _has_hooks(module)))
    shapes = [tuple(t.shape[1:]) for t in tensors_in(task.inputs)]
    named = [(name, p.shape, p.dtype) for name, p in task.model.named_parameters()]
    labels = None if task.targets is None else task.targets.dtype
    options = (task.objectives, task.wanted, task.memory, torch.is_autocast_enabled(_device(task).type), labels)
    structure = (tuple(shapes), task.per_sample, input_structure(task.inputs))
    return tuple(modules), attribute_key(task.model, record), tuple(named), tuple(task.parameters), structure, options


def _device(task: Task) -> torch.device:
    return next(iter(task.parameters.values())).device


def _logits_function(task: Task) -> Callable[[Any], Tensor]:
    """Return the function from outputs to logits, unwrapped if an observer wraps it."""
    function: Callable[[Any], Tensor] = getattr(task.logits, "logits_fn", task.logits)
    return function


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def _tensors(task: Task) -> tuple[dict[str, Tensor], dict[str, Tensor], list[Tensor], Tensor | None]:
    """Return the inputs of a graph: parameters and buffers by name, the model's inputs, and the labels."""
    parameters = {name: parameter.detach() for name, parameter in task.model.named_parameters()}
    return parameters, dict(task.model.named_buffers()), list(tensors_in(task.inputs)), task.targets


# -- making a program -------------------------------------------------------------------------------------------------


def _checked_program(task: Task, expected: Sequence[Moments]) -> Program | None:
    """Return the program of a batch, or ``None`` with a warning that gives the reason."""
    strategy = verified_strategy(task)
    program, reason = None, _obstacle(task, strategy)
    if strategy is not None and not reason:
        program, reason = _compared_program(task, strategy, expected)
    if program is None:
        _warn_eager(task, reason)
    return program


def _warn_eager(task: Task, reason: str) -> None:
    warnings.warn(f"{type(task.model).__name__} is not compiled and runs eagerly: {reason}", stacklevel=2)


def _check_forward(task: Task, logits: Tensor) -> None:
    """Compare the graph's logits with the model's, which may depend on state that the graph does not read.

    Raises:
        PlanError: If they differ.
    """
    state = ForwardState(task.model, task.record)
    with torch.no_grad():
        own = task.forward()
    state.restore()
    if not close_rows(own, logits):
        raise PlanError("its forward pass no longer computes what was compiled")


def _compared_program(task: Task, strategy: Strategy, expected: Sequence[Moments]) -> tuple[Program | None, str]:
    """Return a program whose moments of the batch are the expected ones, or ``None`` and the reason."""
    try:
        program = _program(task, strategy)
        compiled = program.moments(task)
    except Exception as error:  # tracing and compiling fail in many ways; the eager engine has the result
        return None, f"{type(error).__name__}: {error}".partition("\n")[0]
    parameters = list(task.parameters.values())
    entries = torch.tensor([p.numel() for p in parameters], dtype=torch.float64, device=parameters[0].device)
    for moments, wanted in zip(compiled, expected, strict=True):
        if not _agree(moments, wanted, rounding(parameters[0]), entries):
            return None, "its compiled plan disagrees with the eager one"
    return program, ""


def _obstacle(task: Task, strategy: Strategy | None) -> str:
    """Return why a batch cannot be compiled, or an empty string."""
    if strategy is None or strategy.plan is None or strategy.slow:
        return "some of its parameters have no fast rule"
    if strategy.random or strategy.alone or strategy.reads_samples:
        return "it draws random numbers, or its samples are compared with samples alone in every batch"
    if any(map(_has_hooks, task.model.modules())):
        return "its modules have hooks"
    if any(objective.function is not None for objective in task.objectives):
        return "user-defined objectives are checked in every batch"
    if task.memory is not None or torch.is_autocast_enabled(_device(task).type):
        return "memory limits and autocast are not supported"
    return ""


def _program(task: Task, strategy: Strategy) -> Program:
    keys = tuple(sorted(task.wanted, key=str))

    def planned(
        parameters: dict[str, Tensor], buffers: dict[str, Tensor], inputs: list[Tensor], labels: Tensor | None
    ) -> tuple[Tensor, ...]:
        flat_inputs = iter(inputs)
        chosen: Any = {name: parameters[name] for name in task.parameters}
        with _holding(task.model, {**parameters, **buffers}), plain_kernels(), torch.enable_grad():
            batch = replace(
                task,
                inputs=map_tensors(task.inputs, lambda _: next(flat_inputs)),
                targets=labels,
                parameters=chosen,
                record=None,
            )
            table = MomentTable(batch)
            logits: list[Tensor] = []

            def keep(found: Tensor, tracer: Tracer) -> None:
                logits.append(found)

            collect_fast(table, batch.restricted(strategy.fast), strategy.plan, keep, free=True)
        results: list[Tensor] = []
        for moments in table.moments:
            results += map(moments.__getitem__, keys)
        return tuple(map(Tensor.detach, [*results, *logits]))

    graph = make_fx(planned)(*_tensors(task))
    if any(node.op == "get_attr" for node in graph.graph.nodes):
        raise ValueError("its forward uses tensors that are neither parameters nor buffers, or makes tensors of data")
    return Program(torch.compile(graph, dynamic=False), keys, task.size, _logits_function(task))


@contextmanager
def _holding(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Use other tensors for the model's parameters and buffers inside the block."""
    with stateless._reparametrize_module(model, dict(tensors), tie_weights=True):
        yield


def _agree(found: Moments, expected: Moments, tolerance: float, entries: Tensor) -> bool:
    """Return whether two computations of the moments ``(N, P)`` of the same batch are equal up to rounding.

    Args:
        found: The moments to check.
        expected: The moments of the eager engine.
        tolerance: The relative error of entries.
        entries: The number of entries of each parameter, ``(P,)``.
    """
    for key, value in expected.items():
        size = value.abs()
        if isinstance(key, str):
            size = _size_of_terms(expected, key, entries)
        error = (found[key] - value).abs()
        if not bool((error <= tolerance * size + torch.finfo(value.dtype).tiny)[value.isfinite()].all()):
            return False
    return True


def _size_of_terms(moments: Moments, key: str, entries: Tensor) -> Tensor:
    """Return the scale of rounding errors of an extreme or a sum; the sum may be zero because its terms cancel."""
    if 2.0 in moments:
        norm = moments[2.0].sqrt()
        return norm * entries.sqrt() if key == "sum" else norm
    if 1.0 in moments:
        return moments[1.0]
    return moments[key].abs().amax()  # type: ignore[index]

"""Compiled plans: a planned batch is traced once into a graph of torch operators.

On a CPU, inductor compiles the graph. On a CUDA device, its kernels are recorded and replayed as a CUDA graph.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import stateless

from lightning_gradmetrics.classifier.forward import Inputs, map_tensors, tensors_in
from lightning_gradmetrics.engine.auto import auto_moments, verified_strategy
from lightning_gradmetrics.engine.compilation.cuda_graph import RecordedGraph
from lightning_gradmetrics.engine.compilation.guarded_calls import guard_program
from lightning_gradmetrics.engine.compilation.inductor import compiled_graph
from lightning_gradmetrics.engine.compilation.program import (
    OutOfRange,
    Program,
    ProgramState,
    device_of,
    has_hooks,
    is_transformed,
    logits_function,
)
from lightning_gradmetrics.engine.kernels.operators import traced_operators
from lightning_gradmetrics.engine.kernels.traced import looked_up
from lightning_gradmetrics.engine.passes.collecting_pass import CollectingPass
from lightning_gradmetrics.engine.passes.gather import MomentTable
from lightning_gradmetrics.engine.passes.path_check import forward_alone
from lightning_gradmetrics.engine.passes.plan import PlanError
from lightning_gradmetrics.engine.passes.strategy import Strategy, collect_fast
from lightning_gradmetrics.engine.places import tensors_by_place
from lightning_gradmetrics.engine.task import Task
from lightning_gradmetrics.engine.tracing.graph import runs_custom_code
from lightning_gradmetrics.engine.tracing.model_state import ForwardState
from lightning_gradmetrics.gradients.lost_digits import noted_ranges
from lightning_gradmetrics.gradients.precision import rounding
from lightning_gradmetrics.gradients.statistics import Moments, merged_moments

__all__ = ["compiled_moments", "started_ahead"]

MOST_PROGRAMS = 8
"""Largest number of programs that are stored for one model."""

CANCELLATION = 64
"""Rounding error of a gradient whose terms cancel, in units of the precision."""

MERGING = 1e-9
"""Largest relative difference of two sums over parameters in float64."""


_PROGRAMS: WeakKeyDictionary[nn.Module, dict[Hashable, Program | None]] = WeakKeyDictionary()
"""The program of each kind of batch; ``None`` if the engine runs eagerly."""

_LATEST: WeakKeyDictionary[nn.Module, RecordedGraph] = WeakKeyDictionary()
"""The recorded graph that the latest batch of a model has used."""


def started_ahead(model: nn.Module, inputs: Inputs, labels: Tensor | None) -> AbstractContextManager[None]:
    """Return a block in which the kernels of the latest recorded graph already run for a new batch.

    Meanwhile, Python records the model and finds the graph of the batch. If it is another one, the results are not used.
    """
    graph = _LATEST.get(model)
    return nullcontext() if graph is None else graph.ahead(list(tensors_in(inputs)), labels)


def compiled_moments(task: Task) -> list[Moments]:
    """Return the moments ``(N, P)`` of each objective's gradient by a compiled plan.

    The first batch runs eagerly, and its result is compared with that of the newly compiled plan. Smaller batches, and
    models that cannot be compiled, run eagerly.
    """
    # a mode that must see all operators, such as a counter; or a transformation of functions, which the eager engine refuses
    if torch._C._len_torch_dispatch_stack() or is_transformed():
        return auto_moments(task)
    programs = _PROGRAMS.setdefault(task.model, {})
    state = ProgramState(task)
    key = state.key()
    program = programs.get(key)
    if program is not None and program.fits(task):
        try:
            moments, _, logits = program.moments(task, state)
        except RuntimeError:
            if task.targets is None:
                raise
            return auto_moments(task)  # its error explains which labels are wrong
        except OutOfRange:
            return auto_moments(task)
        except PlanError as error:
            programs[key] = None
            _LATEST.pop(task.model, None)
            _warn_eager(task, str(error))
        else:
            if isinstance(program.run, RecordedGraph):
                _LATEST[task.model] = program.run
            else:
                guard_program(task, state, program, logits)
            return moments
    expected = auto_moments(task)
    key = state.key()  # the first batch shows which attributes the model reads; only those are in the key
    is_new = key not in programs or (program is not None and program.size < task.size)
    # A plan may not fit one sample alone, whose axes squeeze() removes, and fit other batches.
    may_compile = task.size > 1 or verified_strategy(task) is not None
    if is_new and task.size > 0 and may_compile and len(programs) < MOST_PROGRAMS:
        programs[key] = _checked_program(task, expected)
    return expected


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


def _compared_program(task: Task, strategy: Strategy, expected: Sequence[Moments]) -> tuple[Program | None, str]:
    """Return a program whose moments of the batch are the expected ones, or ``None`` and the reason."""
    try:
        program = _program(task, strategy)
        compiled, merged, _ = program.moments(task, ProgramState(task), in_any_range=True)
    except Exception as error:  # tracing and compiling fail in many ways; the eager engine has the result
        return None, f"{type(error).__name__}: {error}".partition("\n")[0]
    parameters = list(task.parameters.values())
    entries = torch.tensor([p.numel() for p in parameters], dtype=torch.float64, device=parameters[0].device)
    for moments, wanted in zip(compiled, expected, strict=True):
        noise = CANCELLATION * torch.finfo(parameters[0].dtype).eps
        if not _agree(moments, wanted, rounding(parameters[0]), entries, noise):
            return None, "its compiled plan disagrees with the eager one"
    if not all(map(_are_merged, merged, compiled)):
        return None, "its compiled plan merges the moments of parameters in another way"
    return program, ""


def _obstacle(task: Task, strategy: Strategy | None) -> str:
    """Return why a batch cannot be compiled, or an empty string."""
    if strategy is None or strategy.plan is None or strategy.slow:
        return "some of its parameters have no fast rule"
    if strategy.plan.sorts:
        return "its rows are sorted by the data"
    if strategy.random or strategy.alone or strategy.reads_samples:
        return "it draws random numbers, or its samples are compared with samples alone in every batch"
    if any(map(has_hooks, task.model.modules())):
        return "its modules have hooks"
    if any(objective.function is not None for objective in task.objectives):
        return "user-defined objectives are checked in every batch"
    if task.memory is not None:
        return "memory limits are not supported"
    if torch.is_autocast_enabled(device_of(task).type) and not _is_on_gpu(task):
        return "autocast is not supported on this device"
    if not _is_on_gpu(task) and any(isinstance(module, nn.LSTM) for module in task.model.modules()):
        return "LSTM layers run faster uncompiled"  # and inductor takes minutes for the graph of all time steps
    return ""


def _is_on_gpu(task: Task) -> bool:
    return device_of(task).type == "cuda"


def _program(task: Task, strategy: Strategy) -> Program:
    keys = tuple(sorted(task.wanted, key=str))
    channels_last = strategy.channels_last and _is_on_gpu(task)  # inductor chooses the layout itself

    names = list(dict(task.model.named_parameters())), list(dict(task.model.named_buffers()))
    ranges: list[Tensor] = []  # operators check the squares that they compute; see kernels/partial.py and rows.c

    def planned(
        parameters: list[Tensor], buffers: list[Tensor], inputs: list[Tensor], labels: Tensor | None
    ) -> tuple[Tensor, ...]:
        flat_inputs = iter(inputs)
        for parameter in parameters:
            parameter._is_param = True  # so it is an instance of nn.Parameter, as rules require
        named = dict(zip(names[0], parameters, strict=True))
        tensors = {**named, **dict(zip(names[1], buffers, strict=True))}
        chosen: Any = {name: named[name] for name in task.parameters}
        with _holding(task.model, tensors), traced_operators(), torch.enable_grad(), noted_ranges() as noted:
            batch = replace(
                task,
                inputs=map_tensors(task.inputs, lambda _: next(flat_inputs)),
                targets=labels,
                parameters=chosen,
                record=None,
            )
            batch = batch.channels_last() if channels_last else batch
            table = MomentTable(batch)
            logits: list[Tensor] = []

            def keep(found: Tensor, tracer: CollectingPass) -> None:
                if runs_custom_code(found):
                    raise ValueError("its backward pass runs custom code, which may change")
                logits.append(found)

            collect_fast(table, batch.restricted(strategy.fast), strategy.plan, keep, free=True)
        results: list[Tensor] = []
        for moments in [*table.moments, *table.merged]:
            results += map(moments.__getitem__, keys)
        ranges[:] = [functools.reduce(torch.logical_and, noted).all()] if noted else []
        return tuple(map(Tensor.detach, [*results, *ranges, *logits]))

    decompositions = {} if _is_on_gpu(task) else {torch.ops.aten.embedding.default: looked_up}
    graph = make_fx(planned, decompositions)(*ProgramState(task).arguments())
    if any(node.op == "get_attr" for node in graph.graph.nodes):
        raise ValueError("its forward uses tensors that are neither parameters nor buffers, or makes tensors of data")
    run = RecordedGraph(graph) if _is_on_gpu(task) else compiled_graph(graph, *ProgramState(task).arguments())
    laid_out = task.channels_last() if channels_last else task
    _, path, calls = forward_alone(laid_out, 0, ForwardState(task.model, task.record))
    known = None if strategy.quiet else calls  # a checkpoint may warn that it runs without gradients
    return Program(run, keys, task.size, logits_function(task), channels_last, path, known, bool(ranges))


@contextmanager
def _holding(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Use other tensors for the model's parameters and buffers inside the block."""
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    others = {id(own[name]): tensor for name, tensor in tensors.items()}
    with stateless._reparametrize_module(model, tensors_by_place(model, others), tie_weights=False):
        yield


def _agree(found: Moments, expected: Moments, tolerance: float, entries: Tensor, noise: float) -> bool:
    """Return whether two computations of the moments ``(N, P)`` of the same batch are equal up to rounding.

    Args:
        found: The moments to check.
        expected: The moments of the eager engine.
        tolerance: The relative error of entries.
        entries: The number of entries of each parameter, ``(P,)``.
        noise: The rounding error of a parameter's gradient whose terms cancel, such as that of the bias of an attention's
            keys, relative to the norm of the largest gradient of the sample.
    """
    norms = noise * _norms(expected).amax(1, keepdim=True)
    for key, value in expected.items():
        size, least = value.abs(), norms
        if isinstance(key, str):
            size = _size_of_terms(expected, key, entries)
        if key in ("sum", 1.0):
            least = norms * entries.sqrt()
        elif not isinstance(key, str):
            least = norms**key
        error = (found[key] - value).abs()
        allowed = tolerance * size + least + torch.finfo(value.dtype).tiny
        if not bool((error <= allowed)[value.isfinite()].all()):
            return False
    return True


def _are_merged(found: Moments, moments: Moments) -> bool:
    """Return whether moments ``(N,)`` are those of all parameters ``(N, P)`` together, up to rounding."""
    for key, value in merged_moments(moments).items():
        allowed = MERGING * moments[key].abs().sum(1)
        if not bool(((found[key] - value).abs() <= allowed)[value.isfinite()].all()):
            return False
    return True


def _norms(moments: Moments) -> Tensor:
    """Return the L2 norm of each parameter's gradient, or the best known bound of it, ``(N, P)``."""
    if 2.0 in moments:
        return moments[2.0].sqrt()
    return moments.get(1.0, torch.zeros_like(next(iter(moments.values()))))


def _size_of_terms(moments: Moments, key: str, entries: Tensor) -> Tensor:
    """Return the scale of rounding errors of an extreme or a sum; the sum may be zero because its terms cancel."""
    if 2.0 in moments:
        norm = moments[2.0].sqrt()
        return norm * entries.sqrt() if key == "sum" else norm
    if 1.0 in moments:
        return moments[1.0]
    return moments[key].abs().amax()  # type: ignore[index]

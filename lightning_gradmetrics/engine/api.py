"""The engine's public functions: they check their arguments and pass a task to an engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from operator import attrgetter
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import CheckpointError

from lightning_gradmetrics.classifier.forward import (
    Inputs,
    batch_size,
    check_inputs,
    check_model,
    gradients_enabled,
    logits_in,
    map_tensors,
    preserved,
)
from lightning_gradmetrics.classifier.model_layout import named_parameters
from lightning_gradmetrics.classifier.preservation import ModelRecord, exclusive
from lightning_gradmetrics.classifier.quantised import check_differentiable, check_types, refuse_uninitialised
from lightning_gradmetrics.classifier.sample_axis import SampleAxis, samples_first, tensors_with_samples
from lightning_gradmetrics.engine.arguments import check_arguments, checked_targets, detached
from lightning_gradmetrics.engine.auto import auto_moments
from lightning_gradmetrics.engine.checks.added_axis import check_added_axis, noting_shapes
from lightning_gradmetrics.engine.checks.no_gradient import check_gradients
from lightning_gradmetrics.engine.checks.other_generators import (
    SamplesAlone,
    check_repeated_passes,
    watching_generators,
)
from lightning_gradmetrics.engine.compilation.stance import eager
from lightning_gradmetrics.engine.functional import functional_moments
from lightning_gradmetrics.engine.inputs.cached_tensors import without_cached_tensors
from lightning_gradmetrics.engine.inputs.shared_inputs import with_sample_axes
from lightning_gradmetrics.engine.reference import reference_moments
from lightning_gradmetrics.engine.refusals import checkpoint_differs
from lightning_gradmetrics.engine.task import Task
from lightning_gradmetrics.engine.tracing.model_state import ForwardState
from lightning_gradmetrics.gradients.objectives import Loss, Objective
from lightning_gradmetrics.gradients.statistics import (
    STATISTICS,
    GradientStatistics,
    Moment,
    Moments,
    merged_moments,
    moments_for,
    result_dtype,
)

__all__ = ["ENGINES", "eager", "gradient_statistics", "select_parameters"]


def _compiled_moments(task: Task) -> list[Moments]:
    # Imported here because it takes seconds and only compiled calls need it.
    from lightning_gradmetrics.engine.compilation.compiled import compiled_moments

    return compiled_moments(task)


def _started_ahead(model: nn.Module, inputs: Inputs, targets: Tensor | None) -> AbstractContextManager[None]:
    from lightning_gradmetrics.engine.compilation.compiled import started_ahead

    return started_ahead(model, inputs, targets)


ENGINES: dict[str, Callable[[Task], list[Moments]]] = {
    "auto": auto_moments,
    "compiled": _compiled_moments,
    "vmap": functional_moments,
    "reference": reference_moments,
}
"""Engines by name: each maps a :class:`Task` to the moments ``(N, P)`` of each objective."""

Parameters = Callable[[str], bool] | None


def select_parameters(
    model: nn.Module, parameters: Parameters, norms_only: bool = False, record: ModelRecord | None = None
) -> dict[str, nn.Parameter]:
    """Return the chosen parameters by name, including frozen parameters and without empty ones.

    Args:
        model: The model.
        parameters: ``None`` for all, or a predicate on the parameter's name.
        norms_only: Whether only norms are computed, which complex parameters allow.
        record: The record of the model's present state, if there is one.

    Raises:
        ValueError: If no parameter is chosen, a parameter of a lazy module has no values yet, or its gradient has no such statistics.
    """
    named = named_parameters(model) if record is None else record.layout.named_parameters
    chosen = {}
    try:
        for name, parameter in named.items():
            if parameter.numel() and (parameters is None or parameters(name)):
                chosen[name] = parameter
    except ValueError:
        refuse_uninitialised(named)
        raise
    if not chosen:
        raise ValueError(
            f"no parameter of {type(model).__name__} was chosen; its parameters are: "
            f"{', '.join(list(named)[:12]) or 'none'}" + (", ..." if len(named) > 12 else "")
        )
    check_types(chosen, norms_only)
    return chosen


def _parametrizations_computed() -> AbstractContextManager[None]:
    """Compute parametrised weights in each forward pass, even inside the caller's ``parametrize.cached()``."""
    return _uncached() if parametrize._cache_enabled or parametrize._cache else nullcontext()


@contextmanager
def _uncached() -> Iterator[None]:
    before = parametrize._cache_enabled, parametrize._cache
    parametrize._cache_enabled, parametrize._cache = 0, {}
    try:
        yield
    finally:
        parametrize._cache_enabled, parametrize._cache = before


@overload
def gradient_statistics(
    model: nn.Module,
    inputs: Inputs,
    objective: str | Loss | Objective,
    parameters: Parameters = ...,
    per_parameter: bool = ...,
    **options: Any,
) -> GradientStatistics: ...


@overload
def gradient_statistics(
    model: nn.Module,
    inputs: Inputs,
    objective: Sequence[str | Loss | Objective],
    parameters: Parameters = ...,
    per_parameter: bool = ...,
    **options: Any,
) -> list[GradientStatistics]: ...


def gradient_statistics(  # type: ignore[misc]
    model: nn.Module,
    inputs: Inputs,
    objective: str | Loss | Objective | Sequence[str | Loss | Objective],
    parameters: Parameters = None,
    per_parameter: bool = False,
    *,
    statistics: Iterable[str] = STATISTICS,
    targets: Tensor | None = None,
    logits: Callable[[Any], Tensor] = logits_in,
    engine: str = "auto",
    memory: int | None = None,
    compile: bool = False,
    sample_axis: SampleAxis = 0,
) -> GradientStatistics | list[GradientStatistics]:
    r"""Return statistics of every sample's gradient of a per-sample loss: ``stat(d L_n / d theta)``.

    Args:
        model: A classifier; batch norms must be in eval mode. The model is left unchanged.
        inputs: A tensor ``(N, ...)``, a mapping (keyword arguments) or a sequence (positional arguments) of them.
        objective: ``"pseudo_label"``, ``"uniform"``, ``"confounding"``, ``"confounding_logits"``, ``"label"``, or a
            callable from logits ``(N, C)`` to losses ``(N,)``. A sequence of objectives shares one forward pass and returns a list.
        parameters: ``None`` for all parameters (frozen ones too), or a predicate on the parameter's name.
        per_parameter: Whether to return one value per parameter, ``(N, P)``, instead of ``(N,)``.
        statistics: Names of the statistics to compute; fewer statistics are faster.
        targets: True labels ``(N,)``, for the objective ``"label"``.
        logits: Returns the logits ``(N, C)`` from the model's output; those of one sample may be ``(C,)``.
        engine: ``"auto"`` (fast); ``"compiled"``, which is ``"auto"`` with ``compile=True``; ``"vmap"``
            (``torch.func``); or ``"reference"`` (one sample at a time, slow).
        memory: Memory limit in bytes, in addition to the model and the inputs; the batch is split to stay below it.
            ``None`` for no limit.
        compile: Whether to compile the computation with ``torch.compile``, which pays off for small models and many
            batches of one size. Compiling adds seconds to minutes to the first batch, whose eager result is compared
            with the compiled one. Smaller batches run eagerly, and so do models that cannot be compiled, with a
            warning. In every batch one sample's compiled logits are compared with those of the model; if they differ, this
            batch and all later ones run eagerly. On a CPU the guards of ``torch.compile`` replace this comparison where
            they see every change of the model.
        sample_axis: The axis of the samples in the inputs, such as 1 for ``(T, N, D)``; or a mapping from names or
            positions of arguments to axes, with 0 for the others, and ``None`` for an argument that all samples share
            and that may be as long as the batch, as in ``{"x": 1, "table": None}``.

    Returns:
        A :class:`GradientStatistics`, or a list with one per objective.

    Raises:
        ValueError: If a batch norm is in train mode, a name is unknown, labels are not one class number per sample, or the logits have no
            gradient.
        TypeError: If the inputs have no sample axis, or an argument has a wrong type.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(8, 3)).eval()
        >>> stats = gradient_statistics(model, torch.randn(5, 2, 4), "pseudo_label")
        >>> stats.names, stats.norm(1).shape
        (('1.weight', '1.bias'), torch.Size([5]))

    Reference:
        Oberdiek, Rottmann, Gottschalk: Classification Uncertainty of Deep Neural Networks Based on Gradient
        Information, 2018.
    """
    if compile and engine != "auto":
        raise ValueError(f"compile=True needs engine='auto', got {engine!r}")
    engine = "compiled" if compile else engine
    if engine not in ENGINES:
        raise ValueError(f"unknown engine {engine!r}; available: {', '.join(ENGINES)}")
    check_arguments(model, objective, parameters, logits, memory)
    single = isinstance(objective, (str, Objective)) or callable(objective)
    several: Sequence[Any] = [objective] if single else objective  # type: ignore[assignment, list-item]
    objectives = list(map(Objective.of, several))
    wanted = moments_for(statistics)
    if not any(map(_NEEDS_TARGETS, objectives)):
        targets = None
    if engine == "compiled" and sample_axis == 0 and memory is None:
        guarded = _guarded(model, inputs, objectives, parameters, per_parameter, targets, logits, wanted)
        if guarded is not None:
            results = [_result(guarded[0], m, per_parameter) for m in guarded[1]]
            return results[0] if single else results
    is_auto = engine == "auto"
    prepared = _task(
        model,
        inputs,
        objectives,
        parameters,
        targets,
        logits,
        wanted,
        memory=memory,
        sample_axis=sample_axis,
        may_assume=is_auto,
        merged=is_auto and not per_parameter,
    )
    with (
        exclusive(model),
        _started_ahead(model, inputs, targets) if engine == "compiled" and sample_axis == 0 else nullcontext(),
        prepared as task,
    ):
        try:
            moments = ENGINES[engine](task) if engine in ("auto", "compiled") else _checked_moments(engine, task)
        except CheckpointError as error:
            raise checkpoint_differs(model, error) from error
        check_gradients(task, moments)
    results = [_result(task.parameters, m, per_parameter) for m in moments]
    return results[0] if single else results


def _checked_moments(engine: str, task: Task) -> list[Moments]:
    """Return the moments by an engine without checks; a model whose logits differ in a second pass is refused."""
    if not task.size:
        return ENGINES[engine](task)
    state = ForwardState(task.model)
    shapes: list[Sequence[int]] = []
    alone = SamplesAlone(task, check_repeated_passes(noting_shapes(task, shapes), state), state)
    if task.size == 1:
        check_added_axis(task, shapes[0], state)
    with watching_generators(task, state):
        moments = reference_moments(task, alone.note) if engine == "reference" else ENGINES[engine](task)
        is_random = state.random_numbers_drawn()
    if not is_random:
        alone.check()
    return moments


def _guarded(
    model: nn.Module,
    inputs: Inputs,
    objectives: Sequence[Objective],
    parameters: Parameters,
    per_parameter: bool,
    targets: Tensor | None,
    logits: Callable[[Any], Tensor],
    wanted: frozenset[Moment],
) -> tuple[Mapping[str, nn.Parameter], list[Moments]] | None:
    """Return the chosen parameters and the moments by a compiled plan whose guards hold; ``None`` without one."""
    guarded = _guarded_calls()
    if not guarded.is_guarded(model):
        return None
    with exclusive(model):
        chosen = select_parameters(model, parameters, wanted.isdisjoint({"sum", "max", "min"}))
        request = guarded.Request.of(objectives, wanted, chosen, inputs, targets)
        moments = guarded.guarded_moments(model, inputs, request, targets, logits, per_parameter)
    return None if moments is None else (chosen, moments)


@cache
def _guarded_calls() -> Any:
    # Imported here because it takes seconds; cached because an import inside a function is looked up in each call.
    from lightning_gradmetrics.engine.compilation import guarded_calls

    return guarded_calls


def _result(chosen: Mapping[str, nn.Parameter], moments: Moments, per_parameter: bool) -> GradientStatistics:
    counts, is_merged = list(map(Tensor.numel, chosen.values())), next(iter(moments.values())).ndim == 1
    dtype = result_dtype(next(iter(chosen.values())).dtype)
    if per_parameter:
        return GradientStatistics(tuple(chosen), torch.tensor(counts), moments, dtype)
    total = torch.scalar_tensor(sum(counts), dtype=torch.int64)  # torch.tensor takes several times as long
    return GradientStatistics(tuple(chosen), total, moments if is_merged else merged_moments(moments), dtype)


_NEEDS_TARGETS = attrgetter("needs_targets")


@contextmanager
def _task(
    model: nn.Module,
    inputs: Inputs,
    objectives: Sequence[Objective],
    parameters: Parameters,
    targets: Tensor | None,
    logits: Callable[[Any], Tensor],
    wanted: frozenset[Moment],
    *,
    memory: int | None,
    sample_axis: SampleAxis,
    may_assume: bool,
    merged: bool,
) -> Iterator[Task]:
    """Yield the task with gradients enabled; the model is restored afterwards.

    ``may_assume`` is whether inputs may be assumed to have one row per sample until a plan shows whether they do.
    """
    with preserved(model) as record:
        if not record.layout.is_accepted:
            check_model(model, record.modules)
            record.layout.is_accepted = True
        check_inputs(model, inputs)
        chosen = select_parameters(model, parameters, wanted.isdisjoint({"sum", "max", "min"}), record)
        with (
            samples_first(model, inputs, sample_axis) as (placed, stated),
            gradients_enabled(model),
            eager(),
            _parametrizations_computed(),
        ):
            check_differentiable(model, placed, chosen.values(), record.modules)
            size = batch_size(tensors_with_samples(model, placed, stated))
            task = Task(
                model=model,
                inputs=map_tensors(placed, detached),
                size=size,
                objectives=tuple(objectives),
                targets=checked_targets(targets, size),
                parameters=chosen,
                wanted=wanted,
                logits=logits,
                memory=memory,
                per_sample=(True,) if isinstance(placed, Tensor) else (),
                record=record if placed is inputs else None,
                merged=merged,
            )
            yield without_cached_tensors(with_sample_axes(task, stated, may_assume))
    _refuse_added(model, list(filter(parameters, record.added)))


def _refuse_added(model: nn.Module, added: Sequence[str]) -> None:
    """Refuse parameters that only a forward pass has registered: their gradients would be missing."""
    if added:
        raise ValueError(
            f"the forward pass of {type(model).__name__} registers parameters, whose gradients would be missing: "
            f"{', '.join(added)}. Call the model once before, or leave them out, as in parameters=lambda name: name not in "
            f"{list(added)}"
        )

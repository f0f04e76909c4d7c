"""Chooses how to handle a model: plans on a probe, verifies against autograd, and falls back to slower methods."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradmetrics.classifier.notices import first_time
from lightning_gradmetrics.engine.agreement import VerificationNotes, agree
from lightning_gradmetrics.engine.functional import functional_moments
from lightning_gradmetrics.engine.gather import MomentTable, UseTable
from lightning_gradmetrics.engine.graph import reached_parameters
from lightning_gradmetrics.engine.model_state import ForwardState
from lightning_gradmetrics.engine.owners import OwnershipPass
from lightning_gradmetrics.engine.plan import Plan, PlanError
from lightning_gradmetrics.engine.probe import Probe, probe_model, with_others_replaced
from lightning_gradmetrics.engine.reference import loss_gradients
from lightning_gradmetrics.engine.refusals import (
    CoupledSamplesError,
    SampleAxisError,
    coupled_model,
    raise_if_out_of_memory,
)
from lightning_gradmetrics.engine.task import Task
from lightning_gradmetrics.engine.tracer import Tracer
from lightning_gradmetrics.gradients.precision import full_float32, rounding
from lightning_gradmetrics.gradients.scaling import rescaled_moments

__all__ = ["Checks", "Strategy", "collect_fast", "make_strategy", "warn_slow"]

ALONE_IF_PLANNED, ALONE_IF_UNPLANNED = 1, 3
"""Number of samples of each batch that also run alone, to detect samples that depend on each other."""

Checks = Callable[[Tensor, int], None]
"""Receives the logits of a batch, and a number that identifies the path of the forward pass."""


@dataclass
class Strategy:
    """How the engine handles a model.

    Args:
        plan: The plan; ``None`` identifies the owners of rows in every batch.
        fast: The parameters that the plan or the owners handle, verified on the probe.
        slow: The other parameters, with reasons.
        mapped: Whether the slow parameters can be mapped over the samples, verified on the probe.
        alone: The number of samples of each batch that also run alone.
        bytes: Approximate memory of a sample's activations, to split batches by.
        shapes: The shapes of the inputs that it was planned for.
        times: The number of positions of a sample on each axis, by shapes, batch size and sequence of calls.
        quiet: Whether to silence the warnings of torch's checkpoints in runs without gradients.
        random: Whether the model draws random numbers, so that a sample alone gets different ones.
        provisional: Whether it was planned on fewer than three different samples.
        channels_last: Whether images use the channels-last layout.
        proven: Whether every operation is known to keep the samples apart while Python reads the same numbers.
        path: A number that identifies the path of the probe's forward pass.
        settled: Whether gradients on that path have been compared with autograd in a batch, which is done once.
    """

    plan: Plan | None
    fast: tuple[str, ...] = ()
    slow: Mapping[str, str] = field(default_factory=dict)
    mapped: bool = False
    alone: int = ALONE_IF_UNPLANNED
    bytes: int = 1
    shapes: Any = None
    times: dict[tuple[Any, int], dict[int, tuple[int, ...]]] = field(default_factory=dict)
    quiet: bool = False
    random: bool = False
    provisional: bool = False
    channels_last: bool = False
    proven: bool = False
    path: int = 0
    settled: bool = False

    def is_proven(self, path: int) -> bool:
        """Return whether the plan is proven for a forward pass on this path, as for the probe's."""
        return self.plan is not None and self.proven and path == self.path

    def keeps_apart(self, path: int) -> bool:
        """Return whether a forward pass on this path is proven to keep the samples apart, as the probe's was."""
        return self.alone == 0 and self.is_proven(path)


def make_strategy(task: Task) -> Strategy:
    """Return the strategy for a model, from a probe on some samples of a batch.

    Raises:
        CoupledSamplesError: If the samples depend on each other.
        SampleAxisError: If the logits do not have one row per sample.
    """
    with full_float32():
        return _make_strategy(task)


def _make_strategy(task: Task) -> Strategy:
    state = ForwardState(task.model)
    if _channels_last_pays(task):
        try:
            strategy = replace(_verified(task.channels_last()), channels_last=True)
            if not strategy.slow:
                return strategy
        except Exception as error:  # the model's views may require the other layout
            raise_if_out_of_memory(error)
        state.restore()
    try:
        strategy = _verified(task)
    except (CoupledSamplesError, SampleAxisError):
        raise
    except Exception as error:  # a probe may fail in any way; one sample at a time raises the model's own error
        raise_if_out_of_memory(error)
        reason = f"{type(error).__name__}: {error}"
        strategy = Strategy(None, slow=dict.fromkeys(task.parameters, reason))
    return strategy


def _channels_last_pays(task: Task) -> bool:
    """Return whether the channels-last layout is faster: on a CPU it saves about 10 % of a ResNet's training step."""
    if next(iter(task.parameters.values())).device.type != "cpu":
        return False
    for module in task.model.modules():
        if isinstance(module, nn.Conv2d) and module.groups == 1 and module.weight.dtype == torch.float32:
            return True
    return False


def warn_slow(task: Task, strategy: Strategy) -> None:
    """Warn about the parameters without a fast rule, once per model and parameter."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in strategy.slow.items():
        if first_time(task.model, ("slow", name)):
            by_reason.setdefault(reason, []).append(name)
    if by_reason:
        rows = [f"{', '.join(names)} ({reason})" for reason, names in by_reason.items()]
        way = "by torch.func.vmap, checked against autograd on a probe" if strategy.mapped else "one sample at a time"
        warnings.warn(
            f"no fast rule for these parameters of {type(task.model).__name__}, whose gradients are computed {way}, which is "
            f"slower: {'; '.join(rows)}",
            stacklevel=2,
        )


# -- running the fast methods -----------------------------------------------------------------------------------------


def collect_fast(
    table: MomentTable | UseTable,
    task: Task,
    plan: Plan | None,
    checks: Checks,
    notes: VerificationNotes | None = None,
    free: bool = False,
) -> tuple[tuple[int, ...], int, int]:
    """Fill a table by one forward pass and one backward pass per objective (two without a plan).

    Args:
        table: The table to fill.
        task: The batch, restricted to the parameters to collect for.
        plan: The plan; ``None`` identifies the owners of rows.
        checks: Called with the logits and the path before any gradient is computed.
        notes: Filled in a run that verifies a plan.
        free: Whether axes may have a different number of positions per sample than planned.

    Returns:
        The positions of a sample on each axis, and the numbers that identify the sequence of calls and the path.

    Raises:
        PlanError: If the model does not follow the plan, or rows have no single owner.
    """
    for parameter in task.model.parameters() if task.record is None else task.record.parameters:
        if parameter.requires_grad:
            parameter.requires_grad_(False)
    tracer: Tracer
    if plan is None:
        tracer = OwnershipPass(task.parameters, task.size, table.add, task.model.buffers())
    else:
        tracer = Tracer(plan, plan.known_parameters(task.model, task.parameters), task.size, table.add, free)
    tracer.notes = notes
    if notes is None:
        with tracer:
            logits = task.forward()
    else:
        logits = _forward_with_notes(task, tracer, notes)
    path = tracer.outline.path
    checks(logits, path)
    scaled = [task.unit_gradient(index, logits) for index in range(len(table.task.objectives))]
    for index, (gradient, undo) in enumerate(scaled):
        table.begin(index, undo)
        tracer.collect(logits, gradient, last=index == len(scaled) - 1)
    table.finish()
    return tuple(tracer.times), tracer.outline.outline, path


def _forward_with_notes(task: Task, tracer: Tracer, notes: VerificationNotes) -> Tensor:
    """Return the logits, and record parameters that are used outside of calls of torch functions.

    The tracer replaces parameters in every call that it intercepts; a graph that still reaches one has a use it missed.
    """
    for parameter in task.parameters.values():
        parameter.requires_grad_(True)
    with tracer:
        logits = task.forward()
    for name in reached_parameters(logits, task.parameters):
        notes.failures[name] = "it is used outside of torch functions, as in a custom autograd function"
    for parameter in task.parameters.values():
        parameter.requires_grad_(False)
    return logits


# -- verification -----------------------------------------------------------------------------------------------------


def _verified(task: Task) -> Strategy:
    """Plan on a probe, and compare every parameter's moments with autograd's.

    If the plan leaves parameters to slower methods, identifying the owners of rows is tried too.
    """
    state, probe = ForwardState(task.model), probe_model(task)
    plan, slow, path = _covered(probe, probe.plan, state)
    if plan is not None and slow:
        _, others, _ = _covered(probe, None, state)
        if len(others) < len(slow):
            plan, slow = None, others
    state.restore()
    if slow:
        _check_backward(probe, slow, state)
    fast = tuple(name for name in task.parameters if name not in slow)
    mapped = bool(slow) and _can_be_mapped(probe, slow)
    state.restore()
    return Strategy(
        plan,
        fast,
        slow,
        mapped,
        alone=_alone(probe, plan),
        bytes=probe.bytes,
        quiet=probe.pauses_gradients,
        random=probe.random,
        provisional=task.size < 3,
        proven=probe.proven,
        path=path,
    )


def _covered(probe: Probe, plan: Plan | None, state: ForwardState) -> tuple[Plan | None, dict[str, str], int]:
    """Return the plan without failing steps, the parameters with wrong results and the reasons, and the path."""
    slow: dict[str, str] = {} if plan is None else dict(plan.uncovered)
    while True:
        names = [name for name in probe.task.parameters if name not in slow]
        if not names:
            return plan, slow, 0
        state.restore()
        table, notes = MomentTable(probe.task.restricted(names), scaled=True), VerificationNotes()
        try:
            _, _, path = collect_fast(table, table.task, plan, _unchecked, notes)
            break
        except PlanError as error:
            plan = _without_failed_step(plan, slow, error, names)
    state.restore()
    wrong = {}
    for name, reason in notes.failures.items():
        if name in names:
            wrong[name] = reason
    wrong.update(_disagreements(probe, table, notes.scales, set(names) - wrong.keys()))
    return plan, {**slow, **wrong}, path


def _unchecked(logits: Tensor, path: int) -> None:
    """Accept the logits, because the probe has been checked."""


def _alone(probe: Probe, plan: Plan | None) -> int:
    """Return how many samples of each batch run alone: more if Python reads sizes, such as the longest length."""
    if probe.separable:
        return 0
    if probe.reads_activations:
        return 10**9
    reads = () if plan is None else plan.reads or ()
    few = plan is not None and all(isinstance(value, bool) for value in reads)
    return ALONE_IF_PLANNED if few else ALONE_IF_UNPLANNED


def _without_failed_step(
    plan: Plan | None, slow: dict[str, str], error: PlanError, names: Sequence[str]
) -> Plan | None:
    """Use slower methods for the parameters of a failed step."""
    if plan is not None and error.step is not None and plan.steps[error.step].kind != "uncovered":
        plan = plan.without(error.step, str(error))
        slow.update(plan.uncovered)
        return plan
    lost = error.names & set(names) or set(names)
    slow.update(dict.fromkeys(sorted(lost), str(error)))
    return plan


def _gradients(probe: Probe, names: Collection[str], objective: int, number: int) -> dict[str, Tensor]:
    """Return autograd's gradients of one sample's loss, for one objective.

    The losses are scaled down first, so that a nonlinear backward pass, such as one that clips, disagrees with the fast
    methods, which need linearity.
    """
    parameters = probe.task.restricted(names).parameters
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    losses = probe.losses[objective][0]
    shrunk = 2.0**-3 if losses.dtype == torch.float16 else 2.0**-10
    gradients = loss_gradients(losses[number] * shrunk, list(parameters.values()))
    for place, gradient in enumerate(gradients):
        gradients[place] = gradient / shrunk
    return dict(zip(parameters, gradients, strict=True))


def _disagreements(
    probe: Probe, table: MomentTable, scales: Mapping[str, float], names: Collection[str]
) -> dict[str, str]:
    """Return the parameters whose moments disagree with autograd's gradients.

    The middle sample reveals a wrong order of rows; the others are compared too if its gradient is zero.
    """
    wrong: dict[str, str] = {}
    for objective in range(len(probe.losses)):
        unseen = set(names)
        for number in (1, 0, 2):
            gradients = _gradients(probe, names, objective, number) if unseen else {}
            while gradients:
                name, gradient = gradients.popitem()
                moments = table.of_sample(number, name, objective)
                if name not in wrong and not agree(moments, gradient[None], scales[name]):
                    wrong[name] = "its fast rule disagrees with autograd on a probe"
                if bool(gradient.any()):
                    unseen.discard(name)
    return wrong


def _check_backward(probe: Probe, names: Collection[str], state: ForwardState) -> None:
    """Refuse a model whose gradients of one sample change when the other samples of the probe are replaced.

    Its logits treat samples separately, but its backward pass does not, as in a custom function that centres gradients.

    Raises:
        CoupledSamplesError: If gradients change.
    """
    parameters = list(probe.task.restricted(names).parameters.values())
    for parameter in parameters:
        parameter.requires_grad_(True)
    before = loss_gradients(probe.losses[0][0][0], parameters)
    state.restore()
    try:
        other = with_others_replaced(probe.task)
        after = loss_gradients(other.unit_losses(0, other.forward())[0][0], parameters)
    except Exception as error:  # the model may refuse a synthetic sample
        raise_if_out_of_memory(error)
        return
    finally:
        state.restore()
    size = max(float(gradient.norm()) for gradient in before)
    for gradient, found in zip(before, after, strict=True):
        if float((found - gradient).norm()) > 10 * rounding(gradient) * size:
            raise coupled_model(f"the backward pass of {type(probe.task.model).__name__}")


def _can_be_mapped(probe: Probe, slow: Mapping[str, str]) -> bool:
    """Return whether ``torch.func`` and autograd give the same gradients, different from zero for some sample."""
    task = probe.task.restricted(slow)
    try:
        mapped = functional_moments(task)
    except Exception as error:  # torch.func raises many kinds of errors
        raise_if_out_of_memory(error)
        return False
    columns = {name: column for column, name in enumerate(task.parameters)}
    compared: set[str] = set()
    for objective, (_, undo) in enumerate(probe.losses):
        for number in range(probe.task.size):
            gradients = _gradients(probe, slow, objective, number)
            scale = 1e-2 * max(float(gradient.norm()) for gradient in gradients.values())
            for name, gradient in gradients.items():
                moments = {}
                for key, value in mapped[objective].items():
                    moments[key] = value[number : number + 1, columns[name]]
                if not agree(rescaled_moments(moments, 1 / undo[number : number + 1]), gradient[None], scale):
                    return False
                if bool(gradient.any()):
                    compared.add(name)
    return len(compared) == len(columns)

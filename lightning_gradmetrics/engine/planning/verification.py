"""Plans on a probe, verifies the plan against autograd, and uses slower ways for the rest."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_gradmetrics.engine.checks.other_generators import check_few_samples
from lightning_gradmetrics.engine.functional import functional_moments
from lightning_gradmetrics.engine.inputs.samples import close_rows, logits_without_graph
from lightning_gradmetrics.engine.passes.agreement import VerificationNotes, agreeing, largest_norm
from lightning_gradmetrics.engine.passes.gather import MomentTable
from lightning_gradmetrics.engine.passes.plan import Plan, PlanError
from lightning_gradmetrics.engine.passes.selects import SelectsRefused
from lightning_gradmetrics.engine.passes.strategy import (
    ALONE_IF_PLANNED,
    ALONE_IF_UNPLANNED,
    EVERY_SAMPLE,
    Strategy,
    collect_fast,
    unchecked,
)
from lightning_gradmetrics.engine.planning.probe import Probe, probe_model
from lightning_gradmetrics.engine.planning.probe_samples import with_others_replaced
from lightning_gradmetrics.engine.reference import loss_gradients
from lightning_gradmetrics.engine.refusals import (
    REFUSALS,
    coupled_model,
    not_reproducible,
    raise_if_out_of_memory,
)
from lightning_gradmetrics.engine.task import Task
from lightning_gradmetrics.engine.tracing.model_state import ForwardState
from lightning_gradmetrics.engine.tracing.outline import Outline
from lightning_gradmetrics.gradients.precision import full_float32, rounding
from lightning_gradmetrics.gradients.scaling import rescaled_moments

__all__ = ["make_strategy"]

CHANNELS_LAST_TYPES = {"cpu": (torch.float32,), "cuda": (torch.float32, torch.float16, torch.bfloat16)}
"""The types of weights for which convolutions are faster in the channels-last layout, on each kind of device."""

CANCELLING = ("native_group_norm",)
"""Operations that torch does not compute exactly in the channels-last layout on CPUs.

The variance of a group norm is ``E[x^2] - E[x]^2`` there, which cancels if the mean is larger than the deviation.
"""


def make_strategy(task: Task, on_batch: bool = False) -> Strategy:
    """Return the strategy for a model, from a probe on some samples of a batch.

    Args:
        task: The batch.
        on_batch: Whether a proven plan may remain unverified, because it will be verified on the batch.

    Raises:
        CoupledSamplesError: If the samples depend on each other.
        SampleAxisError: If the logits do not have one row per sample.
    """
    with full_float32(_device(task)):
        return _make_strategy(task, on_batch)


def _device(task: Task) -> torch.device:
    return next(iter(task.parameters.values())).device


def _make_strategy(task: Task, on_batch: bool) -> Strategy:
    state = ForwardState(task.model, task.record)
    if _channels_last_pays(task):
        try:
            strategy = replace(_planned(task.channels_last(), on_batch, is_laid_out=True), channels_last=True)
            if not strategy.slow:
                return strategy
        except Exception as error:  # a model may insist on another layout, with views of its tensors
            raise_if_out_of_memory(error)
        state.restore()
    try:
        strategy = _planned(task, on_batch)
    except REFUSALS:
        raise
    except Exception as error:  # a probe may fail in any way; one sample at a time raises the model's own error
        raise_if_out_of_memory(error)
        reason = f"{type(error).__name__}: {error}"
        drawn = _draws_numbers(task, state)
        strategy = Strategy(None, slow=dict.fromkeys(task.parameters, reason), random=drawn)
    return strategy


def _draws_numbers(task: Task, state: ForwardState) -> bool:
    """Return whether a forward pass of the batch draws random numbers."""
    state.restore()
    try:
        logits_without_graph(task, True)
    except Exception as error:  # one sample at a time raises the model's own error
        raise_if_out_of_memory(error)
        return False
    finally:
        drawn = state.random_numbers_drawn()
        state.restore()
    return drawn


def _channels_last_pays(task: Task) -> bool:
    """Return whether the channels-last layout is faster.

    On a CPU it saves about 10 % of a ResNet's training step. On a GPU the tensor cores compute half precision and TF32 in
    this layout; from other layouts, images are copied for every convolution and every kernel of the engine.
    """
    dtypes = CHANNELS_LAST_TYPES.get(_device(task).type)
    if dtypes is None:
        return False
    for module in task.model.modules():
        if not isinstance(module, nn.Conv2d) or module.groups > 1:
            continue
        if module.weight.dtype in dtypes:
            return True
    return False


def _planned(task: Task, on_batch: bool, is_laid_out: bool = False) -> Strategy:
    """Plan on a probe; if the plan is not verified on the batch, compare every parameter's moments with autograd's.

    If the plan leaves parameters to slower ways, recovered owners are tried too.

    Raises:
        PlanError: If the inputs are laid out channels last, and the model draws random numbers, which are in the order of the memory,
            or runs an operation that is not exact in this layout.
    """
    state, probe, hooked = ForwardState(task.model, task.record), probe_model(task), _with_hooks(task)
    if is_laid_out:
        unwanted = CANCELLING if _device(task).type == "cpu" else ()
        if probe.random or not probe.operations.isdisjoint(unwanted):
            raise PlanError("the model has other random numbers or an operation that is not exact in this layout")
    # The probe runs in full precision, which a batch on a CUDA device may not do.
    if on_batch and not hooked and _device(task).type != "cuda" and _is_plan_proven(probe):
        state.restore()
        strategy = Strategy(probe.plan, tuple(task.parameters), alone=0, bytes=probe.bytes, sizes=probe.sizes)
        strategy.verified, strategy.parts = False, probe.parts
        return strategy
    if probe.alone_because:
        plan, outline, disagreeing = None, Outline(), frozenset[str]()
        slow = dict.fromkeys(task.parameters, probe.alone_because)
    else:
        plan, slow, outline, disagreeing = _covered(probe, probe.plan, state)
    if plan is not None and slow:
        by_owners = _covered(probe, None, state)
        if len(by_owners.slow) < len(slow):
            plan, slow, outline, disagreeing = by_owners
    slow = {**slow, **hooked}
    state.restore()
    if disagreeing - hooked.keys():  # also in a model that counts its passes in a place that is not restored
        check_few_samples(probe.task, state)
    if slow:
        _check_backward(probe, slow, state)
    fast = tuple(name for name in task.parameters if name not in slow)
    mapped = bool(slow) and not (probe.random or hooked) and _can_be_mapped(probe, slow)
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
        sizes=probe.sizes if plan is not None else None,
        path=outline.path,
        reads=outline.reads,
        reads_samples=probe.reads_samples,
        mixes=probe.mixes,
    )


def _is_plan_proven(probe: Probe) -> bool:
    """Return whether every call of the model is known to keep the samples apart, and the plan covers all parameters.

    Then no parameter is used outside of torch functions, and no custom function computes gradients.
    """
    plan = probe.plan
    if plan is None or plan.uncovered or plan.follows_backward or probe.sizes is None or probe.alone_because:
        return False
    is_plain = not probe.random and not probe.pauses_gradients and not probe.reads_activations
    return is_plain and all(step.kind != "uncovered" for step in plan.steps)


def _with_hooks(task: Task) -> dict[str, str]:
    """Return the parameters whose gradient autograd passes to hooks, which may change it, with the reason."""
    hooked: dict[str, str] = {}
    for name, parameter in task.parameters.items():
        if parameter._backward_hooks:
            hooked[name] = "a hook on it may change its gradient"
    return hooked


class _Coverage(NamedTuple):
    """What a plan, or recovered owners, can compute of a probe.

    Args:
        plan: The plan without steps that fail; ``None`` for recovered owners.
        slow: The parameters that need slower ways, with reasons.
        outline: The calls.
        disagreeing: The parameters whose results differ from those of autograd.
    """

    plan: Plan | None
    slow: dict[str, str]
    outline: Outline
    disagreeing: frozenset[str] = frozenset()


def _covered(probe: Probe, plan: Plan | None, state: ForwardState) -> _Coverage:
    """Return what a plan, or recovered owners without one, can compute of a probe."""
    slow: dict[str, str] = {} if plan is None else dict(plan.uncovered)
    while True:
        names = [name for name in probe.task.parameters if name not in slow]
        if not names:
            return _Coverage(plan, slow, Outline())
        state.restore()
        table, notes = MomentTable(probe.task.restricted(names), scaled=True), VerificationNotes()
        try:
            _, outline = collect_fast(table, table.task, plan, unchecked, notes)
            break
        except SelectsRefused:
            plan = None if plan is None else replace(plan, selects=False)
        except PlanError as error:
            plan = _without_failed_step(plan, slow, error, names)
    state.restore()
    wrong = {}
    for name, reason in notes.failures.items():
        if name in names:
            wrong[name] = reason
    disagreeing = _disagreeing(probe, table, notes.scales, set(names) - wrong.keys())
    for name in names:
        if name in disagreeing:
            wrong[name] = "its fast rule disagrees with autograd on a probe"
    return _Coverage(plan, {**slow, **wrong}, outline, disagreeing)


def _alone(probe: Probe, plan: Plan | None) -> int:
    """Return how many samples of each batch are run alone.

    Returns the number of all samples if Python reads a number that may differ for any of them, and no plan tells which, or
    if an operation works along the sample axis.
    """
    if probe.mixes or probe.reads_activations or (plan is None and probe.reads_samples):
        return EVERY_SAMPLE
    if probe.proven:
        return 0
    return ALONE_IF_PLANNED if plan is not None else ALONE_IF_UNPLANNED


def _without_failed_step(
    plan: Plan | None, slow: dict[str, str], error: PlanError, names: Sequence[str]
) -> Plan | None:
    """Use slower ways for the parameters of a failed step."""
    if plan is not None and error.step is not None and plan.steps[error.step].kind != "uncovered":
        plan = plan.without(error.step, str(error))
        slow.update(plan.uncovered)
        return plan
    lost = error.names & set(names) or set(names)
    slow.update(dict.fromkeys(sorted(lost), str(error)))
    return plan


def _gradients(probe: Probe, names: Collection[str], objective: int, number: int) -> dict[str, Tensor]:
    """Return autograd's gradients of one sample's loss, for one objective.

    The losses are scaled down first. With a backward pass that is not linear, such as one that clips, the result then
    differs from that of the fast method, which requires linearity.
    """
    parameters = probe.task.restricted(names).parameters
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    probe.after.restore_tensors()
    losses = probe.losses[objective][0]
    shrunk = 2.0**-3 if losses.dtype == torch.float16 else 2.0**-10
    gradients = loss_gradients(losses[number] * shrunk, list(parameters.values()))
    for position, gradient in enumerate(gradients):
        gradients[position] = gradient / shrunk
    return dict(zip(parameters, gradients, strict=True))


def _disagreeing(
    probe: Probe, table: MomentTable, scales: Mapping[str, float], names: Collection[str]
) -> frozenset[str]:
    """Return the parameters whose moments disagree with autograd's gradients.

    The middle sample reveals a wrong order of rows; the other samples are compared too if one of its gradients is zero.
    """
    wrong: set[str] = set()
    for objective in range(len(probe.losses)):
        unseen = set(names)
        for number in (1, 0, 2):
            if not unseen:
                break
            gradients = _gradients(probe, names, objective, number)
            compared = list(gradients)
            are_zero = [not bool(gradient.any()) for gradient in gradients.values()]
            moments = table.of_samples(slice(number, number + 1), compared, objective)
            agrees = agreeing(moments, map(gradients.pop, compared), [scales[name] for name in compared])
            for name, is_zero, is_right in zip(compared, are_zero, agrees.tolist(), strict=True):
                if not is_right:
                    wrong.add(name)
                if not is_zero:
                    unseen.discard(name)
    return frozenset(wrong)


def _check_backward(probe: Probe, names: Collection[str], state: ForwardState) -> None:
    """Refuse a model whose gradients of one sample change when the other samples of the probe are replaced.

    Each sample's logits depend on that sample alone, but its gradient does not, as in a custom function that centres
    the gradient.

    Raises:
        CoupledSamplesError: If it is one.
    """
    parameters = list(probe.task.restricted(names).parameters.values())
    for parameter in parameters:
        parameter.requires_grad_(True)
    state.restore()
    try:
        # A new forward pass: in the probe's own graph, a weight that has changed its type is unused.
        before = _gradients_of_first(probe.task, parameters)
        state.restore()
        after = _gradients_of_first(with_others_replaced(probe.task), parameters)
    except Exception as error:  # the model may refuse a synthetic sample
        raise_if_out_of_memory(error)
        return
    finally:
        state.restore()
    size = max(float(gradient.norm()) for gradient in before)
    for gradient, after_replacing in zip(before, after, strict=True):
        if float((after_replacing - gradient).norm()) > 10 * rounding(gradient) * size:
            state.restore()
            _check_reproducible(probe.task, state)
            raise coupled_model(f"the backward pass of {type(probe.task.model).__name__}")


def _gradients_of_first(task: Task, parameters: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradients of the first sample's loss in the batch, for the first objective."""
    return loss_gradients(task.unit_losses(0, task.forward())[0][0], parameters)


def _check_reproducible(task: Task, state: ForwardState) -> None:
    """Compare the logits of two forward passes from the same state.

    Raises:
        NotReproducibleError: If they differ.
    """
    logits = logits_without_graph(task, True)
    state.restore()
    again = logits_without_graph(task, True)
    state.restore()
    if not close_rows(again, logits):
        raise not_reproducible(task.model)


def _can_be_mapped(probe: Probe, slow: Mapping[str, str]) -> bool:
    """Return whether ``torch.func`` and autograd give the same gradients, different from zero for some sample."""
    task = probe.task.restricted(slow)
    try:
        mapped = functional_moments(task)
    except Exception as error:  # torch.func raises many kinds of errors
        raise_if_out_of_memory(error)
        return False
    compared: set[str] = set()
    for objective, (_, undo) in enumerate(probe.losses):
        for number in range(probe.task.size):
            gradients = _gradients(probe, slow, objective, number)
            scales = [1e-2 * largest_norm(gradients.values())] * len(gradients)
            moments = {key: value[number : number + 1] for key, value in mapped[objective].items()}
            moments = rescaled_moments(moments, 1 / undo[number : number + 1])
            if not bool(agreeing(moments, gradients.values(), scales).all()):
                return False
            for name, gradient in gradients.items():
                if bool(gradient.any()):
                    compared.add(name)
    return len(compared) == len(task.parameters)

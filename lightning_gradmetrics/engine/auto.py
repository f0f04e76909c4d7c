"""The fast engine: one forward and one backward pass for the batch, planned and verified on a few of its samples."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lightning_gradmetrics.classifier.preservation import RandomState
from lightning_gradmetrics.engine.agreement import agree
from lightning_gradmetrics.engine.calls import tensors_in
from lightning_gradmetrics.engine.functional import functional_gradients, functional_moments
from lightning_gradmetrics.engine.plan import Plan, PlanError, make_plan
from lightning_gradmetrics.engine.record import Recorder
from lightning_gradmetrics.engine.reference import loss_gradients, reference_moments
from lightning_gradmetrics.engine.task import Task, empty_moments, joined
from lightning_gradmetrics.engine.tracer import Probe, Tracer
from lightning_gradmetrics.engine.uses import RowsUse, ScaledUse, Use
from lightning_gradmetrics.gradients.scaling import rescaled_moments
from lightning_gradmetrics.gradients.statistics import Moments

__all__ = ["auto_moments", "sample_uses"]


@dataclass(frozen=True)
class _Strategy:
    """How a model is handled: a plan for most of its parameters, and another engine for each of the rest.

    Args:
        plan: The plan.
        fast: The parameters it covers, and is verified for.
        slow: The others, and why.
        bytes: About the memory that a sample's activations take, to split batches by.
        channels_last: Whether images are laid out so.
    """

    plan: Plan
    fast: tuple[str, ...]
    slow: Mapping[str, str] = field(default_factory=dict)
    bytes: int = 1
    channels_last: bool = False


_STRATEGIES: WeakKeyDictionary[nn.Module, dict[Any, _Strategy]] = WeakKeyDictionary()


def auto_moments(task: Task) -> list[Moments]:
    """The moments ``(N, P)`` of each objective's gradient, each parameter by the fastest right engine."""
    if task.size == 0:
        return empty_moments(task)
    return _planned(task, _run)


def sample_uses(task: Task) -> dict[str, Use]:
    """What the gradients of the first objective can be built from, for each parameter that it reaches."""
    return _planned(task, _uses) if task.size else {}


Result = TypeVar("Result")


def _planned(task: Task, work: Callable[[Task, _Strategy], Result]) -> Result:
    """``work`` with the strategy for this kind of task; made anew if the model does something else than planned."""
    known = _STRATEGIES.setdefault(task.model, {})
    key = _signature(task)
    generators = RandomState(task.model)  # a probe and a second attempt draw the same random numbers as a first one

    def run() -> Result:
        generators.restore()
        return work(task.channels_last() if known[key].channels_last else task, known[key])

    if key not in known:
        known[key] = _strategy(task)
    try:
        return run()
    except PlanError:
        known[key] = _strategy(task)
    try:
        return run()
    except PlanError as error:
        known[key] = _Strategy(Plan(()), (), dict.fromkeys(task.parameters, str(error)))
        _warn(task, known[key].slow)
        return run()


def _run(task: Task, strategy: _Strategy) -> list[Moments]:
    """The moments, in pieces of the batch if the memory is bounded."""
    step = task.size if task.memory is None else max(1, task.memory // strategy.bytes)
    return joined([_piece(task.rows(i, i + step), strategy) for i in range(0, task.size, step)])


def _piece(task: Task, strategy: _Strategy) -> list[Moments]:
    results = empty_moments(task, task.size)
    columns = {name: index for index, name in enumerate(task.parameters)}
    if strategy.fast:
        part = fast_moments(task.restricted(strategy.fast), strategy.plan)
        _fill(results, part, [columns[name] for name in task.parameters if name in strategy.fast])
    if strategy.slow:
        part = _slow_moments(task.restricted(strategy.slow))
        _fill(results, part, [columns[name] for name in task.parameters if name in strategy.slow])
    return results


def _uses(task: Task, strategy: _Strategy) -> dict[str, Use]:
    uses: dict[str, Use] = {}
    (undo,) = list(_backwards(replace(task, losses=task.losses[:1]), strategy.plan, uses.__setitem__))
    uses = {name: ScaledUse(use, undo) for name, use in uses.items() if name in strategy.fast}
    if strategy.slow:
        uses |= {name: RowsUse(g) for name, g in _slow_gradients(task.restricted(strategy.slow)).items()}
    return uses


def _slow_gradients(task: Task) -> dict[str, Tensor]:
    try:
        return functional_gradients(task, 0)
    except Exception:  # torch.func raises many kinds of errors; the loop raises the model's own
        for parameter in task.parameters.values():
            parameter.requires_grad_(True)
        rows = []
        for n in range(task.size):
            one = task.rows(n, n + 1)
            rows.append(loss_gradients(one.loss(0, one.forward()).sum(), list(task.parameters.values())))
        return {name: torch.stack([row[i] for row in rows]) for i, name in enumerate(task.parameters)}


def _fill(results: list[Moments], parts: list[Moments], columns: list[int]) -> None:
    for result, part in zip(results, parts, strict=True):
        for key, value in part.items():
            result[key][:, columns] = value


def _slow_moments(task: Task) -> list[Moments]:
    try:
        return functional_moments(task)
    except Exception:  # torch.func raises many kinds of errors; the loop raises the model's own
        return reference_moments(task)


def fast_moments(task: Task, plan: Plan, probe: Probe | None = None) -> list[Moments]:
    """The moments of parameters that the plan covers; ``probe`` is filled in a run that verifies it.

    With a probe they are those of the scaled gradients that :meth:`Task.unit_losses` gives, else of the gradients.
    """
    results = empty_moments(task, task.size)
    columns = {name: index for index, name in enumerate(task.parameters)}
    current = 0

    def sink(name: str, use: Use) -> None:
        if name not in columns:
            return
        for key, value in use.moments(task.wanted).items():
            results[current][key][:, columns[name]] = value

    undone = []
    for current, undo in enumerate(_backwards(task, plan, sink, probe)):  # noqa: B007 - the sink reads it
        undone.append(undo)
    if probe is not None:
        return results
    return [rescaled_moments(result, undo) for result, undo in zip(results, undone, strict=True)]


def _backwards(task: Task, plan: Plan, sink: Callable[[str, Use], None], probe: Probe | None = None) -> Any:
    """Run one forward, then yield before each objective's backward: the factors that undo the scale of its gradients."""
    for parameter in task.model.parameters():
        parameter.requires_grad_(False)
    known = {name: p for name, p in task.model.named_parameters() if frozenset([name]) in plan.roots.values()}
    tracer = Tracer(plan, known, task.size, sink)
    tracer.probe = probe
    with tracer:
        logits = task.forward()
    scaled = [task.unit_losses(index, logits) for index in range(len(task.losses))]
    for index, (losses, undo) in enumerate(scaled):
        yield undo
        tracer.backward(losses.sum(), last=index == len(scaled) - 1)


# -- choosing a strategy ----------------------------------------------------------------------------------------------


def _signature(task: Task) -> Any:
    """What a plan depends on."""
    shapes = [(t.shape[1:], t.dtype, t.device) for t in tensors_in(task.inputs)]
    kinds = [type(task.inputs), *(sorted(task.inputs) if isinstance(task.inputs, Mapping) else ())]
    device = next(iter(task.parameters.values())).device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    names = tuple((name, p.shape, p.dtype) for name, p in task.parameters.items())
    modes = tuple(module.training for module in task.model.modules())
    return (tuple(kinds), tuple(shapes), names, modes, autocast, task.wanted)


def _strategy(task: Task) -> _Strategy:
    """Plan on two and three samples of the batch, verify, and leave to other engines what cannot be covered."""
    if _channels_last_pays(task):
        with contextlib.suppress(Exception):  # a model may insist on a layout of its own, with views of its tensors
            strategy = replace(_verified(task.channels_last()), channels_last=True)
            if not strategy.slow:
                return strategy
    try:
        strategy = _verified(task)
    except Exception as error:  # whatever happens in a probe, the slow engines still are right
        strategy = _Strategy(Plan(()), (), dict.fromkeys(task.parameters, f"{type(error).__name__}: {error}"))
    _warn(task, strategy.slow)
    return strategy


def _channels_last_pays(task: Task) -> bool:
    """On a CPU dense convolutions of images are faster so: some 10 % of a ResNet's training step, measured."""
    device = next(iter(task.parameters.values())).device.type
    dense = (m for m in task.model.modules() if isinstance(m, nn.Conv2d) and m.groups == 1)
    return device == "cpu" and any(m.weight.dtype == torch.float32 for m in dense)


_WARNED: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


def _warn(task: Task, slow: Mapping[str, str]) -> None:
    """Name the parameters without a fast rule, once a model."""
    warned = _WARNED.setdefault(task.model, set())
    slow = {name: reason for name, reason in slow.items() if name not in warned}
    warned |= set(slow)
    if slow:
        reasons = {reason: [n for n in slow if slow[n] == reason] for reason in dict.fromkeys(slow.values())}
        text = "; ".join(f"{', '.join(names)} ({reason})" for reason, names in reasons.items())
        warnings.warn(
            f"no fast rule for these parameters of {type(task.model).__name__}, which take a slower exact way: {text}",
            stacklevel=2,
        )


def _verified(task: Task) -> _Strategy:
    samples = _finite_samples(task)
    two, three = task.picked(samples[:2]), task.picked(samples)
    generators = RandomState(task.model)
    small, _ = _record(two)
    generators.restore()
    large, losses = _record(three)
    plan = make_plan(small, large, losses[0][0])
    expected = _reference_gradients(three, losses)
    size = large.bytes() // 3 + 1
    del losses, large
    while True:
        covered = [name for name in task.parameters if name not in plan.uncovered]
        generators.restore()
        try:
            wrong = _disagreements(three.restricted(covered), plan, expected) if covered else {}
        except PlanError as error:
            if error.step is None:
                raise
            plan = plan.without(error.step, str(error))
            continue
        slow = {**plan.uncovered, **wrong}
        return _Strategy(plan, tuple(name for name in covered if name not in slow), slow, size)


def _record(task: Task) -> tuple[Recorder, list[Tensor]]:
    """A recorded forward with its graph, and the scaled losses of each objective."""
    for parameter in task.model.parameters():
        parameter.requires_grad_(False)
    for parameter in task.parameters.values():
        parameter.requires_grad_(True)
    recorder = Recorder(task.parameters)
    with recorder:
        logits = task.forward()
    return recorder, [task.unit_losses(index, logits)[0] for index in range(len(task.losses))]


def _reference_gradients(task: Task, losses: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    """For each objective, the per-sample gradients ``(N, *shape)`` of the recorded graph, one sample at a time."""
    parameters = list(task.parameters.values())
    found = []
    for loss in losses:
        rows = [loss_gradients(one, parameters) for one in loss]
        found.append({name: torch.stack([row[i] for row in rows]) for i, name in enumerate(task.parameters)})
    return found


def _disagreements(task: Task, plan: Plan, expected: Sequence[Mapping[str, Tensor]]) -> dict[str, str]:
    """The parameters whose moments by the plan are not those of the gradients that autograd gives."""
    probe = Probe()
    results = fast_moments(task, plan, probe)
    wrong = {name: reason for name, reason in probe.failures.items() if name in task.parameters}
    for result, gradients in zip(results, expected, strict=True):
        for column, name in enumerate(task.parameters):
            moments = {key: value[:, column] for key, value in result.items()}
            if name not in wrong and not agree(moments, gradients[name], probe.scales[name]):
                wrong[name] = "its fast rule disagrees with autograd on a probe"
    return wrong


def _finite_samples(task: Task) -> list[int]:
    """Three samples, if possible without NaN or Inf in their inputs; repeated if there are fewer."""
    finite = torch.ones(task.size, dtype=torch.bool)

    for tensor in tensors_in(task.inputs):
        if tensor.is_floating_point() and tensor.ndim and len(tensor) == task.size:
            finite &= tensor.isfinite().reshape(task.size, -1).all(1).cpu()
    good = finite.nonzero().flatten()[:3].tolist() or list(range(min(3, task.size)))
    return (good * 3)[:3]

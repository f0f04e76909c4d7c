"""The fast engine: one forward and one backward pass for the batch, planned and verified on a few of its samples."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack

from lightning_gradmetrics.classifier.model_layout import named_parameters
from lightning_gradmetrics.engine.checks.batch_checks import BatchChecks
from lightning_gradmetrics.engine.checks.guards import compare_alone
from lightning_gradmetrics.engine.checks.other_generators import check_few_samples, watching_generators
from lightning_gradmetrics.engine.checks.sample_check import (
    check_draw,
    check_reader_paths,
    check_sample,
    check_some_samples,
)
from lightning_gradmetrics.engine.inputs.samples import close_rows, input_shapes, input_structure, logits_without_graph
from lightning_gradmetrics.engine.passes.gather import MomentTable
from lightning_gradmetrics.engine.passes.plan import DisagreementError, PlanError
from lightning_gradmetrics.engine.passes.strategy import EVERY_SAMPLE, Strategy, collect_fast, warn_random, warn_slow
from lightning_gradmetrics.engine.planned_batch import GRADIENTS_IF_UNPROVEN, fill_by_plan
from lightning_gradmetrics.engine.planning.garbage import without_collections
from lightning_gradmetrics.engine.planning.verification import make_strategy
from lightning_gradmetrics.engine.refusals import (
    REFUSALS,
    CoupledSamplesError,
    not_reproducible,
    raise_if_out_of_memory,
)
from lightning_gradmetrics.engine.task import Task, empty_moments
from lightning_gradmetrics.engine.tracing.attribute_reads import reading_attributes
from lightning_gradmetrics.engine.tracing.graph import GroupNormCrashError
from lightning_gradmetrics.engine.tracing.model_state import ForwardState, attribute_key, note_read
from lightning_gradmetrics.gradients.statistics import Moments, merged_moments

__all__ = ["auto_moments", "verified_strategy"]

MOST_STRATEGIES = 4
"""Largest number of strategies for one kind of task; further paths through a model are handled without a plan."""

MOST_KINDS = 64
"""Largest number of kinds of task for one model; the oldest is dropped."""

_STRATEGIES: WeakKeyDictionary[nn.Module, dict[Hashable, list[Strategy]]] = WeakKeyDictionary()
_UNPLANNABLE: WeakKeyDictionary[nn.Module, dict[Hashable, Strategy]] = WeakKeyDictionary()
"""Kinds and sizes of batches for which planning has failed."""

_CRASHING: WeakKeyDictionary[nn.Module, set[tuple[str, ...]]] = WeakKeyDictionary()
"""The names of parameters whose backward pass alone would end the process, so that all parameters are computed."""


def auto_moments(task: Task) -> list[Moments]:
    """Return the moments ``(N, P)`` of each objective's gradient, each computed in the fastest verified way."""
    if not task.size:
        return empty_moments(task)
    names = tuple(task.parameters)
    if names not in _CRASHING.get(task.model, ()):
        try:
            moments = _by_assumption(task)
            return _by_strategy(task.decided()) if moments is None else moments
        except CoupledSamplesError:  # which different random numbers look like
            check_few_samples(task)
            raise
        except GroupNormCrashError:
            if len(_with_all_parameters(task).parameters) == len(names):
                raise
            _CRASHING.setdefault(task.model, set()).add(names)
            ForwardState(task.model, task.record).restore()
    everything = _with_all_parameters(task)
    return _of_parameters(auto_moments(everything), everything, task)


def _with_all_parameters(task: Task) -> Task:
    """Return the task with all real parameters of the model, whose results are those of each parameter."""
    parameters = {}
    for name, parameter in named_parameters(task.model).items():
        if name in task.parameters or (parameter.numel() and parameter.is_floating_point()):
            parameters[name] = parameter
    return replace(task, parameters=parameters, merged=False)


def _of_parameters(moments: Sequence[Moments], everything: Task, task: Task) -> list[Moments]:
    """Return the moments of the parameters of another task."""
    columns = list(map(list(everything.parameters).index, task.parameters))
    chosen: list[Moments] = []
    for table in moments:
        rows: Moments = {}
        for key, value in table.items():
            rows[key] = value[:, columns]
        chosen.append(merged_moments(rows) if task.merged else rows)
    return chosen


def _by_assumption(task: Task) -> list[Moments] | None:
    """Return the moments by a new plan for inputs that are assumed to have one row per sample; ``None`` if they may not.

    A plan that is verified on the batch shows whether they do: its probe runs two and three samples of the batch. Otherwise the
    model runs on these again.
    """
    assumption, state = task.assumption, ForwardState(task.model, task.record)
    if assumption is None or task.size <= 3 or task.memory is not None or _known(task).get(_kind(task)):
        return None
    try:
        with without_collections():
            strategy = _new_strategy(task, state, on_batch=True)
            is_wrong = strategy.verified and not assumption.examine(task.per_sample)
            moments = None if is_wrong else _moments(task, strategy, state)
    except Exception as error:  # the model may refuse inputs that were cut in the wrong way
        raise_if_out_of_memory(error)
        moments = None
    if moments is None:
        state.restore()
        return None
    _remember(task, strategy)
    return moments


def _known(task: Task) -> dict[Hashable, list[Strategy]]:
    return _STRATEGIES.setdefault(task.model, {})


def _remember(task: Task, strategy: Strategy) -> None:
    """Keep a strategy for later batches of its kind."""
    known = _known(task)
    known.setdefault(_kind(task), []).append(strategy)
    while len(known) > MOST_KINDS:
        del known[next(iter(known))]


def _by_strategy(task: Task) -> list[Moments]:
    """Return the moments by a known strategy, by a new one if none fits, or without a plan for this batch only."""
    state, key, shapes = ForwardState(task.model, task.record), _kind(task), input_shapes(task)
    strategies = _known(task).get(key, [])
    if task.size > 2:
        strategies[:] = [strategy for strategy in strategies if not strategy.provisional]
    for strategy in sorted(strategies, key=lambda strategy: (shapes, task.size) not in strategy.times):
        if task.memory is not None and shapes != strategy.shapes:
            continue  # the memory of a sample is known for the planned shapes only
        try:
            return _moments(task, strategy, state)
        except PlanError:
            state.restore()
    here, unplannable = (key, shapes, task.size), _UNPLANNABLE.setdefault(task.model, {})
    if len(strategies) < MOST_STRATEGIES and here not in unplannable:
        with without_collections():
            strategy, moments = _by_new_strategy(task, state)
        if moments is not None:
            _remember(task, strategy)
            return moments
        if len(unplannable) >= MOST_KINDS:
            unplannable.clear()
        unplannable[here] = strategy
    failed = [unplannable[here]] if here in unplannable else []
    return _moments(task, _unplanned(task, [*strategies, *failed]), state)


def _by_new_strategy(task: Task, state: ForwardState) -> tuple[Strategy, list[Moments] | None]:
    """Return a new strategy, and the moments; ``None`` if the batch does not follow its plan.

    A plan with a proof is verified on the batch. If that fails in any way, it is made again and verified on the probe, which
    shows which parameters need slower ways. The probe then includes the sample that has failed.
    """
    probed, failed = task, None
    for on_batch in (task.size > 3 and task.memory is None, False):
        strategy = _new_strategy(probed, state, on_batch)
        strategy.failed = failed
        is_verified = strategy.verified
        try:
            return strategy, _moments(task, strategy, state)
        except Exception as error:
            if isinstance(error, REFUSALS) or (is_verified and not isinstance(error, PlanError)):
                raise
            raise_if_out_of_memory(error)
            state.restore()
            if isinstance(error, DisagreementError) and error.sample is not None:
                strategy.failed = failed = error.sample
            if is_verified:
                break
            if failed is not None:
                probed = task.picked([(failed + shift) % task.size for shift in (-1, 0, 1)])
    return strategy, None


def _new_strategy(task: Task, state: ForwardState, on_batch: bool) -> Strategy:
    """Return the strategy of a probe, and restore the model."""
    with reading_attributes(task.model) as read:
        strategy = make_strategy(task, on_batch)
    note_read(task.model, read)
    strategy.shapes = input_shapes(task)
    state.restore()
    return strategy


def verified_strategy(task: Task) -> Strategy | None:
    """Return the strategy that has run on batches of this kind, shapes and size."""
    for strategy in _STRATEGIES.get(task.model, {}).get(_kind(task), []):
        if (input_shapes(task), task.size) in strategy.times:
            return strategy
    return None


def _unplanned(task: Task, strategies: Sequence[Strategy]) -> Strategy:
    """Return a strategy without a plan, as careful as the known strategies."""
    unplanned = Strategy(None, tuple(task.parameters))
    for strategy in strategies:
        unplanned.alone = max(unplanned.alone, EVERY_SAMPLE if strategy.reads_samples else strategy.alone)
        unplanned.quiet = unplanned.quiet or strategy.quiet
        unplanned.random = unplanned.random or strategy.random
        unplanned.reads = strategy.reads
        unplanned.failed = strategy.failed if unplanned.failed is None else unplanned.failed
    return unplanned


def _kind(task: Task) -> Hashable:
    """Return everything that a strategy depends on, except the sizes of the inputs."""
    chosen = task.parameters.values()
    device = next(iter(chosen)).device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    hooks = tuple(map(bool, map(_HOOKS, chosen)))
    names = (tuple(task.parameters), tuple(map(_SHAPE, chosen)), tuple(map(_DTYPE, chosen)), hooks)
    structure = (type(task.inputs).__name__, input_structure(task.inputs), task.per_sample)
    # A tensor with one row per sample can take the place of one that all samples share.
    model, record = task.model, task.record
    own = (*model.parameters(), *model.buffers()) if record is None else (*record.parameters, *record.tensors())
    shapes = tuple(map(_SHAPE, own))
    # Function modes of the caller may change the result of every call.
    modes = tuple(map(type, _get_current_function_mode_stack()))  # type: ignore[no-untyped-call]
    return structure, names, attribute_key(model, record), shapes, autocast, task.wanted, modes


_SHAPE = torch.Tensor.shape.__get__  # type: ignore[attr-defined]
_DTYPE = torch.Tensor.dtype.__get__  # type: ignore[attr-defined]
_HOOKS = torch.Tensor._backward_hooks.__get__  # type: ignore[union-attr]


# -- one batch --------------------------------------------------------------------------------------------------------


def _moments(task: Task, strategy: Strategy, state: ForwardState) -> list[Moments]:
    """Return the moments, computed in parts of the batch if memory is limited."""
    step = task.size if task.memory is None else max(1, task.memory // strategy.bytes)
    parts = []
    for start in range(0, task.size, step):
        if start:
            state.restore_attributes()
        table = MomentTable(task if step >= task.size else task.rows(start, start + step))
        checks = BatchChecks(table.task, strategy, state)
        with watching_generators(table.task, state) if checks.is_new else nullcontext():
            _fill(table, checks)
        parts.append(table)
    if strategy.random:
        warn_random(task.model)
    return MomentTable.join(parts)


def _fill(table: MomentTable, checks: BatchChecks) -> None:
    """Fill a table: the fast parameters, then the others.

    Raises:
        PlanError: If the model does not follow the strategy's plan.
    """
    task, strategy = table.task, checks.strategy
    if strategy.plan is None and task.size == 1:  # no other way is faster than the ordinary gradient
        _fill_slowly(table, task.parameters, False, checks)
        return
    slow = dict(strategy.slow)
    if strategy.plan is None:
        slow.update(_fill_by_owners(table, checks))
    elif strategy.fast:
        fill_by_plan(table, checks)
    if slow:
        mapped = strategy.mapped and not strategy.random and slow.keys() == strategy.slow.keys()
        _fill_slowly(table, slow, mapped, checks)
        warn_slow(task.model, slow, mapped)


def _fill_slowly(table: MomentTable, names: Collection[str], mapped: bool, checks: BatchChecks) -> None:
    """Fill a table with the moments of some parameters, mapped over the samples or one sample at a time.

    Raises:
        CoupledSamplesError: If the logits of a sample alone differ from those in the batch.
        NotReproducibleError: If a second forward pass draws other random numbers.
    """
    task, strategy, state = table.task, checks.strategy, checks.state
    state.restore()
    if not checks.logits:
        checks(logits_without_graph(task, strategy.quiet))
        state.restore()
    logits = checks.logits[-1]
    if not strategy.random:
        table.add_slowly(names, mapped, lambda number, alone: compare_alone(task, logits, number, alone, state))
    elif not close_rows(table.add_draw(names), logits):
        raise not_reproducible(task.model)


def _fill_by_owners(table: MomentTable, checks: BatchChecks) -> dict[str, str]:
    """Fill a table by recovered owners; return the parameters for which that is impossible, with reasons."""
    task, strategy, state = table.task, checks.strategy, ForwardState(table.task.model)
    names, lost, disagrees = list(strategy.fast), {}, False
    while names:
        try:
            collect_fast(table, task.restricted(names), None, checks)
            if strategy.random:
                check_draw(table, names, task, state)
            else:
                check_some_samples(table, names, task, state, GRADIENTS_IF_UNPROVEN, checks.hides_gradients)
                if strategy.failed is not None and strategy.failed < task.size:  # a plan was wrong for it
                    check_sample(table, names, task, state, strategy.failed, checks.hides_gradients)
                check_reader_paths(table, names, task, state, checks.reader_paths, strategy.compared)
            break
        except PlanError as error:
            disagrees = disagrees or isinstance(error, DisagreementError)
            given_up = error.names & set(names) or set(names)
            lost.update(dict.fromkeys(sorted(given_up), str(error)))
            names = [name for name in names if name not in given_up]
            table.clear()
            state.restore()
    if disagrees:  # also in a model that counts its passes in a place that is not restored
        check_few_samples(task, checks.state)
    return lost

"""Batches of one sample of a known model: its statistics are those of the ordinary gradient."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from operator import attrgetter

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_gradmetrics.engine.passes.gather import MomentTable
from lightning_gradmetrics.engine.passes.plan import Plan
from lightning_gradmetrics.engine.passes.strategy import Strategy, freeze
from lightning_gradmetrics.engine.task import Task
from lightning_gradmetrics.engine.tracing.graph import ends_of_group_norms, gradients_at
from lightning_gradmetrics.engine.uses import RowsUse

__all__ = ["collect_one_sample", "needs_no_plan"]

MOST_ENTRIES = 2**24
"""Largest number of entries of the gradients, which are stored together."""

MOST_TABLE_ENTRIES = 2**18
"""The same number for embeddings, whose gradients are zero almost everywhere: the rule for embeddings skips the zeros."""

MOST_JOINED = 2**14
"""Largest number of entries of the gradients that are copied into one row; for more, the copy takes longer than it saves."""

_LOOK_UPS = frozenset([torch.embedding, F.embedding, F.embedding_bag])
"""Functions that look up rows of a table; plans of ``torch.nn`` contain the first one, which the others call."""

_EXACT = frozenset([torch.float32, torch.float64])

_TYPE, _DEVICE, _KIND = attrgetter("dtype"), attrgetter("device.type"), attrgetter("dtype", "device", "layout")


def needs_no_plan(task: Task, strategy: Strategy, here: tuple[Hashable, int]) -> bool:
    """Return whether an ordinary backward pass is exact and faster for a batch of one sample.

    The proof must cover every earlier batch of these shapes. Python must read no values of tensors, and there must be no
    random numbers, reentrant checkpoints or low precision.

    Args:
        task: The batch.
        strategy: How the model is handled.
        here: The shapes of the inputs, and the number of samples.
    """
    plan, verified = strategy.plan, strategy.times.get(here)
    if plan is None or plan.reads != () or not verified or task.memory is not None:
        return False
    if strategy.random or strategy.quiet or strategy.slow:
        return False
    for _, is_covered in verified.values():
        if not is_covered:
            return False
    if strategy.has_small_gradients is None:  # the same for all tasks of a strategy: they have one kind
        strategy.has_small_gradients = _are_gradients_small(task, plan)
    return strategy.has_small_gradients


def _are_gradients_small(task: Task, plan: Plan) -> bool:
    """Return whether all gradients are in full precision and on one type of device, and can be stored together."""
    chosen = task.parameters.values()
    devices = set(map(_DEVICE, chosen))
    if not _EXACT.issuperset(map(_TYPE, chosen)) or len(devices) > 1 or any(map(torch.is_autocast_enabled, devices)):
        return False
    sizes = dict(zip(task.parameters, map(Tensor.numel, chosen), strict=True))
    return sum(sizes.values()) <= MOST_ENTRIES and _table_entries(plan, sizes) <= MOST_TABLE_ENTRIES


def _table_entries(plan: Plan, sizes: Mapping[str, int]) -> int:
    """Return the number of entries of the tables of embeddings."""
    tables: set[str] = set()
    for step in plan.steps:
        if step.function in _LOOK_UPS:
            tables.update(*map(plan.roots.__getitem__, step.sources))
    total = 0
    for name in tables:
        total += sizes.get(name, 0)
    return total


def collect_one_sample(table: MomentTable, plan: Plan) -> None:
    """Fill a table by an ordinary forward pass, and one ordinary backward pass per objective.

    Args:
        table: The table of the batch.
        plan: The plan of the model.
    """
    task = table.task
    parameters = list(task.parameters.values())
    freeze(task)
    for parameter in parameters:
        parameter.requires_grad_(True)
    logits = task.forward(plan.repairs_norms(1))
    scaled = [task.unit_gradient(index, logits) for index in range(len(task.objectives))]
    for index, (gradient, undo) in enumerate(scaled):
        table.begin(index, undo)
        if not logits.requires_grad:  # no chosen parameter is used
            continue
        is_last = index == len(scaled) - 1
        gradients = gradients_at(logits, [*parameters, *ends_of_group_norms(logits)], gradient, not is_last)
        _add_gradients(table, gradients[: len(parameters)])
    table.finish()


def _add_gradients(table: MomentTable, gradients: Sequence[Tensor | None]) -> None:
    """Add the gradients of all parameters to a table, as one row if only moments over all parameters are read."""
    if table.task.merged:
        row = _joined(gradients)
        if row is not None and table.add_all(row):
            return
    for name, gradient in zip(table.task.parameters, gradients, strict=True):
        if gradient is not None:
            table.add(name, RowsUse(gradient.to_dense().reshape(1, -1)))


def _joined(gradients: Sequence[Tensor | None]) -> Tensor | None:
    """Return the entries of all gradients, ``(1, D)``; ``None`` if they are many, or not dense and of one type and device."""
    present = [gradient for gradient in gradients if gradient is not None]
    kinds = set(map(_KIND, present))
    is_possible = len(present) == len(gradients) and len(kinds) == 1 and present[0].layout is torch.strided
    if not is_possible or sum(map(Tensor.numel, present)) > MOST_JOINED:
        return None
    return torch._C._nn.flatten_dense_tensors(present)[None]  # type: ignore[attr-defined, no-any-return]

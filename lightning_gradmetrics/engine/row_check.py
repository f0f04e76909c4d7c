"""Checks that a plan assigns every row of every layer to the right sample of a batch."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lightning_gradmetrics.engine.gather import MomentTable
from lightning_gradmetrics.engine.model_state import ForwardState
from lightning_gradmetrics.engine.plan import Plan, PlanError
from lightning_gradmetrics.engine.strategy import collect_fast, unchecked
from lightning_gradmetrics.engine.task import Task
from lightning_gradmetrics.gradients.precision import rounding

__all__ = ["check_rows"]


def check_rows(task: Task, plan: Plan | None, free: bool, state: ForwardState) -> None:
    """Compute the moments twice, the second time with the gradient of each sample scaled by another power of two.

    The scales are undone at the end, so they change nothing, unless a row is assigned to a sample that it does not
    belong to. One sample compared with autograd does not show that for the others.

    Args:
        task: The batch, restricted to the parameters of the plan.
        plan: The plan.
        free: Whether axes may have a different number of positions per sample than planned.
        state: The state of the model before the batch.

    Raises:
        PlanError: If the moments differ.
    """
    numbers = torch.arange(task.size)
    levels = 4 if next(iter(task.parameters.values())).dtype == torch.float16 else 16
    weights = 0.5 ** ((numbers + numbers // levels) % levels)
    tables = []
    for weighted in (task, replace(task, weights=weights)):
        state.restore()
        table = MomentTable(weighted)
        collect_fast(table, weighted, plan, unchecked, free=free)
        tables.append(table.moments)
    tolerance = rounding(next(iter(task.parameters.values())))
    for moments, others in zip(*tables, strict=True):
        for key, values in moments.items():
            if not _close(values, others[key], tolerance):
                raise PlanError("a row of a layer does not belong to the planned sample")


def _close(values: Tensor, others: Tensor, tolerance: float) -> bool:
    finite = values.isfinite()
    level = values.where(finite, 0).abs().mean(0, keepdim=True)
    return bool(((others - values).abs() <= tolerance * (values.abs() + level))[finite].all())

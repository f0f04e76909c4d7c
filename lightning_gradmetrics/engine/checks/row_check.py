"""Checks that a plan assigns every row of every layer to the right sample of a batch."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lightning_gradmetrics.engine.passes.gather import MomentTable
from lightning_gradmetrics.engine.passes.plan import Plan, PlanError
from lightning_gradmetrics.engine.passes.strategy import collect_fast, unchecked
from lightning_gradmetrics.engine.task import Task
from lightning_gradmetrics.engine.tracing.model_state import ForwardState
from lightning_gradmetrics.gradients.precision import rounding

__all__ = ["check_row_owners"]


def check_row_owners(table: MomentTable, task: Task, plan: Plan, free: bool, state: ForwardState) -> None:
    """Compute the moments again, with the gradient of each sample scaled by another power of two.

    The scales are undone at the end, so they change nothing, unless a row is assigned to a sample that it does not
    belong to. The comparison of one sample with autograd does not reveal this for the others.

    Args:
        table: The moments of the batch by the plan.
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
    weighted = MomentTable(replace(task, weights=weights, objectives=table.task.objectives))
    state.restore()
    collect_fast(weighted, weighted.task, plan, unchecked, free=free)
    tolerance = rounding(next(iter(task.parameters.values())))
    for objective, moments in enumerate(weighted.moments):
        for key, values in table.of_samples(slice(0, task.size), task.parameters, objective).items():
            if not _close(values, moments[key], tolerance):
                raise PlanError("a row of a layer does not belong to the planned sample")


def _close(values: Tensor, others: Tensor, tolerance: float) -> bool:
    """Return whether two computations of a moment ``(N, P)`` are equal, relative to the entry and to its parameter's mean."""
    finite = values.isfinite()
    level = values.where(finite, 0).abs().mean(0, keepdim=True)
    return bool(((others - values).abs() <= tolerance * (values.abs() + level))[finite].all())

"""The slow reference: a batch of one at a time, ``torch.autograd.grad``. Every faster rule is tested against it."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_gradmetrics.engine.task import Task, empty_moments
from lightning_gradmetrics.statistics import Moments, gradient_moments

__all__ = ["reference_moments"]


def reference_moments(task: Task) -> list[Moments]:
    """The moments ``(N, P)`` of each objective's gradient, one sample and one objective at a time."""
    results = empty_moments(task)
    for parameter in task.parameters.values():
        parameter.requires_grad_(True)
    for n in range(task.size):
        for result, gradients in zip(results, _sample_gradients(task.rows(n, n + 1)), strict=True):
            rows = [gradient_moments(gradient[None], task.wanted) for gradient in gradients]
            for key in task.wanted:
                result[key] = torch.cat([result[key], torch.stack([row[key] for row in rows], 1)])
    return results


def _sample_gradients(task: Task) -> list[list[Tensor]]:
    """For each objective, the gradient of every chosen parameter; zero where the loss does not reach it."""
    parameters = list(task.parameters.values())
    logits = task.forward()
    gradients = []
    for loss in task.losses:
        total = loss(task.targets)(logits).sum()
        found = (
            torch.autograd.grad(total, parameters, allow_unused=True, retain_graph=True)
            if total.requires_grad
            else [None] * len(parameters)
        )
        gradients.append([torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)])
    return gradients

"""The samples that a model is probed with: three of a batch, and similar ones in their place."""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
from torch import Tensor

from lightning_gradmetrics.classifier.forward import map_tensors, tensors_in
from lightning_gradmetrics.engine.task import Task

__all__ = ["parts_of_batch", "three_samples", "with_others_replaced", "with_row"]


def _finite_samples(task: Task) -> list[int]:
    """Return the numbers of the first three samples without NaN or Inf; fewer if the batch does not have them."""
    first = _are_finite(task, min(3, task.size))
    flags = first if all(first) else _are_finite(task, task.size)
    return list(itertools.compress(range(task.size), flags))[:3]


def _are_finite(task: Task, count: int) -> list[bool]:
    """Return for each of the first samples whether it has neither NaN nor Inf."""
    finite = torch.ones(count, dtype=torch.bool)
    for tensor, flag in zip(tensors_in(task.inputs), task.per_sample, strict=True):
        if flag and tensor.is_floating_point():
            finite &= tensor[:count].isfinite().reshape(count, -1).all(1).cpu()
    flags: list[bool] = finite.tolist()
    return flags


def three_samples(task: Task) -> Task:
    """Return three samples, if possible without NaN or Inf; repeated samples are perturbed."""
    good = _finite_samples(task) or list(range(min(3, task.size)))
    three = task.picked((good * 3)[:3])
    for number in range(len(good), 3):
        three = with_row(three, number, number, 0.1)
    return three


def parts_of_batch(task: Task, of_two: Tensor, of_three: Tensor) -> tuple[tuple[list[int], Tensor], ...]:
    """Return the logits of two and of all three samples with their numbers in the batch, if they are to confirm an assumption.

    They are empty if a sample was perturbed.
    """
    numbers = [] if task.assumption is None else _finite_samples(task)
    if len(numbers) < 3:
        return ()
    return (numbers[:2], of_two.detach()), (numbers, of_three.detach())


def with_row(task: Task, number: int, source: int, noise: float) -> Task:
    """Return the task with one sample replaced by another, whose floating-point numbers are scaled at random.

    Integers stay valid: they come from the other sample, or from the same sample in another order.
    """
    generator = torch.Generator().manual_seed(number)
    flags = iter(task.per_sample)

    def replaced(tensor: Tensor) -> Tensor:
        if not next(flags):
            return tensor
        row = tensor[source].clone()
        if row.is_floating_point():
            factor = torch.randn(row.shape, generator=generator, dtype=torch.float32).mul_(noise).exp_()
            row = row * factor.to(row.device, row.dtype)
        elif source == number and row.ndim:
            row = row.roll(1 + number, -1)
        tensor = tensor.clone()
        tensor[number] = row
        return tensor

    return replace(task, inputs=map_tensors(task.inputs, replaced))


def with_others_replaced(task: Task) -> Task:
    """Return three samples of which the second and the third are replaced by similar ones."""
    return with_row(with_row(task, 1, 1, 0.3), 2, 2, 0.3)

"""Finds which index varies fastest on axes that hold several positions of each sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_gradmetrics.engine.passes.plan import Step
from lightning_gradmetrics.engine.tracing.axes import Axis

__all__ = ["Changes", "layout", "with_layouts"]

Changes = Sequence[Sequence[Tensor | None]]
"""For each call and each of its tensors, the positions on the sample axis that change with each sample."""


def with_layouts(
    planned: Sequence[Step],
    changes_of: Sequence[Sequence[Tensor | None] | None],
    results_of: Sequence[Any],
    loss: Callable[[], Tensor | None],
) -> tuple[list[Step], bool]:
    """Return steps with ``minor`` set where the sample index varies fastest, and whether a layout is undecided.

    Args:
        planned: The steps.
        changes_of: For each step the positions that change with each sample, if they are known.
        results_of: The result of each step.
        loss: Returns the loss of the first sample, for layouts that replacing samples does not reveal.
    """
    steps, open_steps, undecided = list(planned), [], False
    for number, step in enumerate(steps):
        changes = changes_of[number]
        if step.output is None:
            continue
        minors = []
        axes = (*step.inputs, step.output)
        for axis, changed in zip(axes, changes or (None,) * len(axes), strict=True):
            minors.append(None if axis is None or changed is None else layout(changed, axis.times))
        known = [minor for minor in minors if minor is not None]
        if not known and any(axis is not None and axis.times > 1 for axis in axes):
            open_steps.append(number)
        elif known:
            steps[number] = _laid_out(step, minors, known[-1])
    results = list(map(results_of.__getitem__, open_steps))
    for number, minor in zip(open_steps, _minors_by_gradient(steps, open_steps, results, loss), strict=True):
        undecided = undecided or minor is None
        if minor:
            steps[number] = _laid_out(steps[number], (None,) * (len(steps[number].inputs) + 1), True)
    return steps, undecided


def _laid_out(step: Step, minors: Sequence[bool | None], default: bool) -> Step:
    """Return the step with the layout of each axis; unknown layouts are replaced by the default."""
    axes = []
    for axis, minor in zip((*step.inputs, step.output), minors, strict=True):
        if axis is None or axis.times == 1:
            axes.append(axis)
        else:
            axes.append(replace(axis, minor=default if minor is None else minor))
    return replace(step, inputs=tuple(axes[:-1]), output=axes[-1])


def layout(changed: Tensor, times: int) -> bool | None:
    """Return whether the sample index varies fastest on an axis, from the positions that change with each sample.

    Args:
        changed: ``(3, 3 * times)``.
        times: Positions of each sample.

    Returns:
        ``True`` for position ``t N + n``, ``False`` for ``n times + t``, ``None`` if both fit.

    Raises:
        ValueError: If neither fits.

    Example:
        >>> layout(torch.eye(3, dtype=torch.bool).repeat(1, 2), 2)
        True
    """
    positions = torch.arange(changed.shape[1], device=changed.device)
    samples = torch.arange(3, device=changed.device)[:, None]
    major = not bool((changed & (positions // times != samples)).any())
    minor = not bool((changed & (positions % 3 != samples)).any())
    if not major and not minor:
        raise ValueError("the rows of the samples have no fixed order")
    return None if major and minor else minor


def _minors_by_gradient(
    steps: Sequence[Step], numbers: Sequence[int], results: Sequence[Any], loss: Callable[[], Tensor | None]
) -> list[bool | None]:
    """Return the layout of each step's output from one sample's gradient; ``None`` where that is zero."""
    minors: list[bool | None] = [None] * len(numbers)
    live = []
    for position, number in enumerate(numbers):
        output = steps[number].output
        if output is not None and output.times > 1 and results[position].requires_grad:
            live.append(position)
    total = loss() if live else None
    if total is None or not total.requires_grad:
        return minors
    outputs = [results[position] for position in live]
    gradients = torch.autograd.grad(total, outputs, retain_graph=True, allow_unused=True)
    for position, gradient in zip(live, gradients, strict=True):
        axis = steps[numbers[position]].output
        if gradient is not None and axis is not None:
            minors[position] = _minor_by_gradient(gradient, axis)
    return minors


def _minor_by_gradient(gradient: Tensor, axis: Axis) -> bool | None:
    """Return whether the gradient of the first sample's loss is zero for other samples in the layout ``t N + n`` only."""
    foreign = {}
    for minor in (False, True):
        rows = replace(axis, minor=minor).split(gradient)
        foreign[minor] = bool((rows[1:] != 0).any())
    return None if foreign[False] == foreign[True] else foreign[False]

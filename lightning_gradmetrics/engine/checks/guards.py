"""Cheap checks in each batch that samples do not depend on each other, in the model or in an objective."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_gradmetrics.engine.checks.rounding_noise import noisy_inputs, rounding_noise
from lightning_gradmetrics.engine.inputs.samples import close_rows, different_rows, logits_without_graph, shared_list
from lightning_gradmetrics.engine.refusals import (
    SampleAxisError,
    coupled_model,
    coupled_objective,
    not_reproducible,
    not_without_others,
    other_precisions,
    rows_not_samples,
)
from lightning_gradmetrics.engine.task import Task
from lightning_gradmetrics.engine.tracing.model_state import ForwardState, quiet_no_grad
from lightning_gradmetrics.engine.tracing.outline import Outline, Recording
from lightning_gradmetrics.gradients.objectives import Objective
from lightning_gradmetrics.gradients.precision import at_least_float32

__all__ = [
    "check_alone",
    "check_copies",
    "check_halves",
    "check_new_shapes",
    "check_objectives",
    "check_others",
    "check_precisions",
    "check_repeated",
    "check_samples",
    "chosen_samples",
    "compare_alone",
]

_CHOICE = random.Random(0)
"""Chooses the samples to check, without advancing the user's generators."""

_ALONE = 4
"""How many samples of each batch an objective is computed on alone."""


def check_alone(
    task: Task,
    logits: Tensor,
    numbers: Sequence[int],
    state: ForwardState,
    quiet: bool,
    outline: Outline | None = None,
) -> list[Outline]:
    """Compare the logits of some samples, each alone in a batch, with their logits in this batch, and the precisions.

    Args:
        task: The batch.
        logits: Its logits ``(N, C)``.
        numbers: The numbers of the samples to run alone.
        state: The state of the model before the batch.
        quiet: Whether to silence the warning of reentrant checkpoints about running without gradients.
        outline: The forward pass of the batch, whose precisions must be those of one sample alone.

    Returns:
        The outline of each forward pass, if there is one of the batch.

    Raises:
        CoupledSamplesError: If they differ.
    """
    outlines: list[Outline] = []
    for number in numbers if task.size > 1 else ():
        alone = None if outline is None else Outline()
        logits_alone = _logits(task, [number], state, quiet, alone)
        if outline is not None and alone is not None:
            check_precisions(task, outline, alone)
            outlines.append(alone)
        compare_alone(task, logits, number, logits_alone, state)
    return outlines


def check_precisions(task: Task, outline: Outline, alone: Outline) -> None:
    """Refuse a model that computes in another precision in this batch than with one sample, since rounding is no excuse then.

    Raises:
        CoupledSamplesError: If it does.
    """
    together, single = outline.precisions, alone.precisions
    if len(together) != len(single):  # the calls depend on the data
        if set(together) == set(single):
            return
    elif together == single:
        return
    raise other_precisions(task.model, task.size, set(together) ^ set(single))


def check_samples(
    task: Task, logits: Tensor, numbers: Sequence[int], state: ForwardState, quiet: bool
) -> dict[int, int]:
    """Compare the logits of the samples with these numbers, each alone in a batch, with their logits in this batch.

    Returns:
        For each sample the number of the path that it takes through the model alone.

    Raises:
        CoupledSamplesError: If they differ.
    """
    paths: dict[int, int] = {}
    for number in numbers if task.size > 1 else ():
        outline = Outline()
        compare_alone(task, logits, number, _logits(task, [number], state, quiet, outline), state)
        paths[number] = outline.path
    return paths


def check_new_shapes(
    task: Task, logits: Tensor, readers: Sequence[int], state: ForwardState, quiet: bool
) -> Outline | None:
    """Compare one sample alone with this batch, and return the outline of its forward pass.

    It is neither the first nor the last sample, which stay in place if a wrong view regroups the rows of a batch.

    Args:
        task: The batch.
        logits: Its logits ``(N, C)``.
        readers: The samples for which Python reads other values than for the batch; another sample is chosen.
        state: The state of the model before the batch.
        quiet: Whether reentrant checkpoints may warn that they run without gradients.

    Raises:
        CoupledSamplesError: If the logits differ.
    """
    candidates = [number for number in range(task.size) if number not in set(readers)]
    if not candidates:
        return None
    number, outline = _CHOICE.choice(candidates[1:-1] or candidates[-1:]), Outline()
    compare_alone(task, logits, number, _logits(task, [number], state, quiet, outline), state)
    return outline


def check_repeated(task: Task, logits: Tensor, state: ForwardState, quiet: bool) -> None:
    """Compare the logits of one sample alone with those of the same sample twice: the model may treat a batch of one differently.

    Raises:
        CoupledSamplesError: If they differ.
    """
    compare_alone(task, logits, 0, _logits(task, [0, 0], state, quiet)[:1], state)


def chosen_samples(logits: Tensor, count: int) -> list[int]:
    """Return the numbers of three or more samples, random except for the most and the least confident one."""
    numbers = list(range(len(logits)))
    if count >= len(numbers):
        return numbers
    confidence = logits.detach().softmax(1).amax(1).nan_to_num(0.0)
    extremes = {int(confidence.argmax()), int(confidence.argmin())}
    others = [number for number in numbers if number not in extremes]
    return [*extremes, *_CHOICE.sample(others, count - len(extremes))]


def check_halves(task: Task, logits: Tensor, state: ForwardState, quiet: bool, all_pairs: bool = False) -> None:
    """Compare the logits of two random halves of a batch with those in the batch, because the model may branch on its size.

    With several divisions into halves, one for each binary digit of a sample's position, any two samples are once in different
    halves. A sample whose logits depend on another one then has other logits in its half.

    Args:
        task: The batch.
        logits: Its logits ``(N, C)``.
        state: The state of the model before the batch.
        quiet: Whether to silence the warning of reentrant checkpoints about running without gradients.
        all_pairs: Whether to separate all pairs of samples.

    Raises:
        CoupledSamplesError: If they differ.
    """
    if task.size < 2:
        return
    order = _CHOICE.sample(range(task.size), task.size)
    for digit in range((task.size - 1).bit_length() if all_pairs else 1):
        halves: tuple[list[int], list[int]] = ([], [])
        for position, number in enumerate(order):
            halves[position >> digit & 1].append(number)
        for half in halves:
            alone = _logits(task, half, state, quiet)
            for position in different_rows(alone, logits[half].detach())[:1]:
                compare_alone(task, logits, half[position], alone[position : position + 1], state)


def compare_alone(task: Task, logits: Tensor, number: int, alone: Tensor, state: ForwardState) -> None:
    """Compare the logits ``(1, C)`` of one sample alone with its row of the batch's logits ``(N, C)``.

    Raises:
        CoupledSamplesError: If they differ.
    """
    expected = logits[number : number + 1].detach()
    if alone.shape != expected.shape:
        raise rows_not_samples(tuple(alone.shape), 1)
    if close_rows(alone.detach(), expected):
        return
    if _differs_by_rounding(task, logits, number, alone.detach(), state):
        return
    raise _coupled(task, logits, state)


def _differs_by_rounding(task: Task, logits: Tensor, number: int, alone: Tensor, state: ForwardState) -> bool:
    """Return whether rounding at a different batch size explains why a sample has different logits alone.

    Two tests must pass. A batch of the same size that repeats the sample must return the same logits in every row. Rounding
    noise in the inputs of the sample alone must change its logits by as much as the batch does; a model that depends on the
    size of the batch fails this test.
    """
    expected = logits[number : number + 1].detach()
    repeated = _logits(task, [number] * task.size, state, True)
    step = 64 * torch.finfo(logits.dtype).eps
    rows = expected.expand_as(repeated)
    if not torch.allclose(repeated, rows, step, step * float(expected.abs().amax()), equal_nan=True):
        return False
    difference = (alone - expected).abs().amax()
    single = task.picked([number])
    undisturbed = _logits(single, [0], state, True)
    for _ in range(NOISY_RUNS):
        with rounding_noise():
            noisy = _logits(noisy_inputs(single), [0], state, True)
        if bool((noisy - undisturbed).abs().amax() >= difference / 2):
            return True
    return False


NOISY_RUNS = 4
"""How often the logits are computed with rounding noise."""


def check_others(task: Task, logits: Tensor, state: ForwardState, quiet: bool) -> None:
    """Compare each half of a batch's logits with those after replacing the other half, with the same random numbers.

    Args:
        task: The batch.
        logits: Its logits ``(N, C)``.
        state: The state of the model before the batch, with its random number generators.
        quiet: Whether to silence the warning of reentrant checkpoints about running without gradients.

    Raises:
        CoupledSamplesError: If they differ.
    """
    if task.size < 2:
        return
    order = _CHOICE.sample(range(task.size), task.size)
    first, second = order[: task.size // 2], order[task.size // 2 :]
    for kept, replaced in ((first, second), (second, first)):
        samples = list(range(task.size))
        for number in replaced:
            samples[number] = kept[number % len(kept)]
        if not close_rows(_logits(task, samples, state, quiet)[kept], logits[kept].detach()):
            raise _coupled(task, logits, state)


def check_copies(task: Task, logits: Tensor, numbers: Sequence[int], state: ForwardState, quiet: bool) -> None:
    """Compare samples with a batch in which all others are copies of them, with the same random numbers.

    For a model that draws random numbers, this replaces the check of a sample alone: a sample gets the same random numbers
    only at the same place in a batch of the same size.

    Raises:
        CoupledSamplesError: If the logits of such a sample differ.
    """
    for number in numbers if task.size > 1 else ():
        row = slice(number, number + 1)
        if not close_rows(_logits(task, [number] * task.size, state, quiet)[row], logits[row].detach()):
            raise _coupled(task, logits, state)


def _coupled(task: Task, logits: Tensor, state: ForwardState) -> ValueError:
    """Return the error for samples with other logits than in their batch: coupled, or not reproducible."""
    again = _logits(task, list(range(task.size)), state, True)
    if not close_rows(again, logits.detach()):
        return not_reproducible(task.model)
    name = type(task.model).__name__
    where = f"a part of {name} whose computation depends on the data or on the size of the batch"
    return shared_list(task) or coupled_model(where)


def _logits(task: Task, samples: list[int], state: ForwardState, quiet: bool, outline: Outline | None = None) -> Tensor:
    """Return the logits of some samples without the others.

    Args:
        task: The batch.
        samples: The numbers of the samples, repeats allowed.
        state: The state of the model before the batch.
        quiet: Whether reentrant checkpoints may warn that they run without gradients.
        outline: Filled with the calls of the forward pass.

    Raises:
        SampleAxisError: If the model runs on the batch and not on these samples.
    """
    now, picked = ForwardState(task.model), task.picked(samples)
    state.restore()
    try:
        return logits_without_graph(picked, quiet) if outline is None else _recorded(picked, outline, quiet)
    except SampleAxisError as error:
        raise (shared_list(task) or error) from None
    except Exception as error:
        raise (shared_list(task) or not_without_others(task.model, len(samples), task.size, error)) from error
    finally:
        now.restore()


def _recorded(task: Task, outline: Outline, quiet: bool) -> Tensor:
    """Return the logits and record the calls, with gradients enabled as in the forward pass of a batch."""
    outline.leaves = task.leaves()
    with quiet_no_grad(quiet), torch.enable_grad(), Recording(outline):
        logits = task.forward()
    outline.end(logits)
    return logits


def check_objectives(task: Task, logits: Tensor) -> None:
    """Compare each of the user's objectives on random halves and on samples alone with the batch, gradients included.

    The objectives of this package treat each sample separately and are not checked.

    Raises:
        CoupledSamplesError: If they differ.
        ValueError: If an objective cannot be computed on part of the batch.
    """
    for objective in task.objectives:
        if objective.function is not None and task.size > 1:
            _check_objective(task, objective, logits.detach())


def _check_objective(task: Task, objective: Objective, logits: Tensor) -> None:
    everything = _values_and_gradients(objective, logits, task.targets)
    weights = 1 + torch.arange(task.size, device=logits.device) % 3 % 2  # powers of two are exact in half precision too
    weighted = _values_and_gradients(objective, logits, task.targets, weights)
    usual = everything[everything.isfinite().all(1)].abs().sum() / len(everything)
    _require_equal(objective, weighted[:, 1:], everything[:, 1:] * weights.to(everything.dtype)[:, None], usual)
    order = list(range(task.size))
    _CHOICE.shuffle(order)
    # Two halves can agree with the whole batch by chance, for example where a median decides: samples alone rarely do.
    pieces = [order[: task.size // 2], order[task.size // 2 :]]
    for number in order[:_ALONE]:
        pieces.append([number])
    computed: list[Tensor] = []
    for rows in pieces:
        targets = None if task.targets is None else task.targets[rows]
        try:
            computed.append(_values_and_gradients(objective, logits[rows], targets))
        except Exception as error:
            raise ValueError(
                f"the objective {objective.name!r} cannot be computed on {len(rows)} of {task.size} samples "
                f"({type(error).__name__}: {error}). It must accept any number of rows; pass true labels as targets="
            ) from error
    _require_equal(objective, torch.cat(computed), everything[order + order[:_ALONE]], usual)


def _require_equal(objective: Objective, found: Tensor, expected: Tensor, usual: Tensor) -> None:
    """Refuse an objective if its losses or gradients differ by more than rounding, which is relative to ``usual`` in small rows."""
    finite = expected.isfinite().all(1)
    error = (found - expected).abs().amax(1)
    if bool((error > 1e-5 * expected.abs().amax(1) + 1e-10 * usual)[finite].any()):
        raise coupled_objective(objective.name)


def _values_and_gradients(
    objective: Objective, logits: Tensor, targets: Tensor | None, weights: Tensor | None = None
) -> Tensor:
    """Return the losses, and the gradients of their (weighted) sum with respect to the logits, ``(N, 1 + C)``."""
    leaf = at_least_float32(logits).detach().requires_grad_()
    with torch.enable_grad():
        losses = objective.loss(targets)(leaf)
        gradient = torch.zeros_like(leaf)
        if losses.requires_grad:
            total = losses.sum() if weights is None else (losses * weights.to(losses.dtype)).sum()
            (gradient,) = torch.autograd.grad(total, leaf)
    return torch.cat([losses.detach()[:, None].to(gradient.dtype), gradient], 1)

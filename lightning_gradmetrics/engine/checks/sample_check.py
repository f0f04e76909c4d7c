"""Compares the moments of some samples of a batch with autograd on each sample alone."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from lightning_gradmetrics.engine.passes.agreement import (
    SampleNotes,
    agreeing_within,
    gradient_norms,
    random_sample,
)
from lightning_gradmetrics.engine.passes.expected import Expected, consumed
from lightning_gradmetrics.engine.passes.folding import folded_logits
from lightning_gradmetrics.engine.passes.gather import MomentTable
from lightning_gradmetrics.engine.passes.plan import DisagreementError, Plan, PlanError
from lightning_gradmetrics.engine.reference import loss_gradients
from lightning_gradmetrics.engine.refusals import coupled_model
from lightning_gradmetrics.engine.task import Task
from lightning_gradmetrics.engine.tracing.model_state import ForwardState
from lightning_gradmetrics.engine.tracing.outline import Outline, Recording
from lightning_gradmetrics.gradients.precision import rounding
from lightning_gradmetrics.gradients.scaling import rescaled_moments

__all__ = [
    "MOST_VERIFIED",
    "check_draw",
    "check_reader_paths",
    "check_sample",
    "check_some_samples",
    "verify_by_samples",
]

MOST_COMPARED = 1024
"""Largest number of paths of which is stored what was compared."""


def check_some_samples(
    table: MomentTable,
    names: Collection[str],
    laid_out: Task,
    state: ForwardState,
    count: int = 1,
    strict: bool = False,
    readers: Sequence[int] = (),
) -> Outline:
    """Compare the moments of some samples with autograd on each sample alone, and return the outline of a forward pass.

    Several samples include the first and the last one, and are all samples of a small batch; a single one is not among the readers,
    which may take another path through the model. ``strict`` is that of :func:`check_sample`.

    Raises:
        PlanError: If they differ.
    """
    size = table.task.size
    numbers = [random_sample(size, readers)]
    if count > 1:
        numbers = [size - 1, 0, *(range(size) if size <= MOST_VERIFIED else _some_numbers(size, count - 2))]
    outlines = []
    for number in dict.fromkeys(numbers):
        outlines.append(check_sample(table, names, laid_out, state, number, strict))
    return outlines[0]


def verify_by_samples(
    table: MomentTable,
    laid_out: Task,
    state: ForwardState,
    notes: SampleNotes,
    readers: Sequence[int],
    compared: Compared | None,
    suspects: Sequence[int] = (),
) -> Outline:
    """Compare the moments of two samples with autograd on each alone, to verify a plan, and return the outline of the first pass.

    One sample may hide an error, such as a wrong entry of a unit that is off for it. The second one is a reader if there is one,
    because it may take another path through the model alone, and otherwise the last sample, because blocks of rows end there.
    If a gradient is zero for both, the samples follow for which the table says that it is not. All samples of a small batch are
    compared.

    Args:
        table: The filled table of the batch.
        laid_out: The batch in the layout that it ran in.
        state: The state of the model before the batch.
        notes: The notes of the run.
        readers: The samples for which Python would read other values alone.
        compared: Extended by what was compared; ``None`` if all samples take the same path, of which the first pass has the outline.
        suspects: Further samples to compare.

    Raises:
        CoupledSamplesError: If the gradients of a reader are other ones alone.
        PlanError: If they differ, or gradients could not be collected.
    """
    if notes.failures:
        raise PlanError(next(iter(notes.failures.values())))
    size, names = table.task.size, table.task.parameters
    last = size - 1 if notes.sample < size - 1 else 0
    second = next((number for number in readers if number != notes.sample), last)
    outlines: dict[int, Outline] = {}
    numbers = list(dict.fromkeys([notes.sample, second, *suspects]))
    if size <= MOST_VERIFIED:
        numbers = list(dict.fromkeys([*numbers, *range(size)]))
    while numbers:
        for number in numbers:
            if number in readers:
                outlines[number] = _check_reader(table, names, laid_out, state, number, notes=notes)
                continue
            is_outlined = compared is not None or number == notes.sample
            outlines[number] = check_sample(table, names, laid_out, state, number, notes=notes, is_outlined=is_outlined)
        numbers = [] if len(outlines) >= MOST_VERIFIED else _not_zero_for(table, notes, outlines)
    if compared is not None:
        found = _with_gradients(table, names, outlines)
        for number, outline in outlines.items():
            _note_compared(compared, outline.path, found[number])
    return outlines[notes.sample]


def _not_zero_for(table: MomentTable, notes: SampleNotes, seen: Collection[int]) -> list[int]:
    """Return another sample for which the table has a gradient that was zero for all compared samples; none if there is no such sample.

    Such a gradient may also be wrong in the table, so one further sample is compared in any case.
    """
    if not notes.unseen:
        return []
    for objective, name in sorted(notes.unseen):
        moments = table.of_samples(slice(0, table.task.size), [name], objective)
        is_zero = torch.stack([values[:, 0] == 0 for values in moments.values()]).all(0)
        for number in (~is_zero).nonzero()[:, 0].tolist():
            if number not in seen:
                return [number]
    others = [number for number in range(table.task.size) if number not in seen]
    return others[-1:] if len(seen) == 2 else []


def check_draw(table: MomentTable, names: Collection[str], laid_out: Task, state: ForwardState) -> None:
    """Compare the moments of some samples with autograd on the batch, with the same random numbers.

    Raises:
        PlanError: If they differ.
    """
    size = table.task.size
    task = laid_out.restricted(names)
    logits = _logits(table, task, state)
    for number in {0, size - 1, *_some_numbers(size, DRAWN)}:
        if not _agree_on_sample(table, number, task, logits, number):
            raise _disagreement()


def _some_numbers(size: int, count: int) -> list[int]:
    numbers: list[int] = torch.randint(size, (count,), generator=_GENERATOR).tolist()
    return numbers


def check_sample(
    table: MomentTable,
    names: Collection[str],
    laid_out: Task,
    state: ForwardState,
    number: int,
    strict: bool = False,
    notes: SampleNotes | None = None,
    is_outlined: bool = True,
) -> Outline:
    """Compare one sample's moments with autograd on that sample alone, and return the outline of its forward pass.

    Raises:
        PlanError: If they differ.

    Rounding differs between one sample and a batch, and may switch a ReLU on or off. If the two are close but do not
    agree, autograd on it and one other sample decides, in the layout and with the folds of the batch, because it usually has
    the same active ReLUs as the table. If it does not agree either, autograd on the batch's own forward pass decides.
    With ``strict``, the sample alone must agree: custom functions and hooks could change the gradients of other passes too.
    With ``is_outlined=False``, the outline is empty, which saves a mode in the forward pass.
    """
    alone = table.task.rows(number, number + 1).restricted(names)
    outline = Outline(alone.leaves() if is_outlined else None)
    gates = max(GATES, 5 * rounding(next(iter(alone.parameters.values()))))
    logits = _logits(table, alone, state, Recording(outline) if is_outlined else None)
    agrees, is_close = _agreement(table, number, alone, logits, 0, (None, None if strict else gates), notes)
    del logits
    if agrees or (is_close and _agrees_as_it_ran(table, number, laid_out.restricted(names), state, notes)):
        return outline
    raise _disagreement(number)


def _disagreement(sample: int | None = None) -> DisagreementError:
    """Return the error for a sample whose moments in a batch are not those of its gradients alone."""
    return DisagreementError("the gradients of a sample disagree with autograd", sample)


def _agrees_as_it_ran(
    table: MomentTable, number: int, laid_out: Task, state: ForwardState, notes: SampleNotes | None
) -> bool:
    """Return whether a sample's moments agree with autograd in the layout and with the folds of the batch.

    Two samples usually have the rounding of the batch, unlike one, for which products of matrices are computed in another way.
    """
    if laid_out.size > 2 and (table.folded is not None or laid_out.inputs is not table.task.inputs):
        first = min(number, laid_out.size - 2)
        pair = laid_out.rows(first, first + 2)
        try:
            logits = _logits(table, pair, state, plan=table.folded)
            if _agree_on_sample(table, number, pair, logits, number - first, notes):
                return True
            del logits
        except PlanError:  # without the others, Python may read another value
            pass
    logits = _logits(table, laid_out, state, plan=table.folded)
    return _agree_on_sample(table, number, laid_out, logits, number, notes)


Compared = dict[int, set[tuple[int, str]]]
"""For each path that samples take alone, by its number, the objectives and parameters whose gradients were compared."""


def check_reader_paths(
    table: MomentTable,
    names: Collection[str],
    laid_out: Task,
    state: ForwardState,
    paths: Mapping[int, int],
    compared: Compared,
) -> None:
    """Compare the moments of samples whose path was not compared before, or only with gradients of zero.

    A gradient of zero is the same on a path that detaches it.

    Args:
        table: The filled table of the batch.
        names: The parameters.
        laid_out: The batch in the layout that it ran in.
        state: The state of the model before the batch.
        paths: The path of each sample alone, by the number of the sample.
        compared: What was compared; it is extended.

    Raises:
        CoupledSamplesError: If the gradients of a sample alone are other ones.
        PlanError: If the table is wrong.
    """
    found = _with_gradients(table, names, paths)
    for number, path in paths.items():
        if not found[number] <= compared.get(path, set()):
            _check_reader(table, names, laid_out, state, number)
            _note_compared(compared, path, found[number])


def _note_compared(compared: Compared, path: int, found: set[tuple[int, str]]) -> None:
    """Extend what was compared on a path."""
    if len(compared) >= MOST_COMPARED:
        compared.clear()
    compared.setdefault(path, set()).update(found)


def _with_gradients(
    table: MomentTable, names: Collection[str], numbers: Collection[int]
) -> dict[int, set[tuple[int, str]]]:
    """Return for some samples the objectives and parameters whose gradients are not zero."""
    found: dict[int, set[tuple[int, str]]] = {number: set() for number in numbers}
    for objective in range(len(table.task.objectives)) if found else ():
        moments = table.of_samples(slice(0, table.task.size), names, objective)
        is_there = torch.stack([values[list(found)] != 0 for values in moments.values()]).any(0).tolist()
        for entries, flags in zip(found.values(), is_there, strict=True):
            entries.update((objective, name) for name in itertools.compress(names, flags))
    return found


def _check_reader(
    table: MomentTable,
    names: Collection[str],
    laid_out: Task,
    state: ForwardState,
    number: int,
    notes: SampleNotes | None = None,
) -> Outline:
    """Compare the moments of a sample for which Python would read another value alone, and return the outline of its forward pass.

    It may take another path through the model alone, with the same logits but with other gradients.

    Raises:
        CoupledSamplesError: If the table has the gradients of the batch, but those of the sample alone are different.
        PlanError: If the table is wrong.
    """
    try:
        return check_sample(table, names, laid_out, state, number, notes=notes)
    except PlanError:
        together = laid_out.restricted(names)
        logits = _logits(table, together, state, plan=table.folded)
        if not _agree_on_sample(table, number, together, logits, number, notes=notes):
            raise
    raise coupled_model(f"the backward pass of {type(table.task.model).__name__}")


def _logits(
    table: MomentTable, task: Task, state: ForwardState, recording: Recording | None = None, plan: Plan | None = None
) -> Tensor:
    """Return the logits with their graph, by a forward pass with the folds of a plan if there is one.

    All parameters of the table require gradients: the backward pass of a custom function may depend on which of its inputs do.
    """
    for parameter in table.task.parameters.values():
        parameter.requires_grad_(True)
    now = ForwardState(task.model)
    state.restore()
    with recording or nullcontext():
        logits = task.forward() if plan is None else folded_logits(plan, task)
    if recording is not None:
        recording.outline.end(logits)
    now.restore()
    return logits


def _agree_on_sample(
    table: MomentTable, number: int, task: Task, logits: Tensor, row: int, notes: SampleNotes | None = None
) -> bool:
    """Return whether a sample's moments agree with autograd's; the sample is one row of a task's logits."""
    return _agreement(table, number, task, logits, row, (None,), notes)[0]


def _agreement(
    table: MomentTable,
    number: int,
    task: Task,
    logits: Tensor,
    row: int,
    tolerances: Sequence[float | None],
    notes: SampleNotes | None = None,
) -> list[bool]:
    """Return for each tolerance whether a sample's moments agree with autograd's; ``None`` is that of rounding."""
    parameters = list(task.parameters.values())
    agrees = [True] * len(tolerances)
    for objective in range(len(task.objectives)):
        losses, undo = task.unit_losses(objective, logits)
        own = undo[row : row + 1].double()
        factor = torch.where(own > LEAST_SCALE, 1 / own, 1.0)
        shrunk = float(own * factor)
        # Scaled moments are compared: squares of a confident sample's own gradient underflow in float32.
        moments = rescaled_moments(table.of_samples(slice(number, number + 1), task.parameters, objective), factor)
        if shrunk == 1:
            expected = Expected.of_loss(losses[row], parameters, moments)
            norms = expected.norms()
        else:
            gradients = loss_gradients(losses[row], parameters)
            norms = gradient_norms(gradients)
            expected = Expected.of(consumed(gradients, shrunk), moments)
        scales = [1e-2 * shrunk * max(norms)] * len(norms)
        if notes is not None:
            scales = notes.scales_of(task.parameters, scales, shrunk)
            notes.add_gradients(objective, task.parameters, norms)
        for place, close in enumerate(agreeing_within(moments, expected, scales, tolerances)):
            agrees[place] = agrees[place] and bool(close.all())
        if not any(agrees):
            break
    return agrees


LEAST_SCALE = 2.0**-400
"""The smallest gradient scale whose squares are exact enough in float64; smaller gradients are compared unscaled."""

GATES = 0.05
"""Largest relative error that ReLUs switched by rounding may explain; larger in low precision."""

MOST_VERIFIED = 6
"""Largest number of samples that are compared to verify a plan; all samples of a batch that is not larger."""

DRAWN = 2
"""Number of samples that are compared in a batch with random numbers, besides the first and the last one."""

_GENERATOR = torch.Generator().manual_seed(0)

"""Probes a model before the first batch: runs it on two and on three samples, and with each sample replaced in turn."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from lightning_gradmetrics.classifier.forward import tensors_in
from lightning_gradmetrics.classifier.norm_gradients import is_instance_norm
from lightning_gradmetrics.engine.inputs.samples import input_shapes
from lightning_gradmetrics.engine.kernels.operators import traced_operators
from lightning_gradmetrics.engine.passes.folding import can_lay_out, find_folds
from lightning_gradmetrics.engine.passes.plan import Plan, PlanError
from lightning_gradmetrics.engine.passes.selects import has_repeated_selects
from lightning_gradmetrics.engine.planning.backward_code import MAY_COMBINE
from lightning_gradmetrics.engine.planning.backward_proof import backward_findings
from lightning_gradmetrics.engine.planning.findings import Traced, findings_of, without_proof
from lightning_gradmetrics.engine.planning.planned_sorts import has_groups, planned_sorts
from lightning_gradmetrics.engine.planning.planned_values import planned_reads
from lightning_gradmetrics.engine.planning.probe_samples import parts_of_batch, three_samples
from lightning_gradmetrics.engine.planning.replaced_samples import Runs, changes_by_sample
from lightning_gradmetrics.engine.planning.step_layouts import Changes
from lightning_gradmetrics.engine.planning.steps import make_plan
from lightning_gradmetrics.engine.refusals import coupled_model
from lightning_gradmetrics.engine.task import Task
from lightning_gradmetrics.engine.tracing.dependence import DependenceTrace, Operation, reads_activations, uses_totals
from lightning_gradmetrics.engine.tracing.graph import runs_custom_code
from lightning_gradmetrics.engine.tracing.host_reads import PlannedRead
from lightning_gradmetrics.engine.tracing.layouts import Layout
from lightning_gradmetrics.engine.tracing.model_state import ForwardState, attribute_key, note_volatile
from lightning_gradmetrics.engine.tracing.outline import HOOKS, Outline, Recording
from lightning_gradmetrics.engine.tracing.size_record import SizeRecord, size_record
from lightning_gradmetrics.engine.tracing.sorts import GROUPED_PRODUCTS
from lightning_gradmetrics.engine.tracing.trace import CallTrace

__all__ = ["Probe", "probe_model"]


@dataclass(frozen=True)
class Probe:
    """The result of a probe.

    Args:
        task: Three samples of the batch.
        logits: Their logits ``(3, C)`` with the graph.
        after: The state of the model after their forward pass, which their backward pass needs.
        plan: The plan; ``None`` if the calls or the order of rows depend on the data.
        reads_activations: Whether Python, or a torch call itself, reads a value that depends on samples and parameters.
        alone_because: Why each sample must run alone; empty if there is no reason.
        proven: Whether every operation is known to keep the samples apart, while Python reads the same values.
        mixes: Whether an operation works along the sample axis, although the samples of the probe do not change each other.
        reads: The values that Python reads from tensors.
        sizes: The sizes for which the proof holds; ``None`` if it holds for those of the probe only.
        random: Whether it draws random numbers.
        pauses_gradients: Whether a part of it runs without gradients, as reentrant activation checkpoints do.
        bytes: Approximate memory of one sample's activations.
        parts: The logits of two and of all three samples, with their numbers in the batch; empty if a sample is not in the batch.
        operations: The names of all basic operations.
    """

    task: Task
    logits: Tensor
    after: ForwardState
    plan: Plan | None
    reads_activations: bool
    alone_because: str
    proven: bool
    mixes: bool
    reads: tuple[PlannedRead, ...]
    sizes: SizeRecord | None
    random: bool
    pauses_gradients: bool
    bytes: int
    parts: tuple[tuple[Sequence[int], Tensor], ...]
    operations: frozenset[str]

    @cached_property
    def losses(self) -> list[tuple[Tensor, Tensor]]:
        """For each objective the scaled losses ``(3,)`` with their graph, and the factors that undo the scale."""
        return [self.task.unit_losses(index, self.logits) for index in range(len(self.task.losses))]

    @property
    def reads_samples(self) -> bool:
        """Whether Python reads values that depend on the samples."""
        return any(read.by_samples for read in self.reads)


def probe_model(task: Task) -> Probe:
    """Return the probe of a model on some samples of a batch.

    Raises:
        CoupledSamplesError: If the samples depend on each other.
    """
    state, before = ForwardState(task.model, task.record), attribute_key(task.model, task.record)
    three = three_samples(task)
    for whole in (GROUPED_PRODUCTS, frozenset()):
        two, traced = _traced(three.picked([0, 1]), state, whole), _traced(three, state, whole)
        random, after = state.random_numbers_drawn(), ForwardState(task.model)
        note_volatile(task.model, before, attribute_key(task.model))
        state.restore()
        found = findings_of(three, two, traced, state, random)
        meeting = _meeting_parameters(two.calls, traced.calls) - found.unused
        sorts = planned_sorts(found, traced, meeting)
        if sorts is None:
            found = without_proof(found)
        if sorts is not None or not has_groups(traced):
            break
    (small, _, _, outline_of_two), (large, logits, many, outline_of_three) = two, traced
    if found.selection:
        raise coupled_model(f"{found.selection!r} of the samples in {type(task.model).__name__}")
    layouts = found.layouts
    reads = planned_reads(small, large, many, layouts or {})
    sizes, combines = None, False
    if layouts is not None:
        sizes = size_record(outline_of_two, outline_of_three, input_shapes(three))
    if runs_custom_code(logits):
        combines, backward = (False, None) if random else backward_findings(two, traced, found.operations, three)
        sizes = None if sizes is None or backward is None else replace(sizes, backward=backward)
    plan: Plan | None = None
    changes: Changes | None = ()
    meeting -= (sorts or {}).keys()
    if layouts is None or not _one_position_each(small, large, meeting):
        changes = None if layouts is None else _changes_by_layout(small, large, many, layouts, meeting)
        if changes is None:
            changes = changes_by_sample(Runs(three, small, large, state), logits, found.is_by_data, meeting)
    if changes is not None and not found.is_by_data:
        try:
            plan = make_plan(small, large, lambda: three.unit_losses(0, logits)[0][0], changes, found.unused, sorts)
        except (PlanError, ValueError):
            layouts = None if sorts else layouts  # each batch of the plan would compare groups with the sort
    if plan is not None and plan.undecided:  # on an axis with several positions per sample the order of rows is unknown
        plan = None
    if plan is not None:
        plan = replace(
            plan,
            reads=reads,
            masks=found.masks,
            folds={} if sizes is None else find_folds(plan, large, many, three),
            lays_out=sizes is not None and not random and can_lay_out(plan, large, many),
            selects=has_repeated_selects(large),
            follows_backward=sizes is not None and sizes.backward is not None,
            normalises_images=any(map(_normalises_images, many.operations)),
            normalises_instances=any(is_instance_norm(call.function) for call in large.calls),
        )
    alone = "a number computed from all samples enters the forward pass" if uses_totals(found.operations[1]) else ""
    if outline_of_three.has_hooks:
        alone = HOOKS
    elif combines:
        alone = MAY_COMBINE
    return Probe(
        three,
        logits,
        after,
        plan,
        reads_activations=found.reads_inside or reads_activations(many.operations),
        alone_because=alone,
        proven=layouts is not None,
        mixes=found.mixes,
        reads=reads,
        sizes=sizes,
        random=random,
        pauses_gradients=large.pauses_gradients,
        bytes=large.bytes() // 3 + 1,
        parts=parts_of_batch(task, two.logits, logits),
        operations=frozenset(operation.name for operation in many.operations),
    )


def _normalises_images(operation: Operation) -> bool:
    return "batch_norm" in operation.name and max(map(len, operation.inputs), default=0) > 3


def _one_position_each(small: CallTrace, large: CallTrace, meeting: Collection[int]) -> bool:
    """Return whether every tensor at a call with parameters has one position per sample, so that the order is unambiguous."""
    if len(small.calls) != len(large.calls):
        return False
    for number in meeting:
        before, after = small.calls[number], large.calls[number]
        for two, three in zip((*before.inputs, *before.outputs), (*after.inputs, *after.outputs), strict=False):
            if not _has_one_position(two.shape, three.shape):
                return False
    return True


def _has_one_position(two: Sequence[int], three: Sequence[int]) -> bool:
    """Return whether a tensor has no sample axis, or a sample axis as long as the batch."""
    lengths = []
    for short, long in zip(two, three, strict=False):
        if short != long:
            lengths.append(long)
    return lengths in ([], [3])


def _meeting_parameters(small: CallTrace, large: CallTrace) -> set[int]:
    """Return the numbers of the calls with a parameter, or a tensor made from parameters alone, among their arguments."""
    numbers = set()
    for number, (before, after) in enumerate(zip(small.calls, large.calls, strict=False)):
        for two, three in zip(before.inputs, after.inputs, strict=False):
            if three.serial in large.names or (three.requires_grad and two.shape == three.shape):
                numbers.add(number)
    return numbers


def _traced(task: Task, state: ForwardState, whole: frozenset[Any]) -> Traced:
    """Return a traced forward pass with its graph; some functions are not decomposed."""
    _require_gradients(task)
    state.restore()
    samples = [t for t, flag in zip(tensors_in(task.inputs), task.per_sample, strict=True) if flag]
    recording = Recording(Outline(task.leaves()))
    recording.outline.places = {}
    dependence = DependenceTrace(samples, task.all_parameters, recording)
    trace = CallTrace(task.parameters, on_read=dependence.note_read)
    trace.whole = whole
    with traced_operators(), dependence, trace, recording:
        logits = task.forward()
    return Traced(trace, logits, dependence, recording.outline.end(logits))


def _require_gradients(task: Task) -> None:
    for parameter in task.all_parameters:
        parameter.requires_grad_(False)
    for parameter in task.parameters.values():
        parameter.requires_grad_(True)


def _changes_by_layout(
    small: CallTrace,
    large: CallTrace,
    operations: DependenceTrace,
    layouts: Mapping[int, Layout],
    meeting: Collection[int],
) -> Changes | None:
    """Return the positions that change with each sample, from proven layouts; ``None`` if a call has no proven layout.

    Calls whose tensors all have one position per sample need no layout.
    """
    changes: list[Sequence[Tensor | None]] = [()] * len(large.calls)
    for number in meeting:
        before, after = small.calls[number], large.calls[number]
        tensors = [*tensors_in((after.args, after.kwargs)), *tensors_in(after.result)]
        shapes = [state.shape for state in (*before.inputs, *before.outputs)]
        if [tuple(tensor.shape) for tensor in tensors] != [state.shape for state in (*after.inputs, *after.outputs)]:
            return None  # an axis was moved in place
        rows: list[Tensor | None] = []
        several = 0
        for tensor, shape in zip(tensors, shapes, strict=True):
            layout = layouts.get(operations.serial(tensor))
            rows.append(None if layout is None else layout.positions(tensor))
            several += not _has_one_position(shape, tensor.shape)
        if several and all(row is None for row in rows):
            return None
        changes[number] = rows
    return changes

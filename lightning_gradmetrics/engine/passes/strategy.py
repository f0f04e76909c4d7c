"""How a model is handled, and the fast ways of running it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

from lightning_gradmetrics.classifier.notices import RANDOM, first_time
from lightning_gradmetrics.engine.passes.agreement import VerificationNotes
from lightning_gradmetrics.engine.passes.collecting_pass import CollectingPass
from lightning_gradmetrics.engine.passes.folding import FoldingTracer
from lightning_gradmetrics.engine.passes.gather import MomentTable
from lightning_gradmetrics.engine.passes.known_calls import KnownPath
from lightning_gradmetrics.engine.passes.known_path import DirectPass, KnownTracer
from lightning_gradmetrics.engine.passes.large_path import LargePass
from lightning_gradmetrics.engine.passes.owners import OwnershipPass
from lightning_gradmetrics.engine.passes.path_check import PathChanged
from lightning_gradmetrics.engine.passes.path_record import MOST_BYTES, PathRecorder
from lightning_gradmetrics.engine.passes.plan import Plan
from lightning_gradmetrics.engine.passes.row_sums import RowSums
from lightning_gradmetrics.engine.passes.selects import SelectsRefused, joined_selects
from lightning_gradmetrics.engine.passes.tracer import Tracer
from lightning_gradmetrics.engine.task import Task
from lightning_gradmetrics.engine.tracing.backward_calls import recorded_backward
from lightning_gradmetrics.engine.tracing.graph import reached_parameters
from lightning_gradmetrics.engine.tracing.outline import Outline
from lightning_gradmetrics.engine.tracing.size_record import SizeRecord

__all__ = [
    "EVERY_SAMPLE",
    "Checks",
    "Strategy",
    "collect_fast",
    "collect_on_path",
    "freeze",
    "unchecked",
    "warn_random",
    "warn_slow",
]

ALONE_IF_PLANNED, ALONE_IF_UNPLANNED = 1, 3
"""Number of samples of each batch that also run alone, to detect samples that depend on each other."""

EVERY_SAMPLE = 10**9

MOST_PATHS = 64
"""Largest number of combinations of input shapes and batch size for which the calls are stored."""

LONGEST_PAUSE = 64
"""Largest number of batches after a change of the calls until they are recorded again."""

Checks = Callable[[Tensor, CollectingPass], None]
"""Gets the logits of a batch, and the tracer of the forward pass."""


def unchecked(logits: Tensor, tracer: CollectingPass) -> None:
    """Accept logits that have been checked before."""


@dataclass
class Strategy:
    """How the engine handles a model.

    Args:
        plan: The plan; ``None`` identifies the owners of rows in every batch.
        fast: The parameters that the plan or the owners handle, verified on the probe.
        slow: The other parameters, with reasons.
        mapped: Whether the slow parameters can be mapped over the samples, verified on the probe.
        alone: The number of samples of each batch that also run alone.
        bytes: Approximate memory of a sample's activations, to split batches by.
        shapes: The shapes of the inputs that it was planned for.
        times: For each combination of input shapes, batch size and outline number, the number of positions of a sample on
            each axis, and whether the proof covers the batch.
        quiet: Whether to silence the warnings of torch's checkpoints in runs without gradients.
        random: Whether the model draws random numbers, so that a sample alone gets different ones.
        provisional: Whether it was planned on fewer than three different samples.
        channels_last: Whether images use the channels-last layout.
        sizes: The sizes for which every operation is known to keep the samples apart, while Python reads the same values;
            ``None`` if that is not known.
        path: A number for the path of the probe's forward pass.
        reads: How often Python read values of tensors in it.
        verified: Whether the plan was compared with autograd; if it was not on the probe, this is done in the first batch.
        parts: Until then, the logits of some samples of that batch without the others, with their numbers.
        failed: The number of the sample of the first batch for which an earlier plan was wrong; it is compared again.
        settled: Whether gradients were compared with autograd in a covered batch, and need no further comparison.
        reads_samples: Whether Python reads values that depend on the samples.
        compared: Which gradients of samples were compared on each path that samples take alone.
        mixes: Whether an operation may work along the sample axis, so that the rows of every batch are checked.
        turn: Counts the batches of which one sample was checked, so that each batch checks another one.
        paths: For combinations of input shapes and batch size, the calls of the forward pass.
        pauses: For those without a known path, the number of batches before one is recorded, and the length of the pause.
        in_place: Whether calls on a large path may change results of layers in place: until a model uses such a result.
        has_small_gradients: Whether all gradients of one sample can be stored together; ``None`` if it is not known.
    """

    plan: Plan | None
    fast: tuple[str, ...] = ()
    slow: Mapping[str, str] = field(default_factory=dict)
    mapped: bool = False
    alone: int = ALONE_IF_UNPLANNED
    bytes: int = 1
    shapes: Any = None
    times: dict[tuple[Any, int], dict[int, tuple[tuple[int, ...], bool]]] = field(default_factory=dict)
    quiet: bool = False
    random: bool = False
    provisional: bool = False
    channels_last: bool = False
    sizes: SizeRecord | None = None
    path: int = 0
    reads: int = 0
    verified: bool = True
    parts: tuple[tuple[Sequence[int], Tensor], ...] = ()
    failed: int | None = None
    settled: bool = False
    reads_samples: bool = False
    compared: dict[int, set[tuple[int, str]]] = field(default_factory=dict)
    mixes: bool = False
    turn: int = 0
    paths: dict[tuple[Any, int], KnownPath] = field(default_factory=dict)
    pauses: dict[tuple[Any, int], tuple[int, int]] = field(default_factory=dict)
    in_place: bool = True
    has_small_gradients: bool | None = None

    def recorder(self, task: Task, here: tuple[Any, int]) -> PathRecorder | None:
        """Return a recorder for a batch, if earlier batches of its shapes made calls that the proof covers, and no pause holds.

        Python must read no values that depend on the samples.
        """
        verified = self.times.get(here, {})
        if here in self.paths or not verified or self.plan is None or self.plan.reads is None:
            return None
        if any(read.by_samples for read in self.plan.reads) or self.plan.sorts:
            return None
        if self.random or self.quiet or self.plan.follows_backward or bool(self.slow) or task.memory is not None:
            return None
        if len(verified) > 1 and here not in self.pauses:
            self.drop_path(here)
        remaining, length = self.pauses.get(here, (0, 0))
        if remaining:
            self.pauses[here] = remaining - 1, length
            return None
        folds = self.folds(task)
        in_place = self.in_place and next(iter(task.parameters.values())).is_cpu
        if _get_current_function_mode_stack():  # type: ignore[no-untyped-call]
            in_place = False  # the mode of the caller must see the calls of the model
        return PathRecorder(task, folds, folds and self.plan.lays_out, len(self.plan.reads), in_place)

    def folds(self, task: Task) -> bool:
        """Return whether to fold batch norms into convolutions, or to change the layout of images.

        This depends on the size of the batch only, so the same batch has the same results again.
        """
        return self.plan is not None and self.plan.changes_layers and self.bytes * task.size > MOST_BYTES

    def add_path(self, here: tuple[Any, int], path: KnownPath | None) -> None:
        """Store the calls of batches of these shapes; begin a pause if they are not known."""
        if path is None:
            self.drop_path(here)
            return
        self.paths[here] = path
        if len(self.paths) > MOST_PATHS:
            del self.paths[next(iter(self.paths))]

    def drop_path(self, here: tuple[Any, int]) -> None:
        """Forget the calls of batches of these shapes, which have changed, and record none for a number of batches.

        The number doubles each time, so that a single other batch costs little, and so does a model that changes in every batch.
        """
        self.paths.pop(here, None)
        _, length = self.pauses.pop(here, (0, 1))
        length = min(2 * length, LONGEST_PAUSE)
        self.pauses[here] = length - 1, length
        if len(self.pauses) > MOST_PATHS:
            del self.pauses[next(iter(self.pauses))]


def warn_slow(model: nn.Module, slow: Mapping[str, str], mapped: bool) -> None:
    """Warn about parameters without a fast rule, once per model and parameter.

    Args:
        model: The model.
        slow: The parameters, with reasons.
        mapped: Whether they were mapped over the samples.
    """
    by_reason: dict[str, list[str]] = {}
    for name, reason in slow.items():
        if first_time(model, ("slow", name)):
            by_reason.setdefault(reason, []).append(name)
    if by_reason:
        rows = [f"{', '.join(names)} ({reason})" for reason, names in by_reason.items()]
        way = "by torch.func.vmap, checked against autograd on a probe" if mapped else "one sample at a time"
        warnings.warn(
            f"no fast rule for these parameters of {type(model).__name__}, whose gradients are computed {way}, which is "
            f"slower: {'; '.join(rows)}",
            stacklevel=2,
        )


def warn_random(model: nn.Module) -> None:
    """Warn once that a model draws random numbers."""
    if not first_time(model, RANDOM):
        return
    warnings.warn(
        f"{type(model).__name__} draws random numbers in its forward pass (dropout left on, noise, stochastic depth). Its gradients "
        "are those of one draw for the whole batch, the same in every call with the same state of torch's generators. If that is "
        "not intended, call model.eval() or make the forward pass deterministic",
        stacklevel=2,
    )


# -- running the fast methods -----------------------------------------------------------------------------------------


def collect_fast(
    table: MomentTable,
    task: Task,
    plan: Plan | None,
    checks: Checks,
    notes: VerificationNotes | None = None,
    free: bool = False,
    recorder: PathRecorder | None = None,
    folds: bool = False,
    rows: RowSums | None = None,
) -> tuple[tuple[int, ...], Outline]:
    """Fill a table by one forward pass and one backward pass per objective (two without a plan).

    Args:
        table: The table to fill.
        task: The batch, restricted to the parameters to collect for.
        plan: The plan; ``None`` recovers the owners of rows.
        checks: Gets the logits and the tracer before any gradient is computed.
        notes: Filled in a run that verifies a plan.
        free: Whether axes may have a different number of positions per sample than planned.
        recorder: Gets the calls.
        folds: Whether to fold batch norms into convolutions.
        rows: Gets the sums of all samples' gradients from other formulas.

    Returns:
        The positions of a sample on each axis, and the calls.

    Raises:
        FoldRefused: If the model uses the output of a folded convolution.
        PlanError: If the model does not follow the plan, or rows have no single owner.
        SelectsRefused: If the model changes a selected entry of a tensor in place.
    """
    freeze(task)
    tracer: CollectingPass
    sink = table.add if rows is None else rows.sink(table.add)
    if plan is None:
        tracer = OwnershipPass(task.parameters, task.size, sink, task.model.buffers())
    elif folds and plan.changes_layers:
        tracer, table.folded = FoldingTracer(plan, task, sink, free), plan
    else:
        tracer = Tracer(plan, plan.known_parameters(task.model, task.parameters), task.size, sink, free)
    tracer.recorder = recorder
    tracer.notes, tracer.rows, tracer.outline.leaves = notes, rows, task.leaves()
    if plan is not None and plan.follows_backward:
        tracer.outline.places = {}
    if isinstance(tracer, FoldingTracer):
        logits = tracer.forward(task)
    elif notes is None or not notes.finds_uses:
        with joined_selects() if plan is not None and plan.selects else nullcontext(), tracer:
            logits = task.forward(plan is None or plan.repairs_norms(task.size))
    else:
        logits = _forward_with_notes(task, tracer, notes)
    tracer.outline.end(logits)
    tracer.require_masks()
    if recorder is not None:
        recorder.end(tracer.outline, logits)
    try:
        checks(logits, tracer)
        _collect_gradients(table, task, tracer, logits)
    finally:
        tracer.outline.places = None  # hooks of the graph refer to the outline
    return tuple(tracer.times), tracer.outline


def collect_on_path(
    table: MomentTable, task: Task, plan: Plan, checks: Callable[[Tensor], None], path: KnownPath, free: bool = False
) -> None:
    """Fill a table as :func:`collect_fast` does, by a forward pass that must make known calls.

    Args:
        table: The table to fill.
        task: The batch, restricted to the parameters to collect for.
        plan: The plan.
        checks: Gets the logits before any gradient is computed.
        path: The calls.
        free: Whether axes may have a different number of positions per sample than planned.

    Raises:
        PlanError: If the model does not follow the plan.
        PathChanged: If it does not follow the path.
    """
    freeze(task)
    tracer: DirectPass | KnownTracer
    if path.is_direct:
        tracer = (LargePass if path.is_large else DirectPass)(path, task, table.add)
    else:
        tracer = KnownTracer(plan, table.add, path, task, free)
    try:
        with joined_selects() if path.is_large and plan.selects else nullcontext(), tracer:
            logits = task.forward(plan.repairs_norms(task.size))
        tracer.require_end(logits)
    except Exception as error:
        # The model may have replaced the error. An ordinary pass raises the errors of the model again.
        if tracer.is_lost or path.changes_layers or isinstance(error, SelectsRefused):
            raise PathChanged from error
        raise
    finally:
        tracer.release()
    checks(logits)
    _collect_gradients(table, task, tracer, logits, table.task.merged)


def _collect_gradients(
    table: MomentTable, task: Task, tracer: CollectingPass | DirectPass, logits: Tensor, merged: bool = False
) -> None:
    """Fill a table by one backward pass per objective; if ``merged``, only with moments over all parameters."""
    scaled = [task.unit_gradient(index, logits) for index in range(len(table.task.objectives))]
    rows, outline = (tracer.rows, tracer.outline) if isinstance(tracer, CollectingPass) else (None, None)
    for index, (gradient, undo) in enumerate(scaled):
        table.begin(index, undo)
        if rows is not None:
            rows.begin(index, undo)
        with nullcontext() if outline is None or outline.places is None else recorded_backward(outline, logits):
            tracer.collect(logits, gradient, last=index == len(scaled) - 1)
    table.finish(merged)
    if rows is not None:
        rows.finish()


def freeze(task: Task) -> None:
    """Let no parameter of the model require gradients."""
    for parameter in task.all_parameters:
        if parameter.requires_grad:
            parameter.requires_grad_(False)


def _forward_with_notes(task: Task, tracer: CollectingPass, notes: VerificationNotes) -> Tensor:
    """Return the logits, and record parameters that are used outside of calls of torch functions.

    The tracer replaces parameters in every call that it intercepts. If the graph still reaches one, a use was missed.
    """
    for parameter in task.parameters.values():
        parameter.requires_grad_(True)
    with tracer:
        logits = task.forward()
    for name in reached_parameters(logits, task.parameters):
        notes.failures[name] = "it is used outside of torch functions, as in a custom autograd function"
    for parameter in task.parameters.values():
        parameter.requires_grad_(False)
    return logits

"""The checks of one batch for samples that depend on each other."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_gradmetrics.engine.checks.backward_check import covers_backward
from lightning_gradmetrics.engine.checks.guards import (
    check_alone,
    check_copies,
    check_halves,
    check_new_shapes,
    check_objectives,
    check_others,
    check_precisions,
    check_repeated,
    check_samples,
    chosen_samples,
)
from lightning_gradmetrics.engine.inputs.samples import are_rows_of, input_shapes
from lightning_gradmetrics.engine.passes.agreement import SampleNotes
from lightning_gradmetrics.engine.passes.collecting_pass import CollectingPass
from lightning_gradmetrics.engine.passes.plan import PlanError
from lightning_gradmetrics.engine.passes.strategy import EVERY_SAMPLE, Strategy
from lightning_gradmetrics.engine.task import Task
from lightning_gradmetrics.engine.tracing.graph import runs_custom_code, runs_users_code
from lightning_gradmetrics.engine.tracing.model_state import ForwardState
from lightning_gradmetrics.engine.tracing.outline import HOOKS, Outline

__all__ = ["BatchChecks"]

ALONE_IF_NEW = 3
"""Number of samples that run alone in the first batch of each shape, since the model may branch on the shape."""


class BatchChecks:
    """The checks of one batch for samples that depend on each other.

    Args:
        task: The batch.
        strategy: How the model is handled.
        state: The state of the model before the batch.

    Attributes:
        logits: The logits of the forward passes so far.
        is_covered: Whether the proof that samples are kept apart covers the batch.
        hides_gradients: Whether custom functions may change gradients by the data of the batch.
        readers: The samples for which Python would read other values alone; they may take another path through the model.
        reader_paths: For each reader the number of the path that it takes alone.
        notes: The notes of a run that verifies the plan, if it is one.
    """

    def __init__(self, task: Task, strategy: Strategy, state: ForwardState) -> None:
        self.task, self.strategy, self.state = task, strategy, state
        self.here = (input_shapes(task), task.size)
        self.is_new = self.here not in strategy.times
        self.logits: list[Tensor] = []
        self.is_covered = self.hides_gradients = False
        self.readers: Sequence[int] = ()
        self.reader_paths: dict[int, int] = {}
        self.notes: SampleNotes | None = None

    def __call__(self, logits: Tensor, tracer: CollectingPass | None = None) -> None:
        """Check the logits of the batch.

        Raises:
            CoupledSamplesError: If samples depend on each other.
            PlanError: If hooks on tensors may change gradients, if an assumption on the inputs is wrong, or if the proof does not
                cover the batch and the plan is unverified.
        """
        task, strategy = self.task, self.strategy
        if tracer is not None and tracer.outline.has_hooks:
            raise PlanError(HOOKS)
        self._confirm_inputs(logits.detach())
        self.logits.append(logits.detach())
        check_objectives(task, logits)
        self.readers = readers = [] if tracer is None else tracer.reads.differing()
        if self.notes is not None:
            self.notes.avoid(readers)
        if tracer is not None:
            self.is_covered = self._covers(logits, tracer, readers)
        if not self.is_covered:
            self._require_verified()
            self.hides_gradients = tracer is not None and runs_users_code(logits)
            self._check_unproven(logits, None if tracer is None else tracer.outline)
        if strategy.random:
            check_copies(task, logits, readers, self.state, strategy.quiet)
        else:
            self.reader_paths = check_samples(task, logits, self.readers, self.state, strategy.quiet)

    def _confirm_inputs(self, logits: Tensor) -> None:
        """Compare the logits of two and of three samples alone with the batch, if its inputs are only assumed to have samples.

        Raises:
            PlanError: If they differ.
        """
        assumption, parts = self.task.assumption, self.strategy.parts
        if assumption is None or assumption.is_confirmed:
            return
        if not parts or not are_rows_of(logits, parts):
            raise PlanError("the inputs that have one row per sample are unknown")
        assumption.confirm()

    def _covers(self, logits: Tensor, tracer: CollectingPass, readers: Sequence[int]) -> bool:
        """Return whether the proof covers the batch."""
        record, outline, (shapes, size) = self.strategy.sizes, tracer.outline, self.here
        if record is None or outline.path != record.path:
            return False
        _, is_known = self.strategy.times.get(self.here, {}).get(outline.number, ((), False))
        if is_known:
            return True
        if record.backward is None and runs_custom_code(logits):
            return False
        if shapes in record.units:
            return record.covers(outline, size, shapes)
        if self.strategy.random or not self.is_new:
            return False
        if record.continues(outline, size, shapes):
            return True
        alone = check_new_shapes(self.task, logits, readers, self.state, self.strategy.quiet)
        return alone is not None and record.learn(outline, size, alone, shapes)

    def compare_backward(self, outline: Outline) -> None:
        """Check the batch without the proof if custom autograd functions do something else in its backward passes than in the proof.

        Later batches are checked without it too. Another value that Python reads from one sample alone may change its backward pass.

        Args:
            outline: The forward pass of the batch.

        Raises:
            CoupledSamplesError: If samples depend on each other.
            PlanError: If the plan is unverified.
        """
        record = self.strategy.sizes
        if not self.is_covered or record is None or record.backward is None:
            return
        if not self.readers and covers_backward(record.backward, outline, self.task, self.state):
            return
        self._require_verified()
        self.is_covered, self.strategy.sizes, self.hides_gradients = False, None, True
        self._check_unproven(self.logits[-1], outline)

    def compare_paths(self, outline: Outline, alone: Outline) -> None:
        """Check the batch without the proof if one sample alone takes another path through the model, or has other sizes.

        Raises:
            CoupledSamplesError: If samples depend on each other.
            PlanError: If the plan is unverified.
        """
        strategy = self.strategy
        if not self.is_covered:
            return
        has_unit_sizes = bool(self.readers) or strategy.sizes is None or strategy.sizes.is_unit(alone, self.here[0])
        if has_unit_sizes and (alone.path, alone.reads) == (outline.path, outline.reads):
            return
        if strategy.sizes is not None and strategy.sizes.is_squeezed_unit(alone, outline, self.here[0]):
            task, logits = self.task, self.logits[-1]
            check_alone(task, logits, chosen_samples(logits, ALONE_IF_NEW), self.state, strategy.quiet, outline)
            return
        self._require_verified()
        self.is_covered, strategy.sizes = False, None
        strategy.alone = ALONE_IF_NEW if alone.reads == outline.reads and has_unit_sizes else EVERY_SAMPLE
        check_precisions(self.task, outline, alone)
        self._check_unproven(self.logits[-1], outline)
        if not strategy.random:
            self.reader_paths = check_samples(self.task, self.logits[-1], self.readers, self.state, strategy.quiet)

    def _require_verified(self) -> None:
        if not self.strategy.verified:
            raise PlanError("the proof does not cover the batch with which its plan would be verified")

    def _check_unproven(self, logits: Tensor, outline: Outline | None) -> None:
        """Compare samples with the same samples run alone and, for a new batch size, the batch with its halves.

        Raises:
            CoupledSamplesError: If samples depend on each other.
            PlanError: If the plan has sorted rows, whose order only a proof shows.
        """
        task, strategy, state = self.task, self.strategy, self.state
        if strategy.plan is not None and strategy.plan.sorts:
            raise PlanError("only a proof shows the order of sorted rows")
        new_size = all(task.size != size for _, size in strategy.times)
        strategy.turn += 1
        if strategy.random:
            check_others(task, logits, state, strategy.quiet)
            if strategy.alone == EVERY_SAMPLE:
                check_copies(task, logits, range(task.size), state, strategy.quiet)
            return
        if task.size == 1:
            check_repeated(task, logits, state, strategy.quiet)
        alone = self._alone(new_size, outline)
        outlines = check_alone(task, logits, self._numbers(logits, alone), state, strategy.quiet, outline)
        if outline is not None and not outline.reads and any(one.reads for one in outlines):
            self.readers = range(task.size)  # alone, each sample may take another path by the values that Python reads
        if (new_size or strategy.plan is None) and alone < task.size:
            check_halves(task, logits, state, strategy.quiet, all_pairs=strategy.plan is None)

    def _numbers(self, logits: Tensor, count: int) -> Sequence[int]:
        """Return the numbers of the samples to run alone; a single one is another sample in each batch."""
        if count != 1:
            return chosen_samples(logits, count) if count else ()
        return [self.strategy.turn % self.task.size]

    def _alone(self, new_size: bool, outline: Outline | None) -> int:
        """Return how many samples to run alone."""
        strategy = self.strategy
        if strategy.sizes is not None and new_size:
            return EVERY_SAMPLE  # the model makes other calls at this size than in the proof
        if strategy.plan is None and outline is not None and outline.reads != strategy.reads:
            return EVERY_SAMPLE  # Python may read a number that would differ for any sample alone
        if self.is_new:
            return max(strategy.alone, ALONE_IF_NEW)
        is_usual = strategy.sizes is None and outline is not None and outline.path == strategy.path
        return max(strategy.alone, 0 if is_usual else 1)

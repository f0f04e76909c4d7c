"""One batch of a model that has a plan: its passes, and the comparisons with autograd that no proof makes unnecessary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lightning_gradmetrics.engine.checks.batch_checks import BatchChecks
from lightning_gradmetrics.engine.checks.guards import check_objectives
from lightning_gradmetrics.engine.checks.row_check import check_row_owners
from lightning_gradmetrics.engine.checks.sample_check import (
    MOST_VERIFIED,
    check_draw,
    check_reader_paths,
    check_sample,
    check_some_samples,
    verify_by_samples,
)
from lightning_gradmetrics.engine.passes.agreement import SampleNotes
from lightning_gradmetrics.engine.passes.folding import FoldRefused
from lightning_gradmetrics.engine.passes.gather import MomentTable
from lightning_gradmetrics.engine.passes.path_check import PathChanged
from lightning_gradmetrics.engine.passes.path_record import PathRecorder
from lightning_gradmetrics.engine.passes.plan import Plan, PlanError
from lightning_gradmetrics.engine.passes.row_sums import RowSums
from lightning_gradmetrics.engine.passes.selects import SelectsRefused
from lightning_gradmetrics.engine.passes.single_sample import collect_one_sample, needs_no_plan
from lightning_gradmetrics.engine.passes.strategy import collect_fast, collect_on_path
from lightning_gradmetrics.engine.tracing.outline import Outline

__all__ = ["GRADIENTS_IF_UNPROVEN", "fill_by_plan"]

GRADIENTS_IF_UNPROVEN = 4
"""Number of samples whose gradients are compared with autograd in a new kind of batch that no proof covers, and without a plan."""

MOST_SUSPECTS = 2
"""Largest number of samples that are compared with autograd because a second computation of their sums differs."""

MOST_OUTLINES = 16
"""Largest number of call sequences that are stored for one batch size."""

MOST_BATCHES = 1024
"""Largest number of combinations of input shapes and batch size that are stored for one strategy; the oldest is dropped."""


def fill_by_plan(table: MomentTable, checks: BatchChecks) -> None:
    """Fill a table with the moments of the parameters that a plan handles.

    How much is compared with autograd depends on what is known about batches of this size:

    1. All calls are known (from the third batch on, if the proof covers the size): each call is compared with the recorded one
       while it runs, and nothing else is done.
    2. The sequence of calls, the outline, is known: it is compared after the forward pass.
    3. The outline is new: the gradients of some samples are compared with autograd.

    Args:
        table: The table of the batch.
        checks: The checks of the batch for samples that depend on each other; their strategy learns from the batch.

    Raises:
        CoupledSamplesError: If samples depend on each other.
        PlanError: If the batch does not follow the plan.
    """
    plan = checks.strategy.plan
    if plan is not None and table.task.size == 1 and needs_no_plan(table.task, checks.strategy, checks.here):
        collect_one_sample(table, plan)
        return
    batch = _PlannedBatch(table, checks)
    if not batch.fill_by_known_calls():
        batch.fill()


class _PlannedBatch:
    """A batch, and everything that its passes and comparisons need.

    Args:
        table: The table of the batch.
        checks: The checks of the batch.

    Attributes:
        strategy: How the model is handled.
        state: The state of the model before the batch.
        laid_out: The batch in the layout that it runs in.
        fast: The same, restricted to the parameters that the plan handles.
        free: Whether axes may have a different number of positions per sample than planned.
    """

    __slots__ = ("checks", "fast", "free", "laid_out", "state", "strategy", "table")

    def __init__(self, table: MomentTable, checks: BatchChecks) -> None:
        self.table, self.checks, self.state = table, checks, checks.state
        self.strategy = strategy = checks.strategy
        self.laid_out = table.task.channels_last() if strategy.channels_last else table.task
        self.fast = self.laid_out.restricted(strategy.fast)
        self.free = checks.here[0] != strategy.shapes

    def fill_by_known_calls(self) -> bool:
        """Fill the table while the calls are compared with the known ones; return False if none are known, or if they have changed."""
        table, strategy, here = self.table, self.strategy, self.checks.here
        path = strategy.paths.get(here)
        if path is None or strategy.plan is None or strategy.sizes is None or table.task.memory is not None:
            return False
        try:
            collect_on_path(
                table, self.fast, strategy.plan, lambda logits: check_objectives(table.task, logits), path, self.free
            )
        except PathChanged:
            strategy.drop_path(here)
            strategy.in_place = strategy.in_place and not path.is_in_place
            self.state.restore()
            return False
        return True

    def fill(self) -> None:
        """Fill the table, and compare gradients with autograd as far as nothing proves them right."""
        strategy, checks = self.strategy, self.checks
        checks.notes = notes = None if strategy.verified else SampleNotes(self.table.task.size)
        recorder = strategy.recorder(self.fast, checks.here)
        rows = RowSums(self.table.task) if self._has_new_rows() else None
        times, calls = self._run(notes, recorder, rows)
        checks.compare_backward(calls)
        verified = strategy.times.get(checks.here, {})
        if calls.number not in verified:
            self._compare_new_calls(calls, notes, rows)
            self._note_calls(calls, times)
            if recorder is not None:
                strategy.drop_path(checks.here)
        elif verified[calls.number][0] != times:
            raise PlanError("a sample has a different number of positions than in earlier batches of this size")
        elif checks.hides_gradients:
            self._compare_hidden_gradients()
        elif recorder is not None:
            strategy.add_path(checks.here, recorder.path() if checks.is_covered else None)
        check_reader_paths(self.table, strategy.fast, self.laid_out, self.state, checks.reader_paths, strategy.compared)
        if strategy.mixes and self.table.task.size > 1:
            self._check_rows()

    def _has_new_rows(self) -> bool:
        """Return whether the sums of all samples are computed a second time: in the first batch of each size.

        In a small first batch all samples are compared with autograd. Samples alone have other random numbers.
        """
        strategy, size = self.strategy, self.table.task.size
        if strategy.random or (not strategy.verified and size <= MOST_VERIFIED):
            return False
        return size > 1 and all(size != other for _, other in strategy.times)

    def _run(
        self, notes: SampleNotes | None, recorder: PathRecorder | None, rows: RowSums | None
    ) -> tuple[tuple[int, ...], Outline]:
        """Return the positions of a sample on each axis, and the calls, of passes with folds and joined selects, if possible."""
        strategy, folds = self.strategy, self.strategy.folds(self.fast)
        while True:
            try:
                return collect_fast(
                    self.table, self.fast, self._plan, self.checks, notes, self.free, recorder, folds, rows
                )
            except FoldRefused:
                strategy.plan, recorder = replace(self._plan, folds={}, lays_out=False), None
                self.table.folded = None
            except SelectsRefused:
                strategy.plan, recorder = replace(self._plan, selects=False), None
            self.state.restore()
            if rows is not None:
                rows.clear()

    def _compare_new_calls(self, calls: Outline, notes: SampleNotes | None, rows: RowSums | None) -> None:
        """Compare the gradients of some samples with autograd in a batch whose calls are new, unless the proof covers it."""
        strategy, checks = self.strategy, self.checks
        if strategy.random and strategy.times.get(checks.here):
            raise PlanError("the model makes other calls than in earlier batches of this size")
        suspects = [] if rows is None else rows.differing(self.table)[:MOST_SUSPECTS]
        if suspects or not (checks.is_covered and strategy.settled):
            self._compare_samples(calls, notes, suspects)
        # The probe has checked the rows of three samples; models that mix samples are checked in every batch.
        if not (checks.is_covered or strategy.mixes) and self.table.task.size > 3:
            self._check_rows()
        strategy.settled = strategy.settled or checks.is_covered

    def _compare_samples(self, calls: Outline, notes: SampleNotes | None, suspects: Sequence[int]) -> None:
        """Compare the gradients of some samples with autograd: two to verify the plan, otherwise one, or more without a proof.

        Samples for which a second computation of their sums differs are compared in any case.
        """
        table, strategy, checks, laid_out, state = self.table, self.strategy, self.checks, self.laid_out, self.state
        if strategy.random:
            check_draw(table, strategy.fast, laid_out, state)
            return
        if notes is not None:
            compared = None if self._plan.reads == () else strategy.compared
            alone = verify_by_samples(table, laid_out, state, notes, checks.readers, compared, suspects)
            checks.compare_paths(calls, alone)
            strategy.verified, strategy.path, strategy.parts = True, calls.path, ()
            return
        count = 1 if checks.is_covered else GRADIENTS_IF_UNPROVEN
        alone = check_some_samples(table, strategy.fast, laid_out, state, count, checks.hides_gradients, checks.readers)
        for number in suspects if strategy.failed is None else (strategy.failed, *suspects):
            check_sample(table, strategy.fast, laid_out, state, number, checks.hides_gradients)
        strategy.failed = None
        checks.compare_paths(calls, alone)

    def _note_calls(self, calls: Outline, times: tuple[int, ...]) -> None:
        """Store the outline of the batch, and the positions of a sample on each axis, for later batches of this size."""
        stored, here = self.strategy.times, self.checks.here
        verified = stored.get(here, {})
        known = verified if len(verified) < MOST_OUTLINES else {}
        stored[here] = {**known, calls.number: (times, self.checks.is_covered)}
        if len(stored) > MOST_BATCHES:
            del stored[next(iter(stored))]

    def _compare_hidden_gradients(self) -> None:
        """Compare the gradients of two samples with autograd; each batch checks two others.

        A single sample is not enough: it may be the one whose value changes the gradients of the batch.

        Raises:
            PlanError: If they differ.
        """
        table, strategy = self.table, self.strategy
        if strategy.random:
            check_draw(table, strategy.fast, self.laid_out, self.state)
            return
        size = table.task.size
        for number in {strategy.turn % size, (strategy.turn + size // 2) % size}:
            check_sample(table, strategy.fast, self.laid_out, self.state, number, strict=True)

    def _check_rows(self) -> None:
        """Check that the gradient of each sample reaches no row of another one."""
        check_row_owners(self.table, self.fast, self._plan, self.free, self.state)

    @property
    def _plan(self) -> Plan:
        assert self.strategy.plan is not None
        return self.strategy.plan

"""Collects the moments of one batch in a table."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_gradmetrics.engine.functional import functional_moments
from lightning_gradmetrics.engine.kernels.fused import fused_segments, fused_supports
from lightning_gradmetrics.engine.kernels.operators import is_traced
from lightning_gradmetrics.engine.kernels.segments import Segments, chosen_moments
from lightning_gradmetrics.engine.passes.plan import Plan, PlanError
from lightning_gradmetrics.engine.reference import moments_of_draw, reference_moments
from lightning_gradmetrics.engine.task import Task, empty_moments, joined
from lightning_gradmetrics.engine.uses import EmbeddingUse, OuterUse, RowsUse, Use
from lightning_gradmetrics.gradients.scaling import rescaled_moments
from lightning_gradmetrics.gradients.statistics import Moment, Moments, merged_moments

__all__ = ["MomentTable"]

Check = Callable[[int, Tensor], None] | None


class MomentTable:
    """The moments ``(N, P)`` of each objective's gradient, filled one parameter at a time.

    Args:
        task: The batch.
        scaled: Whether to leave the scale of the losses in the moments.

    Attributes:
        folded: The plan, if the moments come from a forward pass with its folds.
        scales: The factors ``(N,)`` that remove the scale of each objective's gradients.
    """

    folded: Plan | None = None

    def __init__(self, task: Task, scaled: bool = False) -> None:
        self.task, self._scaled = task, scaled
        self._columns = {name: index for index, name in enumerate(task.parameters)}
        self._moments: list[Moments | None] = [None] * len(task.objectives)
        self._statistics: list[Tensor | None] = [None] * len(task.objectives)
        self.scales: list[Tensor] = []
        self._waiting: list[dict[str, Moments]] = []
        self._small: list[dict[str, Tensor]] = []
        self._segments: list[Segments] = []

    @property
    def moments(self) -> list[Moments]:
        """The moments of each objective, zero for parameters that were not added."""
        return list(map(self._table, range(len(self._moments))))

    def _table(self, index: int) -> Moments:
        table, statistics = self._moments[index], self._statistics[index]
        if table is None and statistics is not None:
            assert statistics.shape[1] == len(self._columns) + 1, "only the moments over all parameters were computed"
            self._moments[index] = table = chosen_moments(statistics[:, :-1].mT, self.task.wanted)
        elif table is None:
            only = replace(self.task, objectives=self.task.objectives[index : index + 1])
            self._moments[index] = table = empty_moments(only, self.task.size)[0]
        return table

    @property
    def results(self) -> list[Moments]:
        """The moments of each objective, over all parameters if the task allows that."""
        return self.merged if self.task.merged else self.moments

    @property
    def merged(self) -> list[Moments]:
        """The moments ``(N,)`` of each objective, over all parameters."""
        return list(map(self._merged, range(len(self._moments))))

    def _merged(self, index: int) -> Moments:
        statistics = self._statistics[index]
        if statistics is None:
            return merged_moments(self._table(index))
        return chosen_moments(statistics.select(1, -1), self.task.wanted)

    def begin(self, objective: int, undo: Tensor) -> None:
        """Begin an objective; multiplying by ``undo`` ``(N,)`` removes the scale of its gradients."""
        self.scales[objective:] = [undo]
        self._waiting.append({})
        self._small.append({})
        self._segments.append(Segments(self.task.wanted))

    def add(self, name: str, use: Use) -> None:
        """Add a parameter's gradients of the current objective."""
        if name not in self._columns:
            return
        factors = use.factors() if isinstance(use, (RowsUse, OuterUse, EmbeddingUse)) else None
        if factors is not None and self._segments[-1].add(name, factors):
            return
        if isinstance(use, RowsUse) and fused_supports(use.value, self.task.wanted):
            self._small[-1][name] = use.value.flatten(1)
        else:
            self._waiting[-1][name] = use.moments(self.task.wanted)

    def add_all(self, rows: Tensor) -> bool:
        """Add the gradients ``(N, D)`` of all parameters, if only moments over all of them are read; return False if that fails."""
        segments, undo = Segments(self.task.wanted), None if self._scaled else self.scales[-1]
        if not segments.add("", (rows, None)):
            return False
        self._statistics[len(self.scales) - 1] = segments.statistics([""], undo, merged=True)
        return True

    def finish(self, merged: bool = False) -> None:
        """Write all parameters' moments into the table and undo the scales.

        Args:
            merged: Whether only the moments over all parameters are read afterwards.
        """
        for index in range(len(self._waiting)):
            undo = self.scales[index]
            factors = None if self._scaled else undo
            waiting = self._waiting[index]
            waiting.update(_segment_moments(self._small[index], self.task.wanted))
            segments = self._segments[index]
            if waiting and segments.add_known(waiting):
                waiting = {}
            if is_traced() and (waiting or len(segments.names) < len(self._columns)):
                waiting.update(segments.by_name())  # a graph has no lists of columns to assign to
            else:
                self._fill_segments(index, factors, merged)
            if waiting:
                _fill_columns(self._table(index), waiting, self._columns, factors)
        self._waiting, self._small, self._segments = [], [], []

    def _fill_segments(self, index: int, undo: Tensor | None, merged: bool) -> None:
        segments = self._segments[index]
        if not segments.names:
            return
        if not segments.unchanged():
            raise PlanError("a layer's input or gradient was changed in place after its use")
        names = sorted(segments.names, key=self._columns.__getitem__)
        is_complete = len(names) == len(self._columns)
        statistics = segments.statistics(names, undo, merged and is_complete)
        if is_complete:
            self._moments[index], self._statistics[index] = None, statistics
            return
        where = list(map(self._columns.__getitem__, names))
        moments = chosen_moments(statistics[:, :-1].mT, self.task.wanted)
        for key, table in self._table(index).items():
            table[:, where] = moments[key]

    def clear(self) -> None:
        """Delete all values."""
        self._moments = [None] * len(self.task.objectives)
        self._statistics = [None] * len(self.task.objectives)
        self.scales, self._waiting, self._small, self._segments = [], [], [], []

    def add_slowly(self, names: Collection[str], mapped: bool, check: Check) -> None:
        """Add parameters without a fast rule, after :meth:`finish`: mapped over the samples, or one at a time."""
        task = self.task.restricted(names)
        moments = _mapped_moments(task) if mapped else None
        if moments is None:
            moments = reference_moments(task, check)
        self._fill(task, moments)

    def add_draw(self, names: Collection[str]) -> Tensor:
        """Add parameters without a fast rule, from one forward pass of the batch with its own random numbers; return its logits."""
        task = self.task.restricted(names)
        moments, logits = moments_of_draw(task)
        self._fill(task, moments)
        return logits

    def _fill(self, task: Task, moments: Sequence[Moments]) -> None:
        """Write the moments of some parameters into their columns."""
        columns = list(map(self._columns.__getitem__, task.parameters))
        for own, added in zip(self.moments, moments, strict=True):
            for key, value in added.items():
                own[key][:, columns] = value
        self._statistics = [None] * len(self.task.objectives)

    def of_samples(self, samples: slice, names: Iterable[str], objective: int) -> Moments:
        """Return the moments ``(n, P)`` of the gradients of some samples for some parameters."""
        columns = list(map(self._columns.__getitem__, names))
        is_all = columns == list(range(len(self._columns)))
        rows: Moments = {}
        for key, value in self._table(objective).items():
            rows[key] = value[samples] if is_all else value[samples, columns]
        return rows

    @staticmethod
    def join(parts: list[MomentTable]) -> list[Moments]:
        """Return the moments of all samples, from consecutive groups of them; over all parameters if the task allows that."""
        if len(parts) == 1:
            return parts[0].results
        return joined([table.results for table in parts])


def _segment_moments(rows: Mapping[str, Tensor], wanted: Collection[Moment]) -> dict[str, Moments]:
    """Return the moments of computed gradients on a CUDA device, by one kernel per floating type."""
    by_dtype: dict[torch.dtype, list[str]] = {}
    for name, value in rows.items():
        by_dtype.setdefault(value.dtype, []).append(name)
    moments: dict[str, Moments] = {}
    for names in by_dtype.values():
        segments = fused_segments([rows[name] for name in names], wanted)
        moments.update(zip(names, segments, strict=True))
    return moments


def _fill_columns(
    moments: Moments, parts: Mapping[str, Moments], columns: Mapping[str, int], undo: Tensor | None
) -> None:
    """Write moments ``(N,)`` of parameters into their columns of ``(N, P)``: one copy per moment, not per parameter."""
    names = sorted(parts, key=columns.__getitem__)
    where = list(map(columns.__getitem__, names))
    filled: Moments = {}
    for key, table in moments.items():
        filled[key] = torch.stack([_as_type(parts[name][key], table.dtype) for name in names]).mT
    if undo is not None:
        filled = rescaled_moments(filled, undo)
    for key, values in filled.items():
        if len(names) == moments[key].shape[1]:
            moments[key] = values
        elif is_traced():
            moments[key] = _with_columns(moments[key], where, values)
        else:
            moments[key][:, where] = values


def _with_columns(table: Tensor, where: Sequence[int], values: Tensor) -> Tensor:
    """Return a table ``(N, P)`` with other values ``(N, p)`` in some columns, without an index, which would be a constant of a graph."""
    columns = list(table.unbind(1))
    for number, column in zip(where, values.unbind(1), strict=True):
        columns[number] = column
    return torch.stack(columns, 1)


def _as_type(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _mapped_moments(task: Task) -> list[Moments] | None:
    try:
        return functional_moments(task)
    except Exception:  # torch.func raises many kinds of errors; the loop raises the model's error
        return None

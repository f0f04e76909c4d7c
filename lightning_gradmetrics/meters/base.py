"""The base class of meters: stores samples exactly or in constant memory, and gathers them over processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat
from torchmetrics.utilities.distributed import gather_all_tensors
from torchmetrics.utilities.plot import plot_curve

from lightning_gradmetrics.meters.functional.counts import Counts, check_scores, check_target, count
from lightning_gradmetrics.meters.functional.histogram import (
    COLUMNS,
    append,
    check_bins,
    counts_of_table,
    empty_table,
    merge_tables,
)

__all__ = ["CurveMeter", "ScoreMeter", "gather_rows"]


_BOOKKEEPING = (
    "_update_count",
    "_computed",
    "_is_synced",
    "_should_unsync",
    "_to_sync",
    "_enable_grad",
    "compute_on_cpu",
)
"""Attributes that torchmetrics' forward changes temporarily."""


class ScoreMeter(Metric):
    """A meter of scores ``(N,)`` against targets ``(N,)``.

    Args:
        bins: ``None`` keeps every score (exact). A number keeps a histogram of ``256 * bins`` bytes for any range and
            any number of scores. It is exact up to ``4 * bins`` distinct scores and approximate above; see
            :mod:`lightning_gradmetrics.meters.functional.histogram`. 16384 bins (4 MiB) were enough for every stream in
            our tests.
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If ``bins`` is neither ``None`` nor a whole number of at least 1024.
    """

    is_differentiable = False
    full_state_update = False
    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 1.0
    scores: list[Tensor]
    target: list[Tensor]
    table: Tensor

    def __init__(self, bins: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.bins = check_bins(bins)
        if self.bins is None:
            self.add_state("scores", default=[], dist_reduce_fx="cat")
            self.add_state("target", default=[], dist_reduce_fx="cat")
        else:
            self.add_state("table", default=empty_table(self.bins), dist_reduce_fx=merge_tables)

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch.

        Args:
            preds: The scores ``(N,)``, higher = more uncertain, any scale and sign, including infinities; NaN is
                refused.
            target: ``(N,)``, 1 = an error or out-of-distribution, 0 = any other sample.

        Raises:
            TypeError: If an argument is not a tensor of numbers.
            ValueError: If a shape or a value is wrong, or a score is NaN.
        """
        scores = check_scores(preds, "preds")
        self._take(scores, check_target(target, scores))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Add a batch and return the metric of this batch; a refused batch leaves the state unchanged."""
        before = {}
        for name in (*self._defaults, *_BOOKKEEPING):
            value = getattr(self, name)
            before[name] = list(value) if isinstance(value, list) else value
        try:
            return super().forward(*args, **kwargs)
        except Exception:
            for name, value in before.items():
                setattr(self, name, value)
            raise

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add the samples of another meter; :meth:`compute` then returns the metric of both.

        Args:
            incoming_state: The other meter, or its state.

        Raises:
            ValueError: If the other meter has other ``bins``, or is of another class.
        """
        if isinstance(incoming_state, ScoreMeter) and incoming_state.bins != self.bins:
            raise ValueError(
                f"a meter with bins={incoming_state.bins} cannot be merged into one with bins={self.bins}: create both with "
                "the same bins"
            )
        super().merge_state(incoming_state)
        self._update_count += incoming_state._update_count if isinstance(incoming_state, Metric) else 1
        self._computed = None  # torchmetrics would return the value before the merge

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Any:
        """Move the states to a device without changing their types, because a narrower type would merge distinct scores."""

        def move(state: Tensor) -> Tensor:
            moved = fn(state)
            return moved if moved.dtype == state.dtype else state.to(moved.device)

        return super()._apply(move, exclude_state)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load copies of the states, so that the meter shares no memory with the one that was saved."""
        name = f"{prefix}table"
        if self.bins is not None and name in state_dict and state_dict[name].shape != self.table.shape:
            bins = state_dict.pop(name).shape[1] // COLUMNS
            args[-1].append(f"{name} was saved with bins={bins} and cannot be loaded with bins={self.bins}")
        for key in self._defaults:
            value = state_dict.get(prefix + key)
            if value is not None:
                state_dict[prefix + key] = list(value) if isinstance(value, list) else value.clone()
                self._computed = None  # the value of the state before
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _take(self, scores: Tensor, target: Tensor) -> None:
        if self.bins is not None:
            self.table = append(self.table, scores, target)
            return
        self.scores.append(scores)
        self.target.append(target.to(torch.uint8))

    def _samples(self) -> tuple[Tensor, Tensor]:
        """Return all scores and targets so far; empty tensors before the first batch."""
        if not isinstance(self.scores, Tensor) and not self.scores:
            return torch.zeros(0, device=self.device), torch.zeros(0, dtype=torch.bool, device=self.device)
        return dim_zero_cat(self.scores), dim_zero_cat(self.target).bool()

    def _counts(self) -> Counts:
        """Return counts per distinct score, in either mode."""
        return count(*self._samples()) if self.bins is None else counts_of_table(self.table)

    def _sync_dist(self, dist_sync_fn: Callable[..., Any] = gather_all_tensors, process_group: Any = None) -> None:
        """Gather the samples of all ranks in one tensor, without intermediate copies."""
        if self.bins is not None or dist_sync_fn is not gather_all_tensors:
            super()._sync_dist(dist_sync_fn, process_group)
            return
        group = process_group or self.process_group
        for name in self._reductions:
            setattr(self, name, _gather_state(getattr(self, name), self.device, group))

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot the value or the given values, as torchmetrics' meters do.

        Args:
            val: A result, or a list of results over time; by default that of ``compute()``.
            ax: A matplotlib axis; by default a new figure.

        Returns:
            The figure and the axis.
        """
        return self._plot(val, ax)


class CurveMeter(ScoreMeter):
    """A meter whose result is a curve: x, y and thresholds."""

    axes = ("x", "y")

    def plot(self, curve: Any = None, score: Any = None, ax: Any = None) -> Any:  # type: ignore[override]
        """Plot the curve.

        Args:
            curve: A result of ``compute()``; by default computed now.
            score: A number for the legend; by default that of the meter, such as the area under the curve.
            ax: A matplotlib axis; by default a new figure.

        Returns:
            The figure and the axis.
        """
        if curve is None:
            curve = self.compute()
            score = self._area() if score is None else score
        _, ax = plot_curve(self._drawn(curve), score=score, ax=ax, label_names=self.axes, name=type(self).__name__)
        self._decorate(ax)
        return ax.get_figure(), ax

    def _area(self) -> Tensor | None:
        """Return the number that the legend shows with the meter's curve."""
        return None

    def _decorate(self, ax: Any) -> None:
        """Draw the parts that belong to the axis rather than to the curve."""

    def _drawn(self, curve: Any) -> Any:
        """Return x, y and thresholds of a result of ``compute()``."""
        return curve


def _gather_state(state: Any, device: torch.device, group: Any) -> Any:
    """Gather a list of samples, or sum a count."""
    if isinstance(state, list):
        return [gather_rows(state, device, group)]
    total = state.clone()
    distributed.all_reduce(total, group=group)
    return total


_CODES = {None: 0, torch.uint8: 1, torch.float32: 2, torch.float64: 3}
_TYPES = {code: dtype for dtype, code in _CODES.items()}


def gather_rows(pieces: list[Tensor] | Tensor, device: torch.device, group: Any = None) -> Tensor:
    """Gather the rows of all ranks, in the order of the ranks, without copying them twice.

    Each rank's rows are broadcast directly into the result. Ranks may have different numbers of rows, or none.

    Args:
        pieces: This rank's tensors, each ``(n, ...)`` in uint8, float32 or float64.
        device: The device of the result.
        group: The process group; by default all ranks.

    Returns:
        ``(N, ...)``, in the widest type of any rank.
    """
    pieces = [pieces] if isinstance(pieces, Tensor) else pieces
    width = pieces[0].shape[1] if pieces and pieces[0].ndim > 1 else 0
    code = max((_CODES[piece.dtype] for piece in pieces), default=0)
    about = _gather_numbers([sum(map(len, pieces)), width, code], device, group)
    dtype, width = _TYPES[int(about[:, 2].max())] or torch.float32, int(about[:, 1].max())
    sizes = about[:, 0].tolist()
    rows = torch.empty((sum(sizes), *([width] if width else [])), dtype=dtype, device=device)
    for rank, rows_of_rank in enumerate(torch.split(rows, sizes)):
        if rank == distributed.get_rank(group):
            _fill(rows_of_rank, pieces)
        if len(rows_of_rank):
            distributed.broadcast(rows_of_rank, _global_rank(rank, group), group=group)
    return rows


def _gather_numbers(numbers: list[int], device: torch.device, group: Any) -> Tensor:
    mine = torch.tensor(numbers, device=device)
    everyone = [torch.empty_like(mine) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(everyone, mine, group=group)
    return torch.stack(everyone)


def _global_rank(rank: int, group: Any) -> int:
    return rank if group is None else distributed.get_global_rank(group, rank)


def _fill(place: Tensor, pieces: list[Tensor]) -> None:
    for target, piece in zip(torch.split(place, [len(piece) for piece in pieces]), pieces, strict=True):
        target.copy_(piece)

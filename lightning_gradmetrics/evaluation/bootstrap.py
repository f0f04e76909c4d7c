"""The bootstrap: computes every metric on resampled rows, with the same resamples for all scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lightning_gradmetrics.engine.kernels.resampling import has_kernel
from lightning_gradmetrics.evaluation.cells import Cells
from lightning_gradmetrics.evaluation.metrics import METRICS, metrics_of
from lightning_gradmetrics.evaluation.task_cells import GroupTable, TaskCells, cells_of_tasks
from lightning_gradmetrics.evaluation.tasks import KINDS, DetectionTask, Rows
from lightning_gradmetrics.evaluation.totals import TaskTotals

__all__ = ["EXACT_ROWS", "Key", "Replicates", "collect", "drawn", "method_of", "most_cells", "replicate", "shift"]

Key = tuple[str, str | None, str, str, str]
"""Task, dataset (``None`` for the mean over a group), group, score, metric."""

Replicates = dict[Key, Tensor]
"""A metric's value in each resample, ``(B,)`` in float64."""

EXACT_ROWS = 5_000
"""Up to this number of rows, each dataset is resampled with replacement; above it, rows get Poisson weights."""

CELLS = 2048
"""The number of equal-sized cells that replace the scores above ``EXACT_ROWS`` rows; thresholds add finer cells."""

FEWEST_FOR_KERNEL = 2**20
"""With fewer cells times resamples, plain torch takes less time than a compiler would."""

ELEMENTS = 2**24
"""The largest number of weights in memory at the same time."""


def _poisson_table() -> Any:
    """Return the Poisson(1) weight of each 16-bit random number, with mean exactly 1 and variance within 1e-3 of 1."""
    probability = [np.exp(-1.0)]
    for number in range(1, 9):
        probability.append(probability[-1] / number)
    ends = np.round(np.cumsum(probability) * 2**16).astype(int)
    table = np.searchsorted(ends, np.arange(2**16), side="right").astype(np.float32)
    excess = int(table.sum()) - 2**16
    # Rounding leaves the sum off by a few in 65,536: turn some ones into zeros, or zeros into ones.
    ones = np.flatnonzero(table == (1.0 if excess > 0 else 0.0))
    table[ones[: abs(excess)]] = 0.0 if excess > 0 else 1.0
    return table


POISSON = _poisson_table()


def method_of(rows: int) -> str:
    """Return how this number of rows is resampled: ``"exact"`` or ``"poisson"``."""
    return "exact" if rows <= EXACT_ROWS else "poisson"


def most_cells(rows: int) -> int:
    """Return the number of cells of equal size that the bootstrap of this number of rows needs."""
    return max(rows, 1) if method_of(rows) == "exact" else CELLS


def replicate(
    rows: Rows,
    cells: Mapping[str, Cells],
    tasks: Sequence[DetectionTask],
    rate: float,
    resamples: int,
    seed: int,
    exact: Mapping[Key, float],
    progress: Callable[[float], None] | None = None,
) -> Replicates:
    """Compute every metric in ``B`` resamples.

    All scores and all tasks share the same resamples, so differences between scores and means over datasets are
    paired. Up to ``EXACT_ROWS`` rows, each dataset is resampled with replacement to its original size, and every
    distinct score is a cell. Above that, each row gets a Poisson weight of mean 1, and a score is grouped into
    ``CELLS`` cells of equal size; the replicates are shifted by the difference between the exact value and the value of
    the cells. Apart from a few values per task and resample, memory does not grow with ``B``. With clusters, whole clusters are drawn, and
    the limit applies to the number of clusters.

    Args:
        rows: The rows.
        cells: The cells of each score.
        tasks: The tasks.
        rate: The true-positive rate of ``fpr95``.
        resamples: ``B``.
        seed: The seed of the resamples; the global random state is neither used nor changed.
        exact: The exact value of every defined metric.
        progress: Called with the fraction that is done.

    Returns:
        The value of every metric in each resample.
    """
    number = len(rows.codes)
    replicates = collect(cells, tasks, rate, weight_blocks(rows, resamples, seed), resamples, progress)
    if method_of(number) == "poisson":
        shift(replicates, cells, tasks, rate, torch.ones(number, 1), exact)
    return replicates


class CountedCells(Protocol):
    """The rows of one score, grouped by row class and by cells of neighbouring scores."""

    @property
    def scores(self) -> Tensor:
        """The lowest score of each cell ``(K,)``."""
        ...

    @property
    def present(self) -> Tensor:
        """Whether a class has rows in a cell ``(C, K)``."""
        ...

    def counts(self, weights: Tensor) -> Tensor:
        """Return the weighted counts ``(E, B)`` of each class and cell with rows, in this order."""
        ...


def collect(
    cells: Mapping[str, CountedCells],
    tasks: Sequence[DetectionTask],
    rate: float,
    draws: Iterable[tuple[int, Tensor]],
    resamples: int,
    progress: Callable[[float], None] | None = None,
) -> Replicates:
    """Return the value of every metric in each resample.

    Args:
        cells: The cells of each score.
        tasks: The tasks.
        rate: The true-positive rate of ``fpr95``.
        draws: The number of the first resample of a block, and the weights ``(..., b)`` that the cells take.
        resamples: ``B``.
        progress: Called with the fraction that is done.
    """
    replicates: Replicates = {}
    with _one_thread():
        read = _read_cells(cells, tasks, rate, resamples)
        for start, weights in draws:
            stop = start + weights.shape[-1]
            for key, values in _values(read, rate, weights, start):
                if key not in replicates:
                    replicates[key] = torch.empty(resamples, dtype=torch.float64)
                replicates[key][start:stop] = values
            if progress is not None:
                progress(stop / resamples)
        replicates.update(_values_of_totals(read))
    return replicates


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch use one thread: more threads finish no sooner here, take twice the processor time, and wait on busy machines."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def shift(
    replicates: Replicates,
    cells: Mapping[str, CountedCells],
    tasks: Sequence[DetectionTask],
    rate: float,
    ones: Tensor,
    exact: Mapping[Key, float],
) -> None:
    """Shift replicates by the difference between the exact value and that of the cells.

    Args:
        replicates: They are changed in place.
        cells: The cells of each score.
        tasks: The tasks.
        rate: The true-positive rate of ``fpr95``.
        ones: The weights of one resample that draws each row once.
        exact: The exact value of every metric that is defined.
    """
    read = _read_cells(cells, tasks, rate, 1)
    values = dict(_values(read, rate, ones, 0))
    values.update(_values_of_totals(read))
    for key, value in values.items():
        if key in exact:
            replicates[key] += exact[key] - value


@dataclass(frozen=True)
class _ReadCells:
    """What the metrics read of the cells of one score.

    Args:
        cells: The cells.
        totals: The totals of each task for the metrics that need no more; ``None`` without a kernel.
        table: The groups of row classes, for the other metrics; ``None`` without any.
        tasks: The cells that the other metrics of each task read.
    """

    cells: CountedCells
    totals: TaskTotals | None
    table: GroupTable | None
    tasks: list[TaskCells]


def _read_cells(
    cells: Mapping[str, CountedCells], tasks: Sequence[DetectionTask], rate: float, resamples: int
) -> dict[str, _ReadCells]:
    read = {}
    with_totals = _is_worth_a_kernel(cells, resamples) and has_kernel()
    others = [name for name, metric in METRICS.items() if not (with_totals and metric.totals)]
    for score, grouped in cells.items():
        present = grouped.present
        totals = TaskTotals.of(tasks, present, rate, resamples) if with_totals else None
        table = GroupTable.of(tasks, present) if others else None
        of_tasks = [] if table is None else cells_of_tasks(tasks, grouped.scores, table, others)
        read[score] = _ReadCells(grouped, totals, table, of_tasks)
    return read


def _is_worth_a_kernel(cells: Mapping[str, CountedCells], resamples: int) -> bool:
    return resamples * sum(len(grouped.scores) for grouped in cells.values()) >= FEWEST_FOR_KERNEL


def _values(read: Mapping[str, _ReadCells], rate: float, weights: Tensor, start: int) -> Iterator[tuple[Key, Tensor]]:
    """Compute the totals of the resamples from ``start`` on, and yield the values ``(b,)`` of every other metric."""
    for score, of_score in read.items():
        of_classes = of_score.cells.counts(weights)
        if of_score.totals is not None:
            of_score.totals.add(start, of_classes)
        if of_score.table is None:
            continue
        counts = of_score.table.counts(of_classes)
        sums = of_score.table.sums(counts)
        for part in of_score.tasks:
            for metric, values in metrics_of(part.metrics, part.counts(counts, sums), rate).items():
                yield _key(part.task, score, metric), values


def _values_of_totals(read: Mapping[str, _ReadCells]) -> Iterator[tuple[Key, Tensor]]:
    """Yield the values ``(B,)`` of every metric that follows from totals."""
    for score, of_score in read.items():
        if of_score.totals is not None:
            for task, metric, values in of_score.totals.metrics():
                yield _key(task, score, metric), values


def _key(task: DetectionTask, score: str, metric: str) -> Key:
    return task.task, task.dataset, task.group, score, metric


def weight_blocks(rows: Rows, resamples: int, seed: int) -> Iterator[tuple[int, Tensor]]:
    """Yield blocks of resamples: the number of the first one, and the weights ``(N, b)`` of the rows in float32."""
    number = len(rows.codes)
    width = max(1, min(64, ELEMENTS // max(1, number)))
    sources = _sources(rows, seed)
    for start in range(0, resamples, width):
        weights = torch.empty(number, width)
        for source in sources:
            weights[source.members] = source.weights(width, number)
        yield start, weights[:, : resamples - start]


@dataclass(frozen=True)
class _Source:
    """The rows of one dataset and the generator of their weights.

    Args:
        members: The positions of the rows.
        size: The number of rows, or of clusters, that are drawn.
        generator: The random number generator.
        cluster: The number of each row's cluster, from 0; ``None`` if rows are drawn.
    """

    members: slice | Tensor
    size: int
    generator: np.random.Generator
    cluster: Tensor | None = None

    def weights(self, width: int, number: int) -> Tensor:
        """Return the weights of the rows in ``width`` resamples; ``number`` is the number of rows of all datasets."""
        if self.cluster is None:
            draw = drawn if method_of(number) == "exact" else _poisson
            return draw(self.size, width, self.generator)
        draw = drawn if method_of(self.size) == "exact" else _poisson
        return draw(self.size, width, self.generator)[self.cluster]


def _sources(rows: Rows, seed: int) -> list[_Source]:
    """Return the source of the weights of each dataset."""
    sources: list[_Source] = []
    for number, summary in enumerate(rows.datasets):
        chosen = torch.zeros(256, dtype=torch.bool)
        chosen[list(rows.codes_of(*KINDS, dataset=summary["name"]))] = True
        members: slice | Tensor
        positions = chosen[rows.codes.long()].nonzero().squeeze(1)
        size, members = len(positions), positions
        if size and int(positions[-1]) - int(positions[0]) == size - 1:
            members = slice(int(positions[0]), int(positions[-1]) + 1)
        cluster = None
        if rows.clusters is not None:
            names, cluster = rows.clusters[members].unique(return_inverse=True)  # type: ignore[no-untyped-call]
            size = len(names)
        sources.append(_Source(members, size, np.random.default_rng([seed, number]), cluster))
    return sources


def _poisson(size: int, width: int, generator: np.random.Generator) -> Tensor:
    """Return Poisson weights of mean 1, ``(size, width)``."""
    return torch.from_numpy(POISSON[generator.integers(2**16, size=(size, width), dtype=np.uint16)])


def drawn(size: int, width: int, generator: np.random.Generator) -> Tensor:
    """Return how often each of ``size`` rows is drawn in each resample, ``(size, width)``."""
    if not size:
        return torch.zeros(0, width)
    drawn = generator.integers(size, size=(size, width), dtype=np.int64) * width + np.arange(width)
    return torch.from_numpy(np.bincount(drawn.ravel(), minlength=size * width).reshape(size, width)).float()

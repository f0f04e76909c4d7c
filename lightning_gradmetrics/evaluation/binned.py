"""Scores in bins: the counts of every task in constant memory, and intervals from random blocks of rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from lightning_gradmetrics.evaluation.bootstrap import drawn
from lightning_gradmetrics.evaluation.cells import chosen_cells, counts_of_task, weighted_counts
from lightning_gradmetrics.evaluation.reading import score_column
from lightning_gradmetrics.evaluation.row_classes import RowSorter
from lightning_gradmetrics.evaluation.streams import Stream
from lightning_gradmetrics.evaluation.tasks import DetectionTask
from lightning_gradmetrics.meters.functional.bounds import CellEnds
from lightning_gradmetrics.meters.functional.counts import Counts
from lightning_gradmetrics.meters.functional.histogram import append, class_counts, empty_table
from lightning_gradmetrics.results.reading import index_numbers

__all__ = ["BLOCKS", "BinnedScore", "BlockCells", "bin_scores", "block_weights", "count_blocks"]

BLOCKS = 256
"""The number of random blocks of each dataset."""

CELLS_OF_BLOCKS = 1024
"""The number of cells of equal size of a score in the blocks; each task adds finer cells near its threshold."""

RESAMPLES_TOGETHER = 64


@dataclass(frozen=True)
class BinnedScore:
    """A score in bins.

    Args:
        scores: The score of each bin ``(K,)``, ascending.
        counts: The number of rows of each class in each bin ``(C, K)``, float64.
        table: The histogram, see :mod:`lightning_gradmetrics.meters.functional.histogram`.
    """

    scores: Tensor
    counts: Tensor
    table: Tensor

    def counts_of(self, task: DetectionTask) -> Counts:
        """Return the counts ``(K,)`` of a task."""
        return counts_of_task(task, self.scores, self.counts)

    def largest_errors(self, tasks: Sequence[DetectionTask], rate: float) -> tuple[float, float, float]:
        """Return the largest errors of AUROC, FPR95 and AUPR that the bins allow; 0 without rows of both classes.

        Args:
            tasks: The tasks.
            rate: The true-positive rate of FPR95.
        """
        ends = CellEnds.of(self.table)
        errors = [0.0, 0.0, 0.0]
        for task in tasks:
            weights = torch.zeros(2, len(self.counts), dtype=torch.float64)
            for side, codes in enumerate((task.negative, task.positive)):
                for code in codes:
                    weights[side, code] = task.weights.get(code, 1.0)
            negative, positive = weights @ ends.counts
            kinds = (
                (ends.auroc(negative, positive),),
                (ends.fpr(negative, positive, rate),),
                (
                    ends.average_precision(negative, positive),
                    ends.average_precision_in(negative, positive),
                ),
            )
            for number, bounds in enumerate(kinds):
                for low, high in bounds:
                    errors[number] = max(errors[number], float((high - low).nan_to_num(0.0)))
        return errors[0], errors[1], errors[2]


def bin_scores(
    stream: Stream, scores: Sequence[str], roles: Mapping[str, str], bins: int
) -> tuple[dict[str, BinnedScore], RowSorter]:
    """Read a stream once, and put its scores into bins.

    Args:
        stream: The results.
        scores: The columns to evaluate.
        roles: The role of each dataset.
        bins: The number of bins of each score.

    Returns:
        Each score in bins, and the classes of the rows.

    Raises:
        IncompleteResultsError: If rows are missing or repeated.
        ValueError: If a column is missing, or a dataset has no role.
    """
    sorter = RowSorter(roles)
    tables = {score: empty_table(bins, len(sorter.kinds)) for score in scores}
    for batch in stream.checked_batches(scores):
        codes, keep = sorter.sort(batch, scores)
        classes = torch.from_numpy(codes[keep])
        for score in scores:
            tables[score] = append(tables[score], _kept_scores(batch, score, keep), classes)
    binned = {}
    for score, table in tables.items():
        middles, counts = class_counts(table)
        binned[score] = BinnedScore(middles, counts.double(), table)
    return binned, sorter


def _kept_scores(batch: pa.Table, score: str, keep: Any) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(score_column(batch, score)[keep]))


@dataclass(frozen=True)
class BlockCells:
    """The rows of one score by block, row class and cell of neighbouring scores.

    Args:
        scores: The lowest score of each cell ``(K,)``, ascending.
        blocks: The number of rows ``(C, BLOCKS, K)`` of each class, block and cell.
        dataset: The number of each class's dataset ``(C,)``.
    """

    scores: Tensor
    blocks: Tensor
    dataset: Sequence[int]

    @property
    def present(self) -> Tensor:
        """Whether a class has rows in a cell ``(C, K)``."""
        return self.blocks.sum(1) > 0

    def counts(self, weights: Tensor) -> Tensor:
        """Return the weighted counts ``(E, B)`` of each class and cell with rows, float64.

        Args:
            weights: The weight of each dataset's blocks in each resample ``(D, BLOCKS, B)``.
        """
        counts = []
        for number, rows, is_present in zip(self.dataset, self.blocks, self.present, strict=True):
            counts.append(rows[:, is_present].T.double() @ weights[number].double())
        return torch.cat(counts)


def count_blocks(
    stream: Stream,
    binned: Mapping[str, BinnedScore],
    sorter: RowSorter,
    tasks: Sequence[DetectionTask],
    rate: float,
    seed: int,
) -> dict[str, BlockCells]:
    """Read a stream again, and count its rows by block, class and cell.

    Each dataset is cut into random blocks. Rows of a block are independent draws, so that resampling the blocks
    estimates the same variance as resampling the rows.

    Args:
        stream: The results.
        binned: The scores in bins, from the first pass.
        sorter: The classes of the rows, from the first pass.
        tasks: The tasks, for finer cells near their thresholds.
        rate: The true-positive rate of ``fpr95``.
        seed: Chooses the blocks.
    """
    scores, again = list(binned), RowSorter(sorter.roles)
    dataset = [sorter.names.index(name) for name, _ in sorter.kinds]
    edges, totals = {}, {}
    for score, histogram in binned.items():
        edges[score] = _edges(histogram, tasks, rate)
        totals[score] = np.zeros(len(dataset) * BLOCKS * len(edges[score]), dtype=np.int64)
    row = 0
    for batch in stream.batches(scores):
        codes, keep = again.sort(batch, scores)
        blocks = blocks_of(batch, row, again.places(batch), seed)[keep]
        row += batch.num_rows
        first = codes[keep].astype(np.int64) * BLOCKS + blocks
        for score in scores:
            values = _kept_scores(batch, score, keep).numpy()
            cell = np.maximum(np.searchsorted(edges[score], values, side="right") - 1, 0)
            flat_cells = first * len(edges[score]) + cell
            totals[score] += np.bincount(flat_cells, minlength=len(totals[score]))
    cells = {}
    for score, counts in totals.items():
        shaped = torch.from_numpy(counts).view(len(dataset), BLOCKS, -1)
        cells[score] = BlockCells(torch.from_numpy(edges[score]), shaped, dataset)
    return cells


def _edges(binned: BinnedScore, tasks: Sequence[DetectionTask], rate: float) -> Any:
    """The lowest score of each cell of the blocks."""
    sums = binned.counts.sum(0).cumsum(0)
    starts = torch.cat([sums.new_zeros(1), sums])[:-1].long()
    number = int(sums[-1]) if len(sums) else 0

    def positives_to(task: DetectionTask) -> Tensor:
        return weighted_counts(task, binned.counts, task.positive).cumsum(0)

    first = chosen_cells(starts, number, CELLS_OF_BLOCKS, tasks, positives_to, rate)
    return binned.scores[first].double().numpy()


def blocks_of(batch: pa.Table, row: int, places: Any, seed: int) -> Any:
    """Return the block of each row ``(N,)``: a hash of its dataset and index; of its position where the index is unknown."""
    column = index_numbers(batch["index"])
    is_known = column.is_valid().to_numpy()
    index = np.where(is_known, column.fill_null(0).to_numpy(), row + np.arange(batch.num_rows))
    mixed = index.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15) * (places + 1 + 1000 * seed).astype(np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return ((mixed ^ (mixed >> np.uint64(31))) % np.uint64(BLOCKS)).astype(np.int64)


def block_weights(datasets: int, resamples: int, seed: int) -> Iterator[tuple[int, Tensor]]:
    """Yield the number of the first resample, and how often each block is drawn ``(D, BLOCKS, b)``, in each dataset."""
    generators = [np.random.default_rng([seed, number]) for number in range(datasets)]
    for start in range(0, resamples, RESAMPLES_TOGETHER):
        weights = [drawn(BLOCKS, RESAMPLES_TOGETHER, generator) for generator in generators]
        yield start, torch.stack(weights)[..., : resamples - start]

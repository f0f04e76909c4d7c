"""Evaluates the scores of a table exactly, or those of a stream in constant memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lightning_gradmetrics.evaluation.binned import BLOCKS, BinnedScore, bin_scores, block_weights, count_blocks
from lightning_gradmetrics.evaluation.bootstrap import (
    CELLS,
    Replicates,
    collect,
    method_of,
    most_cells,
    replicate,
    shift,
)
from lightning_gradmetrics.evaluation.cells import Cells, exact_counts, make_cells, rank_rows
from lightning_gradmetrics.evaluation.entries import Entry, defined_values, entries_of
from lightning_gradmetrics.evaluation.intervals import FEWEST
from lightning_gradmetrics.evaluation.row_classes import KINDS
from lightning_gradmetrics.evaluation.streams import Stream
from lightning_gradmetrics.evaluation.tasks import DetectionTask, Rows, rows_of, tasks_of

__all__ = ["Judged", "Question", "judge_rows", "judge_stream"]

Progress = Callable[[float], None] | None


@dataclass(frozen=True)
class Question:
    """The scores and the settings of an evaluation.

    Args:
        scores: The columns to evaluate.
        roles: The role of each dataset.
        rate: The true-positive rate of ``fpr95``.
        ood_share: The fraction of out-of-distribution rows in the mixture of the joint task.
        resamples: The number of bootstrap resamples.
        level: The level of the intervals.
        seed: The seed of the resamples.
        cluster: The column of rows that are resampled together, or ``None``.
        progress: Called with the fraction of the resamples that is done.
    """

    scores: Sequence[str]
    roles: Mapping[str, str]
    rate: float
    ood_share: float
    resamples: int
    level: float
    seed: int
    cluster: str | None = None
    progress: Progress = None

    @property
    def level_or_none(self) -> float | None:
        """The level; ``None`` without resamples, since no intervals are computed then."""
        return self.level if self.resamples else None


@dataclass(frozen=True)
class Judged:
    """The metrics of all scores, and what the comparisons need.

    Args:
        metrics: The metrics of every score and task.
        replicates: Their values in each resample.
        tasks: The tasks.
        datasets: The summary of each dataset.
        notes: Sentences on what was dropped.
        resamples: The number of resamples that were drawn.
        bootstrap: How they were drawn, or ``None``.
        bins: The number of bins of each score; ``None`` if the scores were sorted.
    """

    metrics: list[Entry]
    replicates: Replicates
    tasks: list[DetectionTask]
    datasets: list[dict[str, Any]]
    notes: list[str]
    resamples: int
    bootstrap: str | None
    bins: int | None = None


def judge_rows(results: Any, question: Question) -> Judged:
    """Evaluate a table in memory: values are exact."""
    rows, notes = rows_of(results, list(question.scores), question.roles, question.cluster)
    tasks, more_notes = tasks_of(rows, question.ood_share)
    few = _few_clusters(rows)
    resamples = 0 if few else question.resamples
    metrics, cells = _metrics(rows, tasks, question, resamples)
    replicates: Replicates = {}
    if resamples and tasks:
        exact = defined_values(metrics)
        replicates = replicate(rows, cells, tasks, question.rate, resamples, question.seed, exact, question.progress)
    bootstrap = _bootstrap(len(rows.codes), question.cluster) if resamples else None
    more_notes += few if question.resamples else []
    return Judged(metrics, replicates, tasks, rows.datasets, [*notes, *more_notes], resamples, bootstrap)


def _few_clusters(rows: Rows) -> list[str]:
    """Return notes on the datasets that have too few clusters for intervals."""
    notes = []
    if rows.clusters is not None:
        for summary in rows.datasets:
            codes = torch.tensor(rows.codes_of(*KINDS, dataset=summary["name"]), dtype=torch.uint8)
            count = len(rows.clusters[torch.isin(rows.codes, codes)].unique())  # type: ignore[no-untyped-call]
            if 0 < count < FEWEST:
                notes.append(f'dataset "{summary["name"]}" has {count} clusters: no intervals below {FEWEST}')
    return notes


def _bootstrap(rows: int, cluster: str | None) -> str:
    if cluster is not None:
        return f"clusters: whole clusters ({cluster}) of each dataset resampled"
    if method_of(rows) == "exact":
        return "exact: each dataset resampled with replacement"
    return f"poisson: Poisson weights of the rows, scores grouped into {CELLS} cells"


def _metrics(
    rows: Rows, tasks: Sequence[DetectionTask], question: Question, resamples: int
) -> tuple[list[Entry], dict[str, Cells]]:
    """Return the exact metrics with the intervals that need no resamples, and, with resamples, each score's cells."""
    entries: dict[tuple[int, str], list[Entry]] = {}
    cells = {}
    most = most_cells(len(rows.codes))
    level = question.level if resamples and rows.clusters is None else None
    for score in rows.scores:
        ranked = rank_rows(rows, score, with_positions=bool(resamples))
        for number, task in enumerate(tasks):
            counts = exact_counts(ranked, task)
            entries[number, score] = entries_of(counts, task, score, question.rate, level, question.seed)
        if resamples:
            cells[score] = make_cells(ranked, most, tasks, question.rate)
    return _by_task(entries, len(tasks), list(rows.scores)), cells


def _by_task(entries: Mapping[tuple[int, str], list[Entry]], tasks: int, scores: Sequence[str]) -> list[Entry]:
    ordered = []
    for number in range(tasks):
        for score in scores:
            ordered += entries[number, score]
    return ordered


def judge_stream(stream: Stream, question: Question, bins: int) -> Judged:
    """Evaluate any number of rows in constant memory: scores go into bins.

    The stream is read once, and once more for the resamples.
    """
    binned, sorter = bin_scores(stream, question.scores, question.roles, bins)
    empty: dict[str, torch.Tensor] = {}
    rows = Rows(empty, torch.zeros(0, dtype=torch.uint8), sorter.classes(), sorter.summaries())
    tasks, more_notes = tasks_of(rows, question.ood_share)
    entries = {}
    for score, histogram in binned.items():
        for number, task in enumerate(tasks):
            entries[number, score] = entries_of(
                histogram.counts_of(task), task, score, question.rate, question.level_or_none, question.seed
            )
    metrics = _by_task(entries, len(tasks), list(binned))
    replicates: Replicates = {}
    if question.resamples and tasks:
        cells = count_blocks(stream, binned, sorter, tasks, question.rate, question.seed)
        datasets = len(sorter.names)
        draws = block_weights(datasets, question.resamples, question.seed)
        replicates = collect(cells, tasks, question.rate, draws, question.resamples, question.progress)
        ones = torch.ones(datasets, BLOCKS, 1)
        shift(replicates, cells, tasks, question.rate, ones, defined_values(metrics))
    bootstrap = f"blocks: the rows of each dataset in {BLOCKS} random blocks, which are resampled with replacement"
    return Judged(
        metrics,
        replicates,
        tasks,
        rows.datasets,
        [*sorter.notes(), *more_notes, *_bin_notes(binned, tasks, question.rate, bins)],
        question.resamples,
        bootstrap if question.resamples else None,
        bins,
    )


def _bin_notes(binned: Mapping[str, BinnedScore], tasks: Sequence[DetectionTask], rate: float, bins: int) -> list[str]:
    """Return a note on the largest errors of AUROC, FPR95 and AUPR that the bins allow."""
    errors = []
    for histogram in binned.values():
        errors.append(histogram.largest_errors(tasks, rate))
    auroc, fpr, aupr = map(max, zip(*errors, strict=True))
    return [
        f"scores are in {bins} bins: each AUROC is within {_rounded_up(auroc):g} of its exact value, each FPR95 within "
        f"{_rounded_up(fpr):g}, each AUPR within {_rounded_up(aupr):g}"
    ]


def _rounded_up(value: float) -> float:
    """Return the number rounded up to one significant digit.

    Example:
        >>> _rounded_up(0.00012), _rounded_up(0.0)
        (0.0002, 0.0)
    """
    if value <= 0:
        return 0.0
    unit = 10.0 ** math.floor(math.log10(value))
    return math.ceil(value / unit) * unit

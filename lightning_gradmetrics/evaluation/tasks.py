"""The detection tasks of a results table, as sets of row classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from lightning_gradmetrics.evaluation.metrics import JOINT, MISCLASSIFICATION, OOD
from lightning_gradmetrics.evaluation.reading import as_table, score_column
from lightning_gradmetrics.evaluation.row_classes import (
    CORRECT,
    ID,
    INCORRECT,
    KINDS,
    OUT,
    UNLABELLED,
    RowClass,
    RowSorter,
)
from lightning_gradmetrics.results.reading import index_numbers

__all__ = ["ID", "KINDS", "DetectionTask", "Rows", "rows_of", "tasks_of"]


@dataclass(frozen=True)
class Rows:
    """The rows that metrics are computed from.

    Args:
        scores: Each score, ``(N,)`` in float32 or float64.
        codes: ``(N,)`` in uint8, the class of each row, an index into ``classes``.
        classes: The classes of rows.
        datasets: For each dataset its ``name``, ``role``, ``rows``, ``not_finite``, ``labelled`` and ``accuracy``.
        clusters: The cluster of each row ``(N,)``, which is resampled as a whole; ``None`` if rows are resampled.
    """

    scores: Mapping[str, Tensor]
    codes: Tensor
    classes: tuple[RowClass, ...]
    datasets: list[dict[str, Any]]
    clusters: Tensor | None = None

    def codes_of(self, *kinds: str, dataset: str | None = None) -> tuple[int, ...]:
        """Return the codes of the classes of these kinds, of one dataset or of all."""
        codes = []
        for code, row_class in enumerate(self.classes):
            if row_class.kind in kinds and dataset in (None, row_class.dataset):
                codes.append(code)
        return tuple(codes)

    def number(self, codes: Sequence[int]) -> int:
        """Return the number of rows of these classes."""
        return sum(self.classes[code].rows for code in codes)


@dataclass(frozen=True)
class DetectionTask:
    """One question for every score: does it rank the positives above the negatives?

    Args:
        task: ``"misclassification"``, ``"ood"`` or ``"joint"``.
        dataset: The dataset that the scores are evaluated on.
        group: Its role.
        negative: The codes of the negative row classes.
        positive: The codes of the positive row classes.
        weights: The weight of each row of a class, by code; 1 by default.
        count_negative: The number of negative rows.
        count_positive: The number of positive rows.
        count_ood: The number of out-of-distribution rows; ``None`` for misclassification.
    """

    task: str
    dataset: str
    group: str
    negative: tuple[int, ...]
    positive: tuple[int, ...]
    count_negative: int
    count_positive: int
    count_ood: int | None
    weights: Mapping[int, float]


def rows_of(
    results: Any, scores: Sequence[str], roles: Mapping[str, str], cluster: str | None = None
) -> tuple[Rows, list[str]]:
    """Sort the rows of a results table into classes, and drop rows that cannot be ranked.

    A row is dropped for every score if it is flagged as not finite, or if any of the chosen scores is missing, NaN or
    infinite, so that all scores are evaluated on the same rows.

    Args:
        results: The per-sample table, of any kind that :func:`~lightning_gradmetrics.evaluation.evaluate` accepts.
        scores: The columns to evaluate.
        roles: The role of each dataset.
        cluster: The column of whole numbers that names the cluster of each row, or ``None``.

    Returns:
        The rows, and notes on what was dropped.

    Raises:
        TypeError: If the results are of an unsupported type.
        ValueError: If a column is missing, a dataset has no role, or a row appears twice.
    """
    clusters = [] if cluster is None else [cluster]
    table = as_table(results, ["dataset", "index", "prediction", "label", *scores, *clusters], optional=["finite"])
    sorter = RowSorter(roles)
    places = sorter.places(table)
    _check_repeats(table, places)
    codes, keep = sorter.sort(table, scores, places)
    # Copying a column is faster than choosing all of its rows.
    chosen = slice(None) if keep.all() else keep
    columns = {}
    for score in scores:
        columns[score] = _tensor(score_column(table, score)[chosen])
    numbers = None if cluster is None else torch.from_numpy(_clusters(table, cluster)[keep])
    rows = Rows(columns, _tensor(codes[chosen]), sorter.classes(), sorter.summaries(), numbers)
    return rows, sorter.notes()


def _tensor(values: Any) -> Tensor:
    """Return an array as a tensor, which needs writable memory."""
    return torch.from_numpy(np.require(values, requirements=["C", "W"]))


def _clusters(table: pa.Table, name: str) -> Any:
    """Return the number of each row's cluster ``(N,)``."""
    column = table[name].combine_chunks()
    missing = pc.sum(column.is_null(nan_is_null=True)).as_py() or 0
    if missing:
        raise ValueError(f"{missing} rows have no value in the column {name!r}, which names their clusters: fill it")
    return pc.dictionary_encode(column).indices.to_numpy(zero_copy_only=False).astype(np.int64)


def _check_repeats(table: pa.Table, places: Any) -> None:
    """Check that no (dataset, index) appears twice; rows without an index are not compared."""
    column = index_numbers(table["index"])
    known = column.is_valid().to_numpy()
    index = column.fill_null(0).to_numpy()
    if not known.all():
        index, places = index[known], places[known]
    ascending = np.diff(index) > 0
    moves_on = np.diff(places.astype(np.int64)) > 0
    if bool(np.all(ascending & (np.diff(places) == 0) | moves_on)):
        return
    order = np.lexsort((index, places))
    index, places = index[order], places[order]
    repeats = int(((np.diff(index) == 0) & (np.diff(places) == 0)).sum())
    if repeats:
        raise ValueError(f"{repeats} rows repeat a (dataset, index): keep one row per sample, or it counts twice")


def tasks_of(rows: Rows, ood_share: float = 0.5) -> tuple[list[DetectionTask], list[str]]:
    """Return the tasks that the rows allow, and notes on those that they do not allow.

    Joint: correct in-distribution rows against incorrect ones and the rows of an out-of-distribution dataset, weighted
    so that out-of-distribution rows are the fraction ``ood_share`` of the mixture. Misclassification: the incorrect
    rows of an in-distribution dataset against the correct ones. Out-of-distribution: the rows of a dataset against all
    in-distribution rows.

    Args:
        rows: The result of :func:`rows_of`.
        ood_share: The fraction of out-of-distribution rows in the mixture of the joint task, in (0, 1).
    """
    inside, notes = rows.codes_of(CORRECT, INCORRECT, UNLABELLED), []
    has_inside = rows.number(inside) > 0
    others = [row_class for row_class in rows.classes if row_class.kind == OUT and row_class.rows]
    misclassification = []
    for summary in rows.datasets:
        if summary["role"] == ID and summary["labelled"]:
            task = _misclassification(rows, summary["name"])
            misclassification.append(task)
            notes += _one_class_notes(task)
    if others and not has_inside:
        notes.append("no in-distribution rows: OOD detection is not evaluated; give a dataset the role 'id'")
    elif not others:
        notes.append("no out-of-distribution rows: OOD detection is not evaluated")
    joint, ood = [], []
    for row_class in others if has_inside else []:
        ood.append(_ood(rows, row_class, inside))
        if misclassification:
            joint.append(_joint(rows, row_class, ood_share))
    return [*joint, *misclassification, *ood], notes


def _misclassification(rows: Rows, dataset: str) -> DetectionTask:
    negative, positive = rows.codes_of(CORRECT, dataset=dataset), rows.codes_of(INCORRECT, dataset=dataset)
    sizes = rows.number(negative), rows.number(positive)
    return DetectionTask(MISCLASSIFICATION, dataset, ID, negative, positive, *sizes, None, {})


def _ood(rows: Rows, row_class: RowClass, inside: tuple[int, ...]) -> DetectionTask:
    positive = rows.codes_of(OUT, dataset=row_class.dataset)
    return DetectionTask(
        OOD,
        row_class.dataset,
        row_class.role,
        inside,
        positive,
        rows.number(inside),
        row_class.rows,
        row_class.rows,
        {},
    )


def _joint(rows: Rows, row_class: RowClass, ood_share: float) -> DetectionTask:
    correct, incorrect = rows.codes_of(CORRECT), rows.codes_of(INCORRECT)
    out = rows.codes_of(OUT, dataset=row_class.dataset)
    labelled = rows.number(correct) + rows.number(incorrect)
    weight = ood_share / (1 - ood_share) * labelled / row_class.rows
    positive = (*incorrect, *out)
    sizes = rows.number(correct), rows.number(positive)
    return DetectionTask(
        JOINT, row_class.dataset, row_class.role, correct, positive, *sizes, row_class.rows, {out[0]: weight}
    )


def _one_class_notes(task: DetectionTask) -> list[str]:
    if task.count_negative and task.count_positive:
        return []
    kind = INCORRECT if task.count_positive else CORRECT
    return [f'every prediction on "{task.dataset}" is {kind}: misclassification AUROC is undefined']

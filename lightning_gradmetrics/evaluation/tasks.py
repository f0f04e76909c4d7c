"""What is judged against what: tasks between rows of a results table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

__all__ = ["ID", "DetectionTask", "Rows", "tasks_of", "finite_rows", "float_column", "rows_of"]

ID = "id"
"""The role of in-distribution data. Any other word names a group of out-of-distribution data."""


@dataclass(frozen=True)
class Rows:
    """The rows of one data set that enter metrics.

    Args:
        dataset: Its name.
        role: ``"id"``, or the name of an out-of-distribution group.
        scores: Each score, ``(n,)`` in float64.
        incorrect: ``(n,)`` bool, the prediction differs from the label; false without a label.
        labelled: ``(n,)`` bool, the row has a label.
        total: The number of rows in the table, including those that are not finite.
    """

    dataset: str
    role: str
    scores: Mapping[str, Tensor]
    incorrect: Tensor
    labelled: Tensor
    total: int

    def __len__(self) -> int:
        return len(self.labelled)

    def summary(self) -> dict[str, Any]:
        """How many rows there are, how many are judged, and the accuracy."""
        labelled = int(self.labelled.sum())
        known = self.role == ID and labelled
        return {
            "name": self.dataset,
            "role": self.role,
            "rows": self.total,
            "not_finite": self.total - len(self),
            "labelled": labelled,
            "accuracy": 1 - int((self.incorrect & self.labelled).sum()) / labelled if known else None,
        }


@dataclass(frozen=True)
class DetectionTask:
    """One question put to every score: positives against negatives.

    Args:
        task: ``"misclassification"`` or ``"ood"``.
        dataset: The data set that is judged.
        group: Its role.
        parts: The data sets that the rows come from, and which rows of each, ``(n_i,)`` bool.
        target: ``(n,)`` bool over the rows of all parts in turn, 1 = positive.
    """

    task: str
    dataset: str
    group: str
    parts: tuple[tuple[str, Tensor], ...]
    target: Tensor

    def values(self, rows: Mapping[str, Rows], score: str) -> Tensor:
        """``(n,)``, a score on the rows of this task."""
        return torch.cat([rows[name].scores[score][mask] for name, mask in self.parts])

    def weights(self, weights: Mapping[str, Tensor]) -> Tensor:
        """``(B, n)``, how often each row of this task is in each resample."""
        return torch.cat([weights[name][:, mask] for name, mask in self.parts], 1)


def rows_of(results: pa.Table, scores: Sequence[str], roles: Mapping[str, str]) -> tuple[dict[str, Rows], list[str]]:
    """Split a results table by data set, and leave out what cannot be ranked.

    A row is left out for every score if it is flagged, or if any of the chosen scores is missing, NaN or infinite, so
    that all scores are judged on the same rows.

    Args:
        results: The per-sample table.
        scores: The columns that are judged.
        roles: The role of each data set.

    Returns:
        The rows of each data set in the order of ``roles``, and notes on what was left out.

    Raises:
        ValueError: If a column is missing, a data set has no role, or a row appears twice.
    """
    _check_columns(results)
    names = np.asarray(results["dataset"].to_pylist(), dtype=object)
    if unknown := sorted(set(names.tolist()) - set(roles)):
        raise ValueError(f"no role for the data sets {unknown}: add each to roles, as in {{'{unknown[0]}': 'id'}}")
    columns = {score: float_column(results, score) for score in scores}
    keep = finite_rows(results, scores)
    rows, notes = {}, []
    for dataset, role in roles.items():
        here = names == dataset
        rows[dataset] = _rows(results, columns, dataset, role, here, here & keep)
        notes += _row_notes(rows[dataset])
    return rows, notes


def _check_columns(results: pa.Table) -> None:
    for name in ("dataset", "index", "prediction", "label"):
        _column(results, name)
    known = results.filter(results["index"].is_valid()).select(["dataset", "index"])  # an unknown index is null
    pairs = known.group_by(["dataset", "index"]).aggregate([])
    if len(pairs) != len(known):
        twice = len(known) - len(pairs)
        raise ValueError(f"{twice} rows repeat a (dataset, index): keep one row a sample, or it counts twice")


def _column(results: pa.Table, name: str) -> pa.ChunkedArray:
    if name not in results.column_names:
        raise ValueError(f"the results have no column {name!r}; columns: {', '.join(results.column_names)}")
    return results[name]


def float_column(results: pa.Table, name: str) -> Any:
    """A column as a float64 array, with NaN for null.

    Raises:
        ValueError: If there is no such column.
    """
    return _column(results, name).cast(pa.float64()).to_numpy()


def finite_rows(results: pa.Table, scores: Sequence[str]) -> Any:
    """``(N,)`` bool: the row is not flagged as not finite, and all these scores are finite."""
    keep = np.ones(len(results), dtype=bool)
    if "finite" in results.column_names:
        keep &= results["finite"].fill_null(False).to_numpy().astype(bool)
    for score in scores:
        keep &= np.isfinite(float_column(results, score))
    return keep


def _rows(results: pa.Table, columns: Mapping[str, Any], dataset: str, role: str, here: Any, keep: Any) -> Rows:
    label, prediction = (float_column(results, name)[keep] for name in ("label", "prediction"))
    labelled = ~np.isnan(label) & ~np.isnan(prediction)
    return Rows(
        dataset=dataset,
        role=role,
        scores={name: torch.from_numpy(column[keep]) for name, column in columns.items()},
        incorrect=torch.from_numpy(labelled & (label != prediction)),
        labelled=torch.from_numpy(labelled),
        total=int(here.sum()),
    )


def _row_notes(rows: Rows) -> list[str]:
    left_out, unlabelled = rows.total - len(rows), len(rows) - int(rows.labelled.sum())
    name = f'"{rows.dataset}"'
    if not rows.total:
        return [f"data set {name} has no rows: it is left out"]
    notes = [f"{left_out} of {rows.total} rows of {name} are not finite and were left out"] if left_out else []
    if rows.role == ID and len(rows) and unlabelled == len(rows):
        notes.append(f"data set {name} has no labels: misclassification is left out")
    elif rows.role == ID and unlabelled:
        notes.append(f"{unlabelled} of {len(rows)} rows of {name} have no label: misclassification leaves them out")
    return notes


def tasks_of(rows: Mapping[str, Rows]) -> tuple[list[DetectionTask], list[str]]:
    """The tasks that the data allow, and notes on those that they do not.

    Misclassification: the errors of an in-distribution data set against its correct predictions. Out-of-distribution: the
    rows of a data set against those of all in-distribution data sets.
    """
    inside = [part for part in rows.values() if part.role == ID and len(part)]
    outside = [part for part in rows.values() if part.role != ID and len(part)]
    tasks = [_misclassification(part) for part in inside if bool(part.labelled.any())]
    notes = [note for task in tasks for note in _one_class_notes(task)]
    if outside and not inside:
        notes.append(
            "no in-distribution rows: out-of-distribution detection is left out; give a data set the role 'id'"
        )
    elif not outside:
        notes.append("no out-of-distribution rows: out-of-distribution detection is left out")
    if inside:
        tasks += [_ood(part, inside) for part in outside]
    return tasks, notes


def _misclassification(part: Rows) -> DetectionTask:
    return DetectionTask(
        "misclassification", part.dataset, ID, ((part.dataset, part.labelled),), part.incorrect[part.labelled]
    )


def _ood(part: Rows, inside: Sequence[Rows]) -> DetectionTask:
    parts = [*inside, part]
    everything = tuple((each.dataset, torch.ones(len(each), dtype=torch.bool)) for each in parts)
    target = torch.cat([torch.full((len(each),), each is part) for each in parts])
    return DetectionTask("ood", part.dataset, part.role, everything, target)


def _one_class_notes(task: DetectionTask) -> list[str]:
    incorrect, total = int(task.target.sum()), len(task.target)
    if 0 < incorrect < total:
        return []
    what = "incorrect" if incorrect else "correct"
    return [f'every prediction on "{task.dataset}" is {what}: misclassification AUROC is undefined']

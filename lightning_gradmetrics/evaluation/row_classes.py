"""The class of each row of a results table: what it counts as in the detection tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lightning_gradmetrics.evaluation.reading import finite_rows, float_column, known_labels

__all__ = ["CORRECT", "ID", "INCORRECT", "KINDS", "OUT", "UNLABELLED", "RowClass", "RowSorter", "dataset_numbers"]

ID = "id"
"""The role of in-distribution data. Any other word names a group of out-of-distribution data."""

CORRECT, INCORRECT, UNLABELLED, OUT = KINDS = ("correct", "incorrect", "unlabelled", "out")
KINDS_OF_ID = (CORRECT, INCORRECT, UNLABELLED)
MOST_CLASSES = 255
"""The class of a row is stored in one byte, which limits the number of classes."""


@dataclass(frozen=True)
class RowClass:
    """Rows of one dataset that every task treats in the same way.

    Args:
        dataset: The dataset.
        role: ``"id"``, or the name of an out-of-distribution group.
        kind: ``"correct"``, ``"incorrect"`` or ``"unlabelled"`` in-distribution rows, or ``"out"``.
        rows: The number of rows.
    """

    dataset: str
    role: str
    kind: str
    rows: int


class RowSorter:
    """Sorts the rows of one table or several into classes, and counts them.

    Args:
        roles: The role of each dataset.

    Raises:
        ValueError: If there are more classes than a byte can number.
    """

    def __init__(self, roles: Mapping[str, str]) -> None:
        self.roles = dict(roles)
        self.names = list(roles)
        self.starts: list[int] = []
        self.kinds: list[tuple[str, str]] = []
        for dataset, role in roles.items():
            self.starts.append(len(self.kinds))
            for kind in KINDS_OF_ID if role == ID else (OUT,):
                self.kinds.append((dataset, kind))
        if len(self.kinds) > MOST_CLASSES:
            raise ValueError(f"at most {MOST_CLASSES // 3} datasets can be evaluated together: evaluate some of them")
        self.sizes = np.zeros(len(self.kinds), dtype=np.int64)
        self.totals = np.zeros(len(self.names), dtype=np.int64)
        self.labelled = np.zeros(len(self.names), dtype=np.int64)
        self._are_negative_classes: bool | None = None

    def sort(self, table: pa.Table, scores: Sequence[str], places: Any = None) -> tuple[Any, Any]:
        """Return the class of each row ``(N,)``, uint8, and whether it can be ranked ``(N,)``, bool; count the rows.

        A row is not ranked for any score if it is flagged as not finite, or if any of the scores is missing, NaN or
        infinite, so that all scores are evaluated on the same rows.

        Args:
            table: With the columns ``dataset``, ``prediction``, ``label`` and the scores.
            scores: The columns to evaluate.
            places: The result of :meth:`places`, if it is known.

        Raises:
            ValueError: If a dataset has no role, or it is unknown whether negative labels are classes.
        """
        datasets = self.places(table) if places is None else places
        keep = finite_rows(table, scores)
        prediction = float_column(table, "prediction")
        label = self._labels(table, prediction)
        is_labelled = ~np.isnan(label) & ~np.isnan(prediction)
        kind = np.where(is_labelled, label != prediction, len(KINDS_OF_ID) - 1).astype(np.uint8)
        is_id = np.array([role == ID for role in self.roles.values()], dtype=bool)
        starts = np.array(self.starts, dtype=np.uint8)
        codes = starts[datasets] + kind * is_id[datasets]
        self.sizes += np.bincount(codes[keep], minlength=len(self.sizes))
        self.totals += np.bincount(datasets, minlength=len(self.names))
        self.labelled += np.bincount(datasets[keep & is_labelled], minlength=len(self.names))
        return codes, keep

    def _labels(self, table: pa.Table, prediction: Any) -> Any:
        """Return the label of each row ``(N,)``, NaN where it is unknown."""
        label, are_classes = known_labels(float_column(table, "label"), prediction)
        if are_classes is not None:
            if self._are_negative_classes not in (None, are_classes):
                raise ValueError(
                    "some labels are negative, and only a part of the rows has negative predictions, so it is unknown whether these "
                    "labels are classes: number the classes from 0, and set unknown labels to null"
                )
            self._are_negative_classes = are_classes
        return label

    def places(self, table: pa.Table) -> Any:
        """Return the number ``(N,)`` of each row's dataset among the roles.

        Raises:
            ValueError: If a dataset has no role.
        """
        names, numbers = dataset_numbers(table)
        if unknown := sorted(set(names) - set(self.names)):
            raise ValueError(f"no role for the datasets {unknown}: add each to roles, as in {{'{unknown[0]}': 'id'}}")
        if not len(numbers):
            return np.zeros(0, dtype=np.int64)
        return np.array(list(map(self.names.index, names)), dtype=np.int64)[numbers]

    def classes(self) -> tuple[RowClass, ...]:
        """Return the classes in the order of their numbers."""
        classes = []
        for (dataset, kind), size in zip(self.kinds, self.sizes, strict=True):
            classes.append(RowClass(dataset, self.roles[dataset], kind, int(size)))
        return tuple(classes)

    def summaries(self) -> list[dict[str, Any]]:
        """Return for each dataset its ``name``, ``role``, ``rows``, ``not_finite``, ``labelled`` and ``accuracy``."""
        summaries = []
        for number, (dataset, role) in enumerate(self.roles.items()):
            sizes: dict[str, int] = {}
            for row_class in self.classes():
                if row_class.dataset == dataset:
                    sizes[row_class.kind] = row_class.rows
            labelled, total = int(self.labelled[number]), int(self.totals[number])
            summaries.append(
                {
                    "name": dataset,
                    "role": role,
                    "rows": total,
                    "not_finite": total - sum(sizes.values()),
                    "labelled": labelled,
                    "accuracy": sizes[CORRECT] / labelled if role == ID and labelled else None,
                }
            )
        return summaries

    def notes(self) -> list[str]:
        """Return sentences on empty datasets, dropped rows and missing labels."""
        notes = []
        for summary in self.summaries():
            notes += _row_notes(summary)
        return notes


def dataset_numbers(table: pa.Table) -> tuple[list[str], Any]:
    """Return the names of the datasets that have rows, and the position ``(N,)`` of each row's dataset among them.

    Raises:
        ValueError: If a row has no dataset.
    """
    column = table["dataset"].combine_chunks()
    if not pa.types.is_dictionary(column.type):
        column = pc.dictionary_encode(column)
    elif column.dictionary.null_count:
        column = pc.dictionary_encode(column.dictionary_decode())
    if column.null_count:
        raise ValueError(f"{column.null_count} rows have no dataset: fill the column 'dataset'")
    names, numbers = column.dictionary.to_pylist(), column.indices.to_numpy(zero_copy_only=False)
    has_rows = np.bincount(numbers, minlength=len(names)) > 0
    if has_rows.all():
        return names, numbers
    # A column of pandas keeps the categories of rows that were filtered out.
    return list(compress(names, has_rows)), (np.cumsum(has_rows) - 1)[numbers]


def _row_notes(summary: Mapping[str, Any]) -> list[str]:
    name, total, dropped = f'"{summary["name"]}"', summary["rows"], summary["not_finite"]
    ranked = total - dropped
    unlabelled = ranked - summary["labelled"]
    if not total:
        return [f"dataset {name} has no rows and is not evaluated"]
    notes = [f"{dropped} of {total} rows of {name} are not finite and were dropped"] if dropped else []
    if summary["role"] == ID and ranked and unlabelled == ranked:
        notes.append(f"dataset {name} has no labels: misclassification is not evaluated")
    elif summary["role"] == ID and unlabelled:
        notes.append(f"{unlabelled} of {ranked} rows of {name} have no label: misclassification ignores them")
    return notes

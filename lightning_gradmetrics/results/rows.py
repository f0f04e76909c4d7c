"""The rows of one dataset while it is scored: they stay on the device until they become a pyarrow table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from lightning_gradmetrics.classifier.forward import Inputs
from lightning_gradmetrics.results.finite import finite_rows
from lightning_gradmetrics.results.sample_index import REPEATED, UNKNOWN, SampleIndex

__all__ = ["FurtherColumns", "Rows", "Unscored", "empty_results"]


@dataclass(frozen=True)
class FurtherColumns:
    """Additional columns, with one value per row, or with lists: of the tokens of texts, of the segments of images.

    Args:
        values: One value per row ``(N,)`` by column.
        lists: The entries of all lists ``(M, ...)`` by column, one row after the other.
        lengths: The number of entries of each row ``(N,)``, equal for all lists; ``None`` if there are none.
        are_texts: Whether the rows are texts, which have no prediction.
    """

    values: Mapping[str, Tensor]
    lists: Mapping[str, Tensor] = field(default_factory=dict)
    lengths: Tensor | None = None
    are_texts: bool = False

    def named(self) -> dict[str, Tensor]:
        """Return the tensors by key: ``lengths``, ``value/<column>`` and ``list/<column>``."""
        columns = {} if self.lengths is None else {"lengths": self.lengths}
        for name, values in self.values.items():
            columns[f"value/{name}"] = values.detach()
        for name, values in self.lists.items():
            columns[f"list/{name}"] = values.detach()
        return columns


class Unscored(Protocol):
    """Rows that wait for their scores."""

    rows: int
    """The number of rows."""

    def settle(self) -> None:
        """Compute their scores, and add them to the rows that are kept."""


MERGED_BATCHES = 256


@dataclass
class Rows:
    """The rows of one dataset, which stay on the device until they are read.

    Args:
        dataset: The dataset's name.
        scores: The names of the score columns.
        index: Yields the index of each row in the dataset.
        forget_labels: Whether to leave labels out of the table.
        vectors: The names of additional columns, whose values are lists of numbers.
        has_ids: Whether each row has a sample id.
    """

    dataset: str
    scores: Sequence[str]
    index: SampleIndex = field(default_factory=SampleIndex)
    forget_labels: bool = False
    vectors: Sequence[str] = ()
    has_ids: bool = False
    batches: list[dict[str, Tensor]] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    added: int = 0
    """The number of rows that were added so far."""
    kept: int = 0
    """The number of rows in memory that have their scores."""
    size: int = 0
    """The number of bytes of the rows in memory, excluding ids."""
    are_texts: bool = False
    """Whether the rows are texts with columns of their tokens."""
    unmerged: int = 0
    """The number of the last batches that are not merged yet."""
    unscored: Unscored | None = None
    """Further rows, whose scores are computed before the rows are read."""

    def add(
        self,
        index: Tensor,
        inputs: Inputs | None,
        logits: Tensor,
        labels: Tensor | None,
        scores: Mapping[str, Tensor],
        vectors: Mapping[str, Tensor] | None = None,
        ids: Sequence[str] = (),
        further: FurtherColumns | None = None,
    ) -> dict[str, Tensor]:
        """Add a batch, and return its columns: ``index``, ``prediction``, ``label`` and ``finite``, ``(N,)`` each.

        Args:
            index: The index of each row ``(N,)``.
            inputs: The model's inputs.
            logits: ``(N, C)``.
            labels: True labels ``(N,)``, or ``None``.
            scores: The scores by name, ``(N,)`` each.
            vectors: Additional columns ``(N, ...)`` by name.
            ids: The id of each sample, if the rows have ids.
            further: Additional columns of texts or images.
        """
        if self.unscored is not None:
            self.unscored.settle()
        finite = finite_rows(inputs, (logits, *scores.values()), len(logits))
        return self.keep(index, finite, logits, labels, scores, vectors, ids, further)

    def keep(
        self,
        index: Tensor,
        finite: Tensor,
        logits: Tensor,
        labels: Tensor | None,
        scores: Mapping[str, Tensor],
        vectors: Mapping[str, Tensor] | None = None,
        ids: Sequence[str] = (),
        further: FurtherColumns | None = None,
    ) -> dict[str, Tensor]:
        """Add rows whose scores were computed later than their other columns; arguments and result are those of :meth:`add`.

        Args:
            index: The index of each row ``(N,)``.
            finite: Whether each row is free of NaN and Inf ``(N,)``.
            logits: ``(N, C)``.
            labels: True labels ``(N,)``, or ``None``.
            scores: The scores by name, ``(N,)`` each.
            vectors: Additional columns ``(N, ...)`` by name.
            ids: The id of each sample, if the rows have ids.
            further: Additional columns of texts or images.
        """
        prediction = logits.argmax(1)
        if further is not None and further.are_texts:
            prediction, self.are_texts = torch.full_like(prediction, -1), True
        known = torch.full_like(prediction, -1) if labels is None else labels.to(prediction)
        columns = {"index": index, "prediction": prediction, "label": known, "finite": finite.to(prediction.device)}
        batch = dict(columns)
        for name, values in {**scores, **(vectors or {})}.items():
            batch[f"column/{name}"] = values.detach()
        if further is not None:
            batch.update(further.named())
        self._keep(batch)
        self.ids += ids
        self.added += len(logits)
        self.kept += len(logits)
        self.size += sum(values.nbytes for values in batch.values())
        return columns

    @property
    def waiting(self) -> int:
        """The number of rows in memory."""
        return self.kept if self.unscored is None else self.kept + self.unscored.rows

    def _keep(self, batch: dict[str, Tensor]) -> None:
        """Add the columns of a batch, and merge small batches, because a tensor needs more memory than a few values."""
        self.batches.append(batch)
        self.unmerged += 1
        if self.unmerged == MERGED_BATCHES:
            recent, self.unmerged = self.batches[-MERGED_BATCHES:], 0
            merged = {}
            for key in batch:
                merged[key] = torch.cat([one[key] for one in recent])
            self.batches[-MERGED_BATCHES:] = [merged]

    def drained(self) -> pa.Table:
        """Return the rows in memory and remove them."""
        table = self.table()
        self.batches, self.ids = [], []
        self.kept = self.size = self.unmerged = 0
        return table

    def table(self) -> pa.Table:
        """Return the rows in memory, without those that are left out; an unknown index is null."""
        if self.unscored is not None:
            self.unscored.settle()
        if not self.batches:
            return empty_results(self.scores)
        columns = {key: _joined(self.batches, key) for key in self.batches[0]}
        index, label = columns["index"], columns["label"]
        arrays = {
            "dataset": pa.repeat(self.dataset, len(index)),
            "index": pa.array(index, pa.int64(), mask=index == UNKNOWN),
            "prediction": pa.array(columns["prediction"], pa.int64(), mask=columns["prediction"] < 0),
            "label": pa.array(label, pa.int64(), mask=(label < 0) | self.forget_labels),
        }
        if self.has_ids:
            arrays["sample_id"] = pa.array(self.ids, pa.string())
        for name in self.scores:
            arrays[name] = pa.array(columns[f"column/{name}"].astype("float64"), pa.float64())
        arrays["finite"] = pa.array(columns["finite"], pa.bool_())
        for name in self.vectors:
            arrays[name] = _lists(columns[f"column/{name}"])
        arrays.update(_further_columns(columns))
        table, is_kept = pa.table(arrays), index != REPEATED
        return table if is_kept.all() else table.filter(pa.array(is_kept))


def _joined(batches: Sequence[Mapping[str, Tensor]], key: str) -> Any:
    """Return one column of all batches, as an array."""
    joined = torch.cat([batch[key] for batch in batches]).cpu()
    is_narrow = joined.is_floating_point() and joined.dtype not in (torch.float32, torch.float64)
    return (joined.float() if is_narrow else joined).numpy()


def _lists(values: Any) -> pa.Array:
    """Return an array ``(N, ...)`` as a column of fixed-length lists."""
    width = math.prod(values.shape[1:])
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), width)


def _further_columns(columns: Mapping[str, Any]) -> dict[str, pa.Array]:
    """Return the additional columns: one value per row, or a list of any length."""
    arrays = {}
    for key, values in columns.items():
        kind, _, name = key.partition("/")
        if kind == "value":
            arrays[name] = pa.array(values)
        elif kind == "list":
            ends = np.concatenate([[0], columns["lengths"].cumsum()])
            entries = pa.array(values) if values.ndim == 1 else _lists(values)
            arrays[name] = pa.ListArray.from_arrays(pa.array(ends, pa.int32()), entries)
    return arrays


def _schema(scores: Sequence[str]) -> pa.Schema:
    head = [("dataset", pa.string()), ("index", pa.int64()), ("prediction", pa.int64()), ("label", pa.int64())]
    return pa.schema([*head, *((name, pa.float64()) for name in scores), ("finite", pa.bool_())])


def empty_results(scores: Sequence[str]) -> pa.Table:
    """Return the results table with no rows."""
    return _schema(scores).empty_table()

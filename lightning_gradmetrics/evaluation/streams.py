"""Results that are read batch by batch, as often as the evaluation needs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from lightning_gradmetrics.evaluation.reading import as_table, chosen_columns, is_dataset
from lightning_gradmetrics.results.seen_rows import SeenRows
from lightning_gradmetrics.results.stored import StoredResults

if TYPE_CHECKING:
    from pyarrow.dataset import Dataset

__all__ = ["COLUMNS", "Stream", "file_dataset", "stream_of"]

ROWS_PER_BATCH = 2**18
COLUMNS = ("dataset", "index", "prediction", "label")
"""The columns that every evaluation needs, beside its scores."""


@dataclass(frozen=True)
class Stream:
    """Results that can be read more than once.

    Args:
        name: Their name in messages.
        rows: The number of rows.
        columns: The names of the columns.
        read: Yields the rows of some columns in tables of a bounded number of rows.
        sizes: The number of samples of each dataset, where it is known.
    """

    name: str
    rows: int
    columns: Sequence[str]
    read: Callable[[Sequence[str]], Iterator[pa.Table]]
    sizes: Mapping[str, int | None] = field(default_factory=dict)

    def batches(self, scores: Sequence[str]) -> Iterator[pa.Table]:
        """Yield the columns that the evaluation needs.

        Raises:
            ValueError: If a column is missing.
        """
        return self.read(chosen_columns(self.columns, [*COLUMNS, *scores], ["finite"]))

    def checked_batches(self, scores: Sequence[str]) -> Iterator[pa.Table]:
        """Yield the columns that the evaluation needs, and check that no row is missing or repeated.

        Raises:
            IncompleteResultsError: If a row is.
        """
        rows_so_far = SeenRows(self.name)
        for table in self.batches(scores):
            rows_so_far.add(table)
            yield table
        rows_so_far.check(self.sizes)


def stream_of(results: Any) -> Stream:
    """Return results as a stream.

    Args:
        results: A results directory, a Parquet file, an Arrow dataset, or a table of any kind that
            :func:`~lightning_gradmetrics.evaluation.evaluate` accepts.

    Raises:
        FileNotFoundError: If a directory contains no results.
        IncompleteResultsError: If the run that wrote a directory was interrupted, or its parts were changed.
        TypeError: If the results are of another kind.
    """
    if isinstance(results, (str, Path)) and Path(results).is_file():
        results = file_dataset(results)
    if isinstance(results, (str, Path)):
        stored = StoredResults(results)
        return Stream(str(results), stored.rows, stored.columns, stored.batches, stored.sizes)
    if is_dataset(results):
        return Stream("the dataset", results.count_rows(), results.schema.names, _reader_of(results))
    table = as_table(results)
    return Stream("the table", table.num_rows, table.column_names, _reader_of(table))


def file_dataset(path: str | Path) -> Dataset:
    """Return a Parquet file as a dataset, which is read column by column."""
    from pyarrow.dataset import dataset

    return dataset(path)


def _reader_of(results: Dataset | pa.Table) -> Callable[[Sequence[str]], Iterator[pa.Table]]:
    def read(columns: Sequence[str]) -> Iterator[pa.Table]:
        if is_dataset(results):
            batches = results.to_batches(columns=list(columns), batch_size=ROWS_PER_BATCH)
        else:
            batches = results.select(list(columns)).to_batches(max_chunksize=ROWS_PER_BATCH)
        for batch in batches:
            if batch.num_rows:
                yield pa.Table.from_batches([batch])

    return read

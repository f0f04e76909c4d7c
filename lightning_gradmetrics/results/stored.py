"""Reads a results directory batch by batch, so that memory does not grow with the number of rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from lightning_gradmetrics.results.reading import stored_parts, unlabelled_datasets, without_labels

__all__ = ["StoredResults"]

ROWS_PER_BATCH = 2**18


class StoredResults:
    """The results of a run in a directory.

    Args:
        directory: A results directory, as :func:`~lightning_gradmetrics.results.reading.read_results` reads it.

    Attributes:
        rows: The number of rows.
        columns: The names of the columns.
        sizes: The number of samples of each dataset, ``None`` where it is unknown.

    Raises:
        FileNotFoundError: If the directory contains no results.
        IncompleteResultsError: If the run was interrupted, or a part is missing or was changed.
    """

    def __init__(self, directory: str | Path) -> None:
        stored = stored_parts(directory)
        if not stored.parts:
            raise FileNotFoundError(f"{directory} contains the results of a run without samples")
        self.parts, self.rows, self.sizes = stored.parts, stored.rows, stored.sizes
        self.columns = pq.read_schema(self.parts[0]).names
        self._unlabelled = unlabelled_datasets(self.parts)

    def batches(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Yield the rows of all parts in tables of a bounded number of rows.

        Args:
            columns: The columns to read, ``dataset`` among them.
        """
        for part in self.parts:
            with pq.ParquetFile(part) as file:
                for batch in file.iter_batches(ROWS_PER_BATCH, columns=list(columns)):
                    yield without_labels(pa.Table.from_batches([batch]), self._unlabelled)

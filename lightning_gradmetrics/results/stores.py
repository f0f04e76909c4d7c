"""Stores for the rows of a run: memory, or a results directory."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from lightning_gradmetrics.results.identity import expected_rows
from lightning_gradmetrics.results.output import Output
from lightning_gradmetrics.results.parts import ABOUT, PART, ResultsWriter, difference
from lightning_gradmetrics.results.reading import committed_rows, has_images, read_results
from lightning_gradmetrics.results.resuming import (
    NO_IMAGES,
    check_images,
    check_new,
    check_resumable,
    check_stream,
    committed_mask,
)
from lightning_gradmetrics.results.rows import Rows, empty_results
from lightning_gradmetrics.results.table import merge_results

__all__ = ["DirectoryStore", "MemoryStore", "Results", "Store", "read_columns"]

BYTES_PER_PART = 2**26
SECONDS_PER_PART = 60.0
"""Seconds between commits; if the process is killed, at most the rows of this period are lost."""

Results: TypeAlias = pa.Table | Callable[..., pa.Table]
"""A results table, or a function that reads one; its argument ``columns=`` takes the names of the wanted columns."""


def read_columns(results: Results, names: Sequence[str] | None = None) -> pa.Table:
    """Return columns of results in memory or on disk.

    Args:
        results: The results.
        names: The columns; ``None`` for all.
    """
    if callable(results):
        return results(columns=names)
    return results if names is None else results.select(list(names))


Complete = Callable[[pa.Table], pa.Table]
"""A function that adds columns computed from others, such as decisions."""


class Store(Protocol):
    """Receives the rows of a run."""

    def after_batch(self, rows: Rows) -> None:
        """Called after each batch of a dataloader; stores rows if it is time."""
        ...

    def leave_out(self, datasets: Collection[str]) -> None:
        """Called at the end with the datasets that lack rows, because the step left out samples."""
        ...

    def share(self) -> Any:
        """Store all rows, and return the value that rank 0 needs from this process."""
        ...

    def join(self, shared: Sequence[Any]) -> None:
        """Complete the results on rank 0 from the values of all processes."""
        ...

    def judged(self, scores: Sequence[str]) -> pa.Table | Path:
        """Return the rows of all processes, or the directory that contains them."""
        ...

    def results(self) -> Results:
        """Return the results."""
        ...

    def interrupt(self) -> None:
        """Store all rows after an error or a signal."""
        ...

    def advice(self) -> str:
        """Return advice for the user after an interruption."""
        ...

    def close(self) -> None:
        """End the run."""
        ...


@dataclass
class MemoryStore:
    """Keeps the rows in memory.

    Args:
        rows: The rows of each dataloader.
        complete: Adds columns computed from others.
    """

    rows: Sequence[Rows]
    complete: Complete
    table: pa.Table | None = None

    def after_batch(self, rows: Rows) -> None:
        """Do nothing."""

    def leave_out(self, datasets: Collection[str]) -> None:
        """Do nothing."""

    def share(self) -> pa.Table:
        """Return the rows of this process."""
        self.join([rows.table() for rows in self.rows])
        return self.table

    def join(self, shared: Sequence[pa.Table]) -> None:
        """Merge the rows of all processes; those of a single process are merged already."""
        if len(shared) == 1 and shared[0] is self.table:
            return
        names = [rows.dataset for rows in self.rows]
        scores = self.rows[0].scores if self.rows else ()
        self.table = merge_results([*shared, empty_results(scores)], names)

    def judged(self, scores: Sequence[str]) -> pa.Table:
        """Return the merged rows."""
        return self.table

    def results(self) -> pa.Table:
        """Return the merged rows of the last run."""
        return self.complete(self.table)

    def interrupt(self) -> None:
        """Keep the rows."""
        self.share()

    def advice(self) -> str:
        """Return no advice."""
        return ""

    def close(self) -> None:
        """Do nothing."""


@dataclass
class DirectoryStore:
    """Commits the rows to a results directory, and keeps only a few of them in memory.

    Args:
        writer: Writes the parts.
        output: Where the results are stored.
        rows: The rows of each dataloader.
        complete: Adds columns computed from others.
        sizes: The number of rows of each dataset, ``None`` where it is unknown.
    """

    writer: ResultsWriter
    output: Output
    rows: Sequence[Rows]
    complete: Complete
    sizes: Mapping[str, int | None]
    _last: float = field(default_factory=time.monotonic)
    _is_incomplete: bool = False
    _problem: str = ""

    @classmethod
    def start(
        cls,
        output: Output,
        rows: Sequence[Rows],
        loaders: Sequence[Any],
        run: Mapping[str, Any],
        about: Mapping[str, Any],
        complete: Complete,
        *,
        rank: int = 0,
        is_limited: bool = False,
    ) -> DirectoryStore:
        """Open the directory, and skip the rows that an interrupted run committed.

        Args:
            output: Where the results are stored.
            rows: The rows of each dataloader.
            loaders: The dataloaders.
            run: Everything that the results depend on.
            about: Facts that may differ in a resumed run.
            complete: Adds columns computed from others.
            rank: The number of this process.
            is_limited: Whether only part of the batches is scored.

        Raises:
            FileExistsError: If the directory contains results and the run does not resume them.
            ResumeError: If it contains the results of another run or of a segmentation model, or the rows of a dataloader
                are unknown.
            RuntimeError: If another process writes to it.
        """
        sizes: dict[str, int | None] = {}
        for table, loader in zip(rows, loaders, strict=True):
            sizes[table.dataset] = None if is_limited else expected_rows(loader)
        if not output.resume:
            check_new(output.directory)
        writer = ResultsWriter(
            output.directory, run, about=about, rank=rank, rows_per_part=output.rows_per_part, resume=output.resume
        )
        store = cls(writer, output, rows, complete, sizes)
        try:
            check_images(output.directory)
            store._leave_out_committed(loaders)
        except BaseException:
            store.close()
            raise
        return store

    def _leave_out_committed(self, loaders: Sequence[Any]) -> None:
        committed = committed_rows(self.output.directory)
        for table, loader in zip(self.rows, loaders, strict=True):
            name = table.dataset
            described = self.writer.run["datasets"][name]
            unknown = committed.unknown.get(name, 0)
            if not len(committed.indices.get(name, ())) and not unknown:
                continue
            if described["rows"] is None:
                check_stream(loader, name, unknown, is_skipped=True)
                continue
            check_resumable(name, described, unknown)
            table.index.committed = committed_mask(name, committed, described["rows"])

    def changes(self) -> str | None:
        """Return a description of the differences from the interrupted run that change scores by rounding at most."""
        parts = sorted(self.output.directory.glob(PART))
        if not parts:
            return None
        stored = json.loads((pq.read_schema(parts[0]).metadata or {}).get(ABOUT, b"{}"))
        return difference("", stored, self.writer.about)

    def after_batch(self, rows: Rows) -> None:
        """Commit rows once there are enough or a minute has passed.

        Raises:
            OSError: If the part cannot be written; committed parts are intact.
        """
        is_late = time.monotonic() - self._last > SECONDS_PER_PART
        if is_late or rows.waiting >= self.output.rows_per_part or rows.size >= BYTES_PER_PART:
            self._commit([rows])

    def _commit(self, tables: Sequence[Rows]) -> None:
        for rows in tables:
            if rows.forget_labels:
                self.writer.unlabelled.add(rows.dataset)
            if rows.waiting:
                self.writer.add(self.complete(rows.drained()))
        self.writer.commit()
        self._last = time.monotonic()

    def share(self) -> list[str]:
        """Commit all rows, and return the names of the parts of this process.

        Raises:
            OSError: If a part cannot be written; committed parts are intact.
        """
        self._commit(self.rows)
        return self.writer.parts

    def leave_out(self, datasets: Collection[str]) -> None:
        """Expect no number of rows of some datasets: the step left out samples."""
        self.sizes = {**self.sizes, **dict.fromkeys(self.sizes.keys() & set(datasets))}

    def join(self, shared: Sequence[Sequence[str]]) -> None:
        """Write the manifest, which marks the results as complete.

        Raises:
            RuntimeError: If parts of other processes are missing in the directory.
        """
        for names in shared:
            for name in names:
                if not (self.output.directory / name).exists():
                    raise RuntimeError(
                        f"{self.output.directory} lacks {name}, which another process wrote: output= must be a directory that "
                        "all machines share"
                    )
        self.writer.finish(self.sizes)

    def judged(self, scores: Sequence[str]) -> pa.Table | Path:
        """Return the directory, which the evaluation reads."""
        return empty_results(scores) if self.writer.is_empty else self.output.directory

    def results(self) -> Results:
        """Return a function that reads the results."""
        if self.writer.is_empty:
            return empty_results(self.rows[0].scores if self.rows else ())
        return partial(read_results, self.output.directory, incomplete=self._is_incomplete)

    def interrupt(self) -> None:
        """Commit the scored rows."""
        self._is_incomplete = True
        try:
            self._commit(self.rows)
        except OSError as error:
            self._problem = f"{error.strerror}\n"
        finally:
            self.close()

    def advice(self) -> str:
        """Return how many rows all processes committed, and how to resume, or that the run cannot be resumed."""
        count = committed_rows(self.output.directory).total
        if count == 0:
            return f"{self._problem}no rows are committed in {self.output.directory}"
        rest = NO_IMAGES if has_images(self.output.directory) else self.output.how_to_resume()
        return f"{self._problem}{count} rows are committed in {self.output.directory}. {rest}"

    def close(self) -> None:
        """Release the directory for other runs."""
        self.writer.close()

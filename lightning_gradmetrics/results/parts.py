"""Results on disk: a directory of Parquet parts that survives a kill at any moment.

A part holds a bounded number of rows. It is written to a temporary file, flushed to the disk and renamed, so that a
directory never holds half a part. A manifest is written last and lists every part. :func:`read_results` returns the
rows as one table and refuses a directory whose rows are incomplete or repeated.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from lightning_gradmetrics.results.table import merge_results

__all__ = ["IncompleteResultsError", "ResultsWriter", "ResumeError", "committed_indices", "read_results"]

MANIFEST = "manifest.json"
LOCK = ".lock"
PART = "part-*.parquet"
RUN = b"lightning_gradmetrics"
"""Key of the run's metadata in the schema of every part."""

ROWS_PER_PART = 100_000
SHOWN = 10
"""Rows that an error message names."""


class IncompleteResultsError(ValueError):
    """A results directory has missing or repeated rows."""


class ResumeError(ValueError):
    """A run cannot be resumed: the directory holds the results of another run."""


def write_file(path: Path, content: bytes) -> None:
    """Write a file so that it is either the old one or the whole new one, whatever happens.

    Args:
        path: The file.
        content: Its bytes.
    """
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_directory(path.parent)


def _sync_directory(directory: Path) -> None:
    if os.name == "nt":  # directories cannot be opened there
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class ResultsWriter:
    """Writes result rows to a directory of Parquet parts while a run goes on.

    Args:
        directory: The results directory; created if it is missing.
        run: What the results depend on (score arguments, roles, class names, model fingerprint, package versions), as
            plain JSON values. It is stored in the schema of every part, and a resumed run must have the same.
        rank: The number of this process; each process writes parts with its own names.
        rows_per_part: Rows that are kept in memory before a part is committed.
        resume: Whether to add to the committed parts of an interrupted run.

    Raises:
        FileExistsError: If the directory holds results and ``resume`` is false.
        ResumeError: If the committed parts are those of another run.
        RuntimeError: If another process is writing to the directory.

    Example:
        >>> import tempfile
        >>> rows = pa.table({"dataset": ["val"] * 2, "index": [0, 1], "entropy": [0.1, 0.9]})
        >>> directory = tempfile.mkdtemp()
        >>> with ResultsWriter(directory, {"scores": ["entropy"]}) as writer:
        ...     writer.add(rows)
        ...     writer.finish({"val": 2})
        >>> read_results(directory)["entropy"].to_pylist()
        [0.1, 0.9]
    """

    def __init__(
        self,
        directory: str | Path,
        run: Mapping[str, Any],
        *,
        rank: int = 0,
        rows_per_part: int = ROWS_PER_PART,
        resume: bool = False,
    ) -> None:
        self.directory, self.rank, self.rows_per_part = Path(directory), rank, rows_per_part
        self._run = json.dumps(run, sort_keys=True)
        self._waiting: list[pa.Table] = []
        self._waiting_rows = 0
        self.directory.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.directory / f"{LOCK}-{rank}", timeout=0)
        self._acquire()
        try:
            self._open(resume)
        except BaseException:
            self.close()
            raise

    def _acquire(self) -> None:
        try:
            self._lock.acquire()
        except Timeout as error:
            raise RuntimeError(
                f"another process is writing results to {self.directory}; wait for it or choose another directory"
            ) from error

    def _open(self, resume: bool) -> None:
        parts = sorted(self.directory.glob(PART))
        manifest = self.directory / MANIFEST
        if (parts or manifest.exists()) and not resume:
            raise FileExistsError(
                f"{self.directory} holds results already; pass resume=True to complete them or choose another directory"
            )
        for part in parts:
            check_run(part, self._run)
        for leftover in self.directory.glob(f"part-{self.rank:04d}-*.tmp-*"):
            leftover.unlink()
        self._number = len(list(self.directory.glob(f"part-{self.rank:04d}-*.parquet")))

    def __enter__(self) -> ResultsWriter:
        """Return the writer; leaving the block commits the rows that it holds, also after an error."""
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self.commit()
        finally:
            self.close()

    def add(self, rows: pa.Table) -> None:
        """Add rows; once there are enough of them, commit a part.

        Args:
            rows: A results table with the columns ``dataset`` and ``index``.

        Raises:
            OSError: If the part cannot be written; committed parts are intact.
        """
        self._waiting.append(rows)
        self._waiting_rows += rows.num_rows
        if self._waiting_rows >= self.rows_per_part:
            self.commit()

    def commit(self) -> None:
        """Write the rows that are held in memory as one part, if there are any.

        Raises:
            OSError: If the part cannot be written; committed parts are intact.
        """
        if not self._waiting_rows:
            return
        table = pa.concat_tables(self._waiting)
        table = table.replace_schema_metadata({**(table.schema.metadata or {}), RUN: self._run.encode()})
        path = self.directory / f"part-{self.rank:04d}-{self._number:06d}.parquet"
        buffer = pa.BufferOutputStream()
        pq.write_table(table, buffer)
        try:
            write_file(path, buffer.getvalue().to_pybytes())
        except OSError as error:
            raise OSError(
                error.errno,
                f"could not write {self._waiting_rows} rows to {path}: {error.strerror}. The parts written before are "
                "intact: make room and resume the run",
            ) from error
        self._number += 1
        self._waiting, self._waiting_rows = [], 0

    def finish(self, sizes: Mapping[str, int | None]) -> None:
        """Commit what is left and write the manifest: the results are complete.

        Args:
            sizes: Number of samples of each data set, in the order of the results; ``None`` where it is unknown.
        """
        self.commit()
        rows: dict[str, int] = {}
        for part in sorted(self.directory.glob(PART)):
            rows[part.name] = pq.read_metadata(part).num_rows
        manifest = {"datasets": dict(sizes), "parts": rows, "run": json.loads(self._run)}
        write_file(self.directory / MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())

    def close(self) -> None:
        """Let other processes write to the directory."""
        self._lock.release()


def check_run(part: Path, run: str) -> None:
    """Refuse a part that another run wrote.

    Args:
        part: A committed part.
        run: The metadata of the run that wants to resume, as JSON.

    Raises:
        ResumeError: If they differ; the message names the first difference.
    """
    metadata = pq.read_schema(part).metadata or {}
    if RUN not in metadata:
        raise ResumeError(f"{part} was not written by this package; choose another directory")
    stored, wanted = json.loads(metadata[RUN]), json.loads(run)
    for key in sorted(stored.keys() | wanted.keys()):
        if stored.get(key) != wanted.get(key):
            raise ResumeError(
                f"cannot resume {part.parent}: its {key} is {stored.get(key)!r} and this run's is {wanted.get(key)!r}. "
                "Resume with the same settings, or choose another directory"
            )


def committed_indices(directory: str | Path) -> dict[str, np.ndarray[Any, Any]]:
    """Return the indices that are committed, sorted, by data set.

    Args:
        directory: A results directory, complete or not.

    Raises:
        ResumeError: If a row has no index, so that nobody can tell which samples are left.
    """
    indices: dict[str, list[np.ndarray[Any, Any]]] = {}
    for part in sorted(Path(directory).glob(PART)):
        for name, values in _indices_by_dataset(pq.read_table(part, columns=["dataset", "index"])):
            if values.null_count:
                raise ResumeError(
                    f"the rows of {name!r} in {directory} have no index, so the samples that are left are unknown; "
                    "score the data set again in another directory"
                )
            indices.setdefault(name, []).append(values.to_numpy())
    return {name: np.unique(np.concatenate(parts)) for name, parts in indices.items()}


def _indices_by_dataset(table: pa.Table) -> Iterator[tuple[str, pa.ChunkedArray]]:
    for name in pc.unique(table["dataset"]).to_pylist():
        yield name, table.filter(pc.equal(table["dataset"], name))["index"]


def read_results(directory: str | Path, *, incomplete: bool = False) -> pa.Table:
    """Read the results of a run as one table, in the order of the data sets and of their indices.

    Args:
        directory: A results directory that a run wrote (``output=``).
        incomplete: Whether to accept the results of an interrupted run. Repeated rows are refused all the same.

    Returns:
        One row per sample: ``dataset``, ``index``, ``prediction``, ``label``, one column per score, ``finite``. The
        run's metadata is in the schema.

    Raises:
        FileNotFoundError: If the directory holds no results.
        IncompleteResultsError: If the run was interrupted, or rows are missing or repeated; the message names them.

    Example:
        >>> import tempfile
        >>> directory = tempfile.mkdtemp()
        >>> with ResultsWriter(directory, {}) as writer:
        ...     writer.add(pa.table({"dataset": ["val"], "index": [1], "entropy": [0.5]}))
        >>> read_results(directory, incomplete=True).num_rows
        1
        >>> read_results(directory)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        lightning_gradmetrics.results.parts.IncompleteResultsError: the run that wrote ... was interrupted after 1 row...
    """
    directory = Path(directory)
    parts = sorted(directory.glob(PART))
    manifest = directory / MANIFEST
    if not parts and not manifest.exists():
        raise FileNotFoundError(f"{directory} holds no results; expected the folder that output= named")
    tables = list(map(pq.read_table, parts))
    rows = sum(table.num_rows for table in tables)
    if not manifest.exists():
        if not incomplete:
            raise IncompleteResultsError(
                f"the run that wrote {directory} was interrupted after {rows} row{'s' * (rows != 1)}; resume it, or pass "
                "incomplete=True to read what there is"
            )
        sizes: dict[str, int | None] = {}
    else:
        content = json.loads(manifest.read_text())
        sizes = content["datasets"]
        _check_parts(directory, content["parts"], dict(zip(parts, tables, strict=True)))
    table = pa.concat_tables(tables) if tables else pa.table({})
    names = list(sizes) or pc.unique(table["dataset"]).to_pylist()
    for name, indices in _indices_by_dataset(table) if tables else ():
        _check_indices(directory, name, indices, sizes.get(name))
    return merge_results([table], names) if tables else table


def _check_parts(directory: Path, expected: Mapping[str, int], tables: Mapping[Path, pa.Table]) -> None:
    found = {path.name: table.num_rows for path, table in tables.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise IncompleteResultsError(
                f"{directory / name} has {found.get(name, 0)} rows and the manifest lists {expected.get(name, 0)}; the "
                "directory was changed after the run: score the data again"
            )


def _check_indices(directory: Path, dataset: str, indices: pa.ChunkedArray, size: int | None) -> None:
    known = indices.drop_null().to_numpy()
    unique, counts = np.unique(known, return_counts=True)
    repeated = unique[counts > 1]
    if len(repeated):
        raise IncompleteResultsError(f"{directory} has rows of {dataset!r} more than once: {_named(repeated)}")
    if size is None or len(known) < len(indices):
        return
    missing = np.setdiff1d(np.arange(size), unique)
    if len(missing):
        raise IncompleteResultsError(f"{directory} lacks rows of {dataset!r}: {_named(missing)}")


def _named(indices: np.ndarray[Any, Any]) -> str:
    shown = ", ".join(map(str, indices[:SHOWN]))
    more = len(indices) - SHOWN
    return f"indices {shown}" + (f" and {more} more" if more > 0 else "")

"""Results on disk: a directory of Parquet parts that stays valid if the process is killed at any moment.

A part contains a limited number of rows. To *commit* a part, it is written to a temporary file, flushed to the disk and
renamed, so that a directory never contains half a part. The manifest, which lists every part, is written last.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from lightning_gradmetrics.results.files import temporary_files, write_file

__all__ = [
    "ABOUT",
    "MANIFEST",
    "PART",
    "ROWS_PER_PART",
    "RUN",
    "ResultsWriter",
    "ResumeError",
    "check_run",
    "difference",
]

MANIFEST = "_manifest.json"
"""The last file of a run. Programs that read a directory of Parquet files skip names that start with an underscore."""

LOCK = ".lock"
PART = "part-*.parquet"
RUN = b"lightning_gradmetrics"
"""Key in the schema of every part: the description of everything that the results depend on."""

ABOUT = b"lightning_gradmetrics.about"
"""Key in the schema of every part: facts that may differ in a resumed run, such as package versions."""

UNLABELLED = b"lightning_gradmetrics.unlabelled"
"""Key in the schema of a part: datasets whose labels turned out not to be classes, also in earlier parts."""

ROWS_PER_PART = 100_000
SECONDS_FOR_LOCK = 8.0
"""Seconds to wait for a lock, because worker processes of a killed run hold it for up to 5 seconds."""


class ResumeError(ValueError):
    """A run cannot be resumed, because the directory contains the results of another run."""


class ResultsWriter:
    """Writes result rows to a directory of Parquet parts during a run.

    Args:
        directory: The results directory; created if it is missing.
        run: Everything that the results depend on (scores, model, datasets), as plain JSON values. It is stored in the
            schema of every part and must be equal in a resumed run.
        about: Facts that may differ in a resumed run (package versions), as plain JSON values; also stored in the schema.
        rank: The number of this process, which is part of the file names.
        rows_per_part: Number of rows in memory that triggers a commit.
        resume: Whether to continue an interrupted run by adding to its parts.

    Raises:
        FileExistsError: If the directory contains results and ``resume`` is false.
        ResumeError: If another run wrote the committed parts.
        RuntimeError: If another process is writing to the directory.

    Example:
        >>> import tempfile
        >>> from lightning_gradmetrics.results import read_results
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
        about: Mapping[str, Any] | None = None,
        rank: int = 0,
        rows_per_part: int = ROWS_PER_PART,
        resume: bool = False,
    ) -> None:
        self.directory, self.rank, self.rows_per_part = Path(directory), rank, rows_per_part
        self.run: dict[str, Any] = json.loads(json.dumps(run))
        self.about: dict[str, Any] = json.loads(json.dumps(about or {}))
        self._waiting: list[pa.Table] = []
        self._waiting_rows = 0
        self.unlabelled: set[str] = set()
        self.directory.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.directory / f"{LOCK}-{rank}", timeout=SECONDS_FOR_LOCK if resume else 0)
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
                f"{self.directory} already contains results; pass resume=True to complete them or choose another directory"
            )
        for part in parts:
            check_run(part, self.run)
        for leftover in temporary_files(self.directory, f"part-{self.rank:04d}-*"):
            leftover.unlink()
        self._number = len(list(self.directory.glob(f"part-{self.rank:04d}-*.parquet")))

    def __enter__(self) -> ResultsWriter:
        """Return the writer; at the end of the block its rows are committed, even after an error."""
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self.commit()
        finally:
            self.close()

    def add(self, rows: pa.Table) -> None:
        """Add rows, and commit a part once there are enough.

        Args:
            rows: A results table with the columns ``dataset`` and ``index``.

        Raises:
            OSError: If the part cannot be written; committed parts are intact.
        """
        if not rows.num_rows:
            return
        self._waiting.append(rows)
        self._waiting_rows += rows.num_rows
        if self._waiting_rows >= self.rows_per_part:
            self.commit()

    def commit(self) -> None:
        """Write the rows in memory as one part, if there are any.

        Raises:
            OSError: If the part cannot be written; committed parts are intact.
        """
        if not self._waiting_rows:
            return
        path = self.directory / f"part-{self.rank:04d}-{self._number:06d}.parquet"
        buffer = pa.BufferOutputStream()
        pq.write_table(self._with_metadata(pa.concat_tables(self._waiting)), buffer)
        try:
            write_file(path, buffer.getvalue().to_pybytes())
        except OSError as error:
            raise OSError(
                error.errno,
                f"could not write {self._waiting_rows} rows to {path}: {error.strerror}. Earlier parts are "
                "intact: free some space and resume the run",
            ) from error
        self._number += 1
        self._waiting, self._waiting_rows = [], 0

    def _with_metadata(self, table: pa.Table) -> pa.Table:
        metadata = {RUN: json.dumps(self.run).encode(), ABOUT: json.dumps(self.about).encode()}
        if self.unlabelled:
            metadata[UNLABELLED] = json.dumps(sorted(self.unlabelled)).encode()
        return table.replace_schema_metadata(metadata)

    @property
    def is_empty(self) -> bool:
        """Whether the directory contains no part of any process."""
        return not any(self.directory.glob(PART))

    @property
    def parts(self) -> list[str]:
        """The names of the parts that this process committed, in this run or earlier ones."""
        return [f"part-{self.rank:04d}-{number:06d}.parquet" for number in range(self._number)]

    def finish(self, sizes: Mapping[str, int | None]) -> None:
        """Commit the remaining rows and write the manifest, which marks the results as complete.

        Args:
            sizes: Number of samples of each dataset, in the order of the results; ``None`` if unknown.
        """
        self.commit()
        rows: dict[str, int] = {}
        for part in sorted(self.directory.glob(PART)):
            rows[part.name] = pq.read_metadata(part).num_rows
        manifest = {"datasets": dict(sizes), "parts": rows, "run": self.run}
        write_file(self.directory / MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())

    def close(self) -> None:
        """Release the directory for other processes."""
        self._lock.release()


def check_run(part: Path, run: Mapping[str, Any]) -> None:
    """Refuse a part that another run wrote.

    Args:
        part: A committed part.
        run: The description of the run to resume.

    Raises:
        ResumeError: If they differ; the message names the first difference.
    """
    metadata = pq.read_schema(part).metadata or {}
    if RUN not in metadata:
        raise ResumeError(f"{part} was not written by this package; choose another directory")
    change = difference("", json.loads(metadata[RUN]), run)
    if change is not None:
        raise ResumeError(
            f"cannot resume {part.parent}: {change}. Resume with the same settings, or choose another directory"
        )


def difference(name: str, stored: Any, wanted: Any) -> str | None:
    """Return a sentence about the first difference between two descriptions; ``None`` if they are equal.

    Example:
        >>> difference("", {"model": "a", "scores": {"energy": 1}}, {"model": "a", "scores": {"energy": 2}})
        "its scores.energy is 1 and this run's is 2"
    """
    if not isinstance(stored, Mapping) or not isinstance(wanted, Mapping):
        return None if stored == wanted else f"its {name} is {stored!r} and this run's is {wanted!r}"
    for key in {**stored, **wanted}:
        inner = f"{name}.{key}" if name else key
        inner_difference = difference(inner, stored.get(key, "missing"), wanted.get(key, "missing"))
        if inner_difference is not None:
            return inner_difference
    return None

"""Reads a results directory, and checks that no row is missing or repeated."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lightning_gradmetrics.results.identity import IN_ORDER
from lightning_gradmetrics.results.parts import MANIFEST, PART, RUN, UNLABELLED
from lightning_gradmetrics.results.table import merge_results

__all__ = [
    "IncompleteResultsError",
    "StoredParts",
    "committed_rows",
    "has_images",
    "index_numbers",
    "indices_by_dataset",
    "is_complete",
    "named_indices",
    "read_results",
    "stored_parts",
    "unlabelled_datasets",
    "without_labels",
]

SAVED = "results.parquet"
"""The rows of a finished run of the command, or of ``callback.save``, in one file."""

SHOWN = 10
"""Largest number of rows that an error message names."""

KEYS = ("dataset", "index")

OF_IMAGES = {"height", "width", "pixels", "error", "miou"}
"""Columns that together only the rows of images of a segmentation model have."""


class IncompleteResultsError(ValueError):
    """A results directory has missing or repeated rows."""


def read_results(directory: str | Path, *, incomplete: bool = False, columns: Sequence[str] | None = None) -> pa.Table:
    """Read the results of a run as one table, ordered by dataset and index.

    Args:
        directory: A results directory that a run wrote (``output=``), or the run directory of the command or of
            ``callback.save``.
        incomplete: Whether to accept the results of an interrupted run. Repeated rows are always refused.
        columns: The columns to read in addition to ``dataset`` and ``index``; by default all.

    Returns:
        One row per sample: ``dataset``, ``index``, ``prediction``, ``label``, one column per score, ``finite``. The
        run's metadata is in the schema.

    Raises:
        FileNotFoundError: If the directory contains no results.
        IncompleteResultsError: If the run was interrupted, or rows are missing or repeated; the message names them.

    Example:
        >>> import tempfile
        >>> from lightning_gradmetrics.results.parts import ResultsWriter
        >>> directory = tempfile.mkdtemp()
        >>> with ResultsWriter(directory, {}) as writer:
        ...     writer.add(pa.table({"dataset": ["val"], "index": [1], "entropy": [0.5]}))
        >>> read_results(directory, incomplete=True).num_rows
        1
        >>> read_results(directory)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        lightning_gradmetrics.results.reading.IncompleteResultsError: the run that wrote ... was interrupted after 1 row...
    """
    stored = stored_parts(directory, incomplete)
    if not stored.parts:
        return pa.table({})
    return _checked(Path(directory), _read(stored.parts, columns), stored.sizes, incomplete)


@dataclass(frozen=True)
class StoredParts:
    """The parts of a results directory.

    Args:
        parts: The Parquet files, in order.
        rows: Their number of rows.
        sizes: The number of samples of each dataset, ``None`` where it is unknown.
    """

    parts: Sequence[Path]
    rows: int
    sizes: Mapping[str, int | None]


def stored_parts(directory: str | Path, incomplete: bool = False) -> StoredParts:
    """Return the parts of a results directory.

    Args:
        directory: A results directory.
        incomplete: Whether to accept an interrupted run.

    Raises:
        FileNotFoundError: If the directory contains no results.
        IncompleteResultsError: If the run was interrupted, or a part is missing, damaged or was changed.
    """
    directory = Path(directory)
    parts = sorted(directory.glob(PART))
    manifest = directory / MANIFEST
    if not parts and not manifest.exists():
        saved = directory / SAVED
        if not saved.is_file():
            raise FileNotFoundError(
                f"{directory} contains no results; expected the directory that was passed as output=, or the run directory of the "
                "command or of callback.save"
            )
        return StoredParts([saved], _undamaged(saved, pq.read_metadata).num_rows, {})
    rows = {part.name: _undamaged(part, pq.read_metadata).num_rows for part in parts}
    total = sum(rows.values())
    if manifest.exists():
        content = _undamaged(manifest, lambda path: json.loads(path.read_text()))
        _check_parts(directory, content["parts"], rows)
        return StoredParts(parts, total, content["datasets"])
    sizes = _sizes_of_run(parts[0])
    if not incomplete:
        raise _interrupted(directory, total, sizes)
    return StoredParts(parts, total, sizes)


def _undamaged(path: Path, read: Callable[[Path], Any]) -> Any:
    """Return what a function reads from a file of the results; an error names the file."""
    try:
        return read(path)
    except ValueError as error:  # of Arrow or JSON
        raise IncompleteResultsError(f"{path} is damaged ({error}): copy it again, or score the data again") from error


def is_complete(directory: Path) -> bool:
    """Return whether a directory contains the results of a completed run."""
    return (directory / MANIFEST).exists()


def _read(parts: Sequence[Path], columns: Sequence[str] | None) -> pa.Table:
    names = None if columns is None else list(dict.fromkeys([*KEYS, *columns]))
    tables = []
    for part in parts:
        tables.append(pq.read_table(part, columns=names))
    return without_labels(pa.concat_tables(tables), unlabelled_datasets(parts))


def unlabelled_datasets(parts: Sequence[Path]) -> set[str]:
    """Return the names of the datasets whose labels are not classes."""
    datasets = set[str]()
    for part in parts:
        metadata = pq.read_schema(part).metadata or {}
        datasets.update(json.loads(metadata.get(UNLABELLED, b"[]")))
    return datasets


def without_labels(table: pa.Table, datasets: set[str]) -> pa.Table:
    """Return the table with the labels of some datasets replaced by null."""
    if not datasets or "label" not in table.column_names:
        return table
    hidden = pc.is_in(table["dataset"], pa.array(sorted(datasets)))
    labels = pc.if_else(hidden, pa.scalar(None, table["label"].type), table["label"])
    return table.set_column(table.column_names.index("label"), "label", labels)


def _checked(directory: Path, table: pa.Table, sizes: Mapping[str, int | None], incomplete: bool) -> pa.Table:
    """Return the table sorted; refuse missing and repeated rows."""
    present = pc.unique(table["dataset"]).to_pylist()
    for name, indices in indices_by_dataset(table):
        _check_repeated(directory, name, indices)
        if not incomplete:
            _check_missing(directory, name, indices, sizes.get(name))
    names = list(sizes) + [name for name in present if name not in sizes]
    return merge_results([table], names)


def _sizes_of_run(part: Path) -> dict[str, int | None]:
    """Return the number of samples of each dataset, from the metadata of an interrupted run."""
    run = json.loads((pq.read_schema(part).metadata or {}).get(RUN, b"{}"))
    sizes: dict[str, int | None] = {}
    for name, dataset in run.get("datasets", {}).items():
        sizes[name] = dataset.get("rows") if dataset.get("order") == IN_ORDER else None
    return sizes


def _interrupted(directory: Path, rows: int, sizes: Mapping[str, int | None]) -> IncompleteResultsError:
    """Return the error for a directory without a manifest, which names the missing rows."""
    missing = []
    done = committed_rows(directory)
    for name, size in sizes.items():
        if size is None or done.unknown.get(name):
            continue
        left = np.setdiff1d(np.arange(size), done.indices.get(name, np.array([], dtype=np.int64)))
        if len(left):
            missing.append(f"{name!r} lacks {named_indices(left)}")
    details = f" ({'; '.join(missing)})" if missing else ""
    remedy = "score all images again" if has_images(directory) else "resume it"
    return IncompleteResultsError(
        f"the run that wrote {directory} was interrupted after {rows} row{'s' * (rows != 1)}{details}; {remedy}, or pass "
        "incomplete=True to read the existing rows"
    )


class CommittedRows:
    """The rows that are committed in a results directory.

    Attributes:
        indices: The sorted indices of the rows of each dataset.
        unknown: The number of rows of each dataset that have no index.
    """

    def __init__(self) -> None:
        self.indices: dict[str, np.ndarray[Any, Any]] = {}
        self.unknown: dict[str, int] = {}

    @property
    def total(self) -> int:
        """The number of rows."""
        return sum(map(len, self.indices.values())) + sum(self.unknown.values())


def committed_rows(directory: str | Path) -> CommittedRows:
    """Return the committed rows of a results directory, whether or not the run is complete.

    Args:
        directory: A results directory; it may be missing or empty.
    """
    indices: dict[str, list[np.ndarray[Any, Any]]] = {}
    committed = CommittedRows()
    for part in sorted(Path(directory).glob(PART)):
        for name, values in indices_by_dataset(pq.read_table(part, columns=list(KEYS))):
            indices.setdefault(name, []).append(values.drop_null().to_numpy())
            committed.unknown[name] = committed.unknown.get(name, 0) + values.null_count
    for name, arrays in indices.items():
        committed.indices[name] = np.unique(np.concatenate(arrays))
    return committed


def has_images(directory: str | Path) -> bool:
    """Return whether the committed rows of a results directory are images of a segmentation model.

    Args:
        directory: A results directory; it may be missing or empty.
    """
    part = next(Path(directory).glob(PART), None)
    return part is not None and set(pq.read_schema(part).names) >= OF_IMAGES


def indices_by_dataset(table: pa.Table) -> Iterator[tuple[str, pa.ChunkedArray]]:
    """Yield the name of each dataset in a results table, and the indices of its rows, int64.

    Raises:
        ValueError: If the indices are not whole numbers.
    """
    indices = index_numbers(table["index"])
    for name in pc.unique(table["dataset"]).to_pylist():
        yield name, indices.filter(pc.equal(table["dataset"], name))


def index_numbers(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return the column ``index`` of a results table as int64, null where the index is unknown.

    Raises:
        ValueError: If it contains anything other than whole numbers.

    Example:
        >>> index_numbers(pa.chunked_array([["a.png", "b.png"]]))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: the column 'index' contains values of type string, such as 'a.png'; expected whole numbers, ...
    """
    kind = column.type
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind) or pa.types.is_null(kind):
        with suppress(pa.ArrowInvalid):
            return column.cast(pa.int64())
    example = next((value for value in column.to_pylist() if value is not None and not _is_whole(value)), None)
    raise ValueError(
        f"the column 'index' contains values of type {kind}, such as {example!r}; expected whole numbers, each sample's "
        "position in its dataset, or null where it is unknown. Names of samples belong in a column 'sample_id'"
    )


def _is_whole(value: Any) -> bool:
    return isinstance(value, float) and value.is_integer()


def _check_parts(directory: Path, expected: Mapping[str, int], present: Mapping[str, int]) -> None:
    """Refuse a directory whose parts are not those of its manifest.

    Args:
        directory: The results directory.
        expected: The number of rows of each part in the manifest.
        present: The number of rows of each part in the directory.

    Raises:
        IncompleteResultsError: If they differ.
    """
    for name in sorted(expected.keys() | present.keys()):
        if expected.get(name) != present.get(name):
            raise IncompleteResultsError(
                f"{directory / name} has {present.get(name, 0)} rows, but the manifest lists {expected.get(name, 0)}; the "
                "directory was changed after the run: score the data again"
            )


def _check_repeated(directory: Path, dataset: str, indices: pa.ChunkedArray) -> None:
    unique, counts = np.unique(indices.drop_null().to_numpy(), return_counts=True)
    repeated = unique[counts > 1]
    if len(repeated):
        raise IncompleteResultsError(f"{directory} has rows of {dataset!r} more than once: {named_indices(repeated)}")


def _check_missing(directory: Path, dataset: str, indices: pa.ChunkedArray, size: int | None) -> None:
    if size is None or indices.null_count:
        return
    missing = np.setdiff1d(np.arange(size), indices.to_numpy())
    if len(missing):
        raise IncompleteResultsError(f"{directory} lacks rows of {dataset!r}: {named_indices(missing)}")


def named_indices(indices: np.ndarray[Any, Any]) -> str:
    """Return the first indices in words, and the number of the others."""
    shown = ", ".join(map(str, indices[:SHOWN]))
    more = len(indices) - SHOWN
    return f"indices {shown}" + (f" and {more} more" if more > 0 else "")

"""Reading a run directory: ``metrics.json`` and ``results.parquet``, checked; keys that are not known are ignored."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from lightning_gradmetrics.report.run import (
    IMAGE_TYPES,
    METRICS_FILE,
    RESULTS_FILE,
    VERSION,
    Comparison,
    Dataset,
    Metric,
    Picture,
    ReportError,
    Rows,
    Run,
    Score,
)

__all__ = ["read_run"]

Record = TypeVar("Record")


def read_run(directory: Path) -> Run:
    """Read and check the files of a run directory.

    Args:
        directory: Holds ``metrics.json`` and ``results.parquet``.

    Raises:
        ReportError: If a file is missing, cannot be read, has another version, or the two files do not fit together.
    """
    if not directory.is_dir():
        raise ReportError(
            f"{directory} is not a directory; name the run directory that holds {METRICS_FILE} and {RESULTS_FILE}"
        )
    content = _read_json(directory / METRICS_FILE)
    scores = _records(Score, content, "scores")
    return Run(
        directory=directory,
        datasets=_records(Dataset, content, "datasets"),
        scores=scores,
        metrics=_records(Metric, content, "metrics"),
        rows=_read_rows(directory / RESULTS_FILE, [score.name for score in scores]),
        comparisons=_records(Comparison, content, "comparisons"),
        pictures=_pictures(directory, content),
        statements=_sentences(content, "statements"),
        notes=_sentences(content, "notes"),
        model=_mapping(content, "model"),
        environment=_mapping(content, "environment"),
        timing=_mapping(content, "timing"),
        settings=_mapping(content, "settings"),
        created=str(content.get("created") or ""),
        command=str(content.get("command") or ""),
    )


def _pictures(directory: Path, content: Mapping[str, Any]) -> tuple[Picture, ...]:
    """The pictures, each a file inside the run directory."""
    pictures = _records(Picture, content, "figures")
    for picture in pictures:
        path = directory / picture.file
        if path.suffix not in IMAGE_TYPES or not path.resolve().is_relative_to(directory.resolve()):
            kinds = ", ".join(IMAGE_TYPES)
            raise ReportError(f"{METRICS_FILE}: {picture.file!r} is no picture ({kinds}) inside the run directory")
        if not path.is_file():
            raise ReportError(
                f"{path} does not exist, and {METRICS_FILE} lists it: run it again, or take it off the list"
            )
    return pictures


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ReportError(f"{path} does not exist; the run did not get as far as its metrics, run it again") from None
    except (OSError, ValueError) as error:
        raise ReportError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ReportError(f"{path} holds a {type(content).__name__}; expected an object with 'version': {VERSION}")
    if content.get("version") != VERSION:
        raise ReportError(
            f"{path} has version {content.get('version')!r}; this report reads version {VERSION}: "
            "use the lightning_gradmetrics that wrote the run, or run it again"
        )
    return content


def _records(kind: type[Record], content: Mapping[str, Any], key: str) -> tuple[Record, ...]:
    return tuple(_record(kind, entry, f"{key}[{i}]") for i, entry in enumerate(_sequence(content, key)))


def _sequence(content: Mapping[str, Any], key: str) -> list[Any]:
    entries = content.get(key) or []
    if not isinstance(entries, list):
        raise ReportError(f"{METRICS_FILE}: '{key}' must be a list, not {type(entries).__name__}")
    return entries


def _mapping(content: Mapping[str, Any], key: str) -> dict[str, Any]:
    entries = content.get(key) or {}
    if not isinstance(entries, dict):
        raise ReportError(f"{METRICS_FILE}: '{key}' must be an object, not {type(entries).__name__}")
    return entries


def _sentences(content: Mapping[str, Any], key: str) -> tuple[str, ...]:
    return tuple(str(entry) for entry in _sequence(content, key))


def _record(kind: type[Record], entry: object, where: str) -> Record:
    """Make a record of the keys that it knows; other keys are ignored, and None stands for a missing optional one."""
    if not isinstance(entry, dict):
        raise ReportError(f"{METRICS_FILE}: {where} must be an object, not {type(entry).__name__}")
    values: dict[str, Any] = {}
    for item in fields(kind):  # type: ignore[arg-type]
        value, optional = entry.get(item.name), item.default is not MISSING
        if value is not None:
            values[item.name] = _typed(value, str(item.type), f"{where}.{item.name}")
        elif not optional and item.name in entry and "None" in str(item.type):
            values[item.name] = None
        elif not optional:
            raise ReportError(f"{METRICS_FILE}: {where} has no {item.name!r}")
    return kind(**values)


def _typed(value: Any, kind: str, where: str) -> Any:
    """Check a JSON value against the field's type, which dataclasses keep as text."""
    allowed: tuple[type, ...] = {"str": (str,), "bool": (bool,), "int": (int,), "float": (int, float)}[
        kind.split(" ")[0]
    ]
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        raise ReportError(f"{METRICS_FILE}: {where} is {value!r}; expected {kind}")
    return value


def _read_rows(path: Path, scores: list[str]) -> dict[str, Rows]:
    """The columns of ``results.parquet``, one entry a data set, in order of appearance."""
    wanted = ["dataset", "index", "prediction", "label", "finite", *scores]
    try:
        missing = [name for name in wanted if name not in pq.read_schema(path).names]
        if missing:
            raise ReportError(
                f"{path} has no column {', '.join(map(repr, missing))}: it is not from the run of {METRICS_FILE}"
            )
        table = pq.read_table(path, columns=wanted)
    except FileNotFoundError:
        raise ReportError(f"{path} does not exist; the run did not get as far as its results, run it again") from None
    except (OSError, pa.ArrowException) as error:
        raise ReportError(f"{path} cannot be read as Parquet: {error}") from error
    names = table["dataset"].combine_chunks().dictionary_encode()
    codes = names.indices.to_numpy(zero_copy_only=False)
    rows = _rows(table, scores)
    return {
        str(name): rows.take(np.flatnonzero(codes == code)) for code, name in enumerate(names.dictionary.to_pylist())
    }


def _rows(table: pa.Table, scores: list[str]) -> Rows:
    prediction, label = (table[name].combine_chunks() for name in ("prediction", "label"))
    return Rows(
        index=table["index"].to_numpy().astype(np.int64),
        prediction=_integers(prediction),
        label=_integers(label),
        labelled=_flags(label.is_valid()) & _flags(prediction.is_valid()),
        finite=_flags(table["finite"].combine_chunks().fill_null(False)),
        scores={name: table[name].to_numpy().astype(np.float64) for name in scores},
    )


def _integers(column: pa.Array) -> NDArray[np.int64]:
    """A nullable column as integers, -1 where it is null."""
    values: NDArray[np.int64] = column.cast(pa.int64()).fill_null(-1).to_numpy(zero_copy_only=False)
    return values


def _flags(column: pa.Array) -> NDArray[np.bool_]:
    values: NDArray[np.bool_] = np.asarray(column.to_numpy(zero_copy_only=False), dtype=bool)
    return values

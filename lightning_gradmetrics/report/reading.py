"""Reads and checks a run directory: ``metrics.json`` and ``results.parquet``. Unknown keys are ignored."""

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
    THUMBNAILS_FILE,
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

__all__ = ["read_run", "record_of"]

Record = TypeVar("Record")
TYPES: dict[str, tuple[type, ...]] = {"str": (str,), "bool": (bool,), "int": (int,), "float": (int, float)}


def read_run(directory: Path) -> Run:
    """Read and check the files of a run directory.

    Args:
        directory: Contains ``metrics.json`` and ``results.parquet``.

    Returns:
        The run.

    Raises:
        ReportError: If a file is missing, unreadable or of another version, or if the two files do not match.
    """
    if not directory.is_dir():
        raise ReportError(
            f"{directory} is not a directory; name a run directory that contains {METRICS_FILE} and {RESULTS_FILE}"
        )
    content = _read_json(directory / METRICS_FILE)
    scores = _records(Score, content, "scores")
    names = [score.name for score in scores]
    results = _read_results(directory / RESULTS_FILE, names)
    return Run(
        directory=directory,
        datasets=_records(Dataset, content, "datasets"),
        scores=scores,
        metrics=_records(Metric, content, "metrics"),
        results=results,
        rows=_rows_by_dataset(results, names),
        comparisons=_records(Comparison, content, "comparisons"),
        pictures=_pictures(directory, content),
        notes=_sentences(content, "notes"),
        answers=_sentences(content, "answers"),
        model=_mapping(content, "model"),
        environment=_mapping(content, "environment"),
        timing=_mapping(content, "timing"),
        settings=_mapping(content, "settings"),
        thresholds=_mapping(content, "thresholds"),
        created=str(content.get("created") or ""),
        command=str(content.get("command") or ""),
        thumbnails=_thumbnails(directory),
    )


def _pictures(directory: Path, content: Mapping[str, Any]) -> tuple[Picture, ...]:
    """Return the pictures, after checking that each is a file inside the run directory."""
    pictures = _records(Picture, content, "figures")
    for picture in pictures:
        path = directory / picture.file
        if path.suffix not in IMAGE_TYPES or not path.resolve().is_relative_to(directory.resolve()):
            kinds = ", ".join(IMAGE_TYPES)
            raise ReportError(f"{METRICS_FILE}: {picture.file!r} is not a picture ({kinds}) inside the run directory")
        if not path.is_file():
            raise ReportError(f"{path} does not exist, but {METRICS_FILE} lists it: run it again, or remove the entry")
    return pictures


def _thumbnails(directory: Path) -> dict[str, dict[str, str]]:
    """Return the file of each thumbnail by dataset and index; files that do not exist are left out."""
    path = directory / THUMBNAILS_FILE
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    thumbnails: dict[str, dict[str, str]] = {}
    for dataset, files in content.items():
        for index, file in files.items():
            target = (directory / file).resolve()
            if target.suffix in IMAGE_TYPES and target.is_file() and target.is_relative_to(directory.resolve()):
                thumbnails.setdefault(dataset, {})[index] = file
    return thumbnails


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ReportError(f"{path} does not exist: {_reason(path.parent)}") from None
    except (OSError, ValueError) as error:
        raise ReportError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ReportError(f"{path} contains a {type(content).__name__}; expected an object with 'version': {VERSION}")
    if content.get("version") != VERSION:
        raise ReportError(
            f"{path} has version {content.get('version')!r}; this report reads version {VERSION}: "
            "use the lightning_gradmetrics that wrote the run, or run it again"
        )
    return content


def _reason(directory: Path) -> str:
    """Return why a directory has no metrics, and what to do."""
    runs = sorted(path.parent for path in directory.rglob(METRICS_FILE))
    if runs:
        return f"{directory} is not a run but contains {len(runs)}, such as {runs[-1]}"
    return "the directory is not that of a run, or the run stopped before its metrics were written; run it again"


def _records(kind: type[Record], content: Mapping[str, Any], key: str) -> tuple[Record, ...]:
    records = []
    for number, entry in enumerate(_sequence(content, key)):
        records.append(record_of(kind, entry, f"{key}[{number}]"))
    return tuple(records)


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
    return tuple(map(str, _sequence(content, key)))


def record_of(kind: type[Record], entry: object, where: str) -> Record:
    """Return a record made from its known keys; a missing optional key gets its default."""
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
    """Return a JSON value after checking it against the type of its field, such as ``float | None``."""
    allowed = TYPES[kind.partition(" ")[0]]
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        raise ReportError(f"{METRICS_FILE}: {where} is {value!r}; expected {kind}")
    return value


def _read_results(path: Path, scores: list[str]) -> pa.Table:
    """Return the columns of ``results.parquet`` that a report needs."""
    wanted = ["dataset", "index", "prediction", "label", "finite", *scores]
    try:
        missing = dict.fromkeys(map(repr, wanted))
        for name in pq.read_schema(path).names:
            missing.pop(repr(name), None)
        if missing:
            raise ReportError(f"{path} has no column {', '.join(missing)}: it is not from the run of {METRICS_FILE}")
        optional = ["path"] if "path" in pq.read_schema(path).names else []
        return pq.read_table(path, columns=[*wanted, *optional])
    except FileNotFoundError:
        raise ReportError(
            f"{path} does not exist: the run stopped before its results were written; run it again"
        ) from None
    except (OSError, pa.ArrowException) as error:
        raise ReportError(f"{path} cannot be read as Parquet: {error}") from error


def _rows_by_dataset(results: pa.Table, scores: list[str]) -> dict[str, Rows]:
    """Return the rows of each dataset, in order of appearance."""
    names = results["dataset"].combine_chunks().dictionary_encode()
    codes = names.indices.to_numpy(zero_copy_only=False)
    rows = _rows(results, scores)
    by_dataset = {}
    for code, name in enumerate(names.dictionary.to_pylist()):
        by_dataset[str(name)] = rows.take(np.flatnonzero(codes == code))
    return by_dataset


def _rows(table: pa.Table, scores: list[str]) -> Rows:
    prediction, label = table["prediction"].combine_chunks(), table["label"].combine_chunks()
    return Rows(
        index=_integers(table["index"].combine_chunks()),
        prediction=_integers(prediction),
        label=_integers(label),
        labelled=_flags(label.is_valid()) & _flags(prediction.is_valid()),
        finite=_flags(table["finite"].combine_chunks().fill_null(False)),
        scores={name: table[name].to_numpy().astype(np.float64) for name in scores},
    )


def _integers(column: pa.Array) -> NDArray[np.int64]:
    """Return a nullable column as integers, -1 for null."""
    values: NDArray[np.int64] = column.cast(pa.int64()).fill_null(-1).to_numpy(zero_copy_only=False)
    return values


def _flags(column: pa.Array) -> NDArray[np.bool_]:
    values: NDArray[np.bool_] = np.asarray(column.to_numpy(zero_copy_only=False), dtype=bool)
    return values

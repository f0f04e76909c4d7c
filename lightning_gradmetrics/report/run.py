"""Reading a run directory: ``metrics.json`` and ``results.parquet``, checked, as frozen records and numpy columns."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

__all__ = [
    "METRICS_FILE",
    "RESULTS_FILE",
    "VERSION",
    "Comparison",
    "Dataset",
    "Metric",
    "ReportError",
    "Rows",
    "Run",
    "Score",
    "read_run",
]

METRICS_FILE = "metrics.json"
RESULTS_FILE = "results.parquet"
VERSION = 1

Record = TypeVar("Record")


class ReportError(ValueError):
    """A run directory that no report can be made from; the message says which file, why, and what to do."""


@dataclass(frozen=True)
class Dataset:
    """A data set that was scored; ``role`` ``id`` is in-distribution, every other role names a group."""

    name: str
    role: str = ""
    rows: int | None = None
    not_finite: int = 0
    labelled: bool = False
    accuracy: float | None = None
    description: str = ""


@dataclass(frozen=True)
class Score:
    """A score; ``family`` is ``gradient`` or ``baseline``."""

    name: str
    family: str = ""
    target: str | None = None
    summary: str = ""
    paper: str | None = None
    seconds_per_sample: float | None = None


@dataclass(frozen=True)
class Metric:
    """A figure of one score on one data set or group, in natural units (0 to 1)."""

    score: str
    task: str
    metric: str
    value: float | None
    dataset: str | None = None
    group: str | None = None
    low: float | None = None
    high: float | None = None
    count_positive: int | None = None
    count_negative: int | None = None


@dataclass(frozen=True)
class Comparison:
    """A paired difference of a score to a baseline, and what it allows to say."""

    score: str
    baseline: str
    task: str
    metric: str
    difference: float | None
    verdict: str
    dataset: str | None = None
    group: str | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Rows:
    """The rows of one data set, as columns; ``label`` is -1 where there is none (see ``labelled``)."""

    index: NDArray[np.int64]
    prediction: NDArray[np.int64]
    label: NDArray[np.int64]
    labelled: NDArray[np.bool_]
    finite: NDArray[np.bool_]
    scores: Mapping[str, NDArray[np.float64]]

    def __len__(self) -> int:
        return len(self.index)

    def take(self, which: NDArray[Any]) -> Rows:
        """The rows that ``which`` selects (indices or a mask)."""
        scores = {name: column[which] for name, column in self.scores.items()}
        return Rows(
            self.index[which],
            self.prediction[which],
            self.label[which],
            self.labelled[which],
            self.finite[which],
            scores,
        )

    @property
    def wrong(self) -> NDArray[np.bool_]:
        """True where a label is known and the prediction differs from it."""
        wrong: NDArray[np.bool_] = self.labelled & (self.prediction != self.label)
        return wrong


@dataclass(frozen=True)
class Run:
    """All that a report is made from."""

    directory: Path
    datasets: tuple[Dataset, ...]
    scores: tuple[Score, ...]
    metrics: tuple[Metric, ...]
    rows: Mapping[str, Rows]
    comparisons: tuple[Comparison, ...] = ()
    statements: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    model: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    timing: Mapping[str, Any] = field(default_factory=dict)
    created: str = ""
    command: str = ""


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
        statements=_sentences(content, "statements"),
        notes=_sentences(content, "notes"),
        model=_mapping(content, "model"),
        environment=_mapping(content, "environment"),
        timing=_mapping(content, "timing"),
        created=str(content.get("created") or ""),
        command=str(content.get("command") or ""),
    )


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
    label = table["label"].combine_chunks()
    return Rows(
        index=table["index"].to_numpy().astype(np.int64),
        prediction=table["prediction"].to_numpy().astype(np.int64),
        label=label.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64),
        labelled=np.asarray(label.is_valid().to_numpy(zero_copy_only=False), dtype=bool),
        finite=np.asarray(table["finite"].to_numpy(), dtype=bool),
        scores={name: table[name].to_numpy().astype(np.float64) for name in scores},
    )

"""What a run is to the report: frozen records, and the rows of each data set as numpy columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "IMAGE_TYPES",
    "METRICS_FILE",
    "RESULTS_FILE",
    "VERSION",
    "Comparison",
    "Dataset",
    "Metric",
    "Picture",
    "ReportError",
    "Rows",
    "Run",
    "Score",
]

METRICS_FILE = "metrics.json"
RESULTS_FILE = "results.parquet"
VERSION = 1
IMAGE_TYPES = {".svg": "image/svg+xml", ".png": "image/png"}


class ReportError(ValueError):
    """A run directory that no report can be made from; the message says which file, why, and what to do."""


@dataclass(frozen=True)
class Dataset:
    """A data set that was scored; ``role`` ``id`` is in-distribution, every other role names a group."""

    name: str
    role: str = ""
    rows: int | None = None
    not_finite: int = 0
    labelled: int = 0
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
class Picture:
    """A picture in the run directory, with its words, and the title of the section that it stands in."""

    file: str
    title: str = ""
    caption: str = ""
    section: str = "Pictures"


@dataclass(frozen=True)
class Rows:
    """The rows of one data set, as columns; -1 where a prediction or a label is not known (see ``labelled``)."""

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
    pictures: tuple[Picture, ...] = ()
    statements: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    model: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    timing: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    created: str = ""
    command: str = ""

"""The content of a run directory: frozen records, and the rows of each dataset as NumPy columns."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from markupsafe import Markup
from numpy.typing import NDArray

__all__ = [
    "IMAGE_TYPES",
    "METRICS_FILE",
    "RESULTS_FILE",
    "VERSION",
    "Comparison",
    "Dataset",
    "Floats",
    "Metric",
    "Picture",
    "THUMBNAILS_FILE",
    "ReportError",
    "Rows",
    "Run",
    "Score",
    "picture_source",
]

METRICS_FILE = "metrics.json"
RESULTS_FILE = "results.parquet"
VERSION = 1
IMAGE_TYPES = {".svg": "image/svg+xml", ".png": "image/png"}

THUMBNAILS_FILE = "samples/index.json"
"""The thumbnail file of each sample by dataset and index, relative to the run directory."""

DARK = """<style>@media (prefers-color-scheme: dark) {
#figure_1 > #patch_1 path { fill: none !important }
g[id^="text_"], g[id^="text_"] g:not([style*="fill: #b03a00"]) { fill: #e9ebef !important }
path[style*="stroke: #000000"], use[style*="stroke: #000000"] { stroke: #a9b1bd !important }
}</style>"""
"""Colours of matplotlib's pictures in dark mode; the titles of incorrect predictions keep their colour."""

READS_LABELS = "reads labels"
"""The value of ``fit`` for a score that reads the true label."""

Floats = NDArray[np.float64]


class ReportError(ValueError):
    """A report cannot be made from a run directory; the message names the file, the reason and the remedy."""


@dataclass(frozen=True)
class Dataset:
    """A scored dataset; the role ``id`` is in-distribution, and any other role names a group."""

    name: str
    role: str = ""
    rows: int | None = None
    not_finite: int = 0
    labelled: int = 0
    accuracy: float | None = None
    description: str = ""


@dataclass(frozen=True)
class Score:
    """A score: its family (``gradient`` or ``baseline``), its fit, and its forward passes (``None`` if unknown)."""

    name: str
    family: str = ""
    fit: str = ""
    forwards: int | None = 1
    target: str | None = None
    summary: str = ""
    paper: str | None = None


@dataclass(frozen=True)
class Metric:
    """One number of one score on one dataset or group, in natural units (0 to 1)."""

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
    """A paired difference to the named baseline with its verdict, and the interval of the difference to the best baseline."""

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
    value: float | None = None
    baseline_value: float | None = None
    best_baseline: str | None = None
    max_adjusted_low: float | None = None
    max_adjusted_high: float | None = None
    max_adjusted_verdict: str | None = None


@dataclass(frozen=True)
class Picture:
    """A picture in the run directory, its caption, and the title of its section."""

    file: str
    title: str = ""
    caption: str = ""
    section: str = "Pictures"


@dataclass(frozen=True)
class Rows:
    """The rows of one dataset as columns ``(N,)``; unknown predictions and labels are -1 (see ``labelled``)."""

    index: NDArray[np.int64]
    prediction: NDArray[np.int64]
    label: NDArray[np.int64]
    labelled: NDArray[np.bool_]
    finite: NDArray[np.bool_]
    scores: Mapping[str, Floats]

    def __len__(self) -> int:
        return len(self.index)

    def take(self, which: NDArray[Any]) -> Rows:
        """Return the rows that ``which`` (indices or a mask) selects."""
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
    def incorrect(self) -> NDArray[np.bool_]:
        """True if a label is known and differs from the prediction."""
        incorrect: NDArray[np.bool_] = self.labelled & (self.prediction != self.label)
        return incorrect


@dataclass(frozen=True)
class Run:
    """Everything that a report shows."""

    directory: Path
    datasets: tuple[Dataset, ...]
    scores: tuple[Score, ...]
    metrics: tuple[Metric, ...]
    results: pa.Table
    rows: Mapping[str, Rows]
    comparisons: tuple[Comparison, ...] = ()
    pictures: tuple[Picture, ...] = ()
    notes: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    model: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    timing: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    thresholds: Mapping[str, Any] = field(default_factory=dict)
    created: str = ""
    command: str = ""
    thumbnails: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @cached_property
    def roles(self) -> dict[str, str]:
        """The role of each described dataset, in order."""
        return {dataset.name: dataset.role for dataset in self.datasets}

    @cached_property
    def names(self) -> tuple[list[str], list[str]]:
        """The scores that can be used on unlabelled samples, and those that read the true label."""
        detectors: list[str] = []
        label_readers: list[str] = []
        for score in self.scores:
            (label_readers if score.fit == READS_LABELS else detectors).append(score.name)
        return detectors, label_readers

    @property
    def detectors(self) -> list[str]:
        """The scores that can be used on unlabelled samples."""
        return self.names[0]

    @property
    def label_readers(self) -> list[str]:
        """The scores that read the true label."""
        return self.names[1]

    def score(self, name: str) -> Score:
        """Return the score of a name."""
        return {score.name: score for score in self.scores}[name]

    def class_name(self, label: int) -> str:
        """Return the name of a class, its number if the run stores no names, or a dash if the class is unknown."""
        names = self.model.get("class_names") or ()
        if label < 0:
            return "–"
        return str(names[label]) if label < len(names) else str(label)

    def paths_of(self, dataset: str, indices: Sequence[int]) -> dict[int, str]:
        """Return the last two parts of the path of each sample, if the results have paths."""
        if "path" not in self.results.column_names:
            return {}
        is_here = pc.equal(self.results["dataset"], dataset)
        is_listed = pc.is_in(self.results["index"], pa.array(indices, self.results["index"].type))
        rows = self.results.filter(pc.and_(is_here, is_listed)).select(["index", "path"]).to_pylist()
        return {row["index"]: "/".join((row["path"] or "").split("/")[-2:]) for row in rows}

    def role_of(self, dataset: str) -> str:
        """Return the role of a dataset; empty if the dataset is not described."""
        return self.roles.get(dataset, "")

    def split_by_role(self, rows: Mapping[str, Rows]) -> tuple[dict[str, Rows], dict[str, Rows]]:
        """Return the rows of the in-distribution datasets, and those of the others."""
        inside: dict[str, Rows] = {}
        outside: dict[str, Rows] = {}
        for name, columns in rows.items():
            (inside if self.role_of(name) == "id" else outside)[name] = columns
        return inside, outside

    def finite_rows(self) -> dict[str, Rows]:
        """Return the finite rows of each described dataset that has any."""
        finite = {}
        for dataset in self.datasets:
            rows = self.rows.get(dataset.name)
            if rows is not None and rows.finite.any():
                finite[dataset.name] = rows.take(rows.finite)
        return finite


def picture_source(path: Path) -> Markup:
    """Return a picture as a data URL; an SVG picture has light text without a background in dark mode."""
    content = path.read_bytes()
    if path.suffix == ".svg":
        start, end, rest = content.rpartition(b"</svg>")
        content = start + DARK.encode() + end + rest
    return Markup(f"data:{IMAGE_TYPES[path.suffix]};base64,{b64encode(content).decode()}")

"""What all pictures share: the rows that are drawn, and which scores stand out in which colour."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_gradmetrics.report.columns import best_values, find_columns
from lightning_gradmetrics.report.curves import Floats
from lightning_gradmetrics.report.run import Metric, Rows, Run
from lightning_gradmetrics.report.svg import SERIES

__all__ = ["MAX_ROWS", "Drawing", "known_value", "start_drawing"]

MAX_ROWS = 50_000
"""At most about this many rows are drawn, shared evenly among the data sets."""
_GRADIENT_COLOURS = (SERIES[0], SERIES[2], SERIES[3], SERIES[5])
_BASELINE_COLOURS = (SERIES[1], SERIES[4], SERIES[6])


@dataclass(frozen=True)
class Drawing:
    """The run, the finite rows of it that are drawn, and a colour for each score that stands out."""

    run: Run
    rows: Mapping[str, Rows]
    sampled: bool
    colours: Mapping[str, str]

    @property
    def inside(self) -> list[str]:
        """Names of the in-distribution sets that have rows to draw."""
        return [dataset.name for dataset in self.run.datasets if dataset.role == "id" and dataset.name in self.rows]

    def values(self, datasets: Iterable[str], score: str) -> Floats:
        """Finite values of a score over the named data sets."""
        columns = [self.rows[name].scores[score] for name in datasets if name in self.rows]
        joined: Floats = np.concatenate([*columns, np.empty(0)])
        finite: Floats = joined[np.isfinite(joined)]
        return finite


def start_drawing(run: Run, max_rows: int = MAX_ROWS) -> Drawing:
    """Keep finite rows, thin large data sets with a fixed seed, and give the leading scores their colours."""
    finite = {
        dataset.name: run.rows[dataset.name].take(run.rows[dataset.name].finite)
        for dataset in run.datasets
        if dataset.name in run.rows
    }
    finite = {name: rows for name, rows in finite.items() if len(rows)}
    share = max(200, max_rows // max(1, len(finite)))
    random = np.random.default_rng(0)
    drawn = {name: rows.take(_some(len(rows), share, random)) for name, rows in finite.items()}
    sampled = any(len(drawn[name]) < len(rows) for name, rows in finite.items())
    return Drawing(run, drawn, sampled, _colours(run))


def _some(count: int, most: int, random: np.random.Generator) -> NDArray[np.int64]:
    chosen = np.arange(count) if count <= most else np.sort(random.choice(count, most, replace=False))
    return chosen.astype(np.int64)


def _colours(run: Run) -> dict[str, str]:
    """Colours for four gradient scores and three baselines: the best of each column first, then by mean AUROC."""
    baseline = {score.name for score in run.scores if score.family == "baseline"}
    columns = {column: entries for column, entries in find_columns(run).items() if column.metric == "auroc"}
    colours: dict[str, str] = {}
    for side, palette in ((False, _GRADIENT_COLOURS), (True, _BASELINE_COLOURS)):
        names = [score.name for score in run.scores if (score.name in baseline) is side]
        first = [best_values(c, {n: e for n, e in entries.items() if n in names})[:1] for c, entries in columns.items()]
        means = {
            name: np.mean([known_value(entries, name) or 0.0 for entries in columns.values()] or [0.0])
            for name in names
        }
        ranked = dict.fromkeys(
            [*(name for best in first for name in best), *sorted(names, key=lambda name: -means[name])]
        )
        colours |= dict(zip(ranked, palette, strict=False))
    return colours


def known_value(entries: Mapping[str, Metric], score: str) -> float | None:
    """The figure of a score, or None where there is none or it is not a number."""
    entry = entries.get(score)
    return entry.value if entry is not None and entry.value is not None and math.isfinite(entry.value) else None

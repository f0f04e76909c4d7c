"""Thresholds fitted on in-distribution validation data, and the accept or reject that they say."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from lightning_gradmetrics.evaluation.reading import finite_rows, float_column
from lightning_gradmetrics.meters.functional.counts import check_rate

__all__ = ["Thresholds", "apply_thresholds", "fit_thresholds"]


@dataclass(frozen=True)
class Thresholds:
    """A threshold a score: a sample is accepted where its score is at most the threshold.

    Args:
        values: The threshold of each score.
        tpr: The share of in-distribution validation samples that each accepts, at least.
        rows: The number of validation samples.
    """

    values: Mapping[str, float]
    tpr: float
    rows: int

    def to_json(self) -> str:
        """The thresholds as JSON text; numbers come back exactly."""
        return json.dumps(asdict(self), indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Thresholds:
        """The thresholds that :meth:`to_json` wrote.

        Raises:
            ValueError: If the text holds something else.
        """
        found: Any = json.loads(text)
        if not isinstance(found, dict) or set(found) != {"values", "tpr", "rows"}:
            raise ValueError("this JSON holds no thresholds: it needs the keys values, tpr and rows; fit them again")
        return cls(
            {name: float(value) for name, value in found["values"].items()}, float(found["tpr"]), int(found["rows"])
        )


def fit_thresholds(results: pa.Table, scores: Sequence[str], tpr: float = 0.95) -> Thresholds:
    """Thresholds at a true-positive rate, an in-distribution sample that is accepted being a true positive.

    The threshold of a score is the lowest of its values that accepts at least ``tpr`` of the samples. Rows that are
    not finite are left out.

    Args:
        results: The results table of in-distribution validation data, and of nothing else.
        scores: The columns to fit.
        tpr: The share to accept, in (0, 1].

    Raises:
        ValueError: If a column is missing, the rate is wrong, or no row is finite.

    Example:
        >>> table = pa.table({"entropy": [0.1, 0.2, 0.3, 9.0]})
        >>> fit_thresholds(table, ["entropy"], tpr=0.75).values
        {'entropy': 0.3}
    """
    check_rate(tpr, "tpr")
    keep = finite_rows(results, scores)
    rows = int(keep.sum())
    if not rows:
        raise ValueError("no row of the results is finite: there is nothing to fit thresholds on")
    place = math.ceil(tpr * rows * (1 - 1e-12)) - 1
    values = {score: float(np.partition(float_column(results, score)[keep], place)[place]) for score in scores}
    return Thresholds(values, float(tpr), rows)


def apply_thresholds(results: pa.Table, thresholds: Thresholds) -> pa.Table:
    """The results with a column ``<score>_accept`` for each threshold: true where the score is at most the threshold.

    A row whose score is missing or NaN, or that is flagged as not finite, is rejected.

    Args:
        results: A results table.
        thresholds: From :func:`fit_thresholds`.

    Raises:
        ValueError: If the results lack a score that has a threshold.

    Example:
        >>> table = pa.table({"entropy": [0.1, 0.4]})
        >>> apply_thresholds(table, Thresholds({"entropy": 0.3}, 0.95, 100))["entropy_accept"].to_pylist()
        [True, False]
    """
    flagged = finite_rows(results, [])
    for score, threshold in thresholds.values.items():
        column = float_column(results, score)
        accept = pa.array(flagged & (column <= threshold))
        name = f"{score}_accept"
        if name in results.column_names:
            results = results.drop_columns([name])
        results = results.append_column(name, accept)
    return results

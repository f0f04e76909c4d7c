"""Areas under the accuracy and F1 curves of the accepted samples (AUAC and AUFC), as in GradTrust's table."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from lightning_gradmetrics.meters.functional import auac, aufc
from lightning_gradmetrics.report.tables.grid import Column, Grid, Group

__all__ = ["areas_grid", "selective_areas"]

MODES = ("coverage", "threshold")
NOTES = (
    "Areas under the accuracy (AUAC) and the F1 curve (AUFC) of the accepted samples, times 100. Higher is better.",
    "Over coverage, only the order of the scores counts. Over a threshold between the smallest and the largest score, the "
    "scale matters too: a rescaling that keeps the order changes the area. The paper does not state which one it used.",
)


def selective_areas(results: pa.Table, scores: Sequence[str]) -> list[dict[str, Any]]:
    """Return AUAC and AUFC of every labelled dataset and score, over coverage and over a threshold.

    Args:
        results: A run's per-sample results.
        scores: Names of its score columns.

    Returns:
        One record per dataset and score: ``dataset``, ``score``, ``<auac or aufc>_<mode>``; NaN if all scores are
        equal.
    """
    known = results.filter(pc.and_(results["finite"], pc.is_valid(results["label"])))
    records = []
    for dataset in pc.unique(known["dataset"]).to_pylist():
        rows = known.filter(pc.equal(known["dataset"], dataset))
        incorrect = torch.from_numpy(pc.not_equal(rows["prediction"], rows["label"]).to_numpy().astype(np.int64))
        for score in scores:
            values = torch.from_numpy(rows[score].to_numpy().astype(np.float64))
            records.append({"dataset": dataset, "score": score, **_areas(values, incorrect)})
    return records


def _areas(values: Tensor, incorrect: Tensor) -> dict[str, float]:
    areas = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*needs at least two distinct scores")
        for mode in MODES:
            areas[f"auac_{mode}"] = float(auac(values, incorrect, mode))  # type: ignore[arg-type]
            areas[f"aufc_{mode}"] = float(aufc(values, incorrect, mode))  # type: ignore[arg-type]
    return areas


def areas_grid(records: Sequence[dict[str, Any]]) -> Grid:
    """Return the table for the terminal.

    Args:
        records: The result of :func:`selective_areas`.
    """
    several = len({record["dataset"] for record in records}) > 1
    names = []
    for record in records:
        names.append(f"{record['dataset']}: {record['score']}" if several else record["score"])
    groups = []
    for mode in MODES:
        columns = (_column(records, "auac", mode), _column(records, "aufc", mode))
        groups.append(Group(f"over {mode}", columns))
    return Grid("AUAC and AUFC", Column("score", tuple(names), left=True), tuple(groups), notes=NOTES)


def _column(records: Sequence[dict[str, Any]], metric: str, mode: str) -> Column:
    cells = []
    for record in records:
        value = record[f"{metric}_{mode}"]
        cells.append("–" if math.isnan(value) else f"{100 * value:.2f}")
    return Column(metric.upper(), tuple(cells))

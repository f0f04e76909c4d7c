"""Computes the points of curves with ``meters.functional``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from scipy.cluster.hierarchy import leaves_list, linkage
from sklearn.metrics import roc_curve

from lightning_gradmetrics.meters import functional
from lightning_gradmetrics.report.run import Floats, Rows

__all__ = [
    "Points",
    "clustered",
    "mean_roc",
    "risk_coverage",
    "roc_of_errors",
    "roc_of_errors_and_set",
    "roc_of_sets",
    "spearman",
]

GRID = np.linspace(0.0, 1.0, 401)
Points = tuple[Floats, Floats]


def _roc(negative: Floats, positive: Floats) -> Points | None:
    """Return false and true positive rates; None without finite negatives and positives."""
    negative, positive = negative[np.isfinite(negative)], positive[np.isfinite(positive)]
    if not len(negative) or not len(positive):
        return None
    scores = torch.from_numpy(np.concatenate([negative, positive]))
    target = torch.cat([torch.zeros(len(negative)), torch.ones(len(positive))]).int()
    fpr, tpr, _ = functional.roc(scores, target)
    return fpr.double().numpy(), tpr.double().numpy()


def roc_of_errors(rows: Rows, score: str) -> Points | None:
    """Return the ROC curve of incorrect against correct predictions."""
    values = rows.scores[score]
    return _roc(values[rows.labelled & ~rows.incorrect], values[rows.incorrect])


def roc_of_sets(inside: Sequence[Rows], outside: Rows, score: str) -> Points | None:
    """Return the ROC curve of a dataset against all in-distribution datasets."""
    if not inside:
        return None
    negative = np.concatenate([rows.scores[score] for rows in inside])
    return _roc(negative, outside.scores[score])


def roc_of_errors_and_set(inside: Sequence[Rows], outside: Rows, score: str, ood_share: float) -> Points | None:
    """Return the ROC curve of errors and a dataset against correct predictions, the dataset weighted to ``ood_share``."""
    if not inside or not 0 < ood_share < 1:
        return None
    values, positive = [outside.scores[score]], [np.ones(len(outside), bool)]
    labelled = 0
    for rows in inside:
        values.append(rows.scores[score][rows.labelled])
        positive.append(rows.incorrect[rows.labelled])
        labelled += int(rows.labelled.sum())
    scores, target = np.concatenate(values), np.concatenate(positive)
    weights = np.ones(len(scores))
    weights[: len(outside)] = ood_share / (1 - ood_share) * labelled / max(1, len(outside))
    known = np.isfinite(scores)
    if not (known & target).any() or not (known & ~target).any():
        return None
    fpr, tpr, _ = roc_curve(target[known], scores[known], sample_weight=weights[known], drop_intermediate=False)
    return fpr, tpr


def mean_roc(curves: Sequence[Points]) -> Points:
    """Return the mean true-positive rate of several curves at each false-positive rate; one curve is unchanged."""
    if len(curves) == 1:
        return curves[0]
    rates = np.zeros_like(GRID)
    for fpr, tpr in curves:
        rates += np.interp(GRID, fpr, tpr) / len(curves)
    return np.append(0.0, GRID), np.append(0.0, rates)


def risk_coverage(rows: Rows, score: str) -> Points | None:
    """Return coverage and error rate of labelled rows, accepted in order of uncertainty; None without finite rows."""
    known = rows.labelled & np.isfinite(rows.scores[score])
    if not known.any():
        return None
    scores = torch.from_numpy(rows.scores[score][known])
    coverage, risk, _ = functional.risk_coverage_curve(scores, torch.from_numpy(rows.incorrect[known]).int())
    return coverage.double().numpy(), risk.double().numpy()


def spearman(rows: Sequence[Rows], names: Sequence[str]) -> Mapping[tuple[str, str], float]:
    """Return the rank correlation of each pair of scores over rows on which all scores are finite."""
    columns = []
    for name in names:
        columns.append(np.concatenate([rows_of_dataset.scores[name] for rows_of_dataset in rows]))
    table = np.stack(columns, axis=1)
    table = table[np.isfinite(table).all(axis=1)]
    varied = np.flatnonzero(np.ptp(table, axis=0) > 0).tolist() if len(table) else []
    if len(varied) < 2:
        return {}
    matrix = functional.spearman(torch.from_numpy(table[:, varied].copy()))
    correlations = {}
    for row, first in enumerate(varied):
        for column, second in enumerate(varied):
            correlations[names[first], names[second]] = float(matrix[row, column])
    return correlations


def clustered(names: Sequence[str], correlations: Mapping[tuple[str, str], float]) -> list[str]:
    """Return the names in an order that puts similar scores next to each other."""
    known = [name for name in names if (name, name) in correlations]
    if len(known) < 3:
        return known
    distances = []
    for position, first in enumerate(known):
        for second in known[position + 1 :]:
            distances.append(1.0 - correlations[first, second])
    order = leaves_list(linkage(np.clip(distances, 0.0, None), "average", optimal_ordering=True))
    return list(np.array(known, dtype=object)[order])

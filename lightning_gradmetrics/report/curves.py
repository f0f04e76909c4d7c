"""Points of the curves that are drawn, with numpy; the figures in the tables come from the run's own metrics.

Ties are handled by groups: rows of equal score are met together, so no curve depends on the order of rows.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["Floats", "risk_coverage_curve", "roc_curve", "spearman", "thin"]

Floats = NDArray[np.float64]


def roc_curve(negative: Floats, positive: Floats) -> tuple[Floats, Floats]:
    """False and true positive rates as the threshold falls, from (0, 0) to (1, 1).

    Args:
        negative: Scores ``(N,)`` of the rows that should be low.
        positive: Scores ``(M,)`` of the rows that should be high.

    Example:
        >>> fpr, tpr = roc_curve(np.array([0.0, 1.0]), np.array([1.0, 2.0]))
        >>> fpr.tolist(), tpr.tolist()
        ([0.0, 0.0, 0.5, 1.0], [0.0, 0.5, 1.0, 1.0])
    """
    scores = np.concatenate([negative, positive])
    hits = np.concatenate([np.zeros(len(negative)), np.ones(len(positive))])
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    true = np.cumsum(hits[order])[ends]
    return np.append(0.0, (ends + 1 - true) / len(negative)), np.append(0.0, true / len(positive))


def risk_coverage_curve(scores: Floats, wrong: NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """Coverage and the error rate among the rows kept, the least uncertain first.

    Args:
        scores: Uncertainties ``(N,)``, higher = more uncertain.
        wrong: ``(N,)``, True where the prediction is wrong.

    Example:
        >>> coverage, risk = risk_coverage_curve(np.array([3.0, 1.0, 1.0]), np.array([True, False, True]))
        >>> coverage.round(2).tolist(), risk.round(2).tolist()
        ([0.33, 0.67, 1.0], [0.5, 0.5, 0.67])
    """
    order = np.argsort(scores, kind="stable")
    starts = np.append(0, np.flatnonzero(np.diff(scores[order])) + 1)
    sizes = np.diff(np.append(starts, len(scores)))
    expected = np.repeat(np.add.reduceat(wrong[order].astype(np.float64), starts) / sizes, sizes)
    count = np.arange(1, len(scores) + 1)
    return count / len(scores), np.cumsum(expected) / count


def spearman(columns: Floats) -> Floats:
    """Rank correlations ``(S, S)`` of the columns of ``(N, S)``; NaN where a column is constant.

    Example:
        >>> spearman(np.array([[1.0, 3.0], [2.0, 2.0], [9.0, 1.0]])).round(6).tolist()
        [[1.0, -1.0], [-1.0, 1.0]]
    """
    ranks = np.stack([_average_ranks(column) for column in columns.T], axis=1)
    centred = ranks - ranks.mean(axis=0)
    spread = np.sqrt((centred**2).sum(axis=0))
    spread[spread == 0] = np.nan
    correlations: Floats = np.clip((centred.T @ centred) / np.outer(spread, spread), -1.0, 1.0)
    return correlations


def _average_ranks(values: Floats) -> Floats:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: Floats = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return ranks


def thin(x: Floats, y: Floats, steps: int) -> tuple[Floats, Floats]:
    """Drop points that a drawing of ``steps`` x ``steps`` dots over the unit square cannot show.

    Example:
        >>> [len(axis) for axis in thin(np.linspace(0, 1, 5001), np.linspace(0, 1, 5001), steps=100)]
        [102, 102]
    """
    cells = np.round(np.stack([x, y]) * steps)
    keep = np.append(True, np.any(np.diff(cells, axis=1) != 0, axis=0))
    keep[-1] = True
    return x[keep], y[keep]

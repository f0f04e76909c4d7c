"""Metrics as plain functions of scores ``(N,)`` and targets ``(N,)``.

Scores are raw: any scale, any sign, higher = more uncertain. Target 1 is the positive class: an error, or
out-of-distribution.
"""

from lightning_gradmetrics.meters.functional.ranking import (
    auroc,
    average_precision,
    fpr_at_tpr,
    precision_recall_curve,
    roc,
)
from lightning_gradmetrics.meters.functional.selective import augrc, aurc, eaurc, risk_coverage_curve

__all__ = [
    "augrc",
    "aurc",
    "auroc",
    "average_precision",
    "eaurc",
    "fpr_at_tpr",
    "precision_recall_curve",
    "risk_coverage_curve",
    "roc",
]

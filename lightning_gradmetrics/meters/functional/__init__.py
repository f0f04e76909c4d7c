"""Metrics as plain functions of scores ``(N,)`` and targets ``(N,)``.

Scores are raw: any scale and sign, including infinities, higher = more uncertain; NaN is refused. Target 1 is the
positive class: an error, or out-of-distribution. A metric that is undefined because a class or all samples are missing
is NaN, with one ``UserWarning``.
"""

from lightning_gradmetrics.meters.functional.areas import auac, aufc
from lightning_gradmetrics.meters.functional.curves import precision_recall_curve, roc
from lightning_gradmetrics.meters.functional.ranking import auroc, average_precision, fpr_at_tpr, oscr
from lightning_gradmetrics.meters.functional.selective import (
    accuracy_at_coverage,
    augrc,
    aurc,
    coverage_at_risk,
    e_aurc,
    risk_coverage_curve,
)
from lightning_gradmetrics.meters.functional.summary import calibration_error, distribution, spearman

__all__ = [
    "accuracy_at_coverage",
    "auac",
    "aufc",
    "augrc",
    "aurc",
    "auroc",
    "average_precision",
    "calibration_error",
    "coverage_at_risk",
    "distribution",
    "e_aurc",
    "fpr_at_tpr",
    "oscr",
    "precision_recall_curve",
    "risk_coverage_curve",
    "roc",
    "spearman",
]

"""Meters: torchmetrics of raw uncertainty scores; ``meters.functional`` has them as plain functions."""

from lightning_gradmetrics.meters import functional
from lightning_gradmetrics.meters.ranking import AUROC, OSCR, ROC, AveragePrecision, FPRAtTPR, PrecisionRecallCurve
from lightning_gradmetrics.meters.selective import (
    AUAC,
    AUFC,
    AUGRC,
    AURC,
    EAURC,
    AccuracyAtCoverage,
    CoverageAtRisk,
    RiskCoverageCurve,
)
from lightning_gradmetrics.meters.summary import CalibrationError, ScoreDistribution, SpearmanCorrelation

__all__ = [
    "AUAC",
    "AUFC",
    "AUGRC",
    "AURC",
    "AUROC",
    "EAURC",
    "OSCR",
    "ROC",
    "AccuracyAtCoverage",
    "AveragePrecision",
    "CalibrationError",
    "CoverageAtRisk",
    "FPRAtTPR",
    "PrecisionRecallCurve",
    "RiskCoverageCurve",
    "ScoreDistribution",
    "SpearmanCorrelation",
    "functional",
]
